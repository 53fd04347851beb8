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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from alice_jax.data import geometry, zarr
from alice_jax.data.scan import Scan
from alice_jax.errors import UserError

FORMAT, VERSION = "alice_jax store", 1
AIR_HU = -1024
FRAME = "index order (z, y, x); axes grow toward Left (x), Posterior (y), Superior (z)"
HANDLES = 256  # open arrays kept for reuse
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED = ("volume", "foreground")

# One for the process: TensorStore's cache, its thread limits and `memory://` live in a context.
_CONTEXT = ts.Context(
    {
        "cache_pool": {"total_bytes_limit": 64 << 20},
        "data_copy_concurrency": {"limit": 2},
        "file_io_concurrency": {"limit": 8},
    }
)
_ERRORS = (ValueError, OSError, KeyError, TypeError, IndexError)  # what TensorStore and JSON raise on a bad store


class Store:
    """See the module; made by `Store.open` and `Store.create`.

    >>> store = Store.create("memory://example", spacing_zyx_mm=(2, 2, 2))
    >>> store.ids()
    []
    """

    def __init__(self, path: str, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self._prepare_caches()

    def _prepare_caches(self) -> None:
        self._lock = threading.Lock()
        self._handles: collections.OrderedDict[str, ts.TensorStore] = collections.OrderedDict()
        self._scans: dict[str, Scan] = {}
        self._kvstore = _open_kvstore(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare_caches()

    # ---------------------------------------------------------------- making and opening

    @staticmethod
    def open(path: str | os.PathLike) -> "Store":
        """Opens an existing store."""
        path = _normalised(path)
        manifest = _read_json(_open_kvstore(path), "manifest.json", f"store {path}")
        if manifest is None:
            raise UserError(f"store {path}: no manifest.json there; make a store with `python -m alice_jax.prepare`")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"store {path}: its manifest.json is not that of a store")
        if manifest.get("version") != VERSION:
            raise UserError(
                f"store {path}: format version {manifest.get('version')} where this program reads {VERSION}; "
                "prepare the scans again into a new folder"
            )
        return Store(path, manifest)

    @staticmethod
    def create(
        path: str | os.PathLike, spacing_zyx_mm: Sequence[float], extra: dict[str, Any] | None = None
    ) -> "Store":
        """Makes a store, or opens the one that is there if it has the same spacing and extra settings."""
        path = _normalised(path)
        settings = {"spacing_zyx_mm": [float(s) for s in spacing_zyx_mm], "extra": extra or {}}
        kvstore = _open_kvstore(path)
        if _read_json(kvstore, "manifest.json", f"store {path}") is None:
            _refuse_foreign_folder(path)
            manifest = {"format": FORMAT, "version": VERSION, "frame": FRAME, **settings}
            _write_json(kvstore, "manifest.json", manifest, f"store {path}")
        store = Store.open(path)
        for name, wanted in settings.items():
            if store.manifest.get(name) != json.loads(json.dumps(wanted)):
                raise UserError(
                    f"store {path}: {name} is {store.manifest.get(name)} and {wanted} was asked for; "
                    "name another folder or ask for the same"
                )
        return store

    # ---------------------------------------------------------------- scans

    def ids(self) -> list[str]:
        """The complete scans, sorted."""
        return sorted(
            key[len("scans/") : -len("/scan.json")]
            for key in self._list("scans/")
            if key.endswith("/scan.json") and key.count("/") == 2
        )

    def scan(self, id: str) -> Scan:
        """The description of one scan."""
        if id not in self._scans:
            record = _read_json(self._kvstore, f"scans/{_checked(id)}/scan.json", f"scan {id}")
            if record is None:
                near = difflib.get_close_matches(id, self.ids(), n=3, cutoff=0.5)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                raise UserError(f"scan {id}: not in the store {self.path}{hint}")
            self._scans[id] = Scan.from_json(record, f"scan {id}: scan.json in the store {self.path}")
        return self._scans[id]

    def write_scan(self, scan: Scan, volume: np.ndarray, foreground: np.ndarray) -> None:
        """Writes a scan; one of the same id is replaced with all that was computed from it.

        `volume` int16 (z, y, x); `foreground` bool, shape ceil(z/2), ceil(y/2), ceil(x/2): cell i covers the voxels
        2i and 2i + 1.
        """
        half = tuple(-(-n // 2) for n in scan.shape_zyx)
        assert volume.dtype == np.int16 and volume.shape == tuple(scan.shape_zyx), (volume.dtype, volume.shape)
        assert foreground.shape == half, (foreground.shape, half)
        self.delete_scan(scan.id)
        self._write(scan.id, "volume", volume, AIR_HU)
        self._write(scan.id, "foreground", np.asarray(foreground, np.uint8), 0)
        self.update_scan(scan)

    def update_scan(self, scan: Scan) -> None:
        """Writes the description of a scan alone, its arrays being in place."""
        key = f"scans/{_checked(scan.id)}/scan.json"
        _write_json(self._kvstore, key, dataclasses.asdict(scan), f"scan {scan.id}")
        self._scans.pop(scan.id, None)

    def delete_scan(self, id: str) -> None:
        """Removes a scan and all that was computed from it; no error if there is none."""
        prefix = f"scans/{_checked(id)}/"
        with self._lock:
            self._scans.pop(id, None)
            for key in [key for key in self._handles if key.startswith(prefix)]:
                del self._handles[key]
        try:
            self._kvstore.delete_range(ts.KvStore.KeyRange(prefix + "scan.json", prefix + "scan.json\0")).result()
            self._kvstore.delete_range(_prefix_range(prefix)).result()
        except _ERRORS as error:
            raise UserError(f"scan {id}: cannot be replaced in the store {self.path}: {error}") from error

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
        prefix = f"scans/{_checked(id)}/{_checked(name)}/"
        keys = [key.removeprefix(prefix) for key in self._list(prefix)]
        # The metadata is written first and the only shard last, in one atomic step.
        return "zarr.json" in keys and any(key.startswith("c/") and "__lock" not in key for key in keys)

    def read_array(self, id: str, name: str) -> np.ndarray:
        """A whole array of a scan."""
        return self._read(id, name, ())

    def read_rows(self, id: str, name: str, rows: np.ndarray) -> np.ndarray:
        """The rows (n,) of an array's first axis, in this order."""
        return self._read(id, name, (rows,))

    def read_array_region(
        self, id: str, name: str, start: Sequence[int], shape: Sequence[int], fill: float = 0
    ) -> np.ndarray:
        """The part of an array from `start` (may be negative), `fill` outside it.

        `start` and `shape` may name only the leading axes; the others are read whole.
        """
        whole = self._handle(id, name).shape
        start = tuple(int(n) for n in start) + (0,) * (len(whole) - len(start))
        shape = tuple(int(n) for n in shape) + tuple(whole[len(shape) :])
        low = [min(max(s, 0), n) for s, n in zip(start, whole, strict=True)]
        high = [max(min(s + size, n), lo) for s, size, n, lo in zip(start, shape, whole, low, strict=True)]
        inside = self._read(id, name, tuple(slice(lo, hi) for lo, hi in zip(low, high, strict=True)))
        if inside.shape == shape:
            return inside
        region = np.full(shape, fill, inside.dtype)
        if inside.size:
            region[tuple(slice(lo - s, hi - s) for lo, hi, s in zip(low, high, start, strict=True))] = inside
        return region

    # ---------------------------------------------------------------- side files

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file of the whole store, for example embedder.json."""
        _write_json(self._kvstore, _checked(name), value, f"store {self.path}")

    def read_json(self, name: str) -> Any:
        """Reads a file of the whole store; None if there is none."""
        return _read_json(self._kvstore, _checked(name), f"store {self.path}")

    def settle_json(self, name: str, old: Any, new: Any) -> Any:
        """Writes `new` if the file still holds `old` (None: is not there), and returns what it holds then.

        Of several processes that read the same `old`, the first one writes and all get what it wrote.
        """
        what = f"store {self.path}"
        try:
            before = self._kvstore.read(_checked(name)).result()
            if (None if before.state == "missing" else json.loads(before.value)) == old:
                value = json.dumps(new, indent=1, allow_nan=False).encode()
                self._kvstore.write(name, value, if_equal=before.stamp.generation).result()
        except _ERRORS as error:
            raise UserError(f"{what}: {name} cannot be written: {error}") from error
        return _read_json(self._kvstore, name, what)

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

    def _list(self, prefix: str) -> list[str]:
        try:
            return [key.decode() for key in self._kvstore.list(_prefix_range(prefix)).result()]
        except _ERRORS as error:
            raise UserError(f"store {self.path}: cannot be listed: {error}") from error

    def _write(self, id: str, name: str, array: np.ndarray, fill: int, chunks: Sequence[int] | None = None) -> None:
        key = f"scans/{_checked(id)}/{_checked(name)}/"
        with self._lock:
            self._handles.pop(key, None)
        try:
            self._kvstore.delete_range(_prefix_range(key)).result()
            handle = ts.open(
                {**self._spec(key), "metadata": zarr.metadata(array, fill, chunks)}, create=True, context=_CONTEXT
            ).result()
            handle.write(np.ascontiguousarray(array)).result()
        except _ERRORS as error:
            raise UserError(f"scan {id}: {name} cannot be written to the store {self.path}: {error}") from error

    def _handle(self, id: str, name: str) -> ts.TensorStore:
        key = f"scans/{_checked(id)}/{_checked(name)}/"
        with self._lock:
            if key in self._handles:
                self._handles.move_to_end(key)
                return self._handles[key]
        try:
            handle = ts.open(self._spec(key), open=True, read=True, context=_CONTEXT).result()
        except _ERRORS as error:
            raise self._damaged(id, name, error) from error
        with self._lock:
            self._handles[key] = handle
            if len(self._handles) > HANDLES:
                self._handles.popitem(last=False)
        return handle

    def _read(self, id: str, name: str, region: tuple[slice | np.ndarray, ...]) -> np.ndarray:
        handle = self._handle(id, name)
        try:
            return handle[region].read().result() if region else handle.read().result()
        except _ERRORS as error:
            raise self._damaged(id, name, error) from error

    def _damaged(self, id: str, name: str, error: Exception) -> UserError:
        where = f"{self.path}/scans/{id}/{name}"
        return UserError(
            f"scan {id}: {where} is missing or damaged ({str(error)[:300]}); "
            f"remove the folder {self.path}/scans/{id} and prepare this scan again"
        )

    def _spec(self, key: str) -> dict[str, Any]:
        kvstore = self._kvstore.spec().to_json()
        return {
            "driver": "zarr3",
            "kvstore": {**kvstore, "path": kvstore.get("path", "") + key},
            "store_data_equal_to_fill_value": True,  # with the next line: a lost chunk is an error, never air
            "fill_missing_data_reads": False,
            "recheck_cached_data": "open",
        }


# -------------------------------------------------------------------- files


def _normalised(path: str | os.PathLike) -> str:
    path = os.fspath(path)
    return path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))


def _open_kvstore(path: str) -> ts.KvStore:
    spec = f"{path}/" if "://" in path else {"driver": "file", "path": f"{path}/"}
    try:
        return ts.KvStore.open(spec, context=_CONTEXT).result()
    except _ERRORS as error:
        raise UserError(f"store {path}: cannot be opened: {error}") from error


def _refuse_foreign_folder(path: str) -> None:
    """A typing mistake must not scatter a store among somebody's files."""
    if "://" in path or not os.path.lexists(path):
        return
    if not os.path.isdir(path):
        raise UserError(f"store {path}: is a file; name a folder")
    if any(not name.startswith((".", "manifest.json.")) for name in os.listdir(path)):
        raise UserError(f"store {path}: the folder holds other files and no store; name a new or an empty folder")


def _read_json(kvstore: ts.KvStore, key: str, what: str) -> Any:
    try:
        result = kvstore.read(key).result()
        return None if result.state == "missing" else json.loads(result.value)
    except _ERRORS as error:
        raise UserError(f"{what}: {key} cannot be read: {error}") from error


def _write_json(kvstore: ts.KvStore, key: str, value: Any, what: str) -> None:
    try:
        kvstore.write(key, json.dumps(value, indent=1, allow_nan=False).encode()).result()
    except _ERRORS as error:
        raise UserError(f"{what}: {key} cannot be written: {error}") from error


def _prefix_range(prefix: str) -> ts.KvStore.KeyRange:
    return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise UserError(f"name {name!r}: use letters, digits, dot, dash and underscore, a letter or digit first")
    return name
