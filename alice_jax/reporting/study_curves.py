"""The curves of a study: Dice against the number of labelled scans, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from alice_jax.reporting import figures

PANELS = {"dice": "Dice of unseen patients", "more_than_scratch": "the same, less that from scratch"}
APART = 0.04  # of the step between two numbers of scans, so that intervals do not hide each other


def draw(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of the rows of `study.compared`: Dice, and how much more than scratch; frozen arms are dashed."""
    subsets = list(dict.fromkeys(row["subset"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    colours = {arm: f"C{number}" for number, arm in enumerate(arm for arm in arms if not arm.endswith("frozen"))}
    figure = figures.new_figure(11, 4.2)
    for axes, (key, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        figures.style(axes, title)
        for number, arm in enumerate(arms):
            found = [row for row in rows if row["arm"] == arm and key in row]
            at = [subsets.index(row["subset"]) + APART * (number - len(arms) / 2) for row in found]
            means = [row[key]["mean"] for row in found]
            ends = [[row[key]["mean"] - row[key]["low"] for row in found]]
            ends += [[row[key]["high"] - row[key]["mean"] for row in found]]
            line = "o--" if arm.endswith("frozen") else "o-"
            colour = colours[arm.split(",")[0]]
            axes.errorbar(at, means, ends, fmt=line, ms=4, capsize=2, color=colour, label=arm)
        axes.set_xticks(range(len(subsets)), subsets)
    figure.axes[1].axhline(0, color=figures.INK, lw=0.8)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return figures.png(figure)
