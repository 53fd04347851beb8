"""Embeddings as they lie in a store: projected, rounded to int8, nothing outside the body, in the order of a search.

The network gives unit vectors of 128 channels per fine cell: 197 MB for a torso of 120×160×160 voxels in fp32.
On disk that becomes, once per embedder (`fit_codec`) and then per scan (`Codec.encode`):

- project onto the leading directions of the vectors' second moment (an SVD without centring, so that dot products
  survive) and normalise again: cosine similarities stay what they were up to the energy left out;
- round each direction to int8 by a step of its own;
- set cells outside the body to zero; matching skips them and the codec of the store squeezes them to nothing;
- cut the grid into cubes of about 16 mm (`octree`), leave out those without body, and keep beside the cells what a
  search is guided by: for each cube and its parts the mean of the cells' vectors, fine and coarse one behind another.

In the store: `STORE/embedder.json` (this codec and its hash), and per scan `cubes` ((z, y, x, 2·dims) int8, zero where
there is no body), `fine` ((cubes with body, bytes) int8: first the means of the parts, (parts, 2·dims), then the cells,
(cells, dims)), `coarse` ((z, y, x, dims) int8) and `embedder`, the hash of the codec that wrote them all, last.
"""

import dataclasses
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from alice_jax.data.cells import Triple
from alice_jax.data.codec import Codec, Level, fit_level, normalise, read_codec
from alice_jax.data.foreground import body_share
from alice_jax.data.store import Store
from alice_jax.data.upsampling import centres, corners, on_lattice, upsampled_slabs
from alice_jax.errors import UserError

__all__ = [
    "Codec",
    "Embedding",
    "EmbeddingReader",
    "Level",
    "body_cells",
    "embedded_by",
    "fit_level",
    "in_body",
    "normalise",
    "read_codec",
    "read_embedding",
    "upsampled_slabs",
    "write_embedding",
]

HASH = "embedder"  # array of 32 bytes
ARRAYS = ("cubes", "fine", "coarse", HASH)
EXPANDED = ("body", "keys", "cube_row", "cube_cells", "cube_vectors", "coarse_vectors")
CHUNK_BYTES = 8 << 10  # read at once, and at least what belongs to a cube


class Rows:
    """Rows of an array in a store, each read when it is first asked for.

    array: of all rows; those not read yet are undefined, and take no memory before they are.
    """

    def __init__(self, shape: tuple[int, ...], read: Callable[[np.ndarray], np.ndarray]):
        self.array, self._read = np.empty(shape, np.int8), read
        self._missing = np.ones(shape[0], bool)

    def load(self, rows: np.ndarray) -> None:
        """Makes the rows (n,), which may repeat, available."""
        wanted = rows[self._missing[rows]]
        if len(wanted) and self.array.size:
            wanted = np.unique(wanted)
            self.array[wanted] = self._read(wanted)
            self._missing[wanted] = False  # last, as another thread may ask for the same

    @property
    def nbytes(self) -> int:
        """Bytes read so far."""
        return self.array.nbytes // max(len(self.array), 1) * int(np.count_nonzero(~self._missing))


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """The embedding of one scan: what guides a search, and the cells as far as they were looked at.

    shape_zyx: of the scan in voxels.
    cubes, coarse: as stored.  rows: of `fine` as stored, read when needed.
    """

    id: str
    shape_zyx: Triple
    codec: Codec
    cubes: np.ndarray
    coarse: np.ndarray
    rows: Rows

    @cached_property
    def grid_zyx(self) -> Triple:
        """The fine grid."""
        z, y, x = (-(-n // s) for n, s in zip(self.shape_zyx, self.codec.fine.stride_zyx_vox, strict=True))
        return z, y, x

    @property
    def nbytes(self) -> int:
        """Bytes in memory, with what was read and expanded so far."""
        expanded = [self.__dict__[name] for name in EXPANDED if name in self.__dict__]
        return sum(part.nbytes for part in (self.cubes, self.coarse, self.rows, *expanded))

    # -------------------------------------------------------- cells of the search

    @cached_property
    def cube_row(self) -> np.ndarray:
        """(z, y, x) int: the row of a cube, −1 for one without body."""
        body = filled(self.cubes)
        return np.where(body, np.cumsum(body).reshape(body.shape) - 1, -1)

    @cached_property
    def cube_cells(self) -> np.ndarray:
        """(rows, 3): the first fine cell of each cube."""
        return np.argwhere(self.cube_row >= 0) * self.codec.octree.cube_zyx

    @cached_property
    def cube_vectors(self) -> np.ndarray:
        """(rows, 2·dims) fp32: fine and coarse unit vector of each cube."""
        return self.cubes[self.cube_row >= 0] * self.codec.step

    @cached_property
    def guide(self) -> np.ndarray:
        """(rows, parts, 2·dims) int8: the mean vectors of the parts of cubes, as far as read."""
        dims = len(self.codec.step)
        return self.rows.array[:, : self.codec.octree.starts[-1] * dims].reshape(len(self.rows.array), -1, dims)

    @cached_property
    def cells(self) -> np.ndarray:
        """(rows, cells, dims) int8: the fine vectors, as far as read."""
        start, dims = self.codec.octree.starts[-1] * len(self.codec.step), len(self.codec.fine.step)
        return self.rows.array[:, start:].reshape(len(self.rows.array), -1, dims)

    def rows_of(self, cells_zyx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and place in it of fine cells (n, 3) of the grid; row −1 where there is none."""
        cube, place = np.divmod(cells_zyx, self.codec.octree.cube_zyx)
        return self.cube_row[tuple(cube.T)], self.codec.octree.slots[tuple(place.T)]

    def stored(self, cells_zyx: np.ndarray) -> np.ndarray:
        """(n, dims) int8 of fine cells (n, 3) of the grid, zero outside the body."""
        rows, places = self.rows_of(cells_zyx)
        inside = rows >= 0
        self.rows.load(rows[inside])
        found = self.cells[rows, places]
        found[~inside] = 0
        return found

    def vectors(self, cells_zyx: np.ndarray) -> np.ndarray:
        """(n, 2·dims) fp32: fine and interpolated coarse unit vector of fine cells (n, 3); the fine half is zero
        outside the body."""
        fine = self.codec.fine.decode(self.stored(cells_zyx))
        return np.concatenate([fine, self.coarse_at(cells_zyx)], axis=1, dtype=np.float32)

    def vectors_on(self, axes_zyx: Sequence[np.ndarray]) -> np.ndarray:
        """(z, y, x, 2·dims) of `vectors` at all combinations of fine cells along each axis."""
        cells_zyx = np.stack(np.meshgrid(*axes_zyx, indexing="ij"), axis=-1)
        fine = self.codec.fine.decode(self.stored(cells_zyx.reshape(-1, 3))).reshape(*cells_zyx.shape[:3], -1)
        at_zyx = [
            centres(cells, size, ratio)
            for cells, size, ratio in zip(axes_zyx, self.coarse.shape, self.codec.ratios, strict=False)
        ]
        coarse = normalise(on_lattice(self.coarse_vectors, at_zyx))
        return np.concatenate([fine, coarse], axis=-1, dtype=np.float32)

    def vectors_at(self, points_zyx_vox: np.ndarray) -> np.ndarray:
        """(n, 2·dims) fp32 unit vectors at points (n, 3) between the cells' centres: trilinear, normalised again.

        Cells outside the body do not count; where all eight are, the fine half is zero.
        """
        at = centres(np.asarray(points_zyx_vox), np.array(self.grid_zyx), 1 / np.array(self.codec.fine.stride_zyx_vox))
        cells, weights = corners(at, self.grid_zyx)
        cells_zyx = np.stack(np.unravel_index(cells.ravel(), self.grid_zyx), axis=1)
        around = self.codec.fine.decode(self.stored(cells_zyx)).reshape(*weights.shape, -1)
        fine = normalise(np.matmul(weights[:, None], around)[:, 0])
        return np.concatenate([fine, self.coarse_at(at)], axis=1, dtype=np.float32)

    def coarse_at(self, cells_zyx: np.ndarray) -> np.ndarray:
        """(n, dims) unit vectors at fine cells (n, 3), which may be fractions."""
        grid, dims = self.coarse.shape[:3], self.coarse.shape[-1]
        cells, weights = corners(centres(cells_zyx, np.array(grid), np.array(self.codec.ratios)), grid)
        around = self.coarse_vectors.reshape(-1, dims).take(cells, axis=0)
        return normalise(np.matmul(weights[:, None], around)[:, 0])

    @cached_property
    def coarse_vectors(self) -> np.ndarray:
        """(z, y, x, dims) fp32."""
        return self.codec.coarse.decode(self.coarse)

    # -------------------------------------------------------- all cells

    def dense(self) -> np.ndarray:
        """(z, y, x, dims) int8: the fine cells on their grid."""
        self.rows.load(np.arange(len(self.cells)))
        fine = np.zeros((*self.grid_zyx, self.cells.shape[-1]), np.int8)
        cells = (self.cube_cells[:, None] + self.codec.octree.places).reshape(-1, 3)
        inside = (cells < self.grid_zyx).all(axis=1)
        fine[tuple(cells[inside].T)] = self.cells.reshape(len(cells), -1)[inside]
        return fine

    @cached_property
    def body(self) -> np.ndarray:
        """(cells,) int: the fine cells that hold a vector, as flat indices in C order."""
        return np.flatnonzero(filled(self.dense()))

    @cached_property
    def keys(self) -> np.ndarray:
        """(body cells, 2·dims) fp32: the fine and the interpolated coarse unit vector of every body cell."""
        fine = self.dense()
        cells, dims = self.body, fine.shape[-1]
        keys = np.empty((len(cells), dims + self.coarse.shape[-1]), np.float32)
        plane = self.grid_zyx[1] * self.grid_zyx[2]
        bounds = np.searchsorted(cells, np.arange(self.grid_zyx[0] + 1) * plane)
        for z, slab in enumerate(upsampled_slabs(self.coarse_vectors, self.grid_zyx, self.codec.ratios)):
            rows = slice(bounds[z], bounds[z + 1])
            inside = cells[rows]
            keys[rows, :dims] = self.codec.fine.decode(fine.reshape(-1, dims)[inside])
            keys[rows, dims:] = slab.reshape(plane, -1)[inside - z * plane]
        return keys


def in_body(vectors: np.ndarray, codec: Codec) -> np.ndarray:
    """(…, 2·dims) of `Embedding.vectors` -> (…) bool, which of their cells are of the body: the fine half is not 0."""
    return np.any(vectors[..., : len(codec.fine.step)], axis=-1, keepdims=True)[..., 0]


def filled(stored: np.ndarray) -> np.ndarray:
    """(…, dims) int8 -> (…) bool, where there is a vector."""
    if stored.shape[-1] % 8 == 0:
        stored = np.ascontiguousarray(stored).view(np.int64)  # eight components at once
    return np.any(stored, axis=-1, keepdims=True)[..., 0]


# ---------------------------------------------------------------- in the store


def body_cells(foreground: np.ndarray, grid_zyx: Triple, stride_zyx_vox: Triple) -> np.ndarray:
    """The store's body mask (a cell per 2 voxels) on a fine grid: a cell is body where any of its mask cells is."""
    return body_share(foreground, np.zeros(3, int), np.array(grid_zyx), stride_zyx_vox) > 0


def write_embedding(store: Store, id: str, codec: Codec, fine: np.ndarray, coarse: np.ndarray) -> None:
    """Encodes and writes one scan's embedding.

    fine: (z, y, x, channels) unit vectors on the grid ceil(shape / stride); coarse likewise.
    """
    body = body_cells(store.foreground(id), fine.shape[:3], codec.fine.stride_zyx_vox)
    small_coarse = codec.coarse.encode(coarse)
    cubes, rows = arranged(codec, fine, body, small_coarse)
    store.write_array(id, HASH, np.zeros(32, np.uint8))  # until all is written, the scan counts as not embedded
    store.write_array(id, "cubes", cubes)
    if len(rows):
        store.write_array(id, "fine", rows, chunks=(max(CHUNK_BYTES // rows.shape[1], 1), rows.shape[1]))
    store.write_array(id, "coarse", small_coarse)
    store.write_array(id, HASH, np.frombuffer(bytes.fromhex(codec.hash), np.uint8))


def arranged(codec: Codec, fine: np.ndarray, body: np.ndarray, coarse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The arrays `cubes` and `fine` of a store (see the module).

    Args:
      fine: (z, y, x, channels) unit vectors.  body: (z, y, x) bool.  coarse: (z, y, x, dims) int8, as stored.
    """
    tree, dims = codec.octree, len(codec.fine.step)
    slabs = upsampled_slabs(codec.coarse.decode(coarse), fine.shape[:3], codec.ratios)
    cubes = np.zeros((*tree.grid(fine.shape[:3]), len(codec.step)), np.int8)
    rows = [np.empty((0, codec.row_bytes), np.int8)]
    for layer in range(len(cubes)):  # of cubes: all cells at once would be a few hundred MB
        part = slice(layer * tree.cube_zyx[0], (layer + 1) * tree.cube_zyx[0])
        small = codec.fine.encode(fine[part])
        small[~body[part]] = 0
        around = np.stack(list(itertools.islice(slabs, len(small))))
        vectors = np.concatenate([codec.fine.decode(small), around], axis=-1, dtype=np.float32)
        vectors[~filled(small)] = 0
        ordered = tree.cubes(small)[0]
        inside = ordered.any(axis=(-2, -1))
        if not inside.any():
            continue
        within = tree.cubes(vectors)[0][inside]
        means = np.concatenate(tree.sums(within), axis=1)
        halves = codec.fine.rounded(normalise(means[..., :dims])), codec.coarse.rounded(normalise(means[..., dims:]))
        nodes = np.concatenate(halves, axis=-1)
        cubes[layer][inside] = nodes[:, 0]
        rows.append(np.concatenate([part.reshape(len(nodes), -1) for part in (nodes[:, 1:], ordered[inside])], axis=1))
    return cubes, np.concatenate(rows)


def embedded_by(store: Store, id: str) -> str | None:
    """Hash of the codec that a scan was embedded by; None where it was not, or not completely."""
    if not store.has_array(id, HASH):  # and would be waited for
        return None
    try:
        value = store.read_array(id, HASH).tobytes().hex()
    except UserError:  # damaged: to be embedded again
        return None
    return value if int(value, 16) else None


def read_embedding(store: Store, id: str, codec: Codec | None = None) -> Embedding:
    """One scan's embedding; its cells are read when they are looked at.

    Args:
      codec: what it must have been written by; by default the store's own.

    Raises:
      UserError: nothing embedded, or embedded by another embedder.
    """
    shape_zyx = store.scan(id).shape_zyx
    codec = codec or read_codec(store)
    have = embedded_by(store, id) if codec else None
    if codec is None or have is None:
        what = f"scan {id} has no embedding" if codec else "has no embeddings"
        raise UserError(
            f"store {store.path}: {what}; run python "
            f"-m alice_jax.embed --store {store.path} --workdir DIR, DIR being that of a trained embedder"
        )
    if have != codec.hash:
        raise UserError(
            f"store {store.path}: scan {id} was embedded by {have[:12]}, the store's embedder is {codec.hash[:12]}; "
            "vectors of two embedders cannot be compared: run python -m alice_jax.embed again"
        )
    cubes = store.read_array(id, "cubes")
    count = int(np.count_nonzero(filled(cubes)))

    rows = Rows((count, codec.row_bytes), lambda wanted: store.read_rows(id, "fine", wanted))
    return Embedding(id, shape_zyx, codec, cubes, store.read_array(id, "coarse"), rows)


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
        self._sizes: dict[str, int] = {}  # of those kept, when last looked at
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
            # What is kept grows as it is searched, and only those that were asked for last are.
            for recent in list(self._kept)[-3:]:
                self._sizes[recent] = self._kept[recent].nbytes
            while len(self._kept) > 1 and sum(self._sizes.values()) > self.cache_bytes:
                del self._sizes[self._kept.popitem(last=False)[0]]
        return embedding
