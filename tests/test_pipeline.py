"""Batch k is a pure function of (seed, k), whatever computes it."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import traceback

import numpy as np
import pytest

from alice_jax.data.pipeline import Samples, batches
from alice_jax.errors import Stalled, UserError


def echo(record, rng, batch_rng):
    """A sample that shows what it was given."""
    return {"record": np.int32(record), "own": rng.random(), "shared": batch_rng.random(), "meta": {"n": np.int32(1)}}


SAMPLES = Samples(echo, records=7, seed=3, global_batch=4, steps=6)


def content(samples, **options):
    return [
        {name: batch[name].tolist() for name in ("record", "own", "shared")} for batch in batches(samples, **options)
    ]


def test_same_seed_same_batches_and_another_seed_others():
    assert content(SAMPLES) == content(SAMPLES)
    assert content(SAMPLES) != content(dataclasses.replace(SAMPLES, seed=4))


def test_every_epoch_uses_each_record_once():
    records = [record for batch in content(SAMPLES) for record in batch["record"]]
    assert sorted(records[:7]) == sorted(records[7:14]) == list(range(7))
    assert records[:7] != records[7:14]


def test_samples_have_their_own_numbers_and_share_the_batch_stream():
    for batch in content(SAMPLES):
        assert len(set(batch["own"])) == 4 and len(set(batch["shared"])) == 1


@pytest.mark.parametrize("start", [1, 4])
def test_starting_later_skips_nothing_else(start):
    assert content(SAMPLES, start_step=start) == content(SAMPLES)[start:]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_divide_the_rows_of_the_same_global_batch(processes):
    parts = [content(dataclasses.replace(SAMPLES, process=p, processes=processes)) for p in range(processes)]
    joined = [
        {name: [x for part in parts for x in part[step][name]] for name in ("record", "own", "shared")}
        for step in range(SAMPLES.steps)
    ]
    assert joined == content(SAMPLES)


@pytest.mark.parametrize("threads", [1, 8])
def test_threads_change_nothing(threads):
    assert content(SAMPLES, threads=threads) == content(SAMPLES)


def test_worker_processes_change_nothing():
    assert content(SAMPLES, workers=2) == content(SAMPLES)


# ---- Workers that fail


def echo_but(record, rng, batch_rng, do):
    if record == 5:
        do()
    return echo(record, rng, batch_rng)


def die(*address):
    return echo_but(*address, do=lambda: os.kill(os.getpid(), signal.SIGKILL))


def stop(*address):
    return echo_but(*address, do=lambda: os.kill(os.getpid(), signal.SIGSTOP))


def raise_of_scan_5(*address):
    return echo_but(*address, do=lambda: [][5])


def all_of(sampler, **options):
    return content(dataclasses.replace(SAMPLES, sampler=sampler), **options)


def test_a_worker_that_is_killed_is_named():
    with pytest.raises(UserError, match=r"a data worker died .* run the same command to go on"):
        all_of(die, workers=1)


def test_a_worker_that_hangs_is_noticed_in_time():
    with pytest.raises(Stalled, match=r"no batch within 8 s: .* raise data\.timeout_s"):
        all_of(stop, workers=1, timeout_s=8.0)


def test_a_thread_that_hangs_is_noticed_in_time():
    patience = threading.Event()
    with pytest.raises(Stalled, match=r"no batch within 0\.5 s"):
        all_of(lambda *address: echo_but(*address, do=patience.wait), timeout_s=0.5)
    patience.set()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_comes_with_its_traceback(workers):
    with pytest.raises(IndexError) as raised:
        all_of(raise_of_scan_5, workers=workers)
    assert "raise_of_scan_5" in "".join(traceback.format_exception(raised.value))


HANGS = """
import time
from test_pipeline import SAMPLES, dataclasses, batches, echo
from alice_jax import cli

def hang(*address):
    time.sleep(1000)

def main():
    for batch in batches(dataclasses.replace(SAMPLES, sampler=hang), workers=WORKERS, timeout_s=TIMEOUT_S):
        pass

if __name__ == "__main__":
    cli.run(main)
"""


def hanging(folder, workers, timeout_s):
    """A process whose workers sleep."""
    script = folder / "hangs.py"
    script.write_text(HANGS.replace("WORKERS", str(workers)).replace("TIMEOUT_S", str(timeout_s)))
    root = pathlib.Path(__file__).parents[1]
    paths = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    return subprocess.Popen([sys.executable, str(script)], env=paths, stderr=subprocess.PIPE, encoding="utf-8")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_command_that_waits_in_vain_ends_with_one_line(tmp_path, workers):
    _, errors = hanging(tmp_path, workers, timeout_s=2).communicate(timeout=60)
    lines = [line for line in errors.splitlines() if "resource_tracker" not in line and "warnings.warn" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: no batch within 2 s"), errors


def test_workers_do_not_outlive_a_process_that_is_killed(tmp_path):
    process = hanging(tmp_path, workers=1, timeout_s=1000)
    children = pathlib.Path(f"/proc/{process.pid}/task")
    deadline = time.monotonic() + 60
    workers = []
    while not workers and time.monotonic() < deadline:
        time.sleep(0.1)
        found = {child for task in children.glob("*/children") for child in task.read_text().split()}
        workers = [pid for pid in found if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]
    time.sleep(5)  # it has started by then, whether it listens is what is tested
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}/exe") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not any(os.path.exists(f"/proc/{pid}/exe") for pid in workers)
