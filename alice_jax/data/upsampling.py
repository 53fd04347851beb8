"""Vectors between the cells that they are stored for: trilinear interpolation with half-pixel centres."""

from collections.abc import Iterator, Sequence

import numpy as np

from alice_jax.data.cells import Triple
from alice_jax.data.codec import normalise


def corners(at_zyx: np.ndarray, shape_zyx: Triple) -> tuple[np.ndarray, np.ndarray]:
    """The cells around places (n, 3) of a grid, 0 to its last cell: (n, 8) int, flat in C order, and (n, 8) fp32, their
    trilinear weights.

    >>> corners(np.array([[0.0, 1.0, 0.25]]), (1, 2, 2))[1].round(2).tolist()
    [[0.75, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    """
    at = at_zyx.T
    low, last = at.astype(np.intp), np.array(shape_zyx)[:, None] - 1
    stride = np.array([[shape_zyx[1] * shape_zyx[2]], [shape_zyx[2]], [1]])
    z, y, x = (np.stack([low, np.minimum(low + 1, last)]) * stride).swapaxes(0, 1)
    beyond = (at - low).astype(np.float32)
    wz, wy, wx = np.stack([1 - beyond, beyond]).swapaxes(0, 1)
    flat = z[:, None, None] + y[:, None] + x
    weights = wz[:, None, None] * wy[:, None] * wx
    return np.ascontiguousarray(flat.reshape(8, -1).T), np.ascontiguousarray(weights.reshape(8, -1).T)


def centres(cells: np.ndarray, coarse: int | np.ndarray, ratio: float | np.ndarray) -> np.ndarray:
    """Where the centres of fine cells (n,), or (n, 3), lie among coarse ones, held within those of the outer cells.

    Args:
      cells: along an axis, or along all; they may be fractions.
      coarse: how many coarse cells there are.  ratio: coarse cells per fine cell.

    >>> centres(np.arange(4), 2, 0.5).tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    return np.minimum(np.maximum((cells + 0.5) * ratio - 0.5, 0), coarse - 1)


def linear(at: np.ndarray, size: int) -> np.ndarray:
    """(places, size) fp32 weights of linear interpolation at places of an axis, 0 to size − 1.

    >>> linear(centres(np.arange(4), 2, 0.5), 2).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    low = np.minimum(at.astype(int), max(size - 2, 0))
    weights = np.zeros((len(at), size), np.float32)
    rows = np.arange(len(at))
    weights[rows, low] = 1 - (at - low)
    weights[rows, np.minimum(low + 1, size - 1)] += at - low
    return weights


def on_lattice(coarse: np.ndarray, at_zyx: Sequence[np.ndarray]) -> np.ndarray:
    """(z, y, x, dims) vectors of a grid at all combinations of places on its axes, each from 0 to the last cell.

    Trilinear, by matrix products along one axis after the other.
    """
    first = [int(at.min()) for at in at_zyx]
    part = coarse[tuple(slice(low, int(at.max()) + 2) for low, at in zip(first, at_zyx, strict=True))]
    wz, wy, wx = (linear(at - low, size) for at, low, size in zip(at_zyx, first, part.shape, strict=False))
    planes = (wz @ part.reshape(len(part), -1)).reshape(len(wz), part.shape[1], -1)
    rows = np.matmul(wy, planes).reshape(len(wz), len(wy), *part.shape[2:])
    return np.matmul(wx, rows)


def upsampled_slabs(
    coarse: np.ndarray, grid_zyx: Triple, ratios_zyx: tuple[float, ...] | None = None
) -> Iterator[np.ndarray]:
    """Coarse vectors (z, y, x, dims) on a fine grid: trilinear with half-pixel centres, normalised again.

    Yields (y, x, dims) fp32 for each fine z.
    ratios_zyx: coarse cells per fine cell; by default both grids are taken to cover the same extent.
    """
    ratios_zyx = ratios_zyx or tuple(c / n for c, n in zip(coarse.shape[:3], grid_zyx, strict=True))
    at_z, at_y, at_x = (
        centres(np.arange(n), c, r) for n, c, r in zip(grid_zyx, coarse.shape[:3], ratios_zyx, strict=True)
    )
    for z in range(grid_zyx[0]):
        yield normalise(on_lattice(coarse, (at_z[z : z + 1], at_y, at_x))[0])
