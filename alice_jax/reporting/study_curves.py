"""The curves of a study: Dice against the number of labelled scans, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from alice_jax.reporting import figures

APART = 0.05  # of the step between two numbers of scans, so that intervals do not hide each other
INKS = {"scratch": figures.INK, "scratch-long": figures.GREY}  # of the others the colours of matplotlib


def draw(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of the rows of `arms.compared`: Dice, and how much more than other arms'; hollow: frozen."""
    subsets = list(dict.fromkeys(row["subset"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    coloured = dict.fromkeys(name for name in (arm.split(",")[0] for arm in arms) if name not in INKS)
    colours = INKS | {name: f"C{number}" for number, name in enumerate(coloured)}
    others = dict.fromkeys(what for row in rows for what in row["more_than"])
    panels = {"Dice of unseen patients": [row["dice"] for row in rows]}
    panels |= {f"the same, less {what}": [row["more_than"].get(what) for row in rows] for what in others}
    columns = min(len(panels), 3)
    rows_of_panels = -(-len(panels) // columns)
    figure = figures.new_figure(4.4 * columns, 3.8 * rows_of_panels)
    for place, (title, values) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows_of_panels, columns, place)
        figures.style(axes, title)
        for number, arm in enumerate(arms):
            found = [(row, value) for row, value in zip(rows, values, strict=True) if row["arm"] == arm and value]
            at = [subsets.index(row["subset"]) + APART * (number - len(arms) / 2) for row, _ in found]
            means = [value["mean"] for _, value in found]
            ends = [[value["mean"] - value["low"] for _, value in found]]
            ends += [[value["high"] - value["mean"] for _, value in found]]
            name, _, frozen = arm.partition(",")
            drawn = {"fmt": "o--", "mfc": "white"} if frozen else {"fmt": "o-"}
            axes.errorbar(at, means, ends, ms=4, capsize=2, color=colours[name], label=arm, **drawn)
        axes.set_xticks(range(len(subsets)), subsets)
        axes.set_xlim(-0.5, len(subsets) - 0.5)
        if place > 1:
            axes.axhline(0, color=figures.INK, lw=0.8)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return figures.png(figure)
