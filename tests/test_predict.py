"""Labels of whole files by a network whose answer is known: each voxel's class is a matter of its HU."""

import json
import subprocess
import sys

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from test_readers import AFFINE, ct_like, itk_image, write_dicom, write_nifti

from alice_jax import checkpoint, evaluate, predict
from alice_jax.contract import Contract
from alice_jax.data.store import FRAME
from alice_jax.errors import UserError
from alice_jax.inference import original
from alice_jax.tasks import segment

CLASSES = ("background", "soft", "bone")
SOFT_HU, BONE_HU = -500, 400


class Thresholds:
    """Stands for the network: `apply` takes windows scaled from -1000…1000 HU."""

    def apply(self, variables, windows, method):
        hu = 2000 * windows - 1000
        return (jnp.concatenate([SOFT_HU - hu, 0 * hu, hu - BONE_HU], axis=-1),)


def contract(spacing_mm=2.0, classes=CLASSES):
    return Contract(FRAME, (spacing_mm,) * 3, (-1000.0, 1000.0), (16, 16, 16), classes)


@pytest.fixture
def trained(monkeypatch):
    monkeypatch.setattr(segment, "load", lambda workdir, step: (Thresholds(), {}, contract()))


def run(tmp_path, *more):
    return predict.main(["--workdir", "run", "--input", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *more])


def expected(hu):
    return np.where(hu < SOFT_HU, 0, np.where(hu > BONE_HU, 2, 1))


def dice(a, b, code):
    return 2 * ((a == code) & (b == code)).sum() / ((a == code).sum() + (b == code).sum())


def smooth(shape=(48, 44, 26)):
    """A body with a bone, its noise taken away, that thresholds cut off where it ends."""
    hu = ct_like(shape).astype(int)
    return np.where(hu < -500, -1000, np.where(hu > 400, 900, np.where(hu < 0, -90, 45))).astype(np.int16)


def tilted(affine, degrees):
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ affine


def test_labels_lie_on_the_voxels_of_each_file(tmp_path, trained, capsys):
    hu = smooth()
    fine = np.diag([-0.9, -0.9, 2.5, 1.0])
    write_nifti(tmp_path / "in" / "lps_0000.nii.gz", hu, fine)
    as_ras = nib.as_closest_canonical(nib.Nifti1Image(hu, fine))
    turned = as_ras.as_reoriented(nib.orientations.axcodes2ornt(("S", "L", "A")))
    nib.save(turned, tmp_path / "in" / "sla.nii")
    write_nifti(tmp_path / "in" / "tilted.nii.gz", hu, tilted(fine, 15))
    assert run(tmp_path) == 0
    assert "3 scans, 0 of them done already" in capsys.readouterr().out
    found = {}
    for name, ending, least in (("lps", "_0000.nii.gz", 0.97), ("sla", ".nii", 0.97), ("tilted", ".nii.gz", 0.93)):
        image, labels = nib.load(tmp_path / "in" / (name + ending)), nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert labels.shape == image.shape and labels.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(labels.affine, image.affine)
        assert labels.header.get_xyzt_units()[0] == "mm"
        found[name] = np.asarray(labels.dataobj)
        want = expected(np.asarray(image.dataobj))
        assert dice(found[name], want, 1) > least, name
        assert dice(found[name], want, 2) > least - 0.1, name  # a thin bone
    back = nib.as_closest_canonical(nib.load(tmp_path / "out" / "sla.nii.gz"))
    there = nib.as_closest_canonical(nib.load(tmp_path / "out" / "lps.nii.gz"))
    np.testing.assert_array_equal(np.asarray(back.dataobj), np.asarray(there.dataobj))
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {
        "labels": {"background": 0, "soft": 1, "bone": 2}
    }


def test_a_file_on_the_networks_own_grid_gets_the_networks_own_labels(tmp_path, trained):
    hu = ct_like((36, 32, 24))
    write_nifti(tmp_path / "in" / "a.nii.gz", hu, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert run(tmp_path) == 0
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "out" / "a.nii.gz").dataobj), expected(hu))


def test_borders_lie_between_the_networks_voxels(tmp_path, trained):
    """A block that ends within a 2 mm voxel: its border is found to half a millimetre, from how grey the voxel is."""
    hu = np.full((120, 120, 60), -1000, np.int16)
    hu[20:101, 30:87] = 45
    hu[25:30, 35:40] = -90
    hu[0, 0, 0] = -1024
    write_nifti(tmp_path / "in" / "block.nii.gz", hu, np.diag([0.5, 0.5, 2.0, 1.0]))
    assert run(tmp_path) == 0
    labels = np.asarray(nib.load(tmp_path / "out" / "block.nii.gz").dataobj)[:, :, 30]
    along_i, along_j = np.flatnonzero(labels[:, 60]), np.flatnonzero(labels[60])
    assert abs(along_i[[0, -1]] - [20, 100]).max() <= 1 and abs(along_j[[0, -1]] - [30, 86]).max() <= 1


def test_running_again_does_what_is_left_and_a_bad_file_stops_nothing(tmp_path, trained, capsys):
    write_nifti(tmp_path / "in" / "a.nii.gz", ct_like())
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"not a scan")
    write_nifti(tmp_path / "in" / "c.nii.gz", ct_like(seed=1))
    assert run(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "labelled 2 scans" in printed and "1 could not be labelled" in printed and "b.nii.gz: unreadable" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "c.nii.gz", "labels.json"]
    write_nifti(tmp_path / "in" / "b.nii.gz", ct_like(seed=2))
    written = (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns
    assert run(tmp_path, "--overlay") == 0
    printed = capsys.readouterr().out
    assert "3 scans, 2 of them done already" in printed and "2 of those done have no picture," in printed
    assert (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns == written
    assert (tmp_path / "out" / "b.png").read_bytes().startswith(b"\x89PNG")
    assert run(tmp_path, "--overwrite", "--task-index", "0", "--task-count", "3") == 0
    assert (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns > written
    capsys.readouterr()
    assert run(tmp_path, "--overwrite", "--overlay") == 0 == run(tmp_path, "--overlay")
    assert "no picture" not in capsys.readouterr().out
    assert run(tmp_path) == 0 and "; " not in capsys.readouterr().out.splitlines()[-1]


def test_dicom_folders_and_evaluation(tmp_path, trained, capsys):
    write_dicom(tmp_path / "in" / "case", itk_image())
    assert run(tmp_path) == 0
    predicted = nib.load(tmp_path / "out" / "case.nii.gz")
    (tmp_path / "truth").mkdir()
    nib.save(predicted, tmp_path / "truth" / "case.nii.gz")
    folders = ["--predictions", str(tmp_path / "out"), "--truth", str(tmp_path / "truth")]
    assert evaluate.main(["--task", "segmentation", *folders]) == 0
    assert "soft" in (printed := capsys.readouterr().out) and "1.000" in printed


def test_many_classes_take_two_bytes_a_voxel():
    assert (original.label_dtype(256), original.label_dtype(257)) == (np.uint8, np.uint16)


def other_classes(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "labels.json").write_text('{"labels": {"liver": 1}}')


def nothing(tmp_path, monkeypatch):
    (tmp_path / "in" / "a.nii.gz").unlink()


def a_file(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("")


def never_mirrored(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "read_config", lambda workdir: {"augmentation": {"flip_axes": []}})


@pytest.mark.parametrize(
    "change, more, message",
    [
        (other_classes, (), "out: has labels of other classes .*; name another folder"),
        (nothing, (), "--input .*in: no scan in it"),
        (a_file, (), "--out .*out: "),
        (never_mirrored, ("--mirror",), "--mirror: this run never saw mirrored crops"),
        (None, ("--overlap", "1"), "--overlap 1.0: give a share"),
        (None, ("--batch", "-1"), "--batch -1: give a whole number"),
        (None, ("--task-index", "2"), "--task-index 2: give 0 to 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, trained, monkeypatch, change, more, message):
    write_nifti(tmp_path / "in" / "a.nii.gz", ct_like(), AFFINE)
    if change:
        change(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, *more)
    assert "\n" not in str(caught.value)


def test_a_missing_run_is_one_line_of_the_command(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii.gz", ct_like())
    command = [sys.executable, "-m", "alice_jax.predict", "--workdir", str(tmp_path / "none")]
    done = subprocess.run(
        [*command, "--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")],
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 1 and done.stdout.startswith("1 scans, 0 of them done already")
    assert done.stderr.startswith("error: --workdir") and done.stderr.count("\n") == 1
