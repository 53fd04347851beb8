"""Exports a pretrained backbone: `python -m alice_jax.export --workdir DIR --format torch --out backbone.pth`.

The file is a PyTorch state dict with the authors' names, so `net.load_state_dict(torch.load("backbone.pth"))` fills
their nnFormer, or nnU-Net's class if the backbone is one of its own (docs/backbones.md). What the numbers mean (frame,
spacing, intensities, mode) is printed and written beside it as JSON. A backbone of release mode was trained with a
fixed random position embedding, which their state dict has no place for: it goes into a third file.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alice_jax import checkpoint, cli
from alice_jax.contract import Contract
from alice_jax.errors import UserError
from alice_jax.interop import nnformer, torch_file
from alice_jax.interop.backbones import TRANSLATIONS
from alice_jax.tasks import backbones

INPUT = "(batch, 1, z, y, x), window_hu scaled to 0 to 1"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    out = Path(args.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: name a file in an existing folder")
    torch_file.require_torch()
    config, state = checkpoint.restore_arrays(args.workdir, args.step, ("step", "params", "extra", "host"))
    if config.get("objective") != "alice":
        raise UserError(f"--workdir {args.workdir}: objective {config.get('objective')!r} has no backbone to export")
    tensors, position = backbone(config, state, args.which)
    contract = Contract.from_json(state["host"].get("contract"), f"--workdir {args.workdir}")
    about = description(config, state, args.which, tensors) | contract.to_json()
    files: dict[Path, Callable[[Path], Any]] = {out: lambda path: torch_file.save(path, tensors)}
    if position is not None:
        file = out.with_name(out.name + ".position_embedding.npy")
        about["position_embedding"] = file.name
        files[file] = lambda path: save_array(path, position)
    sidecar = out.with_name(out.name + ".json")
    files[sidecar] = lambda path: path.write_text(json.dumps(about, indent=2) + "\n")
    write_all(files)
    print(f"wrote {', '.join(map(str, files))}")
    for name, value in about.items():
        print(f"  {name}: {value}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m alice_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the folder of a pretraining run")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write, replaced if it exists")
    parser.add_argument("--format", choices=["torch"], default="torch", help="of the file (default: torch)")
    parser.add_argument(
        "--which", choices=["teacher", "student"], default="teacher", help="of the two networks (default: teacher)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the newest)")
    return parser.parse_args(argv)


def backbone(
    config: Mapping[str, Any], state: Mapping[str, Any], which: str
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The state dict of one network, and its position embedding (1, tokens, width) in release mode."""
    release = config["method"]["mode"] == "release"
    networks = state["params"] if which == "student" else state["extra"]["teacher"]
    translation = TRANSLATIONS[backbones.name_of(config["model"])]
    tensors = translation.to_torch(networks["backbone"], "release" if release else "correct")
    if not release:
        return tensors, None
    table = np.asarray(state["extra"]["position"][which])
    return tensors, table.reshape(1, -1, table.shape[-1])


def description(
    config: Mapping[str, Any], state: Mapping[str, Any], which: str, tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """What a user of the weights must know."""
    arrays = {id(value): value for name, value in tensors.items() if not nnformer.BUFFER.fullmatch(name)}
    mode, name = config["method"]["mode"], backbones.name_of(config["model"])
    about = {
        "network": which,
        "step": int(state["step"]),
        "tensors": len(tensors),
        "parameters": int(sum(value.size for value in arrays.values())),
        "mode": mode,
        "model": {"backbone": name} | backbones.sizes_of(config["model"]),
        "input": INPUT,
    }
    if name == "nnformer":
        about["relative_position_index"] = "release" if mode == "release" else "correct"
    return about


def save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name, np.save would append to it
        np.save(file, array)


def write_all(files: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Writes every file beside its place first and moves all at the end, so that none is ever half written."""
    partial = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in files}
    try:
        for path, write in files.items():
            write(partial[path])
        for path in files:
            os.replace(partial[path], path)
    except (OSError, RuntimeError) as error:  # PyTorch raises the latter when a disk is full
        raise UserError(f"--out {next(iter(files))}: {error}; choose a place that can be written to") from None
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main)
