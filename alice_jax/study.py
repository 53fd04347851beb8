"""Does pretraining help? The same few labelled scans, learnt from pretrained weights and from nothing.

    python -m alice_jax.study --workdir runs/study                                      # all of it on built-in patients
    python -m alice_jax.study --workdir runs/study --store LABELLED --recipe configs/segment.py \
        --pretrained alice=runs/alice mine=weights.pth

For each number of labelled scans and each seed, every arm is trained by the same recipe, for the same steps, on the
same scans, and judged on the patients that --held-out sets aside (Dice of whole scans by sliding windows). Arms are
"scratch", each --pretrained one, and the same with the loaded weights frozen; "scratch-long" has --long-scratch steps.
Without --pretrained a ladder is pretrained first, for equal steps on --unlabelled: reconstruction alone, with the
contrast of random crops, of mined crops, with CASA.

Everything that is done stays done: the same command goes on where it stopped.

    WORKDIR/pretraining/ARM/           runs of alice_jax.train    WORKDIR/study.csv    Dice of each run, case and class
    WORKDIR/ARM/SUBSET/seed-N/         likewise, and dice.json    WORKDIR/study.json   means, differences, intervals
                                                                  WORKDIR/study.png    the same as curves
    WORKDIR/config.json                what all runs share, and what each arm starts from
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from alice_jax import builtin, checkpoint, cli, contract, host, tasks, train
from alice_jax.data import embeddings, label_maps
from alice_jax.data.segmentation_views import read_labels
from alice_jax.data.store import Store
from alice_jax.errors import UserError, check_at_least
from alice_jax.evaluation import surfaces
from alice_jax.evaluation.arms import LONG, SCRATCH, case_means, compared, table, write_dice
from alice_jax.inference.sliding import Sliding
from alice_jax.reporting import study_curves
from alice_jax.tasks import segment

FROZEN, PRETRAINING = "frozen", "pretraining"
# What each rung of the ladder has in place of its recipe's own settings. The hypothesis: none is worse than the last.
LADDER: dict[str, dict[str, Any]] = {
    "reconstruction": {"loss.invariance": 0.0, "loss.alignment": 0.0, "views.kind": "random"},
    "random-crops": {"loss.alignment": 0.0, "views.kind": "random"},
    "mined-crops": {"loss.alignment": 0.0},
    "casa": {},
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to begin: from nothing, or from weights that may be frozen."""

    name: str
    init_from: str = ""
    frozen: bool = False
    steps: int = 0  # of the fine-tuning; 0: the study's


@dataclasses.dataclass(frozen=True)
class Subset:
    """How many labelled scans are learnt from: a number of them, or a share."""

    name: str
    fields: Mapping[str, Any]

    @staticmethod
    def all_of(shots: Sequence[int], fractions: Sequence[float]) -> list["Subset"]:
        by_number = [Subset(f"{n}-shot", {"data.shots": n}) for n in shots]
        return by_number + [Subset(f"{100 * share:.6g}%", {"data.fraction": share}) for share in fractions]


def trained(config: ConfigDict, workdir: Path) -> None:
    """Runs the training loop to its end, or not at all if it has ended before."""
    if checkpoint.newest_intact(str(workdir))[0] == config.steps:
        return
    if code := train.run_on_disk(config, str(workdir)):
        sys.exit(code)


def ladder_recipe(rung: str, args: argparse.Namespace) -> ConfigDict:
    """What a rung is pretrained by."""
    return recipe_with(args.pretraining, LADDER[rung] | {"data.store": args.unlabelled}, args.pretraining_steps)


def recipe_with(name: str, fields: Mapping[str, Any], steps: int) -> ConfigDict:
    """A recipe with some fields set, and its steps unless 0; validated at the end alone, since nobody looks earlier."""
    config = cli.recipe(name, fields)
    config.steps = steps or config.steps
    config.validate_every = config.steps
    return config


def dice_of_run(config: ConfigDict, workdir: Path, store: Store, overlap: float) -> dict[str, dict[str, float]]:
    """{case: {class: Dice}} of a finished run on what it held out; what a case lacks is left out,
    and cases that lack all classes."""
    network, params, agreed = segment.load(str(workdir))
    names = label_maps.names_in(store)
    codes = segment.classes_of(config.data.classes, store, names)

    sliding = Sliding.of(network, params, agreed, overlap=overlap, batch=8)
    cases: dict[str, dict[str, float]] = {}
    for id in segment.divided(config, store)[1]:
        truth = read_labels(store, id, names)
        if not np.isin(truth, list(codes)).any():
            continue
        found = np.stack([np.asarray(plane.argmax(-1)) for plane in sliding.slices(store.read_volume(id))])
        cases[id] = {
            name: surfaces.dice(truth == code, found == number)
            for number, (code, name) in enumerate(codes.items(), 1)
            if (truth == code).any()
        }
    return cases


def fine_tuning(arm: Arm, subset: Subset, seed: int, args: argparse.Namespace) -> ConfigDict:
    """What an arm is trained by."""
    fields = {
        "seed": seed,
        "data.subset_seed": seed,
        "data.store": args.store,
        "data.validation_fraction": args.held_out,
        "init_from": arm.init_from,
        **subset.fields,
    }
    if arm.frozen:
        fields["optimizer.freeze"] = "100 %"
    return recipe_with(args.recipe, fields, arm.steps or args.steps)


def run(arm: Arm, subset: Subset, seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Trains and judges one arm on one subset with one seed, unless that was done before."""
    folder = Path(args.workdir, f"{arm.name}-{FROZEN}" if arm.frozen else arm.name, subset.name, f"seed-{seed}")
    done = folder / "dice.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    config = fine_tuning(arm, subset, seed, args)
    trained(config, folder)
    found = dice_of_run(config, folder, Store.open(args.store), args.overlap)
    partial = folder / "dice.json.partial"
    partial.write_text(json.dumps(found), encoding="utf-8")
    os.replace(partial, done)
    return found


# -------------------------------------------------------------------- before the first training


def check(arms: Sequence[Arm], subsets: Sequence[Subset], args: argparse.Namespace) -> None:
    """A `UserError` for what would otherwise stop the study after hours of it."""
    store = Store.open(args.store)
    config = fine_tuning(arms[0], subsets[0], 0, args)
    if config.data.train_scans:
        raise UserError(f"--recipe {args.recipe}: names data.train_scans, but a study draws them anew for each seed")
    names = label_maps.names_in(store)
    classes = segment.classes_of(config.data.classes, store, names)
    held_out = segment.divided(config, store)[1]
    judged = [id for id in held_out if np.isin(read_labels(store, id, names), list(classes)).any()]
    cli.say(f"judged by {len(judged)} scans; {len(held_out) - len(judged)} more held out show none of the classes")
    if len(judged) < 2:
        raise UserError(f"--held-out {args.held_out}: leaves {len(judged)} scans with labels to judge by, and an "
                        "interval needs two; give a larger share or prepare more patients")  # fmt: skip
    for subset in subsets:
        for seed in range(args.seeds):
            scans, _ = segment.divided(fine_tuning(arms[0], subset, seed, args), store)
            segment.absent_classes(store, scans, names, classes)
    for arm in arms if args.pretrained else arms[:1]:
        config = fine_tuning(arm, subsets[0], 0, args)
        task = tasks.make(config, store)
    if args.pretrained:
        return
    unlabelled = Store.open(args.unlabelled)
    codec = embeddings.read_codec(unlabelled)
    for id in unlabelled.ids():
        embeddings.read_embedding(unlabelled, id, codec)
    for rung in LADDER:
        pretraining, what = ladder_recipe(rung, args), f"--pretraining {args.pretraining}"
        contract.check(tasks.make(pretraining, unlabelled).contract, task.contract, what)
    ours, theirs = (
        segment.shapes_of(network, task.contract.crop_shape_zyx, "encode")
        for network in (segment.network_of(config, 2), tasks.pretrain.networks(pretraining).backbone)
    )
    if not ours.items() <= theirs.items():
        raise UserError(f"{what}: its backbone is not that of --recipe {args.recipe}; set the fields of model alike")


def origin(arm: Arm, args: argparse.Namespace) -> dict[str, Any]:
    """What an arm starts from: the settings of its pretraining, or a path with the step or the bytes that it holds."""
    if arm.steps:
        return {"steps": arm.steps}
    if arm.init_from and not args.pretrained:
        return {name: getattr(args, name) for name in ("pretraining", "pretraining_steps", "unlabelled")}
    if Path(arm.init_from).is_file():
        return {"path": arm.init_from, "sha256": hashlib.sha256(Path(arm.init_from).read_bytes()).hexdigest()}
    return {"path": arm.init_from, "step": checkpoint.newest_intact(arm.init_from)[0]} if arm.init_from else {}


def claim(arms: Sequence[Arm], args: argparse.Namespace) -> None:
    """Writes what all runs of a study share, and what its arms start from, into its workdir; refuses another's."""
    mine = {name: getattr(args, name) for name in ("store", "recipe", "steps", "held_out", "overlap")}
    theirs = checkpoint.read_config(args.workdir)
    for name, value in mine.items():
        if theirs and theirs.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"--workdir {args.workdir}: holds a study with {flag} {theirs.get(name)}; name another folder"
            )
    known = (theirs or {}).get("arms", {})
    origins = {arm.name: origin(arm, args) for arm in arms}
    for name, value in origins.items():
        places = (name, f"{name}-{FROZEN}", f"{PRETRAINING}/{name}")
        begun = any(Path(args.workdir, place).exists() for place in places)
        if begun and known.get(name, value) != value:
            raise UserError(
                f"--workdir {args.workdir}: its arm {name} started from {known[name]}, this one would from {value}; "
                "name another folder or another arm"
            )
    checkpoint.write_config(args.workdir, mine | {"arms": known | origins})


# -------------------------------------------------------------------- the command


def arms_of(args: argparse.Namespace) -> list[Arm]:
    """Scratch, the long one if asked for, then each pretrained one, as it is and frozen."""
    ladder = [Arm(rung, str(Path(args.workdir, PRETRAINING, rung))) for rung in LADDER]
    arms = [Arm(*text.split("=", 1)) for text in args.pretrained] or ladder
    long = [Arm(LONG, steps=args.long_scratch)] if args.long_scratch else []
    return [Arm(SCRATCH), *long, *arms, *(dataclasses.replace(arm, frozen=True) for arm in arms if args.probes)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parse(argv)
    host.settle()
    with cli.on_disk(args.workdir, "what is done stays done"):
        print(table(studied(args)))
    return 0


def studied(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Does what is missing, writes all results and returns the rows of `arms.compared`."""
    args.store = args.store or builtin.study_store("labelled", train.run_on_disk)
    if not args.pretrained:
        args.unlabelled = args.unlabelled or builtin.study_store("unlabelled", train.run_on_disk)
    arms, subsets = arms_of(args), Subset.all_of(args.shots, args.fractions)
    check(arms, subsets, args)
    claim(arms, args)
    for rung in () if args.pretrained else LADDER:
        cli.say(f"pretraining: {rung}")
        trained(ladder_recipe(rung, args), Path(args.workdir, PRETRAINING, rung))
    runs: dict[tuple[str, str], list[dict[str, dict[str, float]]]] = {}
    began, count, total = time.perf_counter(), 0, len(arms) * len(subsets) * args.seeds
    for arm in arms:
        for subset in subsets:
            name = f"{arm.name}, {FROZEN}" if arm.frozen else arm.name
            for seed in range(args.seeds):
                runs.setdefault((name, subset.name), []).append(run(arm, subset, seed, args))
                count += 1
                left = (time.perf_counter() - began) / count * (total - count)
                cli.say(
                    f"{count} of {total} runs done, about {left / 60:.0f} min left: {name}, {subset.name}, seed {seed}"
                )
    rows = compared({key: case_means(seeds) for key, seeds in runs.items()}, list(LADDER))
    folder = Path(args.workdir)
    write_dice(folder / "study.csv", runs)
    (folder / "study.json").write_text(json.dumps({"seeds": args.seeds, "rows": rows}, indent=1), encoding="utf-8")
    (folder / "study.png").write_bytes(study_curves.draw(rows))
    return rows


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m alice_jax.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where everything is kept")
    parser.add_argument("--store", metavar="DIR", help="with labels (default: built-in patients)")
    parser.add_argument("--recipe", default="configs/segment.py:tiny", help="of the fine-tuning (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="of the fine-tuning (default: the recipe's)")
    parser.add_argument("--shots", type=int, nargs="*", default=[1, 5, 10], help="labelled scans (default: 1 5 10)")
    parser.add_argument("--fractions", type=float, nargs="*", default=[], help="or shares of them")
    parser.add_argument("--held-out", type=float, default=0.5, help="share of the patients to judge by (default: 0.5)")
    parser.add_argument("--overlap", type=float, default=0.5, help="of the windows, from 0 to below 1 (default: 0.5)")
    parser.add_argument("--seeds", type=int, default=3, help="of subsets and trainings (default: 3)")
    parser.add_argument(
        "--long-scratch", type=int, default=0, metavar="STEPS", help="an arm more: from nothing, of so many steps"
    )
    parser.add_argument("--no-probes", dest="probes", action="store_false", help="without frozen weights")
    parser.add_argument("--pretrained", nargs="+", default=[], metavar="NAME=PATH", help="runs or exported weights")
    parser.add_argument("--unlabelled", metavar="DIR", help="store to pretrain the ladder on (default: built-in)")
    parser.add_argument(
        "--pretraining", default="configs/pretrain.py:tiny", help="of the ladder (default: %(default)s)"
    )
    parser.add_argument("--pretraining-steps", type=int, default=0, help="of each rung (default: the recipe's)")
    args = parser.parse_args(argv)
    given = [text.partition("=") for text in args.pretrained]
    taken = [SCRATCH, LONG, PRETRAINING]
    for name, _, path in given:
        if not (re.fullmatch(r"[\w-]+", name) and path):
            raise UserError(f"--pretrained {name}: give NAME=PATH, such as alice=runs/alice")
        if name in taken or name.endswith(FROZEN):
            raise UserError(f"--pretrained {name}={path}: {name} names another arm; choose another name")
        taken.append(name)
    for flag, least in (("seeds", 1), ("steps", 0), ("pretraining_steps", 0), ("long_scratch", 0)):
        check_at_least(least, f"--{flag.replace('_', '-')}", getattr(args, flag))
    for flag in ("overlap", "held_out"):
        if not 0 <= getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give a share from 0 to below 1")
    names = [subset.name for subset in Subset.all_of(args.shots, args.fractions)]
    if min(args.shots, default=1) < 1 or len(set(names)) < len(names) or not names:
        subsets = f"--shots {args.shots} --fractions {args.fractions}"
        raise UserError(f"{subsets}: give numbers of 1 or more, or shares, each but once")
    return args


if __name__ == "__main__":
    cli.run(main)
