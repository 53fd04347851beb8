"""Files to arrays: NIfTI through nibabel; NRRD, MetaImage and DICOM series through SimpleITK.

Nothing here trusts a header: what it declares is compared with the size of the file before memory is asked for, and
whatever goes wrong ends in a `Rejected`.
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from alice_jax.data import geometry, hounsfield
from alice_jax.data.rejection import Rejected, path_within

NIFTI_ENDINGS = (".nii", ".nii.gz", ".hdr")
ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
MAX_VOXELS = 2**30  # a 512 x 512 scan of two metres in half-millimetre slices
MAX_GZIP_RATIO = 1032  # deflate cannot do better
SPACING_MM = (0.1, 20.0)

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it prints what it repairs in headers
sitk.ProcessObject.SetGlobalWarningDisplay(False)


Convert = Callable[[np.ndarray, float, float], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Image:
    """A CT as its file has it."""

    hu_ijk: np.ndarray  # int16 Hounsfield units, or what `convert` gave
    affine_ras: np.ndarray  # (4, 4): (i, j, k, 1) -> RAS millimetres
    dtype: str  # of the stored numbers
    patient: str | None = None  # a pseudonym, where the file names its patient


def read(path: str | os.PathLike, series: Sequence[str] = (), convert: Convert = hounsfield.to_hu) -> Image:
    """Reads one file, or the DICOM slices `series`; raises `Rejected`.

    `convert` makes the voxels from what a file has stored, its slope and its intercept (DICOM is always CT).
    """
    path = Path(path)
    try:
        if series:
            return _read_dicom(series)
        name = path.name.lower()
        if not path.exists():
            raise Rejected("missing", "there is no such file")
        if not path.is_file():
            raise Rejected("unreadable", "not a regular file")
        if path.stat().st_size == 0:
            raise Rejected("unreadable", "the file is empty")
        if name.endswith(NIFTI_ENDINGS):
            return _read_nifti(path, convert)
        if name.endswith(ITK_ENDINGS):
            return _read_itk(path, convert)
        raise Rejected("unreadable", "not a known format (NIfTI, NRRD, MetaImage, DICOM series)")
    except EOFError as error:
        raise Rejected("truncated", str(error)) from error
    except FileNotFoundError as error:  # a .hdr without its .img
        raise Rejected("missing", f"there is no {os.path.basename(str(error.filename))}") from error
    except MemoryError as error:
        raise Rejected("too large", "not enough memory to read it") from error
    except (Rejected, KeyboardInterrupt):
        raise
    except Exception as error:  # readers of damaged files raise anything
        raise Rejected("unreadable", _last_words(error)) from error


# -------------------------------------------------------------------- checks that all formats share


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The three axes of a volume; trailing axes of length one are dropped."""
    shape = tuple(int(n) for n in shape)
    if any(n <= 0 for n in shape):
        raise Rejected("unreadable", f"its header says shape {shape}")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise Rejected("4-D", f"shape {shape}")
    if len(shape) < 3 or min(shape) < 2:
        raise Rejected("not a volume", f"shape {shape}")
    if math.prod(shape) > MAX_VOXELS:
        raise Rejected("too large", f"shape {shape} is {math.prod(shape):.3g} voxels")
    return shape


def _check_size(declared_bytes: int, file_bytes: int, compressed: bool) -> None:
    possible = file_bytes * MAX_GZIP_RATIO if compressed else file_bytes
    if declared_bytes > possible:
        raise Rejected("truncated", f"the header announces {declared_bytes} bytes of voxels, the file has {file_bytes}")


def _check_affine(affine_ras: np.ndarray, unit: str = "mm") -> np.ndarray:
    if not np.isfinite(affine_ras).all():
        raise Rejected("singular affine", "it is not finite")
    spacing = geometry.spacing_xyz(affine_ras)
    if (spacing == 0).any():
        raise Rejected("singular affine", "an axis has no length")
    if not ((spacing >= SPACING_MM[0]) & (spacing <= SPACING_MM[1])).all():
        stated = f", its unit being {unit}" if unit in ("meter", "micron") else ""
        raise Rejected("spacing", " x ".join(f"{s:.4g}" for s in spacing) + f" mm{stated}")
    volume = abs(np.linalg.det(affine_ras[:3, :3] / spacing))
    if volume < 0.3:  # a gantry tilted by 30 degrees leaves 0.87
        raise Rejected("singular affine", f"its axes are nearly parallel (volume of the unit cell {volume:.2g})")
    return affine_ras


# -------------------------------------------------------------------- NIfTI


def _read_nifti(path: Path, convert: Convert) -> Image:
    _check_raw_header(path)
    image = nib.load(path)
    if not isinstance(image, nib.Nifti1Pair):  # NIfTI-1 and -2, one file or two; not CIFTI, not Analyze
        if isinstance(image, nib.AnalyzeImage):
            raise Rejected("no orientation", "Analyze 7.5 files do not state it")
        raise Rejected("not a volume", f"it is a {type(image).__name__}")
    header, dtype = image.header, image.get_data_dtype()
    if dtype.fields is not None:
        raise Rejected("several values per voxel", "an RGB image")
    if dtype.kind == "c":
        raise Rejected("complex", f"data type {dtype}")
    shape = _check_shape(header.get_data_shape())
    data_path = Path(str(image.file_map["image"].filename))
    compressed = data_path.name.lower().endswith(".gz")
    proxy = cast(nib.arrayproxy.ArrayProxy, image.dataobj)
    _check_size(math.prod(shape) * dtype.itemsize + proxy.offset, data_path.stat().st_size, compressed)
    affine = _check_affine(_nifti_affine(header, image.affine), header.get_xyzt_units()[0])
    raw = np.asanyarray(proxy.get_unscaled()).reshape(shape, order="A")
    return Image(convert(raw, proxy.slope, proxy.inter), affine, dtype.name)


def _check_raw_header(path: Path) -> None:
    """Looks at what nibabel would believe (where the voxels start) or silently repair (steps of zero)."""
    with nib.openers.ImageOpener(str(path)) as file:
        head = file.read(348)
    if len(head) < 348:
        raise Rejected("unreadable", f"{len(head)} bytes are no NIfTI header")
    header = nib.Nifti1Header(head, check=False)
    if int(header["sizeof_hdr"]) != 348:
        return
    if not float(header["vox_offset"]) < 2**26:
        raise Rejected("unreadable", f"the header puts the voxels at byte {float(header['vox_offset']):.3g}")
    steps = header["pixdim"][1:4]
    if int(header["sform_code"]) <= 0 < int(header["qform_code"]) and not (steps > 0).all():
        raise Rejected("spacing", " x ".join(f"{step:.4g}" for step in steps) + " mm")


def _nifti_affine(header: nib.Nifti1Header, affine_ras: np.ndarray) -> np.ndarray:
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform <= 0 and qform <= 0:
        raise Rejected("no orientation", "neither sform nor qform is set")
    if sform > 0 and qform > 0 and _is_regular(affine_ras):
        other = header.get_qform()
        if _is_regular(other) and geometry.axis_codes(other) != geometry.axis_codes(affine_ras):
            codes = geometry.axis_codes(affine_ras), geometry.axis_codes(other)
            raise Rejected("no orientation", "sform says {} and qform says {}".format(*codes))
    unit = header.get_xyzt_units()[0]  # most writers leave it "unknown" and mean millimetres
    return np.diag([{"meter": 1e3, "micron": 1e-3}.get(unit, 1.0)] * 3 + [1.0]) @ affine_ras


def _is_regular(affine: np.ndarray) -> bool:
    return bool(np.isfinite(affine).all() and (geometry.spacing_xyz(affine) > 0).all())


# -------------------------------------------------------------------- NRRD and MetaImage


def _read_itk(path: Path, convert: Convert) -> Image:
    file_bytes, compressed, oriented = _check_itk_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with _silence():
        reader.ReadImageInformation()
    pixel = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in pixel:
        raise Rejected("complex", pixel)
    if reader.GetNumberOfComponents() != 1:
        raise Rejected("several values per voxel", pixel)
    shape = _check_shape(reader.GetSize())
    item = 1 if "8-bit" in pixel else 2 if "16-bit" in pixel else 8 if "64-bit" in pixel else 4
    _check_size(math.prod(shape) * item, file_bytes, compressed)
    if not oriented:
        raise Rejected("no orientation", "the header does not state it")
    n = reader.GetDimension()
    affine_lps = np.eye(4)
    direction = np.array(reader.GetDirection()).reshape(n, n)[:3, :3]
    affine_lps[:3, :3] = direction * np.array(reader.GetSpacing())[:3]
    affine_lps[:3, 3] = reader.GetOrigin()[:3]
    affine = _check_affine(geometry.RAS_FROM_LPS @ affine_lps)
    with _silence():
        image = reader.Execute()
    raw = sitk.GetArrayViewFromImage(image)
    return Image(convert(raw.reshape(shape[::-1]).T, 1.0, 0.0), affine, raw.dtype.name)


def _check_itk_header(path: Path) -> tuple[int, bool, bool]:
    """Size of the file with the voxels, whether they are compressed, and whether the header orients them.

    ITK follows whatever path a header names and believes its sizes, so the text is looked at first.
    """
    with open(path, "rb") as file:
        text = file.read(1 << 16)
    fields = {}
    meta = path.suffix.lower() in (".mha", ".mhd")
    for line in text.decode("latin-1").splitlines():
        key, found, value = line.partition("=" if meta else ":")
        if not found and not line.strip() and not meta:
            break  # an empty line ends the header of NRRD
        fields[key.strip().lower()] = value.lstrip("=").strip()
        if meta and key.strip().lower() == "elementdatafile":
            break
    if meta:
        compressed = fields.get("compresseddata", "false").lower() == "true"
        detached = fields.get("elementdatafile", "LOCAL")
        detached = "" if detached.upper() == "LOCAL" else detached
        oriented = bool(fields.keys() & {"transformmatrix", "rotation", "orientation"})
    else:
        compressed = fields.get("encoding", "raw").lower() not in ("raw", "txt", "text", "ascii", "hex")
        detached = fields.get("data file", fields.get("datafile", ""))
        oriented = bool(fields.get("space") and fields.get("space directions"))
    if detached and (detached.upper().startswith("LIST") or "%" in detached):
        raise Rejected("unreadable", "its voxels are spread over several files")
    data_path = path_within(path.parent, detached) if detached else path
    if not data_path.is_file():
        raise Rejected("missing", f"the header names {detached}")
    size = data_path.stat().st_size
    if int(fields.get("compresseddatasize", 0) or 0) > size:
        raise Rejected("truncated", f"the header announces {fields['compresseddatasize']} bytes, the file has {size}")
    return size, compressed, oriented


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


def _last_words(error: Exception) -> str:
    """The telling part of an exception: ITK puts it at the end of many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = next((line for line in reversed(lines) if not line.startswith("Reason: No such file")), "")
    return (text or type(error).__name__)[-200:]


# -------------------------------------------------------------------- DICOM


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


def dicom_series(paths: Sequence[str]) -> tuple[dict[str, list[str]], list[tuple[str, Rejected]]]:
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
        with _silence():
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise Rejected("unreadable", f"not a DICOM image: {_last_words(error)}") from error

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


def _read_dicom(paths: Sequence[str]) -> Image:
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
    _check_shape((*first.size, len(slices)))
    slices, affine_lps = _stack(slices)
    affine = _check_affine(geometry.RAS_FROM_LPS @ affine_lps)
    return Image(hounsfield.to_hu(raw := _read_slices(slices)), affine, raw.dtype.name, _pseudonym(first.patient))


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


def _read_slices(slices: list[_Slice]) -> np.ndarray:
    """(i, j, k) rescaled values; each slice on its own, since the rescale slope may change from slice to slice."""
    volume = np.empty((len(slices), *slices[0].size[::-1]), np.float32)
    for k, one in enumerate(slices):
        with _silence():
            image = sitk.ReadImage(one.path, imageIO="GDCMImageIO")
        if image.GetNumberOfComponentsPerPixel() != 1:
            raise Rejected("several values per voxel", "a colour DICOM series")
        volume[k] = sitk.GetArrayFromImage(image)
    return volume.transpose(2, 1, 0)


def _pseudonym(patient: str) -> str | None:
    return f"dicom-{hashlib.sha256(patient.encode()).hexdigest()[:12]}" if patient else None
