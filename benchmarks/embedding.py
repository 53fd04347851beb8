"""How long the embedding of a whole scan takes, for the published network and for the small one.

    python benchmarks/embedding.py [--shape 120 160 160] [--twin] [--json FILE]

The weights are random, which changes no time. --twin runs the published layers in plain PyTorch on the same volume, in
the same run, with malloc set as the project sets it and once more with glibc's own settings. Times are medians; a first
evaluation, which compiles, does not count.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measuring import alone, ceilings, main_memory_gib, measured, save

from alice_jax import cli, embed, host, tasks
from alice_jax.data.hounsfield import AIR_HU

CONFIG = Path(__file__).parents[1] / "configs" / "embedder.py"
PUBLISHED = "published network"
RECIPES = {PUBLISHED: "", "small network, cells of 8 mm": "small", "small network, cells of 4 mm": "small"}
TWINS = {"published network in PyTorch": True, "the same, malloc untouched": False}  # whether malloc keeps its memory


def ours(name: str, shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Seconds a scan and gigabytes of main memory of the project's embedder."""
    host.give_back_memory()
    config = cli.recipe(f"{CONFIG}:{RECIPES[name]}")
    network = tasks.embedder.network_of(config.model.to_dict(), tasks.compute_dtype(config.precision))
    example = np.zeros((1, *config.views.shape_zyx, 1), np.float32)
    variables = jax.jit(network.init)(jax.random.key(0), example)
    embedder = embed.TrainedEmbedder(
        network,
        jax.device_get(variables),
        reduce=config.views.reduce,
        window_hu=tuple(config.views.window_hu),
        spacing_mm=config.data.spacing_mm,
        dims=config.storage.dims,
        shifts=2 if "4 mm" in name else 1,
    )
    whole = embed.WholeVolume(embedder)
    volume = np.random.default_rng(0).integers(AIR_HU, 1000, shape).astype(np.int16)
    return result(*measured(lambda: whole(volume), repeats))


def twin(shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """The same of a 3-D ResNet-18 with the published strides and heads in PyTorch, and of making unit vectors."""
    import torch
    from torch import nn
    from torch.nn import functional

    config = cli.recipe(str(CONFIG)).model

    def norm_conv(inside: int, outside: int, kernel: Any, stride: Any = 1) -> nn.Sequential:
        padding = tuple(k // 2 for k in kernel)
        return nn.Sequential(nn.Conv3d(inside, outside, kernel, stride, padding, bias=False), nn.BatchNorm3d(outside))

    class Block(nn.Module):
        def __init__(self, inside: int, outside: int, kernel: Any, stride: Any):
            super().__init__()
            self.first = norm_conv(inside, outside, kernel, stride)
            self.second = norm_conv(outside, outside, kernel)
            same = inside == outside and stride == (1, 1, 1)
            self.shortcut = nn.Identity() if same else norm_conv(inside, outside, (1, 1, 1), stride)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.relu(self.second(functional.relu(self.first(x))) + self.shortcut(x))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, features = config.channels, config.features
            self.stem = norm_conv(1, width[0], config.stem_kernel_zyx, config.stem_stride_zyx)
            self.stages = nn.ModuleList()
            for i, (count, stride) in enumerate(zip(config.blocks, config.stage_strides_zyx, strict=True)):
                blocks = [
                    Block(
                        width[max(i - 1, 0)] if j == 0 else width[i],
                        width[i],
                        config.stage_kernels_zyx[i],
                        tuple(stride) if j == 0 else (1, 1, 1),
                    )
                    for j in range(count)
                ]
                self.stages.append(nn.Sequential(*blocks))
            self.lateral = nn.ModuleList(nn.Conv3d(w, features, 1) for w in width)
            self.fine = nn.Conv3d(features, features, 3, padding=1)
            self.coarse = nn.Conv3d(features, features, 3, padding=1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = functional.relu(self.stem(x))
            outputs = []
            for i, stage in enumerate(self.stages):
                x = stage(x)
                x = functional.max_pool3d(x, (config.depth_pool, 1, 1)) if i == 0 else x
                outputs.append(x)
            top = self.lateral[2](outputs[2])
            for i in (1, 0):
                top = self.lateral[i](outputs[i]) + functional.interpolate(top, outputs[i].shape[2:])
            fine, coarse = self.fine(top), self.coarse(self.lateral[3](outputs[3]))
            return functional.normalize(fine, dim=1), functional.normalize(coarse, dim=1)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, volume = Network().eval().to(device), torch.rand(1, 1, *shape)

    def call() -> None:
        with torch.no_grad():
            for part in network(volume.to(device)):
                part.cpu()

    return result(*measured(call, repeats))


def result(first_s: float, median_s: float) -> dict[str, float]:
    return {"seconds": median_s, "compile_s": first_s - median_s, "peak_gib": main_memory_gib()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=3, type=int, default=[120, 160, 160], metavar="N", help="voxels (z, y, x)")
    parser.add_argument("--repeats", type=int, default=3, help="timed evaluations (default: 3)")
    parser.add_argument("--twin", action="store_true", help="also PyTorch")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    cli.check_folder_of("--json", args.json)
    shape = tuple(args.shape)
    rows = {name: alone(ours, name, shape, args.repeats) for name in RECIPES}
    if args.twin:
        rows |= {name: alone(twin, shape, args.repeats, keep_memory=kept) for name, kept in TWINS.items()}
    beside = rows[PUBLISHED].get("seconds")
    for name, row in rows.items():
        words = row["failed"] if "failed" in row else f"{row['seconds']:8.2f} s{row['peak_gib']:8.1f} GiB"
        if beside and name in TWINS and "seconds" in row:
            words += f"{row['seconds'] / beside:8.2f} times as long as ours"
        print(f"{name:34}{words}")
    if args.json:
        save(args.json, {"shape_zyx": shape, "ceilings": alone(ceilings, "float32"), "rows": rows})
    return 0


if __name__ == "__main__":
    cli.run(main)
