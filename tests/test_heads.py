"""The projection head: which layer serves which feature, normalisation, gains, the release's copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_weights

from alice_jax.models.heads import Head, shared_last

HEAD = Head(width=16, hidden=12, bottleneck=8, prototypes=5, token_prototypes=7)
CLS, ENCODER, DECODER = jnp.ones((2, 16)), jnp.ones((2, 3, 16)), jnp.ones((2, 4, 8))


@pytest.fixture(scope="module")
def weights():
    return random_weights(jax.eval_shape(HEAD.init, jax.random.key(0), CLS, ENCODER, DECODER))


def test_shapes(weights):
    cls, encoder, decoder = HEAD.apply(weights, CLS, ENCODER, DECODER)
    assert (cls.shape, encoder.shape, decoder.shape) == ((2, 5), (2, 3, 7), (2, 4, 7))


def test_default_size():
    shapes = jax.eval_shape(
        Head().init, jax.random.key(0), jnp.ones((1, 384)), *(jnp.ones((1, 1, c)) for c in (384, 192))
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 5_994_496


def test_logits_are_cosines_with_the_prototypes(weights):
    """With gains of 1, a prototype's own direction scores 1 whatever its length."""
    params = jax.tree.map(jnp.asarray, weights["params"])
    params["last"] = params["last"] | {"gain": jnp.ones(5)}
    direction = params["last"]["direction"].T * jnp.arange(1, 6)[:, None]
    logits = HEAD.apply({"params": params}, direction, "cls", method="logits")
    np.testing.assert_allclose(np.diag(logits), 1.0, atol=1e-6)
    assert np.abs(logits).max() <= 1 + 1e-6


def test_a_zero_feature_has_a_finite_gradient(weights):
    gradient = jax.grad(lambda x: HEAD.apply(weights, x, "cls", method="logits").sum())(jnp.zeros((1, 8)))
    assert np.isfinite(gradient).all()


def test_gains_are_not_trained_unless_asked(weights):
    def gradient(model):
        return jax.grad(lambda w: sum(x.sum() for x in model.apply(w, CLS, ENCODER, DECODER)))(weights)["params"]

    frozen, free = gradient(HEAD), gradient(HEAD.clone(train_gain=True))
    assert not np.any(frozen["last"]["gain"]) and np.any(free["last"]["gain"])
    assert np.any(frozen["last_tokens"]["direction"])


def test_a_shared_last_layer_serves_cls_and_tokens(weights):
    shared = HEAD.clone(separate_last=False, prototypes=7)
    params = {"params": shared_last(weights["params"])}
    features = jnp.ones((2, 8))
    got = [shared.apply(params, features, kind, method="logits") for kind in ("cls", "tokens")]
    np.testing.assert_array_equal(*got)
    np.testing.assert_array_equal(got[0], HEAD.apply(weights, features, "tokens", method="logits"))


@pytest.mark.parametrize(("method", "argument"), [("project", "voxels"), ("logits", "encoder")])
def test_unknown_sources_are_refused(weights, method, argument):
    with pytest.raises(ValueError, match="choose"):
        HEAD.apply(weights, jnp.ones((1, 8)), argument, method=method)
