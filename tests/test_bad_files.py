"""Every kind of broken file gets its named reason, in bounded memory."""

import gzip
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from test_readers import AFFINE, ct_like, itk_image, patch, write_dicom, write_nifti

from alice_jax.data import dicom, readers
from alice_jax.data.rejection import REMEDIES, Rejected


def reason_of(path, **kwargs) -> Rejected:
    with pytest.raises(Rejected) as caught:
        readers.read(path, **kwargs)
    assert caught.value.name in REMEDIES and "\n" not in str(caught.value)
    return caught.value


def broken_files(folder):
    """{case: (path, name of the reason)} of one file each; good.nii lies among them."""
    hu = ct_like()
    cases = {}

    def add(case, reason, path):
        cases[case] = (path, reason)

    def add_changed(data, case, reason, old, new):
        assert old in data
        (folder / case).write_bytes(data.replace(old, new))
        add(case, reason, folder / case)

    def nifti(case, reason, array, affine=AFFINE, ending=".nii.gz", **header):
        add(case, reason, write_nifti(folder / f"{case}{ending}", array, affine, **header))

    def raw(case, reason, offset, data):
        add(case, reason, patch(write_nifti(folder / f"{case}.nii", hu), offset, data))

    good = gzip.compress(write_nifti(folder / "good.nii", hu).read_bytes(), compresslevel=0)
    for case, reason, data in [
        ("empty.nii.gz", "unreadable", b""),
        ("truncated.nii.gz", "truncated", good[: len(good) // 2]),
        ("garbage.nii.gz", "unreadable", gzip.compress(b"not an image" * 99)),
        ("not_gzip.nii.gz", "unreadable", b"not gzip" * 99),
        ("header.nii", "truncated", (folder / "good.nii").read_bytes()[:352]),
        ("cut.nii", "truncated", (folder / "good.nii").read_bytes()[:-1]),
        ("short.nii", "unreadable", (folder / "good.nii").read_bytes()[:100]),
        ("text.mha", "missing", b"ElementDataFile = nowhere.raw"),
        ("text.nrrd", "unreadable", b"NRRD0004\nnothing: more\n\n"),
        ("photo.png", "unreadable", b"\x89PNG"),
    ]:
        (folder / case).write_bytes(data)
        add(case, reason, folder / case)
    flipped = bytearray(good)  # stored, not compressed: what it unpacks to is another voxel
    flipped[len(flipped) // 2] ^= 4
    (folder / "flipped.nii.gz").write_bytes(flipped)
    add("flipped.nii.gz", "unreadable", folder / "flipped.nii.gz")
    os.symlink(folder / "nowhere", folder / "dangling.nii.gz")
    add("dangling", "missing", folder / "dangling.nii.gz")
    (folder / "lonely.hdr").write_bytes((folder / "good.nii").read_bytes()[:344] + b"ni1\0")
    add("no .img", "missing", folder / "lonely.hdr")

    raw("magic", "unreadable", 344, b"xxxx")
    raw("negative_dim", "unreadable", 42, struct.pack("<h", -64))
    raw("zero_dim", "unreadable", 42, struct.pack("<h", 0))
    raw("huge", "too large", 42, struct.pack("<3h", 32767, 32767, 32767))
    raw("wrong_size", "truncated", 42, struct.pack("<3h", 900, 900, 900))
    raw("far_offset", "unreadable", 108, struct.pack("<f", 1e30))
    raw("detached", "unreadable", 344, b"ni1\0")
    raw("no_forms", "no orientation", 252, struct.pack("<2h", 0, 0))
    contradiction = nib.Nifti1Image(hu, AFFINE)
    contradiction.set_qform(np.diag([-1.0, 1, 1, 1]) @ AFFINE, 1)
    nib.save(contradiction, folder / "contradiction.nii")
    add("contradiction", "no orientation", folder / "contradiction.nii")
    zero_step = nib.Nifti1Image(hu, AFFINE)
    zero_step.set_sform(None, 0)
    zero_step.set_qform(AFFINE, 1)
    nib.save(zero_step, folder / "zero_step.nii")
    add("zero_step", "spacing", patch(folder / "zero_step.nii", 80, struct.pack("<f", 0)))

    matrix = nib.Nifti2Image(hu, AFFINE)
    matrix.header["intent_code"] = 3001  # CIFTI's
    nib.save(matrix, folder / "matrix.dconn.nii")
    add("cifti", "not a volume", folder / "matrix.dconn.nii")
    nib.AnalyzeImage(hu, AFFINE).to_filename(folder / "analyze.hdr")
    add("analyze", "no orientation", folder / "analyze.hdr")

    nifti("two_d", "not a volume", hu[:, :, 0])
    nifti("single_slice", "not a volume", hu[:, :, :1])
    nifti("four_d", "4-D", np.stack([hu] * 3, -1))
    nifti("complex", "complex", hu.astype(np.complex64))
    rgb = np.zeros(hu.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nifti("rgb", "several values per voxel", rgb)
    with_nan = hu.astype(np.float32)
    with_nan[3:5, 3, 3] = np.nan, np.inf
    nifti("some_nan", "NaN or infinite voxels", with_nan)
    nifti("all_nan", "NaN or infinite voxels", np.full(hu.shape, np.nan, np.float32))

    def sform(case, reason, *rows):
        raw(case, reason, 280, np.array(rows, "<f4").tobytes())

    sform("flat_axis", "singular affine", [1.5, 0, 0, 0], [0, 0, 0, 0], [0, 0, 3, 0])
    sform("parallel", "singular affine", [1.5, 1.5, 0, 0], [0, 0.01, 0, 0], [0, 0, 3, 0])
    sform("same_axis", "singular affine", [1.5, 0, 1.5, 0], [0, 1.5, 0, 0], [0, 0, 0, 0])
    sform("far_origin", "singular affine", [1.5, 0, 0, 1e30], [0, 1.5, 0, 0], [0, 0, 3, 0])
    sform("nan_affine", "singular affine", [1.5, 0, 0, np.nan], [0, 1.5, 0, 0], [0, 0, 3, 0])
    nifti("fine_spacing", "spacing", hu, np.diag([0.01, 1, 1, 1]))
    nifti("coarse_spacing", "spacing", hu, np.diag([1, 1, 40.0, 1]))
    nifti("micron", "spacing", hu, xyzt_units=3)

    nifti("constant", "not a CT intensity range", np.full(hu.shape, -1000, np.int16))
    nifti("label_map", "not a CT intensity range", (hu > 0).astype(np.uint8))
    nifti("eight_bit", "not a CT intensity range", ((hu.clip(-160, 240) + 160) / 400 * 255).astype(np.uint8))
    nifti("windowed", "not a CT intensity range", hu.clip(-160, 240))
    nifti("zero_to_one", "not a CT intensity range", ((hu + 1000) / 2000).clip(0, 1).astype(np.float32))
    nifti("z_score", "not a CT intensity range", ((hu - hu.mean()) / hu.std()).astype(np.float32))
    nifti("mr", "not a CT intensity range", np.abs(hu // 2 + 500) % 900)
    nifti("masked", "not a CT intensity range", np.where(hu < -500, 0, hu).astype(np.int16))
    nifti("air", "not a CT intensity range", (hu // 50 - 1000).astype(np.int16))
    nifti("too_bright", "not a CT intensity range", hu.astype(np.int32) * 1000)
    nifti("uint16_offset", "stored with an offset", (hu.astype(int) + 1024).clip(0).astype(np.uint16))
    padded = (hu.astype(int) + 1024).astype(np.int16)
    padded[:4] = -2000
    nifti("offset_with_padding", "stored with an offset", padded)

    for ending in ("mha", "nrrd"):
        sitk.WriteImage(itk_image(), str(folder / f"cut.{ending}"))
        os.truncate(folder / f"cut.{ending}", 5000)
        add(f"cut {ending}", "truncated", folder / f"cut.{ending}")
        sitk.WriteImage(itk_image(), str(folder / f"cut_z.{ending}"), True)
        os.truncate(folder / f"cut_z.{ending}", 5000)
        add(f"cut compressed {ending}", "truncated", folder / f"cut_z.{ending}")
        colour = sitk.Compose([sitk.Cast(itk_image(), sitk.sitkFloat32)] * 3)
        sitk.WriteImage(colour, str(folder / f"colour.{ending}"))
        add(f"colour {ending}", "several values per voxel", folder / f"colour.{ending}")
        sitk.WriteImage(sitk.JoinSeries([itk_image()] * 2), str(folder / f"four.{ending}"))
        add(f"4-D {ending}", "4-D", folder / f"four.{ending}")
    nrrd = (folder / "cut.nrrd").read_bytes() + bytes(2**16)  # whole again
    for case in [
        ("unplaced.nrrd", "no orientation", b"space: left-posterior-superior", b"space dimension: 3"),
        ("huge.nrrd", "too large", b"sizes: 36 32 24", b"sizes: 1048576 1048576 24"),
        ("elsewhere.nhdr", "outside the data set", b"encoding: raw", b"encoding: raw\ndata file: ../../etc/passwd"),
        ("absolute.nhdr", "outside the data set", b"encoding: raw", b"encoding: raw\ndata file: /etc/passwd"),
        ("gone.nhdr", "missing", b"encoding: raw", b"encoding: raw\ndata file: gone.raw"),
        ("list.nhdr", "unreadable", b"encoding: raw", b"encoding: raw\ndata file: LIST"),
        ("late.nrrd", "unreadable", b"encoding: raw", b"#\n" * 2**15 + b"encoding: raw\ndata file: /etc/passwd"),
        ("inches.nrrd", "spacing", b"encoding: raw", b'encoding: raw\nspace units: "in" "in" "in"'),
        ("bzip2.nrrd", "unreadable", b"encoding: raw", b"encoding: bzip2"),
        ("backwards.nrrd", "unreadable", b"encoding: raw", b"encoding: raw\nbyte skip: -9"),
    ]:
        add_changed(nrrd, *case)
    mha, local = (folder / "cut_z.mha").read_bytes() + bytes(2**16), b"ElementDataFile = LOCAL"
    for case in [
        ("claim.mha", "truncated", b"CompressedDataSize = ", b"CompressedDataSize = 99999999"),
        ("elsewhere.mhd", "outside the data set", local, b"ElementDataFile = ../../etc/passwd"),
        ("twice.mhd", "outside the data set", local, b"elementdatafile = LOCAL\nElementDataFile = /etc/passwd"),
        ("colon.mhd", "unreadable", local, b"ElementDataFile : /etc/passwd"),
        ("many.mhd", "unreadable", local, b"ElementDataFile = slice%03d.raw 1 24 1"),
        ("huge.mha", "too large", b"DimSize = 36 32 24", b"DimSize = 1048576 1048576 24"),
        ("axes.mha", "unreadable", b"DimSize = 36 32 24", b"DimSize = 36 32"),
        ("unplaced.mha", "no orientation", b"TransformMatrix", b"Comment"),
    ]:
        add_changed(mha, *case)
    return cases


def test_each_broken_kind_has_its_reason(tmp_path):
    cases = broken_files(tmp_path)
    assert len(cases) > 50
    wrong = {}
    for case, (path, wanted) in cases.items():
        try:
            readers.read(path)
            wrong[case] = (wanted, "was read")
        except Rejected as reason:
            if reason.name != wanted:
                wrong[case] = (wanted, str(reason))
    assert not wrong


def reasons_in_little_memory(folder, names, spare_bytes):
    """What each file is rejected for, read in a process that may have only so much more memory than it starts with."""
    code = f"""
import resource
import numpy as np
from alice_jax.data import dicom, readers
from alice_jax.data.rejection import Rejected
np.linalg.det(np.eye(3) @ np.eye(3))  # the buffers of linear algebra are of one size, and large
now = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (now + {spare_bytes},) * 2)
for name in {list(names)!r}:
    path = {str(folder)!r} + "/" + name
    try:
        series, rejected = dicom.sort_series([path]) if name.endswith(".dcm") else ({{"": ()}}, [])
        for _, reason in rejected:
            raise reason
        for files in series.values():
            print("read", readers.read(path, files).hu_ijk.shape)
    except Rejected as reason:
        print(reason)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120)
    found = done.stdout.splitlines()
    assert len(found) == len(names), done.stderr
    assert not any("not enough memory" in line for line in found), found
    return {name: line.split(":")[0] for name, line in zip(names, found, strict=True)}


def test_a_header_that_claims_a_terabyte_costs_no_memory(tmp_path):
    """10240 cubed is 2^40; 256 MB would hold none of it."""
    nifti = patch(write_nifti(tmp_path / "a.nii", ct_like()), 42, struct.pack("<3h", 10240, 10240, 10240))
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nifti.read_bytes()))
    nib.save(nib.Nifti2Image(ct_like(), AFFINE), tmp_path / "two.nii")
    patch(tmp_path / "two.nii", 24, struct.pack("<3q", 2**20, 2**19, 2))
    for name, compress in [("a.nrrd", False), ("z.nrrd", True), ("a.mha", False), ("z.mha", True)]:
        sitk.WriteImage(itk_image(), str(tmp_path / name), compress)
        text = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(text.replace(b"36 32 24", b"10240 10240 10240"))
    names = ["a.nii", "a.nii.gz", "two.nii", "a.nrrd", "z.nrrd", "a.mha", "z.mha"]
    assert reasons_in_little_memory(tmp_path, names, 2**28) == dict.fromkeys(names, "too large")


def test_bombs_are_unpacked_in_bounded_memory(tmp_path):
    """64 MB of zeros in 64 KB, where 48 MB are to be had: as voxels, before, between and behind
    them; and elements of DICOM that announce 2 GB.
    """
    zeros = gzip.compress(bytes(2**26))
    hu = ct_like()
    head = write_nifti(tmp_path / "good.nii", hu).read_bytes()[:352]
    long = bytearray(head)
    long[348:352] = b"\1\0\0\0"  # an extension follows, of 2 GB if its size is believed
    extended = bytes(long) + struct.pack("<2i", 2**31 - 16, 6)
    voxels = hu.ravel(order="F").tobytes()
    as_voxels = bytearray(head)
    as_voxels[42:48], as_voxels[70:74] = struct.pack("<3h", 256, 256, 128), struct.pack("<2h", 64, 64)
    far = bytearray(extended)
    far[108:112] = struct.pack("<f", 2**29)
    for name, data in {
        "voxels": gzip.compress(bytes(as_voxels)) + zeros,
        "before": gzip.compress(bytes(far)) + zeros,
        "extension": gzip.compress(extended) + zeros,
        "behind": gzip.compress(head + voxels) + zeros,
    }.items():
        (tmp_path / f"{name}.nii.gz").write_bytes(data)
    sitk.WriteImage(sitk.Cast(itk_image(), sitk.sitkFloat64), str(tmp_path / "z.mha"), True)
    text = (tmp_path / "z.mha").read_bytes().split(b"LOCAL\n")[0].replace(b"36 32 24", b"256 256 128")
    (tmp_path / "z.mha").write_bytes(text + b"LOCAL\n" + zlib.compress(bytes(2**26)))
    syntax = struct.pack("<2H2sH", 2, 0x10, b"UI", 22) + b"1.2.840.10008.1.2.1.99"
    preamble = bytes(128) + b"DICM" + struct.pack("<2H2sHI", 2, 0, b"UL", 4, len(syntax)) + syntax
    private = zlib.compressobj(wbits=-15)
    packed = private.compress(struct.pack("<2H2sHI", 9, 0x10, b"OB", 0, 2**26) + bytes(2**26)) + private.flush()
    (tmp_path / "z.dcm").write_bytes(preamble + packed)
    (tmp_path / "meta.dcm").write_bytes(bytes(128) + b"DICM" + struct.pack("<2H2sHI", 2, 1, b"OB", 0, 2**31 - 2))
    table = struct.pack("<2H2sHI", 0x7FE0, 0x10, b"OB", 0, 2**32 - 1) + struct.pack("<2HI", 0xFFFE, 0xE000, 2**31)
    (tmp_path / "table.dcm").write_bytes(preamble.replace(b".2.1.99", b".2.4.70") + table)
    wanted = {
        "voxels.nii.gz": "not a CT intensity range",
        "before.nii.gz": "unreadable",
        "extension.nii.gz": "not a CT intensity range",
        "behind.nii.gz": "read (36, 32, 24)",
        "z.mha": "not a CT intensity range",
        "z.dcm": "unreadable",
        "meta.dcm": "truncated",
        "table.dcm": "truncated",
    }
    assert reasons_in_little_memory(tmp_path, wanted, 48 << 20) == wanted


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"skip": (7,)}, "uneven slices"),
        ({"skip": range(1, 24)}, "not a volume"),
        ({"0008_0060": "MR"}, "not a CT intensity range"),
        ({"0020_0032": "0\\0\\0"}, "singular affine"),
    ],
)
def test_broken_series(tmp_path, change, reason):
    assert reason_of(tmp_path, series=write_dicom(tmp_path / "s", itk_image(), **change)).name == reason


def test_a_series_without_rescale_or_orientation(tmp_path):
    paths = write_dicom(tmp_path / "raw", itk_image(ct_like() + np.int16(1100)), intercept=0)
    assert reason_of(tmp_path, series=paths).name == "stored with an offset"
    paths = write_dicom(tmp_path / "s", itk_image())
    for path in map(pathlib.Path, paths):  # the tag of the orientation becomes one that nobody knows
        path.write_bytes(path.read_bytes().replace(b"\x20\x00\x37\x00\x0e\x00", b"\x20\x00\x38\x00\x0e\x00"))
    assert reason_of(tmp_path, series=paths).name == "no orientation"


def test_a_cut_slice_and_files_that_are_no_images(tmp_path):
    paths = write_dicom(tmp_path / "s", itk_image())
    os.truncate(paths[5], 1500)
    note = tmp_path / "note.dcm"
    note.write_bytes(b"\0" * 128 + b"DICM" + b"nothing")
    series, rejected = dicom.sort_series([*paths, str(note)])
    assert list(series) == ["1.2.3"] and {os.path.basename(path) for path, _ in rejected} >= {"note.dcm"}
    assert reason_of(tmp_path, series=series["1.2.3"]).name in ("unreadable", "uneven slices")
