"""CASA's weights in the authors' PyTorch names and layouts, and back.

Their four projections around the attention are never used, so we have none and write zeros.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from alice_jax.interop import names
from alice_jax.interop.names import Rule, State, Tree, linear, norm

_ATTENTION, _FEED_FORWARD = "Cross_Att.MH_attn", "Cross_Att.pos_ffn"

RULES: list[Rule] = [
    *linear(f"{_ATTENTION}.w_qs", "query", bias=False),
    *linear(f"{_ATTENTION}.w_ks", "key", bias=False),
    *linear(f"{_ATTENTION}.w_vs", "value", bias=False),
    *linear(f"{_ATTENTION}.fc", "out", bias=False),
    *norm(f"{_ATTENTION}.layer_norm", "norm1"),
    *linear(f"{_FEED_FORWARD}.w_1", "fc1"),
    *linear(f"{_FEED_FORWARD}.w_2", "fc2"),
    *norm(f"{_FEED_FORWARD}.layer_norm", "norm2"),
]

# never used in the authors' code: before (2048 channels at the published size) and after the attention
UNUSED_IN = ("projection_student", "projection_teacher")
UNUSED_OUT = ("projection_student_out", "projection_teacher_out")

ORDER = (
    f"{' '.join(UNUSED_IN)} Cross_Att {' '.join(UNUSED_OUT)} MH_attn pos_ffn "
    "w_qs w_ks w_vs fc w_1 w_2 layer_norm weight bias"
)


def from_torch(state: Mapping[str, np.ndarray]) -> Tree:
    """The authors' state dict as the parameters of `CASA`."""
    used = {name: value for name, value in state.items() if name.split(".")[0] not in UNUSED_IN + UNUSED_OUT}
    return names.from_torch(RULES, used, "CASA weights")


def to_torch(params: Mapping[str, Any]) -> State:
    """All tensors of the authors' state dict, in their order."""
    state = names.to_torch(RULES, params, "CASA weights")
    inner, width = state[f"{_FEED_FORWARD}.w_1.weight"].shape
    for name in UNUSED_IN + UNUSED_OUT:
        size = inner if name in UNUSED_IN else width
        state[f"{name}.weight"] = np.zeros((size, size), np.float32)
        state[f"{name}.bias"] = np.zeros(size, np.float32)
    return names.in_order(state, ORDER)
