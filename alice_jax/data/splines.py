"""Cubic splines: curves, and smooth fields from a coarse grid of coefficients, on whole grids and at points."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


def _weights(t: np.ndarray) -> np.ndarray:
    """The four cubic B-spline weights at fractions t (n,) in [0, 1) -> (n, 4)."""
    return np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=-1) / 6


def _slopes(t: np.ndarray) -> np.ndarray:
    """Derivatives of `_weights` by t (n,) -> (n, 4)."""
    return np.stack([-((1 - t) ** 2), 3 * t**2 - 4 * t, -3 * t**2 + 2 * t + 1, t**2], axis=-1) / 2


@dataclasses.dataclass(frozen=True)
class SplineField:
    """A field of c components; coefficient (i, j, k) sits at `origin_zyx_mm + (i, j, k) * spacing_zyx_mm`.

    Outside the inner part of its grid (one spacing from the border) the field goes on as its nearest inner value.

    Attributes:
      coefficients: (c, nz, ny, nx), at least four per axis.
      origin_zyx_mm, spacing_zyx_mm: (3,) of the coefficient grid.
    """

    coefficients: np.ndarray
    origin_zyx_mm: np.ndarray
    spacing_zyx_mm: np.ndarray

    @staticmethod
    def covering(low_zyx_mm, high_zyx_mm, spacing_zyx_mm, components: int = 1) -> SplineField:
        """A zero field (fill `coefficients` in place) whose inner part covers the box from low to high."""
        spacing = np.broadcast_to(np.asarray(spacing_zyx_mm, np.float64), (3,))
        low, high = np.asarray(low_zyx_mm, np.float64), np.asarray(high_zyx_mm, np.float64)
        counts = np.ceil((high - low) / spacing).astype(int) + 4
        return SplineField(np.zeros((components, *counts), np.float32), low - spacing, spacing)

    def nodes_zyx_mm(self) -> np.ndarray:
        """Positions of the coefficients, (nz, ny, nx, 3)."""
        axes = [
            o + s * np.arange(n)
            for o, s, n in zip(self.origin_zyx_mm, self.spacing_zyx_mm, self.coefficients.shape[1:], strict=True)
        ]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)

    def _locate(self, axis: int, coordinates_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First coefficient index, fraction, and whether the coordinate lies in the inner part, each (n,)."""
        last = self.coefficients.shape[1 + axis] - 3
        t = (np.asarray(coordinates_mm, np.float64) - self.origin_zyx_mm[axis]) / self.spacing_zyx_mm[axis] - 1
        clipped = np.clip(t, 0, last - 1e-9)
        first = np.floor(clipped).astype(int)
        return first, clipped - first, (t >= 0) & (t < last)

    def on_grid(self, z_mm: np.ndarray, y_mm: np.ndarray, x_mm: np.ndarray) -> np.ndarray:
        """Values on the grid of three coordinate axes -> (c, z, y, x) float32; three small matrix products."""
        bases = []
        for axis, coordinates in enumerate((z_mm, y_mm, x_mm)):
            first, fraction, _ = self._locate(axis, coordinates)
            basis = np.zeros((len(first), self.coefficients.shape[1 + axis]), np.float32)
            np.put_along_axis(basis, first[:, None] + np.arange(4), _weights(fraction).astype(np.float32), axis=1)
            bases.append(basis)
        out = np.empty((self.coefficients.shape[0], *(len(b) for b in bases)), np.float32)
        for component, values in zip(self.coefficients, out, strict=True):
            plane = bases[1] @ (component @ bases[2].T)  # (nz, y, x)
            np.matmul(bases[0], plane.reshape(len(plane), -1), out=values.reshape(len(values), -1))
        return out

    def at(self, points_zyx_mm: np.ndarray) -> np.ndarray:
        """Values at points (n, 3) -> (n, c)."""
        return self._contract(np.asarray(points_zyx_mm), derivative=None)

    def jacobian(self, points_zyx_mm: np.ndarray) -> np.ndarray:
        """Derivatives at points (n, 3) -> (n, c, 3), per mm; last axis: by z, y, x."""
        return np.stack([self._contract(np.asarray(points_zyx_mm), derivative=axis) for axis in range(3)], axis=-1)

    def _contract(self, points: np.ndarray, derivative: int | None) -> np.ndarray:
        firsts, weights = [], []
        for axis in range(3):
            first, fraction, inner = self._locate(axis, points[:, axis])
            if axis == derivative:
                weights.append(np.where(inner[:, None], _slopes(fraction) / self.spacing_zyx_mm[axis], 0.0))
            else:
                weights.append(_weights(fraction))
            firsts.append(first[:, None] + np.arange(4))
        z, y, x = firsts
        local = self.coefficients[:, z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]]
        return np.einsum("cnijk,ni,nj,nk->nc", local, *weights, optimize=True)


def random_field(rng: np.random.Generator, low_zyx_mm, high_zyx_mm, spacing_zyx_mm, components: int = 1) -> SplineField:
    """A smooth Gaussian random field of about unit standard deviation, correlated over about `spacing_zyx_mm`."""
    field = SplineField.covering(low_zyx_mm, high_zyx_mm, spacing_zyx_mm, components)
    # Cubic B-splines average their coefficients: on average the sum of squared weights is 0.479 per axis.
    field.coefficients[...] = rng.standard_normal(field.coefficients.shape, np.float32) / 0.479**1.5
    return field


def through(positions, values) -> Callable[[np.ndarray], np.ndarray]:
    """The cubic spline through values (n, …) at rising positions (n,), as a function of the position."""
    from scipy.interpolate import CubicSpline  # here, since it takes a fifth of a second that all commands would wait

    return CubicSpline(positions, values)
