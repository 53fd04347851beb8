"""Matplotlib without its global state, imported when the first figure is drawn so that commands start fast."""

import io
from typing import Any

import numpy as np

INK, SOFT, LINE = "#1c2530", "#5b6875", "#d5dbe1"
BLUE, ORANGE, GREEN, RED, GREY = "#1d6fd8", "#e07b00", "#1a8f4c", "#cc2f2f", "#aab4be"
# Pictures of scans are dark, as on a radiologist's screen.
SCREEN, ON_SCREEN, SOFT_ON_SCREEN, WARNING_ON_SCREEN = "#11171d", "#eef2f5", "#a9b6c2", "#ff8a80"
HEAT = "#ff3d2e"  # of attention, over a scan
DPI = 160  # of which a browser is told to show 100, so that pictures are sharp on fine screens
COMMON = 96  # colours of a picture that are kept as they are


def new_figure(width_in: float, height_in: float, background: str = "white") -> Any:
    """A figure of that size, shown 100 pixels wide for each inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=DPI, facecolor=background)
    FigureCanvasAgg(figure)
    return figure


def style(axes: Any, title: str = "") -> None:
    """Light frame, small numbers, the title at the left."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, pad=5)
    axes.tick_params(labelsize=8, colors=SOFT, length=2.5, color=LINE)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    axes.grid(True, color="#eef1f4", linewidth=0.7)
    axes.set_axisbelow(True)


def png(figure: Any) -> bytes:
    """The figure as a PNG of 256 colours: a third of the bytes, and nothing visible is lost."""
    from PIL import Image

    figure.canvas.draw()
    red, green, blue = np.asarray(figure.canvas.buffer_rgba())[..., :3].transpose(2, 0, 1) >> 2
    bins = red.astype(np.int32) << 12 | green.astype(np.int32) << 6 | blue
    counts = np.bincount(bins.ravel(), minlength=64**3)
    occurring = np.flatnonzero(counts)
    colors = np.stack([occurring >> 12, occurring >> 6 & 63, occurring & 63], axis=1) * 255 // 63
    palette = _palette(colors, counts[occurring])
    entry = np.zeros(64**3, np.uint8)
    squares = (palette**2).sum(axis=1)
    entry[occurring] = np.argmin(squares - 2 * colors @ palette.T, axis=1)  # the nearest
    image = Image.fromarray(entry[bins], mode="P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def _palette(colors: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(up to 256, 3): all of few colours (n, 3); of many the greys, the most common others and a choice of the rest."""
    from PIL import Image

    if len(colors) <= 256:
        return colors
    grey = np.ptp(colors, axis=1) == 0
    greys, colors, counts = colors[grey], colors[~grey], counts[~grey]
    order = np.argsort(-counts, kind="stable")
    common, rest = colors[order[:COMMON]], colors[order[COMMON:]]
    if not len(rest):
        return np.concatenate([greys, common])
    left = 256 - len(greys) - len(common)
    chosen = Image.fromarray(rest[None].astype(np.uint8)).quantize(left, method=Image.Quantize.MEDIANCUT)
    return np.concatenate([greys, common, np.array(chosen.getpalette(), int).reshape(-1, 3)[:left]])
