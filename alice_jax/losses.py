"""Alice's three losses as pure functions.

Logits carry the two views of a pair on axis 1: `(batch, 2, …, prototypes)`, view 0 the query patient, view 1 the
key patient. Every mean runs over the global batch. Sources: Alice (arXiv 2302.05615) and the self-distillation of
DINO (arXiv 2104.14294) and iBOT (arXiv 2111.07832).
"""

import jax
import jax.numpy as jnp

STUDENT_TEMPERATURE = 0.1
CENTER_MOMENTUM = 0.9


def teacher_distribution(logits: jax.Array, center: jax.Array, temperature: jax.typing.ArrayLike) -> jax.Array:
    """Centred and sharpened teacher probabilities, without gradient (DINO, eq. 1 and 4).

    >>> [round(float(p), 3) for p in teacher_distribution(jnp.array([1.0, 1.0]), jnp.array([0.0, 1.0]), 1.0)]
    [0.731, 0.269]
    """
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    return jax.nn.softmax((logits - center) / temperature, axis=-1)


def weighted(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """`(batch, …)` values, each sample's times its weight `(batch,)`; the mean over the batch is left to the caller,
    so that it stays one over the number of samples, whatever they weigh."""
    return values if weights is None else values * weights.reshape(-1, *(1,) * (values.ndim - 1))


def cross_entropy(target: jax.Array, student_logits: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """H(target, softmax(student / τₛ)) over the last axis, averaged over all others; `weights` (batch,) of samples.

    >>> round(float(cross_entropy(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 0.0]]))), 4)
    0.6931
    """
    log_probabilities = jax.nn.log_softmax(student_logits.astype(jnp.float32) / STUDENT_TEMPERATURE, axis=-1)
    return -weighted(jnp.sum(target * log_probabilities, axis=-1), weights).mean()


def invariance(target: jax.Array, student_logits: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Each patient's masked crop predicts the teacher's global feature of the *other* patient's crop.

    Args:
      target: `(batch, 2, prototypes)` teacher distribution.
      student_logits: `(batch, 2, prototypes)`.
      weights: `(batch,)` of the pairs.
    """
    return cross_entropy(target, student_logits[:, ::-1], weights)


def alignment(target: jax.Array, student_logits: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Local tokens of a masked crop predict the teacher's tokens of the *same* crop.

    Args:
      target: `(batch, 2, tokens, prototypes)` teacher distribution.
      student_logits: `(batch, 2, tokens, prototypes)`.
      weights: `(batch,)` of the pairs.
    """
    return cross_entropy(target, student_logits, weights)


def reconstruction(
    prediction: jax.Array, volumes: jax.Array, hidden: jax.Array | None, weights: jax.Array | None = None
) -> jax.Array:
    """Mean squared error over the hidden voxels, or over all of them where `hidden` is None.

    Args:
      prediction: `(batch, depth, height, width, 1)`.
      volumes: the unmasked crops, of the same shape.
      hidden: `(batch, grid_d, grid_h, grid_w)` True where the student did not see; every grid cell stands for a
        block of voxels, and every crop hides the same number of cells.
      weights: `(batch,)` of the crops.
    """
    error = weighted(jnp.square(prediction.astype(jnp.float32) - volumes), weights)
    if hidden is None:
        return error.mean()
    batch, *grid = hidden.shape
    block = [size // cells for size, cells in zip(volumes.shape[1:4], grid, strict=True)]
    blocks = error.reshape(batch, grid[0], block[0], grid[1], block[1], grid[2], block[2])
    return jnp.mean(blocks.mean((2, 4, 6)), where=hidden)


def moved_center(center: jax.Array, mean_logits: jax.Array) -> jax.Array:
    """The center after a batch, an exponential moving average of the teacher's mean logits (DINO, eq. 4)."""
    return CENTER_MOMENTUM * center + (1 - CENTER_MOMENTUM) * mean_logits


def entropy(distribution: jax.Array) -> jax.Array:
    """Mean entropy in nats of distributions on the last axis: 0 is one-hot, log(prototypes) is uniform.

    >>> round(float(entropy(jnp.full((3, 512), 1 / 512))), 4)  # log(512)
    6.2383
    """
    return -jnp.sum(jax.scipy.special.xlogy(distribution, distribution), axis=-1).mean()
