"""One training sample of Alice: crops of the same body part from two patients, and what the student may not see.

Everything is drawn from the generator that is handed in, so a sample is a pure function of (seed, index).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alice_jax.data import masks, matching
from alice_jax.data.store import Store

WINDOW_HU = (-125.0, 225.0)
AIR_HU = -1024


def windowed(volume_hu: np.ndarray) -> np.ndarray:
    """HU clipped to [−125, 225] and scaled to [0, 1] as float32, so that padding with air is 0.

    >>> windowed(np.array([-1024, 50, 900], np.int16)).tolist()
    [0.0, 0.5, 1.0]
    """
    low, high = WINDOW_HU
    return ((np.clip(volume_hu, low, high) - low) / (high - low)).astype(np.float32)


def crop_around(store: Store, scan_id: str, point_zyx_vox: np.ndarray, shape_zyx: Sequence[int]) -> np.ndarray:
    """HU in [p − shape // 2, p − shape // 2 + shape) on each axis, air outside the volume: int16."""
    start_zyx_vox = np.asarray(point_zyx_vox, int) - np.asarray(shape_zyx) // 2
    return store.read_crop(scan_id, tuple(start_zyx_vox), tuple(shape_zyx), fill=AIR_HU)


def foreground_points(store: Store, scan_id: str, rng: np.random.Generator, count: int) -> np.ndarray:
    """`(count, 3)` voxels (z, y, x), uniform over the body: a random foreground cell, then a voxel inside it."""
    cells = np.argwhere(store.foreground(scan_id))
    points = 2 * cells[rng.integers(len(cells), size=count)] + rng.integers(2, size=(count, 3))
    return np.minimum(points, np.asarray(store.scan(scan_id).shape_zyx) - 1)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Where the two crops of a sample are centred.

    Attributes:
      score: mean of the fine and coarse cosine similarity; 0 where nothing was matched.
      redraws: points that were tried and not kept.
      weak: no try reached the threshold, and this is the best of them.
    """

    key: int
    query_point_zyx_vox: np.ndarray
    key_point_zyx_vox: np.ndarray
    score: float = 0.0
    redraws: int = 0
    weak: bool = False


@dataclasses.dataclass(frozen=True)
class PairSampler:
    """`sampler(record, rng, batch_rng)` gives the sample whose query is the record-th scan.

    Attributes:
      embeddings: reads a scan's embedding, for mined pairs; None draws the partner's point at random too.
      scan_ids: the scans that queries and partners come from.
      crop_shape_zyx: voxels of a crop.
      mask_grid: cells of the mask.
      mask_ratio: share of hidden cells.
      column_masks: release masks, drawn once for the whole batch; otherwise each crop draws its own blocks.
      threshold: score from which a match is accepted.
      tries_per_partner: points tried in one partner before another is drawn.
      tries: points tried in all.
    """

    store: Store
    embeddings: Callable[[str], matching.Embedding] | None
    scan_ids: tuple[str, ...]
    crop_shape_zyx: tuple[int, int, int]
    mask_grid: tuple[int, int, int]
    mask_ratio: float = 0.75
    column_masks: bool = False
    threshold: float = 0.7
    tries_per_partner: int = 10
    tries: int = 100

    def __call__(self, record: int, rng: np.random.Generator, batch_rng: np.random.Generator) -> dict[str, Any]:
        """The sample as arrays.

        Returns:
          "volumes" `(2, depth, height, width, 1)` in [0, 1]; "hidden" `(2, *mask_grid)`, True where the student does
          not see; and under "meta" which scans and points these are and how they were found.
        """
        pair = self.draw(record, rng) if self.embeddings is None else self.mine(record, rng, self.embeddings)
        scans = (self.scan_ids[record], self.scan_ids[pair.key])
        points = (pair.query_point_zyx_vox, pair.key_point_zyx_vox)
        crops = [
            windowed(crop_around(self.store, scan, point, self.crop_shape_zyx))
            for scan, point in zip(scans, points, strict=True)
        ]
        draw_mask = masks.random_columns if self.column_masks else masks.random_blocks
        mask_rng = batch_rng if self.column_masks else rng
        hidden = [draw_mask(mask_rng, self.mask_grid, self.mask_ratio) for _ in range(2)]
        return {
            "volumes": np.stack(crops)[..., None],
            "hidden": np.stack(hidden),
            "meta": {
                "scans": np.array([record, pair.key], np.int32),
                "points_zyx_vox": np.stack(points).astype(np.int32),
                "score": np.float32(pair.score),
                "redraws": np.int32(pair.redraws),
                "weak": np.bool_(pair.weak),
            },
        }

    def partner(self, record: int, rng: np.random.Generator) -> int:
        """Any scan but the query's own."""
        other = int(rng.integers(len(self.scan_ids) - 1))
        return other + (other >= record)

    def draw(self, record: int, rng: np.random.Generator) -> Pair:
        """Unmatched crops, for comparison."""
        key = self.partner(record, rng)
        query_point = foreground_points(self.store, self.scan_ids[record], rng, 1)[0]
        return Pair(key, query_point, foreground_points(self.store, self.scan_ids[key], rng, 1)[0])

    def mine(self, record: int, rng: np.random.Generator, embeddings: Callable[[str], matching.Embedding]) -> Pair:
        """The first match above the threshold, or the best of all tries, flagged as weak.

        After `tries_per_partner` failures another partner is drawn, since some scans share no anatomy. The release
        keeps its last try instead of its best.
        """
        query = embeddings(self.scan_ids[record])
        best: Pair | None = None
        for tried in range(0, self.tries, self.tries_per_partner):
            key = self.partner(record, rng)
            points = foreground_points(self.store, self.scan_ids[record], rng, self.tries_per_partner)
            match = matching.match(query, points, embeddings(self.scan_ids[key]))
            accepted = np.flatnonzero(match.scores > self.threshold)
            chosen = int(accepted[0]) if len(accepted) else int(np.argmax(match.scores))
            if best is None or match.scores[chosen] > best.score:
                point = np.rint(match.points_zyx_vox[chosen]).astype(int)
                best = Pair(key, points[chosen], point, float(match.scores[chosen]))
            if len(accepted):
                return dataclasses.replace(best, redraws=tried + chosen)
        assert best is not None
        return dataclasses.replace(best, redraws=self.tries - 1, weak=True)
