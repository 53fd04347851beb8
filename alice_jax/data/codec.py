"""How the vectors of one embedder are stored: projected onto fewer directions and rounded to int8."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np

from alice_jax.data.cells import Triple
from alice_jax.data.octree import Octree
from alice_jax.data.store import Store
from alice_jax.errors import UserError

CODEC_FILE = "embedder.json"
FORMAT = 3
EPSILON = 1e-12


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Unit length over the last axis; zero vectors stay zero."""
    return vectors / np.maximum(np.sqrt(np.einsum("...c,...c->...", vectors, vectors)), EPSILON)[..., None]


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
        return self.rounded(normalise(vectors.astype(np.float32) @ self.projection))

    def rounded(self, components: np.ndarray) -> np.ndarray:
        """(…, dims) -> (…, dims) int8."""
        return np.clip(np.rint(components / self.step), -127, 127).astype(np.int8)

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
    def octree(self) -> Octree:
        """How the fine cells are ordered."""
        z, y, x = (n * mm for n, mm in zip(self.fine.stride_zyx_vox, self.spacing_zyx_mm, strict=True))
        return Octree.of_cells((z, y, x))

    @cached_property
    def step(self) -> np.ndarray:
        """(2·dims,) fp32: of the vectors that guide the search."""
        return np.concatenate([self.fine.step, self.coarse.step])

    @property
    def row_bytes(self) -> int:
        """What is stored of a cube besides its mean: the means of its parts, then its cells."""
        return self.octree.starts[-1] * len(self.step) + self.octree.counts[-1] * len(self.fine.step)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Coarse cells per fine cell along each axis."""
        return tuple(f / c for f, c in zip(self.fine.stride_zyx_vox, self.coarse.stride_zyx_vox, strict=True))

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

    def to_json(self) -> dict[str, Any]:
        """What is written to `CODEC_FILE`."""
        return self._as_dict() | {"hash": self.hash}

    def save(self, store: Store) -> None:
        """Makes this the codec of the store, whatever is there."""
        store.write_json(CODEC_FILE, self.to_json())


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

    return _from_json(raw)


def settle_codec(store: Store, embedder: str, fit: Callable[[], Codec]) -> Codec:
    """The store's codec for an embedder: the one that is there, or `fit()`.

    Of tasks that begin at once, the first one that has fitted decides for all, so that they need not wait for it.

    Args:
      embedder: hash of the network.
    """
    raw = store.read_json(CODEC_FILE)
    if not _is_of(raw, embedder):
        raw = store.settle_json(CODEC_FILE, old=raw, new=fit().to_json())
    if not _is_of(raw, embedder):
        raise UserError(
            f"store {store.path}: another task has begun to embed it by another embedder; let that one finish, or stop "
            "it and run this one again"
        )
    return _from_json(raw)


def _is_of(raw: Any, embedder: str) -> bool:
    return raw is not None and raw.get("format") == FORMAT and raw.get("embedder") == embedder


def _from_json(raw: dict[str, Any]) -> Codec:
    def level(x: dict[str, Any]) -> Level:
        return Level(
            tuple(x["stride_zyx_vox"]), _from_text(x["projection"]).reshape(-1, x["dims"]), _from_text(x["step"])
        )

    return Codec(raw["embedder"], tuple(raw["spacing_zyx_mm"]), level(raw["fine"]), level(raw["coarse"]))
