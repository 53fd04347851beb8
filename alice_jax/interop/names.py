"""Tables that pair PyTorch tensor names with paths in our parameter trees, read in both directions.

A rule is two templates and a layout, for example

    Rule("layers.{i}.fc.weight", "layer_{i}/fc/kernel", "linear")

where `{i}` stands for the same number on both sides. Rules are tried in order; a name that no rule knows is an error.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alice_jax.errors import UserError

Tree = dict[str, Any]
State = dict[str, np.ndarray]

# layout: (from PyTorch's axes to ours, from ours to PyTorch's)
LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "same": (np.asarray, np.asarray),
    "linear": (np.transpose, np.transpose),  # (out, in) <-> (in, out)
    "conv": (lambda w: w.transpose(2, 3, 4, 1, 0), lambda w: w.transpose(4, 3, 0, 1, 2)),  # (out, in, d, h, w)
    "point": (lambda w: w[:, :, 0, 0, 0].T, lambda w: w.T[:, :, None, None, None]),  # (out, in, 1, 1, 1) <-> (in, out)
    "expand": (lambda w: w.transpose(0, 2, 3, 4, 1), lambda w: w.transpose(0, 4, 1, 2, 3)),  # (in, out, d, h, w)
    "column": (lambda w: w[:, 0], lambda w: w[:, None]),  # (n, 1) <-> (n,)
    "token": (lambda w: w[0, 0], lambda w: w[None, None]),  # (1, 1, n) <-> (n,)
    "table": (lambda w: w[0], lambda w: w[None]),  # (1, n, c) <-> (n, c)
}


class Rule(NamedTuple):
    torch: str
    flax: str
    layout: str


def linear(torch: str, flax: str, bias: bool = True) -> list[Rule]:
    """The rules of a linear layer."""
    rules = [Rule(f"{torch}.weight", f"{flax}/kernel", "linear")]
    return rules + ([Rule(f"{torch}.bias", f"{flax}/bias", "same")] if bias else [])


def norm(torch: str, flax: str) -> list[Rule]:
    """The rules of a LayerNorm or an instance norm."""
    return [Rule(f"{torch}.weight", f"{flax}/scale", "same"), Rule(f"{torch}.bias", f"{flax}/bias", "same")]


def convolution(torch: str, flax: str, layout: str = "conv") -> list[Rule]:
    """The rules of a 3-D convolution, or with layout "expand" of a transposed one."""
    return [Rule(f"{torch}.weight", f"{flax}/kernel", layout), Rule(f"{torch}.bias", f"{flax}/bias", "same")]


def _translate(name: str, source: str, target: str) -> str | None:
    """`name` rewritten from template `source` to template `target`, or None where it does not fit."""
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(source))
    match = re.fullmatch(pattern, name)
    return target.format(**match.groupdict()) if match else None


def from_torch(rules: Sequence[Rule], state: Mapping[str, np.ndarray], what: str = "weights") -> Tree:
    """A PyTorch state dict as our nested parameter tree."""
    tree: Tree = {}
    for name, value in state.items():
        for rule in rules:
            path = _translate(name, rule.torch, rule.flax)
            if path:
                *parents, leaf = path.split("/")
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[leaf] = np.ascontiguousarray(LAYOUTS[rule.layout][0](np.asarray(value)))
                break
        else:
            raise UserError(f"tensor {name!r}: the {what} have no such name; give a state dict of this network")
    return tree


def to_torch(rules: Sequence[Rule], tree: Mapping[str, Any], what: str = "weights") -> State:
    """Our parameter tree as a PyTorch state dict, in the tree's order."""
    state: State = {}
    for path, value in leaves(tree):
        for rule in rules:
            name = _translate(path, rule.flax, rule.torch)
            if name:
                state[name] = np.ascontiguousarray(LAYOUTS[rule.layout][1](np.asarray(value)))
                break
        else:
            raise UserError(f"parameter {path!r}: the {what} have no such path; export parameters of this network")
    return state


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The (path, value) pairs of a nested tree; paths are joined by slashes."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def in_order(state: Mapping[str, np.ndarray], order: str) -> State:
    """The state dict sorted part by part: numbers by value, words by their place in `order`."""
    words = order.split()

    def key(name: str) -> list[int]:
        return [int(part) if part.isdigit() else words.index(part) for part in name.split(".")]

    return {name: state[name] for name in sorted(state, key=key)}
