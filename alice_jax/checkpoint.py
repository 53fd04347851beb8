"""Checkpoints of a workdir through Orbax.

WORKDIR/config.json            the configuration of the run
WORKDIR/checkpoints/<step>/    the whole `TrainState` after that many updates, and
    host.json                  what the host had counted by then
    checksums.json             SHA-256 of every file that holds any of it

A checkpoint appears under its name in one piece, checksums included, and only after that may an older one go. One whose
files are not as they were written is never read: the newest that is intact takes its place.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from alice_jax.errors import Stalled, UserError

Tree = Any
HOST, CHECKSUMS = "host.json", "checksums.json"

# A failed write becomes one line here. Orbax logs its traceback, and TensorStore tells the event loop, which Orbax has
# closed by then, of the writes that were under way beside it.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
_show_unraisable = sys.unraisablehook


def _unless_loop_is_closed(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        _show_unraisable(unraisable)


sys.unraisablehook = _unless_loop_is_closed


def _directory(workdir: str, field: str = "--workdir") -> Path:
    if "://" in workdir:
        raise UserError(f"{field} {workdir}: mount the bucket and give a folder in it, see launch/README.md")
    return Path(os.path.abspath(workdir))


class Checkpoints:
    """Writes and restores the states of one run; use as a context manager, which waits for pending writes.

    Damaged checkpoints that are newer than an intact one are renamed at the start, so that their steps can be written
    again.
    """

    def __init__(self, workdir: str, keep: int = 3):
        self._workdir, self._keep = workdir, keep
        self._folder = _directory(workdir) / "checkpoints"
        self._pending = (0, "")  # the step being written and its host's part
        self._failed = False
        if jax.process_index() == 0:
            for step in newest_intact(workdir)[1]:
                aside = self._folder / f"{step}.damaged"
                if aside.exists():
                    shutil.rmtree(aside)
                (self._folder / str(step)).rename(aside)
        multihost_utils.sync_global_devices("damaged checkpoints are out of the way")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,  # of a run that was killed while it wrote
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        with self._naming_faults():
            self._manager = ocp.CheckpointManager(
                self._folder, options=options, item_handlers=ocp.PyTreeCheckpointHandler()
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._failed:
            with self._naming_faults():
                self._manager.close()

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def check_space(self, shapes: Tree) -> None:
        """A `UserError` where the disk has no room for as many states as are kept, and the one being written."""
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
        held = sum(file.stat().st_size for step in _steps(self._folder) for file in _files(self._folder / str(step)))
        free = shutil.disk_usage(self._folder).free
        if held + free < (self._keep + 1) * size:
            raise UserError(
                f"--workdir {self._workdir}: {self._keep} checkpoints and the next one need "
                f"{(self._keep + 1) * size / 1e6:,.0f} MB and {(held + free) / 1e6:,.0f} MB are there; free some, "
                "lower keep_checkpoints or name a folder on another disk"
            )

    def save(self, step: int, state: Tree, host: Tree = None) -> None:
        """Copies the state off the devices, then writes in the background; an older one goes only after a commit.

        Args:
          host: what to remember beside the state, of JSON's types.
        """
        if step == self.latest_step:
            return
        with self._naming_faults():
            self._manager.wait_until_finished()
            self._pending = (step, json.dumps(host))
            self._manager.save(step, args=ocp.args.PyTreeSave(state))

    def _seal(self) -> None:
        """Completes what Orbax has written, before it gets its name."""
        step, host = self._pending
        folder = self._folder / f"{step}{ocp.utils.TMP_DIR_SUFFIX}"
        (folder / HOST).write_text(host)
        (folder / CHECKSUMS).write_text(json.dumps(checksums(folder), indent=1))

    def restore(self, step: int, like: Tree) -> tuple[Tree, Tree]:
        """State and host's part of that step, with the shapes and shardings of `like` (`jax.ShapeDtypeStruct`s)."""
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        state = self._manager.restore(step, args=ocp.args.PyTreeRestore(item=like, restore_args=restore_args))
        return state, json.loads((self._folder / str(step) / HOST).read_text())

    @contextlib.contextmanager
    def _naming_faults(self) -> Iterator[None]:
        """What Orbax and TensorStore make of a full disk or a folder that is gone becomes one line.

        Their threads may wait for what was not written for another 20 minutes.
        """
        try:
            yield
        except Exception as error:
            self._failed = True
            left = max(_steps(self._folder), default=None)
            rest = "there is none before it" if left is None else f"the last one, of step {left}, is untouched"
            reason = " ".join(str(error).split())[-200:]  # TensorStore's texts end with what the system said
            raise Stalled(
                f"--workdir {self._workdir}: a checkpoint cannot be written ({reason}); {rest}; see to space and "
                "permissions, then run the same command again"
            ) from error


def _steps(folder: Path) -> list[int]:
    """Of the checkpoints that were completed, oldest first."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def _files(folder: Path) -> list[Path]:
    """All files below a folder."""
    below = (_files(path) if path.is_dir() else [path] for path in sorted(folder.iterdir()))
    return [file for files in below for file in files]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 by file of a checkpoint, but for those of Orbax that hold times alone and that it writes at the end."""
    unchecked = (folder / CHECKSUMS, folder / "_CHECKPOINT_METADATA", folder / "commit_success.txt")
    return {file.relative_to(folder).as_posix(): _digest(file) for file in _files(folder) if file not in unchecked}


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        written = json.loads((folder / CHECKSUMS).read_text())
        for name, digest in written.items():
            if _digest(folder / name) != digest:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{CHECKSUMS}: {error}"
    return None


def newest_intact(workdir: str, field: str = "--workdir") -> tuple[int | None, list[int]]:
    """The newest checkpoint whose files are as they were written, and the damaged ones that are newer, of which it says
    what is wrong; (None, []) where there is none at all, and a `UserError` where none is intact."""
    folder = _directory(workdir, field) / "checkpoints"
    faults: dict[int, str] = {}
    for step in reversed(_steps(folder)):
        if not (fault := damage(folder / str(step))):
            break
        faults[step] = fault
    else:
        step = None
    if not faults:
        return step, []
    named = ", ".join(f"step {damaged}: {fault}" for damaged, fault in faults.items())
    if step is None:
        raise UserError(
            f"{field} {workdir}: no checkpoint is intact ({named}); put back a copy of one, or start anew in another "
            "folder"
        )
    print(f"damaged checkpoints are passed over ({named}); the newest intact one is of step {step}", file=sys.stderr)
    return step, list(faults)


def write_config(workdir: str, config: dict[str, Any]) -> None:
    """Writes WORKDIR/config.json in one piece."""
    path = _directory(workdir) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("config.json.partial")
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    temporary.replace(path)


def read_config(workdir: str, field: str = "--workdir") -> dict[str, Any] | None:
    """The configuration that a run in this workdir was started with, or None."""
    path = _directory(workdir, field) / "config.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or not even text
        raise UserError(
            f"{field} {workdir}: its config.json is damaged ({error}); restore it or choose another"
        ) from None


def restore_arrays(
    workdir: str,
    step: int | None = None,
    parts: Sequence[str] = ("step", "params", "extra"),
    field: str = "--workdir",
) -> tuple[dict[str, Any], Tree]:
    """Configuration and state of a run as plain numpy arrays, whatever devices wrote it.

    Args:
      step: which checkpoint; the newest intact one by default.
      parts: fields of the state; "host" is what the host remembered beside it.
      field: names the setting that gave the workdir, in errors.

    Returns:
      (config, {part: arrays}).
    """
    config = read_config(workdir, field)
    if config is None:
        raise UserError(f"{field} {workdir}: holds no run; give the folder that `alice_jax.train --workdir` wrote")
    folder = _directory(workdir, field) / "checkpoints"
    if step is None:
        step, _ = newest_intact(workdir, field)
        if step is None:
            raise UserError(f"{field} {workdir}: no checkpoint yet; let the run reach its first one")
    elif step not in _steps(folder):
        raise UserError(f"--step {step}: {workdir} has checkpoints of the steps {_steps(folder)}")
    elif fault := damage(folder / str(step)):
        raise UserError(f"--step {step}: this checkpoint of {workdir} is damaged ({fault}); choose another step")
    # Not through the manager, which would expect all processes of a run to take part.
    handler, path = ocp.PyTreeCheckpointHandler(), folder / str(step) / "default"
    metadata = handler.metadata(path).tree
    wanted = {name: metadata[name] for name in parts if name != "host"}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    state = handler.restore(path, args=arguments)
    if "host" in parts:
        state["host"] = json.loads((path.parent / HOST).read_text()) or {}
    return config, state
