"""Primus's weights in the names and layouts of nnU-Net's `Primus` as its trainers make it, and back.

Their mask token is a buffer that only dropping patches uses; where we have learned none it is written as zeros. Heads
for deep supervision, which it has not, are left out.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from alice_jax.interop import names
from alice_jax.interop.names import Rule, State, Tree, convolution, linear, norm

_BLOCK, _OUR_BLOCK = "eva.blocks.{i}", "block_{i}"
_ATTENTION, _OUR_ATTENTION = f"{_BLOCK}.attn", f"{_OUR_BLOCK}/attention"

RULES: list[Rule] = [
    Rule("mask_token", "mask_token", "token"),
    *convolution("down_projection.proj", "tokens"),
    *convolution("up_projection.decode.{i}.0", "up_{i}/expand", "expand"),
    *norm("up_projection.decode.{i}.1", "up_{i}/norm"),
    *convolution("up_projection.decode.2", "expand", "expand"),
    Rule("eva.pos_embed", "position/table", "table"),
    Rule(f"{_BLOCK}.gamma_{{j}}", f"{_OUR_BLOCK}/gain{{j}}", "same"),
    *norm(f"{_BLOCK}.norm1", f"{_OUR_BLOCK}/norm1"),
    *linear(f"{_ATTENTION}.q_proj", f"{_OUR_ATTENTION}/query"),
    *linear(f"{_ATTENTION}.k_proj", f"{_OUR_ATTENTION}/key", bias=False),
    *linear(f"{_ATTENTION}.v_proj", f"{_OUR_ATTENTION}/value"),
    *norm(f"{_ATTENTION}.norm", f"{_OUR_ATTENTION}/norm"),
    *linear(f"{_ATTENTION}.proj", f"{_OUR_ATTENTION}/out"),
    *norm(f"{_BLOCK}.norm2", f"{_OUR_BLOCK}/norm2"),
    *linear(f"{_BLOCK}.mlp.fc1_g", f"{_OUR_BLOCK}/mlp/gate"),
    *linear(f"{_BLOCK}.mlp.fc1_x", f"{_OUR_BLOCK}/mlp/fc1"),
    *norm(f"{_BLOCK}.mlp.norm", f"{_OUR_BLOCK}/mlp/norm"),
    *linear(f"{_BLOCK}.mlp.fc2", f"{_OUR_BLOCK}/mlp/fc2"),
    *norm("eva.norm", "norm"),
]

ORDER = (
    "mask_token down_projection up_projection decode eva pos_embed blocks gamma_1 gamma_2 norm1 attn q_proj k_proj "
    "v_proj norm2 mlp fc1_g fc1_x norm fc2 proj weight bias"
)


def from_torch(state: Mapping[str, np.ndarray], mask_token: bool) -> Tree:
    """nnU-Net's state dict as the parameters of `Primus(mask_tokens=mask_token)`."""
    used = {name: value for name, value in state.items() if mask_token or name != "mask_token"}
    return names.from_torch(RULES, used, "Primus weights")


def to_torch(params: Mapping[str, Any]) -> State:
    """All tensors of nnU-Net's state dict, in its order."""
    kept = {name: tree for name, tree in params.items() if not name.startswith("level_head_")}
    state = names.to_torch(RULES, kept, "Primus weights")
    state.setdefault("mask_token", np.zeros((1, 1, state["eva.pos_embed"].shape[-1]), np.float32))
    return names.in_order(state, ORDER)
