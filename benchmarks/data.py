"""How fast crops and pairs come from the store, beside the usual way, and how many host cores feed an accelerator.

    python benchmarks/data.py [--store DIR] [--original FILE ...] [--json FILE] [--quick]

Crops by themselves are measured by `crops.py`. Speeds per core are by the time of the processor, summed over threads,
so that other programs disturb them little.
"""

# ruff: noqa: E402

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when numpy is imported
    os.environ[variable] = "1"

import jax
import measuring
from crops import crop_speed, crop_table
from mining import mining_speed, table
from ml_collections import ConfigDict

from alice_jax import builtin, cli, sharding, tasks, train
from alice_jax.data import pipeline
from alice_jax.data.store import Store

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain.py"


def recipe(variant: str) -> ConfigDict:
    """configs/pretrain.py:VARIANT"""
    return cli.recipe(f"{CONFIG}:{variant}")


def no_step(state: Any, batch: Any) -> Any:
    """Stands in for the train step and takes no time."""
    return state, {}


def stream_speed(store: Store, config: ConfigDict, steps: int, computing: bool) -> dict[str, float]:
    """The training loop of one process on `steps` batches, after those that lie ready when it starts.

    Args:
      computing: with the train step on this computer's devices; otherwise with one that takes no time.
    """
    task, mesh = tasks.make(config, store), sharding.make_mesh()
    parts = sharding.parts_of_batch(config.batch_size, config.microbatch, mesh)
    state: Any = None
    step: Callable[[Any, Any], Any] = no_step
    if computing:
        state = sharding.compiled_init(task.objective, config.seed, mesh)(train.example_batch(task))
        step = sharding.compiled_step(task.objective, jax.random.key(config.seed), mesh, parts)
    ready = 2 * config.data.threads + 1  # batches that are fetched ahead
    # More batches than are used, so that as much is under way at the end of the measurement as at its beginning.
    samples = pipeline.Samples(task.sampler, len(task.scans), config.seed, config.batch_size, config.steps)
    stream = pipeline.batches(samples, workers=config.data.workers, threads=config.data.threads)

    def next_batch() -> list[dict[str, jax.Array]]:
        rows = next(stream)
        rows.pop("meta")
        return sharding.global_parts(mesh, rows, parts)

    batch, waited = next_batch(), 0.0
    began = 0.0, 0.0
    for done in range(ready + steps):
        if done == ready:
            began, waited = (time.process_time(), time.perf_counter()), 0.0
        state, numbers = step(state, batch)
        asked = time.perf_counter()
        batch = next_batch()
        waited += time.perf_counter() - asked
        jax.device_get(numbers)
    cores, clock = time.process_time() - began[0], time.perf_counter() - began[1]
    pairs = steps * config.batch_size
    result = {
        "seconds_a_step": clock / steps,
        "share_of_the_step_waiting_for_data": waited / clock,
        "pairs_per_second_by_the_clock": pairs / clock,
    }
    return result if computing else {**result, "pairs_per_second_and_core": pairs / cores}


def host_cores(pairs_per_second: float, of_a_core: dict[str, float]) -> dict[str, str]:
    """Cores that feed an accelerator which takes so many pairs a second, if each core mines for itself.

    That is what processes do (data.workers); the threads of one process wait for each other where Python runs.
    """
    return {
        what: f"{pairs_per_second:g} (assumed) / {speed:.1f} (measured) = {pairs_per_second / speed:.1f}"
        for what, speed in of_a_core.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", metavar="DIR", help="with embeddings (default: the built-in cohort)")
    parser.add_argument(
        "--original",
        metavar="FILE",
        nargs="+",
        default=[],
        help=".nii.gz as scanners give them, for the usual way (default: a phantom in slices of 512 × 512)",
    )
    parser.add_argument(
        "--pairs-per-second",
        type=float,
        default=230.0,
        metavar="N",
        help="of the accelerator to feed (default: 230, the most that an H200 may reach; docs/planning.md)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer scans, crops, pairs and steps")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    cli.check_folder_of("--json", args.json)
    store = Store.open(args.store or builtin.embedded_patients(train.run))
    scans, crops, rounds, pairs, steps = (2, 10, 2, 20, 3) if args.quick else (8, 25, 5, 100, 10)
    tasks.make(recipe(""), store)  # says at once where embeddings are missing
    ids = store.ids()[:: max(len(store.ids()) // scans, 1)][:scans]
    results: dict[str, Any] = {"store": args.store or "the built-in cohort", "scans": len(store.ids())}

    measured = crop_speed(store, ids, crops, rounds, args.original)
    print(crop_table(measured["rows"]))
    print("voxels: {voxels_of_a_scan:,.0f} of a scan, {voxels_of_an_original:,.0f} of an original".format_map(measured))
    results["crops"] = measured
    met, never_met = (mining_speed(store, pairs, fresh=fresh) for fresh in (False, True))
    full, tiny = recipe(""), recipe("tiny")
    through_grain = stream_speed(store, full, steps, computing=False)
    of_a_core = {"embeddings met before": met, "embeddings never met before": never_met, "through Grain": through_grain}
    rest = {
        "mining, embeddings met before": met,
        "mining, embeddings never met before": never_met,
        "pretrain.py through Grain, step of no time": through_grain,
        "pretrain.py:tiny through Grain, step of no time": stream_speed(store, tiny, steps, computing=False),
        "pretrain.py:tiny through Grain, real step": stream_speed(store, tiny, steps, computing=True),
        "host cores = pairs/s of the accelerator / pairs/s of a core": host_cores(
            args.pairs_per_second,
            {name: values["pairs_per_second_and_core"] for name, values in of_a_core.items()},
        ),
    }
    print(table(rest))
    results |= rest
    measuring.save(args.json, results)
    return 0


if __name__ == "__main__":
    cli.run(main)
