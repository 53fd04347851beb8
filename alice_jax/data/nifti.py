"""NIfTI-1 and NIfTI-2 files through nibabel.

Of a file it reads the header alone, since it would believe extensions of any size.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.imageglobals import logger

from alice_jax.data import geometry, voxels
from alice_jax.data.rejection import Rejected
from alice_jax.data.voxels import Place, Stored

ENDINGS = (".nii", ".nii.gz", ".hdr")
CIFTI_INTENTS = range(3000, 3100)
MAGIC_OF_ONE_FILE = b"n+"

logger.disabled = True  # it prints what it repairs in headers


def read_header(path: Path) -> Stored:
    """The volume of a .nii or .nii.gz file, or of a .hdr with its .img; raises `Rejected`."""
    with voxels.opened(_place(path)) as file:
        head = file.read(nib.Nifti2Header.sizeof_hdr)
    detached = path.suffix.lower() == ".hdr"
    raw = _raw_header(head, detached)
    header = type(raw)(raw.binaryblock, raw.endianness, check=True)
    if isinstance(header, nib.Nifti2Header) and int(header["intent_code"]) in CIFTI_INTENTS:
        raise Rejected("not a volume", "it is a CIFTI file, a matrix")
    dtype = header.get_data_dtype()
    if dtype.fields is not None:
        raise Rejected("several values per voxel", "an RGB image")
    if dtype.kind == "c":
        raise Rejected("complex", f"data type {dtype}")
    shape = voxels.check_shape(header.get_data_shape())
    data_path = _image_of(path) if detached else path
    affine = voxels.check_affine(_affine(raw, header), header.get_xyzt_units()[0])
    slope, intercept = header.get_slope_inter()
    return Stored(
        shape,
        affine,
        dtype,
        voxels.pieces(_place(data_path, _first_byte(header, detached)), dtype, shape),
        1.0 if slope is None else slope,
        0.0 if intercept is None else intercept,
    )


def write(path: Path, array_ijk: np.ndarray, affine_ras: np.ndarray) -> None:
    """Writes a .nii.gz or .nii file, in one piece; the affine is (i, j, k, 1) -> RAS millimetres."""
    image = nib.Nifti1Image(array_ijk, affine_ras)
    image.header.set_xyzt_units("mm")
    partial = path.with_name(f".partial.{path.name}")
    try:
        nib.save(image, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _place(path: Path, skip: int = 0) -> Place:
    return Place(path, packing="gzip" if path.suffix.lower() == ".gz" else "", skip=skip)


def _raw_header(head: bytes, detached: bool) -> nib.Nifti1Header:
    """The header as it stands in the file, without nibabel's repairs."""
    for kind in (nib.Nifti2Header, nib.Nifti1Header):
        if kind.may_contain_header(head):
            return kind(head[: kind.sizeof_hdr], check=False)
    if detached and nib.AnalyzeHeader.may_contain_header(head):
        raise Rejected("no orientation", "Analyze 7.5 files do not state it")
    raise Rejected("unreadable", "its first bytes are no NIfTI header")


def _first_byte(header: nib.Nifti1Header, detached: bool) -> int:
    if not detached and not header["magic"].item().startswith(MAGIC_OF_ONE_FILE):
        raise Rejected("unreadable", "the header says that the voxels are in another file")
    offset = float(header["vox_offset"])
    if not 0 <= offset <= voxels.MAX_HEADER_BYTES:
        raise Rejected("unreadable", f"the header puts the voxels at byte {offset:.3g}")
    return max(int(offset), 0 if detached else header.single_vox_offset)  # some writers leave it 0


def _image_of(path: Path) -> Path:
    """The file of the voxels beside a .hdr."""
    images = [path.with_suffix(".img" if path.suffix.islower() else ".IMG"), path.with_suffix(".img.gz")]
    return next((image for image in images if image.exists()), images[0])


def _affine(raw: nib.Nifti1Header, header: nib.Nifti1Header) -> np.ndarray:
    """(i, j, k, 1) -> RAS millimetres."""
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    steps = raw["pixdim"][1:4]  # nibabel makes 1 of 0
    if sform <= 0 and qform <= 0:
        raise Rejected("no orientation", "neither sform nor qform is set")
    if sform <= 0 and not (steps > 0).all():
        raise Rejected("spacing", " x ".join(f"{step:.4g}" for step in steps) + " mm")
    with np.errstate(all="ignore"):  # what is not finite is turned down by its caller
        affine = header.get_best_affine()
        unit = header.get_xyzt_units()[0]  # most writers leave it "unknown" and mean millimetres
        affine_ras = np.diag([{"meter": 1e3, "micron": 1e-3}.get(unit, 1.0)] * 3 + [1.0]) @ affine
        if sform > 0 and qform > 0 and _is_regular(affine) and _is_regular(other := header.get_qform()):
            codes = geometry.axis_codes(affine), geometry.axis_codes(other)
            if codes[0] != codes[1]:
                raise Rejected("no orientation", "sform says {} and qform says {}".format(*codes))
    return affine_ras


def _is_regular(affine: np.ndarray) -> bool:
    return bool(np.isfinite(affine).all() and (geometry.spacing_xyz(affine) > 0).all())
