"""Errors of matching where the truth is known: phantoms, marked points, organ labels."""

import json

import nibabel as nib
import numpy as np
import pytest
from test_matching import add_scan, make_codec, make_store, random_vectors

from alice_jax import evaluate
from alice_jax.data import embeddings, landmarks, phantom
from alice_jax.errors import UserError


def perfectly_embedded(path, seeds):
    """Patients whose vectors are a smooth random function of the true anatomical place."""
    store = phantom.write_cohort(path, seeds)
    noise = embeddings.normalise(np.random.default_rng(0).normal(size=(500, 16)))
    strides = (4, 4, 4), (8, 16, 16)
    codec = embeddings.Codec("a" * 64, (2.0, 2.0, 2.0), *(embeddings.fit_level([noise], s, 16) for s in strides))
    codec.save(store)
    directions = np.random.default_rng(0).normal(size=(3, 16)) / 30.0
    for id in store.ids():
        patient = phantom.patient_of(store.scan(id))
        vectors = []
        for stride in strides:
            grid = [-(-n // s) for n, s in zip(patient.shape_zyx, stride, strict=True)]
            centres = (np.argwhere(np.ones(grid, bool)) + 0.5) * stride - 0.5
            phases = patient.to_canonical_mm(centres) @ directions
            vectors.append(embeddings.normalise(np.cos(phases + np.arange(16))).reshape(*grid, 16))
        embeddings.write_embedding(store, id, codec, *vectors)
    return store


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return perfectly_embedded(tmp_path_factory.mktemp("cohort") / "store", [1, 2])


@pytest.fixture(scope="module")
def truth_folder(tmp_path_factory, cohort):
    """Landmarks and label files of the cohort, the labels flipped into RAS."""
    folder = tmp_path_factory.mktemp("truth")
    for id in cohort.ids():
        (folder / id).mkdir()
        patient, scan = phantom.patient_of(cohort.scan(id)), cohort.scan(id)
        places = patient.from_canonical_mm([[325, 0, -70], [392, -25, 22]])
        ijk = cohort.to_original_ijk(id, places).tolist()
        (folder / id / "landmarks.json").write_text(json.dumps({"voxel_ijk": {"liver": ijk[0], "heart": ijk[1]}}))
        labels = nib.Nifti1Image(patient.labels().transpose(2, 1, 0), np.array(scan.original["affine_ras"]))
        nib.save(nib.as_closest_canonical(labels), folder / id / "labels.nii.gz")
        names = {str(code): name for code, name in phantom.LABELS.items()}
        (folder / id / "meta.json").write_text(json.dumps({"labels": names}))
    return folder


def test_perfect_vectors_match_better_than_the_baseline(cohort):
    errors = evaluate.matching_errors(cohort, cohort.ids(), 60, np.random.default_rng(0))
    assert list(errors) == ["baseline", "dense", "match"]
    for method in ("dense", "match"):
        assert np.median(errors[method]) < 6 < 12 < np.median(errors["baseline"])
    assert {values.shape for values in errors.values()} == {(120,)}


def test_command_prints_tables_and_writes_json(cohort, tmp_path, capsys):
    out = tmp_path / "errors.json"
    assert evaluate.main(["--task", "landmarks", "--store", cohort.path, "--points", "60", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "known points: 2 ordered pairs of scans, 120 points" in printed and "organs: 2 ordered pairs" in printed
    numbers = json.loads(out.read_text())
    assert set(numbers) == {"known points", "organs"}
    everything = numbers["known points"]["rows"]["all"]
    assert list(everything) == ["baseline", "dense", "match", "trusted"] and everything["match"]["points"] == 120
    assert everything["match"]["median_mm"] < everything["baseline"]["median_mm"]
    assert everything["match"]["same_organ"] > everything["baseline"]["same_organ"]
    trusted = everything["trusted"]
    assert trusted["points"] == round(120 * trusted["share"]) and trusted["within_10_mm"] > 0.8
    assert sum(row["match"]["points"] for row in numbers["known points"]["rows"].values()) == 240  # "all" and its parts
    liver = numbers["organs"]["rows"]["liver"]["match"]
    assert liver["median_mm"] < 15 and liver["same_organ"] > 0.8


def test_files_of_truth_say_the_same_as_the_phantoms(cohort, truth_folder, tmp_path, capsys):
    out = tmp_path / "errors.json"
    arguments = ["--store", cohort.path, "--truth", str(truth_folder), "--names", "liver", "heart", "--json", str(out)]
    assert evaluate.main(["--task", "landmarks", *arguments]) == 0
    numbers = json.loads(out.read_text())
    assert set(numbers["landmarks"]["rows"]) == {"liver", "heart", "all"} == set(numbers["organs"]["rows"])
    marks = numbers["landmarks"]["rows"]["all"]
    assert marks["match"]["points"] == 4 and marks["match"]["median_mm"] < 6 < marks["baseline"]["median_mm"]
    from_files, of_store = (
        evaluate.measure(cohort, landmarks.read_truth(cohort, cohort.ids(), folder, count=40)["organs"], [pair])
        for folder in (str(truth_folder), None)
        for pair in [tuple(cohort.ids())]
    )
    for method in evaluate.METHODS:
        np.testing.assert_allclose(from_files.errors_mm[method], of_store.errors_mm[method])
        np.testing.assert_array_equal(from_files.same_organ[method], of_store.same_organ[method])
    assert "heart" in capsys.readouterr().out


def test_only_judges_the_scans_named(cohort):
    arguments = ["--task", "landmarks", "--store", cohort.path, "--only"]
    with pytest.raises(UserError, match="two scans or more, got 1"):
        evaluate.main([*arguments, "phantom_0001"])
    with pytest.raises(UserError, match="did you mean phantom_000"):
        evaluate.main([*arguments, "phantom_001", "phantom_0002"])


@pytest.mark.parametrize(
    "change, message",
    [
        (["--points", "0"], "--points 0: give a whole number of 1 or more"),
        (["--pairs", "0"], "--pairs 0: give"),
        (["--seed", "-1"], "--seed -1: give a whole number of 0 or more"),
        (["--truth", "/nowhere"], "--truth /nowhere: there is no such folder"),
        (["--label-names", "/nowhere"], "/nowhere: cannot be read"),
        (["--json", "/nowhere/a.json"], "--json /nowhere/a.json: its folder does not exist"),
        (["--names", "spline"], "nothing is called"),
    ],
)
def test_mistakes_are_one_line(cohort, change, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluate.main(["--task", "landmarks", "--store", cohort.path, *change])
    assert "\n" not in str(caught.value)


def test_stores_without_known_correspondence_are_refused(tmp_path):
    store, codec = make_store(tmp_path / "store"), make_codec()
    codec.save(store)
    add_scan(store, "a")
    with pytest.raises(UserError, match="two scans or more"):
        evaluate.matching_errors(store, store.ids(), 10, np.random.default_rng(0))
    add_scan(store, "b")
    for id in "ab":
        vectors = (random_vectors((12, 10, 14), 0), random_vectors((6, 3, 4), 0))
        embeddings.write_embedding(store, id, codec, *vectors)
    with pytest.raises(UserError, match="not a phantom"):
        evaluate.matching_errors(store, store.ids(), 10, np.random.default_rng(0))
