"""Spread of features: what a person can compute, what must never change it, and what counts as collapsed."""

import math
import runpy

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import random_weights

from alice_jax import collapse, tasks
from alice_jax.errors import UserError
from configs import embedder, pretrain

RNG = np.random.default_rng(0)
RANGES = {"variance": (0.001, math.inf), "effective_rank": (1.5, math.inf)}


@pytest.mark.parametrize(
    ("features", "variance", "rank"),
    [
        pytest.param(np.eye(4), 0.75, 4, id="four at right angles"),
        pytest.param(np.array([[1, 0], [-1, 0]]), 1, 1, id="two opposite: all of the variance, one direction"),
        pytest.param(np.array([[3, 4], [6, 8]]), 0, 1, id="the same direction at two lengths"),
        pytest.param(np.diag([2, 2, 1, 1]), 0.75, math.exp(2 / 3 * math.log(3) + math.log(6) / 3), id="1/3 and 1/6"),
        pytest.param(np.zeros((3, 2)), 0, 1, id="nothing at all"),
    ],
)  # fmt: skip
def test_by_hand(features, variance, rank):
    assert collapse.variance(features) == pytest.approx(variance, abs=1e-12)
    assert collapse.effective_rank(features) == pytest.approx(rank)


def test_collapsed_and_healthy_features_are_told_apart():
    healthy = RNG.normal(size=(512, 32)).astype(np.float32)
    same = np.repeat(healthy[:1], 512, axis=0)  # in float32, whose rounding must not count as directions
    nearly = same + 1e-3 * healthy
    line = np.linspace(-1, 1, 512, dtype=np.float32)[:, None] * healthy[:1]
    measured = {name: collapse.spread([{"t": f}]) for name, f in
                (("healthy", healthy), ("same", same), ("nearly", nearly), ("line", line))}  # fmt: skip
    assert collapse.judged(measured["healthy"], RANGES) == ""
    assert measured["healthy"]["effective_rank_t"] == pytest.approx(32, rel=0.05)
    assert measured["healthy"]["variance_t"] == pytest.approx(1, abs=0.01)
    assert measured["same"]["effective_rank_t"] == pytest.approx(1, abs=1e-3)
    assert "variance_t" in collapse.judged(measured["nearly"], RANGES)
    assert "effective_rank_t 1 " in collapse.judged(measured["line"], RANGES)
    assert "variance" not in collapse.judged(measured["line"], RANGES)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 20), channels=st.integers(1, 20), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_scale_order_and_batching_change_nothing(rows, channels, scale, seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, channels))
    whole = collapse.spread([{"x": features}])
    cut = rng.integers(0, rows + 1)
    shuffled = scale * rng.permutation(features)
    split = collapse.spread([{"x": shuffled[:cut]}, {"x": shuffled[cut:]}])
    assert split == pytest.approx(whole, rel=1e-6, abs=1e-9)
    assert 1 - 1e-9 <= whole["effective_rank_x"] <= min(rows, channels) + 1e-9
    assert -1e-9 <= whole["variance_x"] <= 1 + 1e-9


def test_features_that_are_not_finite_are_not_healthy():
    words = collapse.judged(collapse.spread([{"x": np.full((3, 2), np.nan)}]), RANGES)
    assert "variance_x nan" in words and "effective_rank_x nan" in words


def test_limits_come_from_the_configuration():
    config = pretrain.get_config()
    most = math.log(config.model.prototypes)
    ranges = tasks.healthy_ranges(config)
    assert ranges["validation/teacher_entropy"] == pytest.approx((0.02 * most, 0.995 * most))
    healthy = {"validation/teacher_entropy": 3.0, "validation/teacher_entropy_tokens": 3.0, "validation/loss": 0.0}
    assert collapse.judged(healthy, ranges) == ""
    assert "teacher_entropy_tokens 0.001" in collapse.judged(
        healthy | {"validation/teacher_entropy_tokens": 1e-3}, ranges
    )
    assert "teacher_entropy 6.24" in collapse.judged(healthy | {"validation/teacher_entropy": most}, ranges)
    assert set(tasks.healthy_ranges(embedder.get_config())) == {"validation/variance", "validation/effective_rank"}
    with config.unlocked():
        config.numerics.collapse = "ignore"
    assert tasks.healthy_ranges(config) == {}
    with config.unlocked():
        config.numerics.collapse = "panic"
    with pytest.raises(UserError, match=r"numerics\.collapse 'panic': choose warn, stop, ignore"):
        tasks.healthy_ranges(config)


def test_features_of_alice_are_the_teachers_tokens_and_their_means():
    config = runpy.run_path("tests/configs/small.py")["get_config"]()
    alice = tasks.pretrain.networks(config)
    batch = {"volumes": RNG.random((3, 2, 16, 16, 16, 1), np.float32)}
    params, extra = random_weights(jax.eval_shape(alice.init, jax.random.key(0), batch))
    compute = jax.jit(alice.features)
    features = compute(params, extra, batch)
    assert features["crops"].shape == (6, 16) and features["tokens"].shape == (6 * 4**3, 16)
    np.testing.assert_allclose(features["crops"], features["tokens"].reshape(6, 64, 16).mean(1), rtol=1e-5, atol=1e-6)
    no_student = jax.tree.map(np.zeros_like, params)
    np.testing.assert_array_equal(compute(no_student, extra, batch)["crops"], features["crops"])
