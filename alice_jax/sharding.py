"""Devices as a mesh, where the state and the batch lie on it, and the step compiled for it.

`jit` with shardings and not `pmap`: the step is written once over the global batch and the compiler places it on one
device or on many, so the losses and centers are global means without any axis name.

The batch is divided over all devices. The state is divided over those of the axis "parameters" (FSDP, arXiv 2304.11277)
by `layout.py`; a loss sees whole parameters, which are gathered for it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alice_jax import layout, train_state
from alice_jax.errors import UserError
from alice_jax.layout import DATA, PARAMETERS, RULES, Rules
from alice_jax.objectives import Batch, Objective
from alice_jax.train_state import TrainState

Tree = Any


def make_mesh(devices: Sequence[jax.Device] | None = None, parameters: int = 1) -> Mesh:
    """All devices of all processes, or those given; the state is divided over groups of `parameters` of them.

    They lie in the order of their processes, since each process brings a contiguous share of the rows of a batch.
    `jax.make_mesh` may mix processes for the sake of a ring, and refuses several slices and some groups on a torus.
    """
    devices = jax.devices() if devices is None else devices
    if parameters < 1 or len(devices) % parameters:
        raise UserError(f"mesh.parameters {parameters}: must divide the number of devices, {len(devices)}")
    ordered = np.array(sorted(devices, key=lambda device: (device.process_index, device.id)))
    # Axes are automatic: explicit ones would ask every matmul of the model for an output sharding.
    return Mesh(ordered.reshape(-1, parameters), (DATA, PARAMETERS), axis_types=(AxisType.Auto,) * 2)


def platform(mesh: Mesh) -> str:
    """ "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """For what every device holds all of."""
    return NamedSharding(mesh, PartitionSpec())


def by_sample(mesh: Mesh) -> NamedSharding:
    """For a batch: its first axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec((DATA, PARAMETERS)))


def described(shapes: TrainState, mesh: Mesh, rules: Rules = RULES) -> TrainState:
    """Shapes of a state with the shardings that it is to be restored to."""
    places = layout.shardings(shapes, shapes.params, mesh, rules)
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)


def global_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The global arrays of which every process holds its rows."""
    sharding = by_sample(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in local.items()}


def global_parts(mesh: Mesh, local: dict[str, np.ndarray], parts: int) -> list[dict[str, jax.Array]]:
    """A batch in `parts`, each spread over all devices."""
    return [global_batch(mesh, {name: rows[i::parts] for name, rows in local.items()}) for i in range(parts)]


def of_all_processes(local: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of the global batch, on every host, from those that each process holds; sent as one array of bytes."""
    if jax.process_count() == 1:
        return local
    rows = [np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8) for values in local.values()]
    sent = multihost_utils.process_allgather(np.concatenate(rows, axis=1), tiled=True)
    parts = np.split(np.asarray(sent), np.cumsum([part.shape[1] for part in rows])[:-1], axis=1)
    return {
        name: np.ascontiguousarray(part).view(values.dtype).reshape(-1, *values.shape[1:])
        for (name, values), part in zip(local.items(), parts, strict=True)
    }


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


def compiled_init(
    objective: Objective, seed: int, mesh: Mesh, rules: Rules = RULES
) -> Callable[[dict[str, np.ndarray]], TrainState]:
    """`init(example batch) -> state`, made where it will live."""

    def init(batch: Batch) -> TrainState:
        state = train_state.create(objective, seed, batch)
        return placed(state, state.params, mesh, rules)

    return jax.jit(init, compiler_options=runs_once(platform(mesh)))


def placed(tree: Tree, params: Tree, mesh: Mesh, rules: Rules) -> Tree:
    """`tree`, traced, with each array where `layout.shardings` has it."""
    return jax.lax.with_sharding_constraint(tree, layout.shardings(tree, params, mesh, rules))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: jax.Array, place: NamedSharding) -> jax.Array:
    """A parameter, whole on every device; its gradient lies where the parameter does, by a reduce-scatter."""
    return jax.lax.with_sharding_constraint(x, place.update(spec=PartitionSpec()))


gathered.defvjp(
    lambda x, place: (gathered(x, place), None),
    lambda place, _, gradient: (jax.lax.with_sharding_constraint(gradient, place),),
)


def on_whole(function: Callable[..., Any], mesh: Mesh, rules: Rules) -> Callable[..., Any]:
    """An objective's `function(params, extra, …)`, given divided ones."""

    def call(params: Tree, extra: Tree, *rest: Any) -> Any:
        places = layout.shardings((params, extra), params, mesh, rules)
        return function(*jax.tree.map(gathered, (params, extra), places), *rest)

    return call


def on_mesh(objective: Objective, mesh: Mesh, rules: Rules) -> Objective:
    """The objective for parameters that are divided over a mesh."""
    given_parameters = ("loss", "features", "predict")
    whole: dict[str, Any] = {name: on_whole(getattr(objective, name), mesh, rules) for name in given_parameters}
    return dataclasses.replace(objective, **whole)


def compiled_eval(
    objective: Objective, key: jax.Array, mesh: Mesh, rules: Rules = RULES
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """`eval_step(state, batch) -> (losses, features)`, whole on every device."""
    return jax.jit(train_state.make_eval_step(on_mesh(objective, mesh, rules), key), out_shardings=replicated(mesh))


def compiled_step(
    objective: Objective, key: jax.Array, mesh: Mesh, parts: int, rules: Rules = RULES
) -> Callable[[TrainState, list[dict[str, jax.Array]]], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, parts of a batch) -> (next state, metrics)`; the memory of the old state is given to the new one.

    A batch in one part is one compiled program. With several, each part is one call and the update another.
    """
    objective = on_mesh(objective, mesh, rules)

    def lying(function: Callable[..., Tree]) -> Callable[..., Tree]:
        """`function(state, …)`, whose results lie where they belong."""
        return lambda state, *rest: placed(function(state, *rest), state.params, mesh, rules)

    if parts == 1:
        whole = jax.jit(lying(train_state.make_train_step(objective, key)), donate_argnums=0)
        return lambda state, batch: whole(state, batch[0])

    part_of, finish = train_state.make_partial_steps(objective, key, parts)

    def nothing(state: TrainState, part: Batch) -> Tree:
        shapes = jax.eval_shape(part_of, state, part, 0)
        return jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)

    def added(state: TrainState, part: Batch, index: jax.Array, total: Tree) -> Tree:
        return jax.tree.map(jax.numpy.add, total, part_of(state, part, index))

    zeros, add = jax.jit(lying(nothing)), jax.jit(lying(added), donate_argnums=3)
    update = jax.jit(lying(finish), donate_argnums=0)
    numbers = jax.device_put(list(np.arange(parts)), replicated(mesh))
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
