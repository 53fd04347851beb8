"""Optimizer groups by rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alice_jax import optimizer

PARAMS = {
    "body": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "last": {"weight": jnp.ones(3), "gain": jnp.ones(3)},
}
RULES = [("gain$", "frozen"), ("^last/", "held"), ("bias$", "plain"), ("", "decayed")]


def make(held_steps=2, clip=None):
    return optimizer.grouped_adamw(
        learning_rate=lambda step: 0.1 * (step + 1),
        weight_decay=lambda step: 0.5,
        group_rules=RULES,
        clip=clip or optax.identity(),
        held_steps=held_steps,
    )


def steps(transformation, gradients, count):
    params, state = PARAMS, transformation.init(PARAMS)
    for _ in range(count):
        updates, state = transformation.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_first_rule_wins_and_every_parameter_needs_one():
    assert optimizer.by_rules(PARAMS, RULES)["last"] == {"weight": "held", "gain": "frozen"}
    with pytest.raises(ValueError, match="body/kernel"):
        optimizer.by_rules(PARAMS, RULES[:-1])


def test_groups_with_zero_gradients_show_the_decay_alone():
    zero = {
        "body": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)},
        "last": {"weight": jnp.zeros(3), "gain": jnp.zeros(3)},
    }
    params = steps(make(), zero, 1)
    np.testing.assert_allclose(params["body"]["kernel"], 1 - 0.1 * 0.5)
    np.testing.assert_allclose(params["body"]["bias"], 1.0)
    np.testing.assert_allclose(params["last"]["weight"], 1.0)


def test_held_parameters_start_late_with_fresh_moments_and_the_current_rate():
    ones = {
        "body": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "last": {"weight": jnp.ones(3), "gain": jnp.ones(3)},
    }
    np.testing.assert_allclose(steps(make(), ones, 2)["last"]["weight"], 1.0)
    # Third update: rate 0.3, Adam's first step is 1, decay 0.5.
    np.testing.assert_allclose(steps(make(), ones, 3)["last"]["weight"], 1 - 0.3 * (1 + 0.5), rtol=1e-5)
    np.testing.assert_allclose(steps(make(), ones, 3)["last"]["gain"], 1.0)


def test_the_state_is_built_alike_however_long_parameters_are_held():
    states = [make(held_steps=count).init(PARAMS) for count in (0, 2)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_clipping_each_tensor_leaves_small_ones_alone():
    gradients = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.3, 0.4])}
    clipped, _ = optimizer.clip_each_tensor(1.0).update(gradients, optax.EmptyState())
    np.testing.assert_allclose(clipped["a"], [0.6, 0.8], rtol=1e-5)
    np.testing.assert_array_equal(clipped["b"], gradients["b"])
