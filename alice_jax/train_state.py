"""The state of a run and the one jitted step that advances it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from alice_jax import numerics
from alice_jax.objectives import Batch, Objective

Tree = Any


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
      step: batches consumed so far; global batch k is consumed by the update from step k to k + 1. An update with a
        number that is not finite leaves all but the step as it was.
      params: what gradients train.
      extra: the objective's other state: teacher, centers, running statistics.
      opt_state: the optimizer's.
    """

    step: jax.Array
    params: Tree
    extra: Tree
    opt_state: Tree


def create(objective: Objective, seed: int, batch: Batch) -> TrainState:
    """The state before the first update."""
    # This generator compiles four times faster than the default; hundreds of tensors each draw once.
    params, extra = objective.init(jax.random.key(seed, impl="unsafe_rbg"), batch)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, extra=extra, opt_state=objective.optimizer.init(params)
    )


def make_train_step(
    objective: Objective, key: jax.Array
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The function from (state, global batch) to (next state, metrics), ready for `jit` with the state donated.

    Args:
      key: random stream of the run; the step is folded in, so a resumed run draws the same numbers.
    """
    part_of, finish = make_partial_steps(objective, key, parts=1)

    def train_step(state: TrainState, batch: Batch):
        return finish(state, part_of(state, batch, 0))

    return train_step


def make_partial_steps(objective: Objective, key: jax.Array, parts: int) -> tuple[Callable, Callable]:
    """A step in parts, for batches that do not fit into memory at once.

    The losses are means over samples and so are the statistics, so the result equals that of the whole batch but for
    rounding. The parts are called one after another and not in a `scan`, whose body XLA runs several times slower on
    a CPU.

    Returns:
      `part_of(state, part, index) -> share`, whose shares are to be summed over the parts, and
      `finish(state, sum of shares) -> (next state, metrics)`.
    """

    def part_of(state: TrainState, part: Batch, index: jax.typing.ArrayLike) -> Tree:
        part_key = jax.random.fold_in(jax.random.fold_in(key, state.step), index)
        loss = lambda params: objective.loss(params, state.extra, part, part_key, state.step, True)  # noqa: E731
        (value, (stats, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        return jax.tree.map(lambda x: x / parts, (gradients, stats, metrics | {"loss": value}))

    def finish(state: TrainState, total: Tree) -> tuple[TrainState, dict[str, jax.Array]]:
        gradients, stats, metrics = total
        updates, opt_state = objective.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        extra = objective.update(params, state.extra, stats, state.step)
        metrics |= {"gradient_norm": optax.global_norm(gradients), "state_norm": optax.global_norm((params, extra))}
        metrics |= {name: schedule(state.step) for name, schedule in objective.schedules.items()}
        new = TrainState(step=state.step, params=params, extra=extra, opt_state=opt_state)
        return dataclasses.replace(numerics.finite_or(state, new, metrics), step=state.step + 1), metrics

    return part_of, finish


def make_eval_step(
    objective: Objective, key: jax.Array
) -> Callable[[TrainState, Batch], tuple[dict[str, jax.Array], ...]]:
    """Losses, features and predictions of a batch, without any noise and without any change of the state."""

    def eval_step(state: TrainState, batch: Batch):
        loss, (_, metrics) = objective.loss(state.params, state.extra, batch, key, state.step, False)
        of_batch = (state.params, state.extra, batch)
        return metrics | {"loss": loss}, objective.features(*of_batch), objective.predict(*of_batch)

    return eval_step
