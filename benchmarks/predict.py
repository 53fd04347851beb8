"""How long the labelling of a whole scan takes, how much memory it needs, and how a plain PyTorch loop compares.

    python benchmarks/predict.py [--slices 256 1024] [--twin] [--json FILE]

Scans have 512 x 512 voxels of 0.75 mm a slice, 0.5 mm apart, and are labelled by the full-size network (64³ voxels of
2 mm, 14 classes, random weights) in fp32, from the resampled volume to labels on the file's voxels; reading, resampling
and writing do not count. `--twin` does the same in PyTorch as is usual: window by window, with the same Gaussian, all
logits of the resampled scan kept, and resampled class by class at the end; for the first number of slices alone.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from measuring import alone, ceilings, main_memory_gib, measured, save

from alice_jax import cli, host
from alice_jax.contract import Contract
from alice_jax.data import geometry
from alice_jax.data.scan import Scan
from alice_jax.data.store import FRAME
from alice_jax.inference import original
from alice_jax.inference.sliding import Sliding, Windows
from alice_jax.models.nnformer import NNFormer

SIDE, CLASSES, SPACING_MM, WINDOW_HU = (64, 64, 64), 14, 2.0, (-125.0, 225.0)
FILE_SHAPE_YX, FILE_SPACING_ZYX_MM = (512, 512), (0.5, 0.75, 0.75)


def scan_of(slices: int) -> tuple[Scan, np.ndarray, tuple[int, ...], np.ndarray]:
    """A prepared scan, its volume, and shape and affine of its file."""
    shape, affine = (slices, *FILE_SHAPE_YX), np.diag([*FILE_SPACING_ZYX_MM[::-1], 1.0])
    grid = geometry.stored_grid(shape, affine, SPACING_MM)
    volume = np.random.default_rng(0).integers(-1024, 1000, grid.shape_zyx).astype(np.int16)
    z, y, x = grid.shape_zyx
    scan = Scan(
        id="scan", file="", sha256="", patient="", shape_zyx=(z, y, x), spacing_zyx_mm=(SPACING_MM,) * 3,
        origin_xyz_lps_mm=tuple(grid.affine_lps[:3, 3]), direction=tuple(map(tuple, np.eye(3))),
        foreground_box_zyx_vox=((0, 0, 0), (z, y, x)), original={"aligned": True},
    )  # fmt: skip
    return scan, volume, shape, affine


def ours(slices: int, batch: int) -> dict[str, Any]:
    """Seconds a scan, windows a second, those of the network by itself, and gigabytes of main memory."""
    host.give_back_memory()
    host.keep_compiled()
    import jax

    network = NNFormer(out_channels=CLASSES, mask_tokens=False)
    params = jax.jit(lambda key: network.init(key, np.zeros((1, *SIDE, 1), np.float32), method="segment")["params"])
    contract = Contract(FRAME, (SPACING_MM,) * 3, WINDOW_HU, SIDE)
    sliding = Sliding.of(network, params(jax.random.key(0)), contract, batch=batch)

    windows = np.zeros((batch, *SIDE), np.int16)
    _, alone_s = measured(lambda: sliding._logits(sliding._params, windows, np.zeros(3, bool)).block_until_ready(), 3)
    scan, volume, shape, affine = scan_of(slices)
    began = time.perf_counter()
    for _ in original.planes(sliding.slices(volume), scan, shape, affine, np.uint8):
        pass
    seconds = time.perf_counter() - began
    return result(slices, seconds) | {"network_windows_per_s": batch / alone_s}


def twin(slices: int) -> dict[str, Any]:
    """The same of the network's layers in PyTorch."""
    import torch
    from torch.nn import functional
    from torch_nnformer import NNFormer as Twin

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = Twin().eval()
    network.final[0].up = torch.nn.ConvTranspose3d(48, CLASSES, 2, stride=2)
    network.to(device)
    _, volume, shape, _ = scan_of(slices)

    def label() -> None:
        low, high = WINDOW_HU
        scaled = torch.from_numpy((volume.clip(low, high) - low) / (high - low)).float()
        axes = [Windows.along(n, side) for n, side in zip(volume.shape, SIDE, strict=True)]
        total = torch.zeros(CLASSES, *volume.shape)
        for at in np.ndindex(*(len(axis.starts) for axis in axes)):
            region = tuple(slice(a.starts[i], a.starts[i] + side) for a, i, side in zip(axes, at, SIDE, strict=True))
            z, y, x = (torch.from_numpy(a.weights[i]) for a, i in zip(axes, at, strict=True))
            logits = network(scaled[region][None, None].to(device))[3][0].cpu()
            total[(slice(None), *region)] += logits * (z[:, None, None] * y[:, None] * x)
        best, labels = torch.full(shape, -torch.inf), torch.zeros(shape, dtype=torch.uint8)
        for code, logits in enumerate(total):
            on_file = functional.interpolate(logits[None, None], shape, mode="trilinear")[0, 0]
            labels[on_file > best] = code
            torch.maximum(best, on_file, out=best)

    with torch.no_grad():
        network(torch.zeros(1, 1, *SIDE, device=device))
        began = time.perf_counter()
        label()
        return result(slices, time.perf_counter() - began)


def result(slices: int, seconds: float) -> dict[str, Any]:
    shape = scan_of(slices)[0].shape_zyx
    count = int(np.prod([len(Windows.along(n, side).starts) for n, side in zip(shape, SIDE, strict=True)]))
    return {
        "slices": slices,
        "windows": count,
        "seconds": seconds,
        "windows_per_s": count / seconds,
        "peak_gib": main_memory_gib(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", nargs="+", type=int, default=[256, 1024], metavar="N", help="of the scans' files")
    parser.add_argument("--batch", type=int, default=1, help="windows computed at once (default: 1)")
    parser.add_argument("--twin", action="store_true", help="also PyTorch")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    cli.check_folder_of("--json", args.json)
    rows = {f"{n} slices": alone(ours, n, args.batch) for n in args.slices}
    if args.twin:
        rows[f"{args.slices[0]} slices in PyTorch"] = alone(twin, args.slices[0])
    print(f"{'':28}{'windows':>8}{'seconds':>10}{'windows/s':>11}{'network alone':>15}{'peak GiB':>10}")
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:28}{row['failed']}")
            continue
        network = f"{row['network_windows_per_s']:.2f}" if "network_windows_per_s" in row else ""
        print(
            f"{name:28}{row['windows']:8}{row['seconds']:10.1f}{row['windows_per_s']:11.2f}{network:>15}"
            f"{row['peak_gib']:10.1f}"
        )
    if args.json:
        save(args.json, {"ceilings": alone(ceilings, "float32"), "rows": rows})
    return 0


if __name__ == "__main__":
    cli.run(main)
