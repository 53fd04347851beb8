"""Where the body is: the voxels that query points are drawn from."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

BODY_HU = -500  # half-way between air and tissue
LUNG_HU = -860  # lung has a median above this; the room below, blankets and mattresses included
STRIDE = 2  # voxels


def body_share(body: np.ndarray, start: np.ndarray, stop: np.ndarray, stride_zyx_vox: Sequence[int]) -> np.ndarray:
    """(z, y, x) the share of body in the cells from `start` to `stop` (3,) of a grid; beyond the mask there is none.

    stride_zyx_vox: voxels of a cell, multiples of the mask's own.

    >>> body_share(np.array([[[True, False, True]]]), np.array([0, 0, 0]), np.array([1, 1, 2]), (2, 2, 4)).tolist()
    [[[0.5, 0.5]]]
    """
    assert all(stride % STRIDE == 0 for stride in stride_zyx_vox), stride_zyx_vox
    factor = np.array(stride_zyx_vox) // STRIDE
    block = body[tuple(slice(a * f, b * f) for a, b, f in zip(start, stop, factor, strict=True))]
    wanted = (stop - start) * factor
    block = np.pad(block, [(0, n - have) for n, have in zip(wanted, block.shape, strict=True)])
    (z, y, x), (fz, fy, fx) = stop - start, factor
    return block.reshape(z, fz, y, fy, x, fx).mean(axis=(1, 3, 5))


def body_mask(volume_hu: np.ndarray) -> np.ndarray:
    """The body in a stored volume, lungs and bowel gas included, table and clothing left out.

    `volume_hu` int16 (z, y, x); returns bool of ceil(shape / 2): cell i covers the voxels 2i and 2i + 1.

    What is dense is opened, which removes sheets such as the table top, and its large connected parts are kept. Gas
    that they surround in a slice belongs to them. Where a small field of view cuts through the lungs these are not
    surrounded; they are told from the room by their density.
    """
    coarse = _block_mean(volume_hu)
    dense = coarse > BODY_HU
    # Outside the array counts as body while eroding, so that parts cut by the border or only a few cells thick stay.
    opened = ndimage.binary_dilation(ndimage.binary_erosion(dense, border_value=1)) & dense
    body = _large_parts(opened if opened.any() else dense)
    if not body.any():
        return body
    for slice_body in body:
        ndimage.binary_fill_holes(slice_body, output=slice_body)
    labels, count = ndimage.label(~body)
    medians = ndimage.median(coarse, labels, np.arange(count + 1))
    is_lung = (medians > LUNG_HU) & (medians < BODY_HU)
    is_lung[0] = False  # the body itself
    return _large_parts(body | is_lung[labels])


def foreground_box(mask: np.ndarray, shape_zyx: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Half-open corners, in voxels (z, y, x), of the box around a `body_mask` of a volume of this shape."""
    cells = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    low = tuple(int(c[0]) * STRIDE for c in cells)
    high = tuple(min((int(c[-1]) + 1) * STRIDE, n) for c, n in zip(cells, shape_zyx, strict=True))
    return low, high


def _block_mean(volume: np.ndarray) -> np.ndarray:
    """(z, y, x) -> ceil of half; at an odd end a cell is the mean of the voxels that it has."""
    padded = np.pad(volume, [(0, n % STRIDE) for n in volume.shape], mode="edge")
    z, y, x = (n // STRIDE for n in padded.shape)
    return padded.reshape(z, STRIDE, y, STRIDE, x, STRIDE).mean(axis=(1, 3, 5), dtype=np.float32)


def _large_parts(mask: np.ndarray) -> np.ndarray:
    """The largest connected part and others of at least a fifth of it: two legs are one body, a table is not."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask.copy()
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= 0.2 * sizes.max())[labels]
