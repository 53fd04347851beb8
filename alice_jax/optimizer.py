"""Gradients to updates. Every per-parameter decision is an ordered list of (regex, value) rules."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any
Rules = Sequence[tuple[str, Any]]
UNDECAYED = r"/(bias|scale|gain[12]|table|mask_token)$"  # but relative-position tables and prototypes are decayed
DECAY_RULES = [(UNDECAYED, "plain"), ("", "decayed")]  # groups of `grouped_adamw`


def parameter_name(path: tuple[Any, ...]) -> str:
    """`backbone/encoder_0/…/kernel` for a path of `jax.tree_util`."""
    return "/".join(str(getattr(key, "key", key)) for key in path)


def by_rules(params: Tree, rules: Rules) -> Tree:
    """The value of the first rule whose regex is found in each parameter's name; all parameters must be covered.

    >>> by_rules({"a": {"bias": 0, "kernel": 0}}, [("bias$", "plain"), ("", "decayed")])
    {'a': {'bias': 'plain', 'kernel': 'decayed'}}
    """

    def value(path, _):
        name = parameter_name(path)
        for pattern, result in rules:
            if re.search(pattern, name):
                return result
        raise ValueError(f"no rule covers the parameter {name}")

    return jax.tree_util.tree_map_with_path(value, params)


def clip_each_tensor(limit: float) -> optax.GradientTransformation:
    """Scales each tensor whose own norm exceeds `limit` down to it: the release's clipping (paper: global norm)."""

    def clip(gradient):
        norm = jnp.linalg.norm(gradient.astype(jnp.float32))
        return gradient * jnp.minimum(limit / (norm + 1e-6), 1.0)

    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates))


def adamw(learning_rate: optax.Schedule, weight_decay: optax.Schedule | float) -> optax.GradientTransformation:
    """AdamW with decoupled decay (β 0.9 and 0.999, ε 1e-8); both rates may be schedules."""
    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def held(make_inner, steps: int) -> optax.GradientTransformation:
    """Leaves its parameters and its own state untouched for the first `steps` updates.

    Adam's bias correction then starts from the first real update, as when a gradient is absent.

    Args:
      make_inner: builds the inner transformation from an offset that its schedules must add to their count.
    """
    return optax.conditionally_mask(make_inner(steps), lambda count: count >= steps)


def grouped_adamw(
    *,
    learning_rate: optax.Schedule,
    weight_decay: optax.Schedule,
    group_rules: Rules,
    clip: optax.GradientTransformation,
    held_steps: int = 0,
    rate_rules: Rules = (("", 1.0),),
) -> optax.GradientTransformation:
    """Clipping, then AdamW by parameter group.

    Args:
      group_rules: (regex, group) with the groups "decayed", "plain" (no decay), "held" and "held plain" (as the former,
        but frozen for the first `held_steps` updates) and "frozen".
      rate_rules: (regex, factor on the learning rate).
    """

    def decayed(offset: int) -> optax.GradientTransformation:
        return adamw(lambda count: learning_rate(count + offset), lambda count: weight_decay(count + offset))

    def plain(offset: int) -> optax.GradientTransformation:
        return adamw(lambda count: learning_rate(count + offset), 0.0)

    groups = {
        "decayed": decayed(0),
        "plain": plain(0),
        "held": held(decayed, held_steps),
        "held plain": held(plain, held_steps),
        "frozen": optax.set_to_zero(),
    }
    adam = optax.partition(groups, lambda params: by_rules(params, group_rules))
    return optax.chain(clip, adam, scale_by_rules(rate_rules))


def scale_by_rules(rules: Rules) -> optax.GradientTransformation:
    """Multiplies each parameter's update by the factor of its rule."""

    def scale(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda update, factor: update * factor, updates, by_rules(updates, rules))

    return optax.stateless(scale)
