"""Kills a training at random moments, starts it again with the same command, and compares it with one left alone.

    python benchmarks/faults.py [--kills 50] [--config FILE] [--store DIR] [--seed 0] [--json FILE]

Each kill is a SIGKILL to a real process of the training command: while it starts, between two steps, or while it writes
a checkpoint. After each, what was logged must be what the undisturbed run logged, number for number, and every batch
fetched must be the same, with scans, points and masks; when the run has reached its end, so must parameters, teacher,
centers, optimizer state and coverage. Runs follow one another until there were enough kills.
"""

import argparse
import collections
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import measuring
import numpy as np
from recorded_train import fetched

from alice_jax import builtin, checkpoint, cli, coverage, metrics, provenance

ROOT = Path(__file__).parents[1]
TIMES = ("step_time_s", "data_wait_s", "volumes_per_s")
MOMENTS = ("starting", "stepping", "saving")
STATE = ("step", "params", "extra", "opt_state")
PATIENCE_S = 600.0  # for any one thing that a run is waited for


def start(arguments: Sequence[str], workdir: str) -> subprocess.Popen[str]:
    """A recorded training in a process of its own; the workdir exists from then on."""
    Path(workdir).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "recorded_train.py"), *arguments, f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def finish(arguments: Sequence[str], workdir: str) -> None:
    """Runs it to its end."""
    process = start(arguments, workdir)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors


def logged(workdir: str) -> list[dict[str, float]]:
    """What a run has logged, without what no two runs share: times."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics.read(workdir)]


def saving(workdir: str, since: float) -> bool:
    """Whether a checkpoint is being written that was begun after that time."""
    partial = (Path(workdir) / "checkpoints").glob("*.orbax-checkpoint-tmp")
    with contextlib.suppress(FileNotFoundError):  # just completed
        return any(path.stat().st_mtime >= since for path in partial)
    return False


def kill(arguments: Sequence[str], workdir: str, moment: str, draw: random.Random) -> str | None:
    """Starts it and kills it at a random instant of that kind.

    Returns:
      What the kill hit: the moment, but "saving" whenever a checkpoint is left half written; None where the run came to
      its end before.
    """
    began, before, process = time.time(), len(fetched(workdir)), start(arguments, workdir)
    deadline = time.monotonic() + PATIENCE_S

    def wait_until(condition: Any) -> None:
        while not condition() and process.poll() is None:
            assert time.monotonic() < deadline, f"{moment}: nothing happened for {PATIENCE_S:g} s"
            time.sleep(0.002)

    if moment == "starting":
        time.sleep(draw.uniform(0, 8))
    else:
        wait_until(lambda: len(fetched(workdir)) > before)
        if moment == "stepping":
            time.sleep(draw.uniform(0, 3))
        else:
            for _ in range(draw.randrange(1, 4)):  # the first to third checkpoint that it writes
                wait_until(lambda: not saving(workdir, began))
                wait_until(lambda: saving(workdir, began))
            time.sleep(draw.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode != -signal.SIGKILL:
        return None
    return "saving" if saving(workdir, began) else moment


def differences(workdir: str, whole: str) -> list[str]:
    """In what a run, killed or finished, differs from the undisturbed one."""
    found = []
    lines, expected = logged(workdir), logged(whole)
    if lines != expected[: len(lines)]:
        found.append("what was logged")
    if fetched(workdir).items() - fetched(whole).items():
        found.append("batches")
    return found


def final_differences(workdir: str, whole: str) -> list[str]:
    """The same for runs that have reached their end: also what they left behind."""
    found = differences(workdir, whole)
    if len(logged(workdir)) != len(logged(whole)):
        found.append("how much was logged")
    (_, state), (_, expected) = (checkpoint.restore_arrays(run, parts=STATE) for run in (workdir, whole))
    found += [
        name
        for name in STATE
        if not jax.tree.all(jax.tree.map(np.array_equal, state[name], expected[name]))
        or jax.tree.structure(state[name]) != jax.tree.structure(expected[name])
    ]
    if coverage.read(workdir) != coverage.read(whole):
        found.append("coverage")
    return found


def kill_runs(arguments: Sequence[str], folder: str, moments: Sequence[str], draw: random.Random) -> dict[str, Any]:
    """Kills at these moments, in as many runs as it takes, each of which is then finished; the tally."""
    whole = str(Path(folder) / "undisturbed")
    finish(arguments, whole)
    tally: dict[str, Any] = {"kills": collections.Counter(), "resumed_exactly": 0, "differences": []}
    waiting = list(moments)
    for run in range(len(moments)):
        workdir, killed = str(Path(folder) / f"killed-{run}"), 0
        while waiting and (hit := kill(arguments, workdir, waiting[0], draw)):
            tally["kills"][hit] += 1
            waiting.pop(0)
            killed += 1
            found = differences(workdir, whole)
            number = sum(tally["kills"].values())
            print(f"kill {number}, {hit}: {describe(workdir)}; differs in {found or 'nothing'}", flush=True)
            tally["differences"] += [f"run {run}, kill {killed}: {what}" for what in found]
        finish(arguments, workdir)
        found = final_differences(workdir, whole)
        starts = [entry["step"] for entry in provenance.read(workdir)]
        print(f"run {run} finished after {killed} kills, starts at {starts}: differs in {found or 'nothing'}")
        tally["differences"] += [f"run {run}, at its end: {what}" for what in found]
        tally["resumed_exactly"] += 0 if found else killed
        if not waiting:
            break
    return tally


def describe(workdir: str) -> str:
    batches = max((step for step, _ in fetched(workdir)), default=None)
    steps = sorted(path.name for path in (Path(workdir) / "checkpoints").glob("*"))
    return f"batch {batches} fetched, checkpoints {', '.join(steps) or 'none'}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument("--config", default="tests/configs/small.py", help="default: tests/configs/small.py")
    parser.add_argument("--store", metavar="DIR", help="with embeddings (default: the built-in cohort)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="write the tally there too")
    args = parser.parse_args(argv)
    cli.check_folder_of("--json", args.json)
    draw = random.Random(args.seed)
    arguments = [f"--config={args.config}", f"--config.data.store={args.store or builtin.store_path()}"]
    arguments += ["--config.steps=60", "--config.checkpoint_every=3", "--config.log_every=2"]
    arguments += ["--config.batch_size=4", "--config.microbatch=4", "--config.validate_every=30"]
    moments = [draw.choice(MOMENTS) for _ in range(args.kills)]
    with tempfile.TemporaryDirectory() as folder:
        tally = kill_runs(arguments, folder, moments, draw)
    print(json.dumps(tally, indent=1))
    measuring.save(args.json, tally)
    return 1 if tally["differences"] else 0


if __name__ == "__main__":
    cli.run(main)
