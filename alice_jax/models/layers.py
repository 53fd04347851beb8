"""The few layers in which PyTorch's conventions (starting values, padding, exact GELU) differ from Flax's.

Parameters are float32 whatever the compute type. `start` names how a layer starts: `"uniform"` is PyTorch's
default U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases, `"normal"` is N(0, 0.02) and `"he"` is He's normal
for leaky ReLUs of slope 0.01 (nnU-Net's), both with zero biases; a number is another deviation for `"normal"`, and
an initialiser is the kernel's own.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alice_jax.models import winograd

Init = Callable[..., jax.Array]
Triple = tuple[int, int, int]


def uniform(limit: float) -> Init:
    """An initialiser that draws from U(-limit, limit)."""

    def draw(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return draw


def starting_values(start: str | float | Init, fan_in: int) -> tuple[Init, Init]:
    """The initialisers of a layer's kernel and bias."""
    if start == "uniform":
        return uniform(fan_in**-0.5), uniform(fan_in**-0.5)
    if isinstance(start, str):
        start = {"normal": 0.02, "he": (2 / (1 + 0.01**2) / fan_in) ** 0.5}[start]
    kernel = start if callable(start) else nn.initializers.normal(start)
    return kernel, nn.initializers.zeros


def gelu(x: jax.Array) -> jax.Array:
    """The exact form, written with erf as in PyTorch: Flax's, written with erfc, takes a CPU longer."""
    return 0.5 * x * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


def l2_normalise(x: jax.Array) -> jax.Array:
    """`x / max(|x|, 1e-12)` over the last axis, in float32, with a finite gradient at zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """`y + bias` in float32, returned as `y` is: the gradient of a bias is a sum over all voxels, which in bfloat16
    would stand still at 256 equal terms."""
    return (y.astype(jnp.float32) + bias).astype(y.dtype)


def by_platform(*operands: jax.Array, cpu: Callable[..., jax.Array], others: Callable[..., jax.Array]) -> jax.Array:
    """`cpu(*operands)` in programs for a CPU, otherwise `others(*operands)`: one sum in two orders.

    Some products that a CPU computes several times faster cost an accelerator copies of its largest arrays.
    """
    return jax.lax.platform_dependent(*operands, cpu=cpu, default=others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) · scale + bias over the last axis, in float32, returned in `dtype`.

    The variance is taken after the mean: Flax's one-pass form loses digits when the mean is large. The gradient keeps
    `x` and two numbers for each vector.
    """
    return _layer_norm(x, scale, bias, epsilon, dtype)[0]


def _layer_norm(x, scale, bias, epsilon, dtype):
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    centred = x32 - mean
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    return (centred * inverse * scale + bias).astype(dtype), (x, mean, inverse, scale)


def _layer_norm_gradient(epsilon, dtype, saved, gradient):
    x, mean, inverse, scale = saved
    gradient = gradient.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    of_normal = gradient * scale
    along = jnp.mean(of_normal * normal, axis=-1, keepdims=True)
    of_x = inverse * (of_normal - jnp.mean(of_normal, axis=-1, keepdims=True) - normal * along)
    # Sums over all vectors as products with ones, which a CPU computes several times faster than XLA's sums.
    ones = jnp.ones(x.shape[:-1], jnp.float32)
    of_scale, of_bias = (
        jnp.tensordot(ones, y, axes=x.ndim - 1, precision="highest") for y in (gradient * normal, gradient)
    )
    return of_x.astype(x.dtype), of_scale, of_bias


layer_norm.defvjp(_layer_norm, _layer_norm_gradient)


class LayerNorm(nn.Module):
    """`layer_norm` with its scale and bias as parameters."""

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return layer_norm(x, scale, bias, self.epsilon, self.dtype)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel: (..., in), (in, out) -> (..., out).

    Its own gradient, since JAX's asks for the transposed kernel gradient, which takes a CPU up to five times as long.
    """
    return x @ kernel


def _product_gradient(saved, gradient):
    x, kernel = saved
    of_kernel = by_platform(
        x,
        gradient,
        cpu=lambda x, y: x.reshape(-1, x.shape[-1]).T @ y.reshape(-1, y.shape[-1]),
        others=lambda x, y: jnp.einsum("...i,...o->io", x, y),
    )
    return gradient @ kernel.T, of_kernel


product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_gradient)


class InstanceNorm(nn.Module):
    """Each channel of each sample normalised over its voxels, then scaled and moved: (b, d, h, w, c), in float32."""

    epsilon: float = 1e-5
    start: Init = nn.initializers.ones  # of the scale
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", self.start, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - x.mean((1, 2, 3), keepdims=True)
        inverse = jax.lax.rsqrt((centred * centred).mean((1, 2, 3), keepdims=True) + self.epsilon)
        return (centred * (inverse * scale) + bias).astype(self.dtype)


class Linear(nn.Module):
    """`x @ kernel + bias` over the last axis: (..., in) -> (..., features)."""

    features: int
    use_bias: bool = True
    start: str | float = "normal"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init, bias_init = starting_values(self.start, x.shape[-1])
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            y = add_bias(y, self.param("bias", bias_init, (self.features,), jnp.float32))
        return y


def planewise(x: jax.Array, kernel: jax.Array, strides: Triple = (1, 1, 1)) -> jax.Array:
    """A convolution plane by plane: (b, d, h, w, in), (kd, kh, kw, in, out) -> (b, ceil(d/s), ..., out).

    The taps along the depth become input channels of a 2-D one. The numbers are those of a 3-D one, which XLA computes
    several times slower on a CPU (its strided gradient a hundred times), and the single channel of a volume fills more
    of a TPU's lanes.
    """
    b, d, h, w, channels = x.shape
    kd, kh, kw, _, features = kernel.shape
    x = jnp.pad(x, ((0, 0), (kd // 2, kd // 2), (0, 0), (0, 0), (0, 0)))
    planes = jnp.concatenate([x[:, tap : tap + d : strides[0]] for tap in range(kd)], axis=-1)
    y = jax.lax.conv_general_dilated(
        planes.reshape(-1, h, w, kd * channels),
        kernel.transpose(1, 2, 0, 3, 4).reshape(kh, kw, kd * channels, features),
        window_strides=strides[1:],
        padding=[(kh // 2, kh // 2), (kw // 2, kw // 2)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(b, -1, *y.shape[1:])


class Conv(nn.Module):
    """A convolution, zero-padded by kernel // 2: (b, d, h, w, in) -> (b, ceil(d/s), ..., features), for odd kernels.

    Parameters as in `nn.Conv`.
    """

    features: int
    kernel: Triple = (3, 3, 3)
    strides: Triple = (1, 1, 1)
    use_bias: bool = True
    dtype: Any = jnp.float32
    start: str | Init = "uniform"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel_init, bias_init = starting_values(self.start, math.prod(shape[:-1]))
        kernel = self.param("kernel", kernel_init, shape, jnp.float32).astype(self.dtype)
        x = x.astype(self.dtype)
        if winograd.pays(x.shape, shape, self.strides, self.dtype):
            y = by_platform(x, kernel, cpu=winograd.convolve, others=planewise)
        else:
            y = planewise(x, kernel, self.strides)
        if self.use_bias:
            y = add_bias(y, self.param("bias", bias_init, (self.features,), jnp.float32))
        return y


class Expand(nn.Module):
    """A transposed convolution whose kernel equals its stride: (b, d, h, w, in) -> (b, d kd, h kh, w kw, features).

    Every input voxel makes its own block of outputs, so one matmul and a reshape compute it.
    """

    features: int
    kernel: Triple
    dtype: Any = jnp.float32
    start: str = "uniform"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, d, h, w, channels = x.shape
        kd, kh, kw = self.kernel
        kernel_init, bias_init = starting_values(self.start, self.features * kd * kh * kw)  # PyTorch's fan-in
        kernel = self.param("kernel", kernel_init, (channels, kd, kh, kw, self.features), jnp.float32)
        bias = self.param("bias", bias_init, (self.features,), jnp.float32)
        y = product(x.astype(self.dtype), kernel.astype(self.dtype).reshape(channels, -1))
        y = y.reshape(b, d, h, w, kd, kh, kw, self.features).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return add_bias(y.reshape(b, d * kd, h * kh, w * kw, self.features), bias)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear: (..., c) -> (..., c)."""

    hidden: int
    start: str = "normal"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = gelu(Linear(self.hidden, start=self.start, dtype=self.dtype, name="fc1")(x))
        return Linear(x.shape[-1], start=self.start, dtype=self.dtype, name="fc2")(y)


class DropPath(nn.Module):
    """Drops a residual branch for whole samples and scales those kept by 1/keep (stochastic depth)."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, shape)
        return jnp.where(kept, x / keep, jnp.zeros((), x.dtype)).astype(x.dtype)
