"""The step itself, on an objective small enough to check by hand: fit y = w·x, with a center as extra state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alice_jax import sharding, train_state
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


def run(steps, batch=BATCH, micro_batches=1):
    step = jax.jit(train_state.make_train_step(objective(), KEY, micro_batches))
    state, metrics = train_state.create(objective(), KEY, batch), None
    for _ in range(steps):
        state, metrics = step(state, batch)
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


@pytest.mark.parametrize("micro_batches", [2, 4, 16])
def test_micro_batches_change_nothing_but_rounding(micro_batches):
    (whole, _), (parts, metrics) = run(3), run(3, micro_batches=micro_batches)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-6)
    np.testing.assert_allclose(parts.extra["mean"], whole.extra["mean"], rtol=1e-6)
    assert metrics["learning_rate"] == 2.5


def test_every_step_draws_new_numbers_and_the_same_ones_again():
    noise = [float(run(steps)[1]["noise"]) for steps in (1, 2, 3)]
    assert len(set(noise)) == 3
    assert noise == [float(run(steps)[1]["noise"]) for steps in (1, 2, 3)]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_eight_devices_compute_the_same_as_one_and_compile_once(micro_batches):
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    everywhere, by_sample = sharding.replicated(mesh), sharding.by_sample(mesh)
    step = jax.jit(
        train_state.make_train_step(objective(), KEY, micro_batches),
        in_shardings=(everywhere, by_sample),
        out_shardings=everywhere,
        donate_argnums=0,
    )
    state = jax.jit(lambda: train_state.create(objective(), KEY, BATCH), out_shardings=everywhere)()
    batch = sharding.global_batch(mesh, {name: np.asarray(value) for name, value in BATCH.items()})
    assert len(batch["x"].addressable_shards) == 8 and batch["x"].addressable_shards[0].data.shape == (2, 1)
    for _ in range(3):
        state, _ = step(state, batch)
    assert step._cache_size() == 1
    np.testing.assert_allclose(state.params["w"], run(3)[0].params["w"], rtol=1e-6)


def test_a_batch_that_does_not_divide_is_refused():
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="batch_size 12"):
        sharding.micro_batches(12, 0, mesh)
    with pytest.raises(ValueError, match="microbatch 3"):
        sharding.micro_batches(16, 3, mesh)
    assert sharding.micro_batches(16, 0, mesh) == 2  # one sample at a time on each CPU device
    assert sharding.micro_batches(16, 2, mesh) == 1
