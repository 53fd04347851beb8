"""One training sample of Alice: crops of the same body part from two patients, and what the student may not see.

Everything is drawn from the generator that is handed in, so a sample is a pure function of (seed, index).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from alice_jax.data import masks, matching
from alice_jax.data.consensus import consensus
from alice_jax.data.hounsfield import AIR_HU
from alice_jax.data.partners import Partners, origins
from alice_jax.data.store import Store

WINDOW_HU = (-125.0, 225.0)
DRAWS = 3  # of a whole sample at most, where weak pairs are drawn again
WEAK = ("keep", "down-weight", "redraw")


def windowed(volume_hu: np.ndarray, window_hu: tuple[float, float] = WINDOW_HU) -> np.ndarray:
    """HU clipped to [−125, 225], or another window, and scaled to [0, 1] as float32, so that padding with air is 0.

    >>> windowed(np.array([-1024, 50, 900], np.int16)).tolist()
    [0.0, 0.5, 1.0]
    """
    low, high = window_hu
    return ((np.clip(volume_hu, low, high) - low) / (high - low)).astype(np.float32)


def crop_around(store: Store, scan_id: str, point_zyx_vox: np.ndarray, shape_zyx: Sequence[int]) -> np.ndarray:
    """HU in [p − shape // 2, p − shape // 2 + shape) on each axis, air outside the volume: int16."""
    start_zyx_vox = np.asarray(point_zyx_vox, int) - np.asarray(shape_zyx) // 2
    return store.read_crop(scan_id, tuple(start_zyx_vox), tuple(shape_zyx), fill=AIR_HU)


def foreground_points(
    foreground: np.ndarray, shape_zyx: Sequence[int], rng: np.random.Generator, count: int
) -> np.ndarray:
    """`(count, 3)` voxels (z, y, x), uniform over the body: a random foreground cell, then a voxel inside it.

    foreground: bool, as `Store.foreground` gives it; a cell is 2 voxels.
    """
    cells = np.flatnonzero(foreground)
    chosen = np.unravel_index(cells[rng.integers(len(cells), size=count)], foreground.shape)
    points = 2 * np.stack(chosen, axis=1) + rng.integers(2, size=(count, 3))
    return np.minimum(points, np.asarray(shape_zyx) - 1)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Where the two crops of a sample are centred.

    Attributes:
      query, key: which of the sampler's scans.
      score: mean of the fine and coarse cosine similarity; 0 where nothing was matched.
      cycle_mm: how far from the query's point the key's point is matched back to; NaN where this was not looked at,
        since the score was too low.
      agreeing: share of the weight of the query point's neighbours that agrees with the match; NaN where the score or
        the way back already spoke against it.
      redraws: points that were tried and not kept.
      weak: no try was accepted, and this is the best of them.
      fallback: no scan was known to show the query's place, so any other was taken as key.
      weight: of the pair's losses.
    """

    query: int
    key: int
    query_point_zyx_vox: np.ndarray
    key_point_zyx_vox: np.ndarray
    score: float = 0.0
    cycle_mm: float = float("nan")
    agreeing: float = float("nan")
    redraws: int = 0
    weak: bool = False
    fallback: bool = False
    weight: float = 1.0


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
      cycle_mm: and the farthest that it may be matched back from the query's point.
      agreeing: and the least share of the neighbours' weight that must agree.
      tries_per_partner: points tried in one partner before another is drawn.
      tries: points tried in all.
      weak: what becomes of a pair of which no try was accepted: "keep" the best try, "down-weight" it by
        `weak_weight`, or "redraw": start anew with other scans, up to `DRAWS` times, and keep the best of all then.
      by_region: partners are drawn among those that show what the query shows; otherwise among all.
      same_patient: "avoid" or "allow" pairs of one patient or of equal content.
      patients: of scans for which the store does not know better.
    """

    store: Store
    embeddings: Callable[[str], matching.Embedding] | None
    scan_ids: tuple[str, ...]
    crop_shape_zyx: tuple[int, int, int]
    mask_grid: tuple[int, int, int]
    mask_ratio: float = 0.75
    column_masks: bool = False
    threshold: float = 0.7
    cycle_mm: float = 10.0
    agreeing: float = 0.1
    tries_per_partner: int = 5
    tries: int = 100
    weak: str = "keep"
    weak_weight: float = 0.25
    by_region: bool = True
    same_patient: str = "avoid"
    patients: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __call__(self, record: int, rng: np.random.Generator, batch_rng: np.random.Generator) -> dict[str, Any]:
        """The sample as arrays.

        Returns:
          "volumes" `(2, depth, height, width, 1)` in [0, 1]; "hidden" `(2, *mask_grid)`, True where the student does
          not see; "weights" `()` of the pair's losses; and under "meta" which scans and points these are and how they
          were found.
        """
        pair = self.draw(record, rng) if self.embeddings is None else self.mine(record, rng, self.embeddings)
        scans = (self.scan_ids[pair.query], self.scan_ids[pair.key])
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
            "weights": np.float32(pair.weight),
            "meta": {
                "scans": np.array([pair.query, pair.key], np.int32),
                "points_zyx_vox": np.stack(points).astype(np.int32),
                "score": np.float32(pair.score),
                "cycle_mm": np.float32(pair.cycle_mm),
                "agreeing": np.float32(pair.agreeing),
                "redraws": np.int32(pair.redraws),
                "weak": np.bool_(pair.weak),
                "fallback": np.bool_(pair.fallback),
                "weight": np.float32(pair.weight),
            },
        }

    @cached_property
    def partners(self) -> Partners:
        """Who may be paired with whom; made when it is first needed, and the store's region index with it."""
        if self.same_patient == "avoid":
            patients, contents = origins(self.store, self.scan_ids, self.patients)
        else:
            patients = contents = np.arange(len(self.scan_ids))
        if self.by_region and self.embeddings is not None:
            return Partners.learnt(self.store, self.scan_ids, patients, contents)
        return Partners(patients, contents)

    def draw(self, record: int, rng: np.random.Generator) -> Pair:
        """Unmatched crops, for comparison."""
        key, fallback = self.partners.draw(record, None, rng)
        query_point, key_point = (
            foreground_points(self.store.foreground(id), self.store.scan(id).shape_zyx, rng, 1)[0]
            for id in (self.scan_ids[record], self.scan_ids[key])
        )
        return Pair(record, key, query_point, key_point, fallback=fallback)

    def mine(
        self,
        record: int,
        rng: np.random.Generator,
        embeddings: Callable[[str], matching.Embedding],
        rejected: list[Pair] | None = None,
    ) -> Pair:
        """The first match that is accepted, or the best of all tries, flagged as weak.

        The release keeps its last try instead of its best.

        Args:
          rejected: takes the tries that were not accepted, in their order.
        """
        best: Pair | None = None
        tried = 0
        for start in range(DRAWS if self.weak == "redraw" else 1):
            query = record if start == 0 else int(rng.integers(len(self.scan_ids)))
            keys: list[int] = []
            foreground = self.store.foreground(self.scan_ids[query])
            for _ in range(0, self.tries, self.tries_per_partner):
                for pair in self._tries(query, foreground, rng, embeddings, keys):
                    if self.accepts(pair):
                        pair = self._refined(pair, embeddings)
                    if self.accepts(pair):
                        return dataclasses.replace(pair, redraws=tried)
                    tried += 1
                    best = pair if best is None or self._worth(pair) > self._worth(best) else best
                    if rejected is not None:
                        rejected.append(pair)
        assert best is not None
        weight = self.weak_weight if self.weak == "down-weight" else 1.0
        best = dataclasses.replace(best, redraws=tried - 1, weak=True, weight=weight)
        return self._refined(best, embeddings) if np.isnan(best.agreeing) else best

    def _refined(self, pair: Pair, embeddings: Callable[[str], matching.Embedding]) -> Pair:
        """With the key's point where the neighbours of the query's point put it, and how many of them do."""
        query, key = (embeddings(self.scan_ids[scan]) for scan in (pair.query, pair.key))
        points = np.stack([pair.query_point_zyx_vox, pair.key_point_zyx_vox])[:, None].astype(float)
        moved, agreeing = consensus(query, points[0], key, points[1])
        return dataclasses.replace(pair, key_point_zyx_vox=np.rint(moved[0]).astype(int), agreeing=float(agreeing[0]))

    def accepts(self, pair: Pair) -> bool:
        """Whether nothing that is known of it speaks against it."""
        return pair.score > self.threshold and pair.cycle_mm <= self.cycle_mm and not pair.agreeing < self.agreeing

    def _worth(self, pair: Pair) -> tuple[int, float]:
        """Orders tries that were not accepted, those first that came farthest."""
        if np.isfinite(pair.agreeing):
            return 2, pair.agreeing
        return (1, -pair.cycle_mm) if pair.score > self.threshold else (0, pair.score)

    def _tries(
        self,
        query: int,
        foreground: np.ndarray,
        rng: np.random.Generator,
        embeddings: Callable[[str], matching.Embedding],
        keys: list[int],
    ) -> list[Pair]:
        """Matches of `tries_per_partner` points of the query's body in a partner that shows the first of them.

        All are matched together: that takes hardly longer than one alone.

        foreground: the query's body mask.  keys: partners tried so far; the one drawn here is added.
        """
        scan = self.store.scan(self.scan_ids[query])
        a = embeddings(scan.id)
        points = foreground_points(foreground, scan.shape_zyx, rng, self.tries_per_partner)
        index = self.partners.index
        place = None if index is None else index.place(a.coarse, foreground, points[0])
        key, fallback = self.partners.draw(query, place, rng, keys)
        keys.append(key)
        b = embeddings(self.scan_ids[key])
        found = matching.search(a, points, b)
        cycles_mm = np.full(len(points), np.nan)
        if (high := found.scores > self.threshold).any():
            cycles_mm[high] = matching.cycle_mm(a, points[high], b, found.points_zyx_vox[high])
        key_points = np.rint(found.points_zyx_vox).astype(int)
        return [
            Pair(query, key, point, key_point, float(score), float(cycle_mm), fallback=fallback)
            for point, key_point, score, cycle_mm in zip(points, key_points, found.scores, cycles_mm, strict=True)
        ]
