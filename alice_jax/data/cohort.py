"""The prepared cohort at a glance: size, spacing, field of view, intensity, orientation, outliers, disk."""

import collections
from collections.abc import Callable, Sequence

import numpy as np

from alice_jax.data import geometry
from alice_jax.data.scan import Scan
from alice_jax.data.store import Store

OUTLIER = 3.5  # robust standard deviations (Iglewicz and Hoaglin 1993)
FEWEST_FOR_OUTLIERS = 8

# What is shown of each scan; `True` where a value far from the others' is worth naming.
MEASURES: dict[str, tuple[Callable[[Scan], float], bool]] = {
    "file spacing mm (z)": (lambda scan: _file_spacing(scan, 2), True),
    "file spacing mm (y)": (lambda scan: _file_spacing(scan, 1), True),
    "file spacing mm (x)": (lambda scan: _file_spacing(scan, 0), True),
    "height mm (z)": (lambda scan: scan.shape_zyx[0] * scan.spacing_zyx_mm[0], True),
    "depth mm (y)": (lambda scan: scan.shape_zyx[1] * scan.spacing_zyx_mm[1], True),
    "width mm (x)": (lambda scan: scan.shape_zyx[2] * scan.spacing_zyx_mm[2], True),
    "HU 1st percentile": (lambda scan: _hu(scan, "p1"), False),
    "HU median": (lambda scan: _hu(scan, "p50"), False),
    "HU 99th percentile": (lambda scan: _hu(scan, "p99"), True),
    "air %": (lambda scan: 100 * _hu(scan, "air"), False),
    "lung %": (lambda scan: 100 * _hu(scan, "lung"), False),
    "fat %": (lambda scan: 100 * _hu(scan, "fat"), True),
    "soft tissue %": (lambda scan: 100 * _hu(scan, "soft"), True),
    "bone, contrast %": (lambda scan: 100 * _hu(scan, "bone"), True),
}


def summary(store: Store, scans: Sequence[Scan], at_a_time: int = 1000) -> str:
    """Lines to print; empty for no scan."""
    if not scans:
        return ""
    values = {name: np.array([measure(scan) for scan in scans]) for name, (measure, _) in MEASURES.items()}
    lines = [f"{'':26s}{'least':>9s}{'median':>9s}{'most':>9s}"]
    for name, column in values.items():
        column = column[np.isfinite(column)]
        if len(column):
            lines.append(f"{name:26s}{column.min():9.4g}{np.median(column):9.4g}{column.max():9.4g}")
    lines.append("orientation of the files: " + _orientations(scans))
    lines += _outlier_lines(scans, values)
    disk = [store.disk_bytes(scan.id) for scan in scans]
    if None not in disk:
        total = float(sum(size or 0 for size in disk))
        voxels = sum(int(np.prod(scan.shape_zyx)) for scan in scans)
        lines.append(
            f"disk: {_size(total)} for {len(scans)} scans ({total / voxels:.2f} bytes a voxel); "
            f"{at_a_time} such scans need about {_size(total / len(scans) * at_a_time)}"
        )
    return "\n".join(lines)


def _outlier_lines(scans: Sequence[Scan], values: dict[str, np.ndarray]) -> list[str]:
    """Scans that differ from the others by more than `OUTLIER` robust standard deviations."""
    if len(scans) < FEWEST_FOR_OUTLIERS:
        return []
    notes: dict[str, list[str]] = collections.defaultdict(list)
    for name, (_, worth_naming) in MEASURES.items():
        column = values[name]
        if not np.isfinite(column).any():
            continue
        median = np.nanmedian(column)
        # A cohort of nearly equal scans must not make a hair's breadth an outlier, hence the five percent.
        scale = max(1.4826 * float(np.nanmedian(np.abs(column - median))), 0.05 * abs(float(median)), 1e-6)
        for scan, value in zip(scans, column, strict=True):
            if worth_naming and abs(value - median) > OUTLIER * scale:
                notes[scan.id].append(f"{name} {value:.4g}")
    if not notes:
        return ["outliers: none"]
    return ["outliers (worth a look; they are kept):"] + [f"  {id}: {', '.join(notes[id])}" for id in sorted(notes)]


def _orientations(scans: Sequence[Scan]) -> str:
    codes = collections.Counter(str(scan.original.get("axcodes", "unknown")) for scan in scans)
    turned = sum(not scan.original.get("aligned", True) for scan in scans)
    text = ", ".join(f"{code} {count}" for code, count in codes.most_common())
    return text + (f"; {turned} oblique or sheared, resampled" if turned else "")


def _file_spacing(scan: Scan, world_axis: int) -> float:
    """Of the file axis that runs along x, y or z."""
    affine = scan.original.get("affine_ras")
    return (
        np.nan if affine is None else float(geometry.spacing_xyz(affine)[geometry.closest_axes(affine)[0][world_axis]])
    )


def _hu(scan: Scan, name: str) -> float:
    return float(scan.extra.get("hu", {}).get(name, np.nan))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
