"""The largest batch and crop that a device holds, from the compiler: no device is needed and nothing is allocated.

    pip install 'jax[cuda13]'                              in an environment of its own; no driver is needed
    python benchmarks/memory.py --json FILE                1 and 4 pairs of 64³ and of 128³, every way of remat
    python benchmarks/memory.py --crops 96 --remat none    only that

Each row compiles the train step of configs/pretrain.py as an accelerator runs it, the whole batch at once, for an H200
(`alice_jax.ahead.compiling`). What a step holds is its state, its batch and the compiler's temporaries; it grows by the
same number of bytes with each pair, so a line through the batches that were compiled gives the largest one. Rows that
FILE has are not compiled again.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
from step import Case

from alice_jax import cli
from alice_jax.ahead import compiling, roofline, topologies
from alice_jax.ahead.topologies import USABLE

DEVICES_GB = (16, 40, 80, 141)
REMAT = {"none": (), "finest": (0,), "all": (0, 1, 2, 3)}  # stages whose blocks are computed again


def needed(case: Case) -> dict[str, Any]:
    """Bytes that one step holds on a GPU, by the compiler, and how long it compiled."""
    program = compiling.compile_step(case.config(), topologies.devices(topologies.H200))
    if program.too_large:
        return {"failed": "out of memory"}
    return {
        "state_and_batch_bytes": program.state_and_batch,
        "temporary_bytes": program.temporaries,
        "bytes": program.total,
        "compile_s": program.compile_s,
    }


def largest(rows: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """What fits each of `DEVICES_GB`: pairs of each crop compiled with two batches, and the side of a single pair."""
    batches = {row["crop"]: [(r["pairs"], r["bytes"]) for r in rows if r["crop"] == row["crop"]] for row in rows}
    single = [(row["crop"] ** 3, row["bytes"]) for row in rows if row["pairs"] == 1]

    def along(points: Sequence[tuple[float, float]]) -> list[float]:
        start, slope = roofline.line(points)
        return [max(USABLE * gigabytes * 1e9 - start, 0) / slope for gigabytes in DEVICES_GB]

    found = {f"pairs of {crop}³": list(map(int, along(of))) for crop, of in sorted(batches.items()) if len(of) > 1}
    if len(single) > 1:
        found["side of one pair's crops"] = [int(voxels ** (1 / 3)) // 16 * 16 for voxels in along(single)]
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What was compiled, and the largest that fits for each way to run; as text."""
    lines = [f"{'mode':8} {'precision':10} {'remat':7} {'crop':>5} {'pairs':>5} {'GB':>8} {'of these temporary':>19}"]
    ways: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        way = row["mode"], row["precision"], row["remat"]
        start = f"{way[0]:8} {way[1]:10} {way[2]:7} {row['crop']:5} {row['pairs']:5}"
        if "failed" in row:
            lines.append(f"{start}  {row['failed']}")
            continue
        ways.setdefault(way, []).append(row)
        lines.append(f"{start} {row['bytes'] / 1e9:8.2f} {row['temporary_bytes'] / 1e9:19.2f}")
    lines.append(f"\nthe largest in {USABLE:.0%} of the memory:" + "".join(f"{size:>7} GB" for size in DEVICES_GB))
    for way, compiled in ways.items():
        for what, numbers in largest(compiled).items():
            lines.append(f"{' '.join(way):27} {what:25}" + "".join(f"{number:>10}" for number in numbers))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="release", choices=["release", "paper"])
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--remat", nargs="+", default=list(REMAT), choices=list(REMAT), help="default: all ways")
    parser.add_argument("--crops", nargs="+", type=int, default=[64, 128], metavar="N", help="sides (default: 64 128)")
    parser.add_argument("--pairs", nargs="+", type=int, default=[1, 4], metavar="N", help="batches (default: 1 4)")
    parser.add_argument("--json", metavar="FILE", help="adds the rows to those of this file")
    args = parser.parse_args(argv)
    cli.check_folder_of("--json", args.json)
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that compile: there is no GPU to look for
    file = Path(args.json) if args.json else None
    rows = json.loads(file.read_text())["rows"] if file and file.exists() else []
    for remat, crop, pairs in itertools.product(args.remat, args.crops, args.pairs):
        asked = {"mode": args.mode, "precision": args.precision, "remat": remat, "crop": crop, "pairs": pairs}
        if any(asked.items() <= row.items() for row in rows):
            continue
        print(f"{crop}³, {pairs} pair(s), remat {remat} …", file=sys.stderr, flush=True)
        rows.append(asked | measuring.alone(needed, Case("jax", width=48, **asked | {"remat": REMAT[remat]})))
        measuring.save(args.json, {"devices_gb": DEVICES_GB, "usable": USABLE, "rows": rows})
    print(table(rows))
    return 0


if __name__ == "__main__":
    cli.run(main)
