"""Orthogonal planes of scans on one sheet, as on a radiologist's screen: the patient's right is on the left.

A sheet has rows of six panels, three planes of one volume and three of another. All panels show a square of the same
size in mm, so bodies, crops and distances can be compared by eye.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from alice_jax.data.scan import Scan
from alice_jax.data.store import Store
from alice_jax.reporting import figures

MARK, BOX, TRUTH = "#ffd400", "#4cc9f0", "#57e389"
OUTSIDE, OUTSIDE_COLOR = np.iinfo(np.int16).min, "#2c3945"  # beyond the volume, unlike its air
COLUMNS = 6
GAP, MIDDLE, HEADER = 0.02, 0.08, 0.2  # between panels, between the two volumes, above a row; in panels
MARGIN = 0.05  # around all; in panels
WIDTH_IN = 12.0


@dataclasses.dataclass(frozen=True)
class Plane:
    """A way to cut a (z, y, x) array whose axes grow toward Superior, Posterior, Left.

    Attributes:
      normal: the axis that is cut.
      down, right: the axes shown downward and to the right.
      upward: the `down` axis is shown the other way up, so that Superior is on top.
      edges: letters at the left, right, top and bottom.
    """

    name: str
    normal: int
    down: int
    right: int
    upward: bool
    edges: tuple[str, str, str, str]


PLANES = (
    Plane("axial", 0, 1, 2, False, ("R", "L", "A", "P")),
    Plane("coronal", 1, 0, 2, True, ("R", "L", "S", "I")),
    Plane("sagittal", 2, 0, 1, True, ("A", "P", "S", "I")),
)


def tone(volume_hu: np.ndarray) -> np.ndarray:
    """HU as grey from 0 to 1: most of it for soft tissue, some for the vessels of the lungs and for bone."""
    grey = np.interp(volume_hu, (-1000, -250, 250, 1200), (0.0, 0.2, 0.85, 1.0))
    return np.where(volume_hu == OUTSIDE, np.nan, grey)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A square window of one plane of a volume.

    Attributes:
      start_zyx_vox: its first voxel, which may lie outside the volume.
      shape_zyx: its voxels; 1 along the plane's normal.
    """

    plane: Plane
    start_zyx_vox: np.ndarray
    shape_zyx: np.ndarray
    spacing_zyx_mm: np.ndarray

    @property
    def size_mm(self) -> tuple[float, float]:
        """Downward and to the right."""
        size = self.shape_zyx * self.spacing_zyx_mm
        return float(size[self.plane.down]), float(size[self.plane.right])

    def place_mm(self, point_zyx_vox: Any) -> tuple[float, float]:
        """Where a point lies in the picture: mm from its left and from its upper edge."""
        at = (np.asarray(point_zyx_vox, float) + 0.5 - self.start_zyx_vox) * self.spacing_zyx_mm
        down = self.size_mm[0] - at[self.plane.down] if self.plane.upward else at[self.plane.down]
        return float(at[self.plane.right]), float(down)

    def of(self, array_zyx: np.ndarray) -> np.ndarray:
        """The picture of an array that holds the window."""
        region = (slice(s, s + n) for s, n in zip(self.start_zyx_vox, self.shape_zyx, strict=True))
        return self.turned(array_zyx[tuple(region)])

    def turned(self, region_zyx: np.ndarray) -> np.ndarray:
        """An array of `shape_zyx` (and perhaps colours) as a picture: rows downward, columns to the right."""
        picture = region_zyx.squeeze(self.plane.normal)  # the other two axes are already in the order down, right
        return picture[::-1] if self.plane.upward else picture


def window(scan: Scan, plane: Plane, point_zyx_vox: Any, field_mm: float) -> Cut:
    """The window of `field_mm` through a point: around it, but inside the volume as far as the volume reaches."""
    spacing, shape = np.array(scan.spacing_zyx_mm), np.array(scan.shape_zyx)
    point = np.rint(point_zyx_vox).astype(int)
    size = np.rint(field_mm / spacing).astype(int)
    start = np.where(size < shape, np.clip(point - size // 2, 0, np.maximum(shape - size, 0)), (shape - size) // 2)
    size[plane.normal], start[plane.normal] = 1, np.clip(point[plane.normal], 0, shape[plane.normal] - 1)
    return Cut(plane, start, size, spacing)


def whole(shape_zyx: Sequence[int], plane: Plane, point_zyx_vox: Any, spacing_zyx_mm: Sequence[float]) -> Cut:
    """The plane through a point of an array, all of it."""
    start, size = np.zeros(3, int), np.array(shape_zyx)
    start[plane.normal], size[plane.normal] = np.rint(point_zyx_vox)[plane.normal], 1
    return Cut(plane, start, size, np.array(spacing_zyx_mm, float))


class Sheet:
    """Rows of six panels on one figure.

    Args:
      field_mm: the side of the square panels.
    """

    def __init__(self, rows: int, field_mm: float):
        width = COLUMNS + MIDDLE + (COLUMNS - 2) * GAP + 2 * MARGIN
        height = rows * (1 + HEADER) + MARGIN
        self.figure = figures.new_figure(WIDTH_IN, WIDTH_IN * height / width, figures.SCREEN)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width * field_mm)
        self.axes.set_ylim(height * field_mm, 0)
        self.axes.set_axis_off()
        self.field_mm = field_mm

    def corner_mm(self, row: int, column: int) -> tuple[float, float]:
        """Left and upper edge of a panel on the sheet."""
        left = MARGIN + column * (1 + GAP) + (MIDDLE - GAP) * (column >= COLUMNS // 2)
        return left * self.field_mm, (row * (1 + HEADER) + HEADER) * self.field_mm

    def _origin_mm(self, row: int, column: int, cut: Cut) -> tuple[float, float]:
        """Left and upper edge of a picture, which lies in the middle of its panel."""
        left, top = self.corner_mm(row, column)
        height, width = cut.size_mm
        return left + (self.field_mm - width) / 2, top + (self.field_mm - height) / 2

    def heading(self, row: int, column: int, words: str, color: str = figures.ON_SCREEN, bold: bool = False) -> None:
        """A line above the panels, starting at that column."""
        left, top = self.corner_mm(row, column)
        weight = "bold" if bold else "normal"
        self.axes.text(
            left, top - 0.05 * self.field_mm, words, color=color, fontsize=12, va="bottom", ha="left", weight=weight
        )

    def note(self, row: int, words: str, color: str = figures.SOFT_ON_SCREEN, column: int = COLUMNS - 1) -> None:
        """Words above a row, ending at the right of that column."""
        left, top = self.corner_mm(row, column)
        x, y = left + self.field_mm, top - 0.05 * self.field_mm
        self.axes.text(x, y, words, color=color, fontsize=11.5, va="bottom", ha="right")

    def show(self, row: int, column: int, picture: np.ndarray, cut: Cut) -> None:
        """A picture of `cut`, grey (rows, columns) or coloured (rows, columns, 3), from 0 to 1, with its letters."""
        from matplotlib.patches import Rectangle
        from matplotlib.patheffects import withStroke

        panel = Rectangle(
            self.corner_mm(row, column), self.field_mm, self.field_mm, color=OUTSIDE_COLOR, linewidth=0, zorder=-1
        )
        self.axes.add_patch(panel)
        left, top = self._origin_mm(row, column, cut)
        height, width = cut.size_mm
        extent = (left, left + width, top + height, top)
        self.axes.imshow(picture, cmap=_grey(), vmin=0, vmax=1, extent=extent, interpolation="bilinear", aspect="auto")
        self.axes.set_xlim(0, self.axes.get_xlim()[1])  # imshow would shrink the sheet to the picture
        inset = 0.025 * self.field_mm
        middle_x, middle_y = left + width / 2, top + height / 2
        for letter, (x, y, ha, va) in zip(
            cut.plane.edges,
            (
                (left + inset, middle_y, "left", "center"),
                (left + width - inset, middle_y, "right", "center"),
                (middle_x, top + inset, "center", "top"),
                (middle_x, top + height - inset, "center", "bottom"),
            ),
            strict=True,
        ):
            words = self.axes.text(x, y, letter, color=figures.ON_SCREEN, fontsize=8.5, ha=ha, va=va)
            words.set_path_effects([withStroke(linewidth=2, foreground=figures.SCREEN)])

    def cross(self, row: int, column: int, cut: Cut, point_zyx_vox: Any) -> None:
        """Marks a point; the middle stays open so that what lies there can be seen."""
        left, top = self._origin_mm(row, column, cut)
        x, y = (a + b for a, b in zip((left, top), cut.place_mm(point_zyx_vox), strict=True))
        near, far = 0.025 * self.field_mm, 0.085 * self.field_mm
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            self._line((x + near * dx, x + far * dx), (y + near * dy, y + far * dy), (row, column), MARK, 1.6)

    def box(self, row: int, column: int, cut: Cut, start_zyx_vox: Any, shape_zyx: Any, color: str = BOX) -> None:
        """Outlines a region of voxels."""
        left, top = self._origin_mm(row, column, cut)
        low = cut.place_mm(np.asarray(start_zyx_vox) - 0.5)
        high = cut.place_mm(np.asarray(start_zyx_vox) + shape_zyx - 0.5)
        xs, ys = (left + low[0], left + high[0]), (top + low[1], top + high[1])
        self._line([xs[i] for i in (0, 1, 1, 0, 0)], [ys[i] for i in (0, 0, 1, 1, 0)], (row, column), color, 0.9)

    def circle(self, row: int, column: int, cut: Cut, point_zyx_vox: Any) -> None:
        """Marks where a point should be."""
        left, top = self._origin_mm(row, column, cut)
        x, y = cut.place_mm(point_zyx_vox)
        angle, radius = np.linspace(0, 2 * np.pi, 40), 0.03 * self.field_mm
        xs, ys = left + x + radius * np.cos(angle), top + y + radius * np.sin(angle)
        self._line(xs, ys, (row, column), TRUTH, 1.4)

    def _line(self, xs: Any, ys: Any, panel: tuple[int, int], color: str, width: float) -> None:
        """Drawn inside its panel only."""
        from matplotlib.patches import Rectangle

        (line,) = self.axes.plot(xs, ys, color=color, linewidth=width, solid_capstyle="butt")
        frame = Rectangle(self.corner_mm(*panel), self.field_mm, self.field_mm, transform=self.axes.transData)
        line.set_clip_path(frame)

    def png(self) -> bytes:
        return figures.png(self.figure)


def read(store: Store, id: str, cut: Cut) -> np.ndarray:
    """The cut as a grey picture."""
    return cut.turned(tone(store.read_crop(id, tuple(cut.start_zyx_vox), tuple(cut.shape_zyx), fill=OUTSIDE)))


@functools.cache
def _grey() -> Any:
    from matplotlib import colormaps

    return colormaps["gray"].with_extremes(bad=OUTSIDE_COLOR)


def fitting_field_mm(scans: Sequence[Scan], least: float, most: float) -> float:
    """The side of a square that holds the largest body's width and depth, within limits."""
    sides = [np.ptp(np.array(s.foreground_box_zyx_vox), axis=0) * np.array(s.spacing_zyx_mm) for s in scans]
    return float(np.clip(np.max([side[1:].max() for side in sides]) + 10, least, most))
