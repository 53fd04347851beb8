"""Names and layouts of the embedder: PyTorch (a SAM checkpoint) and Flax, both ways.

PyTorch keeps convolution kernels as (out, in, z, y, x), Flax as (z, y, x, in, out).
`num_batches_tracked` has no counterpart and is ignored.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from alice_jax.errors import UserError
from alice_jax.interop import torch_file
from alice_jax.models.embedder import Embedder

# (pattern of a torch module name, Flax path of the same module)
MODULES = (
    (r"backbone\.conv1\.(conv|bn)", r"stem/\1"),
    (r"backbone\.layer([1-4])\.(\d)\.(conv1|conv2|downsample)\.(conv|bn)", r"layer\1_block\2/\3/\4"),
    (r"neck\.lateral_convs\.(\d)\.conv", r"fine_lateral\1"),
    (r"neck\.fpn_convs\.0\.conv", r"fine_output"),
    (r"read_out_head\.lateral_convs\.0\.conv", r"coarse_lateral"),
    (r"read_out_head\.fpn_convs\.0\.conv", r"coarse_output"),
)
TO_TORCH = (
    (r"stem/(conv|bn)", r"backbone.conv1.\1"),
    (r"layer(\d)_block(\d)/(conv1|conv2|downsample)/(conv|bn)", r"backbone.layer\1.\2.\3.\4"),
    (r"fine_lateral(\d)", r"neck.lateral_convs.\1.conv"),
    (r"fine_output", r"neck.fpn_convs.0.conv"),
    (r"coarse_lateral", r"read_out_head.lateral_convs.0.conv"),
    (r"coarse_output", r"read_out_head.fpn_convs.0.conv"),
)
# torch leaf of a batch norm -> Flax collection and leaf
NORM_LEAVES = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def _translate(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise UserError(f"embedder weight {name}: no such layer; give the state dict of a ResNet-18 SAM checkpoint")


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{"params": …, "batch_stats": …} for `models.embedder.Embedder` from a SAM state dict of numpy arrays."""
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for name, value in state.items():
        module, leaf = name.rsplit(".", 1)
        if leaf == "num_batches_tracked":
            continue
        path, value = tuple(_translate(module, MODULES).split("/")), np.asarray(value)
        if path[-1] == "bn":
            collection, leaf = NORM_LEAVES[leaf]
        else:
            collection, leaf = "params", {"weight": "kernel", "bias": "bias"}[leaf]
            value = value.transpose(2, 3, 4, 1, 0) if leaf == "kernel" else value
        flat[(collection, *path, leaf)] = np.ascontiguousarray(value)
    return traverse_util.unflatten_dict(flat)


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A SAM state dict (names and layouts of a SAM checkpoint) from {"params": …, "batch_stats": …}."""
    norm_leaves = {flax_leaf: leaf for leaf, (_, flax_leaf) in NORM_LEAVES.items()}
    state = {}
    for (_, *path, leaf), value in traverse_util.flatten_dict(dict(variables)).items():
        value = np.asarray(value)
        if path[-1] == "bn":
            torch_leaf = norm_leaves[leaf]
        else:
            torch_leaf = {"kernel": "weight", "bias": "bias"}[leaf]
            value = value.transpose(4, 3, 0, 1, 2) if leaf == "kernel" else value
        state[f"{_translate('/'.join(path), TO_TORCH)}.{torch_leaf}"] = np.ascontiguousarray(value)
    return state


def inflate_imagenet(state: Mapping[str, np.ndarray], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the backbone in `variables` by a 2-D ResNet-18's, as I3D does (Carreau & Zisserman, arXiv 1705.07750).

    state: torchvision's ResNet-18 state dict as numpy arrays (`conv1.weight` (64, 3, 7, 7), `layer1.0.conv1.weight` …).
    A kernel is repeated along z and divided by its depth; the stem's three colours are summed, since CT has one.
    Stage one's shortcut has no counterpart (it is an identity there) and keeps its values, as do both heads.
    """
    target = to_torch(variables)
    for name in [name for name in target if name.startswith("backbone.")]:
        flat = name.removeprefix("backbone.")
        flat = flat.replace("downsample.conv.", "downsample.0.").replace("downsample.bn.", "downsample.1.")
        flat = flat.replace(".conv.", ".").replace("conv1.bn.", "bn1.").replace("conv2.bn.", "bn2.")
        if flat not in state:
            continue
        value, want = np.asarray(state[flat], np.float32), target[name].shape
        if value.ndim == 4:
            value = value.sum(axis=1, keepdims=True) if want[1] == 1 else value
            value = np.repeat(value[:, :, None], want[2], axis=2) / want[2]
        if value.shape != want:
            raise UserError(
                f"model.channels: {name} has shape {want}, the ImageNet file's {flat} gives {value.shape}; "
                "inflation needs the published channels and kernels"
            )
        target[name] = value
    return from_torch(target)


def load(path: str, network: Embedder) -> dict[str, Any]:
    """Start values from a .pth file: a SAM checkpoint, or a 2-D ResNet-18 to inflate. Needs the `torch` extra."""
    state = torch_file.load(path)
    if any(name.startswith("read_out_head.") for name in state):
        names = [name for name in state if name.startswith(("backbone.", "neck.", "read_out_head."))]
        return from_torch({name: state[name] for name in names})
    variables = network.init(jax.random.key(0), jnp.zeros((1, 16, 32, 32, 1)))
    return inflate_imagenet(state, jax.tree.map(np.asarray, variables))
