"""Weights of one network as the start of another: what fits by name and shape is taken, and all is accounted for."""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alice_jax import checkpoint
from alice_jax.contract import Contract
from alice_jax.errors import UserError
from alice_jax.interop import names, torch_file
from alice_jax.interop.backbones import TRANSLATIONS

LEAST_SHARE = 0.9  # of the wanted values; with less it is another network
WHICH = ("teacher", "student")
Values = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A backbone as somebody trained it.

    Attributes:
      values: by the name of the parameter, which begins with "backbone/".
      model: its kind and sizes, as in a configuration.
      contract: how scans were prepared for it.
      position_index: of its windows, "correct" or "release".
      precision: of the computation, as in a configuration.
      position_table: whether release mode added a fixed one to its first tokens, which is none of the values.
      what: names it for the user.
    """

    values: Values
    model: Mapping[str, Any]
    contract: Contract
    position_index: str
    precision: str
    position_table: bool
    what: str


def read(path: str, which: str = "teacher", field: str = "init_from") -> Pretrained:
    """The backbone of a run's workdir, or of a PyTorch file that `alice_jax.export` wrote.

    Args:
      which: of the two networks of a pretraining run; others have one.
      field: names the setting that gave the path, in errors.
    """
    if which not in WHICH:
        raise UserError(f"which {which!r}: choose {' or '.join(WHICH)}")
    if "://" in path or os.path.isdir(path):
        return _of_run(path, which, field)
    if not os.path.isfile(path):
        raise UserError(f"{field} {path}: is not there; give the folder of a run, or a file of alice_jax.export")
    return _of_file(Path(path), field)


def _of_run(workdir: str, which: str, field: str) -> Pretrained:
    config, state = checkpoint.restore_arrays(workdir, parts=("params", "extra", "host"), field=field)
    pretraining = config.get("objective") == "alice"
    networks = state["extra"]["teacher"] if pretraining and which == "teacher" else state["params"]
    if "backbone" not in networks:
        raise UserError(f"{field} {workdir}: objective {config.get('objective')!r} has no backbone to start from")
    release = pretraining and config["method"]["mode"] == "release"
    what = f"{field} {workdir}" + (f" ({which})" if pretraining else "")
    return Pretrained(
        values=_named(networks["backbone"]),
        model=config["model"],
        contract=Contract.from_json(state["host"].get("contract"), what),
        position_index="release" if release else config["model"].get("position_index", "correct"),
        precision=config["precision"],
        position_table=release,
        what=what,
    )


def _of_file(path: Path, field: str) -> Pretrained:
    what, sidecar = f"{field} {path}", path.with_name(f"{path.name}.json")
    tensors = torch_file.load(str(path))
    try:
        about = json.loads(sidecar.read_text(encoding="utf-8"))
        sizes, index = dict(about["model"]), about.get("relative_position_index", "correct")
        kind = sizes.pop("backbone", "nnformer")
        translation = TRANSLATIONS[kind]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{what}: {sidecar.name}, which says how to use it, cannot be read ({error!r}); "
                        "export the weights again") from None  # fmt: skip
    return Pretrained(
        values=_named(translation.from_torch(tensors)),
        model={"backbone": kind, kind: sizes, **sizes},
        contract=Contract.from_json(about, what),
        position_index=index,
        precision="auto",
        position_table="position_embedding" in about,
        what=what,
    )


def _named(tree: Mapping[str, Any]) -> Values:
    return {name: np.asarray(value) for name, value in names.leaves(tree, "backbone/")}


# -------------------------------------------------------------------- into another network


@dataclasses.dataclass(frozen=True)
class Fit:
    """What of `Pretrained` fits a network.

    Attributes:
      taken: values by name.
      share: of the wanted values of the network.
      left_out: names of what the network has no place for.
      new: names of what stays random.
      position_table: whether the weights were trained with a fixed one, which is left out too.
    """

    taken: Values
    share: float
    left_out: tuple[str, ...]
    new: tuple[str, ...]
    position_table: bool = False

    def account(self, what: str) -> str:
        """One line for the user."""
        table = "; trained with the fixed position table of release mode, which is not added here"
        return (
            f"{what}: {len(self.taken)} tensors taken, {self.share:.1%} of the backbone's values; "
            f"left out: {_list(self.left_out)}; new: {_list(self.new)}{table if self.position_table else ''}"
        )


def fit(source: Pretrained, shapes: Mapping[str, tuple[int, ...]], wanted: Collection[str] | None = None) -> Fit:
    """What of `source` a network takes over.

    Args:
      shapes: of the network's parameters by name.
      wanted: names of those to take; by default all.

    Raises:
      UserError: less than `LEAST_SHARE` of the wanted values fit.
    """
    wanted = set(shapes if wanted is None else wanted)
    same = {name for name in wanted if name in source.values and source.values[name].shape == shapes[name]}
    sizes = {name: int(np.prod(shapes[name])) for name in wanted}
    share = sum(sizes[name] for name in same) / sum(sizes.values())
    if share < LEAST_SHARE:
        first = max(wanted - same, key=lambda name: (name in source.values, sizes[name]))
        there = source.values[first].shape if first in source.values else "none"
        raise UserError(
            f"{source.what}: {share:.0%} of the backbone's values match ({first} is {there} there and {shapes[first]} "
            "here), so it is another architecture; set the fields of model to those of that run, or "
            "init_parts to encoder where the decoder alone differs, as Primus's does with the number of classes"
        )
    return Fit(
        taken={name: source.values[name] for name in shapes if name in same},
        share=share,
        left_out=tuple(name for name in source.values if name not in same),
        new=tuple(name for name in shapes if name not in same),
        position_table=source.position_table,
    )


def _list(all_names: Collection[str], most: int = 6) -> str:
    """Names by their module, "none" for none."""
    modules = list(dict.fromkeys(name.removeprefix("backbone/").rsplit("/", 1)[0] for name in all_names))
    more = f" and {len(modules) - most} more" if len(modules) > most else ""
    return (", ".join(modules[:most]) or "none") + more
