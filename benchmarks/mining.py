"""How fast points are matched and pairs are mined, whether the fast search finds what the dense one does, and what all
of that costs for 10,000 scans.

    python benchmarks/mining.py [--store DIR] [--workdir DIR] [--json FILE]

All times are of the processor, summed over threads, so they are per core and other programs disturb them little.
"""

# ruff: noqa: E402

import argparse
import cProfile
import dataclasses
import itertools
import os
import pickle
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when numpy is imported
    os.environ[variable] = "1"

import measuring
import numpy as np

from alice_jax import builtin, cli, report
from alice_jax.data import embeddings, matching
from alice_jax.data.pipeline import Samples
from alice_jax.data.store import Store
from alice_jax.errors import UserError
from alice_jax.reporting import pairs

MANY = 10_000
BATCHES = (10, 100)  # points matched at once: as mining does, and as local consensus does
PARTS = {  # of mining a pair: a function of the project, with all that it calls
    "opening embeddings": ("embeddings.py", "read_embedding"),
    "reading their cells": ("store.py", "read_rows"),
    "searching": ("matching.py", "search"),
    "agreement of neighbours": ("consensus.py", "consensus"),
    "body masks": ("store.py", "foreground"),
    "points in the body": ("views.py", "foreground_points"),
    "reading crops": ("store.py", "read_crop"),
    "windowing crops": ("views.py", "windowed"),
}


def seconds(work: Callable[..., Any], *args: Any) -> float:
    """Processor time of the fastest of three calls."""
    times = []
    for _ in range(3):
        began = time.process_time()
        work(*args)
        times.append(time.process_time() - began)
    return min(times)


def body_points(store: Store, id: str, rng: np.random.Generator, count: int, near: bool) -> np.ndarray:
    """(count, 3) voxels: anywhere in the body, or within 24 mm of one place on each axis."""
    cells = 2 * np.argwhere(store.foreground(id))
    if not near:
        return cells[rng.integers(len(cells), size=count)]
    reach = np.rint(24 / np.array(store.scan(id).spacing_zyx_mm)).astype(int)
    points = cells[rng.integers(len(cells))] + rng.integers(-reach, reach + 1, size=(count, 3))
    return np.clip(points, 0, np.array(store.scan(id).shape_zyx) - 1)


def paper_slabs(key: matching.Embedding) -> list[np.ndarray]:
    """As many fp32 vectors of the network's own length as the full grid has, 16,384 at a time.

    It is the same slab again and again: from the cache, so faster than in truth.
    """
    levels = key.codec.fine, key.codec.coarse
    halves = np.split(key.keys[: matching.SLAB_CELLS], [len(levels[0].step)], axis=1)
    slab = np.concatenate([half @ level.projection.T for half, level in zip(halves, levels, strict=True)], axis=1)
    return [slab] * -(-int(np.prod(key.grid_zyx)) // len(slab))


def matching_speed(store: Store, pairs: int, rng: np.random.Generator) -> dict[str, Any]:
    """Microseconds a query of each way to match, and how often the fast search agrees with the dense one."""
    codec, ids = embeddings.read_codec(store), store.ids()
    assert codec is not None
    times: dict[str, list[float]] = {}
    agrees, grids, stride = [], [], np.array(codec.fine.stride_zyx_vox)
    for _ in range(pairs):
        query, key = (matching.read_embedding(store, ids[i]) for i in rng.choice(len(ids), 2, replace=False))
        grids.append(int(np.prod(key.grid_zyx)))
        for count, near in itertools.product(BATCHES, (False, True)):
            points = body_points(store, query.id, rng, count, near)
            where = f"{count} points {'close together' if near else 'anywhere'}"

            ways: dict[str, tuple[Any, ...]] = {"search": (matching.search, query, points, key)}
            if not near:
                vectors = rng.normal(size=(count, sum(len(x.projection) for x in (codec.fine, codec.coarse))))
                ways["match with cycle"] = (matching.match, query, points, key)
                ways["dense, stored cells of the body"] = (matching.dense, query, points, key)
                ways["dense, as in the paper"] = (matching.nearest, vectors.astype(np.float32), paper_slabs(key))
            for way, call in ways.items():
                times.setdefault(f"{way}, {where}", []).append(1e6 * seconds(*call) / count)
            if near:
                continue
            exact, fast = matching.dense(query, points, key, subcell=True), matching.search(query, points, key)
            agrees += (np.abs(exact.points_zyx_vox - fast.points_zyx_vox) <= stride + 1e-6).all(axis=1).tolist()
    microseconds = {name: float(np.mean(values)) for name, values in times.items()}
    many = f"{BATCHES[-1]} points anywhere"
    fastest = microseconds[f"search, {many}"]
    return {
        "fine_cell_mm": (stride * codec.spacing_zyx_mm).tolist(),
        "cells_of_full_grid": float(np.mean(grids)),
        "length_of_vectors": [len(codec.fine.projection), len(codec.fine.step)],
        "microseconds": microseconds,
        "times_dense_as_in_the_paper": microseconds[f"dense, as in the paper, {many}"] / fastest,
        "times_dense_of_the_body": microseconds[f"dense, stored cells of the body, {many}"] / fastest,
        "agreement": float(np.mean(agrees)),
        "points": len(agrees),
    }


class Reader:
    """An `EmbeddingReader` that can forget all it has seen, as if every scan were met for the first time."""

    def __init__(self, store: Store):
        self.store = store
        self.forget()

    def forget(self) -> None:
        fresh = pickle.loads(pickle.dumps(self.store))  # without open files
        self.reader = embeddings.EmbeddingReader(fresh)

    def __call__(self, id: str) -> matching.Embedding:
        return self.reader(id)


def mining_speed(store: Store, count: int, fresh: bool) -> dict[str, Any]:
    """Pairs a second from the store to finished 64³ samples, redraws included.

    Args:
      fresh: every pair meets embeddings that were not read before, as with thousands of scans; files in the page cache.
    """
    reader = Reader(store)
    base = report.preview(store)
    sampler = dataclasses.replace(pairs.sampler_of(base), embeddings=reader)
    samples = Samples(sampler, base.records, 0, global_batch=1, steps=base.steps)
    samples[0]  # partners' index, once for all
    for position in range(0 if fresh else count + 1):
        samples[position]
    profile, redraws, took = cProfile.Profile(), [], [0.0, 0.0]
    for profiled in (False, True):
        for position in range(1, count + 1):
            if fresh:
                reader.forget()
            began = time.process_time(), time.perf_counter()
            if profiled:
                sample = profile.runcall(samples.__getitem__, position)
            else:
                sample = samples[position]
                took[0] += time.process_time() - began[0]
                took[1] += time.perf_counter() - began[1]
                redraws.append(int(sample["meta"]["redraws"]))
    profile.create_stats()
    entries = [entry for entry in profile.getstats() if not isinstance(entry.code, str)]
    total = sum(entry.inlinetime for entry in profile.getstats())
    parts = {
        name: sum(e.totaltime for e in entries if (os.path.basename(e.code.co_filename), e.code.co_name) == place)
        for name, place in PARTS.items()
    }
    return {
        "pairs_per_second_and_core": count / took[0],
        "pairs_per_second_by_the_clock": count / took[1],
        "redraws_per_pair": float(np.mean(redraws)),
        "share_of_the_time": {name: part / total for name, part in parts.items()},
        "megabytes_of_embeddings_kept": sum(e.nbytes for e in reader.reader._kept.values()) / 1e6,
        "megabytes_kept_at_most": reader.reader.cache_bytes / 1e6,
    }


def disk(store: Store) -> dict[str, float]:
    """Mean megabytes of a scan, and gigabytes of many."""
    sizes: dict[str, list[int]] = {"embedding": [], "volume": []}
    for id in store.ids():
        files = [file for file in Path(store.path, "scans", id).rglob("*") if file.is_file()]
        of_embedding = [file for file in files if set(file.parts) & set(embeddings.ARRAYS)]
        sizes["embedding"].append(sum(file.stat().st_size for file in of_embedding))
        sizes["volume"].append(sum(file.stat().st_size for file in files) - sizes["embedding"][-1])
    means = {name: float(np.mean(values)) for name, values in sizes.items()}
    return {f"megabytes_{name}": mean / 1e6 for name, mean in means.items()} | {
        f"gigabytes_of_{MANY}_{name}s": mean * MANY / 1e9 for name, mean in means.items()
    }


def embedding_speed(store: Store, workdir: str, scans: int) -> dict[str, float]:
    """Seconds by the clock to read, embed and write a scan, without compiling, on all cores or the accelerator."""
    from alice_jax import embed

    embedder = embed.restore(workdir)
    whole, codec = embed.WholeVolume(embedder), embeddings.read_codec(store)
    assert codec is not None
    out, took = Store.create("memory://mining", store.manifest["spacing_zyx_mm"]), []
    for id in store.ids()[:: max(len(store.ids()) // scans, 1)][:scans]:
        out.write_scan(store.scan(id), store.read_volume(id), store.foreground(id))
        for _ in range(2):  # the first time it is compiled
            began = time.perf_counter()
            embeddings.write_embedding(out, id, codec, *whole(store.read_volume(id)))
            last = time.perf_counter() - began
        took.append(last)
        out.delete_scan(id)
    return {"seconds_a_scan": float(np.mean(took)), f"hours_of_{MANY}_on_one_task": float(np.mean(took)) * MANY / 3600}


def table(results: dict[str, Any], indent: str = "") -> str:
    """The results as lines of text."""
    lines = []
    for name, value in results.items():
        words = name.replace("_", " ")
        if isinstance(value, dict):
            lines += [f"{indent}{words}", table(value, indent + "  ")]
        else:
            digits = (0 if value >= 100 else 1 if value >= 1 else 3) if isinstance(value, float) else None
            lines.append(f"{indent + words:<60}{value if digits is None else format(value, f',.{digits}f')!s:>16}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", metavar="DIR", help="with embeddings (default: the built-in cohort)")
    parser.add_argument("--workdir", metavar="DIR", help="of the embedder, to measure embedding too")
    parser.add_argument("--pairs", type=int, default=100, help="pairs to mine (default: 100)")
    parser.add_argument("--matched", type=int, default=8, help="pairs of scans to match points of (default: 8)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    cli.check_folder_of("--json", args.json)
    store = Store.open(args.store or builtin.store_path())
    if len(store.ids()) < 2:
        raise UserError(f"--store {store.path}: holds {len(store.ids())} scans and matching needs two")
    results: dict[str, Any] = {"store": args.store or "the built-in cohort", "scans": len(store.ids())}
    results["matching"] = matching_speed(store, args.matched, np.random.default_rng(0))
    results["mining, embeddings met before"] = mining_speed(store, args.pairs, fresh=False)
    results["mining, embeddings never met before"] = mining_speed(store, args.pairs, fresh=True)
    results["disk"] = disk(store)
    if args.workdir:
        results["embedding"] = embedding_speed(store, args.workdir, scans=3)
    results["megabytes_of_the_process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(table(results))
    measuring.save(args.json, results)
    return 0


if __name__ == "__main__":
    cli.run(main)
