"""How many crops a second come from the store, from copies of other chunks and codecs, and from whole .nii.gz files.

The usual way is to read the whole .nii.gz through nibabel for every crop. It is measured on the volumes of the store
written as they are, and on files as a scanner gives them, whose grid is finer. All files are in the page cache, nothing
that was decoded is kept, as with thousands of scans, and all ways must give the same crops. Speeds per core are by the
time of the processor, summed over threads, so that other programs disturb them little. `data.py` runs it.
"""

import importlib.util
import itertools
import math
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np
import tensorstore as ts

from alice_jax.data import files as store_files
from alice_jax.data import phantom, views, zarr
from alice_jax.data.hounsfield import AIR_HU
from alice_jax.data.store import Store

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
