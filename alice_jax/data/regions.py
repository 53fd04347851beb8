"""What each scan of a store shows: a small index of body regions, made from the stored embeddings alone.

A thigh and a chest have no place in common, yet a search in the wrong scan always finds some best cell. So before
anything is matched, a partner is chosen that shows what the query shows:

- each scan is described by `REGIONS` vectors, the k-means centres of its coarse unit vectors inside the body;
- the regions of all scans are summed up in `WORDS` words, and each scan covers a word as well as its best region does
  (cosine);
- a place is the words of what lies within `REACH_MM` of it, since a single coarse cell of a thigh resembles some cell
  of any scan, but a whole neighbourhood does not; a scan covers a place as well as its words on average.

In the store: `STORE/regions.json`, about 1 KB for each scan. Entries of another embedder or of a scan that was
prepared again are made anew. The file is written in one piece and its content is a function of the embeddings, so
several processes may make it at once.
"""

import base64
import dataclasses
import sys
from collections.abc import Sequence

import numpy as np
import tqdm

from alice_jax.data import embeddings
from alice_jax.data.embeddings import Codec, normalise
from alice_jax.data.foreground import body_share
from alice_jax.data.store import Store
from alice_jax.errors import UserError

FILE, FORMAT = "regions.json", 1
REGIONS = 32  # vectors of a scan
WORDS = 256  # of a store
REACH_MM = 64.0  # along each axis: half of a crop of 64 voxels of 2 mm
BODY_SHARE = 0.25  # of a coarse cell, from which it counts as body
ITERATIONS = 10
FIT_VECTORS = 16384  # that the words are fitted on
LEARN_SCANS, LEARN_PLACES = 256, 1024  # from which is learnt what is usual in a store
FEW = 100  # scans that are described without a progress bar


def centres(vectors: np.ndarray, count: int) -> np.ndarray:
    """(count, dims) unit vectors: k-means by cosine, started from those farthest from each other; no random numbers.

    vectors: (n, dims) of unit length. Where n < count, some are given twice.

    >>> centres(np.array([[1.0, 0.0], [0.0, 1.0]]), 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    vectors = np.asarray(vectors, np.float64)
    chosen = [int(np.argmax(vectors @ vectors.mean(axis=0)))]
    closest = vectors @ vectors[chosen[0]]
    for _ in range(min(count, len(vectors)) - 1):
        chosen.append(int(np.argmin(closest)))
        closest = np.maximum(closest, vectors @ vectors[chosen[-1]])
    found = vectors[chosen]
    for _ in range(ITERATIONS):
        sums = np.zeros_like(found)
        np.add.at(sums, nearest(vectors, found), vectors)
        found = np.where(np.linalg.norm(sums, axis=1, keepdims=True) > 1e-6, normalise(sums), found)
    return found[np.arange(count) % len(found)]


def nearest(vectors: np.ndarray, to: np.ndarray) -> np.ndarray:
    """(n,) index of the most similar of `to` (m, dims) for each of `vectors` (n, dims)."""
    return np.argmax(vectors @ to.T, axis=1)


def surroundings(cell: np.ndarray, grid: np.ndarray, codec: Codec) -> tuple[np.ndarray, np.ndarray]:
    """First and last + 1 coarse cell (z, y, x) within `REACH_MM` of a cell."""
    reach = np.rint(REACH_MM / (np.array(codec.coarse.stride_zyx_vox) * codec.spacing_zyx_mm)).astype(int)
    return np.maximum(cell - reach, 0), np.minimum(cell + reach + 1, grid)


def describe(stored_coarse: np.ndarray, foreground: np.ndarray, codec: Codec) -> np.ndarray:
    """The regions of a scan, (REGIONS, dims) int8: 127 times unit vectors.

    stored_coarse: (z, y, x, dims) int8, of the embedding.
    """
    grid, stride = np.array(stored_coarse.shape[:3]), codec.coarse.stride_zyx_vox
    share = body_share(foreground, np.zeros(3, int), grid, stride)
    body = share >= min(BODY_SHARE, share.max())
    return np.rint(127 * centres(codec.coarse.decode(stored_coarse[body]), REGIONS)).astype(np.int8)


# ---------------------------------------------------------------- the whole store


def described(store: Store, ids: Sequence[str], codec: Codec) -> np.ndarray:
    """(scans, REGIONS, dims) int8, after making and keeping what is missing."""
    kept = store.read_json(FILE) or {}
    entries = kept["scans"] if (kept.get("format"), kept.get("codec")) == (FORMAT, codec.hash) else {}
    missing = [id for id in ids if entries.get(id, {}).get("sha256") != store.scan(id).sha256]
    for id in tqdm.tqdm(missing, desc="Body regions", unit="scan", file=sys.stderr, disable=len(missing) < FEW):
        if embeddings.embedded_by(store, id) != codec.hash:
            embeddings.read_embedding(store, id, codec)  # says what is wrong
        found = describe(store.read_array(id, "coarse"), store.foreground(id), codec)
        text = base64.b64encode(found.tobytes()).decode()
        entries[id] = {"sha256": store.scan(id).sha256, "regions": text}
    if missing:
        known = set(store.ids())
        entries = {id: entries[id] for id in sorted(entries) if id in known}
        try:
            store.write_json(FILE, {"format": FORMAT, "codec": codec.hash, "scans": entries})
        except UserError as error:  # a store that may only be read
            print(f"the body regions are made again for each run: {error}", file=sys.stderr)
    rows = [np.frombuffer(base64.b64decode(entries[id]["regions"]), np.int8) for id in ids]
    return np.stack(rows).reshape(len(ids), REGIONS, -1)


@dataclasses.dataclass(frozen=True)
class RegionIndex:
    """Tells which scans show a place. One is made by `open_index`.

    words: (words, dims) unit vectors.
    coverage: (words, scans) fp32, how well each scan covers each word.
    """

    codec: Codec
    words: np.ndarray
    coverage: np.ndarray

    def place(self, stored_coarse: np.ndarray, foreground: np.ndarray, point_zyx_vox: np.ndarray) -> np.ndarray:
        """(words,) fp32: the shares of the words in the surroundings of a point of a scan, given as to `describe`."""
        codec, grid = self.codec, np.array(stored_coarse.shape[:3])
        cell = np.clip(np.asarray(point_zyx_vox) // codec.coarse.stride_zyx_vox, 0, grid - 1).astype(int)
        start, stop = surroundings(cell, grid, codec)
        share = body_share(foreground, start, stop, codec.coarse.stride_zyx_vox)
        body = share >= min(BODY_SHARE, share.max())
        vectors = codec.coarse.decode(stored_coarse[tuple(map(slice, start, stop))][body])
        counts = np.bincount(nearest(vectors, self.words), minlength=len(self.words))
        return (counts / len(vectors)).astype(np.float32)

    def covers(self, places: np.ndarray) -> np.ndarray:
        """(…, scans) cosines: how well each scan covers places (…, words)."""
        return places @ self.coverage


def open_index(store: Store, ids: Sequence[str]) -> RegionIndex:
    """The index over the scans `ids`, in their order; made and kept in the store where it is missing."""
    codec = embeddings.read_codec(store)
    if codec is None:
        embeddings.read_embedding(store, ids[0])  # says what is wrong
    assert codec
    regions = normalise(described(store, ids, codec).astype(np.float32))
    vectors = regions.reshape(-1, regions.shape[-1])
    count = min(FIT_VECTORS, len(vectors))
    words = centres(vectors[np.arange(count) * len(vectors) // count], WORDS).astype(np.float32)
    return RegionIndex(codec, words, np.stack([(words @ own.T).max(axis=1) for own in regions], axis=1))


def places_of(index: RegionIndex, store: Store, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Places (n, words) evenly taken from the bodies of some scans, and the numbers (n,) of these scans."""
    owners = np.arange(min(LEARN_SCANS, len(ids))) * len(ids) // min(LEARN_SCANS, len(ids))
    count = LEARN_PLACES // len(owners)
    places = []
    for owner in owners.tolist():
        stored_coarse, foreground = store.read_array(ids[owner], "coarse"), store.foreground(ids[owner])
        cells = np.flatnonzero(foreground)
        cells = cells[(2 * np.arange(count) + 1) * len(cells) // (2 * count)]
        for cell in np.stack(np.unravel_index(cells, foreground.shape), axis=1):
            places.append(index.place(stored_coarse, foreground, 2 * cell))
    return np.array(places), np.repeat(owners, count)
