"""The anatomical embedder: a 3-D ResNet-18 with a fine feature-pyramid head and a coarse head.

Source: Yan et al., SAM: self-supervised learning of pixel-wise anatomical embeddings, IEEE TMI 2022,
arXiv 2012.02383 (section III). It maps a CT volume to one unit vector per cell of a fine and of a coarse grid,
such that the same anatomical place has similar vectors in every patient.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from alice_jax.models.layers import Conv, Triple, l2_normalise


class Embedding(NamedTuple):
    """Unit vectors over the channels.

    fine: (batch, fine_depth, fine_height, fine_width, features)
    coarse: (batch, coarse_depth, coarse_height, coarse_width, features)
    """

    fine: jax.Array
    coarse: jax.Array


def upsample_nearest(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Nearest neighbour along the three spatial axes of (b, d, h, w, c) to `shape`; cell i reads floor(i·in/out)."""
    for axis, size in enumerate(shape, start=1):
        have = x.shape[axis]
        if size % have == 0:
            x = jnp.repeat(x, size // have, axis=axis)
        else:
            index = np.floor(np.arange(size) * np.float32(have / size)).astype(np.int32)
            x = jnp.take(x, np.minimum(index, have - 1), axis=axis)
    return x


class ConvNorm(nn.Module):
    """Convolution without bias and batch norm. With `train`, the collection `batch_stats` *becomes* the batch's own
    mean and variance (momentum 0): mixing them into running statistics is the training objective's business."""

    channels: int
    kernel: Triple
    stride: Triple = (1, 1, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        x = Conv(self.channels, self.kernel, self.stride, False, self.dtype, he, name="conv")(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.0, epsilon=1e-5, dtype=self.dtype, name="bn")(x)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, projected by a 1³ convolution where shape or width change."""

    channels: int
    kernel: Triple
    stride: Triple
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        shortcut = x
        y = nn.relu(ConvNorm(self.channels, self.kernel, self.stride, self.dtype, name="conv1")(x, train))
        y = ConvNorm(self.channels, self.kernel, (1, 1, 1), self.dtype, name="conv2")(y, train)
        if self.stride != (1, 1, 1) or x.shape[-1] != self.channels:
            shortcut = ConvNorm(self.channels, (1, 1, 1), self.stride, self.dtype, name="downsample")(x, train)
        return nn.relu(y + shortcut)


class Embedder(nn.Module):
    """The published network by default; smaller ones by fewer channels and blocks and by other strides.

    Attributes:
      channels: of the four stages; the stem has those of stage one.
      features: length of both embeddings.
      blocks: in each stage.
      stem_kernel_zyx, stem_stride_zyx: of the first convolution.
      stage_strides_zyx, stage_kernels_zyx: of the four stages (kernels of both convolutions of all their blocks).
      depth_pool: max-pool along z after stage one (1: none).
      fine_kernel_zyx: of the last convolution of the fine head.
      dtype: of the computation; parameters, batch statistics and outputs stay fp32.

    Example:
      model = Embedder(channels=(8, 16, 32, 64), features=16)
      variables = model.init(key, jnp.zeros((1, 16, 64, 64, 1)))  # {"params": …, "batch_stats": …}
      fine, coarse = model.apply(variables, volume)  # (1, 8, 32, 32, 16), (1, 4, 4, 4, 16)
    """

    channels: tuple[int, ...] = (64, 128, 256, 512)
    features: int = 128
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    stem_kernel_zyx: Triple = (3, 7, 7)
    stem_stride_zyx: Triple = (1, 1, 1)
    stage_strides_zyx: tuple[Triple, ...] = ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    stage_kernels_zyx: tuple[Triple, ...] = ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
    depth_pool: int = 2
    fine_kernel_zyx: Triple = (3, 3, 3)
    dtype: Any = jnp.float32

    def setup(self) -> None:
        kind = dict(dtype=self.dtype)
        self.stem = ConvNorm(self.channels[0], self.stem_kernel_zyx, self.stem_stride_zyx, **kind)
        for stage in range(4):
            width, kernel = self.channels[stage], self.stage_kernels_zyx[stage]
            for block in range(self.blocks[stage]):
                stride = self.stage_strides_zyx[stage] if block == 0 else (1, 1, 1)
                setattr(self, f"layer{stage + 1}_block{block}", BasicBlock(width, kernel, stride, **kind))

        def head(kernel: Triple) -> Conv:
            return Conv(self.features, kernel, dtype=self.dtype, start=nn.initializers.xavier_uniform())

        for level in range(3):
            setattr(self, f"fine_lateral{level}", head((1, 1, 1)))
        self.coarse_lateral = head((1, 1, 1))
        self.fine_output = head(self.fine_kernel_zyx)
        self.coarse_output = head((3, 3, 3))

    def stages(self, volume: jax.Array, train: bool = False) -> list[jax.Array]:
        """Outputs (batch, d, h, w, channels[stage]) of the four stages; volume (batch, depth, height, width, 1).

        Stage one's is taken after its depth pooling.
        """
        x = nn.relu(self.stem(volume.astype(self.dtype), train))
        outputs = []
        for stage in range(4):
            for block in range(self.blocks[stage]):
                x = getattr(self, f"layer{stage + 1}_block{block}")(x, train)
            if stage == 0 and self.depth_pool > 1:
                whole = x.shape[1] // self.depth_pool
                x = (
                    x[:, : whole * self.depth_pool]
                    .reshape(x.shape[0], whole, self.depth_pool, *x.shape[2:])
                    .max(axis=2)
                )
            outputs.append(x)
        return outputs

    def heads(self, stages: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Fine and coarse features before they are normalised."""
        top = self.fine_lateral2(stages[2])
        for level in (1, 0):
            top = getattr(self, f"fine_lateral{level}")(stages[level]) + upsample_nearest(top, stages[level].shape[1:4])
        return self.fine_output(top), self.coarse_output(self.coarse_lateral(stages[3]))

    def __call__(self, volume: jax.Array, train: bool = False) -> Embedding:
        """Embeds network inputs (see `data.embedder_views.network_input`) of shape (batch, depth, height, width, 1)."""
        fine, coarse = self.heads(self.stages(volume, train))
        return Embedding(l2_normalise(fine), l2_normalise(coarse))


def strides_zyx(model: Embedder) -> tuple[Triple, Triple]:
    """Input voxels per fine and per coarse cell: ((2, 2, 2), (4, 16, 16)) for the published network."""
    steps = np.array(model.stage_strides_zyx)
    first = np.array(model.stem_stride_zyx) * np.array((model.depth_pool, 1, 1))
    fine, coarse = steps[0] * first, steps.prod(axis=0) * first
    return tuple(fine.tolist()), tuple(coarse.tolist())


def receptive_radius_zyx(model: Embedder) -> Triple:
    """How many voxels beyond a cell's own the coarse embedding can see, each way; (28, 124, 124) as published."""
    reach, step = np.array(model.stem_kernel_zyx) - 1, np.array(model.stem_stride_zyx)
    for stage, (stride, kernel) in enumerate(zip(model.stage_strides_zyx, model.stage_kernels_zyx, strict=True)):
        extent = np.array(kernel) - 1
        reach = reach + extent * step
        step = step * np.array(stride)
        reach = reach + (2 * model.blocks[stage] - 1) * extent * step
        if stage == 0:
            reach = reach + (np.array((model.depth_pool, 1, 1)) - 1) * step
            step = step * np.array((model.depth_pool, 1, 1))
    reach = reach + 2 * step  # the 3³ convolution of the coarse head
    return tuple((-(-reach // 2)).tolist())
