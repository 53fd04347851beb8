"""ResEnc's weights in the names and layouts of nnU-Net's `ResidualEncoderUNet`, and back.

Its state dict lists much under several names, since its modules hold each other: each convolution and norm also as part
of `all_modules`, and the whole encoder also as the decoder's. It has a segmentation head for every decoder stage, of
which only the finest matters without deep supervision; those that we have not are written as zeros. It has no mask
token.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from alice_jax.interop import names
from alice_jax.interop.names import Rule, State, Tree, convolution, norm


def _conv_norm(torch: str, flax: str) -> list[Rule]:
    return [*convolution(f"{torch}.conv", f"{flax}/conv"), *norm(f"{torch}.norm", f"{flax}/norm")]


_BLOCK, _OUR_BLOCK = "encoder.stages.{i}.blocks.{j}", "encoder_{i}/block{j}"

RULES: list[Rule] = [
    *_conv_norm("encoder.stem.convs.0", "stem"),
    *_conv_norm(f"{_BLOCK}.conv1", f"{_OUR_BLOCK}/conv1"),
    *_conv_norm(f"{_BLOCK}.conv2", f"{_OUR_BLOCK}/conv2"),
    Rule(f"{_BLOCK}.skip.1.conv.weight", f"{_OUR_BLOCK}/skip_conv/kernel", "point"),
    *norm(f"{_BLOCK}.skip.1.norm", f"{_OUR_BLOCK}/skip_norm"),
    *convolution("decoder.transpconvs.{i}", "decoder_{i}/upsample", "expand"),
    *_conv_norm("decoder.stages.{i}.convs.0", "decoder_{i}/conv"),
    *convolution("decoder.seg_layers.{i}", "head_{i}", "point"),
]

ORDER = (
    "encoder decoder stem stages transpconvs seg_layers convs blocks conv1 conv2 skip conv norm all_modules weight bias"
)

AGAIN = re.compile(r"decoder\.encoder\..*|.*\.all_modules\..*")
HEAD = re.compile(r"decoder\.seg_layers\.(\d+)\.(weight|bias)")


def from_torch(state: Mapping[str, np.ndarray], deep_supervision: bool = False) -> Tree:
    """nnU-Net's state dict as the parameters of `ResEnc(mask_tokens=False, deep_supervision=…)`."""
    used = {name: value for name, value in state.items() if not AGAIN.fullmatch(name)}
    if not deep_supervision:
        heads = [int(found[1]) for found in map(HEAD.fullmatch, used) if found]
        coarser = {f"decoder.seg_layers.{i}.{part}" for i in heads if i < max(heads) for part in ("weight", "bias")}
        used = {name: value for name, value in used.items() if name not in coarser}
    return names.from_torch(RULES, used, "ResEnc weights")


def to_torch(params: Mapping[str, Any]) -> State:
    """All tensors of nnU-Net's state dict, in its order; those of several names are one array."""
    state = names.to_torch(
        RULES, {name: tree for name, tree in params.items() if name != "mask_token"}, "ResEnc weights"
    )
    stages = sum(name.startswith("decoder_") for name in params)
    head = state[f"decoder.seg_layers.{stages - 1}.weight"]
    for i in range(stages - 1):
        channels = len(state[f"decoder.transpconvs.{i}.bias"])
        state.setdefault(f"decoder.seg_layers.{i}.weight", np.zeros((len(head), channels, 1, 1, 1), head.dtype))
        state.setdefault(f"decoder.seg_layers.{i}.bias", np.zeros(len(head), head.dtype))
    for name, value in list(state.items()):
        module, part = name.rsplit(".", 1)
        if module.endswith(".conv"):
            state[f"{module.removesuffix('conv')}all_modules.0.{part}"] = value
        elif module.endswith(".norm"):
            state[f"{module.removesuffix('norm')}all_modules.1.{part}"] = value
    state |= {f"decoder.{name}": value for name, value in state.items() if name.startswith("encoder.")}
    return names.in_order(state, ORDER)
