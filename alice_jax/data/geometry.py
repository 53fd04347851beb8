"""The one frame of the store, and how points travel between it, the world and the original file.

Arrays are indexed (z, y, x) and their axes grow toward Left (x), Posterior (y) and Superior (z). Files say where
their voxels lie by an affine in the RAS world of NIfTI: (i, j, k, 1) -> millimetres toward Right, Anterior, Superior.
"""

import numpy as np

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # its own inverse


def stored_affine(origin_xyz_lps_mm, direction, spacing_zyx_mm) -> np.ndarray:
    """(4, 4) matrix from a stored voxel index (x, y, z, 1) to LPS millimetres.

    `origin_xyz_lps_mm` is the centre of voxel 0; the columns of `direction` (3, 3) are the axes x, y, z in LPS.
    """
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(direction, float).reshape(3, 3) * np.asarray(spacing_zyx_mm, float)[::-1]
    affine[:3, 3] = origin_xyz_lps_mm
    return affine


def index_to_world(points_zyx_vox, affine_lps) -> np.ndarray:
    """(n, 3) voxel indices (z, y, x) -> (n, 3) LPS millimetres (x, y, z), under a `stored_affine`."""
    points_xyz_vox = np.asarray(points_zyx_vox, float)[..., ::-1]
    return points_xyz_vox @ affine_lps[:3, :3].T + affine_lps[:3, 3]


def world_to_index(points_xyz_lps_mm, affine_lps) -> np.ndarray:
    """The inverse of `index_to_world`."""
    inverse = np.linalg.inv(affine_lps)
    return (np.asarray(points_xyz_lps_mm, float) @ inverse[:3, :3].T + inverse[:3, 3])[..., ::-1]


def world_to_original(points_xyz_lps_mm, affine_ras) -> np.ndarray:
    """(n, 3) LPS millimetres -> (n, 3) float indices (i, j, k) of the original file, with its nibabel affine."""
    inverse = np.linalg.inv(np.asarray(affine_ras, float)) @ RAS_FROM_LPS
    return np.asarray(points_xyz_lps_mm, float) @ inverse[:3, :3].T + inverse[:3, 3]


def original_to_world(points_ijk, affine_ras) -> np.ndarray:
    """The inverse of `world_to_original`."""
    affine_lps = RAS_FROM_LPS @ np.asarray(affine_ras, float)
    return np.asarray(points_ijk, float) @ affine_lps[:3, :3].T + affine_lps[:3, 3]
