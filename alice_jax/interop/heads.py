"""The projection head's weights in the authors' PyTorch names and layouts, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from alice_jax.interop import names
from alice_jax.interop.names import Rule, State, Tree, linear

RULES: list[Rule] = [
    *linear("mlp.0", "mlp1"),
    *linear("mlp.2", "mlp2"),
    *linear("mlp.4", "mlp3"),
    Rule("last_layer.weight_g", "last/gain", "column"),
    Rule("last_layer.weight_v", "last/direction", "linear"),
    Rule("last_layer2.weight_g", "last_tokens/gain", "column"),
    Rule("last_layer2.weight_v", "last_tokens/direction", "linear"),
    *linear("mlp3", "encoder_projection"),
    *linear("mlp4", "decoder_projection"),
]

ORDER = "mlp 0 2 4 last_layer last_layer2 mlp3 mlp4 weight_g weight_v weight bias"


def from_torch(state: Mapping[str, np.ndarray], separate_last: bool) -> Tree:
    """The authors' state dict as the parameters of `Head(separate_last=…)`.

    A head with one last layer lists it under both names; the second is dropped.
    """
    used = {name: value for name, value in state.items() if separate_last or not name.startswith("last_layer2.")}
    return names.from_torch(RULES, used, "head weights")


def to_torch(params: Mapping[str, Any]) -> State:
    """All tensors of the authors' state dict, in their order; one shared last layer appears under both names."""
    state = names.to_torch(RULES, params, "head weights")
    for part in ("weight_g", "weight_v"):
        state.setdefault(f"last_layer2.{part}", state[f"last_layer.{part}"])
    return names.in_order(state, ORDER)
