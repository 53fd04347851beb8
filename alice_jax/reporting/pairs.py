"""Pairs as the pipeline yields them: drawn in three planes of both patients, and as statistics."""

import dataclasses
import time
import zlib
from collections.abc import Sequence

import numpy as np

from alice_jax.data import phantom
from alice_jax.data.pipeline import Samples
from alice_jax.data.store import Store
from alice_jax.data.views import PairSampler
from alice_jax.reporting import figures, planes
from alice_jax.reporting.page import Check

AXES = (("inferior → superior", "I–S"), ("anterior → posterior", "A–P"), ("right → left", "R–L"))  # z, y, x
FEWEST_FOR_AXES = 12  # pairs


@dataclasses.dataclass(frozen=True)
class Pair:
    """One sample of the pipeline.

    Attributes:
      number: its index in the run, from 0.
      ids: the query's and the key's scan.
      points_zyx_vox: (2, 3), the centres of the two crops.
      filled: (2,), the share of voxels of each crop that are not black to the network.
      content: a checksum of the crops.
    """

    number: int
    ids: tuple[str, str]
    points_zyx_vox: np.ndarray
    score: float
    redraws: int
    weak: bool
    filled: np.ndarray
    content: int


def sampler_of(samples: Samples) -> PairSampler:
    """What draws the pairs."""
    assert isinstance(samples.sampler, PairSampler)
    return samples.sampler


def first_pairs(samples: Samples, count: int, more: int = 0, seconds: float = 0) -> list[Pair]:
    """The first `count` pairs of a run, and up to `more` in all as long as `seconds` last."""
    scan_ids = sampler_of(samples).scan_ids
    began, pairs = time.monotonic(), []
    for number in range(max(count, more)):
        if number >= count and time.monotonic() - began > seconds:
            break
        sample = samples[number]
        meta, volumes = sample["meta"], sample["volumes"]
        query, key = (scan_ids[i] for i in meta["scans"])
        filled = (volumes > 0).mean(axis=(1, 2, 3, 4))
        score, redraws, weak = float(meta["score"]), int(meta["redraws"]), bool(meta["weak"])
        content = zlib.crc32(volumes.tobytes())
        pairs.append(Pair(number, (query, key), meta["points_zyx_vox"], score, redraws, weak, filled, content))
    return pairs


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


# ---------------------------------------------------------------- drawings


def draw_pairs(store: Store, pairs: Sequence[Pair], crop_shape_zyx: Sequence[int]) -> bytes:
    """A PNG with a row for each pair: axial, coronal and sagittal planes of the query, then of the key.

    Yellow: the matched point.  Blue: the crop.  Green: the true point, where it is known.

    Example:
      Path("pairs.png").write_bytes(draw_pairs(store, pairs, (64, 64, 64)))
    """
    scans = [store.scan(id) for pair in pairs for id in pair.ids]
    sheet = planes.Sheet(len(pairs), planes.fitting_field_mm(scans, least=200, most=380))
    for row, pair in enumerate(pairs):
        truth = true_point(store, pair)
        for side, (id, point) in enumerate(zip(pair.ids, pair.points_zyx_vox, strict=True)):
            for i, plane in enumerate(planes.PLANES):
                panel, cut = (row, 3 * side + i), planes.window(store.scan(id), plane, point, sheet.field_mm)
                sheet.show(*panel, planes.read(store, id, cut), cut)
                sheet.box(*panel, cut, point - np.asarray(crop_shape_zyx) // 2, crop_shape_zyx)
                if side and truth is not None:
                    sheet.circle(*panel, cut, truth)
                sheet.cross(*panel, cut, point)
        sheet.heading(row, 0, f"{pair.number + 1}   {pair.ids[0]}", bold=True)
        sheet.heading(row, 3, pair.ids[1], bold=True)
        sheet.note(row, _verdict(store, pair, truth), figures.RED if pair.weak else figures.SOFT)
    return sheet.png()


def _verdict(store: Store, pair: Pair, truth: np.ndarray | None) -> str:
    words = [f"score {pair.score:.2f}", f"{pair.redraws} redrawn" if pair.redraws else "first try"]
    if pair.weak:
        words.append("weak")
    if truth is not None:
        spacing = store.scan(pair.ids[1]).spacing_zyx_mm
        words.append(f"{np.linalg.norm((pair.points_zyx_vox[1] - truth) * spacing):.0f} mm off")
    return " · ".join(words)


def draw_statistics(store: Store, pairs: Sequence[Pair], threshold: float | None) -> bytes:
    """A PNG of the scores (with the threshold; None for unmatched pairs) and of where matches lie along each axis."""
    figure = figures.new_figure(12, 3.0)
    panels = figure.subplots(1, 4)
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.16, top=0.88, wspace=0.28)
    scores = np.array([pair.score for pair in pairs])
    weak = np.array([pair.weak for pair in pairs])
    if threshold is None:
        figures.style(panels[0], "Unmatched pairs have no score")
    else:
        figures.style(panels[0], f"Scores of {len(pairs)} pairs")
        width = max((1 - min(scores.min(), threshold)) / 24, 1e-3)
        edges = threshold + width * np.arange(np.floor((scores.min() - threshold) / width), 2 + (1 - threshold) / width)
        panels[0].hist([scores[~weak], scores[weak]], edges, stacked=True, color=[figures.BLUE, figures.RED])
        panels[0].axvline(threshold, color=figures.INK, linewidth=1, linestyle=(0, (4, 3)))
        panels[0].locator_params(axis="x", nbins=6)
        panels[0].set_xlabel("dashed: threshold; red: weak", fontsize=8, color=figures.SOFT)
    places = relative_places(store, pairs)
    for axis, (axes, (words, _)) in enumerate(zip(panels[1:], reversed(AXES), strict=True)):
        figures.style(axes, words)
        axes.plot((0, 1), (0, 1), color=figures.LINE, linewidth=1.2)
        query, key = places[:, 0, 2 - axis], places[:, 1, 2 - axis]
        axes.scatter(query, key, s=12, c=np.where(weak, figures.RED, figures.BLUE), linewidths=0)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_xlabel("across: in the query, up: in the key", fontsize=8, color=figures.SOFT)
    return figures.png(figure)


# ---------------------------------------------------------------- checks


def checks(store: Store, pairs: Sequence[Pair], mined: bool) -> list[Check]:
    """What can be judged from the pairs alone."""
    found = [_content_check(pairs)]
    if mined:
        weak = float(np.mean([pair.weak for pair in pairs]))
        level = "good" if weak <= 0.05 else "look" if weak <= 0.3 else "bad"
        redraws = float(np.mean([pair.redraws for pair in pairs]))
        words = f"{weak:.0%} of {len(pairs)} are weak (no try reached the threshold); {redraws:.1f} redrawn on average"
        found.append(Check(level, "Matches are accepted", words))
        found += _axes_check(store, pairs)
        errors, baseline = errors_mm(store, pairs)
        if len(errors):
            ours, theirs = np.median(errors), np.median(baseline)
            level = "good" if ours < 0.7 * theirs else "look" if ours < theirs else "bad"
            words = f"median {ours:.0f} mm, where the same relative place in the body's box is off by {theirs:.0f} mm"
            found.append(Check(level, "Matches are near the truth", words))
    return found


def _content_check(pairs: Sequence[Pair]) -> Check:
    different = len({pair.content for pair in pairs})
    empty = float(np.mean([pair.filled < 0.02 for pair in pairs]))
    words = f"the first {len(pairs)} pairs of crops are {different} different ones; {empty:.0%} of the crops are empty"
    level = "bad" if different < 0.9 * len(pairs) or empty > 0.3 else "look" if empty > 0.1 else "good"
    return Check(level, "The loader is alive", words)


def _axes_check(store: Store, pairs: Sequence[Pair]) -> list[Check]:
    """A flipped axis turns the correlation of places around, two swapped axes take each other's."""
    if len(pairs) < FEWEST_FOR_AXES:
        return []
    places = relative_places(store, pairs)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.nan_to_num(np.corrcoef(places[:, 0].T, places[:, 1].T)[:3, 3:])
    own = np.diag(correlation)
    words = "places in query and key correlate: " + ", ".join(
        f"{name} {value:.2f}" for (_, name), value in zip(AXES, own, strict=True)
    )
    swapped = any(abs(correlation[i]).argmax() != i for i in range(3))
    if own.min() < -0.3 or (swapped and own.min() < 0.3):
        return [Check("bad", "Axes agree", f"{words}; an axis is flipped or two are swapped")]
    level = "look" if own.min() < 0.3 else "good"
    return [Check(level, "Axes agree", words + ("; low where fields of view differ much" if level == "look" else ""))]
