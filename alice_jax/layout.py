"""Which parameters are divided over the devices, and with them all that belongs to them: ordered rules by name."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alice_jax.errors import UserError
from alice_jax.optimizer import by_rules, parameter_name

Tree = Any
Rule = int | Sequence[str | None]
Rules = Sequence[tuple[str, Rule]]

DATA, PARAMETERS = "data", "parameters"  # the axes of a mesh
RULES: Rules = (("", 65_536),)


def shardings(tree: Tree, params: Tree, mesh: Mesh, rules: Rules = RULES) -> Tree:
    """Where each array of a tree lies: like the parameter of its shape whose name ends its own, such as one of the
    teacher or a moment of the optimizer; on every device if there is none.

    Args:
      tree, params: arrays or their shapes.
      rules: (regex, rule) for the names of parameters; the first regex found in a name counts. A rule is the mesh's
        axis or None for each axis of the tensor, or a number N: tensors of N values or more are divided over
        "parameters" along the largest axis that can be.
    """
    like = {
        parameter_name(path): (x.shape, spec(parameter_name(path), x.shape, rules[index], mesh))
        for (path, index), x in zip(_matched(params, rules), jax.tree.leaves(params), strict=True)
    }

    def place(path: tuple[Any, ...], x: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, divided = like.get(parameter_name(path[start:]), (None, PartitionSpec()))
            if shape == x.shape:
                return NamedSharding(mesh, divided)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def _matched(params: Tree, rules: Rules) -> list[tuple[Any, int]]:
    """(path, number of its rule) of each parameter."""
    try:
        matched = by_rules(params, [(pattern, index) for index, (pattern, _) in enumerate(rules)])
    except (ValueError, re.error) as error:
        raise UserError(f"mesh.rules: {error}; the last rule may be ('', ()), which leaves the others whole") from None
    found = jax.tree_util.tree_leaves_with_path(matched)
    for index in set(range(len(rules))) - {number for _, number in found}:
        raise UserError(
            f"mesh.rules {rules[index][0]!r}: is no parameter's first match; correct it, move it up or leave it out"
        )
    return found


def spec(name: str, shape: tuple[int, ...], rule: tuple[str, Rule], mesh: Mesh) -> PartitionSpec:
    """How a parameter that a rule matches is divided."""
    pattern, axes = rule
    if isinstance(axes, int):
        ways = mesh.shape[PARAMETERS]
        fitting = [size for size in shape if size % ways == 0]
        if ways == 1 or not fitting or math.prod(shape) < axes:
            return PartitionSpec()
        return PartitionSpec(*(None,) * shape.index(max(fitting)), PARAMETERS)
    where = f"mesh.rules {pattern!r}, {axes!r}"
    named = [axis for axis in axes if axis is not None]
    if isinstance(axes, str) or not set(named) <= set(mesh.axis_names) or len(set(named)) < len(named):
        raise UserError(f"{where}: give a number, or for each axis None, {DATA!r} or {PARAMETERS!r}, none twice")
    if len(axes) > len(shape):
        raise UserError(f"{where}: has more axes than {name} of shape {shape}")
    for size, axis in zip(shape, axes, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(f"{where}: {size} of {name}, shape {shape}, is no multiple of {mesh.shape[axis]} devices")
    return PartitionSpec(*axes)


def summary(params: Tree, mesh: Mesh, rules: Rules = RULES) -> str:
    """One line for the log: what is divided, by which rule.

    >>> params = {"kernel": jax.ShapeDtypeStruct((4, 2), float), "bias": jax.ShapeDtypeStruct((2,), float)}
    >>> summary(params, jax.sharding.AbstractMesh((1, 2), (DATA, PARAMETERS)), [("bias", ()), ("", 8)])
    "parameters divided by 2: 80 % of 10 values, by rule 'bias': 0 of 1, '': 1 of 1"
    """
    matched, divided = Counter[str](), Counter[str]()
    values = total = 0
    places = jax.tree.leaves(shardings(params, params, mesh, rules))
    for (_, index), x, place in zip(_matched(params, rules), jax.tree.leaves(params), places, strict=True):
        pattern, size = rules[index][0], math.prod(x.shape)
        matched[pattern] += 1
        divided[pattern] += not place.is_fully_replicated
        total += size
        values += size * (not place.is_fully_replicated)
    by_rule = ", ".join(f"{pattern!r}: {divided[pattern]} of {count}" for pattern, count in matched.items())
    share = f"{values / total:.0%}".replace("%", " %")
    return f"parameters divided by {mesh.shape[PARAMETERS]}: {share} of {total:,} values, by rule {by_rule}"
