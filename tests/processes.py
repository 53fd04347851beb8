"""Several real processes of one run on this computer."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("", 0))
        return trial.getsockname()[1]


def flags(port: int, count: int, index: int) -> list[str]:
    """That name a process's place by hand."""
    return [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={index}"]


def start(*arguments: object, devices: int = 1, package: Path = ROOT, **variables: object) -> subprocess.Popen[str]:
    """Python with these arguments, simulated devices and variables of the environment.

    Args:
      package: the folder of the alice_jax to run.
    """
    simulated = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"XLA_FLAGS": simulated, "PYTHONPATH": f"{package}:{ROOT}:{ROOT / 'tests'}"}
    environment["PYTHONSAFEPATH"] = "1"  # without the working directory, so that `package` comes first
    environment |= {name: str(value) for name, value in variables.items()}
    command = [sys.executable, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, encoding="utf-8")


def finish(running: Sequence[subprocess.Popen[str]], timeout_s: float = 240) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, outputs and errors of all, in their order."""
    try:
        said = [process.communicate(timeout=timeout_s) for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], [out for out, _ in said], [errors for _, errors in said]


def last_lines(texts: Sequence[str]) -> list[str]:
    return [text.strip().splitlines()[-1] if text.strip() else "" for text in texts]
