"""The state of a run and the one jitted step that advances it."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from alice_jax.objectives import Batch, Objective

Tree = Any


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
      step: updates done so far; global batch k is consumed by the update from step k to k + 1.
      params: what gradients train.
      extra: the objective's other state: teacher, centers, running statistics.
      opt_state: the optimizer's.
    """

    step: jax.Array
    params: Tree
    extra: Tree
    opt_state: Tree


def create(objective: Objective, key: jax.Array, batch: Batch) -> TrainState:
    """The state before the first update."""
    params, extra = objective.init(jax.random.fold_in(key, 0), batch)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, extra=extra, opt_state=objective.optimizer.init(params)
    )


def make_train_step(
    objective: Objective, key: jax.Array, micro_batches: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The function from (state, global batch) to (next state, metrics), ready for `jit` with the state donated.

    Args:
      key: random stream of the run; the step is folded in, so a resumed run draws the same numbers.
      micro_batches: the batch is computed in this many parts, one after another. The losses are means over samples
        and the statistics too, so the result does not depend on it but for rounding.
    """

    def loss_and_gradients(state: TrainState, batch: Batch, key: jax.Array):
        loss = lambda params: objective.loss(params, state.extra, batch, key, state.step, True)  # noqa: E731
        (value, (stats, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        return gradients, stats, metrics | {"loss": value}

    def train_step(state: TrainState, batch: Batch):
        step_key = jax.random.fold_in(key, state.step + 1)
        if micro_batches == 1:
            gradients, stats, metrics = loss_and_gradients(state, batch, step_key)
        else:
            # Every micro-batch takes an equal share of each device's samples, so no sample changes its device.
            parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)

            def accumulate(total, part_and_index):
                part, index = part_and_index
                result = loss_and_gradients(state, part, jax.random.fold_in(step_key, index))
                return jax.tree.map(lambda t, r: t + r / micro_batches, total, result), None

            first = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(loss_and_gradients, state, first, step_key)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (gradients, stats, metrics), _ = jax.lax.scan(
                accumulate, zeros, (parts, jnp.arange(micro_batches))
            )
        updates, opt_state = objective.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"gradient_norm": optax.global_norm(gradients)}
        metrics |= {name: schedule(state.step) for name, schedule in objective.schedules.items()}
        extra = objective.update(params, state.extra, stats, state.step)
        return TrainState(step=state.step + 1, params=params, extra=extra, opt_state=opt_state), metrics

    return train_step


def make_eval_step(objective: Objective, key: jax.Array) -> Callable[[TrainState, Batch], dict[str, jax.Array]]:
    """The losses of a batch without any noise and without any change of the state."""

    def eval_step(state: TrainState, batch: Batch):
        loss, (_, metrics) = objective.loss(state.params, state.extra, batch, key, state.step, False)
        return metrics | {"loss": loss}

    return eval_step
