"""A scan with its labels in three planes: as it is on the left, with the labels in colour on the right."""

from collections.abc import Mapping, Sequence

import numpy as np

from alice_jax.reporting import figures, planes

OPACITY = 0.45
MOST_NAMES = 14  # in the legend


def draw(
    volume_hu: np.ndarray, labels: np.ndarray, spacing_zyx_mm: Sequence[float], title: str, classes: Sequence[str]
) -> bytes:
    """A PNG of the planes that show most of the labels.

    Args:
      volume_hu, labels: (z, y, x) in the store's frame; a label is an index of `classes`, background first.
    """
    labelled = labels > 0
    point = [int(np.argmax(labelled.sum(axis=tuple({0, 1, 2} - {axis})))) for axis in range(3)]
    if not labelled.any():
        point = [n // 2 for n in labels.shape]
    colors = palette(len(classes))
    sheet = planes.Sheet(1, float(max(np.multiply(labels.shape, spacing_zyx_mm))))
    for column, plane in enumerate(planes.PLANES):
        cut = planes.whole(labels.shape, plane, point, spacing_zyx_mm)
        grey, codes = planes.tone(cut.of(volume_hu)), cut.of(labels)
        sheet.show(0, column, grey, cut)
        shown = np.where(
            codes[..., None] > 0, OPACITY * colors[codes] + (1 - OPACITY) * grey[..., None], grey[..., None]
        )
        sheet.show(0, column + 3, shown, cut)
    sheet.heading(0, 0, title, bold=True)
    _legend(sheet, {classes[code]: colors[code] for code in np.unique(labels[labelled])[:MOST_NAMES]})
    return sheet.png()


def _legend(sheet: planes.Sheet, colors: Mapping[str, np.ndarray]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=tuple(color), label=name) for name, color in colors.items()]
    sheet.axes.legend(
        handles=handles, loc="upper right", ncols=7, fontsize=7, frameon=False, labelcolor=figures.ON_SCREEN
    )


def palette(count: int) -> np.ndarray:
    """(count, 3) colours from 0 to 1, background black; they come again after twenty."""
    from matplotlib import colormaps

    pairs = colormaps["tab20"](np.arange(20))[:, :3].reshape(10, 2, 3)
    strong_then_pale = pairs.swapaxes(0, 1).reshape(20, 3)
    return np.concatenate([np.zeros((1, 3)), strong_then_pale[np.arange(count - 1) % 20]])
