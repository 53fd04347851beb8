"""Processes that find each other as the tasks of srun do."""

import os
import pathlib
import socket
import subprocess
import sys

JOIN = """
import jax
from jax.experimental import multihost_utils
from alice_jax import cli, distributed
def main():
    distributed.join(timeout_s=60)
    shares = multihost_utils.process_allgather(jax.numpy.array(10 + jax.process_index()))
    print(jax.process_count(), jax.device_count(), shares.tolist())
cli.run(main)
"""
FIRST_PORT = 65536 - 2**12  # JAX takes the port from the job's number, in this range


def start(**slurm):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment |= {"XLA_FLAGS": "", "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    command = [sys.executable, "-c", JOIN]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


def free_port():
    for port in range(FIRST_PORT + os.getpid() % 2000, 65536):
        with socket.socket() as trial:
            if trial.connect_ex(("localhost", port)):
                return port
    raise AssertionError("no port is free")


def test_two_tasks_of_srun_become_one_run():
    job = dict(JOB_ID=free_port() - FIRST_PORT, STEP_NODELIST="localhost", NTASKS=2)
    processes = [start(**job, PROCID=index, LOCALID=index) for index in range(2)]
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert out.splitlines()[-1] == "2 2 [10, 11]"


def test_without_a_cluster_there_is_one_line():
    process = start()
    out, error = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    line = error.splitlines()[-1]
    assert line.startswith("error: --distributed: JAX finds no cluster that this process is part of (")
    assert line.endswith("; start it by srun or by a script of launch/, or leave the flag out")
