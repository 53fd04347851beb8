"""What every task is made of."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alice_jax import schedules
from alice_jax.contract import Contract
from alice_jax.data.pipeline import Sampler
from alice_jax.data.store import Store
from alice_jax.errors import UserError, check_at_least
from alice_jax.objectives import Objective


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run optimises and on what.

    Attributes:
      objective: the device side.
      sampler: the host side, over `scans`.
      scans: the training scans.
      validation_sampler, validation_scans: the same over the scans held out.
      contract: how the scans were prepared, for whoever uses the weights.
      volumes_per_sample: crops that a sample carries, for the throughput.
      notes: lines for the user.
    """

    objective: Objective
    sampler: Sampler
    scans: tuple[str, ...]
    validation_sampler: Sampler
    validation_scans: tuple[str, ...]
    contract: Contract
    volumes_per_sample: int = 2
    notes: tuple[str, ...] = ()


def contract_of(
    store: Store, window_hu: Sequence[float], crop_shape_zyx: Sequence[int], classes: Sequence[str] = ()
) -> Contract:
    """What a network learns from crops of a store."""
    low, high = window_hu
    z, y, x = crop_shape_zyx
    sz, sy, sx = store.manifest["spacing_zyx_mm"]
    return Contract(store.manifest["frame"], (sz, sy, sx), (low, high), (z, y, x), tuple(classes))


def split(
    scans: Sequence[str], fraction: float, at_least: int, patients: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and validation scans: at least `at_least` on either side, or none held out.

    Those held out are evenly spaced over the sorted ids.

    Args:
      patients: of the scans; those of one patient stay together, and patients are what is counted.

    >>> split(["a", "b", "c", "d"], 0.25, at_least=1)
    (('b', 'c', 'd'), ('a',))
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.validation_fraction {fraction}: give a share of the scans from 0 to below 1")
    patient_of = {scan: patients.get(scan, scan) if patients else scan for scan in scans}
    names = list(dict.fromkeys(patient_of.values()))
    count = min(max(at_least, round(fraction * len(names))), len(names) - at_least) if fraction else 0
    if count < at_least:
        count = 0
    held_out = {names[i * len(names) // count] for i in range(count)}
    return tuple(s for s in scans if patient_of[s] not in held_out), tuple(
        s for s in scans if patient_of[s] in held_out
    )


def listed(text: str) -> list[str]:
    """Names that are separated by commas.

    >>> listed("bright, large")
    ['bright', 'large']
    """
    return [name.strip() for name in text.split(",") if name.strip()]


def checked_crop(crop_shape_zyx: Sequence[int], stride_zyx: Sequence[int]) -> tuple[int, int, int]:
    """The shape of crops, of which a network with this token stride sees no part of a token."""
    crop = tuple(crop_shape_zyx)
    if len(crop) != 3 or any(size <= 0 or size % step for size, step in zip(crop, stride_zyx, strict=True)):
        raise UserError(f"views.crop_shape_zyx {crop}: give three multiples of {tuple(stride_zyx)}")
    return crop


def check_weights(loss: Mapping[str, float]) -> None:
    """Refuses a loss that no weight, or one below 0, would make meaningless."""
    if not any(loss.values()) or not all(weight >= 0 for weight in loss.values()):
        raise UserError(f"loss {dict(loss)}: the weights must be 0 or more, one of them above 0")


def check_recipe(config: ConfigDict) -> None:
    """Refuses numbers of the optimizer and of the held-out samples with which no task could be learnt or judged."""
    recipe, unclipped = config.optimizer, config.objective == "embedder"
    for name, zero in (("lr", False), ("min_lr", True), ("weight_decay", True), ("clip", unclipped)):
        least = np.min(recipe[name])  # the decay of pretraining goes from one number to another
        if not (least >= 0 if zero else least > 0):
            raise UserError(f"optimizer.{name} {recipe[name]}: give a number {'of 0 or more' if zero else 'above 0'}")
    check_at_least(0, "data.validation_samples", config.data.validation_samples)


def epoch_of(scans: Sequence[str], config: ConfigDict) -> int:
    """Steps in which each training scan is drawn about once."""
    return math.ceil(len(scans) / config.batch_size)


def learning_rate(config: ConfigDict, steps_per_epoch: int) -> Callable[[Any], Any]:
    """`config.optimizer`'s warm-up and cosine as a function of the step; the first update is no empty one."""
    recipe, total = config.optimizer, config.steps
    warmup = schedules.duration(recipe.warmup, "optimizer.warmup", steps_per_epoch, total)
    return lambda step: schedules.warmup_cosine(step + 1, recipe.lr, recipe.min_lr, total + 1, warmup)


def compute_dtype(precision: str) -> Any:
    """The dtype of matmuls and convolutions; parameters, normalisation, softmax and losses stay in float32."""
    if precision == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if precision not in ("float32", "bfloat16"):
        raise UserError(f"precision {precision!r}: choose auto, float32 or bfloat16")
    return jnp.dtype(precision)
