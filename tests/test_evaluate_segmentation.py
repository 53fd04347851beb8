"""Dice, HD95 and NSD of masks whose scores a person can work out; folders, means and mistakes around them."""

import csv
import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from alice_jax import evaluate
from alice_jax.errors import UserError
from alice_jax.evaluation import averages
from alice_jax.evaluation.averages import Row
from alice_jax.evaluation.surfaces import Scores, score

SHAPE = (12, 14, 16)
AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])


def box(low, high):
    mask = np.zeros(SHAPE, bool)
    mask[tuple(map(slice, low, high))] = True
    return mask


# -------------------------------------------------------------------- one mask


def test_a_mask_moved_by_two_voxels():
    truth, moved = box((2, 2, 2), (7, 7, 7)), box((2, 2, 4), (7, 7, 9))
    scores = score(truth, moved, (1, 1, 1), 2.0)
    assert scores == Scores(dice=2 * 75 / 250, hd95_mm=2.0, nsd=1.0)
    # With 3 mm between slices the two ends lie 6 mm apart; most of the four sides lies where it was.
    farther = score(truth, moved, (1, 1, 3), 2.0)
    assert farther.dice == scores.dice and farther.hd95_mm == 6.0 and 0 < farther.nsd < 1
    assert score(truth, moved, (1, 1, 3), 6.0).nsd == 1.0


def test_two_single_voxels_are_scored_by_their_distance():
    truth, predicted = box((2, 2, 2), (3, 3, 3)), box((2, 2, 12), (3, 3, 13))
    # The elements of a voxel lie on its eight corners: the nearest two are 9 apart, the farthest two 10.
    assert score(truth, predicted, (1, 1, 1), 8.9) == Scores(0.0, 10.0, 0.0)
    assert score(truth, predicted, (1, 1, 1), 9.0).nsd == 0.5
    assert score(truth, predicted, (1, 1, 1), 10.0).nsd == 1.0


def test_the_percentile_passes_over_a_few_far_elements():
    truth = box((1, 1, 1), (11, 13, 9))
    speck = truth | box((5, 5, 14), (6, 6, 15))
    scores = score(truth, speck, (1, 1, 1), 1.0)
    assert scores.hd95_mm == 0.0 and 0.98 < scores.nsd < 1 and scores.dice == 2 * 960 / (960 + 961)


def test_empty_masks():
    full, empty = box((2, 2, 2), (5, 5, 5)), np.zeros(SHAPE, bool)
    diagonal = np.sqrt(12**2 + 14**2 + (3 * 16) ** 2)
    for truth, predicted in ((full, empty), (empty, full)):
        assert score(truth, predicted, (1, 1, 3), 2.0) == Scores(0.0, pytest.approx(diagonal), 0.0)
    assert all(np.isnan(value) for value in vars(score(empty, empty, (1, 1, 3), 2.0)).values())


# -------------------------------------------------------------------- many


def rows_of(values):
    """{case: {class: Dice}}"""
    return [
        Row(case, name, 1, 1, Scores(dice, 1.0, dice))
        for case, of_case in values.items()
        for name, dice in of_case.items()
    ]


def test_what_is_not_defined_is_left_out_of_means():
    rows = rows_of({"a": {"liver": 0.8, "spleen": np.nan}, "b": {"liver": 0.6, "spleen": 0.2}})
    table = averages.summaries(rows, 0)
    assert list(table) == ["liver", "spleen", "all"]
    assert (table["spleen"]["dice"]["cases"], table["spleen"]["dice"]["mean"]) == (1, 0.2)
    assert table["all"]["dice"]["mean"] == pytest.approx((0.8 + (0.6 + 0.2) / 2) / 2)
    assert np.isnan(table["spleen"]["dice"]["low"])  # of one case


def test_paired_interval_sees_a_difference_that_lies_within_the_spread():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.3, 0.9, 20)
    better = {f"c{i}": {"liver": value + 0.02 + 0.005 * rng.normal()} for i, value in enumerate(base)}
    worse = {f"c{i}": {"liver": value} for i, value in enumerate(base)}
    found = averages.differences(rows_of(better), rows_of(worse), 0)["all"]["dice"]
    assert found["cases"] == 20 and 0.01 < found["low"] < found["mean"] < found["high"] < 0.03
    alone = averages.summaries(rows_of(better), 0)["all"]["dice"]
    assert alone["high"] - alone["low"] > 0.1
    assert averages.differences(rows_of(better), rows_of(worse), 0)["all"]["dice"] == found  # the seed decides


# -------------------------------------------------------------------- folders


def write(folder, case, codes, affine=AFFINE, ending=".nii.gz"):
    folder.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(codes.astype(np.uint8), affine), folder / f"{case}{ending}")


def names(path, **labels):
    path.write_text(json.dumps({"labels": labels}))


@pytest.fixture
def folders(tmp_path):
    """Truth with liver 1 and spleen 2; predictions with their numbers the other way round, the spleen missed in b."""
    (tmp_path / "data").mkdir()
    truth, predicted, worse = tmp_path / "data" / "labelsTr", tmp_path / "predicted", tmp_path / "worse"
    liver, spleen = box((2, 2, 2), (7, 7, 7)), box((8, 8, 8), (11, 11, 11))
    for case in "abc":
        write(truth, case, 1 * liver + 2 * spleen)
        write(predicted, case, 2 * liver + 1 * spleen * (case != "b"))
        write(worse, case, 2 * np.roll(liver, 1, 0) + 1 * spleen)
    names(tmp_path / "data" / "dataset.json", background=0, liver=1, spleen=2)
    for folder in (predicted, worse):
        names(folder / "labels.json", background=0, liver=2, spleen=1)
    return {"--truth": truth, "--predictions": predicted, "--against": worse}


def run(folders, *more):
    arguments = [str(word) for flag, folder in folders.items() for word in (flag, folder)]
    return evaluate.main(["--task", "segmentation", *arguments, *more])


def test_command_compares_classes_by_name_and_runs_by_case(folders, tmp_path, capsys):
    out = tmp_path / "scores"
    assert run(folders, "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert "6 masks: 1 missed and 0 invented" in printed and "minus" in printed
    cases = list(csv.DictReader((out / "cases.csv").open()))
    assert len(cases) == 12 and {row["run"] for row in cases} == {"predictions", "against"}
    missed = next(r for r in cases if (r["run"], r["case"], r["class"]) == ("predictions", "b", "spleen"))
    assert (missed["dice"], missed["truth_voxels"], missed["predicted_voxels"]) == ("0", "27", "0")
    classes = {row["class"]: row for row in csv.DictReader((out / "classes.csv").open())}
    assert float(classes["liver"]["dice_mean"]) == 1.0 and float(classes["spleen"]["dice_mean"]) == pytest.approx(2 / 3)
    worse = {row["class"]: row for row in csv.DictReader((out / "classes_against.csv").open())}
    assert float(worse["liver"]["dice_mean"]) == pytest.approx(0.8) and float(worse["spleen"]["dice_mean"]) == 1.0
    differences = {row["class"]: row for row in csv.DictReader((out / "differences.csv").open())}
    assert float(differences["liver"]["dice_mean"]) == pytest.approx(0.2) == float(differences["liver"]["dice_low"])
    assert float(differences["spleen"]["dice_mean"]) == pytest.approx(-1 / 3, abs=1e-5)


def test_files_without_names_are_compared_by_number(tmp_path, capsys):
    for name in ("truth", "predicted"):
        write(tmp_path / name, "a_0000", 3 * box((2, 2, 2), (7, 7, 7)))
    assert run({"--truth": tmp_path / "truth", "--predictions": tmp_path / "predicted"}) == 0
    assert "label 3" in capsys.readouterr().out


def test_a_dataset_json_beside_predictions_names_their_numbers_alone(folders, capsys):
    """nnU-Net copies that of its training data into the folder of its predictions."""
    (folders["--predictions"] / "labels.json").unlink()
    about = {"channel_names": {"0": "CT"}, "numTraining": 40, "labels": {"background": 0, "liver": 2, "spleen": 1}}
    (folders["--predictions"] / "dataset.json").write_text(json.dumps(about))
    assert run({flag: folders[flag] for flag in ("--truth", "--predictions")}) == 0
    assert "6 masks: 1 missed and 0 invented" in capsys.readouterr().out


def missing(folders):
    (folders["--predictions"] / "b.nii.gz").unlink()


def other_shape(folders):
    write(folders["--predictions"], "b", np.zeros((12, 14, 15)))


def other_affine(folders):
    moved = AFFINE.copy()
    moved[0, 3] = 4
    write(folders["--predictions"], "b", np.zeros(SHAPE), moved)


def other_spacing(folders):
    """9 µm a voxel."""
    for flag, spacing in (("--predictions", 1.009), ("--truth", 1.0)):
        write(folders[flag], "b", np.zeros((101, 4, 4)), np.diag([spacing, 1, 1, 1]))


def unknown_label(folders):
    write(folders["--predictions"], "b", 7 * box((2, 2, 2), (5, 5, 5)))


def other_classes(folders):
    names(folders["--predictions"] / "labels.json", background=0, kidney=2, spleen=1)


def empty(folders):
    for file in folders["--truth"].iterdir():
        file.unlink()


def two_of_a_case(folders):
    write(folders["--truth"], "b_0000", np.zeros(SHAPE), ending=".nii")


def no_labels(folders):
    write(folders["--predictions"], "b", np.zeros(SHAPE))
    image = nib.Nifti1Image(np.full(SHAPE, 0.5, np.float32), AFFINE)
    nib.save(image, folders["--predictions"] / "b.nii.gz")


@pytest.mark.parametrize(
    "change, message",
    [
        (missing, "--predictions: has no file for case b; add it, or name the cases to judge by --only"),
        (other_shape, r"b.nii.gz and .*b.nii.gz: have \(12, 14, 15\) and \(12, 14, 16\) voxels"),
        (other_affine, "b.nii.gz and .*b.nii.gz: have a corner 4.0 voxels apart; predict"),
        (other_spacing, "b.nii.gz and .*b.nii.gz: have a corner 0.9 voxels apart; predict"),
        (unknown_label, "b.nii.gz: has the label 7, which has no name"),
        (other_classes, "the predictions have no class 'liver', but kidney, spleen; choose what to judge by --names"),
        (empty, "labelsTr: is no folder of label files"),
        (two_of_a_case, "labelsTr/b.nii.gz and .*labelsTr/b_0000.nii: are both of case b; keep one of them"),
        (no_labels, "b.nii.gz: labels: it is no label map"),
    ],
)
def test_mistakes_are_one_line(folders, change, message):
    change(folders)
    with pytest.raises(UserError, match=message) as caught:
        run(folders)
    assert "\n" not in str(caught.value)
    if change in (missing, other_shape):
        assert run(folders, "--only", "a", "c") == 0
    if change is other_classes:
        assert run({name: folders[name] for name in ("--truth", "--predictions")}, "--names", "spleen") == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (("--seed", "-1"), "--seed -1: give a whole number of 0 or more"),
        (("--tolerance", "-1"), "--tolerance -1.0: give millimetres, 0 or more"),
    ],
)
def test_flags_out_of_range_are_named(folders, change, message):
    with pytest.raises(UserError, match=message):
        run(folders, *change)


def test_an_error_amid_the_cases_has_the_last_line_for_itself(folders):
    other_shape(folders)
    command = [sys.executable, "-m", "alice_jax.evaluate", "--task", "segmentation"]
    command += [str(word) for pair in folders.items() for word in pair]
    done = subprocess.run(command, capture_output=True)
    *bar, error, end = done.stderr.split(b"\n")
    assert done.returncode == 1 and bar and b" 1/3 " in bar[-1]
    assert error.startswith(b"error: ") and b"\r" not in error and not end
