"""Segmentation: Dice and cross-entropy on the logits of every decoder stage, as nnU-Net trains (arXiv 1809.10486)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alice_jax.objectives import Batch, Objective, started

Tree = Any
SMOOTH = 1e-5  # of the Dice, against a division by zero


@dataclasses.dataclass(frozen=True)
class Weights:
    """Of the two terms; `batch_dice` counts a class over all crops computed at once and not in each."""

    dice: float = 1.0
    cross_entropy: float = 1.0
    batch_dice: bool = False


def class_shares(labels: jax.Array, classes: int, grid: Sequence[int]) -> jax.Array:
    """The share of each class in every cell of a grid: (b, d, h, w) whole numbers -> (b, *grid, classes) float32.

    For a coarser decoder stage that is the target which shifts no border; picking a voxel of each cell would.

    >>> class_shares(jnp.array([[[[0, 1]]]]), 2, (1, 1, 1)).tolist()
    [[[[[0.5, 0.5]]]]]
    """
    one_hot = jax.nn.one_hot(labels, classes)
    block = [size // cells for size, cells in zip(labels.shape[1:], grid, strict=True)]
    sides = [n for cells, size in zip(grid, block, strict=True) for n in (cells, size)]
    return one_hot.reshape(len(labels), *sides, classes).mean(axis=(2, 4, 6))


def soft_dice(probabilities: jax.Array, target: jax.Array, batch: bool = False) -> jax.Array:
    """Mean Dice of the classes, without the background, that each crop shows, or all crops together; 1 where none does.

    Both (b, d, h, w, classes). nnU-Net lets absent classes count as well: of 13 organs in small crops these are most,
    and a network learns to predict none. That they are not predicted is left to the cross-entropy.

    >>> one = jnp.array([[[[[0.0, 1.0]]]]])
    >>> float(soft_dice(one, one)), round(float(soft_dice(1 - one, one)), 4)
    (1.0, 0.0)
    """
    axes = (0, 1, 2, 3) if batch else (1, 2, 3)
    common = jnp.sum(probabilities * target, axis=axes)[..., 1:]
    true = jnp.sum(target, axis=axes)[..., 1:]
    sizes = jnp.sum(probabilities, axis=axes)[..., 1:] + true
    dice, shown = (2 * common + SMOOTH) / (sizes + SMOOTH), true > 0
    mean = jnp.sum(dice, axis=-1, where=shown) / jnp.maximum(jnp.sum(shown, axis=-1), 1)
    return jnp.mean(jnp.where(shown.any(axis=-1), mean, 1.0))


def level_weights(levels: int) -> np.ndarray:
    """1, 1/2, 1/4 … divided by their sum. nnU-Net leaves out the coarsest; here it counts as the others.

    >>> level_weights(2).round(3).tolist()
    [0.667, 0.333]
    """
    weights = 0.5 ** np.arange(levels)
    return weights / weights.sum()


def losses(logits: Sequence[jax.Array], labels: jax.Array, weights: Weights) -> dict[str, jax.Array]:
    """Both terms, averaged over the levels; `logits` (b, *grid, classes) finest first, `labels` (b, d, h, w)."""
    total = {"loss_dice": jnp.zeros(()), "loss_cross_entropy": jnp.zeros(())}
    for level, share in zip(logits, level_weights(len(logits)), strict=True):
        target = class_shares(labels, level.shape[-1], level.shape[1:4])
        log_probabilities = jax.nn.log_softmax(level)
        dice = soft_dice(jnp.exp(log_probabilities), target, weights.batch_dice)
        total["loss_dice"] += share * (1 - dice)
        total["loss_cross_entropy"] -= share * jnp.sum(target * log_probabilities, axis=-1).mean()
    return total


def overlap(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Voxels that are right, predicted and true of each class: (1, classes, 3) float32."""
    classes = jnp.arange(logits.shape[-1])
    predicted = jnp.argmax(logits, axis=-1)[..., None] == classes
    true = labels[..., None] == classes
    counts = [jnp.sum(x, axis=(0, 1, 2, 3)) for x in (predicted & true, predicted, true)]
    return jnp.stack(counts, axis=-1)[None].astype(jnp.float32)


def dice_by_class(counts: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Dice of each class that the held-out crops show, over all of them, and the mean of these.

    Args:
      counts: (batches, classes, 3) from `overlap`.

    >>> dice_by_class(np.array([[[9, 9, 9], [1, 2, 2], [0, 0, 0]]]), ("background", "liver", "spleen"))
    {'dice_liver': 0.5, 'dice': 0.5}
    """
    dice = {
        f"dice_{name}": float(2 * right / (predicted + true))
        for name, (right, predicted, true) in zip(classes, counts.sum(axis=0, dtype=np.float64), strict=True)
        if true and name != classes[0]
    }
    return dice | ({"dice": sum(dice.values()) / len(dice)} if dice else {})


def make(
    network: Any,
    classes: Sequence[str],
    weights: Weights,
    *,
    optimizer: optax.GradientTransformation,
    schedules: dict[str, Callable[[Any], Any]],
    start: Mapping[str, np.ndarray] | None = None,
) -> Objective:
    """The objective for batches of `data.segmentation_views.SegmentationSampler`; parameters are {"backbone"}.

    Args:
      network: has `segment`, with as many `out_channels` as there are classes.
      classes: names, background first.
      start: values by the name of the parameter, in place of random ones.
    """

    def init(key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        params = {"backbone": network.init(key, batch["volume"][:1], method="segment")["params"]}
        return started(params, start or {}), {}

    def loss(params: Tree, extra: Tree, batch: Batch, key: jax.Array, step: jax.Array, train: bool):
        weights_of = {"params": params["backbone"]}
        logits: Any = network.apply(
            weights_of, batch["volume"], train=train, method="segment", rngs={"drop_path": key, "dropout": key}
        )
        terms = losses(logits, batch["labels"], weights)
        total = weights.dice * terms["loss_dice"] + weights.cross_entropy * terms["loss_cross_entropy"]
        return total, ({}, terms)

    def predict(params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        logits: Any = network.apply({"params": params["backbone"]}, batch["volume"], method="segment")
        return {"overlap": overlap(logits[0], batch["labels"])}

    return Objective(
        init=init,
        loss=loss,
        update=lambda params, extra, stats, step: extra,
        optimizer=optimizer,
        schedules=schedules,
        predict=predict,
        judge=lambda predictions: dice_by_class(predictions["overlap"], classes),
    )
