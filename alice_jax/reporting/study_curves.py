"""The curves of a study: Dice against the number of labelled scans, with intervals."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

DPI = 130


def draw(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of the rows of `study.compared`: Dice, and how much more than scratch; frozen arms are dashed."""
    subsets = list(dict.fromkeys(row["subset"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    plain = [arm for arm in arms if not arm.endswith("frozen")]
    colours = {arm: f"C{number}" for number, arm in enumerate(plain)}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2),
        ("dice", "more_than_scratch"),
        ("Dice of unseen patients", "the same, less that from scratch"),
        strict=True,
    ):
        for number, arm in enumerate(arms):
            found = [row for row in rows if row["arm"] == arm and key in row]
            if not found:
                continue
            at = [subsets.index(row["subset"]) + 0.04 * (number - len(arms) / 2) for row in found]
            means = [row[key]["mean"] for row in found]
            spans = [[m - row[key]["low"] for m, row in zip(means, found, strict=True)]]
            spans += [[row[key]["high"] - m for m, row in zip(means, found, strict=True)]]
            style = "--" if arm.endswith("frozen") else "-"
            axes.errorbar(
                at, means, spans, fmt=f"o{style}", ms=4, capsize=2, color=colours[arm.split(",")[0]], label=arm
            )
        axes.set_xticks(range(len(subsets)), subsets)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[1].axhline(0, color="black", lw=0.8)
    figure.axes[0].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
