"""Tiny networks of nnU-Net's own classes with random weights, and what they compute: the files beside this one.

    pip install -e ".[nnunet]" && python tests/nnunet/make.py

An .npz holds `input` (b, 1, d, h, w), `output0`, … (b, classes, d, h, w), finest first, and the state dict under
`state/`.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

FOLDER = Path(__file__).parent
CLASSES, CROP = 2, (16, 24, 16)
RESENC = {"features": (3, 4, 5, 5), "blocks": (1, 2, 1, 1)}  # the last stage has a stride and no projection
PRIMUS = {"width": 12, "depth": 2, "heads": 2}


def resenc() -> nn.Module:
    """As nnU-Net's planner has it, but for the sizes."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    features, blocks = RESENC["features"], RESENC["blocks"]
    return ResidualEncoderUNet(
        input_channels=1,
        n_stages=len(features),
        features_per_stage=features,
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=(1, *(2,) * (len(features) - 1)),
        n_blocks_per_stage=blocks,
        num_classes=CLASSES,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


def primus() -> nn.Module:
    """As nnU-Net's trainers have it, but for the sizes."""
    from dynamic_network_architectures.architectures.primus import Primus

    return Primus(
        input_channels=1,
        embed_dim=PRIMUS["width"],
        patch_embed_size=(8, 8, 8),
        num_classes=CLASSES,
        eva_depth=PRIMUS["depth"],
        eva_numheads=PRIMUS["heads"],
        input_shape=CROP,
        drop_path_rate=0.2,
        scale_attn_inner=True,
        init_values=0.1,
    )


def outputs(net: nn.Module, volume: np.ndarray) -> list[np.ndarray]:
    """volume (b, 1, d, h, w) -> logits (b, classes, d, h, w), finest first."""
    with torch.no_grad():
        computed = net.eval()(torch.from_numpy(volume))
    return [x.numpy() for x in (computed if isinstance(computed, list) else [computed])]


def main() -> None:
    torch.manual_seed(0)
    volume = np.random.default_rng(0).random((1, 1, *CROP), np.float32)
    for build in (resenc, primus):
        net = build()
        with torch.no_grad():
            for parameter in net.parameters():  # no bias of zero, no scale of one: they would hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
        arrays = {f"state/{name}": value.numpy() for name, value in net.state_dict().items()}
        arrays |= {f"output{i}": value for i, value in enumerate(outputs(net, volume))}
        np.savez_compressed(FOLDER / f"{build.__name__}.npz", input=volume, **arrays)


if __name__ == "__main__":
    main()
