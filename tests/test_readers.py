"""Files of every format and number type, as they come from scanners and converters, are read as they are meant."""

import gzip
import os
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from alice_jax.data import dicom, hounsfield, readers
from alice_jax.data.voxels import Stored

AFFINE = np.array([[1.5, 0, 0, -30], [0, 1.5, 0, -20], [0, 0, 3, 100], [0, 0, 0, 1.0]])  # RAS


def ct_like(shape=(36, 32, 24), seed=0) -> np.ndarray:
    """int16 HU (i, j, k): air around a body of soft tissue and fat with a bone that tells the axes apart."""
    rng = np.random.default_rng(seed)
    i, j, k = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    hu = np.full(shape, -1000.0)
    radius = np.hypot(i / 0.9, j / 0.8)
    hu[radius < 1] = -90
    hu[radius < 0.85] = 45
    hu[(np.hypot(i - 0.3, j + 0.35) < 0.15) & (k > -0.6)] = 700
    return (hu + rng.normal(0, 12, shape)).round().clip(-1024).astype(np.int16)


def write_nifti(path, array, affine=AFFINE, **header):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def patch(path, offset, data):
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hdr", "ünï cödé 患者.nii.gz", "with.dots.v1.nii"])
@pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64", ">i2"])
def test_nifti_of_any_number_type(tmp_path, name, dtype):
    hu = ct_like()
    path = tmp_path / name
    (nib.Nifti1Pair if name.endswith(".hdr") else nib.Nifti1Image)(hu.astype(dtype), AFFINE).to_filename(path)
    image = readers.read(path)
    np.testing.assert_array_equal(image.hu_ijk, hu)
    np.testing.assert_allclose(image.affine_ras, AFFINE, atol=1e-5)


def test_nifti2_big_endian_and_extensions(tmp_path):
    hu = ct_like()
    nib.save(nib.Nifti2Image(hu, AFFINE), tmp_path / "two.nii")
    image = nib.Nifti1Image(hu, AFFINE, header=nib.Nifti1Header(endianness=">"))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 999))
    nib.save(image, tmp_path / "big.nii")
    for name in ("two.nii", "big.nii"):
        np.testing.assert_array_equal(readers.read(tmp_path / name).hu_ijk, hu)


def test_slope_and_intercept_are_applied(tmp_path):
    hu = ct_like()
    image = nib.Nifti1Image((hu.astype(np.int32) + 1024).clip(0).astype(np.uint16), AFFINE)
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(readers.read(tmp_path / "a.nii.gz").hu_ijk, hu.clip(-1024))


def test_nan_slope_means_no_scaling(tmp_path):
    path = write_nifti(tmp_path / "a.nii", ct_like())
    patch(path, 112, struct.pack("<2f", np.nan, np.nan))
    np.testing.assert_array_equal(readers.read(path).hu_ijk, ct_like())


def test_an_offset_of_zero_means_behind_the_header(tmp_path):
    path = patch(write_nifti(tmp_path / "a.nii", ct_like()), 108, struct.pack("<f", 0))
    np.testing.assert_array_equal(readers.read(path).hu_ijk, ct_like())


def test_padding_becomes_air(tmp_path):
    hu = ct_like()
    hu[:3] = -3024
    assert (readers.read(write_nifti(tmp_path / "a.nii", hu)).hu_ijk[:3] == -1024).all()


def test_trailing_axes_of_one_are_dropped(tmp_path):
    hu = ct_like()
    assert readers.read(write_nifti(tmp_path / "a.nii", hu[..., None])).hu_ijk.shape == hu.shape


@pytest.mark.parametrize("unit, factor", [("meter", 1e-3), ("mm", 1), ("micron", 1e3), ("unknown", 1)])
def test_units_are_respected(tmp_path, unit, factor):
    image = nib.Nifti1Image(ct_like(), np.diag([factor] * 3 + [1]) @ AFFINE)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(readers.read(tmp_path / "a.nii").affine_ras, AFFINE, rtol=1e-5, atol=1e-4)


def itk_image(hu_ijk=None, affine=AFFINE) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray((ct_like() if hu_ijk is None else hu_ijk).T))
    affine_lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(affine_lps[:3, :3], axis=0)
    image.SetSpacing(spacing)
    image.SetDirection((affine_lps[:3, :3] / spacing).ravel())
    image.SetOrigin(affine_lps[:3, 3])
    return image


def write_dicom(
    folder, image: sitk.Image, uid="1.2.3", slope=1, intercept=-1024, skip=(), compress=False, **tags
) -> list[str]:
    """A CT series, one file per slice, named so that the order of names is not that of positions."""
    folder.mkdir(exist_ok=True, parents=True)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    paths = []
    for k in range(image.GetDepth()):
        if k in skip:
            continue
        stored = image[:, :, k]  # the writer itself undoes the rescale that the tags name
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        values = {
            "0008|0060": "CT",
            "0010|0020": "secret name",
            "0020|000e": uid,
            "0020|000d": "1.2",
            "0008|0018": f"{uid}.{k + 1}",
            "0020|0032": "\\".join(f"{v:.6f}" for v in position),
            "0020|0037": "\\".join(f"{v:.6f}" for v in direction.T[:2].ravel()),
            "0028|1052": str(intercept),
            "0028|1053": str(slope),
        } | {tag.replace("_", "|"): value for tag, value in tags.items()}
        stored.SetSpacing(image.GetSpacing()[:2])
        for tag, value in values.items():
            stored.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetUseCompression(compress)
        writer.SetFileName(str(folder / f"{(k * 7) % 101:03d}.dcm"))
        writer.Execute(stored)
        paths.append(writer.GetFileName())
    return sorted(paths)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr", "dicom"])
@pytest.mark.parametrize("compress", [False, True])
def test_other_formats_equal_nifti(tmp_path, name, compress):
    wanted = readers.read(write_nifti(tmp_path / "a.nii", ct_like()))
    if name == "dicom":
        image = readers.read(tmp_path, series=write_dicom(tmp_path / "series", itk_image(), compress=compress))
        assert image.patient and "secret" not in image.patient
    else:
        sitk.WriteImage(itk_image(), str(tmp_path / name), compress)
        image = readers.read(tmp_path / name)
    np.testing.assert_array_equal(image.hu_ijk, wanted.hu_ijk)
    np.testing.assert_allclose(image.affine_ras, wanted.affine_ras, atol=1e-5)


def test_a_tilted_gantry_is_in_the_affine(tmp_path):
    image = itk_image()
    paths = write_dicom(tmp_path / "tilted", image)
    for path in paths:  # each slice 0.5 mm further back than the one below
        one = sitk.ReadImage(path)
        k = round((float(one.GetMetaData("0020|0032").split("\\")[2]) - 100) / 3)
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        one.SetMetaData("0020|0032", f"{position[0]}\\{position[1] + 0.5 * k}\\{position[2]}")
        flat = sitk.Cast(one[:, :, 0], sitk.sitkInt16)
        for tag in one.GetMetaDataKeys():
            flat.SetMetaData(tag, one.GetMetaData(tag))
        flat.SetSpacing(one.GetSpacing()[:2])
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(path)
        writer.Execute(flat)
    result = readers.read(tmp_path, series=paths)
    np.testing.assert_allclose(result.affine_ras[:3, 2], [0, -0.5, 3], atol=1e-4)
    np.testing.assert_array_equal(result.hu_ijk, ct_like())


def test_a_gzip_file_of_several_members_is_one_scan(tmp_path):
    """As bgzip writes it."""
    data = write_nifti(tmp_path / "a.nii", ct_like()).read_bytes()
    parts = [gzip.compress(data[first : first + 9999]) for first in range(0, len(data), 9999)]
    (tmp_path / "a.nii.gz").write_bytes(b"".join(parts))
    np.testing.assert_array_equal(readers.read(tmp_path / "a.nii.gz").hu_ijk, ct_like())


@pytest.mark.parametrize("ending", ["nrrd", "mha", "nhdr", "mhd"])
@pytest.mark.parametrize("kind", [sitk.sitkInt16, sitk.sitkInt32, sitk.sitkFloat32, sitk.sitkFloat64])
def test_text_headers_are_understood_as_itk_does(tmp_path, ending, kind):
    """Oblique, sheared and mirrored; ITK's own reader is the judge."""
    image = sitk.Cast(itk_image(), kind)
    image.SetDirection([0.0, 0.8, 0.6, -1.0, 0.0, 0.0, 0.0, -0.6, 0.8])
    sitk.WriteImage(image, str(tmp_path / f"a.{ending}"))
    theirs, ours = sitk.ReadImage(str(tmp_path / f"a.{ending}")), readers.read(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(ours.hu_ijk, sitk.GetArrayFromImage(theirs).T)
    for point_ijk in [(0, 0, 0), (5, 6, 7), (35, 0, 23)]:
        world_xyz_lps_mm = np.array(theirs.TransformIndexToPhysicalPoint(point_ijk))
        np.testing.assert_allclose((ours.affine_ras @ [*point_ijk, 1])[:3], world_xyz_lps_mm * [-1, -1, 1], atol=1e-3)


def test_voxels_at_the_end_of_a_detached_file(tmp_path):
    """As `byte skip: -1` and `HeaderSize = -1` say, with big numbers first and in right-anterior-superior axes."""
    raw = b"something else first" + ct_like().ravel(order="F").astype(">i2").tobytes()
    (tmp_path / "a.bin").write_bytes(raw)
    (tmp_path / "a.nhdr").write_text(
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 36 32 24\nencoding: raw\nendian: big\nbyte skip: -1\n"
        "space: RAS\nspace directions: (1.5,0,0) (0,1.5,0) (0,0,3)\nspace origin: (-30,-20,100)\ndata file: a.bin\n"
    )
    (tmp_path / "a.mhd").write_text(
        "NDims = 3\nDimSize = 36 32 24\nElementType = MET_SHORT\nElementByteOrderMSB = True\nHeaderSize = -1\n"
        "Orientation = -1 0 0 0 -1 0 0 0 1\nElementSize = 1.5 1.5 3\nPosition = 30 20 100\nElementDataFile = a.bin\n"
    )
    for name in ("a.nhdr", "a.mhd"):
        np.testing.assert_array_equal(readers.read(tmp_path / name).hu_ijk, ct_like())
        np.testing.assert_allclose(readers.read(tmp_path / name).affine_ras, AFFINE)


def test_several_series_are_told_apart(tmp_path):
    write_dicom(tmp_path / "s", itk_image(), uid="1.1")
    other = write_dicom(tmp_path / "t", itk_image(ct_like(seed=1)), uid="1.2")
    for path in other:
        os.rename(path, tmp_path / "s" / f"b{os.path.basename(path)}")
    series, rejected = dicom.sort_series([str(path) for path in sorted((tmp_path / "s").iterdir())])
    assert {uid: len(files) for uid, files in series.items()} == {"1.1": 24, "1.2": 24} and not rejected
    np.testing.assert_array_equal(readers.read(tmp_path, series=series["1.2"]).hu_ijk, ct_like(seed=1))


@pytest.mark.parametrize("piece", [1, 7, 4096, 2**20])
def test_hounsfield_does_not_depend_on_the_size_of_pieces(piece):
    hu = ct_like((20, 18, 16))
    flat = hu.ravel(order="F")
    pieces = (flat[first : first + piece] for first in range(0, flat.size, piece))
    np.testing.assert_array_equal(hounsfield.to_hu(Stored(hu.shape, AFFINE, hu.dtype, pieces)), hu)
    with pytest.raises(EOFError, match="5759 of 5760 voxels"):
        hounsfield.to_hu(Stored(hu.shape, AFFINE, hu.dtype, iter([flat[1:]])))
