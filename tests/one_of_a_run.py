"""What each process of test_distributed does: a global batch, a checkpoint of a divided state, a line for the user.

    python tests/one_of_a_run.py FOLDER [PORT COUNT INDEX]

It prints a hash of the global batch and the step that was restored. With no place it joins the cluster that it is in;
without a FOLDER ("-") it meets the others again and again, until one of them is told to stop.
"""

import hashlib
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alice_jax import checkpoint, cli, distributed, preemption, rendezvous, sharding, train
from alice_jax.data import pipeline

BATCH, STEP = 8, 5


def sample(record, rng, batch_rng):
    return {"image": rng.random(3, np.float32) + record, "shared": batch_rng.random(1, np.float32)}


def global_rows(mesh: Mesh) -> dict[str, np.ndarray]:
    """Batch STEP as the devices have it, gathered from all processes."""
    samples = pipeline.Samples(sample, 6, 0, BATCH, STEP + 1, jax.process_index(), jax.process_count())
    local = next(pipeline.batches(samples, start_step=STEP))
    batch = sharding.global_batch(mesh, local)
    assert all(array.is_fully_addressable == (jax.process_count() == 1) for array in batch.values())
    gathered = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(batch)
    np.testing.assert_equal(sharding.of_all_processes(local), gathered)
    return {name: np.asarray(array) for name, array in gathered.items()}


def hashed(rows: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(rows[name].tobytes() for name in sorted(rows))).hexdigest()


def state_of(step: int, mesh: Mesh) -> dict[str, jax.Array]:
    """An array of which each process holds its rows, and one that all hold."""
    shardings = {"rows": sharding.by_sample(mesh), "all": sharding.replicated(mesh)}
    return jax.jit(
        lambda: {"rows": jnp.arange(16.0).reshape(8, 2) + step, "all": jnp.full(3, step)}, out_shardings=shardings
    )()


def go_on(folder: str, mesh: Mesh) -> int:
    """Restores the newest checkpoint, if there is one, and writes the next; returns the step that was restored."""
    with checkpoint.Checkpoints(folder) as checkpoints:
        step = checkpoints.latest_step or 0
        if step:
            expected = state_of(step, mesh)
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected)
            state, host = checkpoints.restore(step, like)
            assert host == {"processes": step}
            for name, array in state.items():
                for mine, right in zip(array.addressable_shards, expected[name].addressable_shards, strict=True):
                    np.testing.assert_array_equal(mine.data, right.data)
        checkpoints.save(step + 1, state_of(step + 1, mesh), {"processes": step + 1})
    return step


def again_and_again() -> int:
    """How often until they agreed to stop."""
    with preemption.StopSignal() as stop:
        for times in itertools.count():
            if stop.agreed():
                return times
            if times == 0:
                print("stepping", flush=True)


def main() -> None:
    folder, *place = sys.argv[1:]
    if place:
        port, count, index = map(int, place)
        joined = distributed.joined(rendezvous.Place(f"localhost:{port}", count, index), {}, 120, by_hand=True)
    else:
        joined = distributed.joined(distributed.found(), {}, 120)
    with joined:
        mesh = sharding.make_mesh()
        train.say(f"{jax.process_count()} processes, {jax.device_count()} devices")
        if folder == "-":
            print("together", again_and_again(), flush=True)
            return
        print(hashed(global_rows(mesh)), go_on(folder, mesh), flush=True)


if __name__ == "__main__":
    cli.run(main)
