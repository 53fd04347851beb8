"""The one frame of the store, and how points travel between it, the world and the original file.

Arrays are indexed (z, y, x) and their axes grow toward Left (x), Posterior (y) and Superior (z). Files say where
their voxels lie by an affine in the RAS world of NIfTI: (i, j, k, 1) -> millimetres toward Right, Anterior, Superior.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
from scipy import ndimage

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # its own inverse
ALIGNED_DEGREES = 1.0  # file axes nearer to the world's than this are taken as they are; points still map exactly
LARGEST_SHIFT = 0.5  # `corner_shift` of what still counts as voxel on voxel


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


def corner_shift(shape_ijk, affine_ras, other_ras) -> float:
    """How many voxels apart two affines put a corner of a volume, at most, along an axis of `other_ras`."""
    corners = np.array(list(itertools.product(*((0, n - 1) for n in shape_ijk))))
    return float(np.abs(world_to_original(original_to_world(corners, affine_ras), other_ras) - corners).max())


def rotation(angles: np.ndarray) -> np.ndarray:
    """(3, 3) rotation of (z, y, x) coordinates about the z, then y, then x axis by angles (3,) in radians."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


# -------------------------------------------------------------------- from a file's axes to the store's


def closest_axes(affine_ras) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Which file axis runs along each world axis.

    Returns `axes`: the file axis nearest to x, y and z; and `flips`: whether it runs toward Right, Anterior and
    Inferior there, so that it must be reversed to grow toward Left, Posterior and Superior.
    """
    columns = RAS_FROM_LPS[:3, :3] @ np.asarray(affine_ras, float)[:3, :3]
    columns = columns / np.linalg.norm(columns, axis=0)
    axes = max(itertools.permutations(range(3)), key=lambda p: sum(abs(columns[w, a]) for w, a in enumerate(p)))
    return axes, tuple(bool(columns[world, axis] < 0) for world, axis in enumerate(axes))


def axis_codes(affine_ras) -> str:
    """The directions in which the file's axes i, j, k grow, as nibabel writes them: "RAS", "LPI", ..."""
    axes, flips = closest_axes(affine_ras)
    codes = ["", "", ""]
    for axis, flip, letters in zip(axes, flips, ("LR", "PA", "SI"), strict=True):
        codes[axis] = letters[flip]
    return "".join(codes)


def reorient(array_ijk: np.ndarray, affine_ras) -> tuple[np.ndarray, np.ndarray]:
    """Permutes and flips a file's array (i, j, k) into the store's order; no voxel value changes.

    Returns a view (z, y, x) whose axes grow toward Superior, Posterior and Left as nearly as the file's axes allow,
    and the (4, 4) matrix from its index (x, y, z, 1) to LPS millimetres, exact for oblique files too.
    """
    axes, flips = closest_axes(affine_ras)
    to_file = np.zeros((4, 4))  # (x, y, z, 1) of the view -> (i, j, k, 1)
    to_file[3, 3] = 1
    for world, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        to_file[axis, world] = -1 if flip else 1
        to_file[axis, 3] = array_ijk.shape[axis] - 1 if flip else 0
    view_xyz = array_ijk.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    return view_xyz.transpose(2, 1, 0), RAS_FROM_LPS @ np.asarray(affine_ras, float) @ to_file


# -------------------------------------------------------------------- resampling


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the voxels of a stored volume lie."""

    shape_zyx: tuple[int, ...]
    affine_lps: np.ndarray  # (4, 4): index (x, y, z, 1) -> LPS millimetres


def spacing_xyz(affine_lps) -> np.ndarray:
    """(3,) millimetres between neighbours along each axis."""
    return np.linalg.norm(np.asarray(affine_lps, float)[:3, :3], axis=0)


def is_aligned(affine_lps) -> bool:
    """Whether the axes of a reoriented volume are those of the world but for `ALIGNED_DEGREES`."""
    direction = affine_lps[:3, :3] / spacing_xyz(affine_lps)
    return bool((np.diag(direction) > np.cos(np.deg2rad(ALIGNED_DEGREES))).all())


def stored_grid(shape_zyx: tuple[int, ...], affine_lps: np.ndarray, spacing_mm: float) -> Grid:
    """The isotropic grid for a volume that `reorient` returned.

    An aligned volume keeps its (very nearly LPS) axes and its centre, so that the grid does not depend on how the
    file was flipped. Any other affine, rotated or sheared by a tilted gantry, gets the LPS-aligned box around it.
    """
    shape_xyz = np.array(shape_zyx[::-1])
    centre = affine_lps[:3, :3] @ ((shape_xyz - 1) / 2) + affine_lps[:3, 3]
    if is_aligned(affine_lps):
        direction = affine_lps[:3, :3] / spacing_xyz(affine_lps)
        extent_mm = shape_xyz * spacing_xyz(affine_lps)
    else:
        direction = np.eye(3)
        extent_mm = np.abs(affine_lps[:3, :3]) @ shape_xyz
    new_xyz = np.maximum(np.floor(extent_mm / spacing_mm + 0.5), 1).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing_mm
    affine[:3, 3] = centre - affine[:3, :3] @ ((new_xyz - 1) / 2)
    return Grid(tuple(int(n) for n in new_xyz[::-1]), affine)


def resample(view_zyx: np.ndarray, affine_lps: np.ndarray, grid: Grid, outside: int = -1024) -> np.ndarray:
    """Anti-aliased linear resampling to a `stored_grid`; `outside` fills what the file does not cover.

    Works through slabs, so that beside the int16 input it needs little memory. int16 in and out.
    """
    old_mm, new_mm = spacing_xyz(affine_lps)[::-1], spacing_xyz(grid.affine_lps)[::-1]
    if is_aligned(affine_lps):
        z, y, x = (_axis_matrix(*a) for a in zip(view_zyx.shape, old_mm, grid.shape_zyx, new_mm, strict=True))
        slabs = [_along(slab, y, x) for slab in _slabs(view_zyx)]
        return _to_int16(_along_first(np.concatenate(slabs), z))
    smooth = np.concatenate([slab.astype(np.float32) for slab in _slabs(view_zyx)])
    for axis, (old, new) in enumerate(zip(old_mm, new_mm, strict=True)):
        if new > old:
            ndimage.gaussian_filter1d(smooth, _sigma(new / old), axis, output=smooth, mode="nearest")
    return _rotated(smooth, affine_lps, grid, outside)


def resample_labels(view_zyx: np.ndarray, affine_lps: np.ndarray, grid: Grid) -> np.ndarray:
    """A label map on a `stored_grid`; background, 0, where the file ends. The same type in and out.

    Each class's mask is blurred and interpolated as `resample` does with the image, and a voxel gets the class with the
    largest share, the background's being what is left. So no new numbers arise between two classes, and borders lie
    where the image has them; taking the nearest voxel would move them by up to half a voxel of the file and fray them.
    """
    matrix = (np.linalg.inv(affine_lps) @ grid.affine_lps)[:3]
    matrix, offset = matrix[::-1, 2::-1], matrix[::-1, 3]  # both sides in (z, y, x)
    inverse = np.linalg.inv(matrix)
    steps = spacing_xyz(grid.affine_lps)[::-1] / spacing_xyz(affine_lps)[::-1]
    sigmas = np.array([_sigma(step) for step in steps])
    margin = np.ceil(4 * sigmas).astype(int) + 2
    best, total = np.zeros(grid.shape_zyx, np.float32), np.zeros(grid.shape_zyx, np.float32)
    result = np.zeros(grid.shape_zyx, view_zyx.dtype)
    for code, box in enumerate(ndimage.find_objects(view_zyx), 1):
        if box is None:
            continue
        low = np.maximum([side.start for side in box] - margin, 0)
        high = np.minimum([side.stop for side in box] + margin, view_zyx.shape)
        share = (view_zyx[tuple(map(slice, low, high))] == code).astype(np.float32)
        ndimage.gaussian_filter(share, sigmas, output=share, mode="nearest")
        # The stored voxels around the box: a box's corners in one grid bound it in the other.
        corners = np.stack(np.meshgrid(*zip(low - 1, high, strict=True), indexing="ij"), -1).reshape(-1, 3)
        reached = (corners - offset) @ inverse.T
        first = np.clip(np.floor(reached.min(axis=0)).astype(int), 0, grid.shape_zyx)
        last = np.clip(np.ceil(reached.max(axis=0)).astype(int) + 1, first, grid.shape_zyx)
        part = tuple(map(slice, first, last))
        share = ndimage.affine_transform(
            share, matrix, matrix @ first + offset - low, tuple(last - first), order=1, mode="nearest"
        )
        total[part] += share
        won = share > best[part]
        best[part][won], result[part][won] = share[won], code
    result[best < 1 - total] = 0
    if not is_aligned(affine_lps):
        result[resample(np.ones(view_zyx.shape, np.int16), affine_lps, grid, outside=0) == 0] = 0
    return result


def _rotated(array_zyx: np.ndarray, affine_lps: np.ndarray, grid: Grid, outside: int) -> np.ndarray:
    """Linear interpolation on another grid, slice by slice."""
    matrix = (np.linalg.inv(affine_lps) @ grid.affine_lps)[:3]
    matrix, offset = matrix[::-1, 2::-1], matrix[::-1, 3]  # both sides in (z, y, x)
    last = np.array(array_zyx.shape)[:, None, None] - 1
    depth, height, width = grid.shape_zyx
    in_plane = np.tensordot(matrix[:, 1:], np.mgrid[:height, :width], axes=1) + offset[:, None, None]
    result = np.empty(grid.shape_zyx, np.int16)
    for z in range(depth):
        points = in_plane + matrix[:, 0, None, None] * z
        values = ndimage.map_coordinates(array_zyx, points, order=1, mode="nearest")
        covered = ((points >= -0.5) & (points <= last + 0.5)).all(axis=0)  # voxels reach half a step beyond centres
        result[z] = _to_int16(np.where(covered, values, outside))
    return result


def _sigma(factor: float) -> float:
    """Gaussian, in input voxels, that turns one voxel's width into `factor` of them (Cardoso et al. 2015)."""
    return math.sqrt(max(factor**2 - 1, 0)) / (2 * math.sqrt(2 * math.log(2)))


def _axis_matrix(n_old: int, old_mm: float, n_new: int, new_mm: float) -> np.ndarray | None:
    """(n_new, n_old) weights that blur where the step grows and interpolate linearly, centre on centre.

    None where the grids are the same to a twentieth of a voxel: a scan at the stored spacing is kept as it is.
    """
    if n_old == n_new and abs(old_mm - new_mm) * n_old < 0.05 * new_mm:
        return None
    position = (np.arange(n_new) - (n_new - 1) / 2) * new_mm / old_mm + (n_old - 1) / 2
    position = position.clip(0, n_old - 1)
    below = np.floor(position).astype(int).clip(0, max(n_old - 2, 0))
    linear = np.zeros((n_new, n_old))
    linear[np.arange(n_new), below] += 1 - (position - below)
    linear[np.arange(n_new), np.minimum(below + 1, n_old - 1)] += position - below
    if new_mm > old_mm:
        linear = linear @ ndimage.gaussian_filter1d(np.eye(n_old), _sigma(new_mm / old_mm), axis=0, mode="nearest")
    return linear.astype(np.float32)


def _slabs(view_zyx: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(view_zyx), 16):
        yield view_zyx[start : start + 16]


def _along(slab: np.ndarray, y: np.ndarray | None, x: np.ndarray | None) -> np.ndarray:
    slab = np.ascontiguousarray(slab, np.float32)
    if y is not None:
        slab = y @ slab
    return slab if x is None else slab @ x.T


def _along_first(array: np.ndarray, z: np.ndarray | None) -> np.ndarray:
    return array if z is None else (z @ array.reshape(len(array), -1)).reshape(-1, *array.shape[1:])


def _to_int16(values: np.ndarray) -> np.ndarray:
    limits = np.iinfo(np.int16)
    return np.rint(values).clip(limits.min, limits.max).astype(np.int16)
