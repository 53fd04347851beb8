"""The command: each file ends as a scan or with a reason, in one frame, and running again continues."""

import os
import pathlib
import shutil

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from prepare_command import ids, reasons, report_of, run
from test_bad_files import broken_files
from test_readers import AFFINE, ct_like, itk_image, write_dicom, write_nifti

from alice_jax import prepare as command
from alice_jax.data import sources
from alice_jax.data.files import Files
from alice_jax.data.preparing import Outcome, prepare_scan
from alice_jax.data.rejection import REMEDIES
from alice_jax.data.store import Store
from alice_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("in_this_process")

# ---------------------------------------------------------------- frames


def landmark_volume(shape=(60, 56, 50)):
    """A CT-like volume on 1.5 mm LPS voxels (x, y, z) with a bright ball left, in front and high."""
    hu = ct_like(shape)
    x, y, z = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    point_xyz_vox = np.array([40, 18, 36])
    distance = np.sqrt((x - 40) ** 2 + (y - 18) ** 2 + (z - 36) ** 2)
    hu = np.where(distance < 9, 200 + 900 * np.exp(-((distance / 3) ** 2)), hu).astype(np.int16)
    affine_lps = np.diag([1.5, 1.5, 1.5, 1.0])
    affine_lps[:3, 3] = -40, -30, 7
    return nib.Nifti1Image(hu, np.diag([-1.0, -1, 1, 1]) @ affine_lps), point_xyz_vox


def brightest(volume):
    """Centre of the ball (z, y, x), to a fraction of a voxel."""
    weights = np.where(volume > 780, volume, 0).astype(float)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in volume.shape], indexing="ij"))
    return (grid * weights).sum((1, 2, 3)) / weights.sum()


def test_the_same_point_in_four_orientations_and_spacings(tmp_path):
    lps, point_xyz_vox = landmark_volume()
    world = (lps.affine @ [*point_xyz_vox, 1])[:3] * [-1, -1, 1]
    cases = {}
    for codes, step in [("RAS", 1), ("LPI", 1), ("PSR", 1), ("ASL", 1), ("LAS", (1, 1, 2)), ("SPL", 2)]:
        ornt = nib.orientations.ornt_transform(
            nib.io_orientation(lps.affine), nib.orientations.axcodes2ornt(tuple(codes))
        )
        image = lps.as_reoriented(ornt)
        # Thinned out: other spacings, the same world.
        step = (step,) * 3 if isinstance(step, int) else step
        scale = np.diag([*step, 1.0])
        thinned = np.asarray(image.dataobj)[:: step[0], :: step[1], :: step[2]]
        path = write_nifti(tmp_path / "in" / f"{codes}{step[2]}.nii.gz", thinned, image.affine @ scale)
        cases[sources.slug(path.name.removesuffix(".nii.gz"))] = (path, np.linalg.inv(image.affine @ scale))
    code, report = report_of(tmp_path, tmp_path / "in")
    store = Store.open(tmp_path / "store")
    # The first four are the same scan turned: one is kept, three are duplicates of it by content.
    assert code == 0 and reasons(report) == {f"{c}1.nii.gz": "duplicate" for c in ("LPI", "PSR", "RAS")}
    assert sorted(ids(report)) == ["ASL1", "LAS2", "SPL2"]
    for id in ids(report):
        point = brightest(store.read_volume(id))
        spacing = np.linalg.norm(np.linalg.inv(cases[id][1])[:3, :3], axis=0)
        np.testing.assert_allclose(store.to_world(id, point[None])[0], world, atol=0.5 * max(2.0, *spacing))
        ijk = store.to_original_ijk(id, store.from_world(id, world[None]))[0]
        np.testing.assert_allclose(ijk, (cases[id][1] @ [*(world * [-1, -1, 1]), 1])[:3], atol=1e-4)
        assert np.abs(store.to_original_ijk(id, point[None])[0] - ijk).max() < 0.5
    # Left, front and top, as the file says.
    shape = np.array(store.scan("ASL1").shape_zyx)
    relative = brightest(store.read_volume("ASL1")) / (shape - 1)
    assert relative[0] > 0.6 and relative[1] < 0.4 and relative[2] > 0.6


@pytest.mark.parametrize("codes", ["RAS", "LPI", "PSR", "ASL"])
def test_each_orientation_alone_gives_the_same_stored_volume(tmp_path, codes):
    lps, _ = landmark_volume()
    ornt = nib.orientations.ornt_transform(nib.io_orientation(lps.affine), nib.orientations.axcodes2ornt(tuple(codes)))
    nib.save(lps.as_reoriented(ornt), tmp_path / "a.nii.gz")
    nib.save(lps, tmp_path / "b.nii")
    (scan, volume, body), (wanted, same, body_too) = (prepare_scan(tmp_path / name) for name in ("a.nii.gz", "b.nii"))
    np.testing.assert_array_equal(volume, same)
    np.testing.assert_array_equal(body, body_too)
    np.testing.assert_allclose(scan.affine_lps, wanted.affine_lps, atol=1e-5)
    assert scan.sha256 == wanted.sha256 and scan.original["axcodes"] == codes


def test_all_formats_give_the_same_scan(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", ct_like())
    for name in ("a.mha", "a.mhd", "a.nrrd"):
        sitk.WriteImage(itk_image(), str(tmp_path / name))
    write_dicom(tmp_path / "series", itk_image())
    scans = [prepare_scan(tmp_path / name)[0] for name in ("a.nii.gz", "a.mha", "a.mhd", "a.nrrd")]
    scans.append(prepare_scan(tmp_path / "series")[0])
    assert len({scan.sha256 for scan in scans}) == 1
    other = prepare_scan(write_nifti(tmp_path / "b.nii.gz", ct_like(), AFFINE + np.diag([0, 0, 0.5, 0])))[0]
    assert other.sha256 != scans[0].sha256  # the same voxels in another place are another scan


def test_spacing_and_sizes(tmp_path):
    write_nifti(tmp_path / "thick.nii.gz", ct_like((40, 40, 12)), np.diag([1, 1, 8.0, 1]))
    code, report = report_of(tmp_path, tmp_path / "thick.nii.gz", "--spacing", "3")
    assert code == 1 and reasons(report) == {"thick.nii.gz": "too small"}
    code, report = report_of(tmp_path, tmp_path / "thick.nii.gz", store="two")
    assert code == 0 and report["prepared"][0]["shape_zyx"] == [48, 20, 20]
    assert report["prepared"][0]["spacing_zyx_mm"] == [2.0, 2.0, 2.0]


# ---------------------------------------------------------------- outcomes


def test_every_broken_file_has_its_reason_and_the_others_are_prepared(tmp_path):
    cases = broken_files(tmp_path / "in")
    code, report = report_of(tmp_path, tmp_path / "in")
    wanted = {path.name: reason for path, reason in cases.values() if path.suffix != ".png"}
    assert code == 0 and ids(report) == ["good"] and reasons(report) == wanted


def test_names_cannot_write_on_the_terminal(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "two\nlines \x1b[31mred.nii.gz").write_bytes(b"")
    os.symlink("no\nwhere\x1b[31m", tmp_path / "in" / "link.nii")
    report_of(tmp_path, tmp_path / "in")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and r"two\nlines \x1b[31mred.nii.gz: the file is empty" in printed


def test_duplicates_by_content(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii.gz", ct_like())
    write_nifti(tmp_path / "in" / "b.nii", ct_like().astype(np.float32))
    code, report = report_of(tmp_path, tmp_path / "in")
    assert code == 0 and ids(report) == ["a"] and reasons(report) == {"b.nii": "duplicate"}
    assert "scan a" in report["quarantined"][0]["reason"]
    assert Store.open(tmp_path / "store").ids() == ["a"]
    again = report_of(tmp_path, tmp_path / "in")
    assert again == (code, report)
    assert report_of(tmp_path, tmp_path / "in", "--strict")[0] == 1


def test_tasks_share_the_files_and_the_whole_command_drops_what_two_have(tmp_path, monkeypatch):
    for seed, folder in ((0, "a"), (1, "b"), (2, "c"), (0, "d")):
        write_nifti(tmp_path / "in" / folder / "ct.nii.gz", ct_like(seed=seed))
    sequential = command._run
    with monkeypatch.context() as patch:  # tasks that run at once do not see what the others have prepared
        patch.setattr(command, "_run", lambda store, jobs, known, workers: sequential(store, jobs, {}, workers))
        shares = [
            ids(report_of(tmp_path, tmp_path / "in", "--task-index", index, "--task-count", 2)[1]) for index in (1, 0)
        ]
    whole = report_of(tmp_path, tmp_path / "in", store="whole")[1]
    assert ids(whole) == [shares[1][0], shares[0][0], shares[1][1]]  # a, b, c: ids do not depend on tasks
    assert Store.open(tmp_path / "store").ids() == sorted([*shares[0], *shares[1]])
    assert report_of(tmp_path, tmp_path / "in")[1] == whole
    assert Store.open(tmp_path / "store").ids() == sorted(ids(whole))
    assert run("--input", tmp_path / "in", "--store", tmp_path / "store", "--task-index", 8, "--task-count", 9) == 0


def test_exit_codes(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert report_of(tmp_path, tmp_path / "in")[0] == 1
    assert "nothing was prepared; no scan was found in --input" in capsys.readouterr().err
    (tmp_path / "in" / "a.nii.gz").write_bytes(b"")
    assert report_of(tmp_path, tmp_path / "in")[0] == 1
    assert "nothing was prepared; see the reasons above" in capsys.readouterr().err
    write_nifti(tmp_path / "in" / "b.nii.gz", ct_like())
    assert report_of(tmp_path, tmp_path / "in")[0] == 0
    assert report_of(tmp_path, tmp_path / "in", "--strict")[0] == 1


def test_running_again_continues_and_takes_up_changes(tmp_path, monkeypatch):
    for seed, name in enumerate("abc"):
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", ct_like(seed=seed))
    real, read = command.prepare_source, []
    from alice_jax.data import readers

    actual = readers.read
    monkeypatch.setattr(readers, "read", lambda path, series=(): (read.append(os.path.basename(path)), actual(path))[1])

    def interrupted(store, jobs, known, workers):
        for index, job in enumerate(jobs[:2]):
            yield index, real(store, job, known)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            report_of(tmp_path, tmp_path / "in")
    assert Store.open(tmp_path / "store").ids() == ["a", "b"]
    read.clear()
    code, report = report_of(tmp_path, tmp_path / "in")
    assert code == 0 and ids(report) == ["a", "b", "c"] and read == ["c.nii.gz"]
    before = report["prepared"][1]["sha256"]
    write_nifti(tmp_path / "in" / "b.nii.gz", ct_like(seed=9))
    read.clear()
    code, report = report_of(tmp_path, tmp_path / "in")
    assert read == ["b.nii.gz"] and ids(report) == ["a", "b", "c"] and report["prepared"][1]["sha256"] != before
    # A scan whose data vanished from the store, and a folder that moved.
    shutil.rmtree(tmp_path / "store" / "scans" / "c" / "volume" / "c")
    (tmp_path / "in").rename(tmp_path / "moved")
    code, report = report_of(tmp_path, tmp_path / "moved")
    assert code == 0 and ids(report) == ["a", "b", "c"] and not report["quarantined"]
    assert Store.open(tmp_path / "store").ids() == ["a", "b", "c"]
    assert Store.open(tmp_path / "store").read_volume("c").any()


def test_descriptions_of_scans_are_read_many_at_once(tmp_path, monkeypatch):
    for seed in range(3):
        write_nifti(tmp_path / "in" / f"{seed}.nii.gz", ct_like(seed=seed))
    assert report_of(tmp_path, tmp_path / "in")[0] == 0
    counts, read_jsons = [], Files.read_jsons

    def all_kept(store, jobs, *_):
        return ((index, [Outcome(job.path, job.id, kept=True)]) for index, job in enumerate(jobs))

    def counted(self, files):
        counts.append(sum(key.endswith("scan.json") for key in files))
        return read_jsons(self, files)

    monkeypatch.setattr(command, "_run", all_kept)
    monkeypatch.setattr(Files, "read_jsons", counted)
    assert len(report_of(tmp_path, tmp_path / "in")[1]["prepared"]) == 3
    assert [count for count in counts if count] == [3, 3]  # before and after the work


def test_two_inputs_into_one_store(tmp_path):
    write_nifti(tmp_path / "one" / "a.nii.gz", ct_like(seed=1))
    write_nifti(tmp_path / "two" / "a.nii.gz", ct_like(seed=2))
    write_nifti(tmp_path / "two" / "copy.nii.gz", ct_like(seed=1))
    first = report_of(tmp_path, tmp_path / "one")[1]
    second = report_of(tmp_path, tmp_path / "two")[1]
    assert ids(first) == ["a"] and ids(second)[0].startswith("a-") and reasons(second) == {"copy.nii.gz": "duplicate"}
    assert len(Store.open(tmp_path / "store").ids()) == 2
    assert report_of(tmp_path, tmp_path / "two")[1] == second


def test_several_series_in_a_folder(tmp_path):
    write_dicom(tmp_path / "in" / "p", itk_image(), uid="1.1")
    for k, path in enumerate(write_dicom(tmp_path / "t", itk_image(ct_like(seed=1)), uid="1.2", **{"0008_0060": "MR"})):
        os.rename(path, tmp_path / "in" / "p" / f"mr{k}.dcm")
    for k, path in enumerate(write_dicom(tmp_path / "t", itk_image(ct_like(seed=2)), uid="1.3")):
        os.rename(path, tmp_path / "in" / "p" / f"late{k}")  # no ending: recognised by its content
    code, report = report_of(tmp_path, tmp_path / "in")
    assert code == 0 and [e["file"].split("#")[1] for e in report["prepared"]] == ["1.1", "1.3"]
    assert reasons(report) == {"p#1.2": "not a CT intensity range"}
    assert report_of(tmp_path, tmp_path / "in") == (code, report)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--input", "nowhere"], "--input nowhere: there is no such"),
        (["--input", "in", "--spacing", "0"], "--spacing 0: give millimetres"),
        (["--input", "in", "--spacing", "nan"], "--spacing nan: give millimetres"),
        (["--input", "in", "--spacing", "two"], "invalid float value: 'two'; see --help"),
        (["--input", "in", "--workers", "0"], "--workers 0: give at least 1"),
        (
            ["--input", "in", "--task-index", "2", "--task-count", "2"],
            "--task-index 2: give 0 to 1 with --task-count 2",
        ),
        (["--input", "in", "--json", "no/where.json"], "--json no/where.json: its folder does not exist"),
        (["--input", "in", "--store", "file"], "file: is a file; name a folder"),
        (["--input", "in", "--store", "in"], "holds other files and no store"),
        (["--input", "noise"], "neither a scan of a known format nor a text file"),
        (["--input", "in", "--strange"], "unrecognized arguments: --strange"),
        ([], "the following arguments are required: --input"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    write_nifti(tmp_path / "in" / "a.nii.gz", ct_like())
    (tmp_path / "file").write_text("x")
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    with pytest.raises(UserError) as caught:
        run(*args, *([] if "--store" in args else ["--store", "store"]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_guide_explains_every_reason():
    guide = (pathlib.Path(__file__).parent.parent / "docs" / "prepare.md").read_text(encoding="utf-8")
    for name in REMEDIES:
        assert f"| {name} |" in guide


def test_another_spacing_needs_another_store(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", ct_like())
    assert report_of(tmp_path, tmp_path / "a.nii.gz")[0] == 0
    with pytest.raises(UserError, match="spacing_zyx_mm"):
        run("--input", tmp_path / "a.nii.gz", "--store", tmp_path / "store", "--spacing", "3")
