"""Scalars that change over a run, as pure functions of the step; and durations as users write them.

Each schedule takes a Python or numpy number (and computes in float64) or a traced JAX scalar.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alice_jax.errors import UserError

Number = Any  # int, float, numpy or JAX array


def ramp(index: Number, start: float, end: float, length: int) -> Number:
    """Linear from `start` at index 0 to `end` at index `length - 1`, then constant.

    >>> [float(ramp(i, 0.04, 0.07, 3).round(3)) for i in range(5)]
    [0.04, 0.055, 0.07, 0.07, 0.07]
    """
    xp = jnp if isinstance(index, jax.Array) else np
    return start + (end - start) * xp.clip(index / max(length - 1, 1), 0.0, 1.0)


def warmup_cosine(index: Number, peak: float, end: float, total: int, warmup: int = 0, start: float = 0.0) -> Number:
    """Linear warm-up with both ends included, then half a cosine that `end` closes but never reaches.

    With both ends included, step 0 has the rate `start` and the peak is used twice, as in the release.

    >>> [float(warmup_cosine(i, 1.0, 0.0, total=4, warmup=2).round(2)) for i in range(4)]
    [0.0, 1.0, 1.0, 0.5]
    """
    xp = jnp if isinstance(index, jax.Array) else np
    phase = (index - warmup) / max(total - warmup, 1)
    cosine = end + 0.5 * (peak - end) * (1 + xp.cos(np.pi * xp.clip(phase, 0.0, 1.0)))
    rising = ramp(index, start, peak, warmup) if warmup > 1 else start
    return xp.where(index < warmup, rising, cosine)


_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(steps?|epochs?|%)\s*")


def duration(text: str, field: str, steps_per_epoch: int, total_steps: int) -> int:
    """Steps in a duration such as "500 steps", "30 epochs", "10 %", or the shortest of several: "50 epochs, 10 %".

    Args:
      text: what the user wrote.
      field: the configuration field, for the error message.
      steps_per_epoch: ⌈training scans / global batch⌉.
      total_steps: the length of the run.

    >>> duration("50 epochs, 10 %", "warmup", steps_per_epoch=3, total_steps=1000)
    100
    """
    unit_steps = {"step": 1.0, "epoch": float(steps_per_epoch), "%": total_steps / 100}
    lengths = []
    for part in str(text).split(","):
        match = _DURATION.fullmatch(part)
        if match is None:
            raise UserError(f'{field} {text!r}: write a duration as "500 steps", "30 epochs" or "10 %"')
        lengths.append(round(float(match[1]) * unit_steps[match[2].removesuffix("s")]))
    return min(lengths)
