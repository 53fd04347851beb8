"""Attention inside cubic windows of a 3-D token grid, with relative position bias (Swin, nnFormer).

Grids are (depth, height, width); a grid's windows and a window's tokens are both listed in C order. Shapes use
b batch, n windows of one sample, t = window**3 tokens of one window, c channels, k heads.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from alice_jax.models.layers import Linear, by_platform

Grid = tuple[int, ...]  # depth, height, width

SEPARATE = -100.0  # added to the attention logit of two tokens that only the cyclic shift brought together


def effective_window(grid: Grid, window: int, shifted: bool) -> tuple[int, int]:
    """The window and shift that a block really uses on a grid.

    Where the smallest side is at most the window, the window becomes that side and the shift is dropped.

    >>> effective_window((8, 12, 8), 4, shifted=True), effective_window((4, 6, 4), 8, shifted=True)
    ((4, 2), (4, 0))
    """
    if min(grid) <= window:
        return min(grid), 0
    return window, window // 2 if shifted else 0


def padded_grid(grid: Grid, window: int) -> Grid:
    """The grid grown at the end of each axis to whole windows."""
    return tuple(math.ceil(n / window) * window for n in grid)


def partition(x: jax.Array, window: int) -> jax.Array:
    """(b, d, h, w, c) -> (b, n, t, c)."""
    b, d, h, w, c = x.shape
    x = x.reshape(b, d // window, window, h // window, window, w // window, window, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, window**3, c)


def merge(windows: jax.Array, grid: Grid, window: int) -> jax.Array:
    """(b, n, t, c) -> (b, d, h, w, c): undoes `partition`."""
    b, c = windows.shape[0], windows.shape[-1]
    d, h, w = (n // window for n in grid)
    x = windows.reshape(b, d, h, w, window, window, window, c)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, *grid, c)


def region_ids(grid: Grid, window: int, shift: int) -> np.ndarray:
    """The region that each token of each window lay in before the cyclic shift: (n, t) int8.

    `grid` is already padded. Tokens of one window may attend to each other only inside one region.
    """
    ids = np.zeros(grid, np.int8)
    for axis, size in enumerate(grid):
        place = np.arange(size)
        part = (place >= size - window).astype(np.int8) + (place >= size - shift)
        ids = 3 * ids + part.reshape([-1 if a == axis else 1 for a in range(3)])
    d, h, w = (n // window for n in grid)
    ids = ids.reshape(d, window, h, window, w, window)
    return ids.transpose(0, 2, 4, 1, 3, 5).reshape(-1, window**3)


def region_mask(grid: Grid, window: int, shift: int) -> jax.Array:
    """True where two tokens of a window must not see each other: (n, t, t) bool, made in the program from `region_ids`,
    which are much smaller."""
    ids = jnp.asarray(region_ids(grid, window, shift))
    return ids[:, :, None] != ids[:, None, :]


def offset_rows(window: int, kind: str) -> np.ndarray:
    """The bias table's row for each offset of query and key along three axes: (2w-1, 2w-1, 2w-1) int64.

    "correct" gives each offset its own row. "release" multiplies by 3w-1, 2w-1 and 1 as the authors' code does, so
    that different offsets share a row; weights trained with it need it.
    """
    side = 2 * window - 1
    strides = {"correct": (side * side, side, 1), "release": (3 * window - 1, side, 1)}
    if kind not in strides:
        raise ValueError(f"position index {kind!r}: choose 'correct' or 'release'")
    return sum(s * g for s, g in zip(strides[kind], np.indices((side,) * 3), strict=True)).astype(np.int64)


def relative_position_index(window: int, kind: str) -> np.ndarray:
    """The bias table's row for each pair (query, key) of a window's tokens: (t, t) int64."""
    place = np.indices((window,) * 3).reshape(3, -1)
    offset = place[:, :, None] - place[:, None, :] + window - 1
    return offset_rows(window, kind)[tuple(offset)]


def position_bias(table: jax.Array, window: int, kind: str) -> jax.Array:
    """Spreads the table over the token pairs: ((2w-1)**3, k) -> (k, t, t), `table[relative_position_index].T`.

    Axis by axis, as products with ones and zeros: exact, and neither they nor their gradients turn the large arrays
    round, which a take of rows makes an accelerator do.
    """
    side = 2 * window - 1
    if kind != "correct":
        table = jnp.take(table, offset_rows(window, kind).reshape(-1), axis=0, mode="clip")
    place = np.arange(window)
    offset = place[:, None] - place + window - 1  # of query and key along one axis
    chosen = jnp.asarray(offset[..., None] == np.arange(side), jnp.float32)  # (query, key, offset)
    spread = functools.partial(jnp.einsum, precision="highest")
    bias = table.T.reshape(-1, side, side, side)
    bias = spread("kzyx,adz->kadyx", bias, chosen)
    bias = spread("kadyx,bey->kabdex", bias, chosen)
    bias = spread("kabdex,cfx->kabcdef", bias, chosen)
    return bias.reshape(-1, window**3, window**3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def position_biases(table: jax.Array, window: int, kind: str, samples: int) -> jax.Array:
    """`position_bias` for each sample, all alike: ((2w-1)**3, k) -> (samples, k, t, t).

    Its gradient adds up each sample's pairs before the samples, so that devices which hold different samples send each
    other numbers for (2w-1)**3 offsets and not for t*t pairs.
    """
    # Left alone, a TPU's compiler takes over the table's order, where heads are innermost, and fills 24 up to 128.
    bias = with_layout_constraint(position_bias(table, window, kind), Layout((0, 1, 2)))
    return jnp.broadcast_to(bias, (samples, *bias.shape))


def _position_biases_gradient(window, kind, samples, _, gradient):
    table = jax.ShapeDtypeStruct(((2 * window - 1) ** 3, gradient.shape[1]), gradient.dtype)
    of_table = jax.linear_transpose(lambda table: position_bias(table, window, kind), table)
    return (jax.vmap(of_table)(gradient)[0].sum(0),)


position_biases.defvjp(
    lambda table, window, kind, samples: (position_biases(table, window, kind, samples), None),
    _position_biases_gradient,
)


def _weights(
    query: jax.Array, key: jax.Array, bias: jax.Array, separate: jax.Array | None, largest: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """exp(logit - largest of the row) (b, n, k, t, t) float32, and that largest one (b, n, k, t, 1)."""
    logits = jnp.einsum("...qe,...pe->...qp", query, key, preferred_element_type=jnp.float32) + bias[:, None]
    if separate is not None:
        logits = logits + jnp.where(separate, SEPARATE, 0.0)[:, None]
    if largest is None:
        largest = logits.max(axis=-1, keepdims=True)
    return jnp.exp(logits - largest), largest


@jax.custom_vjp
def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array, separate: jax.Array | np.ndarray | None
) -> jax.Array:
    """softmax(query keyᵀ + bias) value, the softmax in float32.

    query, key, value (b, n, k, t, size); bias (b, k, t, t); separate (n, t, t) bool, True where a key is hidden.

    What the gradient needs of the weights is computed again, as in FlashAttention (arXiv 2205.14135): they are by far
    the largest arrays of the network.
    """
    return _attend(query, key, value, bias, separate)[0]


def _attend(query, key, value, bias, separate):
    weights, largest = _weights(query, key, bias, separate)
    total = weights.sum(axis=-1, keepdims=True)
    y = jnp.einsum("...qp,...pe->...qe", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    y = (y / total).astype(value.dtype)  # the division after the product: a window has many more pairs than channels
    return y, (query, key, value, bias, separate, y, largest, total)


def _attend_gradient(saved, gradient):
    query, key, value, bias, separate, y, largest, total = saved
    dtype = value.dtype
    weights = _weights(query, key, bias, separate, largest)[0] / total
    of_weights = jnp.einsum("...qe,...pe->...qp", gradient, value, preferred_element_type=jnp.float32)
    own = jnp.sum(gradient.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    of_logits = weights * (of_weights - own)
    of_bias = by_platform(of_logits, cpu=_sum_of_windows, others=lambda x: x.sum(axis=1))
    of_query = jnp.einsum(
        "...qp,...pe->...qe", of_logits.astype(dtype), key, preferred_element_type=jnp.float32
    ).astype(dtype)
    of_key = _transposed_product(of_logits.astype(dtype), query).astype(dtype)
    of_value = _transposed_product(weights.astype(dtype), gradient).astype(dtype)
    return of_query, of_key, of_value, of_bias, None


def _sum_of_windows(pairs: jax.Array) -> jax.Array:
    """(b, n, k, q, p) -> (b, k, q, p) as a product: XLA's sum takes a CPU as long as the rest of the gradient."""
    return jnp.einsum("bn,bnkqp->bkqp", jnp.ones(pairs.shape[:2], jnp.float32), pairs, precision="highest")


def _transposed_product(pairs: jax.Array, x: jax.Array) -> jax.Array:
    """pairsᵀ x: (…, q, p), (…, q, e) -> (…, p, e) float32."""

    def of_small_ones(pairs: jax.Array, x: jax.Array) -> jax.Array:
        # The barriers keep XLA from transposing `pairs` in place of `x` and the result: a CPU has no fast product then.
        rows = jax.lax.optimization_barrier(x.swapaxes(-1, -2))
        product = jnp.einsum("...eq,...qp->...ep", rows, pairs, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(product).swapaxes(-1, -2)

    def plain(pairs: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.einsum("...qp,...qe->...pe", pairs, x, preferred_element_type=jnp.float32)

    return by_platform(pairs, x, cpu=of_small_ones, others=plain)


attend.defvjp(_attend, _attend_gradient)


class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of each window.

    With `context`, keys and values come from it and the queries are `x` itself, not projected: nnFormer's skip
    attention. Logits and softmax are float32.
    """

    heads: int
    position_index: str = "correct"
    start: str = "normal"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, separate: jax.Array | np.ndarray | None = None
    ) -> jax.Array:
        """x, context (b, n, t, c); separate (n, t, t) bool, True where a key is hidden from a query -> (b, n, t, c)."""
        b, n, t, c = x.shape
        window = round(t ** (1 / 3))
        table_init = nn.initializers.normal(0.02)
        table = self.param("position_bias", table_init, ((2 * window - 1) ** 3, self.heads), jnp.float32)

        size = c // self.heads

        def split(x: jax.Array, parts: int) -> jax.Array:
            """(b, n, t, parts * c) -> (parts, b, n, k, t, size)."""
            return x.reshape(b, n, t, parts, self.heads, size).transpose(3, 0, 1, 4, 2, 5)

        if context is None:
            query, key, value = split(Linear(3 * c, start=self.start, dtype=self.dtype, name="qkv")(x), 3)
        else:
            query = split(x.astype(self.dtype), 1)[0]
            key, value = split(Linear(2 * c, start=self.start, dtype=self.dtype, name="kv")(context), 2)
        bias = position_biases(table, window, self.position_index, b)
        y = attend(query * size**-0.5, key, value, bias, separate)
        y = y.transpose(0, 1, 3, 2, 4).reshape(b, n, t, c)
        return Linear(c, start=self.start, dtype=self.dtype, name="out")(y)


def over_windows(
    attend: Callable[..., jax.Array], x: jax.Array, context: jax.Array | None = None, *, window: int, shifted: bool
) -> jax.Array:
    """Runs window attention on a grid: pads to whole windows, shifts cyclically, attends, and puts all back.

    x, context (b, d, h, w, c) -> (b, d, h, w, c). Padded tokens take part as keys and values, as in the reference,
    and are cut off afterwards.
    """
    grid: Grid = x.shape[1:4]
    window, shift = effective_window(grid, window, shifted)
    padded = padded_grid(grid, window)

    def to_windows(x: jax.Array) -> jax.Array:
        if padded != grid:
            x = jnp.pad(x, ((0, 0), *((0, p - g) for p, g in zip(padded, grid, strict=True)), (0, 0)))
        if shift:
            x = jnp.roll(x, (-shift,) * 3, axis=(1, 2, 3))
        return partition(x, window)

    separate = region_mask(padded, window, shift) if shift else None
    y = attend(to_windows(x), None if context is None else to_windows(context), separate)
    y = merge(y, padded, window)
    if shift:
        y = jnp.roll(y, (shift,) * 3, axis=(1, 2, 3))
    return y[:, : grid[0], : grid[1], : grid[2]]
