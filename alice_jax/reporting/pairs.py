"""Pairs as the pipeline yields them, with the tries that mining did not accept."""

import dataclasses
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alice_jax.data import matching, phantom, views
from alice_jax.data.pipeline import Samples
from alice_jax.data.store import Store
from alice_jax.data.views import PairSampler


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a try must reach to be accepted: score above the threshold, cycle error at most, agreement at least."""

    threshold: float
    cycle_mm: float
    agreeing: float


@dataclasses.dataclass(frozen=True)
class Pair:
    """A place in two scans: one sample of the pipeline, or a try that it did not accept.

    Attributes:
      number: index in the run of the sample that this is, or that it was tried for, from 0.
      ids: the query's and the key's scan.
      points_zyx_vox: (2, 3), the centres of the two crops.
      cycle_mm: how far from the query's point its match is matched back to; NaN where the score was too low to ask.
      agreeing: share of the neighbours' weight that agrees; NaN where another limit was missed before.
      weight: of the sample in the loss.
      accepted: False for a try.
      filled: (2,), the share of voxels of each crop that are not black to the network; empty for a try.
      flat: (2,), whether a crop has one value wherever it is not black; empty for a try.
      content: a checksum of the crops; 0 for a try.
    """

    number: int
    ids: tuple[str, str]
    points_zyx_vox: np.ndarray
    score: float
    cycle_mm: float = np.nan
    agreeing: float = np.nan
    redraws: int = 0
    weak: bool = False
    weight: float = 1.0
    accepted: bool = True
    filled: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    flat: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
    content: int = 0

    def shortcoming(self, limits: Limits) -> str:
        """Why it is not accepted; empty where it could be."""
        if self.score <= limits.threshold:
            return f"score below {limits.threshold:.2f}"
        if self.cycle_mm > limits.cycle_mm:
            return f"cycle above {limits.cycle_mm:.0f} mm"
        if self.agreeing < limits.agreeing:
            return f"less than {limits.agreeing:.0%} agree"
        return ""


@dataclasses.dataclass(frozen=True)
class Recorder(PairSampler):
    """Draws what the sampler that it is made of draws, and keeps the tries that were not accepted."""

    tried: list[views.Pair] = dataclasses.field(default_factory=list)

    @staticmethod
    def of(sampler: PairSampler) -> "Recorder":
        return Recorder(**{field.name: getattr(sampler, field.name) for field in dataclasses.fields(sampler)})

    def mine(
        self,
        record: int,
        rng: np.random.Generator,
        embeddings: Callable[[str], matching.Embedding],
        rejected: list[views.Pair] | None = None,
    ) -> views.Pair:
        return super().mine(record, rng, embeddings, self.tried)


def sampler_of(samples: Samples) -> PairSampler:
    """What draws the pairs."""
    assert isinstance(samples.sampler, PairSampler)
    return samples.sampler


def limits_of(sampler: PairSampler) -> Limits | None:
    """None where pairs are drawn without matching."""
    return Limits(sampler.threshold, sampler.cycle_mm, sampler.agreeing) if sampler.embeddings else None


def first_pairs(
    samples: Samples, count: int, more: int = 0, seconds: float = 0, rejected: list[Pair] | None = None
) -> list[Pair]:
    """The first `count` pairs of a run, and up to `more` in all as long as `seconds` last.

    Args:
      rejected: to which the tries are added that were not accepted on the way.
    """
    recorder = Recorder.of(sampler_of(samples))
    samples = dataclasses.replace(samples, sampler=recorder)
    began, found = time.monotonic(), []
    for number in range(max(count, more)):
        if number >= count and time.monotonic() - began > seconds:
            break
        found.append(_of_sample(number, samples[number], recorder.scan_ids))
        if rejected is not None:
            rejected += [_of_try(number, each, recorder.scan_ids) for each in recorder.tried]
        recorder.tried.clear()
    return found


def _of_sample(number: int, sample: dict[str, Any], scan_ids: Sequence[str]) -> Pair:
    meta, volumes = sample["meta"], sample["volumes"]
    query, key = (scan_ids[i] for i in meta["scans"])
    return Pair(
        number,
        (query, key),
        meta["points_zyx_vox"],
        score=float(meta["score"]),
        cycle_mm=float(meta["cycle_mm"]),
        agreeing=float(meta["agreeing"]),
        redraws=int(meta["redraws"]),
        weak=bool(meta["weak"]),
        weight=float(meta["weight"]),
        filled=(volumes > 0).mean(axis=(1, 2, 3, 4)),
        flat=np.array([_flat(crop) for crop in volumes]),
        content=zlib.crc32(volumes.tobytes()),
    )


def _flat(crop: np.ndarray) -> bool:
    shown = crop[crop > 0]
    return not len(shown) or np.ptp(shown) == 0


def _of_try(number: int, pair: views.Pair, scan_ids: Sequence[str]) -> Pair:
    points = np.stack([pair.query_point_zyx_vox, pair.key_point_zyx_vox])
    ids = (scan_ids[pair.query], scan_ids[pair.key])
    return Pair(number, ids, points, pair.score, pair.cycle_mm, pair.agreeing, accepted=False)


# ---------------------------------------------------------------- choice


def worst_accepted(pairs: Sequence[Pair], count: int = 2) -> list[Pair]:
    """Of the pairs that are not weak: those of the lowest score, then that of the largest cycle error."""
    accepted = sorted((pair for pair in pairs if not pair.weak), key=lambda pair: pair.score)
    chosen = accepted[:count]
    rest = [pair for pair in accepted[count:] if np.isfinite(pair.cycle_mm)]
    return chosen + sorted(rest, key=lambda pair: -pair.cycle_mm)[:1]


def best_rejected(tries: Sequence[Pair], limits: Limits, count: int = 2) -> list[Pair]:
    """Of the tries that each limit turned down, those of the highest score.

    No two of the same two scans, since neighbouring points are tried again and again.
    """
    chosen: list[Pair] = []
    for reason in sorted({each.shortcoming(limits) for each in tries}, reverse=True):
        seen: set[tuple[str, str]] = set()
        for each in sorted(tries, key=lambda each: -each.score):
            if each.shortcoming(limits) == reason and each.ids not in seen and len(seen) < count:
                seen.add(each.ids)
                chosen.append(each)
    return chosen


# ---------------------------------------------------------------- truth and places


def true_point(store: Store, pair: Pair) -> np.ndarray | None:
    """Where the query point really lies in the key (z, y, x voxels); None where nobody knows."""
    query, key = (store.scan(id) for id in pair.ids)
    if not ("phantom" in query.extra and "phantom" in key.extra):
        return None
    return phantom.correspond(query, pair.points_zyx_vox[:1], key)[0]


def errors_mm(store: Store, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Distances from the true points, of the pairs' points and of the same relative place in the body's box."""
    found, baseline = [], []
    for pair in pairs:
        truth = true_point(store, pair)
        if truth is None:
            continue
        (low, high), spacing = _box(store, pair.ids[1]), np.array(store.scan(pair.ids[1]).spacing_zyx_mm)
        relative = low + relative_places(store, [pair])[0, 0] * (high - low) - 0.5
        found.append(np.linalg.norm((pair.points_zyx_vox[1] - truth) * spacing))
        baseline.append(np.linalg.norm((relative - truth) * spacing))
    return np.array(found), np.array(baseline)


def relative_places(store: Store, pairs: Sequence[Pair]) -> np.ndarray:
    """(pairs, 2, 3): query and key points as shares of the way through their bodies' boxes along z, y, x."""
    places = []
    for pair in pairs:
        boxes = np.array([_box(store, id) for id in pair.ids])
        places.append((pair.points_zyx_vox + 0.5 - boxes[:, 0]) / (boxes[:, 1] - boxes[:, 0]))
    return np.array(places)


def _box(store: Store, id: str) -> np.ndarray:
    return np.array(store.scan(id).foreground_box_zyx_vox, float)
