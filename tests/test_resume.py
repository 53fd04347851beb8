"""A run that is killed, or goes on elsewhere, is the run that it would have been."""

import random
import signal
import socket
import time

import faults
import pytest
from builders import noise_store
from processes import flags, free_port
from recorded_train import fetched
from test_report import SHAPE, embed

from alice_jax import checkpoint, coverage, metrics, provenance
from alice_jax.rendezvous import KEEPALIVE_S


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Of a training on mined pairs with drop path, a checkpoint every other step."""
    store = noise_store(str(tmp_path_factory.mktemp("resume") / "store"), scans=6, shape_zyx=SHAPE)
    embed(store)
    return ["--config=tests/configs/small.py", f"--config.data.store={store.path}", "--config.steps=6"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The processes compile each program once."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.mark.slow
def test_killed_at_random_moments(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device
    moments = ["stepping", "saving", "starting", "saving", "stepping"]
    tally = faults.kill_runs([*arguments, "--config.steps=40"], str(tmp_path), moments, random.Random(1))
    assert tally["differences"] == [] and tally["resumed_exactly"] == 5


# ---- The same run, on other devices, processes and workers


def go_on(monkeypatch, arguments, workdir, *, processes=1, devices=1, parameters=1, workers=0, until=None):
    """Runs all processes of one stretch; only the last of them is told to stop.

    devices: of each process.  parameters: how many share the state.  until: step after which it is told; None: the end.
    """
    port = free_port()
    unoptimised = "--xla_backend_optimization_level=0"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices} {unoptimised}")
    # A step in one part, as it must be for equal numbers: the noise of a part is drawn for all of its samples at once.
    settings = [f"--config.microbatch={8 // (devices * processes)}", f"--config.data.workers={workers}"]
    settings += [f"--config.mesh.parameters={parameters}", "--config.mesh.rules=(('', 64),)"]
    running = []
    for index in range(processes):
        place = flags(port, processes, index) if processes > 1 else []
        monkeypatch.setenv("STOP_AFTER", str(until) if until and index == processes - 1 else "-1")
        running.append(faults.start([*arguments, *settings, *place], workdir))
    for process in running:
        _, errors = process.communicate(timeout=faults.PATIENCE_S)
        assert process.returncode == (128 + signal.SIGTERM if until else 0), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "stretches",
    [
        [dict(devices=8, until=2), dict(devices=4, workers=2, until=4), dict(devices=1, workers=1)],
        [dict(devices=4, parameters=4, until=2), dict(devices=4, until=4), dict(devices=4, parameters=2)],
        [dict(processes=2, until=2), dict(processes=1, devices=4, until=4), dict(processes=2, devices=2, workers=1)],
        [dict(processes=4, until=2), dict(processes=2, until=4), dict(processes=4)],
    ],
    ids=["8, 4, 1 devices", "state on 4, 1, 2 devices", "2, 1, 2 processes", "4, 2, 4 processes"],
)
def test_elsewhere(arguments, tmp_path, monkeypatch, stretches):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    go_on(monkeypatch, arguments, whole)
    for stretch in stretches:
        go_on(monkeypatch, arguments, parts, **stretch)
    assert fetched(parts) == fetched(whole)  # six batches and the one fetched ahead, of eight rows
    assert sorted(fetched(whole)) == [(step, row) for step in range(7) for row in range(8)]
    assert coverage.read(parts) == coverage.read(whole)
    assert len(metrics.read(parts)) == len(metrics.read(whole))
    for line, expected in zip(faults.logged(parts), faults.logged(whole), strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-6), line["step"]
    assert [entry["step"] for entry in provenance.read(parts)] == [0, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_two_processes_of_which_one_is_killed(arguments, tmp_path, monkeypatch, victim):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    go_on(monkeypatch, arguments, whole, processes=2)
    port = free_port()
    settings = [*arguments, "--config.microbatch=4", "--config.data.workers=0"]
    running = [faults.start([*settings, *flags(port, 2, index)], parts) for index in range(2)]
    while not checkpoint.newest_intact(parts)[0] and running[victim].poll() is None:  # of the second of six steps
        time.sleep(0.05)
    running[victim].kill()
    errors = [process.communicate(timeout=KEEPALIVE_S)[1] for process in running]
    assert running[1 - victim].returncode == 1
    assert (
        errors[1 - victim].splitlines()[-1].startswith(f"error: process {victim} ({socket.gethostname()}) has died; ")
    )
    go_on(monkeypatch, arguments, parts, processes=2)
    assert faults.logged(parts) == faults.logged(whole)
    assert fetched(parts) == fetched(whole)
    assert (provenance.read(parts)[-1]["processes"], metrics.read(parts)[-1]["step"]) == (2, 6)
