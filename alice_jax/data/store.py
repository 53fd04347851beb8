"""The store: prepared scans and everything computed from them, on a local disk or in a bucket.

    STORE/manifest.json                   format version, frame, spacing_zyx_mm, extra
    STORE/scans/<id>/scan.json            one `Scan`; written last, so that an interrupted write leaves no scan
    STORE/scans/<id>/volume/              zarr3, int16 HU (z, y, x)
    STORE/scans/<id>/foreground/          zarr3, uint8 body mask at a stride of two voxels
    STORE/scans/<id>/<name>/              further zarr3 arrays: embeddings, labels, ...

Each array is one shard (a single file) of small compressed chunks with checksums, so that a crop reads the chunks it
touches and a damaged one is an error, never a wrong number. Open stores may be pickled and shared between threads;
processes must be spawned, not forked, since TensorStore runs threads of its own.
"""

import collections
import dataclasses
import difflib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from alice_jax.data import files, geometry, zarr
from alice_jax.data.copies import Copies
from alice_jax.data.files import Files
from alice_jax.data.hounsfield import AIR_HU
from alice_jax.data.scan import Scan
from alice_jax.errors import UserError

FORMAT, VERSION = "alice_jax store", 1
FRAME = "index order (z, y, x); axes grow toward Left (x), Posterior (y), Superior (z)"
HANDLES = 256  # open arrays kept for reuse
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED = ("volume", "foreground")

WAITS_S = (0.5, 2.0)  # before an array is read again: a mount may be gone for a moment, or a scan just be replaced


class Store:
    """See the module; made by `Store.open` and `Store.create`.

    >>> store = Store.create("memory://example", spacing_zyx_mm=(2, 2, 2))
    >>> store.ids()
    []
    """

    def __init__(self, path: str, manifest: dict[str, Any], copies: Copies | None = None):
        self.path, self.manifest, self.copies = path, manifest, copies
        self._prepare_caches()

    def _prepare_caches(self) -> None:
        self._lock = threading.Lock()
        self._handles: collections.OrderedDict[str, ts.TensorStore] = collections.OrderedDict()
        self._scans: dict[str, Scan] = {}
        self._files = Files(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest, "copies": self.copies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare_caches()

    # ---------------------------------------------------------------- making and opening

    @staticmethod
    def open(path: str | os.PathLike, copies: Copies | None = None) -> "Store":
        """Opens an existing store. Arrays of one that lies in a bucket are read from `copies` of them, if given."""
        path = files.normalised(path)
        manifest = Files(path).read_json("manifest.json", f"store {path}")
        if manifest is None:
            raise UserError(f"store {path}: no manifest.json there; make a store with `python -m alice_jax.prepare`")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"store {path}: its manifest.json is not that of a store")
        if manifest.get("version") != VERSION:
            raise UserError(
                f"store {path}: format version {manifest.get('version')} where this program reads {VERSION}; "
                "prepare the scans again into a new folder"
            )
        return Store(path, manifest, copies if "://" in path else None)

    @staticmethod
    def create(
        path: str | os.PathLike, spacing_zyx_mm: Sequence[float], extra: dict[str, Any] | None = None
    ) -> "Store":
        """Makes a store, or opens the one that is there if it has the same spacing and extra settings."""
        path = files.normalised(path)
        settings = {"spacing_zyx_mm": [float(s) for s in spacing_zyx_mm], "extra": extra or {}}
        folder = Files(path)
        if folder.read_json("manifest.json", f"store {path}") is None:
            files.refuse_foreign_folder(path)
            manifest = {"format": FORMAT, "version": VERSION, "frame": FRAME, **settings}
            folder.write_json("manifest.json", manifest, f"store {path}")
        store = Store.open(path)
        for name, wanted in settings.items():
            if store.manifest.get(name) != json.loads(json.dumps(wanted)):
                raise UserError(
                    f"store {path}: {name} is {store.manifest.get(name)} and {wanted} was asked for; "
                    "name another folder or ask for the same"
                )
        return store

    # ---------------------------------------------------------------- scans

    def ids(self, having: str | None = None) -> list[str]:
        """The complete scans, sorted; all, or those that have an array of this name."""
        files: dict[str, list[str]] = {}
        for key in self._files.list("scans/"):
            id, _, file = key.removeprefix("scans/").partition("/")
            files.setdefault(id, []).append(file)
        complete = sorted(id for id, names in files.items() if "scan.json" in names)
        return complete if having is None else [id for id in complete if _whole(_below(f"{having}/", files[id]))]

    def scan(self, id: str) -> Scan:
        """The description of one scan."""
        return self.scans([id])[0]

    def scans(self, ids: Sequence[str]) -> list[Scan]:
        """The descriptions of scans; many are read at once."""
        missing = {f"scans/{_checked(id)}/scan.json": id for id in ids if id not in self._scans}
        records = self._files.read_jsons({key: f"scan {id}" for key, id in missing.items()})
        for id, record in zip(missing.values(), records, strict=True):
            if record is None:
                near = difflib.get_close_matches(id, self.ids(), n=3, cutoff=0.5)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                raise UserError(f"scan {id}: not in the store {self.path}{hint}")
            self._scans[id] = Scan.from_json(record, f"scan {id}: scan.json in the store {self.path}")
        return [self._scans[id] for id in ids]

    def patients(self, ids: Sequence[str]) -> dict[str, str]:
        """The patient of each scan, by its id."""
        return {scan.id: scan.patient for scan in self.scans(ids)}

    def write_scan(self, scan: Scan, volume: np.ndarray, foreground: np.ndarray) -> None:
        """Writes a scan; one of the same id is replaced with all that was computed from it.

        `volume` int16 (z, y, x); `foreground` bool, shape ceil(z/2), ceil(y/2), ceil(x/2): cell i covers the voxels
        2i and 2i + 1.
        """
        half = _half(scan.shape_zyx)
        assert volume.dtype == np.int16 and volume.shape == tuple(scan.shape_zyx), (volume.dtype, volume.shape)
        assert foreground.shape == half, (foreground.shape, half)
        self.delete_scan(scan.id)
        self._write(scan.id, "volume", volume, AIR_HU)
        self._write(scan.id, "foreground", np.asarray(foreground, np.uint8), 0)
        self.update_scan(scan)

    def update_scan(self, scan: Scan) -> None:
        """Writes the description of a scan alone, its arrays being in place."""
        key = f"scans/{_checked(scan.id)}/scan.json"
        self._files.write_json(key, dataclasses.asdict(scan), f"scan {scan.id}")
        self._scans.pop(scan.id, None)

    def delete_scan(self, id: str) -> None:
        """Removes a scan and all that was computed from it; no error if there is none."""
        prefix = f"scans/{_checked(id)}/"
        with self._lock:
            self._scans.pop(id, None)
            for key in [key for key in self._handles if key.startswith(prefix)]:
                del self._handles[key]
        self._files.delete(prefix + "scan.json", f"scan {id}")
        self._files.delete(prefix, f"scan {id}")

    def read_volume(self, id: str) -> np.ndarray:
        """int16 HU (z, y, x), the whole of it."""
        return self.read_array(id, "volume")

    def read_crop(
        self, id: str, start_zyx_vox: Sequence[int], shape_zyx: Sequence[int], fill: int = AIR_HU
    ) -> np.ndarray:
        """int16 HU of `shape_zyx` from `start_zyx_vox` (may be negative); `fill` outside the volume.

        Reads only the chunks that it touches.
        """
        return self.read_array_region(id, "volume", start_zyx_vox, shape_zyx, fill)

    def foreground(self, id: str) -> np.ndarray:
        """bool body mask; cell i covers the voxels 2i and 2i + 1 of each axis."""
        return self.read_array(id, "foreground").astype(bool)

    def disk_bytes(self, id: str) -> int | None:
        """What a scan takes on a local disk; None where the store lies elsewhere."""
        if "://" in self.path:
            return None
        folder = Path(self.path, "scans", _checked(id))
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    # ---------------------------------------------------------------- arrays beside the volume

    def write_array(self, id: str, name: str, array: np.ndarray, chunks: Sequence[int] | None = None) -> None:
        """Stores an array of a scan under a name, replacing one that is there. `chunks` is the unit of reading."""
        if name in RESERVED:
            raise ValueError(f"array name {name}: belongs to write_scan")
        self._write(id, name, array, 0, chunks)

    def has_array(self, id: str, name: str) -> bool:
        """Whether the array is there, completely written."""
        prefix = _key(id, name)
        return _whole(_below(prefix, self._files.list(prefix)))

    def read_array(self, id: str, name: str) -> np.ndarray:
        """A whole array of a scan."""
        return self._read(id, name, lambda handle: handle.read().result())

    def read_rows(self, id: str, name: str, rows: np.ndarray) -> np.ndarray:
        """The rows (n,) of an array's first axis, in this order."""
        return self._read(id, name, lambda handle: handle[rows].read().result())

    def read_array_region(
        self, id: str, name: str, start: Sequence[int], shape: Sequence[int], fill: float = 0
    ) -> np.ndarray:
        """The part of an array from `start` (may be negative), `fill` outside it.

        `start` and `shape` may name only the leading axes; the others are read whole.
        """
        return self._read(id, name, lambda handle: _region(handle, start, shape, fill))

    # ---------------------------------------------------------------- side files

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file of the whole store, for example embedder.json."""
        self._files.write_json(_checked(name), value, f"store {self.path}")

    def read_json(self, name: str) -> Any:
        """Reads a file of the whole store; None if there is none."""
        return self._files.read_json(_checked(name), f"store {self.path}")

    def settle_json(self, name: str, old: Any, new: Any) -> Any:
        """Writes `new` if the file still holds `old` (None: is not there), and returns what it holds then.

        Of several processes that read the same `old`, the first one writes and all get what it wrote.
        """
        return self._files.settle_json(_checked(name), old, new, f"store {self.path}")

    # ---------------------------------------------------------------- points

    def to_world(self, id: str, points_zyx_vox: np.ndarray) -> np.ndarray:
        """(n, 3) stored voxels (z, y, x) -> (n, 3) LPS millimetres (x, y, z)."""
        return geometry.index_to_world(points_zyx_vox, self.scan(id).affine_lps)

    def from_world(self, id: str, points_xyz_lps_mm: np.ndarray) -> np.ndarray:
        """(n, 3) LPS millimetres (x, y, z) -> (n, 3) float stored voxels (z, y, x)."""
        return geometry.world_to_index(points_xyz_lps_mm, self.scan(id).affine_lps)

    def to_original_ijk(self, id: str, points_zyx_vox: np.ndarray) -> np.ndarray:
        """(n, 3) stored voxels (z, y, x) -> (n, 3) float indices (i, j, k) of the original file."""
        return geometry.world_to_original(self.to_world(id, points_zyx_vox), self.scan(id).original["affine_ras"])

    def from_original_ijk(self, id: str, points_ijk: np.ndarray) -> np.ndarray:
        """(n, 3) indices (i, j, k) of the original file -> (n, 3) float stored voxels (z, y, x)."""
        world_xyz_lps_mm = geometry.original_to_world(points_ijk, self.scan(id).original["affine_ras"])
        return self.from_world(id, world_xyz_lps_mm)

    # ---------------------------------------------------------------- inside

    def _write(self, id: str, name: str, array: np.ndarray, fill: int, chunks: Sequence[int] | None = None) -> None:
        key = _key(id, name)
        self._forget(key)
        self._files.delete(key, f"scan {id}")
        spec = {**self._spec(key), "metadata": zarr.metadata(array, fill, chunks)}
        try:
            handle = ts.open(spec, create=True, context=files.CONTEXT).result()
            handle.write(np.ascontiguousarray(array)).result()
        except files.ERRORS as error:
            message = f"scan {id}: {name} cannot be written to the store {self.path}: {files.told(error)}"
            raise UserError(message) from error

    def _read(self, id: str, name: str, use: Callable[[ts.TensorStore], np.ndarray]) -> np.ndarray:
        """What `use` reads from an array, in a second and a third try if need be."""
        key = _key(id, name)
        for wait_s in (*WAITS_S, None):
            try:
                return use(self._handle(id, name, key))
            except UserError:  # of scan.json
                raise
            except files.ERRORS as error:
                self._forget(key)
                if wait_s is None or files.out_of_reach(error):
                    raise self._failed(id, name, error) from error
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    def _handle(self, id: str, name: str, key: str) -> ts.TensorStore:
        with self._lock:
            if key in self._handles:
                self._handles.move_to_end(key)
                return self._handles[key]
        spec = self._spec(key)
        if self.copies:
            spec["kvstore"] = {"driver": "file", "path": self.copies.local(self._files, key) + "/"}
        handle = ts.open(spec, open=True, read=True, context=files.CONTEXT).result()
        self._check(id, name, handle)
        with self._lock:
            self._handles[key] = handle
            if len(self._handles) > HANDLES:
                self._handles.popitem(last=False)
        return handle

    def _check(self, id: str, name: str, handle: ts.TensorStore) -> None:
        """zarr.json has no checksum of its own: what it says must fit its one shard, and scan.json."""
        if name in RESERVED:
            shape = self.scan(id).shape_zyx
            wanted = (shape, np.int16) if name == "volume" else (_half(shape), np.uint8)
            if (handle.shape, handle.dtype.numpy_dtype) != wanted:
                raise ValueError(f"it holds {handle.shape} {handle.dtype.name}, where the scan has {shape}")
        shard = np.array(handle.chunk_layout.write_chunk.shape)
        if (np.array(handle.shape) > shard).any():
            raise ValueError(f"zarr.json says {handle.shape}, more than its shard of {tuple(shard)}")

    def _forget(self, key: str) -> None:
        with self._lock:
            self._handles.pop(key, None)
        if self.copies:
            self.copies.forget(self._files, key)

    def _failed(self, id: str, name: str, error: Exception) -> UserError:
        folder = f"{self.path}/scans/{id}"
        if files.out_of_reach(error):
            return UserError(
                f"scan {id}: {folder}/{name} is out of reach ({files.told(error)}); "
                "run the same command again when the server answers"
            )
        return UserError(
            f"scan {id}: {folder}/{name} is missing or damaged ({files.told(error)}); "
            f"remove the folder {folder} and prepare this scan again"
        )

    def _spec(self, key: str) -> dict[str, Any]:
        return {
            "driver": "zarr3",
            "kvstore": self._files.spec(key),
            "store_data_equal_to_fill_value": True,  # with the next line: a lost chunk is an error, never air
            "fill_missing_data_reads": False,
            "recheck_cached_data": "open",
        }


def _region(handle: ts.TensorStore, start: Sequence[int], shape: Sequence[int], fill: float) -> np.ndarray:
    whole = handle.shape
    start = tuple(int(n) for n in start) + (0,) * (len(whole) - len(start))
    shape = tuple(int(n) for n in shape) + tuple(whole[len(shape) :])
    low = [min(max(s, 0), n) for s, n in zip(start, whole, strict=True)]
    high = [max(min(s + size, n), lo) for s, size, n, lo in zip(start, shape, whole, low, strict=True)]
    inside = handle[tuple(slice(lo, hi) for lo, hi in zip(low, high, strict=True))].read().result()
    if inside.shape == shape:
        return inside
    region = np.full(shape, fill, inside.dtype)
    if inside.size:
        region[tuple(slice(lo - s, hi - s) for lo, hi, s in zip(low, high, start, strict=True))] = inside
    return region


def _below(prefix: str, keys: Sequence[str]) -> list[str]:
    """The keys that begin with a prefix, without it."""
    return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]


def _whole(files: Collection[str]) -> bool:
    """Whether an array with these files is completely written: its metadata come first and its only shard last."""
    return "zarr.json" in files and any(file.startswith("c/") and "__lock" not in file for file in files)


def _half(shape_zyx: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // 2) for n in shape_zyx)


def _key(id: str, name: str) -> str:
    return f"scans/{_checked(id)}/{_checked(name)}/"


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise UserError(f"name {name!r}: use letters, digits, dot, dash and underscore, a letter or digit first")
    return name
