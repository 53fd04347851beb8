"""What one train step of the full-size model costs, part by part, and how near to the device's limits it comes.

    python benchmarks/step.py                                           both modes, 1, 2, 4 and 8 pairs
    python benchmarks/step.py --modes release --pairs 1 2 --twin        beside a plain PyTorch step of the same work
    --json FILE                                                         the numbers as well as the table

Each row is a process of its own, so that its peak memory is its own. Times are medians of `--repeats` calls after
those that warm up. The ceilings, a large matrix product and a large copy, are measured in the same run; the bound of a
step is the longer of the times that they need for the step's floating-point operations and for reading and writing the
state once. PyTorch runs on the same device, in eager mode, with malloc set as the project sets it and once more with
glibc's own settings, and with --compile also through torch.compile.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measuring
from measuring import measured

from alice_jax import cli
from alice_jax.errors import UserError

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain.py"
EAGER, UNTOUCHED, COMPILED = "torch", "torch untouched", "torch.compile"
COLUMNS = {
    "compile_s": "compile s",
    "forward_s": "forward s",
    "gradients_s": "and back s",
    "update_s": "update s",
    "step_s": "step s",
    "pairs_per_s": "pairs/s",
    "peak_gib": "peak GiB",
    "tera_flop": "TFLOP",
    "share_of_bound": "of bound",
    "times_eager": "× eager",
    "times_untouched": "× untouched",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
      program: "jax", "torch" (eager), the same with malloc "untouched", or "torch.compile".
      pairs: in the batch.
      microbatch: pairs computed at once, 0 for the default: ours is the project's, PyTorch's all of them.
      remat: stages whose blocks are computed again for gradients.
    """

    program: str
    mode: str
    pairs: int
    crop: int
    width: int
    precision: str
    microbatch: int = 0
    repeats: int = 5
    remat: tuple[int, ...] = ()

    def config(self) -> Any:
        """configs/pretrain.py with these settings."""
        config = cli.recipe(f"{CONFIG}:{'release' if self.mode == 'release' else ''}")
        config.batch_size, config.microbatch, config.precision = self.pairs, self.microbatch, self.precision
        config.views.crop_shape_zyx = (self.crop,) * 3
        config.model.width = self.width
        config.model.remat = self.remat
        return config


def example_rows(config: Any) -> dict[str, Any]:
    """A batch of the configuration's size, of noise."""
    import numpy as np

    from alice_jax import tasks

    crop, grid = tasks.pretrain.check(config)
    rng, pairs = np.random.default_rng(0), config.batch_size
    return {
        "volumes": rng.random((pairs, 2, *crop, 1), np.float32),
        "hidden": rng.random((pairs, 2, *grid)) < config.views.mask_ratio,
        "weights": np.ones((pairs,), np.float32),
    }


# -------------------------------------------------------------------- what runs in a process of its own


def jax_row(case: Case) -> dict[str, Any]:
    """The project's own step: compiled and placed as `alice_jax.train` does it."""
    import jax

    from alice_jax import host, sharding, tasks, train_state

    host.give_back_memory()
    config = case.config()
    objective = tasks.pretrain.objective(config, steps_per_epoch=1)
    rows, mesh, key = example_rows(config), sharding.make_mesh(), jax.random.key(0)
    parts = sharding.parts_of_batch(case.pairs, case.microbatch, mesh)
    batch = sharding.global_parts(mesh, rows, parts)
    state = sharding.compiled_init(objective, 0, mesh)({name: value[:1] for name, value in rows.items()})
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))

    # ---- The whole step, first, so that the peak of the memory is its own
    train_step = sharding.compiled_step(objective, key, mesh, parts)

    def step() -> None:
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))

    first_s, _ = measured(step, 1)  # the second asks anew for what the first gave back with its compilers' memory
    _, step_s = measured(step, case.repeats)
    held = jax.devices()[0].memory_stats() or {}
    peak = held["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in held else measuring.main_memory_gib()

    # ---- Its parts
    part_of, finish = train_state.make_partial_steps(objective, key, parts)
    forward = jax.jit(lambda state, part: objective.loss(state.params, state.extra, part, key, state.step, True)[0])
    gradients, update = jax.jit(part_of), jax.jit(finish)
    share = gradients(state, batch[0], 0)
    _, forward_s = measured(lambda: jax.block_until_ready([forward(state, part) for part in batch]), case.repeats)
    _, gradients_s = measured(
        lambda: [jax.block_until_ready(gradients(state, part, 0)) for part in batch], case.repeats
    )
    _, update_s = measured(lambda: jax.block_until_ready(update(state, share)), case.repeats)
    flop = parts * gradients.lower(state, batch[0], 0).cost_analysis()["flops"]
    return {
        "compile_s": first_s - step_s,
        "forward_s": forward_s,
        "gradients_s": gradients_s,
        "update_s": update_s,
        "step_s": step_s,
        "peak_gib": peak,
        "tera_flop": flop / 1e12,
        "state_gigabytes": state_bytes / 1e9,
        "at_once": case.pairs // parts,
    }


def torch_row(case: Case) -> dict[str, Any]:
    """The plain PyTorch twin."""
    import torch
    import torch_step
    import torch_twin

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    config = case.config()
    dtype = torch.bfloat16 if case.precision == "bfloat16" or (case.precision == "auto" and on_gpu) else None
    twin = torch_twin.Twin(width=config.model.width, crop=case.crop).to(device)
    train_step = torch_step.TrainStep(twin, autocast=dtype, compile=case.program == COMPILED)
    cells = case.crop // 16
    parts = case.pairs // case.microbatch if case.microbatch else 1
    volumes = torch.rand(case.pairs, 2, 1, *(case.crop,) * 3, device=device)
    hidden = torch.rand(case.pairs, 2, cells, cells, cells, device=device) < config.views.mask_ratio

    def forward() -> None:
        for some, cells_hidden in zip(volumes.chunk(parts), hidden.chunk(parts), strict=True):
            train_step.forward(some, cells_hidden)

    def waiting(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            call()
            if on_gpu:
                torch.cuda.synchronize()

        return run

    first_s, step_s = measured(waiting(lambda: train_step(volumes, hidden, parts)), case.repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else measuring.main_memory_gib()
    _, forward_s = measured(waiting(forward), case.repeats)
    return {
        "compile_s": first_s - step_s,
        "forward_s": forward_s,
        "step_s": step_s,
        "peak_gib": peak,
        "at_once": case.pairs // parts,
    }


def row(case: Case) -> dict[str, Any]:
    return jax_row(case) if case.program == "jax" else torch_row(case)


# -------------------------------------------------------------------- all rows


def judged(rows: Sequence[dict[str, Any]], ceilings: dict[str, Any]) -> None:
    """Adds what follows from the measurements of all rows."""
    steps = {(r["program"], r["mode"], r["pairs"]): r["step_s"] for r in rows if "step_s" in r}
    for each in rows:
        if "step_s" not in each:
            continue
        each["pairs_per_s"] = each["pairs"] / each["step_s"]
        if "tera_flop" in each:
            computing = each["tera_flop"] / ceilings["tera_flop_per_s"]
            moving = 2 * each["state_gigabytes"] / ceilings["gigabytes_per_s"]
            each["share_of_bound"] = max(computing, moving) / each["step_s"]
        for program, column in ((EAGER, "times_eager"), (UNTOUCHED, "times_untouched")):
            if other := steps.get((program, each["mode"], each["pairs"])):
                each[column] = other / each["step_s"]


def table(rows: Sequence[dict[str, Any]], ceilings: dict[str, Any]) -> str:
    """The rows as text; what was not measured is "–"."""
    titles = "".join(f"{title:>11}" for title in COLUMNS.values())
    lines = [
        f"{ceilings['device']}, {os.cpu_count()} cores, {ceilings['precision']}: "
        f"{ceilings['tera_flop_per_s']:.3g} TFLOP/s, {ceilings['gigabytes_per_s']:.3g} GB/s",
        f"{'mode':8} {'pairs':>5} {'at once':>7} {'program':16}{titles}",
    ]
    for each in rows:
        cells = [f"{each[name]:.3g}" if name in each else "–" for name in COLUMNS]
        start = f"{each['mode']:8} {each['pairs']:5} {each.get('at_once', each['pairs']):7} {each['program']:16}"
        lines.append(start + (f"  {each['failed']}" if "failed" in each else "".join(f"{cell:>11}" for cell in cells)))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["release", "paper"], choices=["release", "paper"])
    parser.add_argument("--pairs", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="default: 1 2 4 8")
    parser.add_argument("--crop", type=int, default=64, help="voxels of a side (default: 64)")
    parser.add_argument("--width", type=int, default=48, help="of the backbone (default: 48)")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--microbatch", type=int, default=0, help="pairs at once (default: the project's; PyTorch all)")
    parser.add_argument("--remat", nargs="*", type=int, default=[], metavar="STAGE", help="blocks computed again")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls (default: 5)")
    parser.add_argument("--twin", action="store_true", help="also PyTorch, in release mode")
    parser.add_argument("--compile", action="store_true", help="with --twin, also torch.compile")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    cli.check_folder_of("--json", args.json)
    if args.compile and not args.twin:
        raise UserError("--compile: compiles the twin; add --twin")
    ceilings = measuring.alone(measuring.ceilings, args.precision)
    rows: list[dict[str, Any]] = []
    for mode in args.modes:
        programs = ["jax"]
        if args.twin and mode == "release":
            programs += [EAGER, UNTOUCHED, COMPILED] if args.compile else [EAGER, UNTOUCHED]
        for pairs in args.pairs:
            for program in programs:
                print(f"{mode} mode, {pairs} pair(s), {program} …", file=sys.stderr, flush=True)
                settings = (args.crop, args.width, args.precision, args.microbatch, args.repeats, tuple(args.remat))
                case = Case(program, mode, pairs, *settings)
                rows.append(dataclasses.asdict(case) | measuring.alone(row, case, keep_memory=program != UNTOUCHED))
                judged(rows, ceilings)
                measuring.save(args.json, {"ceilings": ceilings, "rows": rows})  # what is done stays done
    print(table(rows, ceilings))
    return 0


if __name__ == "__main__":
    cli.run(main)
