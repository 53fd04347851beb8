"""The projection head that turns backbone features into prototype logits (after DINO and iBOT)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from alice_jax.models.layers import Linear, gelu, l2_normalise, uniform


class Prototypes(nn.Module):
    """A weight-normalised linear layer without bias: (..., bottleneck) -> (..., count).

    With the gain at 1 and normalised input the outputs are cosines. The gain is a parameter because the authors'
    layout has it; it receives no gradient unless `train_gain`, which is there to compare with their head of free gains.
    """

    count: int
    train_gain: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        limit = x.shape[-1] ** -0.5
        direction = self.param("direction", uniform(limit), (x.shape[-1], self.count), jnp.float32)
        gain = self.param("gain", nn.initializers.ones, (self.count,), jnp.float32)
        gain = gain if self.train_gain else jax.lax.stop_gradient(gain)
        kernel = direction * (gain * jax.lax.rsqrt(jnp.sum(direction * direction, axis=0)))
        return jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32)


class Head(nn.Module):
    """Maps each kind of feature to the MLP's width, then to the bottleneck, then to prototype logits.

    The student has its own prototypes for `cls` and for tokens (`separate_last`); a head without shares one layer.

        features = head.apply(params, encoder_tokens, "encoder", method="project")  # (b, n, 384) -> (b, n, 256)
        logits = head.apply(params, features, "tokens", method="logits")            # (b, n, 256) -> (b, n, 512)
    """

    width: int = 384
    hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 512
    token_prototypes: int = 512
    separate_last: bool = True
    train_gain: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.encoder_projection = Linear(self.width, start="uniform", dtype=self.dtype)
        self.decoder_projection = Linear(self.width, start="uniform", dtype=self.dtype)
        self.mlp1 = Linear(self.hidden, dtype=self.dtype)
        self.mlp2 = Linear(self.hidden, dtype=self.dtype)
        self.mlp3 = Linear(self.bottleneck, dtype=self.dtype)
        self.last = Prototypes(self.prototypes, self.train_gain, self.dtype)
        if self.separate_last:
            self.last_tokens = Prototypes(self.token_prototypes, self.train_gain, self.dtype)

    def project(self, x: jax.Array, source: str) -> jax.Array:
        """x (..., c) of one source ("cls", "encoder" or "decoder") -> bottleneck features (..., bottleneck).

        `cls` enters the MLP as it is, so its width must be the MLP's.
        """
        if source == "encoder":
            x = self.encoder_projection(x)
        elif source == "decoder":
            x = self.decoder_projection(x)
        elif source != "cls":
            raise ValueError(f"source {source!r}: choose 'cls', 'encoder' or 'decoder'")
        return self.mlp3(gelu(self.mlp2(gelu(self.mlp1(x)))))

    def logits(self, features: jax.Array, kind: str) -> jax.Array:
        """features (..., bottleneck) -> float32 logits (..., prototypes) of kind "cls" or "tokens"."""
        if kind not in ("cls", "tokens"):
            raise ValueError(f"kind {kind!r}: choose 'cls' or 'tokens'")
        last = self.last_tokens if kind == "tokens" and self.separate_last else self.last
        return last(l2_normalise(features))

    def __call__(
        self, cls: jax.Array, encoder_tokens: jax.Array, decoder_tokens: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Logits of all three: cls (b, c), encoder (b, n, c), decoder (b, m, c') -> (b, p), (b, n, p'), (b, m, p')."""
        return (
            self.logits(self.project(cls, "cls"), "cls"),
            self.logits(self.project(encoder_tokens, "encoder"), "tokens"),
            self.logits(self.project(decoder_tokens, "decoder"), "tokens"),
        )


def shared_last(student: dict[str, Any]) -> dict[str, Any]:
    """The release's starting teacher head: the student's, with one last layer, namely the student's *token* layer.

    The authors load both of the student's layers into the one module in turn, and the token layer comes last. (The
    moving average afterwards follows the student's `cls` layer, which has the same name as the teacher's.)
    """
    teacher = {name: value for name, value in student.items() if name != "last_tokens"}
    return teacher | {"last": student["last_tokens"]}
