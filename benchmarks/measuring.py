"""What the benchmarks share: how time and memory are measured, and what is written beside every number."""

import datetime
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from alice_jax import host


def measured(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the first call, and the median of `repeats` further ones; `call` returns when the work is done."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times[0], statistics.median(times[1:])


def main_memory_gib() -> float:
    """The most main memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def alone(call: Callable[..., dict[str, Any]], *args: Any, keep_memory: bool = True) -> dict[str, Any]:
    """What `call` returns in a fresh process; {"failed": why} where that runs out of memory.

    Args:
      keep_memory: whether malloc is set as the project sets it, also for what it is compared with.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            if keep_memory:
                pool.submit(host.keep_memory).result()
            return pool.submit(call, *args).result()
        except BrokenProcessPool:
            return {"failed": "killed, out of memory"}
        except RuntimeError as error:
            if "memory" not in str(error).lower() and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"failed": "out of memory"}


def ceilings(precision: str) -> dict[str, Any]:
    """JAX's device, and what a large matrix product and a large copy reach there."""
    import jax
    import jax.numpy as jnp

    from alice_jax import tasks

    dtype = tasks.compute_dtype(precision)
    side, length = (4096, 1 << 27) if jax.default_backend() == "cpu" else (16384, 1 << 31)
    matrix, row = jnp.ones((side, side), dtype), jnp.ones((length,), jnp.float32)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    _, product_s = measured(lambda: product(matrix).block_until_ready(), repeats=5)
    _, copy_s = measured(lambda: copy(row).block_until_ready(), repeats=5)
    return {
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "precision": jnp.dtype(dtype).name,
        "tera_flop_per_s": 2 * side**3 / product_s / 1e12,
        "gigabytes_per_s": 2 * row.nbytes / copy_s / 1e9,
    }


def save(file: str | None, numbers: Mapping[str, Any]) -> None:
    """Writes the numbers to a file, if one was asked for, with when, where and with what they were measured."""
    if not file:
        return
    from alice_jax import provenance  # imports JAX, whose threads would take the time that others are measured in

    where = {
        "date": f"{datetime.date.today()}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": provenance.versions((*provenance.PACKAGES, "torch")),
        "commit": provenance.commit(),
    }
    Path(file).write_text(json.dumps({"conditions": where, **numbers}, indent=1) + "\n", encoding="utf-8")
