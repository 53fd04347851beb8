"""Classification: samples, scores and intervals, a run that learns, and what evaluate says of its backbone."""

import csv
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from builders import add_volume, noise_store
from hypothesis import given
from hypothesis import strategies as st

from alice_jax import checkpoint, cli, evaluate, metrics, tasks, train
from alice_jax.data import class_labels, class_views
from alice_jax.data.store import Store
from alice_jax.errors import UserError
from alice_jax.evaluation import backbone, class_scores, classification
from configs import classify


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Twelve scans of noise, of which every third is brighter; labels.csv says so, and whether a scan is large."""
    store = Store.create(str(tmp_path_factory.mktemp("classes") / "store"), spacing_zyx_mm=(2.0, 2.0, 2.0))
    rows = [["scan", "bright", "large"]]
    for i in range(12):
        bright, large = i % 3 == 0, i % 2
        noise = np.random.default_rng(i).normal(120 if bright else 0, 40, (24 + 8 * large, 20, 24))
        add_volume(store, f"case{i:02}", noise.clip(-125, 225))
        rows.append([f"case{i:02}", int(bright), large])
    with open(f"{store.path}/labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return store


def small(store, columns="bright", **changes):
    """The tiny recipe with a network of two stages."""
    config = classify.get_config("tiny")
    with config.unlocked():
        config.update(batch_size=8, microbatch=1, steps=12, checkpoint_every=12, validate_every=12, log_every=12)
        config.data.store, config.data.label_columns = store.path, columns
        config.views.crop_shape_zyx = (16, 16, 16)
        config.model.update(width=8, depths=(1, 1), heads=(1, 2), windows=(2, 2), drop_path=0.0)
        config.update(changes)
    return config.lock()


@pytest.fixture(scope="module")
def finetuned(store, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("finetuned"))
    assert train.run(small(store), workdir) == 0
    return workdir


# ---------------------------------------------------------------- samples


@given(st.integers(-20, 20), st.integers(1, 100), st.integers(1, 64))
def test_even_starts_cover_with_as_few_as_possible(low, length, size):
    starts = class_views.even_starts(low, low + length, size)
    assert len(starts) == -(-length // size)
    covered = {at for start in starts for at in range(start, start + size)}
    assert covered >= set(range(low, low + length))


def test_a_prediction_sees_the_whole_body_and_fills_up_to_one_shape(store):
    ids = ("case00", "case01")  # (24, 20, 24) and (32, 20, 24) voxels, all of them body
    sampler = class_views.ClassSampler(store, ids, np.array([1, 0]), (16, 16, 16))
    rng = np.random.default_rng(0)
    samples = [sampler(record, rng, rng) for record in range(2)]
    assert [sample["weights"].tolist() for sample in samples] == [[1.0] * 8] * 2
    sampler = class_views.ClassSampler(store, ids, np.array([1, 0]), (32, 16, 16))
    assert sampler(0, rng, rng)["weights"].sum() == 4
    sampler = class_views.ClassSampler(store, ids, np.array([1, 0]), (24, 24, 24))
    sample = sampler(0, rng, rng)
    assert sample["weights"].tolist() == [1, 0] and not sample["volumes"][1].any()
    brightness = store.read_volume("case00").clip(-125, 225).astype(float)
    assert sample["volumes"].sum() == pytest.approx(((brightness + 125) / 350).sum(), rel=1e-5)
    drawn = class_views.ClassSampler(store, ids, np.array([1, 0]), (16, 16, 16), crops=3)(1, rng, rng)
    assert drawn["volumes"].shape == (3, 16, 16, 16, 1) and drawn["weights"].tolist() == [1, 1, 1]
    assert drawn["targets"] == 0 and drawn["meta"]["scans"].tolist() == [1]


# ---------------------------------------------------------------- scores


def test_measures_of_labels_leave_out_what_was_not_asked():
    truth = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], float)  # nobody has the second label
    scores = np.array([[0.9, 0.8], [0.6, 0.1], [0.7, 0.1], [0.2, 0.1]])
    assert class_scores.measures(truth, scores) == {"auroc": 1.0, "balanced_accuracy": 0.75, "f1": 0.8}
    assert all(np.isnan(value) for value in class_scores.measures(truth[:, 1:], scores[:, 1:]).values())


def test_intervals_hold_the_value_and_narrow_with_more_patients():
    def width(n, each):
        rng = np.random.default_rng(0)
        truth = rng.integers(2, size=n)
        score = np.clip(0.5 + 0.3 * (truth - 0.5) + rng.normal(0, 0.3, n), 0, 1)
        rows = np.repeat(np.arange(n), each)
        scores = np.stack([1 - score, score], axis=1)[rows]
        found = class_scores.with_intervals(truth[rows], [scores], [f"p{row}" for row in rows], draws=100)
        value, low, high = found["auroc"]
        assert low < value < high
        return high - low

    few, many = width(40, 1), width(640, 1)
    assert 2.5 < few / many < 6  # about the square root of 16
    assert width(40, 4) == pytest.approx(few, rel=1e-9)  # four scans of each patient say no more than one


def test_no_classifier_has_seen_the_patient_that_it_judges():
    """Two scans of each patient look alike and patients are unlike: only a patient seen before could be known again."""
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.permutation([0, 1] * 20), 2)
    features = np.repeat(rng.normal(size=(40, 64)), 2, axis=0)
    for kind in class_scores.CLASSIFIERS:
        alone, together = (
            class_scores.cross_validated(kind, features, truth, patients, 2, repeats=1)[0]
            for patients in (np.arange(80), np.arange(80) // 2)
        )
        assert class_scores.measures(truth, alone)["auroc"] > 0.9
        assert class_scores.measures(truth, together)["auroc"] < 0.7


@pytest.mark.parametrize("truth", [[[0, 0], [0, 1], [1, 0], [1, 1]], [[0, 1], [0, 1], [1, 0], [1, 1]], [0, 1, 0, 1]])
@pytest.mark.parametrize("patients", ["abcd", "aabb", "abbb"])
def test_few_scans_are_cross_validated_in_few_folds(truth, patients):
    (scores,) = class_scores.cross_validated("k-NN", np.eye(4), np.array(truth), list(patients), 2, repeats=1)
    assert scores.shape == (4, 2) and np.isfinite(scores).all()


def test_scans_of_one_patient_cannot_be_cross_validated():
    with pytest.raises(UserError, match="all of its scans are of patient a"):
        class_scores.cross_validated("k-NN", np.eye(4), np.array([0, 1, 0, 1]), ["a"] * 4, 2)


# ---------------------------------------------------------------- runs


def test_fine_tuning_learns_and_tells_how_well(finetuned, store):
    lines = metrics.read(finetuned)
    assert lines[-1]["validation/auroc"] == 1.0 and lines[-1]["validation/loss"] < np.log(2)
    assert {"validation/balanced_accuracy", "validation/f1"} < set(lines[-1])


def test_held_out_scans_take_the_memory_of_one_crop_each(store):
    """Of 12 crops in place of 3 only the crops themselves take more; they count as in training, all at once."""
    config = small(store)
    objective = tasks.make(config, Store.open(config.data.store)).objective
    volumes = np.random.default_rng(0).random((2, 12, 16, 16, 16, 1), np.float32)
    batch = {"volumes": volumes, "weights": np.ones((2, 12), np.float32), "targets": np.array([0, 1], np.int32)}
    params, _ = objective.init(jax.random.key(0), batch)

    def value(batch, train):
        return objective.loss(params, {}, batch, jax.random.key(0), 0, train)[0]

    def temporaries(crops):
        rows = batch | {name: batch[name][:, :crops] for name in ("volumes", "weights")}
        held_out = jax.jit(functools.partial(value, train=False))
        return held_out.lower(rows).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(12) - temporaries(3) < 1.5 * volumes[:, 3:].nbytes
    assert value(batch, False) == pytest.approx(float(value(batch, True)), rel=1e-5)


def test_a_probe_trains_the_head_alone_on_the_weights_that_it_starts_from(finetuned, store, tmp_path, capsys):
    config = small(store, "bright, large", steps=1, init_from=finetuned)
    with config.unlocked():
        config.method.kind = "probe"
    assert train.run(config, str(tmp_path)) == 0
    assert "100.0% of the backbone's values; left out: none; new: none" in capsys.readouterr().err
    before, after = (checkpoint.restore_arrays(workdir)[1]["params"] for workdir in (finetuned, str(tmp_path)))
    for start, end in zip(*map(leaves, (before["backbone"], after["backbone"])), strict=True):
        np.testing.assert_array_equal(start, end)
    assert after["head"]["kernel"].shape == (16, 2) and np.any(after["head"]["kernel"])  # it began at 0
    arguments = ["--workdir", str(tmp_path), "--store", store.path, "--repeats", "1", "--draws", "2"]
    assert evaluate.main(["--task", "classification", *arguments]) == 0
    assert "12 scans (4 bright, 6 large)" in capsys.readouterr().out


def test_weights_for_other_crops_are_refused(finetuned, store, tmp_path):
    config = small(store, init_from=finetuned)
    with config.unlocked():
        config.views.crop_shape_zyx = (24, 24, 24)
    with pytest.raises(UserError, match=r"crop_shape_zyx is \(16, 16, 16\) there and \(24, 24, 24\) here"):
        train.run(config, str(tmp_path))


def leaves(tree):
    return [leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


def test_evaluate_measures_features_and_the_head_of_a_run(finetuned, store, tmp_path, capsys):
    out = tmp_path / "found.json"
    arguments = [
        "--task",
        "classification",
        "--workdir",
        finetuned,
        "--store",
        store.path,
        "--repeats",
        "2",
        "--draws",
        "50",
    ]
    assert evaluate.main([*arguments, "--json", str(out)]) == 0
    assert "12 scans (8 0, 4 1)" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert set(found) == {"k-NN", "linear probe", "its head, 3 unseen"}
    for measures in found.values():
        assert measures["auroc"] == [1.0, 1.0, 1.0]
    # The head judges as the run itself did: the same grid of crops, the same held-out scans.
    assert found["its head, 3 unseen"]["f1"][0] == metrics.read(finetuned)[-1]["validation/f1"]


def labels_of(store, names=("0", "1"), ids=None):
    """As from a CSV without "train": scans to judge alone."""
    ids = tuple(store.ids()) if ids is None else ids
    patients = tuple(scan.patient for scan in store.scans(ids))
    return class_labels.ClassLabels(ids, names, np.arange(len(ids)) % 2, ("test",) * len(ids), patients)


def test_the_head_is_judged_on_all_that_the_run_has_not_trained_on(finetuned, store, tmp_path):
    features = np.random.default_rng(0).normal(size=(12, 16))
    (name,) = few = classification.of_head(finetuned, store, labels_of(store), features, draws=2)
    assert name == "its head, 3 unseen"  # whatever the CSV says now
    assert few != classification.of_head(finetuned, store, labels_of(store), features, draws=50)
    trained = tuple(checkpoint.restore_arrays(finetuned, parts=("params", "host"))[1]["host"]["coverage"]["counts"])
    assert classification.of_head(finetuned, store, labels_of(store, ids=trained), features[:9], draws=2) == {}


def test_the_head_is_judged_on_no_patient_of_the_training_in_any_store_nor_beside_the_split(finetuned, store, tmp_path):
    trained = tuple(checkpoint.restore_arrays(finetuned, parts=("params", "host"))[1]["host"]["coverage"]["counts"])
    copy = noise_store(str(tmp_path), scans=0)  # of a part of the run's store, with three scans more
    for id in (*trained[:4], "again", "new0", "new1"):
        add_volume(copy, id, np.zeros((16, 16, 16)))
    copy.update_scan(dataclasses.replace(copy.scan("again"), patient=trained[0]))
    features = np.random.default_rng(0).normal(size=(12, 16))
    assert list(classification.of_head(finetuned, copy, labels_of(copy), features[:7], 2)) == ["its head, 2 unseen"]
    splits = tuple("train" if id in trained else "test" for id in store.ids())
    first = splits.index("test")
    splits = (*splits[:first], "validation", *splits[first + 1 :])
    labels = dataclasses.replace(labels_of(store), splits=splits)
    assert list(classification.of_head(finetuned, store, labels, features, 2)) == ["its head, 2 unseen"]


def test_a_head_for_other_classes_is_refused(finetuned, store):
    with pytest.raises(UserError, match="tells 0, 1 apart, the labels no, yes; give labels of these classes"):
        classification.of_head(finetuned, store, labels_of(store, ("no", "yes")), np.zeros((12, 16)), draws=2)


def test_without_scans_to_train_on_features_are_cross_validated(store):
    features = (np.arange(12) % 2)[:, None] + np.linspace(0, 0.1, 12)[:, None]
    found = classification.of_features(features, labels_of(store), folds=3, repeats=1, draws=10)
    assert {kind: measures["auroc"][0] for kind, measures in found.items()} == {"k-NN": 1.0, "linear probe": 1.0}


def test_numbers_that_are_not_known_are_null_in_json(tmp_path):
    cli.write_numbers(str(tmp_path / "numbers.json"), {"k-NN": {"auroc": (np.nan, 0.5, 1.0)}})
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"k-NN": {"auroc": [None, 0.5, 1.0]}}


def test_evaluate_follows_the_split_of_the_file(store):
    features = np.array([[0.0], [0.1], [1.0], [1.1], [0.0], [1.0], [1.0], [0.0]])
    splits = ("train",) * 4 + ("test",) * 4
    scans = tuple(f"s{i}" for i in range(8))
    labels = class_labels.ClassLabels(scans, ("a", "b"), np.array([0, 0, 1, 1, 0, 1, 0, 1]), splits, scans)
    found = classification.of_features(features, labels, folds=5, repeats=1, draws=10)
    assert {kind: measures["balanced_accuracy"][0] for kind, measures in found.items()} == {
        "k-NN": 0.5,
        "linear probe": 0.5,
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method.kind": "frozen"}, "method.kind 'frozen': choose finetune or probe"),
        ({"views.crops": 0}, "views.crops 0"),
        ({"data.labels": "/nowhere.csv"}, "/nowhere.csv: cannot be read"),
        ({"data.label_columns": "bright,wide"}, "has no label 'wide'"),
    ],
)
def test_mistakes_in_the_configuration_are_one_line(store, tmp_path, change, message):
    config = small(store)
    with config.unlocked():
        config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message) as caught:
        train.run(config, str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "splits, message",
    [
        (["train"] * 12, "has no 'validation'"),
        (["validation"] * 12, "has no 'train'"),
        (["validation", "train", "train"] * 4, "no scan to train on is of 1"),
    ],
)
def test_splits_that_leave_nothing_to_learn_are_refused(store, tmp_path, splits, message):
    path = tmp_path / "labels.csv"
    rows = [f"case{i:02},{int(i % 3 == 0)},{split}" for i, split in enumerate(splits)]
    path.write_text("\n".join(["scan,bright,split", *rows]))
    config = small(store)
    with config.unlocked():
        config.data.labels = str(path)
    with pytest.raises(UserError, match=message):
        train.run(config, str(tmp_path / "run"))


# ---------------------------------------------------------------- correspondence


def test_cells_are_found_in_the_scan_itself_and_in_a_shifted_copy(finetuned, tmp_path):
    """A copy shifted by half a crop shows the same crops, and so the same vectors, that much further on."""
    store = Store.create(str(tmp_path), spacing_zyx_mm=(2.0, 2.0, 2.0))
    volume = np.random.default_rng(3).integers(-125, 225, (48, 32, 32))
    add_volume(store, "original", volume)
    add_volume(store, "shifted", np.concatenate([volume[8:], volume[:8]]))
    random = backbone.load(finetuned, "random")
    original, shifted = (random.cell_vectors(store, id) for id in ("original", "shifted"))
    assert original.stride_zyx_vox == (2, 2, 2) and len(original.vectors) == 24 * 16 * 16
    points = np.array([[20.0, 9.0, 13.0], [27.0, 20.0, 3.0]])
    np.testing.assert_allclose(original.match(points, original), [[20.5, 8.5, 12.5], [26.5, 20.5, 2.5]])
    np.testing.assert_allclose(original.match(points, shifted), [[12.5, 8.5, 12.5], [18.5, 20.5, 2.5]])


def test_an_encoder_alone_has_no_cells(finetuned, store):
    with pytest.raises(UserError, match="has trained an encoder alone"):
        backbone.load(finetuned).cell_vectors(store, "case00")
