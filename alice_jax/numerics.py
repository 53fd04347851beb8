"""Numbers that are not finite: an update that has one is left out, inside the step."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
GUARDED = ("loss", "gradient_norm", "state_norm")  # metrics of a step; an infinite or missing number shows in one


def finite_or(old: Tree, new: Tree, metrics: Mapping[str, jax.Array]) -> Tree:
    """`new` where all guarded metrics are finite, otherwise `old`, bit for bit; traced within the step.

    >>> metrics = {"loss": jnp.array(1.0), "gradient_norm": jnp.inf, "state_norm": jnp.array(2.0)}
    >>> float(finite_or(jnp.array(3.0), jnp.array(4.0), metrics))
    3.0
    """
    finite = jnp.isfinite(jnp.stack([metrics[name] for name in GUARDED])).all()
    return jax.tree.map(lambda o, n: jnp.where(finite, n, o), old, new)


def not_finite(metrics: Mapping[str, float]) -> list[str]:
    """Which guarded metrics are not finite.

    >>> not_finite({"loss": math.nan, "gradient_norm": math.inf, "state_norm": 2.0})
    ['loss', 'gradient_norm']
    """
    return [name for name in GUARDED if not math.isfinite(metrics[name])]
