"""Damaged files of every format are read or rejected: no other exception, no hang, no unbounded memory."""

import gzip
import os
import pathlib
import re
import resource
import signal

import hypothesis
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import strategies as st
from test_readers import ct_like, itk_image, write_dicom

from alice_jax.data import dicom
from alice_jax.data.preparing import prepare_scan
from alice_jax.data.rejection import REMEDIES, Rejected

SPACING = np.diag([3.0, 3.0, 3.0, 1.0])  # 16 voxels and more on each axis once they are 2 mm
WORDS = [b"\0", b"\xff\x7f", b"\0\x80", b"\xff\xff\xff\x7f", b"\xff" * 4, b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff" * 8]
NUMBERS = [b"0", b"-1", b"99999", b"4294967297", b"1e30", b"nan", b"-", b"9" * 400]
HEAD = 1000  # most damage is done to headers, where it matters


@st.composite
def damages(draw) -> list:
    """Up to five edits, each (kind, place as a fraction, what to put there)."""
    place = st.floats(0, 1, exclude_max=True)
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("byte"), place, st.binary(min_size=1, max_size=1)),
                st.tuples(st.just("word"), place, st.sampled_from(WORDS)),
                st.tuples(st.just("number"), place, st.sampled_from(NUMBERS)),
                st.tuples(st.just("delete"), place, st.integers(1, 60)),
                st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=60)),
                st.tuples(st.just("cut"), place, st.none()),
            ),
            max_size=5,
        )
    )


def damaged(data: bytes, edits: list) -> bytes:
    raw = bytearray(data)
    for kind, place, what in edits:
        at = int(place * min(len(raw), HEAD))
        if kind in ("byte", "word"):
            raw[at : at + len(what)] = what
        elif kind == "number":  # of the text, the next one
            found = re.compile(rb"\d+").search(raw, at)
            raw[slice(*found.span()) if found else slice(at, at)] = what
        elif kind == "delete":
            del raw[at : at + what]
        elif kind == "insert":
            raw[at:at] = what
        else:
            del raw[int(place * len(raw)) :]
    return bytes(raw)


def good_file(folder: pathlib.Path, kind: str) -> pathlib.Path:
    hu = ct_like((14, 13, 12))
    path = folder / f"a.{kind.removeprefix('2.').removesuffix('+z')}"
    if kind.startswith("dcm"):
        image = itk_image(hu[:, :, ::2], SPACING @ np.diag([1, 1, 2, 1]))  # fewer files
        return pathlib.Path(write_dicom(folder / "series", image, compress=kind.endswith("+z"))[1])
    if "nii" in kind or kind == "hdr":
        image = {"hdr": nib.Nifti1Pair, "2.nii": nib.Nifti2Image}.get(kind, nib.Nifti1Image)(hu, SPACING)
        image.to_filename(path)
    else:
        sitk.WriteImage(itk_image(hu, SPACING), str(path), kind.endswith("+z"))
    return path


@pytest.fixture
def bounds():
    """A quarter of a GB more memory than now, and half a minute for each file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    now = int(pathlib.Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()

    def hangs(*_):
        raise TimeoutError("half a minute for a small file")

    handler = signal.signal(signal.SIGALRM, hangs)
    resource.setrlimit(resource.RLIMIT_DATA, (now + 2**28, hard))
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    signal.signal(signal.SIGALRM, handler)


def read_or_reject(path: pathlib.Path) -> list[Rejected]:
    """The reasons of what was rejected, nothing else having been raised."""
    signal.alarm(30)
    if path.suffix == ".dcm":
        series, rejected = dicom.sort_series(sorted(str(file) for file in path.parent.iterdir()))
        reasons = [reason for _, reason in rejected]
    else:
        series, reasons = {"": ()}, []
    for files in series.values():
        try:
            scan, volume, body = prepare_scan(path, series=files)
            assert volume.dtype == np.int16 and volume.shape == scan.shape_zyx and body.any()
            assert np.isfinite(scan.affine_lps).all()
        except Rejected as reason:
            reasons.append(reason)
    for reason in reasons:
        assert reason.name in REMEDIES and "\n" not in str(reason)
        assert "memory" not in str(reason) and "alloc" not in str(reason)  # it was refused before any was asked for
    return reasons


KINDS = ["nii", "nii.gz", "2.nii", "hdr", "nrrd", "nrrd+z", "nhdr", "mha", "mha+z", "mhd", "dcm", "dcm+z"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("examples", [100, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_rejected(tmp_path, bounds, kind, examples):
    path = good_file(tmp_path, kind)
    good = path.read_bytes()
    assert not read_or_reject(path)

    @hypothesis.settings(max_examples=examples, deadline=None, database=None)
    @hypothesis.given(edits=damages(), inside=st.booleans())
    def check(edits, inside):
        if kind == "nii.gz" and inside:  # what is packed is damaged, and packed again
            path.write_bytes(gzip.compress(damaged(gzip.decompress(good), edits), 1))
        else:
            path.write_bytes(damaged(good, edits))
        read_or_reject(path)

    check()


@pytest.mark.parametrize("kind", ["img", "raw"])
def test_a_companion_that_is_cut_or_a_pipe(tmp_path, kind, bounds):
    """The file of the voxels beside a header: what it lacks is noticed, and a pipe is not waited for."""
    path = good_file(tmp_path, {"img": "hdr", "raw": "mhd"}[kind])
    companion = path.with_suffix(f".{kind}")
    os.truncate(companion, companion.stat().st_size - 1)
    with pytest.raises(Rejected, match=r"^truncated"):
        prepare_scan(path)
    companion.unlink()
    os.mkfifo(companion)
    with pytest.raises(Rejected, match=r"^(truncated|missing)"):
        prepare_scan(path)
