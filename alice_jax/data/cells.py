"""Cells and points: where the fine cells of an embedding lie in its scan.

Coordinates are voxels of the store's frame, order (z, y, x), voxel centres at integers. Fine cell i covers the voxels
[i·stride, (i + 1)·stride), so its centre is (i + ½)·stride − ½.
"""

import numpy as np

Triple = tuple[int, int, int]


def triple(values: np.ndarray) -> Triple:
    """Three whole numbers, such as a stride or a grid, as plain ones."""
    z, y, x = values.tolist()
    return z, y, x


def cell_of_points(points_zyx_vox: np.ndarray, stride_zyx_vox: Triple, grid_zyx: Triple) -> np.ndarray:
    """(n, 3) int cells that hold the points; points beyond the grid fall into its border cells, each axis by its own
    length.

    >>> cell_of_points(np.array([[0, 3, 99]]), (2, 2, 2), (10, 10, 10))
    array([[0, 1, 9]])
    """
    cells = np.floor((np.asarray(points_zyx_vox) + 0.5) / stride_zyx_vox).astype(int)
    return np.clip(cells, 0, np.array(grid_zyx) - 1)


def points_of_cells(cells_zyx: np.ndarray, stride_zyx_vox: Triple, shape_zyx: Triple) -> np.ndarray:
    """(n, 3) float voxel coordinates of the cells' centres, kept inside the volume.

    >>> points_of_cells(np.array([[0, 1, 2]]), (2, 2, 2), (20, 20, 5))
    array([[0.5, 2.5, 4. ]])
    """
    points = (np.asarray(cells_zyx) + 0.5) * stride_zyx_vox - 0.5
    return np.clip(points, 0, np.array(shape_zyx) - 1)


def peak_offsets(scores: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """(n, 3) in [−½, ½] cells: where a parabola through the scores of a cell and its neighbours peaks.

    scores: (n,).  beside: (n, 6) before and behind along each axis; the offset is 0 along an axis with a NaN.

    >>> peak_offsets(np.array([1.0]), np.array([[0.4, 0.5, 0.0, 0.5, 0.9, np.nan]])).round(3)
    array([[0.045, 0.167, 0.   ]])
    """
    below, above = beside[:, ::2], beside[:, 1::2]
    curvature = below + above - 2 * scores[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        peak = (below - above) / (2 * curvature)
    return np.where(curvature < 0, np.clip(peak, -0.5, 0.5), 0.0)
