"""Devices as a mesh, where the state and the batch lie on it, and the step compiled for it.

`jit` with shardings and not `pmap`: the step is written once over the global batch and the compiler places it on one
device or on many, so the losses and centers are global means without any axis name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alice_jax import train_state
from alice_jax.errors import UserError
from alice_jax.objectives import Batch, Objective
from alice_jax.train_state import TrainState

Tree = Any
DATA = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all processes, or those given, on one data axis."""
    devices = jax.devices() if devices is None else devices
    # Explicit axes, the default, would ask every matmul of the model for an output sharding.
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def platform(mesh: Mesh) -> str:
    """ "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """For the state: every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def by_sample(mesh: Mesh) -> NamedSharding:
    """For a batch: its first axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def described(shapes: Tree, mesh: Mesh) -> Tree:
    """Shapes of a state with the shardings that it is to be restored to."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated(mesh)), shapes)


def global_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The global arrays of which every process holds its rows."""
    sharding = by_sample(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in local.items()}


def global_parts(mesh: Mesh, local: dict[str, np.ndarray], parts: int) -> list[dict[str, jax.Array]]:
    """A batch in `parts`, each spread over all devices."""
    return [global_batch(mesh, {name: rows[i::parts] for name, rows in local.items()}) for i in range(parts)]


def of_all_processes(local: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of the global batch, on every host, from those that each process holds."""
    return local if jax.process_count() == 1 else multihost_utils.process_allgather(local, tiled=True)


def parts_of_batch(batch_size: int, microbatch: int, mesh: Mesh) -> int:
    """How many parts a step computes one after another.

    Args:
      batch_size: samples in the global batch.
      microbatch: samples that one device computes at once; 0 chooses 1 on a CPU, whose memory and caches are small,
        and a device's whole share on an accelerator.
    """
    devices = mesh.size
    if batch_size % devices:
        raise UserError(f"batch_size {batch_size}: must be a multiple of the number of devices, {devices}")
    share = batch_size // devices
    if microbatch == 0:
        microbatch = 1 if platform(mesh) == "cpu" else share
    if share % microbatch:
        raise UserError(
            f"microbatch {microbatch}: must divide the {share} samples that each of {devices} devices gets "
            f"of batch_size {batch_size}"
        )
    return share // microbatch


def runs_once(on: str) -> dict[str, Any] | None:
    """Compiler options for what runs once on a platform: a CPU would optimise for longer than it saves."""
    return {"xla_backend_optimization_level": 0} if on == "cpu" else None


def compiled_init(objective: Objective, seed: int, mesh: Mesh) -> Callable[[dict[str, np.ndarray]], TrainState]:
    """`init(example batch) -> state`, made where it will live."""

    def init(batch: Batch) -> TrainState:
        return train_state.create(objective, seed, batch)

    return jax.jit(init, out_shardings=replicated(mesh), compiler_options=runs_once(platform(mesh)))


def compiled_step(
    objective: Objective, key: jax.Array, mesh: Mesh, parts: int
) -> Callable[[TrainState, list[dict[str, jax.Array]]], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, parts of a batch) -> (next state, metrics)`; the memory of the old state is given to the new one.

    A batch in one part is one compiled program. With several, each part is one call and the update another.
    """
    everywhere, rows = replicated(mesh), by_sample(mesh)
    if parts == 1:
        whole = jax.jit(
            train_state.make_train_step(objective, key),
            in_shardings=(everywhere, rows),
            out_shardings=everywhere,
            donate_argnums=0,
        )
        return lambda state, batch: whole(state, batch[0])

    part_of, finish = train_state.make_partial_steps(objective, key, parts)
    add = jax.jit(
        lambda state, part, index, total: jax.tree.map(jax.numpy.add, total, part_of(state, part, index)),
        in_shardings=(everywhere, rows, everywhere, everywhere),
        out_shardings=everywhere,
        donate_argnums=3,
    )
    zeros = jax.jit(
        lambda state, part: jax.tree.map(
            lambda x: jax.numpy.zeros(x.shape, x.dtype), jax.eval_shape(part_of, state, part, 0)
        ),
        out_shardings=everywhere,
    )
    update = jax.jit(finish, out_shardings=everywhere, donate_argnums=0)
    numbers = jax.device_put(list(np.arange(parts)), everywhere)
    # On a CPU a program takes its memory when it is called and not when it runs, so parts called ahead would add up.
    one_at_a_time = platform(mesh) == "cpu"

    def step(state: TrainState, batch: list[dict[str, jax.Array]]):
        total = zeros(state, batch[0])
        for index, part in zip(numbers, batch, strict=True):
            total = add(state, part, index, total)
            if one_at_a_time:
                jax.block_until_ready(total)
        return update(state, total)

    return step
