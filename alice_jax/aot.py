"""Compiles the train step of a configuration for accelerators that are not there, and says what it will take.

    python -m alice_jax.aot --config=configs/pretrain.py --topology=v5e:4x4      fits or not, and what bounds its speed
    python -m alice_jax.aot --config=configs/pretrain.py --topology=v5e-16 --fit       a batch and remat that do fit
    python -m alice_jax.aot --config=configs/pretrain.py --sweep --plot scaling.png    the bound on many slices
    python -m alice_jax.aot --config=configs/pretrain.py --target=h200                 memory of one GPU

Any field of the configuration is set by --config.FIELD=VALUE, as for `train`. Needs the extra `tpu` (or `cuda`), in an
environment of its own, and no accelerator. A compilation takes minutes and about 4 GB; --json keeps what was compiled.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from alice_jax import cli, settings
from alice_jax.ahead import compiling, roofline, topologies
from alice_jax.ahead.compiling import Program
from alice_jax.ahead.topologies import Slice
from alice_jax.errors import UserError

REMAT = ((), (0,), (0, 1), (0, 1, 2, 3))  # stages whose blocks are computed again, from the fastest to the smallest
GB = 1e9


@dataclasses.dataclass
class Compiled:
    """Programs compiled now or, with a file, before."""

    file: Path | None
    programs: dict[str, Program]

    @classmethod
    def kept_in(cls, file: str | None) -> "Compiled":
        path = Path(file) if file else None
        try:
            kept = json.loads(path.read_text()) if path and path.exists() else {}
            return cls(path, {key: Program.from_dict(fields) for key, fields in kept.items()})
        except OSError as error:
            raise UserError(f"--json {file}: cannot be read ({error.strerror}); name another file") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"--json {file}: holds no programs of this version ({error}); name another file") from error

    @staticmethod
    def _key(config: ConfigDict, target: Slice) -> str:
        digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
        return f"{target.name}, batch_size {config.batch_size}, remat {tuple(config.model.remat)}, config {digest}"

    def has(self, config: ConfigDict, target: Slice) -> bool:
        return self._key(config, target) in self.programs

    def step(self, config: ConfigDict, target: Slice) -> Program:
        """The step, compiled unless that was done before."""
        key = self._key(config, target)
        if key not in self.programs:
            print(f"compiling for {key.rpartition(',')[0]} …", file=sys.stderr, flush=True)
            self.programs[key] = compiling.compile_step(config, topologies.devices(target), target.chip.unit)
            if self.file:
                kept = {key: dataclasses.asdict(program) for key, program in self.programs.items()}
                cli.write(self.file, json.dumps(kept, indent=1).encode() + b"\n", "--json")
        return self.programs[key]


def with_fields(config: ConfigDict, **fields: Any) -> ConfigDict:
    """A copy with some of `batch_size` and `remat` changed."""
    config = config.copy_and_resolve_references()
    config.batch_size = fields.get("batch_size", config.batch_size)
    config.model.remat = fields.get("remat", config.model.remat)
    return config


def divisible(config: ConfigDict, target: Slice) -> ConfigDict:
    """The configuration with its batch raised to a multiple of the chips, which is said."""
    batch = math.ceil(config.batch_size / target.chips) * target.chips
    if batch != config.batch_size:
        print(f"batch_size {config.batch_size} cannot be divided over {target.chips} chips: {batch} is compiled")
    return with_fields(config, batch_size=batch)


# ---------------------------------------------------------------- one target


def described(program: Program, config: ConfigDict, target: Slice) -> str:
    """What the compiler says of a step, as text."""
    memory, pairs = target.chip.memory_bytes, config.batch_size // target.chips
    lines = [f"{target.name}: {config.batch_size} pairs a step, {pairs} a chip, remat {tuple(config.model.remat)}"]
    if program.too_large:
        lines.append(f"does not fit: {program.too_large}")
    else:
        fits = "fits" if program.total <= memory else "does not fit"
        lines.append(f"{fits}: {program.total / GB:.2f} of {memory / GB:.2f} GB; compiled in {program.compile_s:.0f} s")
    lines.append("\nmemory of a chip                 GB")
    for what, size in (
        ("parameters", program.parameters),
        ("optimizer", program.optimizer),
        ("teacher, centers", program.extra),
        ("batch", program.batch),
        ("their tiles, filled up", program.tiles),
        ("temporaries", program.temporaries),
        ("program", program.code),
    ):
        lines.append(f"  {what:24}{size / GB:9.3f}")
    lines.append(
        f"  activations that the gradient asks for, as written: {program.kept / GB:.2f} GB, in the temporaries"
    )
    return "\n".join(lines + (speed(program, config, target) if program.flops else []))


def speed(program: Program, config: ConfigDict, target: Slice) -> list[str]:
    """Work, collectives, padding and the roofline."""
    chip = target.chip
    lines = [
        f"\nwork of a chip in a step: {program.flops / 1e12:.3f} TFLOP, {program.moved / GB:.1f} GB read and written",
        "collectives: "
        + ("; ".join(f"{count} {kind} of {size / 1e6:.1f} MB" for kind, size, count in program.collectives) or "none"),
        f"\nproducts               GFLOP   × in {chip.unit}-wide units   × in tiles of memory",
    ]
    for each in program.products:
        filled, stored = each.filled_flops / each.flops, each.stored / each.numbers
        lines.append(f"  {each.name:20}{each.flops / 1e9:7.1f}{filled:21.1f}{stored:23.1f}")
    groups = config.mesh.parameters
    bound = roofline.bound(program.flops, program.moved, program.collectives, chip, target.chips, groups)
    filled = sum(each.filled_flops - each.flops for each in program.products) / chip.flops
    return [
        *lines,
        f"\na bound, not a measurement: a step takes at least {bound.step * 1e3:.1f} ms, at most "
        f"{config.batch_size / bound.step:.0f} pairs/s",
        f"  computing {bound.computing * 1e3:.2f} ms ({(bound.computing + filled) * 1e3:.2f} with units filled up), "
        f"moving {bound.moving * 1e3:.2f} ms, network {bound.network * 1e3:.2f} ms",
        f"  at {chip.flops / 1e12:.0f} TFLOP/s, {chip.memory_rate / GB:.0f} GB/s, {chip.link_rate / GB:.0f} GB/s sent",
        *(f"  {line}" for line in roofline.FORMULA.splitlines()),
    ]


def largest(done: Compiled, config: ConfigDict, target: Slice, memory: float) -> int:
    """Pairs a chip that `memory` holds, by a line through this batch and twice it.

    Where twice the batch is more than the compiler accepts: the batch itself, or none.
    """
    share = config.batch_size // target.chips
    one, two = (done.step(with_fields(config, batch_size=config.batch_size * n), target) for n in (1, 2))
    if one.too_large:
        return 0
    if two.too_large:
        return share if one.total <= memory else 0
    return roofline.largest([(share, one.total), (2 * share, two.total)], memory)


def fitted(done: Compiled, config: ConfigDict, target: Slice, memory: float) -> str:
    """The least that must be computed again for the batch to fit, else the largest batch; as text."""
    share, lines, found = config.batch_size // target.chips, [], []
    for remat in REMAT:
        pairs = largest(done, with_fields(config, remat=remat), target, memory)
        lines.append(f"remat {remat!s:14} at most {pairs} pairs a chip")
        found.append((pairs, remat))
        if pairs >= share:
            break
    pairs, remat = found[-1] if found[-1][0] >= share else max(found, key=lambda each: each[0])
    if not pairs:
        return "\n".join([*lines, f"nothing fits {memory / GB:.1f} GB: choose smaller crops or a smaller model"])
    batch, stages = min(pairs, share) * target.chips, shlex.quote(str(remat))
    return "\n".join([*lines, f"--config.batch_size={batch} --config.model.remat={stages}"])


# ---------------------------------------------------------------- many slices


def swept(done: Compiled, config: ConfigDict, names: Sequence[str], price: float | None) -> list[dict[str, Any]]:
    """The bound on each of these slices, each chip with as many pairs as on the smallest."""
    slices = [topologies.named(name) for name in names]
    share = math.ceil(config.batch_size / min(each.chips for each in slices))
    rows = []
    for name, target in zip(names, slices, strict=True):
        # The same program but for its collectives, whose sizes do not depend on the number of chips.
        small = [Slice(target.chip, shape) for chips, shape in target.chip.shapes.items() if 1 < chips <= target.chips]
        sources = [
            each for each in (target, *small) if done.has(with_fields(config, batch_size=share * each.chips), each)
        ]
        source = (sources or small)[0]
        program = done.step(with_fields(config, batch_size=share * source.chips), source)
        row = {"name": name, "chips": target.chips, "pairs": share * target.chips, "compiled": source.name}
        rows.append(row)
        if program.too_large:
            continue
        alone, bound = (
            roofline.bound(program.flops, program.moved, program.collectives, target.chip, n) for n in (1, target.chips)
        )
        row |= {"step_s": bound.step, "pairs_per_s": row["pairs"] / bound.step, "efficiency": alone.step / bound.step}
        if price is not None:
            row["cost"] = roofline.cost_per_million(row["pairs_per_s"], target.chips, price)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The sweep as text."""
    cost = any("cost" in row for row in rows)
    lines = [
        f"{'slice':9} chips   pairs  step ms  pairs/s  efficiency" + ("  per million pairs" if cost else "") + "  by",
    ]
    for row in rows:
        line = f"{row['name']:9} {row['chips']:5} {row['pairs']:7}"
        if "step_s" not in row:
            lines.append(f"{line}  does not fit")
            continue
        how = (
            "compiled" if topologies.named(row["name"]).name == row["compiled"] else f"modelled from {row['compiled']}"
        )
        line += f" {row['step_s'] * 1e3:8.1f} {row['pairs_per_s']:8.0f} {row['efficiency']:11.1%}"
        lines.append(line + (f" {row['cost']:18.2f}" if cost else "") + f"  {how}")
    return "\n".join([*lines, "", *roofline.FORMULA.splitlines()])


def plotted(rows: Sequence[dict[str, Any]]) -> bytes:
    """The sweep as a PNG: pairs/s and efficiency over chips, a line for each generation."""
    from alice_jax.reporting import figures

    figure = figures.new_figure(8, 3.4)
    speeds, efficiencies = figure.subplots(1, 2)
    figures.style(speeds, "pairs/s, at most")
    figures.style(efficiencies, "weak-scaling efficiency, at most")
    generations: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "step_s" in row:
            generations.setdefault(row["name"].partition("-")[0], []).append(row)
    for color, (name, of) in zip((figures.BLUE, figures.ORANGE, figures.GREEN), generations.items(), strict=False):
        chips = [row["chips"] for row in of]
        speeds.loglog(chips, [row["pairs_per_s"] for row in of], "o-", color=color, label=name)
        efficiencies.semilogx(chips, [100 * row["efficiency"] for row in of], "o-", color=color, label=name)
    ticks = sorted({row["chips"] for row in rows})
    for axes in (speeds, efficiencies):
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("chips", fontsize=8, color=figures.SOFT)
        axes.minorticks_off()
    low, high = speeds.get_ylim()
    round_numbers = [m * 10**power for power in range(7) for m in (1, 2, 5) if low <= m * 10**power <= high]
    speeds.set_yticks(round_numbers, [f"{number:,}" for number in round_numbers])
    efficiencies.set_ylim(0, 105)
    efficiencies.set_ylabel("%", fontsize=8, color=figures.SOFT)
    speeds.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return figures.png(figure)


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line and runs."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--topology", metavar="NAME", help="TPU chips: v5e:4x4, v5e-16, v5p-128, v6e-256 …")
    what.add_argument("--target", choices=["h200"], help="one GPU; its memory only")
    what.add_argument(
        "--sweep", nargs="*", metavar="NAME", help=f"the bound on these (default: {' '.join(topologies.SWEEP)})"
    )
    parser.add_argument("--fit", nargs="?", type=float, const=0.0, metavar="GB", help="for this memory, or the chip's")
    parser.add_argument("--quick", action="store_true", help="one compilation: leave out the largest batch")
    parser.add_argument("--confirm", action="store_true", help="compile the largest batch, too")
    parser.add_argument("--price-per-chip-hour", type=float, metavar="P", help="with --sweep: cost of a million pairs")
    parser.add_argument("--plot", metavar="FILE", help="with --sweep: the table as a PNG")
    parser.add_argument("--json", metavar="FILE", help="keeps what was compiled; what it has is not compiled again")
    args, rest = parser.parse_known_args(argv)
    cli.check_folder_of("--json", args.json)
    cli.check_folder_of("--plot", args.plot)
    values = flags.FlagValues()
    config = cli.read_configuration(values, config_flags.DEFINE_config_file("config", flag_values=values), rest)
    if config.objective != "alice":
        raise UserError(f"objective {config.objective!r}: only pretraining (configs/pretrain.py) is compiled ahead")
    settings.check(config)
    target = topologies.H200 if args.target else topologies.named(args.topology) if args.topology else None
    jax.config.update("jax_platforms", "cpu")  # of this process, which only compiles
    done = Compiled.kept_in(args.json)
    if target is None:
        if config.mesh.parameters != 1:
            raise UserError(f"mesh.parameters {config.mesh.parameters}: --sweep is for 1; give a slice by --topology")
        rows = swept(done, config, args.sweep or topologies.SWEEP, args.price_per_chip_hour)
        print(table(rows))
        if args.plot:
            cli.write(Path(args.plot), plotted(rows), "--plot")
        return 0
    config = divisible(config, target)
    if args.fit is not None:
        print(fitted(done, config, target, args.fit * GB or target.chip.memory_bytes))
        return 0
    print(f"{', '.join(f'{name} {version}' for name, version in versions())}; precision {config.precision}")
    print(described(done.step(config, target), config, target))
    if args.quick:
        return 0
    pairs = largest(done, config, target, target.chip.memory_bytes)
    print(f"\nthe largest batch: {pairs} pairs a chip, by a line through two compiled ones")
    if args.confirm and pairs:
        largest_config = with_fields(config, batch_size=pairs * target.chips)
        print("\n" + described(done.step(largest_config, target), largest_config, target))
    return 0


def versions() -> list[tuple[str, str]]:
    """Of what compiles."""
    return [
        (name, importlib.metadata.version(name))
        for name in ("jax", "libtpu")
        if name in {distribution.name for distribution in importlib.metadata.distributions()}
    ]


if __name__ == "__main__":
    cli.run(main)
