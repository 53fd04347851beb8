"""Real processes that become one run: what they compute together, and how they end together."""

import signal
import socket
import time

import pytest
from absl import flags
from absl.testing import flagsaver
from one_of_a_run import global_rows, go_on, hashed
from processes import finish, free_port, last_lines, start

from alice_jax import distributed, sharding
from alice_jax.errors import UserError
from alice_jax.rendezvous import KEEPALIVE_S

WORKER = "tests/one_of_a_run.py"
FIRST_PORT = 65536 - 2**12  # JAX takes the port from the job's number, in this range


def run_together(tasks):
    """What processes of `one_of_a_run` print."""
    codes, out, errors = finish(tasks)
    assert codes == [0] * len(tasks), errors
    said = [line for text in errors for line in text.splitlines() if "devices" in line]
    assert said == [f"{len(tasks)} processes, {len(tasks)} devices"]  # from one of them
    return last_lines(out)


def by_hand(folder, count):
    port = free_port()
    return [start(WORKER, folder, port, count, index) for index in range(count)]


def by_srun(folder, count):
    port = next(port for port in range(FIRST_PORT + time.time_ns() % 4000, 65536) if is_free(port))
    job = dict(SLURM_JOB_ID=port - FIRST_PORT, SLURM_STEP_NODELIST="localhost", SLURM_NTASKS=count)
    return [start(WORKER, folder, **job, SLURM_PROCID=index, SLURM_LOCALID=index) for index in range(count)]


def is_free(port):
    with socket.socket() as trial:
        return bool(trial.connect_ex(("localhost", port)))


def test_two_processes_do_what_one_does(tmp_path):
    mesh = sharding.make_mesh()  # 8 devices of this process
    rows = hashed(global_rows(mesh))
    assert run_together(by_hand(tmp_path, 2)) == [f"{rows} 0"] * 2  # write step 1
    assert go_on(str(tmp_path), mesh) == 1  # one process restores it and writes step 2
    assert run_together(by_srun(tmp_path, 2)) == [f"{rows} 2"] * 2


@pytest.mark.slow
def test_four_processes_do_what_one_does(tmp_path):
    mesh = sharding.make_mesh()
    rows = hashed(global_rows(mesh))
    for before, count in enumerate((4, 2, 4)):
        assert run_together(by_hand(tmp_path, count)) == [f"{rows} {before}"] * count
    assert go_on(str(tmp_path), mesh) == 3


@pytest.fixture
def stepping():
    """Two processes that meet again and again."""
    running = by_hand("-", 2)
    for process in running:
        assert "stepping\n" in iter(process.stdout.readline, "")
    return running


def test_a_signal_to_one_stops_all_at_the_same_step(stepping):
    stepping[1].terminate()
    codes, out, errors = finish(stepping)
    assert codes == [0, 0], errors
    (together, times), other = (line.split() for line in last_lines(out))
    assert [together, times] == other and int(times) > 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_others(victim, stepping):
    stepping[victim].kill()
    began = time.monotonic()
    codes, _, errors = finish(stepping, timeout_s=2 * KEEPALIVE_S)
    assert time.monotonic() - began < KEEPALIVE_S
    survivor = 1 - victim
    assert (codes[victim], codes[survivor]) == (-signal.SIGKILL, 1)
    expected = f"error: process {victim} ({socket.gethostname()}) has died; all end; what was saved is intact: run the "
    assert last_lines(errors)[survivor] == f"{expected}same command again"
    assert "Traceback" not in errors[survivor] and "stack trace" not in errors[survivor]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(processes=2), "--coordinator, --processes, --process: give all three"),
        (dict(coordinator="here:1", processes=2, process=2), "--process 2: give 0 to 1 with --processes 2"),
        (dict(coordinator="here", processes=2, process=1), "--coordinator here: give HOST:PORT of process 0"),
        (
            dict(distributed=True),
            "--distributed: JAX finds no cluster that this process is part of; start it by srun or by a script of "
            "launch/, or give --coordinator, --processes and --process",
        ),
    ],
)
def test_a_place_that_is_none_is_refused(given, message, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    flags.FLAGS(["train"])
    with flagsaver.flagsaver(**given), pytest.raises(UserError) as caught:
        distributed.by_flags({})
    assert str(caught.value) == message


@pytest.mark.parametrize("error", [ConnectionError("no answer"), RuntimeError("no answer")])
def test_a_metadata_server_that_does_not_answer_is_one_line(error, monkeypatch):
    def detect(*_):
        raise error

    monkeypatch.setattr(distributed.ClusterEnv, "auto_detect_unset_distributed_params", detect)
    with pytest.raises(UserError, match=r"^--distributed: JAX finds no cluster .* \(no answer\); start it by srun"):
        distributed.found()
