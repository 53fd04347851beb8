"""What a run says while it runs: JSON lines, TensorBoard events and a progress bar, from one process only."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping

import numpy as np
import tqdm

ON_BAR = ("loss", "step_time_s", "data_wait_s")


class Metrics:
    """Averages scalars between two log points and writes them to WORKDIR/metrics.jsonl and WORKDIR/tensorboard/.

    On resuming, what was logged after the restored step is dropped, so that every step is logged once.

    Args:
      since: `since_logged` of the run that this one goes on from.
    """

    def __init__(
        self,
        workdir: str,
        *,
        first_step: int,
        total_steps: int,
        log_every: int,
        since: Mapping[str, list[float]] | None = None,
        enabled: bool = True,
    ):
        self._log_every, self._enabled = log_every, enabled
        self.since_logged = {name: list(values) for name, values in (since or {}).items()}  # each step's scalars
        self._path = os.path.join(workdir, "metrics.jsonl")
        if not enabled:
            return
        import tensorboardX  # here, since it takes a second where PyTorch is installed, which it then loads

        os.makedirs(workdir, exist_ok=True)
        _drop_after(self._path, first_step)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._events = tensorboardX.SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=first_step or None)
        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )

    def step(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the scalars of the update that led to `step`."""
        if not self._enabled:
            return
        for name, value in scalars.items():
            self.since_logged.setdefault(name, []).append(float(value))
        self._bar.set_postfix({name: f"{scalars[name]:.3g}" for name in ON_BAR if name in scalars}, refresh=False)
        self._bar.update()
        if step % self._log_every == 0 or step == self._bar.total:
            self.write(step, {name: float(np.mean(values)) for name, values in self.since_logged.items()})
            self.since_logged.clear()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line and one set of events; a number that is not finite is written as null."""
        if not self._enabled:
            return
        line = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self._enabled:
            self._bar.write(text, file=sys.stderr)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._bar.close()
            self._file.close()
            self._events.close()


def read(workdir: str) -> list[dict[str, float]]:
    """The lines of WORKDIR/metrics.jsonl; one that was cut off by a crash is left out."""
    path = os.path.join(workdir, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def _drop_after(path: str, step: int) -> None:
    """Keeps the lines up to `step`."""
    if os.path.exists(path):
        kept = [line for line in read(os.path.dirname(path)) if line["step"] <= step]
        temporary = f"{path}.partial"
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        os.replace(temporary, path)
