"""How long a command takes to answer, and a training to make its first step, without and with what was compiled before.

    python benchmarks/startup.py [--config configs/pretrain.py:tiny] [--store DIR] [--json FILE]

Each figure is a process of its own. "first line" is the time until a command has printed something; "first step" the
time from the command to the first line of metrics.jsonl, with an empty compilation cache and again with that which the
first time left.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import measuring

from alice_jax import builtin, cli, train
from alice_jax.errors import UserError

COMMANDS = (
    "prepare", "embed", "train", "predict", "export", "match", "evaluate", "report", "study", "reproduce", "aot",
)  # fmt: skip


def first_line(command: str) -> float:
    """Seconds until `python -m alice_jax.COMMAND --help` has printed a line."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", f"alice_jax.{command}", "--help"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        took = time.perf_counter() - began
        process.stdout.read()
    return took


def first_step(config: str, store: str, workdir: str, cache: str) -> float:
    """Seconds until a new run has logged its first step."""
    metrics = Path(workdir) / "metrics.jsonl"
    settings = {"config": config, "config.data.store": store, "config.log_every": 1, "workdir": workdir}
    command = [sys.executable, "-m", "alice_jax.train", *(f"--{name}={value}" for name, value in settings.items())]
    began = time.perf_counter()
    with subprocess.Popen(
        command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}, stderr=subprocess.DEVNULL
    ) as process:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise UserError(f"--config {config}: the training ended with code {process.returncode}; run it by hand")
            time.sleep(0.02)
        took = time.perf_counter() - began
        process.kill()
    return took


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pretrain.py:tiny", help="default: configs/pretrain.py:tiny")
    parser.add_argument("--store", metavar="DIR", help="with embeddings (default: the built-in cohort)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    cli.check_folder_of("--json", args.json)
    store = args.store or builtin.embedded_patients(train.run)  # before any clock runs
    seconds = {f"first line of {command}": first_line(command) for command in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "with the compilation cache"):
            workdir = os.path.join(folder, name)
            took = first_step(args.config, store, workdir, os.path.join(folder, "cache"))
            seconds[f"first step of {args.config}, {name}"] = took
    for name, value in seconds.items():
        print(f"{name:70}{value:8.1f} s")
    measuring.save(args.json, {"seconds": seconds})
    return 0


if __name__ == "__main__":
    cli.run(main)
