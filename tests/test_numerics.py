"""An update that is not finite changes nothing, is written down, is counted, and is computed again by a command."""

import dataclasses
import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import noise_store
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import small, state_of

from alice_jax import broken, checkpoint, metrics, numerics, reproduce, sharding, tasks, train
from alice_jax.errors import UserError
from alice_jax.objectives import Objective
from alice_jax.reporting import runs
from alice_jax.train_state import TrainState

KEY = jax.random.key(0)
GOOD = np.arange(1.0, 9.0, dtype=np.float32)
BROKEN = {
    "loss": np.where(GOOD == 3, np.nan, GOOD),
    "gradient_norm": np.where(GOOD == 3, 0, GOOD),  # the square root of 0 has no slope
    "state_norm": np.where(GOOD == 3, 1e25, GOOD),  # whose square is no float32
}


def objective():
    """Learns w from the mean of √(w·x), by Adam; the extra state follows the mean of x."""

    def loss(params, extra, batch, key, step, train):
        return jnp.sqrt(params["w"] * batch["x"]).mean(), ({"mean": batch["x"].mean()}, {})

    return Objective(
        init=lambda key, batch: ({"w": jnp.float32(1)}, {"mean": jnp.float32(0)}),
        loss=loss,
        update=lambda params, extra, stats, step: {"mean": 0.9 * extra["mean"] + 0.1 * stats["mean"]},
        optimizer=optax.adam(0.01),
        schedules={},
    )


@functools.cache
def compiled(parts, devices):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    return mesh, sharding.compiled_init(objective(), 0, mesh), sharding.compiled_step(objective(), KEY, mesh, parts)


def trained(batches, parts, devices):
    """The states after each batch, as numpy."""
    mesh, init, step = compiled(parts, devices)
    state, states, noted = init({"x": GOOD}), [], []
    for x in batches:
        state, numbers = step(state, sharding.global_parts(mesh, {"x": x}, parts))
        states.append(jax.device_get(state))
        noted.append(jax.device_get(numbers))
    return states, noted


def assert_same_but_for_the_step(first, second):
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(first, step=0), dataclasses.replace(second, step=0))


@pytest.mark.parametrize(("parts", "devices"), [(1, 1), (2, 1), (1, 8), (4, 2)])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_update_changes_nothing_but_the_step(kind, parts, devices):
    states, noted = trained([GOOD, BROKEN[kind], GOOD], parts, devices)
    assert numerics.not_finite(noted[1])[0] == kind and not numerics.not_finite(noted[0])
    assert [int(state.step) for state in states] == [1, 2, 3]
    assert_same_but_for_the_step(states[1], states[0])
    assert not numerics.not_finite(noted[2]) and states[2].params["w"] != states[0].params["w"]


@settings(max_examples=10, deadline=None)
@given(order=st.lists(st.sampled_from(["good", *BROKEN]), min_size=1, max_size=6))
def test_a_run_with_broken_batches_is_the_run_without_them(order):
    states, _ = trained([BROKEN.get(kind, GOOD) for kind in order], 1, 1)
    good = [GOOD] * order.count("good")
    if good:
        assert_same_but_for_the_step(states[-1], trained(good, 1, 1)[0][-1])
    else:
        assert states[-1].params["w"] == 1


# ---------------------------------------------------------------- on disk


def test_rows_of_all_processes_make_the_batch_as_the_devices_held_it(tmp_path):
    workdir, place = str(tmp_path), broken.folder(str(tmp_path), 7)
    place.mkdir(parents=True)
    for process in (1, 0):
        assert broken.steps(workdir) == []  # not before the first process's file is there
        x = np.arange(4.0) + 4 * process
        scans = np.array([[f"Fall {int(i)} ü", "partner"] for i in x])
        update = broken.Update(7, 2, [{"x": x}], scans, {"loss": np.nan, "gradient_norm": 1.5})
        broken.write_rows(place / broken.FILE.format(process, 2), update)
    update = broken.read(workdir)
    assert update.step == 7 and update.metrics["gradient_norm"] == 1.5 and np.isnan(update.metrics["loss"])
    assert [part["x"].tolist() for part in update.batch()] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [sample["x"].item() for sample in update.samples()] == list(range(8))
    assert update.scans[:, 0].tolist() == [f"Fall {i} ü" for i in range(8)]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no update of this run was broken"):
        broken.read(str(tmp_path))
    place = broken.folder(str(tmp_path), 3)
    place.mkdir(parents=True)
    path = place / broken.FILE.format(0, 1)
    np.savez(path, step=np.array([{"pickled": "object"}], dtype=object))
    for damage in (lambda: None, lambda: path.write_bytes(path.read_bytes()[:40]), lambda: path.write_bytes(b"")):
        damage()
        with pytest.raises(UserError, match=r"batch-0-of-1\.npz: cannot be read"):
            broken.read(str(tmp_path))
    with pytest.raises(UserError, match=r"--step 4: .* has broken updates of the steps \[3\]"):
        broken.read(str(tmp_path), 4)


def watch(workdir, start=0, allowed=1):
    return broken.Watch(str(workdir), allowed=allowed, start=start, scans=["a", "b"], parts=1)


def test_skips_are_counted_over_the_whole_run_and_over_restarts(tmp_path):
    rows = {"x": np.zeros(1), "meta": {"scans": np.array([[1, 0]])}}
    fine = dict.fromkeys(numerics.GUARDED, 1.0)
    state = TrainState(jnp.int32(5), {"w": jnp.float32(2)}, {}, {})
    first = watch(tmp_path)
    assert first.examine(4, fine, state, rows) == "" and broken.steps(str(tmp_path)) == []
    words = first.examine(5, fine | {"loss": np.inf}, state, rows)
    assert words.startswith("step 5: loss not finite, with the scans a, b; left out, 1 of at most 1")
    assert watch(tmp_path, start=4).skipped == 0  # step 5 will come again
    again = watch(tmp_path, start=5)
    assert again.skipped == 1
    with pytest.raises(UserError, match=r"step 9: .*1 before it were left out.*--step 9.*numerics.skip \(now 1\)"):
        again.examine(9, fine | {"gradient_norm": np.nan}, dataclasses.replace(state, step=jnp.int32(9)), rows)
    like = jax.eval_shape(lambda: state)
    like = sharding.described(like, sharding.make_mesh())
    assert [int(broken.state_before(str(tmp_path), step, like).step) for step in (5, 9)] == [4, 8]


def test_a_batch_that_cannot_be_written_stops_the_run_though_it_might_skip(tmp_path):
    (tmp_path / "broken").write_text("in the way")
    rows = {"x": np.zeros(1), "meta": {"scans": np.array([0])}}
    state = TrainState(jnp.int32(5), {}, {}, {})
    with pytest.raises(UserError, match=r"step 5: loss not finite, .*; stopped, since its batch could not"):
        watch(tmp_path).examine(5, dict.fromkeys(numerics.GUARDED, 1.0) | {"loss": np.nan}, state, rows)


# ---------------------------------------------------------------- where it comes from


class Net(nn.Module):
    """`first` is finite, `second` divides by it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, kernel_init=nn.initializers.ones, name="first")(x)
        return Inverse(name="second")(x).sum()


class Inverse(nn.Module):
    @nn.compact
    def __call__(self, x):
        return 1 / x


def test_layers_are_noted_in_order_without_changing_the_loss():
    net = Net()

    def loss(params, extra, batch, key, step, train):
        return net.apply({"params": params}, batch["x"]), ({}, {"other": jnp.ones(())})

    params = net.init(KEY, jnp.ones((1, 3)))["params"]
    plain, layers = loss, numerics.with_layers(loss)
    for x, counts in ((jnp.ones((1, 3)), [0, 0, 0]), (jnp.zeros((1, 3)), [0, 2, 1])):
        (value, (_, noted)), gradients = jax.value_and_grad(layers, has_aux=True)(params, {}, {"x": x}, KEY, 0, True)
        assert value == plain(params, {}, {"x": x}, KEY, 0, True)[0] and noted["other"] == 1
        found = numerics.layers_of(jax.device_get(noted))
        names = ["0000 Net/first.__call__", "0001 Net/second.__call__", "0002 Net.__call__"]
        assert [layer.name for layer in found] == names and [layer.not_finite for layer in found] == counts
    assert found[0].largest == 0.0
    assert list(numerics.norm_by_layer(jax.device_get(gradients))) == ["first"]


@pytest.mark.parametrize(
    ("inputs", "layer", "changes", "words"),
    [
        (["a, b"], 1, {"loss": np.nan}, "reproduced: loss not finite; nor are the samples of a, b"),
        ([], 1, {"loss": np.nan}, "first in the output of Net/second"),
        ([], 0, {"loss": np.inf, "loss_alignment": np.inf}, "though every layer is finite: in loss_alignment"),
        ([], 0, {"gradient_norm": np.inf}, "reproduced: gradient_norm not finite, though the loss is finite"),
        ([], 0, {"state_norm": np.inf}, "the update itself is too large; lower optimizer.lr"),
        ([], 0, {}, "not reproduced: every number is finite here"),
    ],
)
def test_the_verdict_names_the_first_cause(inputs, layer, changes, words):
    now = dict.fromkeys((*numerics.GUARDED, "loss_alignment"), 1.0) | changes
    assert words in reproduce.verdict(inputs, numerics.Layer("Net/second", 1.0, layer), now)


# ---------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return noise_store(str(tmp_path_factory.mktemp("numerics") / "store"), scans=6).path


def with_numerics(store, validate_every, **changes):
    config = small(store, steps=3, checkpoint_every=1, validate_every=validate_every)
    with config.unlocked():
        config.numerics.update(changes)
    return config


def test_an_update_that_is_too_large_stops_the_run_and_the_command_computes_it_again(store, tmp_path, capsys):
    config, workdir = with_numerics(store, 1, effective_rank=1e6), str(tmp_path)
    with config.unlocked():
        config.optimizer.lr, config.optimizer.warmup = 1e30, "1 step"  # 0 in the first update
    with pytest.raises(UserError, match=r"step 2: state_norm not finite, with the scans case.*nothing of it"):
        train.run(config, workdir)
    warning = capsys.readouterr().err.split("step 1: features have collapsed or are about to: ")[1]
    assert "validation/effective_rank_crops" in warning and "(healthy: 1e+06 to inf)" in warning
    assert broken.steps(workdir) == [2] and broken.read(workdir).scans.shape == (8, 2)
    saved = state_of(workdir)
    assert saved["step"] == 1 and all(np.isfinite(x).all() for x in jax.tree.leaves(saved))
    assert reproduce.main(["--workdir", workdir]) == 0
    output = capsys.readouterr().out
    table = [line.split() for line in output.split("\n\n")[1].splitlines()]
    assert table[0] == ["metric", "in", "the", "run", "here"] and ["state_norm", "inf", "inf"] in table
    assert len(table) > 10 and all(there == here for _, there, here in table[1:])  # bit for bit
    assert output.endswith("the update itself is too large; lower optimizer.lr\n")
    assert "NNFormer/encoder_0" in output or "CASA" in output or "Head" in output


def test_a_run_stops_or_skips_and_goes_on_or_halts_at_a_collapse(store, tmp_path, monkeypatch):
    """Two starts of one run, whose second batch is poisoned."""
    make, workdir = tasks.make, str(tmp_path)

    def poisoned(config, store):
        task = make(config, store)

        def sampler(record, rng, batch_rng):
            sample = task.sampler(record, rng, batch_rng)
            if batch_rng.bit_generator.seed_seq.entropy == [0, 1, 1]:  # of seed 0, for whole batches, batch 1
                sample["volumes"][0, 3, 3, 3] = np.inf
            return sample

        return dataclasses.replace(task, sampler=sampler)

    monkeypatch.setattr(tasks, "make", poisoned)
    with pytest.raises(UserError, match="step 2: loss, gradient_norm, state_norm not finite"):
        train.run(with_numerics(store, 3), workdir)
    assert state_of(workdir)["step"] == 1
    with pytest.raises(UserError, match=r"step 3: features have collapsed .*validation/effective_rank_tokens .*saved"):
        train.run(with_numerics(store, 3, skip=1, collapse="stop", effective_rank=1e6), workdir)
    first, second, third = (checkpoint.restore_arrays(workdir, step)[1] for step in (1, 2, 3))
    assert (first.pop("step"), second.pop("step"), third.pop("step")) == (1, 2, 3)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert not np.array_equal(second["params"]["backbone"]["mask_token"], third["params"]["backbone"]["mask_token"])
    lines = [line for line in metrics.read(workdir) if "skipped_updates" in line]
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1] and "loss" not in lines[1]
    assert "not of steps 2: see" in next(c.text for c in runs.checks(runs.read(workdir)) if "All updates" in c.name)
    update = broken.read(workdir)
    assert [np.isinf(rows["volumes"][0, 0, 3, 3, 3, 0]) for rows in update.samples()] == [True] * 8


def test_the_command_names_a_mistake_in_one_line(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "alice_jax.reproduce", "--workdir", str(tmp_path)],
        capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith("error: --workdir") and process.stderr.count("\n") == 1
