"""Finds the points of one scan in another by their embeddings (Alice [A] section 3.1; SAM, arXiv 2012.02383).

The score of a key cell is the mean of the fine and the coarse cosine similarity to the query's cell, the coarse
vectors being interpolated trilinearly to the fine grid and normalised again; the match is the cell of the highest
score. Cells outside the body are not searched.

Coordinates are voxels of the store's frame, order (z, y, x), voxel centres at integers. Fine cell i covers the voxels
[i·stride, (i + 1)·stride), so its centre is (i + ½)·stride − ½.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from alice_jax.data.embeddings import Embedding, EmbeddingReader, read_embedding
from alice_jax.errors import UserError

__all__ = [
    "Embedding",
    "EmbeddingReader",
    "Match",
    "cell_of_points",
    "match",
    "points_of_cells",
    "read_embedding",
    "relative_position",
    "search",
]

Triple = tuple[int, int, int]
SLAB_CELLS = 16384  # keys searched at once: 4 MB, and the scores of 64 queries another 4 MB


class Match(NamedTuple):
    """What was found for n points.

    points_zyx_vox: (n, 3) float, in the key scan.
    scores: (n,) float in [−1, 1].
    cycle_mm: (n,) float, how far from a point its match is matched back to; NaN where that was not asked for.
    """

    points_zyx_vox: np.ndarray
    scores: np.ndarray
    cycle_mm: np.ndarray


def cell_of_points(points_zyx_vox: np.ndarray, stride_zyx_vox: Triple, grid_zyx: Triple) -> np.ndarray:
    """(n, 3) int cells that hold the points; points beyond the grid fall into its border cells, each axis by its own
    length.

    >>> cell_of_points(np.array([[0, 3, 99]]), (2, 2, 2), (10, 10, 10))
    array([[0, 1, 9]])
    """
    cells = np.floor((np.asarray(points_zyx_vox) + 0.5) / stride_zyx_vox).astype(int)
    return np.clip(cells, 0, np.array(grid_zyx) - 1)


def points_of_cells(cells_zyx: np.ndarray, stride_zyx_vox: Triple, shape_zyx: Triple) -> np.ndarray:
    """(n, 3) float voxel coordinates of the cells' centres, kept inside the volume.

    >>> points_of_cells(np.array([[0, 1, 2]]), (2, 2, 2), (20, 20, 5))
    array([[0.5, 2.5, 4. ]])
    """
    points = (np.asarray(cells_zyx) + 0.5) * stride_zyx_vox - 0.5
    return np.clip(points, 0, np.array(shape_zyx) - 1)


def search(queries: np.ndarray, slabs: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Index and value of the largest dot product of each query with any of the keys, the first of equals.

    queries: (n, dims).  slabs: the keys (cells, dims), some at a time.

    >>> search(np.eye(2), iter([np.array([[1.0, 0.0]]), np.array([[0.0, 2.0], [1.0, 0.0]])]))
    (array([0, 1]), array([1., 2.]))
    """
    best = np.full(len(queries), -np.inf, queries.dtype)
    index = np.zeros(len(queries), int)
    start = 0
    for keys in slabs:
        scores = queries @ keys.T
        here = scores.argmax(axis=1)
        value = scores[np.arange(len(queries)), here]
        better = value > best
        index[better], best[better] = start + here[better], value[better]
        start += len(keys)
    return index, best


def match(
    query: Embedding, points_zyx_vox: np.ndarray, key: Embedding, subcell: bool = True, *, cycle: bool = True
) -> Match:
    """The best match in `key` of each of the points (n, 3) of `query`; many points at once cost little more than one.

    Args:
      subcell: read the query between the cells' centres, and move the match to the peak of a parabola through the
        scores of its neighbours; otherwise cells are matched to cells, as in the paper.
      cycle: match back for `cycle_mm`; costs as much again.

    Raises:
      UserError: the embeddings are of different embedders, or the key holds no body.
    """
    if query.codec.hash != key.codec.hash:
        raise UserError(
            f"scans {query.id} and {key.id}: embedded by different embedders ({query.codec.hash[:12]}, "
            f"{key.codec.hash[:12]}); run alice_jax.embed on both with the same workdir"
        )
    if not len(key.body):
        raise UserError(
            f"scan {key.id}: its embedding is empty, so nothing can be matched in it; check its foreground in the store"
        )
    if subcell:
        vectors = query.vectors_at(points_zyx_vox) / 2
    else:
        vectors = query.vectors(cell_of_points(points_zyx_vox, query.codec.fine.stride_zyx_vox, query.grid_zyx)) / 2
    slabs = (key.keys[start : start + SLAB_CELLS] for start in range(0, len(key.keys), SLAB_CELLS))
    index, scores = search(vectors, slabs)
    cells = np.stack(np.unravel_index(key.body[index], key.grid_zyx), axis=1)
    offsets = peak_offsets(vectors, cells, scores, key) if subcell else 0.0
    found = points_of_cells(cells + offsets, key.codec.fine.stride_zyx_vox, key.shape_zyx)
    cycle_mm = np.full(len(found), np.nan)
    if cycle:
        off_zyx_vox = match(key, found, query, subcell, cycle=False).points_zyx_vox - points_zyx_vox
        cycle_mm = np.linalg.norm(off_zyx_vox * query.codec.spacing_zyx_mm, axis=1)
    return Match(found, scores, cycle_mm)


def peak_offsets(vectors: np.ndarray, cells_zyx: np.ndarray, scores: np.ndarray, key: Embedding) -> np.ndarray:
    """(n, 3) in [−½, ½] cells: where a parabola through the scores of each best cell and its neighbours peaks.

    0 along an axis where a neighbour lies outside the body.
    """
    offsets = np.zeros(cells_zyx.shape)
    for axis in range(3):
        sides = []
        for step in (-1, 1):
            at = cells_zyx.copy()
            at[:, axis] += step
            inside = (at[:, axis] >= 0) & (at[:, axis] < key.grid_zyx[axis])
            at[~inside] = cells_zyx[~inside]
            inside &= key.fine[tuple(at.T)].any(axis=-1)
            sides.append(np.where(inside, np.einsum("nd,nd->n", vectors, key.vectors(at)), np.nan))
        below, above = sides
        curvature = below + above - 2 * scores
        with np.errstate(invalid="ignore", divide="ignore"):
            peak = (below - above) / (2 * curvature)
        offsets[:, axis] = np.where(curvature < 0, np.clip(peak, -0.5, 0.5), 0.0)
    return offsets


def relative_position(points_zyx_vox: np.ndarray, box_a: np.ndarray, box_b: np.ndarray) -> np.ndarray:
    """The baseline without any embedding: the point at the same relative position of the other body's box.

    Args:
      points_zyx_vox: (n, 3) in scan a.
      box_a, box_b: (2, 3) foreground boxes, half-open, in voxels of each scan.

    >>> relative_position(np.array([[4.5, 4.5, 0]]), [[0, 0, 0], [10, 10, 10]], [[0, 0, 0], [20, 10, 10]])
    array([[9.5, 4.5, 0. ]])
    """
    (a_low, a_high), (b_low, b_high) = np.asarray(box_a, float), np.asarray(box_b, float)
    fraction = (np.asarray(points_zyx_vox) + 0.5 - a_low) / (a_high - a_low)
    return b_low + fraction * (b_high - b_low) - 0.5
