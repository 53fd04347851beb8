"""CASA: conditional anatomical semantic alignment, the cross-attention that completes a masked crop's tokens."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from alice_jax.models.layers import LayerNorm, Linear


class CASA(nn.Module):
    """Multi-head cross-attention, then a ReLU feed-forward with its residual; a LayerNorm (eps 1e-6) after each.

    Release mode runs it on prototype logits and adds the query to what was attended (`query_residual`). Paper mode
    runs it on bottleneck features without: [A]'s figure 3 has no such path, and with the same query on both sides
    the loss could be solved without looking at the tokens.
    """

    width: int = 256
    inner: int = 2048
    heads: int = 8
    head_dim: int = 64
    dropout: float = 0.1
    query_residual: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        def linear(features: int, use_bias: bool) -> Linear:
            return Linear(features, use_bias, start="uniform", dtype=self.dtype)

        self.query = linear(self.heads * self.head_dim, False)
        self.key = linear(self.heads * self.head_dim, False)
        self.value = linear(self.heads * self.head_dim, False)
        self.out = linear(self.width, False)
        self.norm1 = LayerNorm(1e-6, self.dtype)
        self.fc1 = linear(self.inner, True)
        self.fc2 = linear(self.width, True)
        self.norm2 = LayerNorm(1e-6, self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def _split(self, x: jax.Array) -> jax.Array:
        """(b, n, heads * size) -> (b, heads, n, size)."""
        return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

    def attention(self, query: jax.Array, context: jax.Array) -> jax.Array:
        """The attention probabilities: query (b, q, c), context (b, k, c) -> (b, heads, q, k) float32."""
        q = self._split(self.query(query)) * self.head_dim**-0.5
        k = self._split(self.key(context))
        return nn.softmax(jnp.einsum("bhqe,bhke->bhqk", q, k, preferred_element_type=jnp.float32))

    def __call__(self, query: jax.Array, context: jax.Array, train: bool = False) -> jax.Array:
        """query (b, q, width), context (b, k, width) -> (b, q, width). Dropout draws from the stream "dropout"."""
        weights = self.drop(self.attention(query, context), deterministic=not train).astype(self.dtype)
        y = jnp.einsum("bhqk,bhke->bhqe", weights, self._split(self.value(context)))
        y = self.out(y.swapaxes(1, 2).reshape(*query.shape[:2], -1))
        y = self.drop(y, deterministic=not train)
        y = self.norm1(y + query.astype(y.dtype) if self.query_residual else y)
        z = self.drop(self.fc2(nn.relu(self.fc1(y))), deterministic=not train)
        return self.norm2(y + z)
