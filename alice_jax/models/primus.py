"""Primus: a plain 3-D vision transformer (Wald et al., arXiv 2503.01835) of EVA-02's blocks (arXiv 2303.11331).

    volume (b, d, h, w, 1)
      -> patches of 8³ voxels, one linear map each -> + position table -> blocks -> norm = encoder tokens, the only skip
      encoder tokens -> three transposed convolutions of 2³, a norm and GELU between: decoder tokens, …, voxels

Positions enter twice, as nnU-Net trains it: by a learned table, so that weights belong to a crop size, and by rotating
queries and keys. Nothing in the decoder mixes tokens. Arrays are channels-last.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alice_jax.errors import UserError
from alice_jax.models.backbone import Backbone, check_remat, with_marks, without_hidden
from alice_jax.models.layers import DropPath, Expand, LayerNorm, Linear, Triple, gelu, starting_values

PATCH = 8  # voxels along each axis of a token


class Tokens(nn.Module):
    """One linear map for every patch: (b, d, h, w, c) -> (b, d/8, h/8, w/8, width), a convolution of stride 8."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, d, h, w, c = x.shape
        kernel_init, bias_init = starting_values("he", PATCH**3 * c)
        kernel = self.param("kernel", kernel_init, (PATCH, PATCH, PATCH, c, self.width), jnp.float32)
        bias = self.param("bias", bias_init, (self.width,), jnp.float32)
        x = x.reshape(b, d // PATCH, PATCH, h // PATCH, PATCH, w // PATCH, PATCH, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        x = x.reshape(*x.shape[:4], -1).astype(self.dtype)
        return x @ kernel.reshape(-1, self.width).astype(self.dtype) + bias.astype(self.dtype)


class PositionTable(nn.Module):
    """Adds a learned vector to each token: (b, n, c) -> (b, n, c)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        table = self.param("table", nn.initializers.normal(0.02), x.shape[1:], jnp.float32)
        return x + table.astype(x.dtype)


def rotations(grid: Triple, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine of the angle by which each pair of a head's channels is turned: (tokens, size) float32 each.

    A third of the pairs turns with each of z, y and x: by the token's index times 10000^(-i / pairs of an axis).
    """
    pairs = size // 6
    frequency = (1.0 / 10000.0 ** (np.arange(pairs, dtype=np.float32) / pairs)).astype(np.float32)
    place = np.indices(grid, dtype=np.float32).reshape(3, -1).T
    angle = (place[:, :, None] * frequency).reshape(len(place), -1).repeat(2, axis=-1)
    return np.sin(angle), np.cos(angle)


def rotated(x: jax.Array, sine: np.ndarray, cosine: np.ndarray) -> jax.Array:
    """x (b, n, heads, size) with its pairs of neighbouring channels turned, in float32, returned in its dtype."""
    x32 = x.astype(jnp.float32)
    across = jnp.stack([-x32[..., 1::2], x32[..., ::2]], axis=-1).reshape(x.shape)
    return (x32 * cosine[:, None] + across * sine[:, None]).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention among all tokens, rotated by position, with a norm before the last layer (sub-LN)."""

    heads: int
    out_start: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, grid: Triple) -> jax.Array:
        b, n, c = x.shape
        query, key, value = (
            Linear(c, use_bias, dtype=self.dtype, name=name)(x).reshape(b, n, self.heads, -1)
            for name, use_bias in (("query", True), ("key", False), ("value", True))
        )
        turn = rotations(grid, c // self.heads)
        x = jax.nn.dot_product_attention(rotated(query, *turn), rotated(key, *turn), value).reshape(b, n, c)
        x = LayerNorm(dtype=self.dtype, name="norm")(x)
        return Linear(c, start=self.out_start, dtype=self.dtype, name="out")(x)


class SwiGlu(nn.Module):
    """A gated MLP with a norm before the last layer: (b, n, c) -> (b, n, c)."""

    hidden: int
    out_start: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = Linear(self.hidden, dtype=self.dtype, name="gate")(x)
        y = nn.silu(gate) * Linear(self.hidden, dtype=self.dtype, name="fc1")(x)
        y = LayerNorm(dtype=self.dtype, name="norm")(y)
        return Linear(x.shape[-1], start=self.out_start, dtype=self.dtype, name="fc2")(y)


class Block(nn.Module):
    """Attention, then the MLP, each with a norm before, a gain for each channel that starts at 0.1, and a residual."""

    heads: int
    mlp_hidden: int
    drop_path: float
    out_start: float  # standard deviation with which the last layer of either branch starts
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, grid: Triple, train: bool) -> jax.Array:
        drop = DropPath(self.drop_path, name="drop_path")

        def gain(name: str) -> jax.Array:
            return self.param(name, nn.initializers.constant(0.1), (x.shape[-1],), jnp.float32).astype(self.dtype)

        y = LayerNorm(dtype=self.dtype, name="norm1")(x)
        y = Attention(self.heads, self.out_start, self.dtype, name="attention")(y, grid)
        x = x + drop(gain("gain1") * y, train)
        y = LayerNorm(dtype=self.dtype, name="norm2")(x)
        y = SwiGlu(self.mlp_hidden, self.out_start, self.dtype, name="mlp")(y)
        return x + drop(gain("gain2") * y, train)


class Upsample(nn.Module):
    """Transposed 2x2x2 convolution, LayerNorm (eps 1e-6), GELU: (b, d, h, w, in) -> (b, 2d, 2h, 2w, features)."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Expand(self.features, (2, 2, 2), self.dtype, "he", name="expand")(x)
        return gelu(LayerNorm(1e-6, self.dtype, name="norm")(x))


class Primus(Backbone):
    """The transformer. A crop's sides must be multiples of 8. The published sizes (width, depth, heads) are

        S 396, 12, 6      B 792, 12, 12      M 864, 16, 12      L 1056, 24, 16

    With `mask_tokens` the tokens of hidden cells become one learned token before the position table is added. They
    pass the blocks, unlike a masked autoencoder's, since the decoder cannot fill in what the encoder has not.

    It has one stage for `remat`, number 0. The decoder's channels depend on `out_channels`, so that only the encoder
    passes from pretraining to segmentation.
    """

    width: int = 396
    depth: int = 12
    heads: int = 6
    drop_path: float = 0.2
    mask_tokens: bool = True
    remat: tuple[int, ...] = ()
    out_channels: int = 1
    deep_supervision: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        if self.width % (6 * self.heads):
            raise UserError(f"width {self.width}, heads {self.heads}: a head's width must be a multiple of 6")
        check_remat(self.remat, 1)
        self.tokens = Tokens(self.width, self.dtype)
        start = nn.initializers.normal(0.02)
        self.mask_token = self.param("mask_token", start, (self.width,), jnp.float32) if self.mask_tokens else None
        self.position = PositionTable()
        kind = nn.remat(Block, static_argnums=(2, 3)) if self.remat else Block
        sizes = (self.heads, int(self.width * (4 * 2 / 3)))
        self.block = [
            kind(*sizes, float(rate), 0.02 / (2 * i + 2) ** 0.5, self.dtype)
            for i, rate in enumerate(np.linspace(0.0, self.drop_path, self.depth))
        ]
        self.norm = LayerNorm(dtype=self.dtype)
        self.up = [Upsample(width, self.dtype) for width in self._decoder_widths]
        self.expand = Expand(self.out_channels, (2, 2, 2), self.dtype, "he")
        if self.deep_supervision:
            self.level_head = [Linear(self.out_channels, start="he", dtype=self.dtype) for _ in self.up]

    @property
    def token_stride_zyx(self) -> Triple:
        return PATCH, PATCH, PATCH

    @property
    def encoder_channels(self) -> int:
        return self.width

    @property
    def decoder_channels(self) -> int:
        return self._decoder_widths[0]

    @property
    def _decoder_widths(self) -> tuple[int, int]:
        """From the encoder's width to the outputs' in equal ratios, but in multiples of 8."""
        ratio = (self.width / (2 * self.out_channels)) ** (1 / 3)
        first, second = (max(8, 8 * round((self.width / ratio**i + 1e-6) / 8)) for i in (1, 2))
        return first, second

    @nn.nowrap
    def layer_of(self, module: str) -> int:
        """As everywhere; `norm` comes after the last block."""
        return self.depth - 1 if module == "norm" else super().layer_of(module)

    def encode(
        self,
        volume: jax.Array,
        hidden: jax.Array | None = None,
        position_embedding: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, ...]:
        x = self.tokens(without_hidden(volume, hidden, self.token_stride_zyx))
        x = with_marks(x, hidden, self.mask_token, position_embedding)
        b, d, h, w, c = x.shape
        x = self.position(x.reshape(b, -1, c))
        for block in self.block:
            x = block(x, (d, h, w), train)
        return (self.norm(x).reshape(b, d, h, w, c),)

    def decode_tokens(self, skips: tuple[jax.Array, ...], train: bool = False) -> jax.Array:
        return self.up[0](skips[-1])

    def decode_voxels(self, skips: tuple[jax.Array, ...], decoder_tokens: jax.Array, train: bool = False) -> jax.Array:
        return self.expand(self.up[1](decoder_tokens)).astype(jnp.float32)

    def segment(self, volume: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        tokens = self.decode_tokens(self.encode(volume, train=train))
        levels = (self.up[1](tokens), tokens)
        logits = [self.expand(levels[0])]
        if self.deep_supervision:
            logits += [head(level) for head, level in zip(self.level_head, levels, strict=True)]
        return tuple(x.astype(jnp.float32) for x in logits)
