"""One file -> one prepared scan: read, validate, reorient, resample, find the body, hash."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alice_jax.data import dicom, foreground, geometry, label_files, label_maps, readers, voxels
from alice_jax.data.rejection import Rejected
from alice_jax.data.scan import Scan
from alice_jax.data.sources import COMPANIONS, Source
from alice_jax.data.store import Store
from alice_jax.errors import UserError

VERSION = 1  # of everything here that changes what is stored; files prepared under another are prepared again
MIN_VOXELS = 16
MAX_EXTENT_MM = 3000.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one file ended: `id` is None where it was quarantined, for `reason`."""

    file: str
    id: str | None = None
    reason: Rejected | None = None
    kept: bool = False  # was in the store already, unchanged


def prepare_scan(
    path: str | os.PathLike, spacing_mm: float = 2.0, series: Sequence[str] = ()
) -> tuple[Scan, np.ndarray, np.ndarray]:
    """Reads one file, or the only DICOM series of a folder (or the files `series`), for `Store.write_scan`.

    Returns the scan, its int16 HU (z, y, x) and its body mask at half the resolution; raises `Rejected`.

    >>> scan, volume, body = prepare_scan("patient_7/ct.nii.gz")  # doctest: +SKIP
    """
    if os.path.isdir(path) and not series:
        found, _ = dicom.sort_series(sorted(str(file) for file in Path(path).iterdir() if file.is_file()))
        if len(found) != 1:
            raise Rejected("not a volume", f"a folder with {len(found)} DICOM series; name one file or one series")
        series = next(iter(found.values()))
    return _finish(_place(readers.read(path, series), spacing_mm), str(path), spacing_mm)


@dataclasses.dataclass(frozen=True)
class _Placed:
    """An image in the store's order, its stored grid settled and its content hashed."""

    image: readers.Image
    view_zyx: np.ndarray
    affine_lps: np.ndarray
    grid: geometry.Grid
    sha256: str


def _place(image: readers.Image, spacing_mm: float) -> _Placed:
    view, affine_lps = geometry.reorient(image.hu_ijk, image.affine_ras)
    grid = geometry.stored_grid(view.shape, affine_lps, spacing_mm)
    size = f"{grid.shape_zyx} voxels (z, y, x) at {spacing_mm:g} mm"
    if min(grid.shape_zyx) < MIN_VOXELS:
        raise Rejected("too small", size)
    if max(grid.shape_zyx) * spacing_mm > MAX_EXTENT_MM or math.prod(grid.shape_zyx) > voxels.MAX_VOXELS:
        raise Rejected("too large", size)
    return _Placed(image, view, affine_lps, grid, _content_hash(view, affine_lps))


def _finish(placed: _Placed, file: str, spacing_mm: float) -> tuple[Scan, np.ndarray, np.ndarray]:
    image, grid = placed.image, placed.grid
    volume = geometry.resample(placed.view_zyx, placed.affine_lps, grid)
    body = foreground.body_mask(volume)
    if not body.any():
        raise Rejected("not a CT intensity range", "nothing denser than air in it")
    id = Path(file).name.split(".")[0] or "scan"
    affine = grid.affine_lps
    scan = Scan(
        id=id,
        file=file,
        sha256=placed.sha256,
        patient=image.patient or id,
        shape_zyx=(volume.shape[0], volume.shape[1], volume.shape[2]),
        spacing_zyx_mm=(spacing_mm, spacing_mm, spacing_mm),
        origin_xyz_lps_mm=(float(affine[0, 3]), float(affine[1, 3]), float(affine[2, 3])),
        direction=tuple(tuple(float(v) for v in row) for row in affine[:3, :3] / spacing_mm),
        foreground_box_zyx_vox=foreground.foreground_box(body, volume.shape),
        original={
            "affine_ras": image.affine_ras.tolist(),
            "shape_ijk": list(image.hu_ijk.shape),
            "dtype": image.dtype,
            "axcodes": geometry.axis_codes(image.affine_ras),
            "aligned": geometry.is_aligned(placed.affine_lps),
        },
        extra={"hu": _intensity(volume)},
    )
    return scan, volume, body


def _content_hash(view_zyx: np.ndarray, affine_lps: np.ndarray) -> str:
    """Of HU and geometry in the store's order: the same for every file format and orientation of a scan."""
    digest = hashlib.sha256(repr((view_zyx.shape, (affine_lps[:3].round(3) + 0.0).tolist())).encode())
    for plane in view_zyx:
        digest.update(plane.tobytes())
    return digest.hexdigest()


def _intensity(volume: np.ndarray) -> dict[str, float]:
    """What the cohort's summary shows: percentiles and shares of tissues."""
    sample = volume[::2, ::2, ::2]
    p1, p50, p99 = np.percentile(sample, [1, 50, 99])
    shares = {
        "air": sample < -900,
        "lung": (sample >= -900) & (sample < -300),
        "fat": (sample >= -150) & (sample < -30),
        "soft": (sample >= -30) & (sample < 150),
        "bone": sample >= 150,
    }
    return {"p1": float(p1), "p50": float(p50), "p99": float(p99)} | {
        name: round(float(selected.mean()), 4) for name, selected in shares.items()
    }


# -------------------------------------------------------------------- into the store


def prepare_source(store: Store, source: Source, known: Mapping[str, str]) -> list[Outcome]:
    """Prepares a file or each series of a DICOM folder into the store; what is there unchanged is kept.

    `known` are the content hashes of the store's scans and their ids.
    """
    if source.problem:
        return [Outcome(source.path, reason=source.problem)]
    if not source.files:
        return [_into_store(store, source, known)]
    series, rejected = dicom.sort_series(source.files)
    outcomes = [Outcome(path, reason=reason) for path, reason in rejected]
    for uid, files in sorted(series.items()):
        one = dataclasses.replace(source, files=tuple(files))
        if len(series) > 1:
            short = hashlib.sha256(uid.encode()).hexdigest()[:6]
            one = dataclasses.replace(one, path=f"{source.path}#{uid}", id=f"{source.id}-{short}")
        outcomes.append(_into_store(store, one, known))
    return outcomes


def _into_store(store: Store, source: Source, known: Mapping[str, str]) -> Outcome:
    try:
        origin = _origin(source)
        if _is_current(store, source.id, origin):
            return _with_labels(store, source, Outcome(source.path, source.id, kept=True))
        others = {sha256: id for sha256, id in known.items() if id != source.id}
        spacing_mm = float(store.manifest["spacing_zyx_mm"][0])
        placed = _place(readers.read(source.path, source.files), spacing_mm)
        twin = others.get(placed.sha256)
        if twin and _is_whole(store, twin):  # before the work
            return _with_labels(store, source, _same_content(store, source, twin, origin))
        source = dataclasses.replace(source, id=twin or source.id)
        scan, volume, body = _finish(placed, source.path, spacing_mm)
        labels = _labels(store, source, scan)  # before anything is written
    except Rejected as reason:
        return Outcome(source.path, reason=reason)
    except MemoryError:
        return Outcome(source.path, reason=Rejected("too large", "not enough memory to resample it"))
    patient = placed.image.patient or source.patient or source.id
    scan = dataclasses.replace(scan, id=source.id, patient=patient, extra=scan.extra | {"source": origin})
    store.write_scan(scan, volume, body)
    if labels:
        label_files.write(store, source.id, *labels)
    return Outcome(source.path, source.id)


def _labels(store: Store, source: Source, scan: Scan) -> tuple[np.ndarray, list[Any]] | None:
    """The labels of a source on the grid of its scan, and what tells whether their files have changed."""
    if not source.labels:
        return None
    origin = label_files.origin(source)
    return label_files.read(source.labels, scan, label_maps.names_in(store)), origin


def _with_labels(store: Store, source: Source, outcome: Outcome) -> Outcome:
    """Adds labels that are new or have changed to a scan that is in the store."""
    if outcome.id is None or not source.labels or label_files.is_current(store, outcome.id, label_files.origin(source)):
        return outcome
    labels = _labels(store, source, store.scan(outcome.id))
    assert labels
    label_files.write(store, outcome.id, *labels)
    return dataclasses.replace(outcome, kept=False)


def _origin(source: Source) -> dict[str, Any]:
    """What tells a changed file from an unchanged one."""
    path = Path(source.path)
    files = [Path(file) for file in source.files] or [path]
    if not source.files and path.suffix.lower() in (".hdr", ".mhd", ".nhdr"):
        files += [path.with_suffix(ending) for ending in COMPANIONS if path.with_suffix(ending).exists()]
    try:
        stats = [file.stat() for file in files]
    except OSError as error:
        raise Rejected("missing", error.strerror or str(error)) from error
    return {
        "path": os.path.abspath(source.path),
        "files": len(files),
        "bytes": sum(stat.st_size for stat in stats),
        "mtime_ns": max(stat.st_mtime_ns for stat in stats),
        "version": VERSION,
    }


def _is_current(store: Store, id: str, origin: dict[str, Any]) -> bool:
    try:
        return store.scan(id).extra.get("source") == origin and _is_whole(store, id)
    except UserError:  # not there, or damaged
        return False


def _is_whole(store: Store, id: str) -> bool:
    return store.has_array(id, "volume") and store.has_array(id, "foreground")


def _same_content(store: Store, source: Source, other: str, origin: dict[str, Any]) -> Outcome:
    """The same voxels lie in the store: a duplicate, unless its file has only been moved here."""
    scan = store.scan(other)
    path = scan.extra.get("source", {}).get("path", "")
    if path and not os.path.lexists(path.split("#")[0]):
        store.update_scan(dataclasses.replace(scan, file=source.path, extra=scan.extra | {"source": origin}))
        return Outcome(source.path, other, kept=True)
    return Outcome(source.path, reason=Rejected("duplicate", f"of {scan.file} (scan {other})"))
