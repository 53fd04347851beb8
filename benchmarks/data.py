"""How fast crops and pairs come from the store, beside the usual way, and how many host cores feed an accelerator.

    python benchmarks/data.py [--store DIR] [--original FILE ...] [--json FILE] [--quick]

The usual way is to read the whole .nii.gz through nibabel for every crop. It is measured on the volumes of the store
written as they are, and on files as a scanner gives them, whose grid is finer. All files are in the page cache, nothing
that was decoded is kept, as with thousands of scans, and all ways must give the same crops. Speeds per core are by the
time of the processor, summed over threads, so that other programs disturb them little.
"""

# ruff: noqa: E402

import argparse
import importlib.util
import itertools
import math
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when numpy is imported
    os.environ[variable] = "1"

import jax
import measuring
import nibabel
import numpy as np
import tensorstore as ts
from mining import mining_speed, table
from ml_collections import ConfigDict

from alice_jax import builtin, cli, sharding, tasks, train
from alice_jax.data import files as store_files
from alice_jax.data import phantom, pipeline, views, zarr
from alice_jax.data.hounsfield import AIR_HU
from alice_jax.data.store import Store

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain.py"
CROP = 64  # voxels on each axis
SCANNER_SPACING_ZYX_MM, SCANNER_COLUMNS = (2.0, 0.625, 0.625), 512
CHUNKS_ZYX_VOX = {"16³": (16, 16, 16), "32³": (32, 32, 32), "64³": (64, 64, 64), "whole slices": (1, 1 << 30, 1 << 30)}


def blosc(cname: str, shuffle: str) -> list[dict[str, Any]]:
    return [{"name": "blosc", "configuration": {"cname": cname, "clevel": 5, "shuffle": shuffle}}]


CODECS: dict[str, list[dict[str, Any]]] = {
    "no codec": [],
    "zstd": [{"name": "zstd", "configuration": {"level": 3}}],
    "blosc lz4, shuffle": blosc("lz4", "shuffle"),
    "blosc lz4, bitshuffle": blosc("lz4", "bitshuffle"),
    "blosc zstd, shuffle": blosc("zstd", "shuffle"),
    "blosc zstd, bitshuffle": blosc("zstd", "bitshuffle"),
}

WHOLE, ORIGINAL = "whole .nii.gz", "whole original .nii.gz"  # rows of the usual way

Place = tuple[str, np.ndarray]  # a scan and the first voxel (z, y, x) of a crop, which may lie outside
Way = Callable[[str, np.ndarray], np.ndarray]  # from these two to the crop: int16 HU (CROP, CROP, CROP)

# ------------------------------------------------------------------- crops


def body_places(store: Store, ids: Sequence[str], crops: int) -> list[Place]:
    """As many crops around random points of the body of each scan, one scan after the other in turn."""
    rng = np.random.default_rng(0)
    points = {id: views.foreground_points(store.foreground(id), store.scan(id).shape_zyx, rng, crops) for id in ids}
    return [(id, points[id][i] - CROP // 2) for i in range(crops) for id in ids]


def padded(read: Callable[[tuple[slice, ...]], np.ndarray], whole_zyx: Sequence[int], start: np.ndarray) -> np.ndarray:
    """The crop from `start` of which `read` gives the part inside the volume; air outside."""
    crop = np.full((CROP,) * 3, AIR_HU, np.int16)
    low, high = np.maximum(start, 0), np.minimum(start + CROP, whole_zyx)
    inside, target = (tuple(map(slice, low - shift, high - shift)) for shift in (0, start))
    crop[target] = read(inside)
    return crop


def whole_volume(folder: Path, load: Callable[[Any], np.ndarray]) -> Way:
    """The usual way: FOLDER/<id>.nii.gz is read from its first to its last voxel, then cropped."""

    def crop(id: str, start: np.ndarray) -> np.ndarray:
        volume = load(nibabel.load(folder / f"{id}.nii.gz")).T
        return padded(volume.__getitem__, volume.shape, start)

    return crop


USUAL: dict[str, Callable[[Any], np.ndarray]] = {
    "get_fdata": lambda image: image.get_fdata(),
    "dataobj": lambda image: np.asarray(image.dataobj),
}


def from_store(store: Store, name: str, anew: bool) -> Way:
    """Crops of an array of a store, which is opened anew for each crop or stays open."""
    described = pickle.dumps(store)  # without open files

    def crop(id: str, start: np.ndarray) -> np.ndarray:
        fresh = pickle.loads(described) if anew else store
        return fresh.read_array_region(id, name, start.tolist(), (CROP,) * 3, AIR_HU)

    return crop


def from_blosc2(folder: Path, ids: Sequence[str], anew: bool) -> Way:
    """Crops of FOLDER/<id>.b2nd."""
    import blosc2

    def opened(id: str) -> Any:
        return blosc2.open(str(folder / f"{id}.b2nd"), mode="r", dparams={"nthreads": 1})

    kept = {id: opened(id) for id in ids}

    def crop(id: str, start: np.ndarray) -> np.ndarray:
        array = opened(id) if anew else kept[id]
        return padded(array.__getitem__, array.shape, start)

    return crop


def speeds(ways: dict[Any, tuple[Way, Sequence[Place]]], rounds: int) -> dict[Any, float]:
    """Crops a second and core of each way at its places: the fastest round, after one that warms.

    The ways take turns, so that what else the computer does meets all of them.
    """
    took: dict[Any, list[float]] = {what: [] for what in ways}
    for _ in range(1 + rounds):
        for what, (way, places) in ways.items():
            began = time.process_time()
            for id, start in places:
                way(id, start)
            took[what].append((time.process_time() - began) / len(places))
    return {what: 1 / min(times[1:]) for what, times in took.items()}


def size(paths: Sequence[Path]) -> int:
    """Bytes of files, and of the files in folders."""
    files = itertools.chain.from_iterable(path.rglob("*") if path.is_dir() else [path] for path in paths)
    return sum(file.stat().st_size for file in files if file.is_file())


def copied(source: Store, ids: Sequence[str], folder: Path) -> dict[str, tuple[Store, str]]:
    """The volumes rewritten in one store, with each chunk shape and codec under a name of its own: what -> where."""
    store, made = Store.create(folder, source.manifest["spacing_zyx_mm"]), zarr.metadata
    copies: dict[str, tuple[Store, str]] = {}
    for (chunk, shape), (codec, compression) in itertools.product(CHUNKS_ZYX_VOX.items(), CODECS.items()):

        def metadata(array: np.ndarray, fill: int, chunks: Any, compression: Any = compression) -> dict[str, Any]:
            document = made(array, fill, chunks)
            document["codecs"][0]["configuration"]["codecs"][1:-1] = compression  # between bytes and checksum
            return document

        name = f"copy{len(copies)}"
        copies[f"chunks {chunk}, {codec}"] = store, name
        with mock.patch.object(zarr, "metadata", metadata):
            for id in ids:
                volume = source.read_volume(id)
                store.write_array(id, name, volume, np.minimum(shape, volume.shape).tolist())
    return copies


def blosc2_copies(source: Store, ids: Sequence[str], folder: Path) -> dict[str, Path]:
    """The volumes as b2nd arrays: what -> folder."""
    import blosc2

    fast = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}
    settings: dict[str, dict[str, Any]] = {
        "blosc2, its own defaults": {},
        "blosc2, 64³ in blocks of 32³, lz4, bitshuffle": {"chunks": (64,) * 3, "blocks": (32,) * 3, "cparams": fast},
        "blosc2, 64³ in blocks of 16³, lz4, bitshuffle": {"chunks": (64,) * 3, "blocks": (16,) * 3, "cparams": fast},
    }
    copies: dict[str, Path] = {}
    for what, setting in settings.items():
        copies[what] = folder / f"blosc{len(copies)}"
        copies[what].mkdir()
        for id in ids:
            blosc2.asarray(source.read_volume(id), urlpath=str(copies[what] / f"{id}.b2nd"), **setting)
    return copies


def scanner_file(folder: Path) -> Path:
    """A phantom as a scanner gives it, in square slices: (z, 512, 512) voxels, as .nii.gz."""
    seen = phantom.Patient(0).volume(SCANNER_SPACING_ZYX_MM)
    square = np.full((len(seen), SCANNER_COLUMNS, SCANNER_COLUMNS), AIR_HU, np.int16)
    square[:, : seen.shape[1], : seen.shape[2]] = seen
    return write_nifti(folder / "original.nii.gz", square)


def write_nifti(path: Path, volume: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(volume.T, np.eye(4)), path)
    return path


def crop_speed(store: Store, ids: Sequence[str], crops: int, rounds: int, originals: Sequence[str]) -> dict[str, Any]:
    """Crops a second and core of each way to keep the same volumes.

    Args:
      ids: scans to crop.
      crops: of each scan; the usual way reads one.
      rounds: of the measurement.
      originals: .nii.gz as scanners give them; none makes one of a phantom.

    Returns:
      "voxels_of_a_scan" and "voxels_of_an_original", means; and of each way as "rows": crops a second and core with
      the array "kept" open and opened "anew", "bytes" on disk as a share of raw int16, and "anew" as a multiple of the
      usual way's, on the store's grid ("times_same_grid") and on the originals' ("times_original").
    """
    # Nothing decoded is kept: a training set is far larger than TensorStore's cache.
    context = ts.Context({**store_files.CONTEXT.spec.to_json(), "cache_pool": {"total_bytes_limit": 0}})
    with tempfile.TemporaryDirectory() as temporary, mock.patch.object(store_files, "CONTEXT", context):
        folder, store = Path(temporary), Store.open(store.path)
        places = body_places(store, ids, crops)
        volumes = {id: store.read_volume(id) for id in ids}
        raw = sum(volume.nbytes for volume in volumes.values())
        ways: dict[tuple[str, str], tuple[Way, Sequence[Place]]] = {}  # by what is measured, and "kept" or "anew"
        share: dict[str, float] = {}  # bytes on disk of raw int16

        for what, (copy, name) in {
            "store as it is": (store, "volume"),
            **copied(store, ids, folder / "copies"),
        }.items():
            ways[what, "kept"] = from_store(copy, name, anew=False), places
            ways[what, "anew"] = from_store(copy, name, anew=True), places
            share[what] = size([Path(copy.path, "scans", id, name) for id in ids]) / raw
        if importlib.util.find_spec("blosc2"):
            for what, path in blosc2_copies(store, ids, folder).items():
                ways[what, "kept"] = from_blosc2(path, ids, anew=False), places
                ways[what, "anew"] = from_blosc2(path, ids, anew=True), places
                share[what] = size([path]) / raw
        else:
            print("blosc2: not installed")
        files = [write_nifti(folder / f"{id}.nii.gz", volume) for id, volume in volumes.items()]
        for what, load in USUAL.items():
            ways[f"{WHOLE}, {what}", "anew"] = whole_volume(folder, load), places[: len(ids)]
            share[f"{WHOLE}, {what}"] = size(files) / raw

        for (what, _), (way, _) in ways.items():
            for id, start in places[: len(ids)]:
                expected = padded(volumes[id].__getitem__, volumes[id].shape, start)
                np.testing.assert_array_equal(way(id, start), expected, err_msg=what)

        files = [Path(file).absolute() for file in originals] or [scanner_file(folder)]
        shapes_zyx = [nibabel.nifti1.load(file).shape[:3][::-1] for file in files]
        middles = [
            (str(file).removesuffix(".nii.gz"), (np.array(shape) - CROP) // 2)
            for file, shape in zip(files, shapes_zyx, strict=True)
        ]
        voxels = sum(map(math.prod, shapes_zyx))
        for what, load in USUAL.items():
            ways[f"{ORIGINAL}, {what}", "anew"] = whole_volume(folder, load), middles
            share[f"{ORIGINAL}, {what}"] = size(files) / (2 * voxels)
        measured = speeds(ways, rounds)

    rows: dict[str, dict[str, float]] = {what: {"bytes": value} for what, value in share.items()}
    for (what, opened), speed in measured.items():
        rows[what][opened] = speed
    for row in rows.values():
        row["times_same_grid"] = row["anew"] / rows[f"{WHOLE}, get_fdata"]["anew"]
        row["times_original"] = row["anew"] / rows[f"{ORIGINAL}, get_fdata"]["anew"]
    return {"voxels_of_a_scan": raw / 2 / len(ids), "voxels_of_an_original": voxels / len(files), "rows": rows}


def crop_table(rows: dict[str, dict[str, float]]) -> str:
    """One line for each way."""
    titles = {
        "kept": "kept open",
        "anew": "opened anew",
        "bytes": "bytes/raw",
        "times_same_grid": "× whole",
        "times_original": "× original",
    }
    lines = [f"{'64³ crops/s and core':<50}" + "".join(f"{title:>13}" for title in titles.values())]
    for what, row in rows.items():
        digits = {name: 2 if value < 10 else 0 for name, value in row.items()}
        cells = [f"{row[name]:,.{digits[name]}f}" if name in row else "-" for name in titles]
        lines.append(f"{what:<50}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


# ------------------------------------------------------------------- pairs and steps


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
