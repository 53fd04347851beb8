"""Devices as a mesh, and where the state and the batch lie on it.

`jit` with shardings and not `pmap`: the step is written once over the global batch and the compiler places it on one
device or on many, so the losses and centers are global means without any axis name.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alice_jax.errors import UserError

Tree = Any
DATA = "data"


def make_mesh() -> Mesh:
    """All devices of all processes on one data axis."""
    # Explicit axes, the default, would ask every matmul of the model for an output sharding.
    return jax.make_mesh((jax.device_count(),), (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """For the state: every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def by_sample(mesh: Mesh) -> NamedSharding:
    """For a batch: its first axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def global_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The global arrays of which every process holds its rows."""
    sharding = by_sample(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in local.items()}


def micro_batches(batch_size: int, microbatch: int, mesh: Mesh) -> int:
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
        microbatch = 1 if mesh.devices.flat[0].platform == "cpu" else share
    if share % microbatch:
        raise UserError(
            f"microbatch {microbatch}: must divide the {share} samples that each of {devices} devices gets "
            f"of batch_size {batch_size}"
        )
    return share // microbatch
