"""From a file's numbers to int16 Hounsfield units, or the reason why they are not HU."""

import math

import numpy as np

from alice_jax.data.rejection import Rejected
from alice_jax.data.voxels import Stored

AIR_HU = -1024
_PADDING_HU = -1100  # scanners mark what lies outside their circle by values below any tissue, such as -2000 or -3024
_LIMITS = np.iinfo(np.int16)


def to_hu(stored: Stored) -> np.ndarray:
    """Real numbers of any type -> int16 HU (i, j, k), air and padding at -1024; else `Rejected`.

    Works piece by piece: beside the result it needs little memory.
    """
    result = np.empty(math.prod(stored.shape_ijk), np.int16)
    done = bad = 0
    low, high = np.inf, -np.inf
    counts = np.zeros(_LIMITS.max - _PADDING_HU + 1, np.int64)  # of each HU from _PADDING_HU upward
    for source in stored.pieces:
        plain = stored.slope == 1 and stored.intercept == 0 and source.dtype in (np.int16, np.int32)
        values = source if plain else source * np.float64(stored.slope) + stored.intercept
        if not plain:
            finite = np.isfinite(values)
            bad += values.size - int(np.count_nonzero(finite))
            values = values if finite.all() else np.where(finite, values, 0)
            values = np.rint(values.clip(-1e6, 1e6))
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        result[done : done + len(values)] = values.clip(AIR_HU, _LIMITS.max)
        done += len(values)
        inside = values.clip(_PADDING_HU, _LIMITS.max).astype(np.intp) - _PADDING_HU
        counts += np.bincount(inside, minlength=len(counts))
    if done < result.size:
        raise EOFError(f"{done} of {result.size} voxels are there")
    if bad:
        raise Rejected("NaN or infinite voxels", f"{bad} of {result.size}")
    _check_ct(counts, low, high)
    return result.reshape(stored.shape_ijk, order="F")


def _check_ct(counts: np.ndarray, low: float, high: float) -> None:
    """`counts[i]` voxels have the value _PADDING_HU + i. The limits are far from any real CT; see the tests."""
    hu = np.arange(len(counts)) + _PADDING_HU
    tissue = counts[1:].sum()  # without padding

    def share(selected: np.ndarray) -> float:
        return float(counts[1:][selected[1:]].sum() / max(tissue, 1))

    span = f"values {low:.0f} to {high:.0f}"
    if low == high:
        raise Rejected("not a CT intensity range", f"every voxel is {low:.0f}")
    if high > _LIMITS.max:
        raise Rejected("not a CT intensity range", span)
    if low >= 0 and high <= 255:
        raise Rejected("not a CT intensity range", f"{span}, as in a label map or an 8-bit picture")
    if share(hu == 0) > 0.2:
        raise Rejected("not a CT intensity range", f"{share(hu == 0):.0%} of the voxels are exactly 0, {span}")
    if share(hu > 800) > 0.3:  # bone and metal are a few percent
        raise Rejected("stored with an offset", f"{share(hu > 800):.0%} of the voxels lie above 800, {span}")
    if share(hu < -50) < 0.001:
        raise Rejected("not a CT intensity range", f"{span}: neither air nor fat")
    if share((hu > -150) & (hu < 300)) < 0.002:
        raise Rejected("not a CT intensity range", f"{span}: no soft tissue")
    lowest = max(int(low), _PADDING_HU)
    if lowest > -900 and share(hu == lowest) > 0.05:
        raise Rejected("not a CT intensity range", f"{span}, cut off at {lowest} HU by a display window")
