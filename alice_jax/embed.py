"""Embeds every scan of a store: `python -m alice_jax.embed --store DIR --workdir DIR`.

DIR of --workdir is that of a trained embedder (`alice_jax.train --config=configs/embedder.py`). Scans that this
embedder has embedded are skipped, so running the command again continues where it stopped. Every device of the computer
takes a scan of its own. Many tasks may share a store, on one or on many machines: give each its --task-index of
--task-count and begin them in any order.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from alice_jax import checkpoint, cli, host, tasks
from alice_jax.data import embeddings
from alice_jax.data.cells import Triple, triple
from alice_jax.data.codec import Codec, normalise, settle_codec
from alice_jax.data.embedder_views import block_mean, network_input
from alice_jax.data.store import Store
from alice_jax.errors import UserError
from alice_jax.models.embedder import Embedder, receptive_radius_zyx, strides_zyx

Result = TypeVar("Result")
FIT_SCANS, FIT_CELLS = 8, 20_000  # what a codec is fitted on: scans, and cells of each
ROUND = 32  # sides are padded to multiples of this, so that few shapes are compiled
MARGIN = 32  # voxels that two tiles share at most on each side; what lies farther off hardly matters
TILE_BYTES = 3 << 30  # of the activations of one tile at the stem, roughly what its evaluation needs


@dataclasses.dataclass(frozen=True)
class TrainedEmbedder:
    """A trained network and what it was trained for.

    Attributes:
      variables: {"params", "batch_stats"} as numpy arrays.
      reduce: store voxels averaged into one of the network's, along each axis.
      window_hu: what its input is clipped to.
      spacing_mm: of the stores that it fits.
      dims: directions kept of each vector on disk.
      shifts: how many times finer along each axis the fine cells lie than the network's own (see `WholeVolume`).
    """

    network: Embedder
    variables: Any
    reduce: int
    window_hu: tuple[float, float]
    spacing_mm: float
    dims: int
    shifts: int = 1

    @property
    def strides_zyx_vox(self) -> tuple[Triple, Triple]:
        """Store voxels per fine and per coarse cell."""
        fine, coarse = (self.reduce * np.array(stride) for stride in strides_zyx(self.network))
        return triple(fine // self.shifts), triple(coarse)

    def hash(self) -> str:
        """Names the weights and all settings that the vectors depend on; not the dtype of the computation."""
        names = (f.name for f in dataclasses.fields(self.network) if f.name not in ("parent", "name", "dtype"))
        settings = {name: getattr(self.network, name) for name in names}
        digest = hashlib.sha256(
            json.dumps([settings, self.reduce, self.window_hu, self.spacing_mm, self.shifts], sort_keys=True).encode()
        )
        for path, value in sorted(traverse_util.flatten_dict(self.variables).items()):
            digest.update("/".join(path).encode() + np.ascontiguousarray(value, "<f4").tobytes())
        return digest.hexdigest()


def restore(workdir: str, step: int | None = None) -> TrainedEmbedder:
    """The embedder of a workdir, its newest checkpoint by default."""
    config, state = checkpoint.restore_arrays(workdir, step)
    if config.get("objective") != "embedder":
        raise UserError(
            f"--workdir {workdir}: its objective is {config.get('objective')!r}; "
            "give that of a run of configs/embedder.py"
        )
    network = tasks.embedder.network_of(config["model"], tasks.compute_dtype(config["precision"]))
    variables = {"params": state["params"], "batch_stats": state["extra"]["batch_stats"]}
    return TrainedEmbedder(
        network,
        variables,
        reduce=config["views"]["reduce"],
        window_hu=tuple(config["views"]["window_hu"]),
        spacing_mm=config["data"]["spacing_mm"],
        dims=config["storage"]["dims"],
        shifts=config["storage"]["shifts"],
    )


class WholeVolume:
    """`(fine, coarse) = whole(volume_hu)`: unit vectors of a whole scan as numpy arrays (z, y, x, features).

    The grids are ceil(shape / stride). A volume is continued at its far ends to a multiple of `ROUND` and, where it is
    too long for `tile_bytes`, cut along z into tiles that overlap by what the network can see (at most `MARGIN`).

    With `shifts` n the network sees n³ copies of the volume, each shifted by a part of a fine cell, and their fine
    cells interleave ("shift and stitch", Long et al., arXiv 1411.4038): cells n times finer, without another training.
    The coarse vectors are those of all copies together.

    It computes on `device`, the first one by default.
    """

    def __init__(self, embedder: TrainedEmbedder, tile_bytes: int = TILE_BYTES, device: jax.Device | None = None):
        self.embedder, self.tile_bytes = embedder, tile_bytes
        self._variables = jax.device_put(embedder.variables, device)
        self._apply = jax.jit(embedder.network.apply)  # runs where the variables lie

    def __call__(self, volume_hu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, network = self.embedder.shifts, self.embedder.network
        cell_vox = self.embedder.reduce * np.array(strides_zyx(network)[0])
        fine = np.empty((*(n * -(-np.array(volume_hu.shape) // cell_vox)), network.features), np.float32)
        coarse = np.zeros((), np.float32)
        for part in np.ndindex(n, n, n):
            # Centres of the parts of a cell lie at (part + 1/2) / n of it, those of the network's own at 1/2.
            offset = cell_vox * (2 * np.array(part) + 1 - n) // (2 * n)
            fine[part[0] :: n, part[1] :: n, part[2] :: n], of_copy = self._evaluate(volume_hu, offset)
            coarse = coarse + of_copy
        grid = (-(-size // s) for size, s in zip(volume_hu.shape, self.embedder.strides_zyx_vox[0], strict=True))
        return fine[tuple(map(slice, grid))], normalise(coarse)

    def _evaluate(self, volume_hu: np.ndarray, offset_zyx_vox: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The network's own cells of a copy whose voxel v shows the volume's voxel v + offset."""
        reduce, shape, strides = self.embedder.reduce, volume_hu.shape, strides_zyx(self.embedder.network)
        multiple = [reduce * int(np.lcm(ROUND, s)) for s in strides[1]]
        size = (-(-n // m) * m for n, m in zip(shape, multiple, strict=True))
        # Beyond its borders the volume goes on as it ends: air would look like the end of the body.
        copy = volume_hu[
            np.ix_(*(np.clip(np.arange(c) + o, 0, n - 1) for n, o, c in zip(shape, offset_zyx_vox, size, strict=True)))
        ]
        x = network_input(block_mean(copy, reduce), self.embedder.window_hu)
        parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for tile, keep in self._tiles(x.shape):
            vectors = jax.device_get(self._apply(self._variables, x[tile][None, ..., None]))
            for part, level, step in zip(parts, vectors, strides, strict=True):
                part.append(level[0, keep.start // step[0] : keep.stop // step[0]])
        grids = ([-(-n // (reduce * s)) for n, s in zip(shape, stride, strict=True)] for stride in strides)
        fine, coarse = (np.concatenate(part)[tuple(map(slice, g))] for part, g in zip(parts, grids, strict=True))
        return fine, coarse

    def _tiles(self, shape: Triple) -> Iterator[tuple[slice, slice]]:
        """(voxels along z that a tile reads, those of its own that are kept)."""
        network, depth = self.embedder.network, shape[0]
        step = strides_zyx(network)[1][0]
        margin = -(-min(receptive_radius_zyx(network)[0], MARGIN) // step) * step
        affordable = self.tile_bytes // (4 * network.channels[0] * shape[1] * shape[2])
        length = max(affordable // ROUND * ROUND, 2 * margin + -(-ROUND // step) * step)
        if length >= depth:
            yield slice(0, depth), slice(0, depth)
            return
        start, done = 0, 0
        while done < depth:
            start = min(start, depth - length)
            end = depth if start + length == depth else start + length - margin
            yield slice(start, start + length), slice(done - start, end - start)
            start, done = end - margin, end


def over_devices(
    wholes: Sequence[WholeVolume], work: Callable[[WholeVolume, str], Result], ids: Sequence[str]
) -> Iterator[Result]:
    """`work(whole, id)` of each scan, in order; at any time each of `wholes`, on a device of its own, has one scan."""
    idle: queue.SimpleQueue[WholeVolume] = queue.SimpleQueue()
    for whole in wholes:
        idle.put(whole)

    def run(id: str) -> Result:
        whole = idle.get()
        try:
            return work(whole, id)
        finally:
            idle.put(whole)

    with ThreadPoolExecutor(len(wholes)) as pool:
        yield from pool.map(run, ids)


def fit_codec(store: Store, embedder: TrainedEmbedder, wholes: Sequence[WholeVolume]) -> Codec:
    """How this embedder's vectors are stored: fitted on body cells of a few scans, evenly taken from the store."""
    ids = store.ids()
    chosen = [ids[i * len(ids) // min(FIT_SCANS, len(ids))] for i in range(min(FIT_SCANS, len(ids)))]

    def samples(whole: WholeVolume, id: str) -> tuple[np.ndarray, np.ndarray]:
        fine, coarse = whole(store.read_volume(id))
        body = fine[embeddings.body_cells(store.foreground(id), fine.shape[:3], embedder.strides_zyx_vox[0])]
        return np.random.default_rng(0).permutation(body)[:FIT_CELLS], coarse.reshape(-1, coarse.shape[-1])

    bar = tqdm(over_devices(wholes, samples, chosen), "Fitting the storage", len(chosen), unit="scan", file=sys.stderr)
    levels = (
        embeddings.fit_level(list(of_level), stride, embedder.dims)
        for of_level, stride in zip(zip(*bar, strict=True), embedder.strides_zyx_vox, strict=True)
    )
    return Codec(embedder.hash(), (embedder.spacing_mm,) * 3, *levels)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `embed_store` did: scans embedded and skipped, seconds each took, and the codec they share."""

    embedded: int
    skipped: int
    seconds_per_scan: float
    codec: Codec


def embed_store(
    store: Store,
    embedder: TrainedEmbedder,
    task_index: int = 0,
    task_count: int = 1,
    force: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Summary:
    """Embeds the scans of a store that this embedder has not embedded yet.

    Args:
      task_index, task_count: this call takes every task_count-th scan from task_index on.
      force: embed those again that are done.
      devices: each takes a scan at a time; all of this process by default.
    """
    ids = store.ids()
    if not ids:
        raise UserError(f"--store {store.path}: holds no scans; prepare some with python -m alice_jax.prepare")
    spacing = tuple(store.manifest["spacing_zyx_mm"])
    if any(abs(s - embedder.spacing_mm) > 1e-3 for s in spacing):
        raise UserError(
            f"--store {store.path}: its spacing is {spacing} mm and the embedder was trained at {embedder.spacing_mm}; "
            f"prepare the scans with --spacing {embedder.spacing_mm}, or train an embedder on this store"
        )
    wholes = [WholeVolume(embedder, device=device) for device in devices or jax.local_devices()]
    codec = settle_codec(store, embedder.hash(), lambda: fit_codec(store, embedder, wholes))
    mine = ids[task_index::task_count]
    todo = [id for id in mine if force or embeddings.embedded_by(store, id) != codec.hash]

    def embed_scan(whole: WholeVolume, id: str) -> None:
        embeddings.write_embedding(store, id, codec, *whole(store.read_volume(id)))

    began = time.perf_counter()
    for _ in tqdm(
        over_devices(wholes, embed_scan, todo), "Embedding", len(todo), unit="scan", file=sys.stderr, disable=not todo
    ):
        pass
    seconds = (time.perf_counter() - began) / max(len(todo), 1)
    return Summary(len(todo), len(mine) - len(todo), seconds, codec)


def bytes_per_scan(store: Store) -> float | None:
    """Mean bytes on disk of a scan's embedding; None where the store is no local folder or nothing is embedded."""
    sizes = []
    for id in store.ids():
        folders = [os.path.join(store.path, "scans", id, name) for name in embeddings.ARRAYS]
        if all(map(os.path.isdir, folders)):
            files = (os.path.join(at, name) for folder in folders for at, _, names in os.walk(folder) for name in names)
            sizes.append(sum(map(os.path.getsize, files)))
    return float(np.mean(sizes)) if sizes else None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = cli.Parser(
        prog="python -m alice_jax.embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, help="store of prepared scans")
    parser.add_argument("--workdir", required=True, help="folder of a trained embedder")
    parser.add_argument("--step", type=int, help="checkpoint to use; the newest by default")
    parser.add_task_arguments("scans")
    parser.add_argument("--force", action="store_true", help="embed again what is done")
    args = parser.parse_args(argv)
    host.settle()
    cli.check_task(args)
    store = Store.open(args.store)
    cli.say(f"reading the store {store.path}")
    summary = embed_store(store, restore(args.workdir, args.step), args.task_index, args.task_count, args.force)
    size = bytes_per_scan(store)
    print(
        f"embedded {summary.embedded} scans, {summary.skipped} were done already"
        + (f"; {summary.seconds_per_scan:.1f} s a scan" if summary.embedded else "")
        + (f"; {size / 1e6:.2f} MB a scan on disk" if size else "")
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
