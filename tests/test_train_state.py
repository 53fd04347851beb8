"""The step itself, on an objective small enough to check by hand: fit y = w·x, with a center as extra state."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alice_jax import sharding
from alice_jax.objectives import Objective

BATCH = {"x": jnp.arange(16.0).reshape(16, 1) / 16, "y": jnp.ones((16, 1))}


def objective():
    def loss(params, extra, batch, key, step, train):
        prediction = batch["x"] @ params["w"]
        value = jnp.square(prediction - batch["y"]).mean()
        return value, ({"mean": prediction.mean()}, {"noise": jax.random.uniform(key)})

    return Objective(
        init=lambda key, batch: ({"w": jnp.ones((1, 1))}, {"mean": jnp.zeros(())}),
        loss=loss,
        update=lambda params, extra, stats, step: {"mean": 0.9 * extra["mean"] + 0.1 * stats["mean"]},
        optimizer=optax.sgd(0.5),
        schedules={"learning_rate": lambda step: 0.5 + step},
    )


KEY = jax.random.key(0)


def run(steps, batch=BATCH, parts=1, devices=1):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    step = sharding.compiled_step(objective(), KEY, mesh, parts)
    state, metrics = sharding.compiled_init(objective(), 0, mesh)(batch), None
    rows = {name: np.asarray(value) for name, value in batch.items()}
    for _ in range(steps):
        state, metrics = step(state, sharding.global_parts(mesh, rows, parts))
    return state, metrics


def test_one_step_by_hand():
    state, metrics = run(1)
    x = np.arange(16) / 16
    gradient = 2 * np.mean((x - 1) * x)
    assert metrics["loss"] == pytest.approx(np.mean((x - 1) ** 2))
    assert metrics["gradient_norm"] == pytest.approx(abs(gradient))
    assert metrics["learning_rate"] == 0.5
    assert float(state.params["w"][0, 0]) == pytest.approx(1 - 0.5 * gradient)
    assert float(state.extra["mean"]) == pytest.approx(0.1 * x.mean())
    assert state.step == 1


@pytest.mark.parametrize(("parts", "devices"), [(2, 1), (16, 1), (1, 8), (2, 8)])
def test_parts_and_devices_change_nothing_but_rounding(parts, devices):
    (whole, _), (split, metrics) = run(3), run(3, parts=parts, devices=devices)
    np.testing.assert_allclose(split.params["w"], whole.params["w"], rtol=1e-6)
    np.testing.assert_allclose(split.extra["mean"], whole.extra["mean"], rtol=1e-6)
    assert metrics["learning_rate"] == 2.5


def test_every_step_draws_new_numbers_and_the_same_ones_again():
    noise = [float(run(steps)[1]["noise"]) for steps in (1, 2, 3)]
    assert len(set(noise)) == 3
    assert noise == [float(run(steps)[1]["noise"]) for steps in (1, 2, 3)]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_second_step_compiles_nothing(parts):
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    step = sharding.compiled_step(objective(), KEY, mesh, parts)
    state = sharding.compiled_init(objective(), 0, mesh)(BATCH)
    batch = sharding.global_parts(mesh, {name: np.asarray(value) for name, value in BATCH.items()}, parts)
    assert batch[0]["x"].addressable_shards[0].data.shape == (2 // parts, 1)
    state, _ = step(state, batch)
    with jax.transfer_guard("disallow"), no_compilation():
        step(state, batch)


@contextlib.contextmanager
def no_compilation():
    """Fails when JAX compiles anything."""
    seen = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: seen.append(event) if "backend_compile" in event else None
    )
    yield
    assert not seen, seen


def test_a_batch_that_does_not_divide_is_refused():
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="batch_size 12"):
        sharding.parts_of_batch(12, 0, mesh)
    with pytest.raises(ValueError, match="microbatch 3"):
        sharding.parts_of_batch(16, 3, mesh)
    assert sharding.parts_of_batch(16, 0, mesh) == 2  # one sample at a time on each CPU device
    assert sharding.parts_of_batch(16, 2, mesh) == 1
