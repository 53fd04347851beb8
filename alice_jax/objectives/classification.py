"""Classification of scans: one of K classes (softmax) or several labels at once (a sigmoid each).

    crops (batch, crops, d, h, w, 1) -> encoder -> mean over tokens, then over crops -> linear -> logits (batch, K)

Parameters are {"backbone", "head"}, of the backbone its encoder alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from alice_jax.models.backbone import Backbone
from alice_jax.objectives import Batch, Objective, started

Tree = Any


def scan_feature(of_crops: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean tokens (batch, crops, c) and weights (batch, crops) of crops -> (batch, c) float32."""
    return jnp.einsum("bk,bkc->bc", weights, of_crops) / jnp.sum(weights, axis=1, keepdims=True)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """(batch,) of logits (batch, K) and classes (batch,), or, mean over the labels, of 0 and 1 (batch, K).

    >>> [round(float(cross_entropy(jnp.zeros((1, 4)), t)[0]), 4) for t in (jnp.array([2]), jnp.ones((1, 4)))]
    [1.3863, 0.6931]
    """
    if targets.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(axis=-1)


def probabilities(logits: jax.Array, multi: bool) -> jax.Array:
    """(batch, K): of a scan's classes together 1, or of each label alone."""
    return jax.nn.sigmoid(logits) if multi else jax.nn.softmax(logits)


def make(
    backbone: Backbone,
    outputs: int,
    *,
    multi: bool,
    frozen: bool,
    optimizer: optax.GradientTransformation,
    schedules: dict[str, Any],
    judge: Callable[[Mapping[str, np.ndarray]], dict[str, float]],
    start: Mapping[str, np.ndarray] | None = None,
) -> Objective:
    """The objective for batches of `data.class_views.ClassSampler`.

    Args:
      outputs: classes or labels.
      multi: several labels at once.
      frozen: the backbone is looked at, not trained, and nothing of it is dropped: a linear probe.
      judge: of "records", "targets" and "scores" of all held-out scans.
      start: values by the name of the parameter, in place of random ones.
    """
    head = nn.Dense(outputs, kernel_init=nn.initializers.zeros)

    def init(key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        volumes = batch["volumes"][0, :1]
        weights = backbone.init(key, volumes, method="encode")["params"]
        skips: Any = jax.eval_shape(lambda: backbone.apply({"params": weights}, volumes, method="encode"))
        params = {"backbone": weights, "head": head.init(key, jnp.zeros((1, skips[-1].shape[-1])))["params"]}
        return started(params, start or {}), {}

    def logits(params: Tree, batch: Batch, key: jax.Array | None, train: bool) -> jax.Array:
        def encoded(volumes: jax.Array) -> jax.Array:
            rngs = {} if key is None else {"drop_path": key}
            weights = {"params": params["backbone"]}
            skips: Any = backbone.apply(weights, volumes, train=train and not frozen, method="encode", rngs=rngs)
            return backbone.cls_of(skips[-1])

        volumes, weights = batch["volumes"], batch["weights"]
        if train:
            of_crops = encoded(volumes.reshape(-1, *volumes.shape[2:])).reshape(*weights.shape, -1)
        else:  # a grid of crops that covers the body may have hundreds: one of each scan at a time
            of_crops = jax.lax.map(encoded, volumes.swapaxes(0, 1)).swapaxes(0, 1)
        feature = scan_feature(of_crops, weights)
        feature = jax.lax.stop_gradient(feature) if frozen else feature
        return jnp.asarray(head.apply({"params": params["head"]}, feature))

    def loss(params: Tree, extra: Tree, batch: Batch, key: jax.Array, step: jax.Array, train: bool):
        value = jnp.mean(cross_entropy(logits(params, batch, key, train), batch["targets"]))
        return value, ({}, {})

    def predict(params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        scores = probabilities(logits(params, batch, None, False), multi)
        return {"records": batch["records"], "targets": batch["targets"], "scores": scores}

    return Objective(
        init=init,
        loss=loss,
        update=lambda params, extra, stats, step: extra,
        optimizer=optimizer,
        schedules=schedules,
        predict=predict,
        judge=judge,
    )
