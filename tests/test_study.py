"""The protocol of a study: which runs it makes, what it makes of their Dice, and that nothing is done twice.

The trainings are replaced by numbers; what a training and its Dice are is tested in test_segmentation and test_sliding.
"""

import csv
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_segmentation import SHAPE, labelled_store, small

from alice_jax import builtin, checkpoint, embed, pretrained, study
from alice_jax.contract import Contract
from alice_jax.data import embeddings, label_maps
from alice_jax.data.store import FRAME
from alice_jax.errors import UserError
from alice_jax.tasks import segment


@pytest.fixture
def trainings(monkeypatch):
    """The configurations that are trained; their Dice is 0.5, and 0.1 more from pretrained weights in case "b"."""
    asked = []

    def trained(config, workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        asked.append(config)

    def dice_of_run(config, workdir, store, overlap):
        more = 0.1 if config.init_from and config.optimizer.freeze != "100 %" else 0.0
        return {"a": {"liver": 0.5, "fat": 0.5}, "b": {"liver": 0.5 + more, "fat": 0.5 + more}}

    monkeypatch.setattr(study, "trained", trained)
    monkeypatch.setattr(study, "dice_of_run", dice_of_run)
    monkeypatch.setattr(study, "check", lambda arms, subsets, args: None)
    monkeypatch.setattr(study.Store, "open", lambda path: path)
    return asked


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Of 8 scans a half is case0, case2, case4 and case6, the last of them without any class."""
    store = labelled_store(str(tmp_path_factory.mktemp("study") / "store"), scans=8)
    store.write_array("case6", label_maps.ARRAY, np.zeros(SHAPE, np.uint8))
    return store


@pytest.fixture
def no_training(monkeypatch):
    """For what must be refused before the first one."""
    monkeypatch.setattr(study, "trained", lambda config, workdir: pytest.fail("a training began"))


def arguments(tmp_path, *more):
    return ["--workdir", str(tmp_path / "study"), "--store", "labelled", "--pretrained", "alice=runs/alice", *more]


def test_every_arm_learns_from_the_same_subsets_and_is_compared_with_scratch(trainings, tmp_path, capsys):
    assert study.main(arguments(tmp_path, "--shots", "1", "5", "--seeds", "2", "--steps", "7")) == 0
    assert len(trainings) == 3 * 2 * 2  # arms, numbers of scans, seeds
    of_arm = {
        (config.init_from, config.optimizer.freeze): [
            (c.data.shots, c.data.subset_seed, c.seed, c.steps)
            for c in trainings
            if (c.init_from, c.optimizer.freeze) == (config.init_from, config.optimizer.freeze)
        ]
        for config in trainings
    }
    assert set(of_arm) == {("", "0 %"), ("runs/alice", "0 %"), ("runs/alice", "100 %")}
    assert set(map(tuple, of_arm.values())) == {((1, 0, 0, 7), (1, 1, 1, 7), (5, 0, 0, 7), (5, 1, 1, 7))}

    rows = json.loads((tmp_path / "study" / "study.json").read_text())["rows"]
    found = {(row["arm"], row["subset"]): row for row in rows}
    assert found["scratch", "1-shot"]["more_than"] == {}
    alice = found["alice", "5-shot"]
    assert alice["cases"] == 2 and alice["dice"]["mean"] == pytest.approx(0.55)
    assert alice["more_than"] == {"scratch": pytest.approx({"mean": 0.05, "low": 0.0, "high": 0.1})}
    assert found["alice, frozen", "1-shot"]["more_than"]["scratch"]["mean"] == 0
    assert "+0.050" in capsys.readouterr().out
    lines = list(csv.DictReader((tmp_path / "study" / "study.csv").open()))
    assert len(lines) == 12 * 4 and {line["class"] for line in lines} == {"liver", "fat"}
    assert (tmp_path / "study" / "study.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(trainings, tmp_path):
    study.main(arguments(tmp_path, "--shots", "1", "--seeds", "1", "--no-probes"))
    study.main(arguments(tmp_path, "--shots", "1", "--seeds", "2", "--no-probes"))
    assert [(config.init_from, config.seed) for config in trainings] == [
        ("", 0),
        ("runs/alice", 0),
        ("", 1),
        ("runs/alice", 1),
    ]


def test_a_folder_holds_one_study(trainings, tmp_path):
    study.main(arguments(tmp_path, "--shots", "1", "--seeds", "1", "--no-probes"))
    with pytest.raises(UserError, match="holds a study with --steps 0; name another folder"):
        study.main(arguments(tmp_path, "--shots", "1", "--seeds", "1", "--steps", "9"))


def test_a_training_that_has_ended_is_not_begun_again(monkeypatch, tmp_path):
    config, begun = study.recipe_with("configs/segment.py:tiny", {}, 7), []
    monkeypatch.setattr(study.train, "run_on_disk", lambda config, workdir: begun.append(config.steps) or 0)
    for newest in (None, 6, 7):
        monkeypatch.setattr(study.checkpoint, "newest_intact", lambda workdir, newest=newest: (newest, []))
        study.trained(config, tmp_path)
    assert begun == [7, 7]


def test_scratch_of_more_steps(trainings, tmp_path):
    study.main(
        arguments(tmp_path, "--shots", "1", "--seeds", "1", "--no-probes", "--steps", "7", "--long-scratch", "9")
    )
    assert [(config.init_from, config.steps) for config in trainings] == [("", 7), ("", 9), ("runs/alice", 7)]
    rows = json.loads((tmp_path / "study" / "study.json").read_text())["rows"]
    assert rows[2]["more_than"]["scratch-long"]["mean"] == pytest.approx(0.05)
    with pytest.raises(UserError, match=r"its arm scratch-long started from {'steps': 9}"):
        study.main(arguments(tmp_path, "--shots", "1", "--seeds", "1", "--steps", "7", "--long-scratch", "8"))


def step_of(run, step):
    (run / "checkpoints" / str(step)).mkdir(parents=True)
    (run / "checkpoints" / str(step) / checkpoint.CHECKSUMS).write_text("{}")


def test_an_arm_goes_on_from_the_weights_that_it_started_from(trainings, tmp_path):
    for name in ("first", "other"):
        step_of(tmp_path / name, 300)
    short = ["--workdir", str(tmp_path / "study"), "--store", "labelled", "--shots", "1", "--seeds", "1", "--no-probes"]
    first, other = (f"alice={tmp_path / name}" for name in ("first", "other"))
    study.main([*short, "--pretrained", first])
    study.main([*short, "--pretrained", other.replace("alice", "mine"), first])  # another arm may join
    assert len(trainings) == 3
    with pytest.raises(UserError, match=r"its arm alice started from .*first.*, this one would from .*other"):
        study.main([*short, "--pretrained", other])
    step_of(tmp_path / "first", 400)
    with pytest.raises(UserError, match=r"'step': 300}, this one would from .*'step': 400}"):
        study.main([*short, "--pretrained", first])
    assert len(trainings) == 3


def test_an_arm_that_never_began_may_begin_elsewhere(trainings, tmp_path):
    for name in ("first", "other"):
        step_of(tmp_path / name, 300)
    short = ["--workdir", str(tmp_path / "study"), "--store", "labelled", "--shots", "1", "--seeds", "1", "--no-probes"]
    study.main([*short, "--pretrained", f"alice={tmp_path / 'first'}"])
    config = json.loads((tmp_path / "study" / "config.json").read_text())
    checkpoint.write_config(str(tmp_path / "study"), config | {"arms": config["arms"] | {"mine": {"path": "gone"}}})
    study.main([*short, "--pretrained", f"mine={tmp_path / 'other'}"])
    assert len(trainings) == 3


def test_a_file_of_weights_is_known_by_its_bytes(trainings, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"first")
    short = arguments(tmp_path, "--pretrained", f"alice={tmp_path / 'a.pth'}", "--shots", "1", "--seeds", "1")
    study.main(short)
    (tmp_path / "a.pth").write_bytes(b"other")
    with pytest.raises(UserError, match=r"its arm alice started from .*sha256"):
        study.main(short)


@pytest.mark.parametrize(
    "flag, value",
    [("--pretraining-steps", "9"), ("--unlabelled", "others"), ("--pretraining", "tests/configs/small.py")],
)
def test_a_ladder_is_pretrained_by_one_recipe(trainings, tmp_path, flag, value):
    short = ["--workdir", str(tmp_path / "study"), "--store", "labelled", "--unlabelled", "scans", "--no-probes"]
    study.main([*short, "--shots", "1", "--seeds", "1"])
    count = len(trainings)
    with pytest.raises(UserError, match="its arm reconstruction started from"):
        study.main([*short, "--shots", "1", "--seeds", "1", flag, value])
    assert len(trainings) == count


def test_studies_of_older_versions_go_on(trainings, tmp_path):
    study.main(arguments(tmp_path, "--shots", "1", "--seeds", "1"))
    path = tmp_path / "study" / "config.json"
    config = json.loads(path.read_text())
    arms = config.pop("arms")
    path.write_text(json.dumps(config))
    study.main(arguments(tmp_path, "--shots", "1", "--seeds", "1"))
    assert len(trainings) == 3 and json.loads(path.read_text())["arms"] == arms


def test_a_network_that_sees_liver_everywhere(store, monkeypatch):
    """Its Dice of the liver is 2 n / (n + all voxels), of the others 0; what a case lacks does not count."""
    config = small(store, **{"data.validation_fraction": 0.5})
    network = segment.network_of(config, 4)
    start = jnp.zeros((1, 16, 16, 16, 1))
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), start, method="segment")["params"])
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    params["expand"]["bias"][1] = 1.0
    agreed = Contract(FRAME, (2.0, 2.0, 2.0), (-125.0, 225.0), (16, 16, 16), ("background", "liver", "spleen", "cord"))
    monkeypatch.setattr(segment, "load", lambda workdir: (network, params, agreed))
    found = study.dice_of_run(config, Path("run"), store, overlap=0.0)
    liver = np.count_nonzero(store.read_array("case2", label_maps.ARRAY) == 1)
    assert list(found) == ["case0", "case2", "case4"]  # nothing is in case6
    assert found["case2"] == {"liver": pytest.approx(2 * liver / (liver + np.prod(SHAPE))), "spleen": 0.0}
    assert set(found["case0"]) == {"liver", "spleen", "cord"}


def test_cases_without_any_class_do_not_count(trainings, tmp_path, monkeypatch):
    dice = {"a": {"liver": 0.5}, "b": {"liver": 0.7}, "empty": {}}
    monkeypatch.setattr(study, "dice_of_run", lambda *_: dice)
    study.main(arguments(tmp_path, "--shots", "1", "--seeds", "1"))
    rows = json.loads((tmp_path / "study" / "study.json").read_text(), parse_constant=pytest.fail)["rows"]
    assert [(row["cases"], row["dice"]["mean"]) for row in rows] == [(2, pytest.approx(0.6))] * 3


@pytest.mark.parametrize(
    "more, words",
    [
        (["--shots", "1", "5"], "data.shots 5: there are 4 labelled scans to train on"),
        (["--shots", "--fractions", "0.5", "0"], "data.fraction 0.0: give a share above 0"),
        (["--shots", "1"], "store .*: has no embeddings; run python -m alice_jax.embed"),
    ],
)
def test_what_would_fail_late_fails_before_the_first_training(store, no_training, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        study.main(["--workdir", str(tmp_path), "--store", store.path, "--unlabelled", store.path, *more])


def test_shares_have_folders_of_their_own():
    names = [subset.name for subset in study.Subset.all_of([], [0.07, 0.12, 0.121, 0.124, 1.0])]
    assert names == ["7%", "12%", "12.1%", "12.4%", "100%"]


def test_a_recipe_that_names_its_scans_is_refused(store, no_training, tmp_path):
    recipe = tmp_path / "named.py"
    recipe.write_text(
        "from configs import segment\n\n"
        "def get_config(variant=''):\n"
        "    config = segment.get_config('tiny')\n"
        "    config.data.train_scans = 'case1'\n"
        "    return config\n"
    )
    settings = ["--workdir", str(tmp_path / "study"), "--store", store.path, "--pretrained", "a=b"]
    with pytest.raises(UserError, match=r"named.py: names data.train_scans, but a study draws them anew"):
        study.main([*settings, "--recipe", str(recipe)])


@pytest.mark.parametrize("share, left", [("0", "0 scans"), ("0.1", "1 scans")])
def test_too_few_held_out_scans_are_refused_before_the_first_training(store, no_training, tmp_path, share, left):
    settings = ["--store", store.path, "--unlabelled", "none", "--shots", "3", "--held-out", share]
    with pytest.raises(UserError, match=rf"--held-out {float(share)}: leaves {left} with labels to judge by"):
        study.main(["--workdir", str(tmp_path / "study"), *settings])


def test_without_weights_a_ladder_is_pretrained_first(trainings, tmp_path):
    more = ["--unlabelled", "scans", "--pretraining-steps", "3", "--shots", "1", "--seeds", "1", "--no-probes"]
    study.main(["--workdir", str(tmp_path / "study"), "--store", "labelled", *more])
    ladder = [config for config in trainings if config.objective == "alice"]
    assert [
        (c.loss.invariance, c.loss.alignment, c.loss.reconstruction, c.views.kind, c.steps, c.data.store)
        for c in ladder
    ] == [
        (0, 0, 10, "random", 3, "scans"),
        (1, 0, 10, "random", 3, "scans"),
        (1, 0, 10, "mined", 3, "scans"),
        (1, 1, 10, "mined", 3, "scans"),
    ]
    assert [c.init_from for c in trainings if c.objective == "segmentation"] == [
        "",
        *(str(tmp_path / "study" / "pretraining" / name) for name in study.LADDER),
    ]


def test_a_full_disk_is_one_line(trainings, tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(study, "write_dice", full)
    with pytest.raises(UserError, match=r"study: No space left on device: .*study\.csv; what is done stays done"):
        study.main(arguments(tmp_path, "--shots", "1", "--seeds", "1"))


def test_a_folder_that_cannot_be_written_to_is_one_line(trainings, tmp_path):
    (tmp_path / "study").write_text("a file")
    with pytest.raises(UserError, match=r"--workdir .*study: "):
        study.main(arguments(tmp_path, "--shots", "1", "--seeds", "1"))


def test_only_the_built_in_patients_that_are_needed_are_made(trainings, tmp_path, monkeypatch):
    made = []

    def write_cohort(path, seeds):
        made.append((Path(path).name, seeds[0], len(seeds)))
        return SimpleNamespace(path=path)

    monkeypatch.setattr(builtin.phantom, "write_cohort", write_cohort)
    monkeypatch.setattr(builtin, "embedder", lambda train: "embedder")
    monkeypatch.setattr(embed, "restore", lambda workdir: workdir)
    monkeypatch.setattr(embed, "embed_store", lambda store, embedder: made.append((Path(store.path).name, embedder)))
    short = ["--shots", "1", "--seeds", "1", "--no-probes"]
    study.main(["--workdir", str(tmp_path / "given"), "--pretrained", "alice=runs/alice", *short])
    assert made == [("labelled", 5000, 22)]
    study.main(["--workdir", str(tmp_path / "ladder"), *short])
    assert made[1:] == [("labelled", 5000, 22), ("unlabelled", 3000, 24), ("unlabelled", "embedder")]
    assert trainings[2].data.store.endswith("unlabelled") and trainings[-1].data.store.endswith("labelled")


@pytest.mark.parametrize(
    "more, words",
    [
        (["--pretrained", "runs/alice"], "--pretrained runs/alice: give NAME=PATH"),
        (["--pretrained", "alice=a", "alice=b"], "--pretrained alice=b: alice names another arm"),
        (["--pretrained", "alice=a", "alice-frozen=b"], "alice-frozen names another arm"),
        (["--pretrained", "frozen=a"], "frozen names another arm"),
        (["--pretrained", "scratch=a"], "scratch names another arm"),
        (["--long-scratch", "-1"], "--long-scratch -1: give a whole number of 0 or more"),
        (["--seeds", "0"], "--seeds 0: give a whole number of 1 or more"),
        (["--steps", "-1"], "--steps -1: give a whole number of 0 or more"),
        (["--shots"], r"--shots \[\] --fractions \[\]: give numbers of 1 or more, or shares"),
        (["--shots", "0"], r"--shots \[0\] .*: give numbers of 1 or more"),
        (["--shots", "5", "5"], r"--shots \[5, 5\] .*, each but once"),
        (["--fractions", "0.5", "0.50"], r"--fractions \[0.5, 0.5\]: .*, each but once"),
        (["--overlap", "1"], "--overlap 1.0: give a share from 0 to below 1"),
        (["--held-out", "-0.1"], "--held-out -0.1: give a share from 0 to below 1"),
        (["--recipe", "nowhere.py:tiny"], "nowhere.py:tiny: .*name a configuration"),
    ],
)
def test_mistakes(trainings, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        study.main(arguments(tmp_path, *more))


FULL_SIZE = Contract(FRAME, (2.0, 2.0, 2.0), (-125.0, 225.0), (64, 64, 64))


def test_weights_that_do_not_fit_the_recipe_are_refused_before_the_first_training(
    store, no_training, tmp_path, monkeypatch
):
    weights = pretrained.Pretrained({}, {}, FULL_SIZE, "correct", "float32", False, "init_from runs/alice")
    monkeypatch.setattr(pretrained, "read", lambda path, which: weights)
    with pytest.raises(UserError, match=r"runs/alice: crop_shape_zyx is \(64, 64, 64\) there and \(32, 32, 32\) here"):
        study.main(arguments(tmp_path, "--store", store.path, "--shots", "1"))


@pytest.mark.parametrize(
    "recipe, pretraining, words",
    [
        ("configs/segment.py", "configs/pretrain.py:tiny", r"pretrain.py:tiny: crop_shape_zyx is \(32, 32, 32\) there"),
        (
            "configs/segment.py:tiny",
            "wide.py",
            r"wide.py: its backbone is not that of --recipe configs/segment.py:tiny",
        ),
    ],
)
def test_so_is_a_ladder_that_will_not_fit(store, no_training, tmp_path, monkeypatch, recipe, pretraining, words):
    monkeypatch.setattr(embeddings, "read_embedding", lambda *_: None)
    wide = tmp_path / "wide.py"
    wide.write_text(
        "from configs import pretrain\n"
        "def get_config(variant):\n"
        "    config = pretrain.get_config('tiny').unlock()\n"
        "    config.model.width = 48\n"
        "    return config\n"
    )
    settings = [
        "--shots",
        "1",
        "--recipe",
        recipe,
        "--pretraining",
        str(wide) if pretraining == "wide.py" else pretraining,
    ]
    with pytest.raises(UserError, match=words):
        study.main(["--workdir", str(tmp_path / "study"), "--store", store.path, "--unlabelled", store.path, *settings])
