"""Vectors between the cells that they are stored for: trilinear interpolation with half-pixel centres."""

from collections.abc import Iterator

import numpy as np

from alice_jax.data.codec import normalise

Triple = tuple[int, int, int]

_CORNERS = np.array(list(np.ndindex(2, 2, 2)))
_NEAR, _SLOPE = (1 - _CORNERS).astype(np.float32), (2 * _CORNERS - 1).astype(np.float32)


def corners(at: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 8, 3) int, the cells around places (n, 3) from 0 to `last`, and (n, 8) fp32, their trilinear weights."""
    low = at.astype(int)
    weights = _NEAR + _SLOPE * (at - low).astype(np.float32)[:, None]
    return np.minimum(low[:, None] + _CORNERS, last), weights[..., 0] * weights[..., 1] * weights[..., 2]


def strides(array: np.ndarray) -> np.ndarray:
    """(3,) rows of the flattened array from a cell to the next along each axis."""
    return np.array([array.shape[1] * array.shape[2], array.shape[2], 1])


def interpolation(size: int, coarse_size: int, ratio: float) -> np.ndarray:
    """(size, coarse_size) fp32 weights of linear interpolation with half-pixel centres, held beyond the outer centres.

    ratio: coarse cells per fine cell.

    >>> interpolation(4, 2, 0.5).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    at = np.clip((np.arange(size) + 0.5) * ratio - 0.5, 0, coarse_size - 1)
    low = np.minimum(at.astype(int), max(coarse_size - 2, 0))
    weights = np.zeros((size, coarse_size), np.float32)
    rows = np.arange(size)
    weights[rows, low] = 1 - (at - low)
    weights[rows, np.minimum(low + 1, coarse_size - 1)] += at - low
    return weights


def upsampled_slabs(
    coarse: np.ndarray, grid_zyx: Triple, ratios_zyx: tuple[float, ...] | None = None
) -> Iterator[np.ndarray]:
    """Coarse vectors (z, y, x, dims) on a fine grid: trilinear with half-pixel centres, normalised again.

    Yields (y, x, dims) fp32 for each fine z; one axis after the other by matrix products.
    ratios_zyx: coarse cells per fine cell; by default both grids are taken to cover the same extent.
    """
    ratios_zyx = ratios_zyx or tuple(c / n for c, n in zip(coarse.shape[:3], grid_zyx, strict=True))
    wz, wy, wx = (interpolation(n, c, r) for n, c, r in zip(grid_zyx, coarse.shape[:3], ratios_zyx, strict=True))
    flat = coarse.reshape(coarse.shape[0], -1)
    for z in range(grid_zyx[0]):
        plane = (wz[z] @ flat).reshape(coarse.shape[1], -1)
        rows = (wy @ plane).reshape(grid_zyx[1], coarse.shape[2], coarse.shape[3])
        yield normalise(np.matmul(wx, rows))
