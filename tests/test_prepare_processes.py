"""The command's worker processes: one that is killed costs its own file alone, and stopping leaves a sound store."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from test_readers import ct_like, write_nifti

from alice_jax import prepare as command
from alice_jax.data.preparing import prepare_source
from alice_jax.data.sources import Source
from alice_jax.data.store import Store

COMMAND = [sys.executable, "-m", "alice_jax.prepare"]
ROOT = pathlib.Path(__file__).parent.parent


def test_as_a_user_with_workers_that_crash(tmp_path, monkeypatch):
    """One line for a mistake; and a file that kills its reader is named while the others are prepared."""
    for seed in range(4):
        write_nifti(tmp_path / "in" / f"{seed}.nii.gz", ct_like(seed=seed))
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    args = [*COMMAND, "--input", "x", "--store", "y"]
    wrong = subprocess.run(args, cwd=tmp_path, capture_output=True, encoding="utf-8", env=paths)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == "error: --input x: there is no such file or folder\n"
    jobs = [Source(str(tmp_path / "in" / f"{seed}.nii.gz"), id=f"s{seed}") for seed in range(4)]
    jobs.insert(1, Source("killer", id="killer", files=("killer",)))
    store = Store.create(tmp_path / "store", (2, 2, 2))
    monkeypatch.setattr(command, "_work", _work_or_die)
    outcomes = command.prepare(store, jobs, workers=2)
    assert [outcome.id for outcome in outcomes] == ["s0", None, "s1", "s2", "s3"]
    assert outcomes[1].reason.name == "reader crashed"


def _work_or_die(source):
    if source.id == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare_source(command._worker[0], source, command._worker[1])


@pytest.mark.parametrize("how, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopping_it_leaves_a_store_that_continues(tmp_path, how, code):
    for seed in range(8):
        write_nifti(tmp_path / "in" / f"{seed}.nii.gz", ct_like((130, 130, 90), seed=seed))
    args = [*COMMAND, "--input", str(tmp_path / "in"), "--store", str(tmp_path / "store"), "--workers", "2"]
    pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    # A shell's background jobs, in which tests may run, ignore Ctrl-C, and so would their children.
    args = ["env", "--default-signal=INT", *args]
    running = subprocess.Popen(args, cwd=ROOT, **pipes)
    deadline = time.time() + 60
    while time.time() < deadline and not list(tmp_path.glob("store/scans/*/scan.json")):
        time.sleep(0.05)
    children = pathlib.Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    running.send_signal(how)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == code and (how == signal.SIGKILL or "the same command continues" in errors)
    assert "Traceback" not in errors
    deadline = time.time() + 10
    while time.time() < deadline and any(os.path.exists(f"/proc/{child}/cwd") for child in children):
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{child}/exe") for child in children)  # no orphans
    store = Store.open(tmp_path / "store")
    done = store.ids()
    assert done
    for id in done:
        assert store.read_volume(id).shape == store.scan(id).shape_zyx
    finished = subprocess.run(args, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120)
    assert finished.returncode == 0 and "8 prepared" in finished.stdout
    kept = int(finished.stdout.split("8 prepared (")[1].split()[0])
    assert kept >= len(done)
