"""nnFormer (Zhou et al., arXiv 2109.03201) as Alice's authors changed it: a windowed transformer U-net for volumes.

    volume (b, d, h, w, 1)
      -> patch embedding -> encoder stage 0 .. 3, each followed by its own norm = the skips
      skip 3 -> decoder stage 2 (with skip 2) -> decoder tokens -> stages 1, 0 -> expand -> reconstruction, or logits

Stage i works on the grid `crop / patch / 2**i` with `width * 2**i` channels; decoder stages carry the number of the
encoder stage whose grid they share and run from coarse to fine. Arrays are channels-last.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alice_jax.errors import UserError
from alice_jax.models.backbone import Backbone, check_remat, with_marks, without_hidden
from alice_jax.models.layers import Conv, DropPath, Expand, LayerNorm, Linear, Mlp, Triple, gelu
from alice_jax.models.windows import WindowAttention, over_windows


class PatchEmbed(nn.Module):
    """Four 3x3x3 convolutions that turn voxels into tokens: (b, d, h, w, c) -> (b, d/p, h/p, w/p, width).

    Two stages of two; the strides sit on the first convolution of each stage. GELU and LayerNorm follow every
    convolution, but the last has no GELU.
    """

    width: int
    strides: tuple[Triple, Triple]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = (
            ("1_1", self.width // 2, self.strides[0]),
            ("1_2", self.width // 2, (1, 1, 1)),
            ("2_1", self.width, self.strides[1]),
        )
        for name, features, strides in layers:
            x = gelu(Conv(features, strides=strides, dtype=self.dtype, name=f"conv{name}")(x))
            x = LayerNorm(dtype=self.dtype, name=f"norm{name}")(x)
        x = Conv(self.width, dtype=self.dtype, name="conv2_2")(x)
        return LayerNorm(dtype=self.dtype, name="norm2_2")(x)


class Block(nn.Module):
    """Self-attention in windows, then an MLP, each with a LayerNorm before and a residual: (b, d, h, w, c)."""

    heads: int
    window: int
    shifted: bool
    drop_path: float
    position_index: str
    start: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = LayerNorm(dtype=self.dtype, name="norm1")(x)
        attend = WindowAttention(self.heads, self.position_index, self.start, self.dtype, name="attention")
        y = over_windows(attend, y, window=self.window, shifted=self.shifted)
        return _finish(self, x, y, train)


class SkipBlock(nn.Module):
    """A decoder stage's first block: the upsampled features look at the skip in unshifted windows.

    x, skip (b, d, h, w, c) -> (b, d, h, w, c). One norm serves both; the sum of both is the residual.
    """

    heads: int
    window: int
    drop_path: float
    position_index: str
    start: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array, train: bool) -> jax.Array:
        norm = LayerNorm(dtype=self.dtype, name="norm1")
        attend = WindowAttention(self.heads, self.position_index, self.start, self.dtype, name="attention")
        y = over_windows(attend, norm(x), norm(skip), window=self.window, shifted=False)
        return _finish(self, x + skip, y, train)


def _finish(block: Block | SkipBlock, x: jax.Array, attended: jax.Array, train: bool) -> jax.Array:
    """The residual around the attention and the whole MLP half; called inside the block's compact method."""
    drop = DropPath(block.drop_path, name="drop_path")
    x = x + drop(attended, train)
    y = LayerNorm(dtype=block.dtype, name="norm2")(x)
    y = Mlp(4 * x.shape[-1], block.start, block.dtype, name="mlp")(y)
    return x + drop(y, train)


# The same blocks, of which only the inputs are kept for the gradient; the number is the place of `train`, after self.
RematBlock, RematSkipBlock = nn.remat(Block, static_argnums=(2,)), nn.remat(SkipBlock, static_argnums=(3,))


class Downsample(nn.Module):
    """GELU, LayerNorm, 3x3x3 convolution with stride 2: (b, d, h, w, c) -> (b, d/2, h/2, w/2, 2c)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = LayerNorm(dtype=self.dtype, name="norm")(gelu(x))
        return Conv(2 * x.shape[-1], strides=(2, 2, 2), dtype=self.dtype, name="conv")(y)


class Upsample(nn.Module):
    """LayerNorm, transposed 2x2x2 convolution: (b, d, h, w, c) -> (b, 2d, 2h, 2w, c/2)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = LayerNorm(dtype=self.dtype, name="norm")(x)
        return Expand(x.shape[-1] // 2, (2, 2, 2), self.dtype, name="expand")(y)


class EncoderStage(nn.Module):
    """Blocks on one grid, every second one shifted: (b, d, h, w, c) -> (b, d, h, w, c)."""

    heads: int
    window: int
    drop_paths: tuple[float, ...]
    position_index: str
    dtype: Any
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        settings = (self.position_index, "normal", self.dtype)
        kind = RematBlock if self.remat else Block
        for j, rate in enumerate(self.drop_paths):
            shifted = j % 2 == 1
            x = kind(self.heads, self.window, shifted, rate, *settings, name=f"block{j}")(x, train)
        return x


class DecoderStage(nn.Module):
    """Upsamples, looks at the skip, then attends within itself, shifted: (b, d, h, w, 2c), skip -> (b, 2d, .., c)."""

    heads: int
    window: int
    drop_paths: tuple[float, ...]
    position_index: str
    dtype: Any
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array, train: bool) -> jax.Array:
        settings = (self.position_index, "uniform", self.dtype)
        first_kind, kind = (RematSkipBlock, RematBlock) if self.remat else (SkipBlock, Block)
        x = Upsample(self.dtype, name="upsample")(x)
        for j, rate in enumerate(self.drop_paths):
            if j == 0:
                x = first_kind(self.heads, self.window, rate, *settings, name="block0")(x, skip, train)
            else:
                x = kind(self.heads, self.window, True, rate, *settings, name=f"block{j}")(x, train)
        return x


class NNFormer(Backbone):
    """The authors' backbone. A crop's sides must be multiples of `patch * 2**(stages - 1)`: 16 voxels by default.

    `encode`, `decode_tokens` and `decode_voxels` are its three parts, so that a caller pays only for what it uses;
    calling it runs all three. `segment` runs them too and, with `deep_supervision`, has logits of every decoder stage.

    With `mask_tokens` (paper mode) the tokens of hidden cells become one learned token after the patch embedding.
    [A]'s figure 2 shows visible tokens only to the encoder, but windows need the whole grid: a departure. Without
    them (release mode) hiding means zeroed voxels only.

    `remat` names the stages whose blocks, in encoder and decoder, keep only their inputs for the gradient and are
    computed again there: less memory for more computing, and the same numbers but for rounding. Not on a CPU, where XLA
    computes early what should come late.

    The position bias tables have (2w-1)**3 rows for the window that the crop's grid really allows, so weights belong
    to a crop size.
    """

    width: int = 48
    stem_strides: tuple[Triple, Triple] = ((2, 2, 2), (1, 1, 1))  # whose product is the patch
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (6, 12, 24, 48)
    windows: tuple[int, ...] = (4, 4, 8, 4)
    drop_path: float = 0.2
    position_index: str = "correct"
    mask_tokens: bool = True
    remat: tuple[int, ...] = ()
    out_channels: int = 1
    deep_supervision: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        if not len(self.depths) == len(self.heads) == len(self.windows):
            raise UserError(f"depths {self.depths}, heads {self.heads}, windows {self.windows}: give one per stage")
        stages = range(len(self.depths))
        check_remat(self.remat, len(stages))
        encoder_rates = drop_rates(self.drop_path, self.depths)
        decoder_rates = drop_rates(self.drop_path, self.depths[-2::-1])[::-1]  # the coarsest stage runs first
        self.patch_embed = PatchEmbed(self.width, self.stem_strides, self.dtype)
        start = nn.initializers.normal(0.02)
        self.mask_token = self.param("mask_token", start, (self.width,), jnp.float32) if self.mask_tokens else None

        def stage(kind: type[EncoderStage] | type[DecoderStage], i: int, rates: tuple[float, ...]) -> nn.Module:
            return kind(self.heads[i], self.windows[i], rates, self.position_index, self.dtype, i in self.remat)

        self.encoder = [stage(EncoderStage, i, encoder_rates[i]) for i in stages]
        self.skip_norm = [LayerNorm(dtype=self.dtype) for _ in stages]
        self.downsample = [Downsample(self.dtype) for _ in stages[:-1]]
        self.decoder = [stage(DecoderStage, i, decoder_rates[i]) for i in stages[:-1]]
        self.expand = Expand(self.out_channels, self.patch_zyx, self.dtype)
        if self.deep_supervision:
            self.level_head = [Linear(self.out_channels, start="uniform", dtype=self.dtype) for _ in stages[:-1]]

    @property
    def patch_zyx(self) -> Triple:
        """Voxels of a token of the finest grid."""
        (d, h, w), (d2, h2, w2) = self.stem_strides
        return d * d2, h * h2, w * w2

    @property
    def token_stride_zyx(self) -> Triple:
        d, h, w = (p * 2 ** (len(self.depths) - 1) for p in self.patch_zyx)
        return d, h, w

    @property
    def encoder_channels(self) -> int:
        return self.width * 2 ** (len(self.depths) - 1)

    @property
    def decoder_channels(self) -> int:
        return self.encoder_channels // 2

    def encode(
        self,
        volume: jax.Array,
        hidden: jax.Array | None = None,
        position_embedding: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, ...]:
        """volume (b, d, h, w, c) -> one normalised skip per stage, finest first; the last holds the encoder tokens.

        hidden (b, gd, gh, gw), True = hidden, lies on any grid that divides the token grid.
        position_embedding (1, token grid, width) is added to the tokens (release mode's fixed random table).
        """
        x = self.patch_embed(without_hidden(volume, hidden, self.token_stride_zyx))
        x = with_marks(x, hidden, self.mask_token, position_embedding)
        skips = []
        for i, stage in enumerate(self.encoder):
            x = stage(x if i == 0 else self.downsample[i - 1](x), train)
            skips.append(self.skip_norm[i](x))
        return tuple(skips)

    def decode_tokens(self, skips: tuple[jax.Array, ...], train: bool = False) -> jax.Array:
        """The first decoder stage: skips -> decoder tokens (b, 2d, 2h, 2w, c/2), d, h, w the last encoder grid."""
        return self.decoder[-1](skips[-1], skips[-2], train)

    def decode_voxels(self, skips: tuple[jax.Array, ...], decoder_tokens: jax.Array, train: bool = False) -> jax.Array:
        """The other decoder stages: decoder tokens -> voxels (b, d, h, w, out_channels) float32."""
        return self.expand(self._decoder_levels(skips, decoder_tokens, train)[0]).astype(jnp.float32)

    def segment(self, volume: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """volume (b, d, h, w, c) -> logits (b, d, h, w, out_channels) float32.

        With `deep_supervision` those of each decoder stage follow, finest first, each from a 1x1x1 head on its grid
        crop / patch / 2**i.
        """
        skips = self.encode(volume, train=train)
        levels = self._decoder_levels(skips, self.decode_tokens(skips, train), train)
        logits = [self.expand(levels[0])]
        if self.deep_supervision:
            logits += [head(level) for head, level in zip(self.level_head, levels, strict=True)]
        return tuple(x.astype(jnp.float32) for x in logits)

    def _decoder_levels(
        self, skips: tuple[jax.Array, ...], decoder_tokens: jax.Array, train: bool
    ) -> tuple[jax.Array, ...]:
        """What every decoder stage gives, finest first; the last are the decoder tokens."""
        levels = [decoder_tokens]
        for i in reversed(range(len(self.decoder) - 1)):
            levels.insert(0, self.decoder[i](levels[0], skips[i], train))
        return tuple(levels)


def drop_rates(rate: float, depths: tuple[int, ...]) -> list[tuple[float, ...]]:
    """Drop rates that grow linearly from 0 to `rate` over all blocks, stage by stage.

    >>> drop_rates(0.3, (2, 2))
    [(0.0, 0.1), (0.2, 0.3)]
    """
    rates = [round(float(r), 9) for r in np.linspace(0.0, rate, sum(depths))]
    ends = np.cumsum(depths).tolist()
    return [tuple(rates[end - depth : end]) for end, depth in zip(ends, depths, strict=True)]
