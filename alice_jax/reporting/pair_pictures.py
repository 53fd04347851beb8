"""Pairs in three planes of both patients, and the distributions of scores, cycle errors and places."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alice_jax.data.store import Store
from alice_jax.reporting import figures, planes
from alice_jax.reporting.pairs import Limits, Pair, relative_places, true_point

AXES = ("inferior → superior", "anterior → posterior", "right → left")  # z, y, x
BINS, FARTHEST_MM = 24, 60.0  # of the histograms; a larger cycle error counts as this one


def draw_pairs(
    store: Store, pairs: Sequence[Pair], crop_shape_zyx: Sequence[int], limits: Limits | None = None
) -> bytes:
    """A PNG with a row for each pair: axial, coronal and sagittal planes of the query, then of the key.

    Yellow: the matched point.  Blue: the crop.  Green: the true point, where it is known.

    Args:
      limits: to say what a try lacks that was not accepted.

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
        name = f"{pair.number + 1}" if pair.accepted else f"for {pair.number + 1}"
        sheet.heading(row, 0, f"{name}   {pair.ids[0]}", bold=True)
        sheet.heading(row, 3, pair.ids[1], bold=True)
        good = pair.accepted and not pair.weak
        color = figures.SOFT_ON_SCREEN if good else figures.WARNING_ON_SCREEN
        sheet.note(row, verdict(pair, limits), color, column=2)
        sheet.note(row, measures(store, pair))
    return sheet.png()


def verdict(pair: Pair, limits: Limits | None) -> str:
    """How the pair was found, or why it was not accepted."""
    if not pair.accepted:
        return f"rejected: {pair.shortcoming(limits)}" if limits else "rejected"
    words = f"{pair.redraws} redrawn" if pair.redraws else "first try"
    if pair.weak:
        words += ", weak" if pair.weight == 1 else f", weak, weighs {pair.weight:.2g}"
    return words


def measures(store: Store, pair: Pair) -> str:
    """Score, cycle error, agreement, and the distance from the truth where that is known."""
    words = [f"score {pair.score:.2f}"] + ([f"cycle {pair.cycle_mm:.0f} mm"] if np.isfinite(pair.cycle_mm) else [])
    words += [f"{pair.agreeing:.0%} agree"] if np.isfinite(pair.agreeing) else []
    truth = true_point(store, pair)
    if truth is not None:
        spacing = store.scan(pair.ids[1]).spacing_zyx_mm
        words.append(f"{np.linalg.norm((pair.points_zyx_vox[1] - truth) * spacing):.0f} mm off")
    return " · ".join(words)


def draw_statistics(store: Store, pairs: Sequence[Pair], tries: Sequence[Pair], limits: Limits | None) -> bytes:
    """A PNG of scores and cycle errors with their limits, and of where matches lie along each axis.

    Args:
      tries: that were not accepted on the way.
      limits: None for pairs that were not matched.
    """
    figure = figures.new_figure(12, 2.7)
    panels = figure.subplots(1, 5)
    figure.subplots_adjust(left=0.03, right=0.99, bottom=0.2, top=0.88, wspace=0.26)
    kinds = (
        ([pair for pair in pairs if not pair.weak], figures.BLUE),
        ([pair for pair in pairs if pair.weak], figures.RED),
        (tries, figures.GREY),
    )
    if limits is None:
        for axes, words in zip(panels, ("Unmatched pairs have no score", "and no cycle error"), strict=False):
            figures.style(axes, words)
    else:
        _histogram(panels[0], "Score", limits.threshold, [([p.score for p in some], c) for some, c in kinds])
        cycles = [([min(p.cycle_mm, FARTHEST_MM) for p in some], c) for some, c in kinds]
        _histogram(panels[1], f"Cycle error in mm (up to {FARTHEST_MM:.0f})", limits.cycle_mm, cycles)
    places = relative_places(store, pairs)
    weak = np.array([pair.weak for pair in pairs])
    for axis, (axes, words) in enumerate(zip(panels[2:], reversed(AXES), strict=True)):
        figures.style(axes, words)
        axes.plot((0, 1), (0, 1), color=figures.LINE, linewidth=1.2)
        query, key = places[:, 0, 2 - axis], places[:, 1, 2 - axis]
        axes.scatter(query, key, s=12, c=np.where(weak, figures.RED, figures.BLUE), linewidths=0)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_xlabel("across: query, up: key", fontsize=8, color=figures.SOFT)
    return figures.png(figure)


def _histogram(axes: Any, title: str, limit: float, groups: Sequence[tuple[Sequence[float], str]]) -> None:
    """Stacked, the limit dashed; an edge of a bin lies on the limit."""
    figures.style(axes, title)
    values = [np.array(some, float) for some, _ in groups]
    values = [some[np.isfinite(some)] for some in values]
    every = np.concatenate([*values, [limit]])
    width = max(np.ptp(every) / BINS, 1e-3)
    edges = limit + width * np.arange(np.floor((every.min() - limit) / width), 2 + (every.max() - limit) / width)
    axes.hist(values, edges, stacked=True, color=[color for _, color in groups])
    axes.axvline(limit, color=figures.INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.locator_params(axis="x", nbins=6)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("blue: pairs, red: weak, grey: rejected tries", fontsize=7, color=figures.SOFT)
