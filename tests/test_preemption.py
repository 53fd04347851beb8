"""Being asked to stop, in real processes; that all processes of a run agree is in test_resume."""

import os
import signal
import subprocess
import sys
import time

import pytest
from builders import noise_store

from alice_jax import checkpoint, metrics


@pytest.fixture
def running(tmp_path):
    """A training with a data worker, in a process group of its own, that has written a checkpoint."""
    store = noise_store(str(tmp_path / "store"), scans=6)
    settings = {"config": "tests/configs/small.py", "workdir": tmp_path, "config.data.store": store.path}
    settings |= {"config.views.kind": "random", "config.steps": 100_000, "config.data.workers": 1}
    process = subprocess.Popen(
        [sys.executable, "-m", "alice_jax.train", *(f"--{name}={value}" for name, value in settings.items())],
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not checkpoint.newest_intact(str(tmp_path))[0] and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group_saves_and_says_how_to_go_on(running, tmp_path, how):
    os.killpg(running.pid, how)  # as Ctrl-C and schedulers do: the data worker gets it too
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + how, errors
    assert "the same command goes on from there" in errors and "Traceback" not in errors
    step = int(checkpoint.restore_arrays(str(tmp_path))[1]["step"])
    assert step >= 2 and metrics.read(str(tmp_path))[-1]["step"] == step


def test_a_second_signal_ends_it_at_once_and_spoils_nothing(running, tmp_path):
    running.send_signal(signal.SIGTERM)
    for line in running.stderr:
        if "once more to stop at once" in line:
            running.send_signal(signal.SIGTERM)
            break
    running.communicate(timeout=10)
    assert running.returncode == -signal.SIGTERM
    step, damaged = checkpoint.newest_intact(str(tmp_path))
    assert step >= 2 and damaged == []
    assert checkpoint.restore_arrays(str(tmp_path))[1]["step"] == step
