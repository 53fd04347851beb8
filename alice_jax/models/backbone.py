"""The backbone as a plug: what every network offers to objectives, tasks and commands, whichever architecture it is.

    volume (b, d, h, w, c) -> encode -> skips, finest grid first; the last holds the encoder tokens
      skips -> decode_tokens -> decoder tokens, on a grid twice as fine
      skips, decoder tokens -> decode_voxels -> voxels (b, d, h, w, out_channels)
      volume -> segment -> logits

`models.nnformer`, `models.resenc` and `models.primus` are three of them; docs/backbones.md says how to add one.
"""

import re

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from alice_jax.errors import UserError
from alice_jax.models.layers import Triple


@flax.struct.dataclass
class Features:
    """All that a backbone gives for a crop."""

    cls: jax.Array  # (b, encoder_channels) float32: `Backbone.cls_of` the encoder tokens
    encoder_tokens: jax.Array  # (b, d, h, w, encoder_channels)
    decoder_tokens: jax.Array  # (b, 2d, 2h, 2w, decoder_channels)
    reconstruction: jax.Array  # (b, crop depth, crop height, crop width, out_channels) float32


class Backbone(nn.Module):
    """The interface. Besides the methods below every backbone has the fields

    - `mask_tokens`: hidden cells become a learned token where the network first has features; without, hiding means
      zeroed voxels only. Either way no value of a hidden voxel reaches any output.
    - `remat`: stages that keep only their blocks' inputs for the gradient and are computed again there.
    - `out_channels`: 1 to reconstruct, or the number of classes, background included, to segment.
    - `deep_supervision`: `segment` also gives logits of coarser decoder levels.
    - `dtype`: of matmuls and convolutions; parameters, norms and softmax are float32.

    The parts are methods of their own so that a caller pays only for what it uses; calling a backbone runs all three.
    """

    @property
    def token_stride_zyx(self) -> Triple:
        """Voxels per encoder token along each axis; a crop's sides must be multiples. Masks have a cell per token."""
        raise NotImplementedError

    @property
    def encoder_channels(self) -> int:
        """Of an encoder token."""
        raise NotImplementedError

    @property
    def decoder_channels(self) -> int:
        """Of a decoder token."""
        raise NotImplementedError

    @nn.nowrap
    def layer_of(self, module: str) -> int:
        """The layer of the encoder, from 0, that a module of it belongs to: its number, or -1, before them all."""
        number = re.search(r"\d+", module)
        return int(number[0]) if number else -1

    @nn.nowrap
    def features_of(self, tokens: jax.Array) -> jax.Array:
        """Encoder or decoder tokens (b, d, h, w, c) as heads, the alignment module and classifiers take them."""
        return tokens

    @nn.nowrap
    def cls_of(self, encoder_tokens: jax.Array) -> jax.Array:
        """The feature of a whole crop, the mean over its tokens': (b, d, h, w, c) -> (b, c) float32."""
        return jnp.mean(self.features_of(encoder_tokens).astype(jnp.float32), axis=(1, 2, 3))

    def encode(
        self,
        volume: jax.Array,
        hidden: jax.Array | None = None,
        position_embedding: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, ...]:
        """volume (b, d, h, w, c) -> skips, one per stage, finest first; the last holds the encoder tokens.

        hidden (b, gd, gh, gw), True = hidden, lies on any grid that divides the first skip's.
        position_embedding (1, d, h, w, c) of the first skip's grid and channels is added where the mask token is put.
        """
        raise NotImplementedError

    def decode_tokens(self, skips: tuple[jax.Array, ...], train: bool = False) -> jax.Array:
        """The first decoder stage: skips -> decoder tokens (b, 2d, 2h, 2w, decoder_channels), d, h, w the last grid."""
        raise NotImplementedError

    def decode_voxels(self, skips: tuple[jax.Array, ...], decoder_tokens: jax.Array, train: bool = False) -> jax.Array:
        """The other decoder stages: decoder tokens -> voxels (b, d, h, w, out_channels) float32."""
        raise NotImplementedError

    def segment(self, volume: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """volume (b, d, h, w, c) -> logits (b, d, h, w, out_channels) float32.

        With `deep_supervision` those of coarser decoder levels follow, finest first, from a 1x1x1 head each.
        """
        raise NotImplementedError

    def __call__(
        self,
        volume: jax.Array,
        hidden: jax.Array | None = None,
        position_embedding: jax.Array | None = None,
        train: bool = False,
    ) -> Features:
        """All three parts at once; arguments as in `encode`."""
        skips = self.encode(volume, hidden, position_embedding, train)
        decoder_tokens = self.decode_tokens(skips, train)
        voxels = self.decode_voxels(skips, decoder_tokens, train)
        return Features(self.cls_of(skips[-1]), skips[-1], decoder_tokens, voxels)


def without_hidden(volume: jax.Array, hidden: jax.Array | None, stride_zyx: Triple) -> jax.Array:
    """The volume with its hidden voxels at zero; refuses sides that are no multiples of the token stride."""
    if any(n % s for n, s in zip(volume.shape[1:4], stride_zyx, strict=True)):
        raise UserError(f"crop shape {volume.shape[1:4]}: each side must be a multiple of {stride_zyx}")
    if hidden is None:
        return volume
    # `where`, not a product: NaN times zero is NaN
    return jnp.where(spread_cells(hidden.astype(bool), volume.shape[1:4])[..., None], 0.0, volume)


def with_marks(
    x: jax.Array, hidden: jax.Array | None, mask_token: jax.Array | None, position_embedding: jax.Array | None
) -> jax.Array:
    """The first features (b, d, h, w, c) with `mask_token` (c,) in hidden cells and the position embedding added."""
    if hidden is not None and mask_token is not None:
        # In float32, since the token's gradient is a sum over all hidden cells.
        cells = spread_cells(hidden.astype(bool), x.shape[1:4])[..., None]
        x = jnp.where(cells, mask_token, x.astype(jnp.float32)).astype(x.dtype)
    return x if position_embedding is None else x + position_embedding.astype(x.dtype)


def spread_cells(cells: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    """Repeats each cell over its part of a finer grid: (b, gd, gh, gw) -> (b, d, h, w)."""
    if any(n % g for n, g in zip(grid, cells.shape[1:], strict=True)):
        raise UserError(f"hidden cells {cells.shape[1:]}: each side must divide the grid {grid}")
    for axis, size in enumerate(grid, start=1):
        cells = jnp.repeat(cells, size // cells.shape[axis], axis=axis)
    return cells


def check_remat(remat: tuple[int, ...], stages: int) -> None:
    if not set(remat) <= set(range(stages)):
        raise UserError(f"remat {remat}: give numbers of stages, from 0 to {stages - 1}")
