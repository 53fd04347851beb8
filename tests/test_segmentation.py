"""Segmentation: crops and labels that stay together, losses with numbers to check, a run from pretrained weights."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import add_volume

from alice_jax import checkpoint, export, metrics, optimizer, pretrained, tasks, train
from alice_jax.data import label_maps
from alice_jax.data.segmentation_views import Augmentation, SegmentationSampler
from alice_jax.data.store import Store
from alice_jax.errors import UserError
from alice_jax.models import nnformer, primus
from alice_jax.objectives import alice, segmentation
from configs import segment

SHAPE = (40, 36, 44)
NAMES = {1: "liver", 4: "spleen", 9: "cord"}
SMALL = "tests/configs/small.py"


def labelled_store(path, scans=5):
    """Scans case0, … whose HU say the label: 0 in the background, 60 in the liver, 120 in the spleen; cord in case0."""
    store = Store.create(path, spacing_zyx_mm=(2.0, 2.0, 2.0))
    z, y, x = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    for i in range(scans):
        labels = np.zeros(SHAPE, np.uint8)
        labels[(z - 20) ** 2 + (y - 16 - i) ** 2 + (x - 12) ** 2 < 100] = 1
        labels[(z - 22) ** 2 + (y - 18) ** 2 + (x - 34) ** 2 < 36] = 4
        volume = np.select([labels == 1, labels == 4], [60, 120], 0)
        labels[2, 2, 2] = 9 if i == 0 else 0
        add_volume(store, f"case{i}", volume)
        store.write_array(f"case{i}", label_maps.ARRAY, labels)
    store.write_json(label_maps.NAMES, {str(code): name for code, name in NAMES.items()})
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return labelled_store(str(tmp_path_factory.mktemp("segmentation") / "store"))


def sampler_of(store, **changes):
    settings = {
        "scan_ids": ("case0", "case1"),
        "classes": (1, 4),
        "names": NAMES,
        "crop_shape_zyx": (16, 16, 16),
        "window_hu": (0.0, 200.0),
    }
    return SegmentationSampler(store=store, **(settings | changes))


def drawn(sampler, seed=0, record=0):
    return sampler(record, np.random.default_rng(seed))


# ---------------------------------------------------------------- samples


def test_a_crop_and_its_labels_show_the_same_place(store):
    sample = drawn(sampler_of(store))
    assert sample["volume"].shape == (16, 16, 16, 1) and sample["volume"].dtype == np.float32
    assert sample["labels"].dtype == np.uint8
    np.testing.assert_allclose(sample["volume"][..., 0], 0.3 * sample["labels"])  # 60 HU a class, of 200


def test_samples_are_a_function_of_their_seed(store):
    sampler = sampler_of(store, augmentation=Augmentation())
    for name in ("volume", "labels"):
        np.testing.assert_array_equal(drawn(sampler, 3)[name], drawn(sampler, 3)[name])
    assert any(not np.array_equal(drawn(sampler, 3)["volume"], drawn(sampler, seed)["volume"]) for seed in (4, 5))


def test_a_third_of_the_crops_aim_at_a_class_each_class_alike(store):
    sampler, rng = sampler_of(store), np.random.default_rng(0)
    samples = [sampler(0, rng) for _ in range(300)]
    aimed = [s for s in samples if s["meta"]["foreground"]]
    assert 0.22 < len(aimed) / 300 < 0.45  # four standard deviations are 0.11
    assert all(s["labels"].any() for s in aimed)
    assert 0.3 < np.mean([2 in s["labels"] for s in aimed]) < 0.8  # the spleen is a fifth of the liver
    assert not any(drawn(sampler_of(store, foreground=0.0), seed)["meta"]["foreground"] for seed in range(20))


def test_crops_stay_inside_a_large_scan_and_pad_a_small_one_with_air_and_background(store):
    sampler = sampler_of(store, window_hu=(-1024.0, 200.0))
    for seed in range(50):
        assert drawn(sampler, seed)["volume"].min() > 0.5  # no air
    large = drawn(sampler_of(store, window_hu=(-1024.0, 200.0), crop_shape_zyx=(48, 48, 48)))
    assert (large["volume"][:4] == 0).all() and not large["labels"][:4].any()
    assert np.count_nonzero(large["volume"]) == np.prod(SHAPE)


def test_turned_and_zoomed_alike(store):
    turn = Augmentation(
        rotation_degrees=(1.0, 30.0), zoom=(1.0, 1.4, 1.4), gamma=(0, 1, 1), contrast=(0, 1, 1), noise=(0, 0),
        blur_voxels=(0, 0, 0),
    )  # fmt: skip
    sampler = sampler_of(store, augmentation=turn, crop_shape_zyx=(32, 32, 40))
    shares = []
    for seed in range(8):
        sample = drawn(sampler, seed)
        by_intensity = np.rint(sample["volume"][..., 0] / 0.3)
        assert np.mean(by_intensity != sample["labels"]) < 0.02  # but for borders, which are interpolated
        shares.append(np.mean(sample["labels"] == 1))
    plain = np.mean(
        [np.mean(drawn(sampler_of(store, crop_shape_zyx=(32, 32, 40)), s)["labels"] == 1) for s in range(8)]
    )
    assert 1.5 < np.mean(shares) / plain < 1.4**3 + 0.3


def test_flips_only_where_they_are_asked_for(store):
    quiet = {name: (0.0, *getattr(Augmentation(), name)[1:]) for name in
             ("rotation_degrees", "zoom", "gamma", "contrast", "noise", "blur_voxels")}  # fmt: skip
    crop = {"crop_shape_zyx": SHAPE}
    whole = drawn(sampler_of(store, **crop))
    for axes in ((), (0,), (0, 1, 2)):
        sampler = sampler_of(store, augmentation=Augmentation(**quiet, flip_axes=axes), **crop)
        seen = {drawn(sampler, seed)["labels"].tobytes() for seed in range(40)}
        wanted = set()
        for order in np.ndindex(2, 2, 2):
            flips = tuple(slice(None, None, -1 if o and axis in axes else 1) for axis, o in enumerate(order))
            wanted.add(whole["labels"][flips].tobytes())
        assert seen == wanted and len(wanted) == 2 ** len(axes)


def test_intensities_change_as_they_say(store):
    rng = np.random.default_rng(0)
    volume = rng.random((16, 16, 16)).astype(np.float32)
    none = dict.fromkeys(("gamma", "contrast", "blur_voxels"), (0.0, 1.0, 1.0)) | {"noise": (0.0, 0.0)}
    np.testing.assert_array_equal(Augmentation(**none).change_intensities(volume, rng), volume)
    squared = Augmentation(**none | {"gamma": (1.0, 2.0, 2.0)}).change_intensities(volume, rng)
    np.testing.assert_allclose(squared, volume**2, rtol=1e-6)
    flat = Augmentation(**none | {"contrast": (1.0, 0.5, 0.5)}).change_intensities(volume, rng)
    assert flat.std() == pytest.approx(volume.std() / 2, rel=1e-4)
    assert Augmentation(**none | {"blur_voxels": (1.0, 1.0, 1.0)}).change_intensities(volume, rng).std() < 0.1
    noisy = Augmentation(**none | {"noise": (1.0, 0.1)}).change_intensities(volume, rng)
    assert 0 < np.abs(noisy - volume).mean() < 0.1 and noisy.min() >= 0 and noisy.max() <= 1


def test_labels_that_do_not_fit_are_named(tmp_path):
    store = labelled_store(str(tmp_path / "store"), scans=2)
    store.write_array("case0", label_maps.ARRAY, np.full(SHAPE, 77, np.uint8))
    with pytest.raises(UserError, match="scan case0: its labels hold 77, which has no name"):
        drawn(sampler_of(store))
    store.write_array("case0", label_maps.ARRAY, np.zeros((40, 36, 43), np.uint8))
    with pytest.raises(UserError, match=r"scan case0: its labels have shape \(40, 36, 43\)"):
        drawn(sampler_of(store))


# ---------------------------------------------------------------- losses


def logits_for(labels, classes, sure):
    return sure * jax.nn.one_hot(labels, classes)


def test_losses_of_certain_and_of_undecided_networks():
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 4, 4, 4)))
    weights = segmentation.Weights()
    right = segmentation.losses([logits_for(labels, 3, 50.0)], labels, weights)
    assert right["loss_dice"] == pytest.approx(0, abs=1e-5)
    assert right["loss_cross_entropy"] == pytest.approx(0, abs=1e-5)
    even = segmentation.losses([jnp.zeros((2, 4, 4, 4, 3))], labels, weights)
    assert even["loss_cross_entropy"] == pytest.approx(np.log(3), rel=1e-5)
    counts = np.stack([np.bincount(np.ravel(each), minlength=3) for each in labels])[:, 1:]
    assert even["loss_dice"] == pytest.approx(1 - np.mean(2 * (counts / 3) / (64 / 3 + counts)), rel=1e-4)


def test_levels_count_half_as_much_each_and_see_shares():
    labels = jnp.zeros((1, 4, 4, 4), int).at[0, :, :, :1].set(1)
    fine, coarse = logits_for(labels, 2, 50.0), jnp.zeros((1, 2, 2, 2, 2))
    terms = segmentation.losses([fine, coarse], labels, segmentation.Weights())
    # Half of each cell on the left is of class 1; undecided logits are then the best answer there, log 2.
    assert terms["loss_cross_entropy"] == pytest.approx(np.log(2) / 3, rel=1e-4)


def test_batch_dice_counts_a_class_over_all_crops():
    target = jnp.zeros((2, 1, 1, 2, 2)).at[0, ..., 1].set(1).at[1, ..., 0].set(1)
    half = jnp.full((2, 1, 1, 2, 2), 0.5)
    assert segmentation.soft_dice(half, target) == pytest.approx((2 * 1 / 3 + 1) / 2, rel=1e-4)
    assert segmentation.soft_dice(half, target, batch=True) == pytest.approx(2 * 1 / 4, rel=1e-4)


def test_overlap_counts_voxels():
    labels = jnp.array([[[[0, 1, 1, 2]]]])
    logits = logits_for(jnp.array([[[[0, 1, 2, 2]]]]), 3, 1.0)
    assert segmentation.overlap(logits, labels)[0].tolist() == [[1, 1, 1], [1, 1, 2], [1, 2, 1]]


# ---------------------------------------------------------------- rates


def test_layer_wise_rates_and_freezing_by_rules():
    taken = [
        "backbone/stem/kernel",
        "backbone/encoder_0/kernel",
        "backbone/encoder_1/bias",
        "backbone/decoder_0/kernel",
    ]
    names = [*taken, "backbone/level_head_0/kernel", "backbone/encoder_1/bias_of_another"]
    tree = {"backbone": {}}
    for name in names:
        module, leaf = name.split("/")[1:]
        tree["backbone"].setdefault(module, {})[leaf] = 0
    layers = {name: nnformer.NNFormer().layer_of(name.split("/")[1]) for name in taken[:3]}
    rules = tasks.segment.rate_rules(taken, layers, rate=0.5, layer_decay=0.1)
    rates = dict(pretrained.names.leaves(optimizer.by_rules(tree, rules)))
    assert rates == pytest.approx(
        {
            names[0]: 0.0005, names[1]: 0.005, names[2]: 0.05, names[3]: 0.5, names[4]: 1.0, names[5]: 1.0,
        }
    )  # fmt: skip
    groups = dict(pretrained.names.leaves(optimizer.by_rules(tree, tasks.segment.group_rules(taken, held=True))))
    assert [groups[name] for name in names] == ["held", "held", "held plain", "held", "decayed", "decayed"]
    of_primus = [primus.Primus(depth=4).layer_of(module) for module in ("stem", "block_0", "block_3", "norm")]
    assert of_primus == [-1, 0, 3, 3]
    free = dict(pretrained.names.leaves(optimizer.by_rules(tree, tasks.segment.group_rules(taken, held=False))))
    assert set(free.values()) == {"decayed", "plain"}
    gain = {"backbone": {"block_0": {"gain1": 0}}}
    assert all(
        dict(pretrained.names.leaves(optimizer.by_rules(gain, rules)))["backbone/block_0/gain1"] == "plain"
        for rules in (tasks.segment.group_rules(taken, held=False), alice.GROUP_RULES)
    )


# ---------------------------------------------------------------- a run


def small(store, **changes):
    """Two stages, as the small pretraining recipe."""
    config = segment.get_config("tiny")
    with config.unlocked():
        config.update(batch_size=8, microbatch=1, steps=4, checkpoint_every=2, validate_every=4, log_every=1)
        config.views.crop_shape_zyx = (16, 16, 16)
        config.data.update(store=store.path, validation_samples=16)
        config.model.update(width=8, depths=(1, 1), heads=(1, 2), windows=(2, 2))
        for name, value in changes.items():
            *parents, leaf = name.split(".")
            node = config
            for parent in parents:
                node = node[parent]
            node[leaf] = value
    return config


@pytest.fixture(scope="module")
def pretrained_run(store, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("pretrained"))
    config = runpy.run_path(SMALL)["get_config"]()
    with config.unlocked():
        config.data.store, config.views.kind, config.steps = store.path, "random", 2
    assert train.run(config, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def finished(store, pretrained_run, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("segment"))
    assert train.run(small(store, init_from=pretrained_run, **{"optimizer.freeze": "2 steps"}), workdir) == 0
    return workdir


def test_a_run_from_pretrained_weights(finished, pretrained_run, store):
    lines = metrics.read(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    for name in ("loss", "loss_dice", "loss_cross_entropy", "views/foreground", "learning_rate"):
        assert np.isfinite(lines[0][name]), name
    last = lines[-1]
    dice = {name for name in last if name.startswith("validation/dice")}
    assert {"validation/dice_liver", "validation/dice_spleen", "validation/dice"} <= dice
    assert 0 <= last["validation/dice_liver"] <= 1
    # What was taken over stood still for two steps, and then moved.
    start = checkpoint.restore_arrays(pretrained_run)[1]["extra"]["teacher"]["backbone"]
    held, moved = (checkpoint.restore_arrays(finished, step)[1]["params"]["backbone"] for step in (2, 4))
    name = ("encoder_0", "block0", "mlp", "fc1", "kernel")
    of = lambda tree: tree[name[0]][name[1]][name[2]][name[3]][name[4]]  # noqa: E731
    np.testing.assert_array_equal(of(held), of(start))
    assert not np.array_equal(of(moved), of(start))


def test_load_gives_what_prediction_needs(finished):
    network, params, contract = tasks.segment.load(finished)
    assert contract.classes == ("background", "liver", "spleen", "cord") and contract.crop_shape_zyx == (16, 16, 16)
    assert contract.spacing_zyx_mm == (2.0, 2.0, 2.0) and contract.window_hu == (-125.0, 225.0)
    logits = jax.eval_shape(
        lambda x: network.apply({"params": params}, x, method="segment")[0], jnp.zeros((2, 16, 16, 16, 1))
    )
    assert logits.shape == (2, 16, 16, 16, 4)


def test_the_account_names_the_position_table_of_release_mode(pretrained_run):
    source = dataclasses.replace(pretrained.read(pretrained_run), position_table=True)
    fit = pretrained.fit(source, {name: value.shape for name, value in source.values.items()})
    assert fit.account("init_from runs/alice").endswith("new: none; trained with the fixed position table of release "
                                                        "mode, which is not added here")  # fmt: skip


def test_a_pretraining_run_labels_nothing(pretrained_run):
    with pytest.raises(UserError, match=r"objective 'alice'; give a run of configs/segment\.py"):
        tasks.segment.load(pretrained_run)


def test_the_account_names_what_was_left_out_and_what_is_new(store, pretrained_run):
    task = tasks.make(small(store, init_from=pretrained_run), store)
    (warning, account) = task.notes  # cord is in case0 alone, which is held out
    assert warning == "warning: no training scan shows cord, which cannot be learnt"
    assert "(teacher)" in account or "tensors taken" in account
    assert "left out: expand, mask_token; new: expand, level_head_0" in account, account
    encoder = tasks.make(small(store, init_from=pretrained_run, init_parts="encoder"), store).notes[1]
    assert "decoder_0" in encoder.split("new:")[1] and "100.0%" in encoder


def test_from_an_exported_file(store, pretrained_run, tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "backbone.pth"
    assert export.main(["--workdir", pretrained_run, "--out", str(out)]) == 0
    of_file, of_run = pretrained.read(str(out)), pretrained.read(pretrained_run)
    assert of_file.contract == of_run.contract
    for name, value in of_run.values.items():
        np.testing.assert_array_equal(of_file.values[name], value)
    (tmp_path / "backbone.pth.json").unlink()
    with pytest.raises(UserError, match=r"backbone\.pth\.json, which says how to use it, cannot be read"):
        pretrained.read(str(out))


def test_resuming_on_a_store_of_another_kind_is_refused(store, finished, tmp_path, monkeypatch):
    other = small(store, init_from="", steps=5)
    made = tasks.make
    monkeypatch.setattr(tasks, "make", lambda *args: dataclasses.replace(
        task := made(*args), contract=dataclasses.replace(task.contract, spacing_zyx_mm=(1.0, 1.0, 1.0))
    ))  # fmt: skip
    config = checkpoint.read_config(finished)
    with other.unlocked():
        other.init_from, other.optimizer.freeze = config["init_from"], config["optimizer"]["freeze"]
    with pytest.raises(UserError, match=r"spacing_zyx_mm is .*2.0.* there and .*1.0.* here"):
        train.run(other, finished)


MISTAKES = {
    "another architecture": (
        {"model.width": 16, "model.heads": (2, 4)},
        "another architecture; set the fields of model .* init_parts to encoder where the decoder alone differs",
    ),
    "another crop": ({"views.crop_shape_zyx": (32, 32, 32)}, "crop_shape_zyx is .*16.* there and .*32.* here"),
    "another window": ({"views.window_hu": (-100.0, 200.0)}, "window_hu is .*-125.* there"),
    "other windows": ({"model.position_index": "release"}, "set model.position_index to correct"),
    "parts": ({"init_parts": "head"}, "init_parts 'head'"),
    "which": ({"which": "both"}, "which 'both'"),
    "nothing there": ({"init_from": "nowhere.pth"}, "init_from nowhere.pth: is not there"),
    "no run": ({"init_from": "tests"}, "init_from tests: holds no run"),
    "a crop of other sides": ({"views.crop_shape_zyx": (16, 16, 18)}, "give three multiples of .4, 4, 4"),
    "unknown class": ({"data.classes": ("kidney",)}, "'kidney': the store has liver, spleen, cord"),
    "absent class": ({"data.classes": ("cord",)}, "none of cord is in the 4 training scans"),
    "unknown scan": ({"data.train_scans": "case7"}, "case7: is no labelled scan"),
    "held-out scan": ({"data.train_scans": "case1, case0"}, "case0: .*held out"),
    "too many shots": ({"data.shots": 5}, "there are 4 labelled scans"),
    "shots below 0": ({"data.shots": -1}, "data.shots -1: there are 4 .* give 1 to 4, or 0 for all"),
    "no scan": ({"data.train_scans": ","}, "data.train_scans ',': names no scan; give ids"),
    "shots and fraction": ({"data.shots": 1, "data.fraction": 0.5}, "one of the two"),
    "subset seed": ({"data.subset_seed": -1}, "data.subset_seed -1: give a whole number of 0 or more"),
    "fraction": ({"data.fraction": 0.0}, "above 0"),
    "augmentation": ({"augmentation.noise": (2.0, 0.1)}, "augmentation.noise"),
    "no zoom": ({"augmentation.zoom": (0.2, 0.0, 1.0)}, "augmentation.zoom .* above 0"),
    "negative blur": ({"augmentation.blur_voxels": (0.2, -1.0, 1.0)}, "augmentation.blur_voxels .* 0 or more"),
    "many unknown scans": (
        {"data.train_scans": ",".join(f"scan_{i:010}" for i in range(30))},
        "scan_0000000000: is no",
    ),
    "flips": ({"augmentation.flip_axes": (3,)}, "flip_axes"),
    "rate": ({"optimizer.layer_decay": 2.0}, "layer_decay"),
    "no loss": ({"loss.dice": 0.0, "loss.cross_entropy": 0.0}, "loss .*'dice': 0.0.* one of them above 0"),
    "negative loss": ({"loss.dice": -1.0}, "loss .*'dice': -1.0.* must be 0 or more"),
    "negative rate": ({"optimizer.lr": -1.0}, "optimizer.lr -1.0: give a number above 0"),
    "negative decay": ({"optimizer.weight_decay": -1.0}, "optimizer.weight_decay -1.0: give a number of 0 or more"),
    "clipped to nothing": ({"optimizer.clip": 0.0}, "optimizer.clip 0.0: give a number above 0"),
    "negative samples": ({"data.validation_samples": -3}, "data.validation_samples -3: give a whole number"),
    "freeze": ({"optimizer.freeze": "long"}, "optimizer.freeze"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_one_clear_line(store, pretrained_run, kind):
    changes, said = MISTAKES[kind]
    with pytest.raises(UserError, match=said) as caught:
        tasks.make(small(store, **({"init_from": pretrained_run} | changes)), store)
    assert "\n" not in str(caught.value)


def test_a_store_without_labels_or_without_names(tmp_path):
    store = Store.create(str(tmp_path / "store"), spacing_zyx_mm=(2.0, 2.0, 2.0))
    add_volume(store, "case0", np.zeros(SHAPE))
    with pytest.raises(UserError, match="nothing says what its labels mean"):
        tasks.make(small(store), store)
    store.write_json(label_maps.NAMES, {"1": "liver"})
    with pytest.raises(UserError, match="none of its 1 scans has labels"):
        tasks.make(small(store), store)


def test_subsets_are_nested_and_leave_the_held_out_scans_alone(tmp_path):
    store = labelled_store(str(tmp_path / "store"), scans=12)
    sizes = {}
    for shots in (1, 2, 5):
        task = tasks.make(small(store, **{"data.shots": shots, "data.subset_seed": 3}), store)
        sizes[shots] = set(task.scans)
        assert len(task.scans) == shots and task.validation_scans == tasks.make(small(store), store).validation_scans
    assert sizes[1] < sizes[2] < sizes[5]
    half = tasks.make(small(store, **{"data.fraction": 0.5, "data.subset_seed": 3}), store)
    assert set(half.scans) == sizes[5]  # of 10
    draws = [tasks.make(small(store, **{"data.shots": 1, "data.subset_seed": s}), store).scans for s in range(8)]
    assert len(set(draws)) > 2
    (tmp_path / "list").write_text("case3\ncase5\n")
    listed = tasks.make(small(store, **{"data.train_scans": str(tmp_path / "list")}), store)
    assert listed.scans == ("case3", "case5")


def test_the_contract_stands_beside_every_objective(finished, pretrained_run):
    for workdir, classes in ((finished, 4), (pretrained_run, 0)):
        step = max(int(path.name) for path in Path(workdir, "checkpoints").iterdir())
        host = json.loads(Path(workdir, "checkpoints", str(step), "host.json").read_text())
        assert len(host["contract"]["classes"]) == classes and host["contract"]["crop_shape_zyx"] == [16, 16, 16]
