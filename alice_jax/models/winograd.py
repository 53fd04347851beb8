"""3×3 convolutions with a quarter of the multiplications, for processors without matrix units.

Winograd's minimal filtering F(4×4, 3×3) (Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016,
arXiv 1509.09308): of each 6×6 tile of a plane 36 sums are taken, and as many of the kernel; their products, 36 instead
of 144, make 4×4 outputs. Taps along the depth are summed as they are. In float32 outputs are off
by 1e-5 of the largest.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TILE, OUT = 6, 4  # voxels of a side that a tile reads, and that it makes

# The paper's Bᵀ, G and Aᵀ: what is taken of six voxels, of three weights, and of six products.
_OF_TILE = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
_OF_KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float32) / 24
_OF_PRODUCTS = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32
)


def pays(shape: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dtype: Any) -> bool:
    """Whether it is faster, and exact enough, for inputs (b, d, h, w, in) and a kernel (kd, kh, kw, in, out).

    Small planes leave much of their last tiles unused, and of few channels the sums cost more than the products.
    """
    wide = min(kernel[3:]) >= 16 and min(shape[2:4]) >= 16
    return wide and tuple(kernel[1:3]) == (3, 3) and set(strides) == {1} and dtype == jnp.float32


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(b, d, h, w, in), (kd, 3, 3, in, out) -> (b, d, h, w, out), zero-padded, for an odd kd."""
    return _convolve(x, kernel)


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    b, d, h, w, channels = x.shape
    taps, features = kernel.shape[0], kernel.shape[-1]
    rows, columns = -(-h // OUT), -(-w // OUT)
    border = ((0, 0), (taps // 2, taps // 2), (1, rows * OUT - h + 1), (1, columns * OUT - w + 1), (0, 0))
    x = jnp.pad(x, border)

    # First along the columns of the tiles as a product, which nothing is fused into: XLA would compute it anew below.
    x = jnp.tensordot(_OF_TILE, jnp.stack([x[:, :, i::OUT][:, :, :rows] for i in range(TILE)]), 1)
    x = jnp.stack(_sums(_OF_TILE, [x[:, :, :, :, i::OUT][:, :, :, :, :columns] for i in range(TILE)]))
    of_kernel = jnp.einsum("ih,jw,dhwco->jicdo", _OF_KERNEL, _OF_KERNEL, kernel, precision="highest")

    y = jnp.einsum("nvc,nco->nvo", x.reshape(TILE**2, -1, channels), of_kernel.reshape(TILE**2, channels, -1))
    y = y.reshape(TILE, TILE, b, d + taps - 1, rows, columns, taps, features)
    y = functools.reduce(jnp.add, [y[:, :, :, tap : tap + d, :, :, tap] for tap in range(taps)])

    y = jnp.tensordot(_OF_PRODUCTS, y, 1)
    y = jnp.stack(_sums(_OF_PRODUCTS, [y[:, i] for i in range(TILE)]))  # (4 rows, 4 columns, b, d, rows, columns, out)
    y = y.transpose(2, 3, 4, 0, 5, 1, 6).reshape(b, d, rows * OUT, columns * OUT, features)
    return y[:, :, :h, :w]


def _sums(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """matrix @ parts, term by term."""
    terms = ([float(factor) * part for factor, part in zip(row, parts, strict=True) if factor] for row in matrix)
    return [functools.reduce(jnp.add, row) for row in terms]


def _gradient(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the inputs it is a convolution too; as the transposed program it would take twice as long."""
    x, kernel = saved
    of_x = _convolve(gradient, kernel[::-1, ::-1, ::-1].swapaxes(3, 4))
    (of_kernel,) = jax.linear_transpose(functools.partial(_convolve, x), kernel)(gradient)
    return of_x, of_kernel


convolve.defvjp(lambda x, kernel: (_convolve(x, kernel), (x, kernel)), _gradient)
