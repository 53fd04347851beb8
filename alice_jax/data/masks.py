"""What the student does not see: boolean grids of mask cells, True where hidden."""

import math

import numpy as np


def hidden_count(cells: int, ratio: float) -> int:
    """⌈ratio·cells⌉, exact for ratios such as 0.6 that floats cannot hold."""
    return math.ceil(round(cells * ratio, 9))


def random_blocks(rng: np.random.Generator, grid_zyx: tuple[int, int, int], ratio: float) -> np.ndarray:
    """Exactly ⌈ratio·n⌉ hidden cells anywhere in the grid (paper mode)."""
    return _scatter(rng.permutation(math.prod(grid_zyx)), grid_zyx, ratio)


def random_columns(rng: np.random.Generator, grid: tuple[int, int, int], ratio: float) -> np.ndarray:
    """Hidden columns: a pattern on the first two axes, constant along the third (release mode)."""
    return columns(rng.permutation(grid[0] * grid[1]), grid, ratio)


def columns(permutation: np.ndarray, grid: tuple[int, int, int], ratio: float) -> np.ndarray:
    """The column mask whose hidden cells are the first ⌈ratio·n⌉ of `permutation`."""
    return np.repeat(_scatter(permutation, grid[:2], ratio)[:, :, None], grid[2], axis=2)


def _scatter(permutation: np.ndarray, grid: tuple[int, ...], ratio: float) -> np.ndarray:
    hidden = np.zeros(math.prod(grid), bool)
    hidden[permutation[: hidden_count(hidden.size, ratio)]] = True
    return hidden.reshape(grid)
