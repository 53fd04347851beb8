"""ResEnc: nnU-Net's residual-encoder U-Net (Isensee et al., MICCAI 2024, arXiv 2404.09556).

    volume (b, d, h, w, 1)
      -> stem -> encoder stage 0 (full resolution), 1, 2, … of residual blocks, each but the first at half the grid of
         the one before = the skips
      last skip -> decoder stage 0 (with the skip before) = decoder tokens -> stages 1, 2, … -> head -> voxels

Decoder stages are numbered as they run, coarsest first, which is nnU-Net's order. All convolutions have biases but
those of the shortcuts; norms are instance norms. Arrays are channels-last.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from alice_jax.errors import UserError
from alice_jax.models.backbone import Backbone, check_remat, with_marks, without_hidden
from alice_jax.models.layers import Conv, Expand, InstanceNorm, Linear, Triple, layer_norm


class ConvNorm(nn.Module):
    """A 3x3x3 convolution and an instance norm: (b, d, h, w, in) -> (b, d/s, h/s, w/s, features)."""

    features: int
    stride: int = 1
    silent: bool = False  # starts with a scale of zero, so that a residual branch starts as nothing
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Conv(self.features, strides=(self.stride,) * 3, dtype=self.dtype, start="he", name="conv")(x)
        start = nn.initializers.zeros if self.silent else nn.initializers.ones
        return InstanceNorm(start=start, dtype=self.dtype, name="norm")(x)


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut that averages over the stride and projects to other channels (ResNet-D)."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.leaky_relu(ConvNorm(self.features, self.stride, dtype=self.dtype, name="conv1")(x))
        y = ConvNorm(self.features, silent=True, dtype=self.dtype, name="conv2")(y)
        if self.stride > 1:
            x = nn.avg_pool(x, (self.stride,) * 3, (self.stride,) * 3)
        if x.shape[-1] != self.features:
            x = Linear(self.features, False, "he", self.dtype, name="skip_conv")(x)
            x = InstanceNorm(dtype=self.dtype, name="skip_norm")(x)
        return nn.leaky_relu(x + y)


class EncoderStage(nn.Module):
    """Residual blocks, the first with the stride: (b, d, h, w, in) -> (b, d/s, h/s, w/s, features)."""

    features: int
    blocks: int
    stride: int
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        for j in range(self.blocks):
            x = block(self.features, self.stride if j == 0 else 1, self.dtype, name=f"block{j}")(x)
        return x


class DecoderStage(nn.Module):
    """Upsamples to the skip's grid and merges both: (b, d, h, w, in), skip (b, 2d, 2h, 2w, c) -> the skip's shape."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        x = Expand(skip.shape[-1], (2, 2, 2), self.dtype, "he", name="upsample")(x)
        x = ConvNorm(skip.shape[-1], dtype=self.dtype, name="conv")(jnp.concatenate([x, skip], axis=-1))
        return nn.leaky_relu(x)


class ResEnc(Backbone):
    """The U-Net. A crop's sides must be multiples of 2**(stages - 1); nnU-Net adds stages down to 4 voxels a side.

    With `mask_tokens` the stem's features of hidden cells become one learned token, at full resolution since the first
    skip goes from there straight to the decoder: convolutions could not tell a hidden voxel, which is zero, from air.
    Convolutions and instance norms carry what is visible, and means over it, into hidden cells, never the other way.

    `remat` names encoder stages. Weights fit any crop size.
    """

    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    blocks: tuple[int, ...] = (1, 3, 4, 6, 6, 6)
    mask_tokens: bool = True
    remat: tuple[int, ...] = ()
    out_channels: int = 1
    deep_supervision: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        if len(self.features) != len(self.blocks) or len(self.features) < 2:
            raise UserError(f"features {self.features}, blocks {self.blocks}: give one per stage, two stages or more")
        check_remat(self.remat, len(self.features))
        self.stem = ConvNorm(self.features[0], dtype=self.dtype)
        start = nn.initializers.normal(0.02)
        width = self.features[0]
        self.mask_token = self.param("mask_token", start, (width,), jnp.float32) if self.mask_tokens else None
        self.encoder = [
            EncoderStage(features, blocks, 1 if i == 0 else 2, i in self.remat, self.dtype)
            for i, (features, blocks) in enumerate(zip(self.features, self.blocks, strict=True))
        ]
        self.decoder = [DecoderStage(self.dtype) for _ in self.features[1:]]
        # One for each decoder stage, as in nnU-Net; those that no output needs have no parameters.
        self.head = [Linear(self.out_channels, start="he", dtype=self.dtype) for _ in self.features[1:]]

    @property
    def token_stride_zyx(self) -> Triple:
        stride = 2 ** (len(self.features) - 1)
        return stride, stride, stride

    @property
    def encoder_channels(self) -> int:
        return self.features[-1]

    @property
    def decoder_channels(self) -> int:
        return self.features[-2]

    @nn.nowrap
    def features_of(self, tokens: jax.Array) -> jax.Array:
        """Each normalised over its channels. Instance norms give a channel the same mean over any crop, so that means
        of tokens as they are, and whatever attends to all of them alike, would hardly tell one crop from another."""
        channels = tokens.shape[-1]
        return layer_norm(tokens, jnp.ones(channels), jnp.zeros(channels), 1e-5, self.dtype)

    def encode(
        self,
        volume: jax.Array,
        hidden: jax.Array | None = None,
        position_embedding: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, ...]:
        x = nn.leaky_relu(self.stem(without_hidden(volume, hidden, self.token_stride_zyx)))
        x = with_marks(x, hidden, self.mask_token, position_embedding)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        return tuple(skips)

    def decode_tokens(self, skips: tuple[jax.Array, ...], train: bool = False) -> jax.Array:
        return self.decoder[0](skips[-1], skips[-2])

    def decode_voxels(self, skips: tuple[jax.Array, ...], decoder_tokens: jax.Array, train: bool = False) -> jax.Array:
        return self.head[-1](self._levels(skips, decoder_tokens)[-1]).astype(jnp.float32)

    def segment(self, volume: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        skips = self.encode(volume, train=train)
        levels = self._levels(skips, self.decode_tokens(skips))
        finest_first = list(zip(self.head, levels, strict=True))[::-1]
        used = finest_first if self.deep_supervision else finest_first[:1]
        return tuple(head(level).astype(jnp.float32) for head, level in used)

    def _levels(self, skips: tuple[jax.Array, ...], decoder_tokens: jax.Array) -> list[jax.Array]:
        """What every decoder stage gives, coarsest first."""
        levels = [decoder_tokens]
        for stage, skip in zip(self.decoder[1:], skips[-3::-1], strict=True):
            levels.append(stage(levels[-1], skip))
        return levels
