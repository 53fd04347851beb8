"""The loop on a network of two stages: it logs, validates, resumes exactly, stops when asked, refuses mistakes."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags
from builders import noise_store

from alice_jax import checkpoint, metrics, provenance, settings, tasks, train
from alice_jax.coverage import read as coverage_of
from alice_jax.data.store import Store
from alice_jax.errors import UserError
from configs import embedder, pretrain

SMALL = "tests/configs/small.py"


def small(store: str, **changes):
    """The small recipe on random views."""
    config = runpy.run_path(SMALL)["get_config"]()
    with config.unlocked():
        config.data.store, config.views.kind = store, "random"
        config.update(changes)
    return config


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return noise_store(str(tmp_path_factory.mktemp("train") / "store"), scans=6).path


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """The workdir of a whole run."""
    workdir = str(tmp_path_factory.mktemp("finished"))
    assert train.run(small(store), workdir) == 0
    return workdir


def state_of(workdir):
    return checkpoint.restore_arrays(workdir)[1]


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def without_times(workdir):
    timed = ("step_time_s", "data_wait_s", "volumes_per_s")
    return [{name: v for name, v in line.items() if name not in timed} for line in metrics.read(workdir)]


def test_a_run_logs_everything_that_is_promised(finished):
    lines = metrics.read(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    for name in (
        "loss", "loss_invariance", "loss_alignment", "loss_reconstruction", "teacher_entropy", "norm_center_cls",
        "views/score", "views/redraws", "views/weak", "views/fallback", "views/weight", "coverage/share",
        "coverage/key_most", "step_time_s", "data_wait_s", "volumes_per_s", "learning_rate", "gradient_norm",
    ):  # fmt: skip
        assert np.isfinite(lines[0][name]), name
    assert np.isfinite(lines[-1]["validation/loss"])
    coverage = coverage_of(finished)
    assert sum(coverage["counts"].values()) == 2 * 8 * 4 and len(coverage["counts"]) == 4  # 2 of 6 scans held out
    assert sum(coverage["keys"].values()) == 8 * 4
    assert "views/cycle_mm" not in lines[0]  # nothing was matched
    assert state_of(finished)["step"] == 4
    assert set(state_of(finished)["params"]) == {"backbone", "head", "casa"}  # CASA too, unlike the release


def test_the_same_seed_gives_the_same_numbers_and_stopping_between_changes_none(finished, store, tmp_path):
    workdir = str(tmp_path)
    assert train.run(small(store, steps=2), workdir) == 0
    first = without_times(workdir)
    assert first[0]["loss"] == metrics.read(finished)[0]["loss"]
    # The schedules know of the run's length, so the interrupted run must be one of four steps from the start.
    stopped = str(tmp_path / "stopped")
    assert run_until(small(store), stopped, step=2) == 128 + signal.SIGTERM
    assert train.run(small(store), stopped) == 0
    assert_same(state_of(stopped), state_of(finished))
    assert without_times(stopped) == without_times(finished)
    assert [entry["step"] for entry in provenance.read(stopped)] == [0, 2]


def run_until(config, workdir, step):
    """Runs and raises SIGTERM when `step` has been logged."""
    log = metrics.Metrics.step

    def logged(self, done, scalars):
        log(self, done, scalars)
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    metrics.Metrics.step = logged
    try:
        return train.run(config, workdir)
    finally:
        metrics.Metrics.step = log


def test_killed_while_it_writes_a_checkpoint(finished, store, tmp_path):
    """At random moments, with batches compared and mined points: test_resume."""
    process = command(f"--config={SMALL}", f"--workdir={tmp_path}", f"--config.data.store={store}",
                      "--config.views.kind=random")  # fmt: skip
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("checkpoints/*.orbax-checkpoint-tmp")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert train.run(small(store), str(tmp_path)) == 0
    assert_same(state_of(str(tmp_path)), state_of(finished))
    assert without_times(str(tmp_path)) == without_times(finished)
    assert coverage_of(str(tmp_path)) == coverage_of(finished)


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(finished, store, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    largest = max((workdir / "checkpoints" / "4").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert train.run(small(store), str(workdir)) == 0
    said = capsys.readouterr().err
    assert f"{largest.name} is not as it was written" in said and "resuming at step 2 of 4" in said
    assert_same(state_of(str(workdir)), state_of(finished))
    assert without_times(str(workdir)) == without_times(finished)
    assert coverage_of(str(workdir)) == coverage_of(finished)


def test_validating_often_leaves_training_as_it_is(finished, store, tmp_path):
    # The release stays in evaluation mode after its first validation, and validation moves its centers.
    workdir = str(tmp_path)
    assert train.run(small(store, validate_every=1), workdir) == 0
    assert_same(state_of(workdir), state_of(finished))


def test_every_training_scan_is_used(finished):
    assert metrics.read(finished)[-2]["coverage/share"] == 1.0
    assert min(coverage_of(finished)["counts"].values()) >= 8  # as the query alone, 8 of 32 samples


def test_a_finished_run_is_left_as_it_is(finished, store):
    before = without_times(finished)
    assert train.run(small(store), finished) == 0
    assert without_times(finished) == before


def test_a_workdir_of_another_run_is_refused(finished, store):
    with pytest.raises(UserError, match=r"seed 0 there and 1 here"):
        train.run(small(store, seed=1), finished)


def test_nested_tuples_of_a_configuration_are_the_same_when_read_back(tmp_path):
    config = embedder.get_config("tiny")
    for _ in range(2):
        settings.claim(str(tmp_path), config)
    with config.unlocked():
        config.model.stage_kernels_zyx = ((1, 1, 1),) * 4
    with pytest.raises(UserError, match=r"model\.stage_kernels_zyx"):
        settings.claim(str(tmp_path), config)


def test_a_run_from_before_meshes_had_settings_goes_on(tmp_path):
    config = pretrain.get_config("tiny")
    checkpoint.write_config(str(tmp_path), {name: value for name, value in config.to_dict().items() if name != "mesh"})
    settings.claim(str(tmp_path), config)
    assert checkpoint.read_config(str(tmp_path))["mesh"]["parameters"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"batch_size": -1}, "batch_size -1"),
        ({"batch_size": 9}, "batch_size 9: must be a multiple of the number of devices"),
        ({"mesh.parameters": 3}, "mesh.parameters 3: must divide the number of devices, 8"),
        ({"mesh.rules": (("heed", 1), ("", 1))}, "mesh.rules 'heed': is no parameter's first match"),
        ({"objective": "dino"}, "objective 'dino'"),
        ({"precision": "float64"}, "precision 'float64'"),
        ({"seed": -1}, "seed -1"),
        ({"data.timeout_s": 0.0}, "data.timeout_s 0.0"),
        ({"numerics.skip": -1}, "numerics.skip -1"),
        ({"numerics.collapse": "panic"}, "numerics.collapse 'panic'"),
        ({"views.kind": "random_crops"}, "views.kind 'random_crops'"),
        ({"views.mask_ratio": 1.5}, "views.mask_ratio 1.5"),
        ({"views.weak": "drop"}, "views.weak 'drop': choose keep, down-weight or redraw"),
        ({"views.weak_weight": -1.0}, "views.weak_weight -1.0"),
        ({"views.cycle_mm": 0.0}, "views.cycle_mm 0.0"),
        ({"views.tries": 0}, "views.tries 0"),
        ({"views.same_patient": "never"}, "views.same_patient 'never': choose avoid or allow"),
        ({"views.partners": "all"}, "views.partners 'all': choose region or any"),
        ({"data.patients": "/no/such/file.csv"}, "data.patients /no/such/file.csv"),
        ({"views.crop_shape_zyx": (16, 16, 15)}, "views.crop_shape_zyx"),
        ({"loss.invariance": -1.0}, "loss"),
        ({"method.mode": "both"}, "method.mode 'both'"),
        (
            {"optimizer.weight_decay": (0.04, -0.4)},
            r"optimizer.weight_decay \(0.04, -0.4\): give a number of 0 or more",
        ),
        ({"optimizer.warmup": "soon"}, "optimizer.warmup 'soon'"),
        ({"data.validation_fraction": 1.0}, "data.validation_fraction 1.0"),
    ],
)
def test_mistakes_in_the_configuration_are_named(store, tmp_path, change, message):
    config = small(store)
    with config.unlocked():
        config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        train.run(config, str(tmp_path / "run"))


@pytest.mark.parametrize("scans", [0, 1])
def test_a_store_without_a_pair_is_refused(tmp_path, scans):
    with pytest.raises(UserError, match=f"holds {scans} scans and a pair needs two; prepare more"):
        train.run(small(noise_store(str(tmp_path / "store"), scans=scans).path), str(tmp_path / "run"))


def test_a_store_of_one_patient_is_refused_and_may_be_allowed(store, tmp_path):
    table = tmp_path / "patients.json"
    table.write_text(json.dumps({f"case{i}": "Ann" for i in range(6)}))
    config = small(store)
    with config.unlocked():
        config.data.patients = str(table)
    with pytest.raises(UserError, match=r"6 scans are all of one patient .* set views.same_patient to allow") as error:
        train.run(config, str(tmp_path / "run"))
    assert "\n" not in str(error.value)
    with config.unlocked():
        config.views.same_patient = "allow"
    assert len(tasks.make(config, Store.open(store)).scans) == 4


def test_scans_of_one_patient_are_held_out_together():
    patients = {"a1": "Ann", "a2": "Ann", "b1": "Bob", "c1": "Cid", "c2": "Cid", "d1": "Dan"}
    kept, held_out = tasks.split(sorted(patients), 0.5, at_least=1, patients=patients)
    assert held_out == ("a1", "a2", "c1", "c2") and kept == ("b1", "d1")


def test_a_large_share_leaves_as_many_to_train_on_as_are_needed():
    assert tasks.split("abcde", 0.95, at_least=1) == (("e",), tuple("abcd"))
    assert tasks.split("abcde", 0.95, at_least=2) == (("c", "e"), ("a", "b", "d"))
    assert tasks.split("abc", 0.5, at_least=2) == (tuple("abc"), ())


def test_mining_without_embeddings_is_refused(store, tmp_path):
    config = small(store)
    with config.unlocked():
        config.views.kind = "mined"
    with pytest.raises(UserError, match="embed"):
        train.run(config, str(tmp_path))


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "alice_jax.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        **options,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config"),
        (["--config=configs/pretrain.py:huge"], "huge"),
        (["--config=configs/pretrain.py", "--config.stepps=3"], "stepps"),
        (["--config=configs/pretrain.py", "--config.steps=many"], "steps"),
        (["--config=configs/pretrain.py", "--unknown=3"], "unknown"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments, message):
    flags.FLAGS.unparse_flags()
    with pytest.raises(UserError, match=message) as raised:
        train.main(arguments)
    assert "Traceback" not in str(raised.value)


def test_the_built_in_cohort_is_made_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("ALICE_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(train.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"data\.store: not set, .* run the same command in one process first"):
        train.built_in_store(small(None))


def test_mistakes_are_one_line_and_exit_1(tmp_path):
    store = ["--config=configs/pretrain.py:tiny", "--config.data.store=/no/such/store", f"--workdir={tmp_path}"]
    started = {
        word: command(*arguments)
        for word, arguments in (("no_such_file", ["--config=no_such_file.py"]), ("/no/such/store", store))
    }
    for word, process in started.items():
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and output == ""
        lines = [line for line in errors.splitlines() if "Warning" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0], errors


def test_the_first_line_says_what_is_read(store, tmp_path, monkeypatch, capsys):
    def takes_minutes(*_):
        raise UserError("still at it")

    monkeypatch.setattr(tasks, "make", takes_minutes)
    with pytest.raises(UserError, match="still at it"):
        train.run(small(store), str(tmp_path))
    assert f"reading the store {store}\n" in capsys.readouterr().err


def test_a_teacher_that_would_stay_near_its_random_start_is_warned_of(store):
    """Half a cosine from 0.996 to 1 leaves it exp(−0.002 × steps) of that: 37 % after 500 steps, 2 % after 2,000."""
    config, notes = small(store), {}
    with config.unlocked():
        config.method.teacher_momentum = (0.996, 1.0)
        for config.steps in (500, 2000):
            notes[config.steps] = tasks.make(config, Store.open(store)).notes
    assert notes[2000] == () and notes[500][0].startswith("warning: 37% of the teacher")


def test_help_says_how_to_use_it(capsys):
    assert train.main(["--help"]) == 0
    output = capsys.readouterr().out
    assert "--config=configs/pretrain.py" in output and "--workdir" in output


def test_variants_are_locked_and_named():
    for module in (pretrain, embedder):
        assert module.get_config().is_locked
        with pytest.raises(ValueError, match="huge"):
            module.get_config("huge")
