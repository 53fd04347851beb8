"""What a trained backbone makes of whole scans: a feature of each, or a vector for every cell of its body.

Both are means over crops of the shape that it was trained on; crops are computed in batches over all devices of this
process.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from tqdm import tqdm

from alice_jax import contract, pretrained, sharding, tasks
from alice_jax.contract import Contract
from alice_jax.data import matching
from alice_jax.data.cells import Triple, triple
from alice_jax.data.class_views import grid_crops, with_body
from alice_jax.data.codec import normalise
from alice_jax.data.embeddings import body_cells
from alice_jax.data.store import Store
from alice_jax.data.views import windowed
from alice_jax.errors import UserError
from alice_jax.interop.names import leaves
from alice_jax.models.backbone import Backbone
from alice_jax.tasks.task import compute_dtype, contract_of

WHICH = ("teacher", "student", "random")
AT_ONCE = 8  # crops on each device


@dataclasses.dataclass(frozen=True)
class CellVectors:
    """Unit vectors of the cells of a scan's body; cell i covers the voxels [i·stride, (i + 1)·stride).

    cells_zyx: (n, 3) int.  vectors: (n, c) float32.
    """

    shape_zyx: Triple
    stride_zyx_vox: Triple
    cells_zyx: np.ndarray
    vectors: np.ndarray

    def match(self, points_zyx_vox: np.ndarray, key: "CellVectors") -> np.ndarray:
        """(n, 3) float voxels of `key`: the centre of the cell whose vector is most like that of a point's cell.

        A point beside the body takes the nearest cell that has a vector.
        """
        cells = np.floor((np.asarray(points_zyx_vox) + 0.5) / self.stride_zyx_vox)
        rows = np.argmin(np.sum((cells[:, None] - self.cells_zyx) ** 2, axis=2), axis=1)
        best, _ = matching.nearest(self.vectors[rows], [key.vectors])
        return matching.points_of_cells(key.cells_zyx[best], key.stride_zyx_vox, key.shape_zyx)


@dataclasses.dataclass(frozen=True)
class TrainedBackbone:
    """A backbone, and how scans are prepared for it."""

    network: Backbone
    params: Any
    contract: Contract

    def scan_features(self, store: Store, ids: Sequence[str]) -> np.ndarray:
        """(n, c) float32: the mean token of each scan, over crops that cover its body."""
        crop, window_hu = self._prepared(store)

        def crops() -> Iterator[tuple[int, np.ndarray]]:
            for row, id in enumerate(tqdm(ids, "Features", unit="scan", file=sys.stderr)):
                for volume in grid_crops(store, id, crop, window_hu):
                    yield row, volume

        rows, values = zip(*self._computed(self._crop_feature, crops()), strict=True)
        features = np.zeros((len(ids), values[0].shape[-1]))
        np.add.at(features, list(rows), values)
        return (features / np.bincount(rows, minlength=len(ids))[:, None]).astype(np.float32)

    def cell_vectors(self, store: Store, id: str) -> CellVectors:
        """The decoder tokens of a scan: means over crops half a crop apart, the more central the more they count.

        Raises:
          UserError: the run has trained the encoder alone.
        """
        if not self._decodes:
            raise UserError("--backbone: this run has trained an encoder alone; give a run of pretraining")
        shape, (crop, window_hu) = store.scan(id).shape_zyx, self._prepared(store)
        lattice = itertools.product(*(range(0, max(n - c // 2, 1), c // 2) for n, c in zip(shape, crop, strict=True)))
        starts = with_body(store, id, np.array(list(lattice)), crop)

        def crops() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for start in starts:
                yield start, windowed(store.read_crop(id, tuple(start), crop), window_hu)[..., None]

        sums, stride = np.zeros(0), np.ones(3, int)
        for start, values in self._computed(self._decoder_tokens, crops()):
            if not sums.size:
                stride = np.array(crop) // values.shape[:3]
                sums = np.zeros((*(-(-(starts.max(axis=0) + crop) // stride)), values.shape[-1]), np.float32)
                hats = [1 - np.abs((np.arange(n) + 0.5) / n - 0.5) * 2 for n in values.shape[:3]]
                weight = np.einsum("i,j,k->ijk", *hats)[..., None].astype(np.float32)
            sums[tuple(slice(a, a + n) for a, n in zip(start // stride, values.shape, strict=False))] += weight * values
        stride_zyx, grid = triple(stride), triple(-(-np.array(shape) // stride))
        cells = np.argwhere(body_cells(store.foreground(id), grid, stride_zyx))
        return CellVectors(shape, stride_zyx, cells, normalise(sums[tuple(cells.T)]))

    def _prepared(self, store: Store) -> tuple[Triple, tuple[float, float]]:
        """Crop shape and window; an error where the store was not prepared for this network."""
        crop, window_hu = self.contract.crop_shape_zyx, self.contract.window_hu
        here = contract_of(store, window_hu, crop)
        contract.check(self.contract, here, f"store {store.path}, for which the backbone was not trained")
        return crop, window_hu

    @cached_property
    def _decodes(self) -> bool:
        """Whether all that decoder tokens need was trained."""
        crop_shape = self.contract.crop_shape_zyx
        needed = tasks.segment.shapes_of(self.network, crop_shape, lambda net, x: net.decode_tokens(net.encode(x)))
        return needed.keys() <= dict(leaves(self.params, "backbone/")).keys()

    # ---------------------------------------------------------------- on the devices

    @cached_property
    def _mesh(self) -> Mesh:
        return sharding.make_mesh(jax.local_devices())

    @cached_property
    def _crop_feature(self) -> Callable[[Any, jax.Array], jax.Array]:
        def feature(params: Any, volumes: jax.Array) -> jax.Array:
            return self.network.cls_of(self._encode(params, volumes)[-1])

        return jax.jit(feature, out_shardings=sharding.replicated(self._mesh))

    @cached_property
    def _decoder_tokens(self) -> Callable[[Any, jax.Array], jax.Array]:
        def tokens(params: Any, volumes: jax.Array) -> jax.Array:
            skips = self._encode(params, volumes)
            decoder_tokens = jnp.asarray(self.network.apply(params, skips, method="decode_tokens"))
            return self.network.features_of(decoder_tokens).astype(jnp.float32)

        return jax.jit(tokens, out_shardings=sharding.replicated(self._mesh))

    def _encode(self, params: Any, volumes: jax.Array) -> Any:
        return self.network.apply(params, volumes, method="encode")

    def _computed(
        self, function: Callable[[Any, jax.Array], jax.Array], crops: Iterable[tuple[Any, np.ndarray]]
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """(name, function of the crop) of each named crop (depth, height, width, 1)."""
        params = jax.device_put({"params": self.params}, sharding.replicated(self._mesh))
        remaining, size = iter(crops), AT_ONCE * self._mesh.size
        while batch := list(itertools.islice(remaining, size)):
            names, volumes = zip(*batch, strict=True)
            filled = np.stack([*volumes, *[volumes[0]] * (size - len(batch))])  # so that one shape is compiled
            values = function(params, jax.device_put(filled, sharding.by_sample(self._mesh)))
            yield from zip(names, np.asarray(values), strict=False)


def load(path: str, which: str = "teacher", flag: str = "--workdir") -> TrainedBackbone:
    """The backbone of a run, or of a file that `alice_jax.export` wrote.

    Args:
      which: of the two networks of a pretraining run, "teacher" or "student"; "random": none of what it has learnt.
      flag: names, in errors, what gave the path.
    """
    source = pretrained.read(path, pretrained.WHICH[0] if which == "random" else which, flag)
    network = tasks.backbones.make(
        source.model,
        position_index=source.position_index,
        mask_tokens=False,  # nothing is hidden
        out_channels=len(source.contract.classes) or 1,
        dtype=compute_dtype(source.precision),
    )
    params = traverse_util.unflatten_dict({tuple(name.split("/")): value for name, value in source.values.items()})
    if which == "random":
        volumes = np.zeros((1, *source.contract.crop_shape_zyx, 1), np.float32)
        params = {"backbone": jax.jit(network.init)(jax.random.key(0), volumes)["params"]}
    return TrainedBackbone(network, params["backbone"], source.contract)
