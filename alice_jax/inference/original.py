"""From logits on the grid of the network back to labels of the file's own voxels, slice by slice."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from alice_jax.data.cells import Triple
from alice_jax.data.scan import Scan
from alice_jax.data.upsampling import linear


def label_dtype(classes: int) -> Any:
    """The smallest for so many classes, background included."""
    return np.uint8 if classes <= 256 else np.uint16


def planes(
    slices: Iterable[jax.Array], scan: Scan, shape_zyx: Triple, affine_lps: np.ndarray, dtype: Any
) -> Iterator[np.ndarray]:
    """Labels (y, x) of each slice of the file as `geometry.reorient` turns it, the lowest first.

    Where the file's axes are those of the world, as nearly always, logits are interpolated linearly before the largest
    is chosen, and two slices of them are held. In an oblique file, each slice of which cuts through many of the
    network's, a voxel takes the label of the nearest voxel there.

    Args:
      slices: logits (y, x, classes) of each slice of the prepared scan, the lowest first.
      scan: where they lie.
      shape_zyx, affine_lps: of the reoriented file.
    """
    to_stored = np.linalg.inv(scan.affine_lps) @ affine_lps  # (x, y, z, 1) of the file -> of the prepared scan
    if not scan.original["aligned"]:
        stored = np.stack([np.asarray(_largest(logits, dtype)) for logits in slices])
        matrix, offset = to_stored[2::-1, 2::-1], to_stored[2::-1, 3]  # both sides in (z, y, x)
        yield from ndimage.affine_transform(stored, matrix, offset, shape_zyx, order=0, mode="nearest")
        return
    at_z, at_y, at_x = (
        np.clip(to_stored[world, world] * np.arange(n) + to_stored[world, 3], 0, size - 1)
        for world, n, size in zip((2, 1, 0), shape_zyx, scan.shape_zyx, strict=True)
    )
    y, x = linear(at_y, scan.shape_zyx[1]), linear(at_x, scan.shape_zyx[2])
    coming = iter(slices)
    below = above = next(coming)
    reached = 0  # which slice `above` is
    for at in at_z:
        while reached < at:
            below, above, reached = above, next(coming), reached + 1
        yield np.asarray(_between(below, above, 1 - (reached - at), y, x, dtype))


@functools.partial(jax.jit, static_argnums=1)
def _largest(logits: jax.Array, dtype: Any) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(dtype)


@functools.partial(jax.jit, static_argnums=5)
def _between(below: jax.Array, above: jax.Array, share: float, y: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """Labels (rows of y, rows of x) between two slices of logits (y, x, classes), `share` of the way up."""
    logits = (below + share * (above - below)).transpose(2, 0, 1)
    return jnp.argmax(jnp.matmul(jnp.matmul(y, logits), x.T), axis=0).astype(dtype)
