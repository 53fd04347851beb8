"""What is kept of an update that had a number which is not finite, and how many of them a run may leave out.

WORKDIR/broken/<step>/batch-<process>-of-<processes>.npz   that process's rows, the names of their scans, the metrics
WORKDIR/broken/<step>/checkpoints/<step - 1>/              the state before the update
"""

import dataclasses
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alice_jax import checkpoint, numerics
from alice_jax.errors import UserError
from alice_jax.train_state import TrainState

FILE = "batch-{}-of-{}.npz"


@dataclasses.dataclass(frozen=True)
class Update:
    """An update that was left out.

    Attributes:
      step: the run's step after it.
      parts: in which its batch was computed one after another.
      rows: one dictionary of arrays `(rows, …)` for each process.
      scans: `(samples, …)` names, in the order of the rows.
      metrics: of the step, over all processes.
    """

    step: int
    parts: int
    rows: Sequence[Mapping[str, np.ndarray]]
    scans: np.ndarray
    metrics: Mapping[str, float]

    def batch(self) -> list[dict[str, np.ndarray]]:
        """The parts of the global batch, each as the devices of all processes held it."""
        return [
            {name: np.concatenate([rows[name][part :: self.parts] for rows in self.rows]) for name in self.rows[0]}
            for part in range(self.parts)
        ]

    def samples(self) -> list[dict[str, np.ndarray]]:
        """Batches of one sample each, in the order of `scans`."""
        return [
            {name: values[i : i + 1] for name, values in rows.items()}
            for rows in self.rows
            for i in range(len(next(iter(rows.values()))))
        ]


class Watch:
    """Writes down each update with a number that is not finite, and stops the run when there are too many.

    Args:
      allowed: how many a run may leave out in all.
      start: the step from which the run goes on; what was left out before counts.
      scans: names, in the order that samples number them.
      parts: of a batch.
    """

    def __init__(self, workdir: str, *, allowed: int, start: int, scans: Sequence[str], parts: int):
        self._workdir, self._allowed, self._scans, self._parts = workdir, allowed, np.array(scans), parts
        self.skipped = sum(step <= start for step in steps(workdir))

    def examine(self, step: int, metrics: Mapping[str, float], state: TrainState, rows: Mapping[str, Any]) -> str:
        """A line to say if the update to `step` was left out; a `UserError` if it was one too many.

        Args:
          metrics: of that update.
          state: after it.
          rows: this process's part of its batch, with "meta".
        """
        broken = numerics.not_finite(metrics)
        if not broken:
            return ""
        scans = self._scans[rows["meta"]["scans"]]
        arrays = {name: values for name, values in rows.items() if name != "meta"}
        what = f"step {step}: {', '.join(broken)} not finite, with the scans {', '.join(np.unique(scans))}"
        try:
            write(self._workdir, Update(step, self._parts, [arrays], scans, metrics), state)
        except (OSError, ValueError) as error:
            raise UserError(f"{what}; stopped, since its batch could not be written: {error}") from error
        where = f"python -m alice_jax.reproduce --workdir {self._workdir} --step {step}"
        if self.skipped >= self._allowed:
            before = f", {self.skipped} before it were left out" if self.skipped else ""
            raise UserError(
                f"{what}; nothing of it is in the state{before}; see where it comes from by {where}; lower "
                f"optimizer.lr, mend these scans or raise numerics.skip (now {self._allowed}), then run the same "
                "command to go on from the last checkpoint"
            )
        self.skipped += 1
        return f"{what}; left out, {self.skipped} of at most {self._allowed}; see where it comes from by {where}"


def folder(workdir: str, step: int) -> Path:
    return Path(workdir) / "broken" / f"{step}"


def steps(workdir: str) -> list[int]:
    """Of all updates that were left out."""
    folders = {path.parent.name for path in Path(workdir).glob(f"broken/*/{FILE.format(0, '*')}")}
    return sorted(int(name) for name in folders if name.isdigit())


def write(workdir: str, update: Update, state: TrainState) -> None:
    """Writes this process's rows and the state before the update; every process must call it.

    Args:
      state: after the update, which changed nothing but its step.
    """
    place = folder(workdir, update.step)
    with checkpoint.Checkpoints(str(place), keep=1) as checkpoints:
        checkpoints.save(update.step - 1, dataclasses.replace(state, step=state.step - 1))
    write_rows(place / FILE.format(jax.process_index(), jax.process_count()), update)


def write_rows(path: Path, update: Update) -> None:
    """Writes the rows of one process in one piece."""
    arrays = {"step": np.array(update.step), "parts": np.array(update.parts), "scans": update.scans}
    arrays |= {f"rows/{name}": values for name, values in update.rows[0].items()}
    arrays |= {f"metrics/{name}": np.array(value) for name, value in update.metrics.items()}
    with open(f"{path}.partial", "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    os.replace(f"{path}.partial", path)


def read(workdir: str, step: int | None = None) -> Update:
    """An update that was left out, with the rows of all processes; the newest if `step` is None."""
    found = steps(workdir)
    if not found:
        raise UserError(f"--workdir {workdir}: no update of this run was broken; there is nothing to reproduce")
    step = found[-1] if step is None else step
    if step not in found:
        raise UserError(f"--step {step}: {workdir} has broken updates of the steps {found}")
    place = folder(workdir, step)
    first = next(place.glob(FILE.format(0, "*")))
    processes = int(first.stem.split("-")[-1])
    files = [_arrays(place / FILE.format(process, processes)) for process in range(processes)]
    return Update(
        step=step,
        parts=int(files[0]["parts"]),
        rows=[_under("rows/", file) for file in files],
        scans=np.concatenate([file["scans"] for file in files]),
        metrics={name: float(value) for name, value in _under("metrics/", files[0]).items()},
    )


def state_before(workdir: str, step: int, like: TrainState) -> TrainState:
    """The state before the update to `step`, with the shapes and shardings of `like`."""
    with checkpoint.Checkpoints(str(folder(workdir, step))) as checkpoints:
        if checkpoints.latest_step is None:
            raise UserError(f"{folder(workdir, step)}: holds no state; let the run break there again")
        return checkpoints.restore(step - 1, like)[0]


def _under(start: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}); let the run break there again") from None
