"""CASA: what it attends to, its residual in either mode, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_weights

from alice_jax.models.casa import CASA

MODEL = CASA(width=8, inner=12, heads=2, head_dim=4)
RNG = np.random.default_rng(0)
QUERY, CONTEXT = (jnp.asarray(RNG.standard_normal((2, n, 8)), jnp.float32) for n in (3, 5))


@pytest.fixture(scope="module")
def weights():
    return random_weights(jax.eval_shape(MODEL.init, jax.random.key(0), QUERY, CONTEXT))


def test_published_size():
    """[R]'s 12,068,352 less the 8,918,016 of projections that it never uses."""
    model, token = CASA(512, 2048, 8, 64, query_residual=True), jnp.ones((1, 1, 512))
    shapes = jax.eval_shape(model.init, jax.random.key(0), token, token)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 12_068_352 - 8_918_016


def test_attention_sums_to_one_and_ignores_the_order_of_the_context(weights):
    attention = MODEL.apply(weights, QUERY, CONTEXT, method="attention")
    assert attention.shape == (2, 2, 3, 5)
    np.testing.assert_allclose(attention.sum(-1), 1.0, atol=1e-6)
    out, reversed_out = (MODEL.apply(weights, QUERY, context) for context in (CONTEXT, CONTEXT[:, ::-1]))
    np.testing.assert_allclose(out, reversed_out, atol=1e-5)


def test_without_values_the_query_is_forgotten_in_paper_mode_only(weights):
    """No residual from the query: with nothing attended to, all queries look the same (method: figure 3)."""
    silent = {"params": weights["params"] | {"value": jax.tree.map(jnp.zeros_like, weights["params"]["value"])}}
    paper = MODEL.apply(silent, QUERY, CONTEXT)
    release = MODEL.clone(query_residual=True).apply(silent, QUERY, CONTEXT)
    np.testing.assert_allclose(paper, jnp.broadcast_to(paper[:1, :1], paper.shape), atol=1e-6)
    assert np.abs(release - release[:1, :1]).max() > 0.1


def test_dropout_acts_in_training_only(weights):
    run = lambda key, train: MODEL.apply(weights, QUERY, CONTEXT, train, rngs={"dropout": jax.random.key(key)})  # noqa: E731
    np.testing.assert_array_equal(run(1, False), run(2, False))
    assert not np.array_equal(run(1, True), run(2, True))


def test_bfloat16_keeps_float32_parameters_and_attention(weights):
    model = MODEL.clone(dtype=jnp.bfloat16)
    assert model.apply(weights, QUERY, CONTEXT).dtype == jnp.bfloat16
    assert model.apply(weights, QUERY, CONTEXT, method="attention").dtype == jnp.float32
