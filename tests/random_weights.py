"""Weights for tests: no bias is zero and no scale is one, since such values would hide mistakes."""

from typing import Any

import jax
import numpy as np


def random_weights(shapes: Any, seed: int = 0) -> Any:
    """A tree of float32 arrays in the shapes of `jax.eval_shape`'s result, without compiling an initialiser."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        around = 1.0 if str(path[-1].key) in ("scale", "gain") else 0.0
        return (around + 0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)
