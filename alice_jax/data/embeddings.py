"""Embeddings as they lie in a store: projected, rounded to int8, nothing outside the body.

The network gives unit vectors of 128 channels per fine cell: 197 MB for a torso of 120×160×160 voxels in fp32.
On disk that becomes, once per embedder (`fit_codec`) and then per scan (`Codec.encode`):

- project onto the leading directions of the vectors' second moment (an SVD without centring, so that dot products
  survive) and normalise again: cosine similarities stay what they were up to the energy left out;
- round each direction to int8 by a step of its own;
- set cells outside the body to zero; matching skips them and the codec of the store squeezes them to nothing.

In the store: `STORE/embedder.json` (this codec and its hash), and per scan the arrays `fine` and `coarse`
((z, y, x, dims) int8) and `embedder`, the hash of the codec that they were written by, written last.
"""

import base64
import dataclasses
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from alice_jax.data.store import Store
from alice_jax.errors import UserError

Triple = tuple[int, int, int]
CODEC_FILE = "embedder.json"
HASH = "embedder"  # array of 32 bytes
CHUNK = 16  # cells read at once
FORMAT = 1
EPSILON = 1e-12


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Unit length over the last axis; zero vectors stay zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), EPSILON)


@dataclasses.dataclass(frozen=True)
class Level:
    """How one of the two levels is stored.

    stride_zyx_vox: store voxels per cell; cell i covers the voxels [i·stride, (i + 1)·stride).
    projection: (channels, dims) fp32 with orthonormal columns.
    step: (dims,) fp32; an int8 component times its step is the component.
    """

    stride_zyx_vox: Triple
    projection: np.ndarray
    step: np.ndarray

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """(…, channels) unit vectors -> (…, dims) int8."""
        components = normalise(vectors.astype(np.float32) @ self.projection) / self.step
        return np.clip(np.rint(components), -127, 127).astype(np.int8)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """(…, dims) int8 -> (…, dims) fp32 unit vectors (zero where nothing is stored)."""
        return normalise(stored * self.step)


@dataclasses.dataclass(frozen=True)
class Codec:
    """How embeddings of one embedder are stored.

    embedder: hash of the network's weights and settings.
    spacing_zyx_mm: of the scans that the embedder was trained on and can embed.
    """

    embedder: str
    spacing_zyx_mm: tuple[float, float, float]
    fine: Level
    coarse: Level

    @cached_property
    def hash(self) -> str:
        """Names embeddings that can be compared with each other."""
        return hashlib.sha256(json.dumps(self._as_dict(), sort_keys=True).encode()).hexdigest()

    def _as_dict(self) -> dict[str, Any]:
        def level(x: Level) -> dict[str, Any]:
            return {
                "stride_zyx_vox": list(x.stride_zyx_vox),
                "dims": len(x.step),
                "projection": _to_text(x.projection),
                "step": _to_text(x.step),
            }

        return {
            "format": FORMAT,
            "embedder": self.embedder,
            "spacing_zyx_mm": list(self.spacing_zyx_mm),
            "fine": level(self.fine),
            "coarse": level(self.coarse),
        }

    def save(self, store: Store) -> None:
        store.write_json(CODEC_FILE, self._as_dict() | {"hash": self.hash})


def _to_text(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<f4").tobytes()).decode()


def _from_text(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)


def fit_level(samples: Iterable[np.ndarray], stride_zyx_vox: Triple, dims: int) -> Level:
    """The projection onto the `dims` leading directions of the sampled unit vectors, each array (n, channels)."""
    samples = [np.asarray(x, np.float64) for x in samples]
    moment = sum(x.T @ x for x in samples)
    values, vectors = np.linalg.eigh(moment)
    projection = vectors[:, np.argsort(values)[::-1][:dims]].astype(np.float32)
    largest = np.max([np.abs(normalise(x @ projection)).max(axis=0) for x in samples], axis=0)
    # A quarter more than the samples' largest value for what other scans may hold; no component exceeds 1.
    step = np.clip(1.25 * largest, 1e-3, 1) / 127
    return Level(stride_zyx_vox, projection, step.astype(np.float32))


def read_codec(store: Store) -> Codec | None:
    """The codec of the store's embeddings; None where nothing was embedded yet."""
    raw = store.read_json(CODEC_FILE)
    if raw is None:
        return None
    if raw.get("format") != FORMAT:
        raise UserError(
            f"store {store.path}: embeddings of format {raw.get('format')}, this version reads {FORMAT}; "
            "run alice_jax.embed again"
        )

    def level(x: dict[str, Any]) -> Level:
        return Level(
            tuple(x["stride_zyx_vox"]), _from_text(x["projection"]).reshape(-1, x["dims"]), _from_text(x["step"])
        )

    return Codec(raw["embedder"], tuple(raw["spacing_zyx_mm"]), level(raw["fine"]), level(raw["coarse"]))


@dataclasses.dataclass(frozen=True)
class Embedding:
    """The embedding of one scan: compact as stored, expanded where it is searched.

    fine: (z, y, x, dims) int8, zero outside the body.  coarse: (z, y, x, dims) int8.
    shape_zyx: of the scan in voxels.
    """

    id: str
    shape_zyx: Triple
    codec: Codec
    fine: np.ndarray
    coarse: np.ndarray

    @property
    def grid_zyx(self) -> Triple:
        """The fine grid."""
        z, y, x = self.fine.shape[:3]
        return z, y, x

    @property
    def nbytes(self) -> int:
        """Bytes in memory, with what was expanded so far."""
        expanded = (self.__dict__.get(name) for name in ("body", "keys", "_coarse_vectors"))
        return sum(array.nbytes for array in (self.fine, self.coarse, *expanded) if array is not None)

    @cached_property
    def body(self) -> np.ndarray:
        """(cells,) int: the fine cells that hold a vector, as flat indices in C order."""
        rows = self.fine.reshape(-1, self.fine.shape[-1])
        rows = rows.view(np.int64) if rows.shape[1] % 8 == 0 else rows  # eight components at once
        return np.flatnonzero(rows.any(axis=-1))

    @cached_property
    def keys(self) -> np.ndarray:
        """(body cells, 2·dims) fp32: the fine and the interpolated coarse unit vector of every body cell."""
        cells, dims = self.body, self.fine.shape[-1]
        keys = np.empty((len(cells), dims + self.coarse.shape[-1]), np.float32)
        fine = self.fine.reshape(-1, dims)
        plane = self.grid_zyx[1] * self.grid_zyx[2]
        bounds = np.searchsorted(cells, np.arange(self.grid_zyx[0] + 1) * plane)
        for z, slab in enumerate(upsampled_slabs(self._coarse_vectors, self.grid_zyx, self._ratios)):
            rows = slice(bounds[z], bounds[z + 1])
            inside = cells[rows]
            keys[rows, :dims] = self.codec.fine.decode(fine[inside])
            keys[rows, dims:] = slab.reshape(plane, -1)[inside - z * plane]
        return keys

    def vectors(self, cells_zyx: np.ndarray) -> np.ndarray:
        """(n, 2·dims) fp32: the same for given cells (n, 3); the fine half is zero outside the body."""
        fine = self.codec.fine.decode(self.fine[tuple(cells_zyx.T)])
        return np.concatenate([fine, self._coarse_at(cells_zyx)], axis=1, dtype=np.float32)

    def vectors_at(self, points_zyx_vox: np.ndarray) -> np.ndarray:
        """(n, 2·dims) fp32 unit vectors at points (n, 3) between the cells' centres: trilinear, normalised again.

        Cells outside the body do not count; where all eight are, the fine half is zero.
        """
        at = (np.asarray(points_zyx_vox) + 0.5) / self.codec.fine.stride_zyx_vox - 0.5
        at = np.clip(at, 0, np.array(self.grid_zyx) - 1)
        low = at.astype(int)
        fine = np.zeros((len(at), self.fine.shape[-1]), np.float32)
        for corner in np.ndindex(2, 2, 2):
            cells = np.minimum(low + corner, np.array(self.grid_zyx) - 1)
            weight = np.where(corner, at - low, 1 - (at - low)).prod(axis=1, keepdims=True)
            fine += weight * self.codec.fine.decode(self.fine[tuple(cells.T)])
        return np.concatenate([normalise(fine), self._coarse_at(at)], axis=1, dtype=np.float32)

    def _coarse_at(self, cells_zyx: np.ndarray) -> np.ndarray:
        """(n, dims) unit vectors at fine cells (n, 3), which may be fractions."""
        weights = []
        for axis, (size, ratio) in enumerate(zip(self.coarse.shape[:3], self._ratios, strict=True)):
            at = np.clip((cells_zyx[:, axis] + 0.5) * ratio - 0.5, 0, size - 1)
            weights.append(np.maximum(1 - np.abs(at[:, None] - np.arange(size)), 0).astype(np.float32))
        return normalise(np.einsum("nz,ny,nx,zyxc->nc", *weights, self._coarse_vectors, optimize=True))

    @cached_property
    def _coarse_vectors(self) -> np.ndarray:
        return self.codec.coarse.decode(self.coarse)

    @property
    def _ratios(self) -> tuple[float, ...]:
        fine, coarse = self.codec.fine.stride_zyx_vox, self.codec.coarse.stride_zyx_vox
        return tuple(f / c for f, c in zip(fine, coarse, strict=True))


# ---------------------------------------------------------------- coarse to fine


def interpolation(size: int, coarse_size: int, ratio: float) -> np.ndarray:
    """(size, coarse_size) fp32 weights of linear interpolation with half-pixel centres, held beyond the outer centres.

    ratio: coarse cells per fine cell.

    >>> interpolation(4, 2, 0.5).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    at = np.clip((np.arange(size) + 0.5) * ratio - 0.5, 0, coarse_size - 1)
    low = np.minimum(at.astype(int), max(coarse_size - 2, 0))
    weights = np.zeros((size, coarse_size), np.float32)
    rows = np.arange(size)
    weights[rows, low] = 1 - (at - low)
    weights[rows, np.minimum(low + 1, coarse_size - 1)] += at - low
    return weights


def upsampled_slabs(
    coarse: np.ndarray, grid_zyx: Triple, ratios_zyx: tuple[float, ...] | None = None
) -> Iterator[np.ndarray]:
    """Coarse vectors (z, y, x, dims) on a fine grid: trilinear with half-pixel centres, normalised again.

    Yields (y, x, dims) fp32 for each fine z; one axis after the other by matrix products.
    ratios_zyx: coarse cells per fine cell; by default both grids are taken to cover the same extent.
    """
    ratios_zyx = ratios_zyx or tuple(c / n for c, n in zip(coarse.shape[:3], grid_zyx, strict=True))
    wz, wy, wx = (interpolation(n, c, r) for n, c, r in zip(grid_zyx, coarse.shape[:3], ratios_zyx, strict=True))
    flat = coarse.reshape(coarse.shape[0], -1)
    for z in range(grid_zyx[0]):
        plane = (wz[z] @ flat).reshape(coarse.shape[1], -1)
        rows = (wy @ plane).reshape(grid_zyx[1], coarse.shape[2], coarse.shape[3])
        yield normalise(np.matmul(wx, rows))


# ---------------------------------------------------------------- in the store


def body_cells(foreground: np.ndarray, grid_zyx: Triple, stride_zyx_vox: Triple) -> np.ndarray:
    """The store's body mask (a cell per 2 voxels) on a fine grid: a cell is body where any of its mask cells is."""
    assert all(stride % 2 == 0 for stride in stride_zyx_vox), stride_zyx_vox
    factors = [stride // 2 for stride in stride_zyx_vox]
    wanted = [n * f for n, f in zip(grid_zyx, factors, strict=True)]
    cut = foreground[tuple(slice(n) for n in wanted)]
    cut = np.pad(cut, [(0, n - have) for n, have in zip(wanted, cut.shape, strict=True)])
    (z, y, x), (fz, fy, fx) = grid_zyx, factors
    return np.any(cut.reshape(z, fz, y, fy, x, fx), axis=(1, 3, 5))


def write_embedding(store: Store, id: str, codec: Codec, fine: np.ndarray, coarse: np.ndarray) -> None:
    """Encodes and writes one scan's embedding.

    fine: (z, y, x, channels) unit vectors on the grid ceil(shape / stride); coarse likewise.
    """
    body = body_cells(store.foreground(id), fine.shape[:3], codec.fine.stride_zyx_vox)
    small = codec.fine.encode(fine)
    small[~body] = 0
    store.write_array(id, HASH, np.zeros(32, np.uint8))  # until all is written, the scan counts as not embedded
    store.write_array(id, "fine", small, chunks=(CHUNK, CHUNK, CHUNK, small.shape[-1]))
    store.write_array(id, "coarse", codec.coarse.encode(coarse))
    store.write_array(id, HASH, np.frombuffer(bytes.fromhex(codec.hash), np.uint8))


def embedded_by(store: Store, id: str) -> str | None:
    """Hash of the codec that a scan was embedded by; None where it was not, or not completely."""
    if not store.has_array(id, HASH):
        return None
    value = store.read_array(id, HASH).tobytes().hex()
    return value if int(value, 16) else None


def read_embedding(store: Store, id: str, codec: Codec | None = None) -> Embedding:
    """One scan's embedding.

    Args:
      codec: what it must have been written by; by default the store's own.

    Raises:
      UserError: nothing embedded, or embedded by another embedder.
    """
    codec = codec or read_codec(store)
    have = embedded_by(store, id)
    if codec is None or have is None:
        raise UserError(
            f"store {store.path}: scan {id} has no embedding; run python -m alice_jax.embed --store {store.path} "
            "--workdir DIR, DIR being that of a trained embedder"
        )
    if have != codec.hash:
        raise UserError(
            f"store {store.path}: scan {id} was embedded by {have[:12]}, the store's embedder is {codec.hash[:12]}; "
            "vectors of two embedders cannot be compared: run python -m alice_jax.embed again"
        )
    return Embedding(id, store.scan(id).shape_zyx, codec, store.read_array(id, "fine"), store.read_array(id, "coarse"))


class EmbeddingReader:
    """`read_embedding` that keeps the most recently used ones, up to a number of bytes (or the last one alone).

    Picklable and thread safe.

    Example:
      reader = EmbeddingReader(store, cache_bytes=256 << 20)
      found = matching.match(reader("a"), points_zyx_vox, reader("b"))
    """

    def __init__(self, store: Store, cache_bytes: int = 512 << 20):
        self.store, self.cache_bytes = store, cache_bytes
        self._codec: Codec | None = None
        self._kept: OrderedDict[str, Embedding] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, id: str) -> Embedding:
        with self._lock:
            embedding = self._kept.get(id)
            if self._codec is None:
                self._codec = read_codec(self.store)
        embedding = embedding or read_embedding(self.store, id, self._codec)
        with self._lock:
            self._kept[id] = embedding
            self._kept.move_to_end(id)
            # What is kept grows when it is first searched, so the sum is taken anew each time.
            while len(self._kept) > 1 and sum(e.nbytes for e in self._kept.values()) > self.cache_bytes:
                self._kept.popitem(last=False)
        return embedding
