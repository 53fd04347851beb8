"""A smooth map from one patient to another, from matches: what lets the embedder learn from two patients at once.

After a first training within patients, matches between patients are mostly right, and what their neighbourhoods agree
on is better than each (see `consensus`). A second training takes such maps for true (UAE, arXiv 2311.15111, trains on
cycle-consistent points of two patients in the same spirit).
"""

import dataclasses

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from alice_jax.data import matching
from alice_jax.data.consensus import CYCLE_MM, robust_shift
from alice_jax.data.embeddings import Embedding

ANCHORS = 600  # cells that are matched
NEAREST = 32  # of them, that one node of the map is fitted to
NODES_MM, SPREAD_MM = 24.0, 20.0  # distance of the nodes, and how far around them anchors count
LEAST_AGREEING = 1.5  # weights of anchors; a node with less is not known


@dataclasses.dataclass(frozen=True)
class PartnerMap:
    """Where the partner shows what lies at the query's voxels in a box.

    low_zyx_vox, spacing_zyx_vox: of the nodes, in the query.
    moves_zyx_vox: (3, z, y, x) from the query's voxel to the partner's.
    agreeing: (z, y, x) weight of the anchors that each node rests on.
    """

    low_zyx_vox: np.ndarray
    spacing_zyx_vox: np.ndarray
    moves_zyx_vox: np.ndarray
    agreeing: np.ndarray

    def __call__(self, positions_zyx_vox: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Voxels (…, 3) of the partner for voxels (…, 3) of the query, and (…) which are known."""
        at = np.moveaxis((positions_zyx_vox - self.low_zyx_vox) / self.spacing_zyx_vox, -1, 0)
        moves = [ndimage.map_coordinates(move, at, order=1, mode="nearest") for move in self.moves_zyx_vox]
        known = ndimage.map_coordinates(self.agreeing, at, order=1, mode="constant") >= LEAST_AGREEING
        return positions_zyx_vox + np.stack(moves, axis=-1), known


def partner_map(
    query: Embedding,
    key: Embedding,
    body_zyx_vox: np.ndarray,
    box_zyx_vox: np.ndarray,
    rng: np.random.Generator,
) -> PartnerMap:
    """The map of a box of `query` into `key`.

    Args:
      body_zyx_vox: (n, 3) voxels of the query's body.
      box_zyx_vox: (2, 3), its first and last voxel.
    """
    low, high = np.asarray(box_zyx_vox, float)
    spacing_mm = np.array(query.codec.spacing_zyx_mm)
    step = NODES_MM / spacing_mm
    counts = np.ceil((high - low) / step).astype(int) + 1
    nodes = low + np.moveaxis(np.indices(counts), 0, -1).reshape(-1, 3) * step
    moves, agreeing = np.zeros((len(nodes), 3)), np.zeros(len(nodes))
    inside = body_zyx_vox[((body_zyx_vox >= low) & (body_zyx_vox <= high)).all(axis=1)]
    if len(inside) > NEAREST:
        anchors = inside[rng.permutation(len(inside))[:ANCHORS]].astype(float)
        found = matching.search(query, anchors, key).points_zyx_vox
        trust = 1 / (1 + (matching.cycle_mm(query, anchors, key, found) / CYCLE_MM) ** 2)
        distance_mm, index = cKDTree(anchors * spacing_mm).query(nodes * spacing_mm, k=NEAREST)
        starts_mm = (anchors[index] - nodes[:, None]) * spacing_mm
        weights = trust[index] * np.exp(-(distance_mm**2) / (2 * SPREAD_MM**2))
        moves_mm, agreeing = robust_shift(starts_mm, ((found - anchors) * spacing_mm)[index], weights)
        moves = moves_mm / spacing_mm
    grid = tuple(counts)
    return PartnerMap(low, step, moves.T.reshape(3, *grid), agreeing.reshape(grid))
