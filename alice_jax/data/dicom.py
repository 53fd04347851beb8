"""DICOM series through SimpleITK: one file a slice."""

import contextlib
import dataclasses
import hashlib
import math
import mmap
import os
import re
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import SimpleITK as sitk

from alice_jax.data import geometry, voxels
from alice_jax.data.rejection import Rejected
from alice_jax.data.voxels import Stored

DEFLATED = b"1.2.840.10008.1.2.1.99"  # a transfer syntax that may unpack to any size, and is unpacked at once
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT")  # their length has four bytes
_FIRST_ITEM = re.compile(rb"\xff{4}\xfe\xff\x00\xe0(.{4})", re.DOTALL)  # of what has no length of its own

sitk.ProcessObject.SetGlobalWarningDisplay(False)


@dataclasses.dataclass(frozen=True)
class _Slice:
    """What the header of one DICOM file says."""

    path: str
    series: str
    modality: str
    patient: str
    frames: int
    size: tuple[int, ...]  # columns, rows
    position: np.ndarray  # (3,) LPS mm of its first pixel; these three are NaN where the header lacks them
    rows_cols: np.ndarray  # (2, 3): directions of growing column and of growing row index
    spacing: np.ndarray  # mm between rows, between columns


def sort_series(paths: Sequence[str]) -> tuple[dict[str, list[str]], list[tuple[str, Rejected]]]:
    """Sorts DICOM files into series: {series uid: its files} and the files that are no DICOM images."""
    series: dict[str, list[str]] = {}
    rejected = []
    for path in paths:
        try:
            series.setdefault(_read_slice_header(path).series, []).append(path)
        except Rejected as reason:
            rejected.append((path, reason))
    return series, rejected


def _read_slice_header(path: str) -> _Slice:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    try:
        _check_claims(path)
        with _silence():
            reader.ReadImageInformation()
    except (RuntimeError, OSError, ValueError) as error:
        raise Rejected("unreadable", f"not a DICOM image: {last_words(error)}") from error

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip().strip("\0") if reader.HasMetaDataKey(tag) else ""

    def numbers(tag: str, count: int) -> np.ndarray:
        try:
            values = np.array([float(part) for part in text(tag).split("\\")])
        except ValueError:
            values = np.array([])
        return values if values.shape == (count,) else np.full(count, np.nan)

    return _Slice(
        path=path,
        series=text("0020|000e") or "unknown",
        modality=text("0008|0060"),
        patient=text("0010|0020"),
        frames=reader.GetSize()[2] if reader.GetDimension() > 2 else 1,
        size=reader.GetSize()[:2],
        position=numbers("0020|0032", 3),
        rows_cols=numbers("0020|0037", 6).reshape(2, 3),
        spacing=numbers("0028|0030", 2),
    )


def _check_claims(path: str) -> None:
    """Refuses what GDCM would believe: it allots the length of any element of the file's own header (group 2), and of
    the first item of packed pixels, before it reads them.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = 132 if data[128:132] == b"DICM" else 0
        while data[place : place + 2] == b"\2\0":
            tag, kind = data[place : place + 4], data[place + 4 : place + 6]
            first, after = (8, 12) if kind in _LONG else (6, 8) if kind.isalpha() else (4, 8)
            value, place = place + after, place + after + int.from_bytes(data[place + first : place + after], "little")
            if place > len(data):
                raise Rejected("truncated", f"its header announces {place} bytes, the file has {len(data)}")
            if tag == b"\2\0\x10\0" and data[value:place].rstrip(b"\0 ") == DEFLATED:
                raise Rejected("unreadable", "a deflated DICOM file; save it in another transfer syntax")
        for item in _FIRST_ITEM.finditer(data):
            if len(data) < (size := int.from_bytes(item[1], "little")) < 2**32 - 1:
                raise Rejected("truncated", f"an item announces {size} bytes, the file has {len(data)}")


def read_header(paths: Sequence[str]) -> Stored:
    """The volume of the files of one series; raises `Rejected`."""
    slices = [_read_slice_header(path) for path in paths]
    first = slices[0]
    if first.modality not in ("CT", ""):
        raise Rejected("not a CT intensity range", f"a DICOM series of modality {first.modality}")
    if any(s.frames > 1 for s in slices):
        raise Rejected("unreadable", "a multi-frame DICOM file; convert it to NIfTI, for example with dcm2niix")
    if len(slices) < 2:
        raise Rejected("not a volume", "a DICOM series of a single slice")
    if not all(np.isfinite([*s.position, *s.rows_cols.ravel(), *s.spacing]).all() for s in slices):
        raise Rejected("no orientation", "slices without position, orientation or pixel spacing")
    if any(s.size != first.size for s in slices):
        raise Rejected("uneven slices", f"slices of {sorted({s.size for s in slices})} pixels")
    shape = voxels.check_shape((*first.size, len(slices)))
    for one in slices:
        voxels.check_size(math.prod(one.size) * 2, os.path.getsize(one.path), packed=True)
    slices, affine_lps = _stack(slices)
    affine = voxels.check_affine(geometry.RAS_FROM_LPS @ affine_lps)
    return Stored(shape, affine, np.dtype(np.float32), _read_slices(slices), patient=_pseudonym(first.patient))


def _stack(slices: list[_Slice]) -> tuple[list[_Slice], np.ndarray]:
    """Slices in order along their normal, and the affine of the stack, a tilted gantry's shear included."""
    rows_cols, spacing = slices[0].rows_cols, slices[0].spacing
    same = all(np.allclose(s.rows_cols, rows_cols, atol=1e-3) and np.allclose(s.spacing, spacing) for s in slices)
    if not same:
        raise Rejected("uneven slices", "orientation or pixel spacing changes within the series")
    normal = np.cross(rows_cols[0], rows_cols[1])
    slices = sorted(slices, key=lambda s: float(normal @ s.position))
    positions = np.stack([s.position for s in slices])
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    deviation = np.abs(positions - positions[0] - np.arange(len(slices))[:, None] * step).max()
    step_mm = float(np.linalg.norm(step))
    if step_mm > 0 and deviation > 0.1 * step_mm:
        gaps = np.diff(positions @ normal)
        raise Rejected("uneven slices", f"{len(slices)} slices, {gaps.min():.3g} to {gaps.max():.3g} mm apart")
    affine_lps = np.eye(4)
    affine_lps[:3, :3] = np.stack([rows_cols[0] * spacing[1], rows_cols[1] * spacing[0], step], axis=1)
    affine_lps[:3, 3] = positions[0]
    return slices, affine_lps


def _read_slices(slices: list[_Slice]) -> Iterator[np.ndarray]:
    """The rescaled values of each slice; one by one, since the rescale slope may change from slice to slice."""
    for one in slices:
        with _silence():
            image = sitk.ReadImage(one.path, imageIO="GDCMImageIO")
        if image.GetNumberOfComponentsPerPixel() != 1:
            raise Rejected("several values per voxel", "a colour DICOM series")
        yield sitk.GetArrayFromImage(image).astype(np.float32).ravel()


def _pseudonym(patient: str) -> str | None:
    return f"dicom-{hashlib.sha256(patient.encode()).hexdigest()[:12]}" if patient else None


# -------------------------------------------------------------------- what ITK says


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The C++ readers print to the terminal behind Python's back; what matters is in their exceptions."""
    with _SILENCE, open(os.devnull, "wb") as devnull:
        kept = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in kept:
                os.dup2(devnull.fileno(), number)
            yield
        finally:
            for number, copy in kept.items():
                os.dup2(copy, number)
                os.close(copy)


_SILENCE = threading.Lock()


def last_words(error: Exception) -> str:
    """The telling part of an exception: ITK puts it at the end of many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = next((line for line in reversed(lines) if not line.startswith("Reason: No such file")), "")
    return (text or type(error).__name__)[-200:]
