"""The backbone's weights in the authors' PyTorch names and layouts, and back.

The authors' state dict holds more than our tree: `relative_position_index` buffers, which we compute, and the
parameters `final.1`, `final.2` and (unless tokens are masked) `model_down.mask_token`, which never influence an
output and are written as zeros.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from alice_jax.interop import names
from alice_jax.interop.names import Rule, State, Tree, convolution, linear, norm
from alice_jax.models.windows import relative_position_index


def _attention(torch: str, flax: str, projection: str) -> list[Rule]:
    return [
        Rule(f"{torch}.relative_position_bias_table", f"{flax}/position_bias", "same"),
        *linear(f"{torch}.{projection}", f"{flax}/{projection}"),
        *linear(f"{torch}.proj", f"{flax}/out"),
    ]


def _block(torch: str, flax: str) -> list[Rule]:
    return [
        *norm(f"{torch}.norm1", f"{flax}/norm1"),
        *_attention(f"{torch}.attn", f"{flax}/attention", "qkv"),
        *_attention(f"{torch}.attn", f"{flax}/attention", "kv"),
        *norm(f"{torch}.norm2", f"{flax}/norm2"),
        *linear(f"{torch}.mlp.fc1", f"{flax}/mlp/fc1"),
        *linear(f"{torch}.mlp.fc2", f"{flax}/mlp/fc2"),
    ]


RULES: list[Rule] = [
    Rule("model_down.mask_token", "mask_token", "token"),
    *norm("model_down.patch_embed.norm", "patch_embed/norm2_2"),
    *convolution("model_down.patch_embed.proj{i}.conv{j}", "patch_embed/conv{i}_{j}"),
    *norm("model_down.patch_embed.proj{i}.norm{j}", "patch_embed/norm{i}_{j}"),
    *_block("model_down.layers.{i}.blocks.{j}", "encoder_{i}/block{j}"),
    *convolution("model_down.layers.{i}.downsample.reduction", "downsample_{i}/conv"),
    *norm("model_down.layers.{i}.downsample.norm", "downsample_{i}/norm"),
    *norm("model_down.norm{i}", "skip_norm_{i}"),
    *_block("decoder.layers.{i}.blocks.{j}", "decoder_{i}/block{j}"),
    *norm("decoder.layers.{i}.Upsample.norm", "decoder_{i}/upsample/norm"),
    *convolution("decoder.layers.{i}.Upsample.up", "decoder_{i}/upsample/expand", "expand"),
    *convolution("final.0.up", "expand", "expand"),
]

# where each part of a name stands in the authors' state dict
ORDER = (
    "model_down decoder final mask_token patch_embed proj1 proj2 conv1 conv2 layers blocks norm0 norm1 attn "
    "relative_position_bias_table relative_position_index qkv kv proj norm2 norm3 mlp fc1 fc2 "
    "downsample Upsample reduction norm up weight bias"
)

# in the authors' state dict only: buffers that we compute, and parameters that never influence an output
BUFFER = re.compile(r".*\.relative_position_index")
UNUSED = re.compile(r"final\.[1-9]\d*\.up\.(weight|bias)")


def from_torch(state: Mapping[str, np.ndarray], mask_token: bool) -> Tree:
    """The authors' state dict as the parameters of `NNFormer(mask_tokens=mask_token)`.

    Which position index the weights were trained with says `position_index`.
    """
    used = {name: value for name, value in state.items() if not (BUFFER.fullmatch(name) or UNUSED.fullmatch(name))}
    if not mask_token:
        used.pop("model_down.mask_token", None)
    return names.from_torch(RULES, used, "nnFormer weights")


def position_index(state: Mapping[str, np.ndarray]) -> str:
    """Which position index a state dict's buffers hold: "correct" or "release"."""
    for name, index in state.items():
        if BUFFER.fullmatch(name):
            for kind in ("correct", "release"):
                if np.array_equal(index, relative_position_index(round(len(index) ** (1 / 3)), kind)):
                    return kind
    raise ValueError("relative_position_index: no buffer, or one of neither kind; name the position index yourself")


def to_torch(params: Mapping[str, Any], position_index: str) -> State:
    """All tensors of the authors' state dict, in their order.

    position_index: "correct" or "release", as the model was run. The buffers hold it, so that code which gathers
    through them computes what we compute.
    """
    state = names.to_torch(RULES, params, "nnFormer weights")
    for name, table in list(state.items()):
        if name.endswith(".relative_position_bias_table"):
            window = (round(len(table) ** (1 / 3)) + 1) // 2
            state[name.replace("bias_table", "index")] = relative_position_index(window, position_index)
    final = state["final.0.up.weight"]
    for i in range(1, len({name for name in state if re.fullmatch(r"decoder\.layers\.\d+\.Upsample\.up\.bias", name)})):
        state[f"final.{i}.up.weight"] = np.zeros((final.shape[0] * 2**i, *final.shape[1:]), final.dtype)
        state[f"final.{i}.up.bias"] = np.zeros_like(state["final.0.up.bias"])
    if "model_down.mask_token" not in state:
        state["model_down.mask_token"] = np.zeros((1, 1, final.shape[0]), final.dtype)
    return names.in_order(state, ORDER)
