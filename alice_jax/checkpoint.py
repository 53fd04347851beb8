"""Checkpoints of a workdir through Orbax.

WORKDIR/config.json            the configuration of the run
WORKDIR/checkpoints/<step>/    the whole `TrainState` after that many updates
"""

import json
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from alice_jax.errors import UserError

Tree = Any


def _directory(workdir: str) -> epath.Path:
    return epath.Path(workdir if "://" in workdir else os.path.abspath(workdir))


class Checkpoints:
    """Writes and restores the states of one run; use as a context manager, which waits for pending writes."""

    def __init__(self, workdir: str, keep: int = 3):
        self._workdir = workdir
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            _directory(workdir) / "checkpoints", options=options, item_handlers=ocp.PyTreeCheckpointHandler()
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Tree) -> None:
        """Copies the state off the devices, then writes in the background; an older one goes only after a commit."""
        if step != self.latest_step:
            self._manager.save(step, args=ocp.args.PyTreeSave(state))

    def restore(self, step: int, like: Tree) -> Tree:
        """The state of that step, with the shapes and shardings of `like` (`jax.ShapeDtypeStruct`s)."""
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        return self._manager.restore(step, args=ocp.args.PyTreeRestore(item=like, restore_args=restore_args))

    def restore_arrays(self, step: int | None, parts: tuple[str, ...]) -> Tree:
        """Those parts of a state as numpy arrays, whatever devices wrote it; the newest step if None."""
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"--workdir {self._workdir}: no checkpoint yet; let the run reach its first one")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(f"--step {step}: {self._workdir} has checkpoints of the steps {steps}")
        metadata = self._manager.item_metadata(step).tree
        wanted = {name: metadata[name] for name in parts}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        return self._manager.restore(step, args=arguments)


def write_config(workdir: str, config: dict[str, Any]) -> None:
    """Writes WORKDIR/config.json in one piece."""
    path = _directory(workdir) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("config.json.partial")
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    temporary.replace(path)


def read_config(workdir: str) -> dict[str, Any] | None:
    """The configuration that a run in this workdir was started with, or None."""
    path = _directory(workdir) / "config.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"--workdir {workdir}: its config.json is damaged ({error}); restore it or choose another"
        ) from None


def restore_arrays(workdir: str, step: int | None = None) -> tuple[dict[str, Any], Tree]:
    """Configuration and state of a run as plain numpy arrays, whatever devices wrote it.

    Args:
      step: which checkpoint; the newest by default.

    Returns:
      (config, {"step", "params", "extra"}).
    """
    config = read_config(workdir)
    if config is None:
        raise UserError(f"--workdir {workdir}: holds no run; give the folder that `alice_jax.train --workdir` wrote")
    with Checkpoints(workdir) as checkpoints:
        return config, checkpoints.restore_arrays(step, ("step", "params", "extra"))
