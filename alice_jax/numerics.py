"""Numbers that are not finite: kept out of the state inside the step, and traced to the layer that they come from."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alice_jax.optimizer import parameter_name

Tree = Any
GUARDED = ("loss", "gradient_norm", "state_norm")  # metrics of a step; any NaN or infinity shows in one


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


# ---------------------------------------------------------------- where they come from

_LAYER = "layer/"


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a Flax module returned: its largest finite number by magnitude, and how many are not finite."""

    name: str
    largest: float
    not_finite: int


def with_layers(loss: Callable[..., Any]) -> Callable[..., Any]:
    """An objective's `loss` whose metrics also tell of each array that a Flax module returns, for `layers_of`."""

    def watched(*arguments: Any) -> Any:
        layers: dict[str, jax.Array] = {}

        def note(call, args, kwargs, context):
            result = call(*args, **kwargs)
            for array in jax.tree.leaves(result):
                size = jnp.abs(jax.lax.stop_gradient(jnp.asarray(array, jnp.float32)))
                finite = jnp.isfinite(size)
                largest = jnp.max(size, where=finite, initial=0)
                path = "/".join((_network(context.module), *context.module.path))
                name = f"{_LAYER}{len(layers):04} {path}.{context.method_name}"
                layers[name] = jnp.stack([largest, jnp.sum(~finite)])
            return result

        with nn.intercept_methods(note):
            value, (stats, metrics) = loss(*arguments)
        return value, (stats, metrics | layers)

    return watched


def _network(module: nn.Module) -> str:
    """The class of the outermost module around one."""
    while isinstance(module.parent, nn.Module):
        module = module.parent
    return type(module).__name__


def layers_of(metrics: Mapping[str, np.ndarray]) -> list[Layer]:
    """What `with_layers` noted, in the order of computation."""
    noted = sorted((name, values) for name, values in metrics.items() if name.startswith(_LAYER))
    return [Layer(name.removeprefix(_LAYER), float(values[0]), int(values[1])) for name, values in noted]


def norm_by_layer(gradients: Tree) -> dict[str, float]:
    """The norm of the gradient of each module's own parameters.

    >>> norm_by_layer({"head": {"kernel": np.array([3.0]), "bias": np.array([4.0])}})
    {'head': 5.0}
    """
    squares: dict[str, float] = defaultdict(float)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        squares[parameter_name(path[:-1])] += float(np.sum(np.square(gradient, dtype=np.float64)))
    return {name: math.sqrt(square) for name, square in squares.items()}
