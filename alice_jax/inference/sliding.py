"""A network over a whole scan: overlapping windows, blended by a Gaussian, whose slices leave as soon as they are done.

Windows are computed from the lowest slice upward. Only a band of slices that windows still to come may reach is kept,
so memory does not grow with the length of the scan. As in nnU-Net (Isensee et al. 2021) windows overlap by half and a
window's voxels count by a Gaussian whose σ is an eighth of its side, and logits are blended.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alice_jax import sharding
from alice_jax.contract import Contract
from alice_jax.data.cells import Triple
from alice_jax.data.hounsfield import AIR_HU
from alice_jax.models.backbone import Backbone

# segment(params, (n, d, h, w, 1) float32 from 0 to 1) -> logits (n, d, h, w, classes)
Segment = Callable[[Any, jax.Array], jax.Array]
SIGMA = 1 / 8  # of the Gaussian, in sides of a window


@dataclasses.dataclass(frozen=True)
class Windows:
    """Those along one axis.

    Attributes:
      starts: (n,) first voxel of each.
      weights: (n, side) what each one's voxels count. Those of all windows at a voxel sum to 1, and as the grid of
        windows and the Gaussian are products of their axes, so do the products over the axes.
    """

    starts: np.ndarray
    weights: np.ndarray

    @staticmethod
    def along(size: int, side: int, overlap: float = 0.5) -> "Windows":
        """Evenly spread over `size` voxels, at least `side` of them; neighbours share `overlap` of a side or more.

        >>> Windows.along(10, 4).starts.tolist()
        [0, 2, 4, 6]
        >>> Windows.along(5, 4).weights.sum(), Windows.along(4, 4).weights.tolist()
        (np.float32(5.0), [[1.0, 1.0, 1.0, 1.0]])
        """
        count = 1 + math.ceil((size - side) / max(side * (1 - overlap), 1))
        starts = np.rint(np.linspace(0, size - side, count)).astype(int)
        gaussian = np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (SIGMA * side)) ** 2)
        total = np.zeros(size)
        for start in starts:
            total[start : start + side] += gaussian
        return Windows(starts, np.stack([gaussian / total[s : s + side] for s in starts]).astype(np.float32))


class Sliding:
    """`sliding.slices(volume_hu)` yields the logits of a scan slice by slice.

    Args:
      segment: the network; `params` are its parameters.
      side_zyx: voxels of a window.
      window_hu: what the network sees as 0 and 1.
      overlap: least share of a window's side that neighbours have in common.
      mirror: axes (0 to 2) along which windows are also seen mirrored, in every combination; logits are averaged.
      batch: windows that each device computes at once.
      devices: all of this process by default; the first also holds the band.
    """

    def __init__(
        self,
        segment: Segment,
        params: Any,
        side_zyx: Triple,
        window_hu: tuple[float, float],
        overlap: float = 0.5,
        mirror: Sequence[int] = (),
        batch: int = 1,
        devices: Sequence[jax.Device] | None = None,
    ):
        mesh = sharding.make_mesh(devices or jax.local_devices())
        self.side_zyx, self.overlap, self.batch = side_zyx, overlap, batch * mesh.size
        self._mirrorings = [
            np.array(turned) for turned in itertools.product(*([False, True][: 1 + (a in mirror)] for a in range(3)))
        ]
        everywhere, self._rows = sharding.replicated(mesh), sharding.by_sample(mesh)
        self._first = mesh.devices.flat[0]
        self._params = jax.device_put(params, everywhere)

        def logits(params: Any, windows_hu: jax.Array, mirrored: jax.Array) -> jax.Array:
            low, high = window_hu
            x = (jnp.clip(windows_hu.astype(jnp.float32), low, high) - low) / (high - low)
            return _mirrored(segment(params, _mirrored(x[..., None], mirrored)), mirrored)

        self._logits = jax.jit(logits, in_shardings=(everywhere, self._rows, None), out_shardings=self._rows)

    @staticmethod
    def of(network: Backbone, params: Any, contract: Contract, **settings: Any) -> "Sliding":
        """A segmentation network as `tasks.segment.load` gives it; `settings` are those from `overlap` on."""

        def segment(params: Any, windows: jax.Array) -> jax.Array:
            logits: Any = network.apply({"params": params}, windows, method="segment")
            return logits[0]

        return Sliding(segment, params, contract.crop_shape_zyx, contract.window_hu, **settings)

    @functools.cached_property
    def classes(self) -> int:
        windows = jax.ShapeDtypeStruct((self.batch, *self.side_zyx), jnp.int16)
        return jax.eval_shape(self._logits, self._params, windows, self._mirrorings[0]).shape[-1]

    def slices(self, volume_hu: np.ndarray) -> Iterator[jax.Array]:
        """The logits (y, x, classes) of each slice of a volume (z, y, x), the lowest first.

        A scan smaller than a window lies in the middle of one, with air around it.
        """
        missing = [max(side - n, 0) for side, n in zip(self.side_zyx, volume_hu.shape, strict=True)]
        if not any(missing):
            yield from self._blended(volume_hu)
            return
        whole = np.pad(volume_hu, [(n // 2, n - n // 2) for n in missing], constant_values=AIR_HU)
        z, y, x = (slice(n // 2, n // 2 + size) for n, size in zip(missing, volume_hu.shape, strict=True))
        for logits in itertools.islice(self._blended(whole), z.start, z.stop):
            yield logits[y, x]

    def _blended(self, volume_hu: np.ndarray) -> Iterator[jax.Array]:
        starts, weights = self._order(volume_hu.shape)
        firsts = range(0, len(starts), self.batch)
        reach = max(np.ptp(starts[i : i + self.batch, 0]) for i in firsts)
        band = jnp.zeros((self.side_zyx[0] + reach, *volume_hu.shape[1:], self.classes), device=self._first)
        done = 0  # slices that have left
        for rows in (slice(i, i + self.batch) for i in firsts):
            windows = np.stack([volume_hu[tuple(map(slice, s, s + self.side_zyx))] for s in starts[rows]])
            windows = jax.device_put(windows, self._rows)
            jax.block_until_ready(band)  # programs called ahead would hold their memory already
            ready = int(starts[rows][0, 0]) - done
            if ready:
                yield from (_slice(band, z) for z in range(ready))
                band, done = _moved(band, ready), done + ready
            for mirrored in self._mirrorings:
                logits = jax.device_put(self._logits(self._params, windows, mirrored), self._first)
                band = _add(band, logits, starts[rows] - [done, 0, 0], *(w[rows] for w in weights))
        yield from (_slice(band, z) for z in range(len(volume_hu) - done))

    def _order(self, shape_zyx: Triple) -> tuple[np.ndarray, list[np.ndarray]]:
        """First voxels (n, 3) of all windows, z the slowest, and their weights along each axis, (n, side) each.

        n is a multiple of the batch: the last window may come again, with a weight of 0.
        """
        axes = [Windows.along(n, side, self.overlap) for n, side in zip(shape_zyx, self.side_zyx, strict=True)]
        at = np.array(list(np.ndindex(*(len(axis.starts) for axis in axes))))
        fill = ((0, -len(at) % self.batch), (0, 0))
        starts = np.stack([axis.starts[i] for axis, i in zip(axes, at.T, strict=True)], axis=1)
        weights = [np.pad(axis.weights[i], fill) for axis, i in zip(axes, at.T, strict=True)]
        weights[0] /= len(self._mirrorings)
        return np.pad(starts, fill, mode="edge"), weights


def _mirrored(x: jax.Array, axes: jax.Array) -> jax.Array:
    """Windows (n, d, h, w, c), turned round along those of d, h and w for which `axes` (3,) says so."""
    for axis in range(3):
        x = jnp.where(axes[axis], jnp.flip(x, axis + 1), x)
    return x


@functools.partial(jax.jit, donate_argnums=0)
def _add(band: jax.Array, logits: jax.Array, starts: jax.Array, z: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """The band (depth, y, x, classes) with windows (n, d, h, w, classes) added at (n, 3), weighed along each axis."""

    def one(i: int, band: jax.Array) -> jax.Array:
        share = z[i, :, None, None, None] * y[i, :, None, None] * x[i, :, None] * logits[i]
        at = (*starts[i], 0)
        return jax.lax.dynamic_update_slice(band, share + jax.lax.dynamic_slice(band, at, share.shape), at)

    return jax.lax.fori_loop(0, len(logits), one, band)


@functools.partial(jax.jit, donate_argnums=0)
def _moved(band: jax.Array, by: jax.Array) -> jax.Array:
    """Without its `by` lowest slices, and empty ones on top."""
    kept = jnp.arange(len(band)) < len(band) - by
    return jnp.where(kept[:, None, None, None], jnp.roll(band, -by, axis=0), 0)


@jax.jit
def _slice(band: jax.Array, z: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(band, z, keepdims=False)
