"""Painting solid shapes of tissue on the canonical grid of the phantom: ellipsoids, tubes, outlines.

Canonical millimetres (z, y, x): z grows upward from the upper thighs, y toward the back, x toward the patient's *left*;
x = 0 is the midline.
"""

from collections.abc import Callable

import numpy as np

from alice_jax.data import splines
from alice_jax.data.phantom_tissues import CODES

SPACING_MM = 1.6
LOW_ZYX_MM = (0.0, -132.0, -236.0)
HIGH_ZYX_MM = (560.0, 132.0, 236.0)


def curve(waypoints_zyx_mm, radii_mm, step_mm: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """A smooth curve through waypoints, densely sampled: points (n, 3) and radii (n,)."""
    waypoints = np.asarray(waypoints_zyx_mm, np.float64)
    radii = np.broadcast_to(np.asarray(radii_mm, np.float64), len(waypoints))
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(waypoints, axis=0), axis=1))])
    samples = np.linspace(0, along[-1], max(int(along[-1] / step_mm), 2))
    bend = (
        splines.through(along, waypoints)
        if len(waypoints) > 2
        else lambda s: np.stack([np.interp(s, along, waypoints[:, i]) for i in range(3)], axis=1)
    )
    return bend(samples), np.interp(samples, along, radii)


class Canvas:
    """Tissue codes on the canonical grid, and the ways to paint on it; later paint covers earlier paint."""

    def __init__(self):
        self.axes = [np.arange(low, high + 1e-6, SPACING_MM) for low, high in zip(LOW_ZYX_MM, HIGH_ZYX_MM, strict=True)]
        self.tissue = np.zeros([len(a) for a in self.axes], np.uint8)
        # Shapes are drawn in gently warped coordinates, so that no organ is a perfect ellipsoid.
        warp = splines.random_field(np.random.default_rng(7), LOW_ZYX_MM, HIGH_ZYX_MM, 26.0, components=3)
        self.zyx = warp.on_grid(*self.axes)
        for i in range(3):
            self.zyx[i] *= 2.2
            self.zyx[i] += self.axes[i].reshape([-1 if j == i else 1 for j in range(3)]).astype(np.float32)

    def window(self, low_zyx_mm, high_zyx_mm) -> tuple[slice, ...]:
        """Index slices of the box, with room for the warp."""
        return tuple(
            slice(*np.searchsorted(a, (low - 7, high + 7)))
            for a, low, high in zip(self.axes, low_zyx_mm, high_zyx_mm, strict=True)
        )

    def fill(self, window, inside: np.ndarray, name: str, only: tuple[str, ...] = ()) -> None:
        view = self.tissue[window]
        if only:
            inside = inside & np.isin(view, [CODES[n] for n in only])
        view[inside] = CODES[name]

    def shape(self, low, high, distance: Callable, *layers: tuple[float, str], only: tuple[str, ...] = ()) -> None:
        """Paints where distance(z, y, x) in mm is below each layer's depth, in order."""
        window = self.window(low, high)
        field = distance(*self.zyx[(slice(None), *window)])
        for depth, name in layers:
            self.fill(window, field < depth, name, only)
            only = (*only, name) if only else ()

    def ellipsoid(self, centre, radii, *layers, tilt_zx: float = 0.0, tilt_zy: float = 0.0, only=()) -> None:
        """Paints an ellipsoid; tilts in degrees turn its z axis toward +x and toward +y; layers as in `shape`."""
        (cz, cy, cx), (rz, ry, rx) = centre, radii
        a, b, reach = np.deg2rad(tilt_zx), np.deg2rad(tilt_zy), max(radii) if tilt_zx or tilt_zy else 0
        margin = np.maximum(radii, reach) + max(d for d, _ in layers)

        def distance(z, y, x):
            z, y, x = z - cz, y - cy, x - cx
            z, x = z * np.cos(a) + x * np.sin(a), x * np.cos(a) - z * np.sin(a)
            z, y = z * np.cos(b) + y * np.sin(b), y * np.cos(b) - z * np.sin(b)
            return (np.sqrt((z / rz) ** 2 + (y / ry) ** 2 + (x / rx) ** 2) - 1) * min(radii)

        self.shape(np.asarray(centre) - margin, np.asarray(centre) + margin, distance, *layers, only=only)

    def tube(self, waypoints, radii, *layers, only=(), both_sides: bool = False) -> None:
        """A tube with the given radii through waypoints; layers as in `shape`. both_sides: its mirror image too."""
        points, radius = curve(waypoints, radii)
        if both_sides:
            self.tube(points[::8] * (1, 1, -1), radius[::8], *layers, only=only)
        reach = radius.max() + max(d for d, _ in layers) + 2
        window = self.window(points.min(0) - reach, points.max(0) + reach)
        field = np.full(self.tissue[window].shape, 99.0, np.float32)
        coordinates = self.zyx[(slice(None), *window)]
        for point, r in zip(points, radius, strict=True):
            near = self.window(point - r - 2, point + r + 2)
            local = tuple(slice(max(n.start - w.start, 0), n.stop - w.start) for n, w in zip(near, window, strict=True))
            z, y, x = (c[local] - p for c, p in zip(coordinates, point, strict=True))
            np.minimum(field[local], np.sqrt(z * z + y * y + x * x) - np.float32(r), out=field[local])
        for depth, name in layers:
            self.fill(window, field < depth, name, only)
            only = (*only, name) if only else ()

    def outline(self, z_table, table) -> np.ndarray:
        """Signed distance (about) to a trunk-like outline with half width, half depth and centre by height."""
        width, depth, centre = (np.interp(self.axes[0], z_table, t).astype(np.float32)[:, None, None] for t in table)
        _, y, x = self.zyx
        v, u = ((y - centre) / depth) ** 2, (x / width) ** 2
        r = u + v - 0.35 * np.minimum(u, 1) * np.minimum(v, 1)  # a squircle: between an ellipse and a box
        return (np.sqrt(r) - 1) * np.minimum(width, depth)
