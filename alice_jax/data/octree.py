"""The order in which the fine cells of an embedding are stored: cubes of about 16 mm, halved down to the cells.

A search goes down from the cubes and reads few cells (see `matching`), so what it reads together lies together: all
cells of a cube, and in it all cells of each of its eight halves, and so on. Nodes carry the mean vector of their cells.
"""

import dataclasses
from functools import cached_property

import numpy as np

from alice_jax.data.cells import Triple

CUBE_MM = 16.0


@dataclasses.dataclass(frozen=True)
class Octree:
    """How a cube is divided.

    factors: parts along each axis (z, y, x) of a cube, of its parts, …, down to the cells.

    Example: cells of 4 mm lie two halvings below cubes of 16 mm.

    >>> Octree.of_cells((4.0, 4.0, 4.0)).factors
    ((2, 2, 2), (2, 2, 2))
    """

    factors: tuple[Triple, ...]

    @staticmethod
    def of_cells(cell_zyx_mm: tuple[float, float, float]) -> "Octree":
        """An axis is doubled, from the cells up, while that keeps it within 16 mm."""
        size, factors = np.array(cell_zyx_mm, float), []
        while (double := 2 * size <= 1.01 * CUBE_MM).any():
            z, y, x = (1 + double).tolist()
            factors.append((z, y, x))
            size = size * factors[-1]
        return Octree(tuple(reversed(factors)) or ((1, 1, 1),))

    @cached_property
    def cube_zyx(self) -> Triple:
        """Cells along each axis of a cube."""
        z, y, x = np.prod(self.factors, axis=0).tolist()
        return z, y, x

    @cached_property
    def fans(self) -> tuple[int, ...]:
        """Children of a node of each level, from the cubes down."""
        return tuple(int(np.prod(f)) for f in self.factors)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Nodes of a cube at each level: the cube itself (1), …, its cells."""
        return tuple(int(np.prod(self.fans[:level])) for level in range(len(self.fans) + 1))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each level between the cubes and the cells begins, one behind another, and where the last ends."""
        return tuple(sum(self.counts[1:level]) for level in range(1, len(self.counts)))

    @cached_property
    def places(self) -> np.ndarray:
        """(cells, 3): where each cell of a cube lies in it, in the order that they are stored in."""
        grid = np.moveaxis(np.indices(self.cube_zyx), 0, -1)
        return self.cubes(grid).reshape(-1, 3)

    @cached_property
    def slots(self) -> np.ndarray:
        """`cube_zyx` int: the place in that order of each cell."""
        slots = np.empty(self.cube_zyx, int)
        slots[tuple(self.places.T)] = np.arange(len(self.places))
        return slots

    def grid(self, grid_zyx: Triple) -> Triple:
        """The grid of cubes over a grid of cells."""
        z, y, x = (-(-n // c) for n, c in zip(grid_zyx, self.cube_zyx, strict=True))
        return z, y, x

    def cubes(self, array: np.ndarray) -> np.ndarray:
        """(z, y, x, channels) of the cells -> (z, y, x, cells of a cube, channels), padded by zeros to whole cubes."""
        grid = self.grid(array.shape[:3])
        padding = [(0, g * c - n) for g, c, n in zip(grid, self.cube_zyx, array.shape[:3], strict=True)]
        shape = [side for axis in range(3) for side in (grid[axis], *(f[axis] for f in self.factors))]
        axes = np.arange(len(shape)).reshape(3, -1)  # rows: z, y, x; columns: cube, its parts, …
        parts = np.pad(array, [*padding, (0, 0)]).reshape(*shape, array.shape[-1])
        return parts.transpose(*axes.T.ravel(), len(shape)).reshape(*grid, self.counts[-1], array.shape[-1])

    def sums(self, cells: np.ndarray) -> list[np.ndarray]:
        """(cubes, cells, channels) -> (cubes, nodes of the level, channels) for each level above the cells."""
        levels = [cells]
        for fan in reversed(self.fans):
            nodes = levels[-1]
            levels.append(nodes.reshape(len(nodes), -1, fan, nodes.shape[-1]).sum(axis=2))
        return levels[:0:-1]
