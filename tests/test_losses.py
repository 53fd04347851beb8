"""Losses against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alice_jax import losses


def test_teacher_distribution_is_centred_sharpened_and_without_gradient():
    logits, center = jnp.array([0.02, 0.0]), jnp.array([0.01, 0.0])
    target = losses.teacher_distribution(logits, center, 0.01)
    np.testing.assert_allclose(target, [np.e / (np.e + 1), 1 / (np.e + 1)], rtol=1e-5)
    gradient = jax.grad(lambda x: losses.teacher_distribution(x, center, 0.01)[0])(logits)
    np.testing.assert_array_equal(gradient, 0.0)


def test_invariance_crosses_patients_and_alignment_does_not():
    # The student copies its own view's target exactly, so only the same-view loss is small.
    target = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])  # (batch 1, view 2, prototypes 2)
    student = 10.0 * target
    assert losses.alignment(target[:, :, None], student[:, :, None]) < 1e-6
    assert losses.invariance(target, student) == pytest.approx(100.0)  # logits 10 / τ 0.1
    assert losses.invariance(target[:, ::-1], student) < 1e-6


def test_reconstruction_counts_hidden_voxels_only():
    volumes = jnp.zeros((1, 4, 4, 4, 1))
    hidden = jnp.zeros((1, 2, 2, 2), bool).at[0, 0, 1, 1].set(True)
    prediction = volumes.at[0, 0:2, 2:4, 2:4, 0].set(3.0)  # error 9 in the hidden block
    prediction = prediction.at[0, 0, 0, 0, 0].set(100.0)  # visible, not counted
    assert losses.reconstruction(prediction, volumes, hidden) == pytest.approx(9.0)
    assert losses.reconstruction(prediction, volumes, None) == pytest.approx((8 * 9 + 1e4) / 64)


def test_weights_of_one_change_no_bit_and_others_scale_their_sample():
    rng = np.random.default_rng(0)
    target, student = (jnp.asarray(rng.random((3, 2, 5, 7)), jnp.float32) for _ in range(2))
    volumes, prediction = (jnp.asarray(rng.random((3, 4, 4, 4, 1)), jnp.float32) for _ in range(2))
    hidden = jnp.asarray(np.arange(8).reshape(1, 2, 2, 2).repeat(3, 0) < 6)
    for loss in (
        lambda w: losses.alignment(target, student, w),
        lambda w: losses.invariance(target[:, :, 0], student[:, :, 0], w),
        lambda w: losses.reconstruction(prediction, volumes, hidden, w),
        lambda w: losses.reconstruction(prediction, volumes, None, w),
    ):
        assert loss(jnp.ones(3)) == loss(None)
        parts = [loss(jnp.asarray(row)) for row in np.diag([1.0, 0.5, 0.0]).astype(np.float32)]
        assert loss(jnp.array([1.0, 0.5, 0.0])) == pytest.approx(float(sum(parts)), rel=1e-5)
        assert parts[2] == 0


def test_center_moves_a_tenth_of_the_way():
    np.testing.assert_allclose(losses.moved_center(jnp.array([1.0]), jnp.array([2.0])), [1.1], rtol=1e-6)


def test_entropy_extremes():
    assert losses.entropy(jnp.eye(4)) == 0.0
    assert losses.entropy(jnp.full((2, 8), 1 / 8)) == pytest.approx(np.log(8), rel=1e-6)
