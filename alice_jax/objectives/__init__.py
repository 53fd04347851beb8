"""What a run optimises. An objective is a record of pure functions; `alice_jax.train` runs any of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alice_jax.optimizer import parameter_name

Tree = Any
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The one interface between the training loop and a method.

    All functions are pure and are traced under `jit` over the *global* batch, so no objective knows of devices:
    a mean over the batch axis is the mean over all of them.

    Attributes:
      init: `(key, batch) -> (params, extra)`; params are trained by gradients, extra is everything else that is
        state (teacher, centers, running statistics).
      loss: `(params, extra, batch, key, step, train) -> (loss, (stats, metrics))`; the mean over the samples of
        `batch`. `stats` are means over the batch that `update` needs; micro-batches average them. `metrics` are
        scalars. `train` is static.
      update: `(new_params, extra, stats, step) -> extra`, called once after each optimizer step.
      optimizer: from gradients to updates.
      schedules: scalars that are functions of the step alone, for the log.
      features: `(params, extra, batch) -> {name: (rows, channels)}`, vectors that would be alike after a collapse.
      predict: `(params, extra, batch) -> {name: (rows, ...)}`, what `judge` needs of held-out samples.
      judge: `{name: (all rows, ...)} -> metrics`, on the host: what is no mean over batches.
    """

    init: Callable[[jax.Array, Batch], tuple[Tree, Tree]]
    loss: Callable[[Tree, Tree, Batch, jax.Array, jax.Array, bool], tuple[jax.Array, tuple[Tree, dict[str, jax.Array]]]]
    update: Callable[[Tree, Tree, Tree, jax.Array], Tree]
    optimizer: optax.GradientTransformation
    schedules: dict[str, Callable[[jax.Array], jax.Array]]
    features: Callable[[Tree, Tree, Batch], dict[str, jax.Array]] = lambda params, extra, batch: {}
    predict: Callable[[Tree, Tree, Batch], dict[str, jax.Array]] = lambda params, extra, batch: {}
    judge: Callable[[Mapping[str, np.ndarray]], dict[str, float]] = lambda predictions: {}


def started(params: Tree, start: Mapping[str, np.ndarray]) -> Tree:
    """`params` with the values of `start`, by the name of the parameter, where it has one."""
    return jax.tree_util.tree_map_with_path(
        lambda path, random: jnp.asarray(start.get(parameter_name(path), random)), params
    )
