"""What commands ask of their computer: memory that stays, programs compiled once, and an early first line."""

import os
import pathlib
import subprocess
import sys

import pytest
import startup

ROOT = pathlib.Path(__file__).parent.parent


def run(code, **environment):
    """The last line that a fresh interpreter prints."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


FAULTS = """
import resource
import numpy as np
{first}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(40_000_000, np.float32)  # 160 MB, 39,063 pages of 4 kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept():
    keep = "from alice_jax import host; host.PLENTY_BYTES = {}; host.keep_memory()"
    assert int(run(FAULTS.format(first=keep.format(0)))) < 100
    # numpy itself may ask for huge pages, of 512 small ones each.
    for first in "", keep.format(1 << 60):
        assert int(run(FAULTS.format(first=first))) >= 39_063 // 512


TRIMS = """
import ctypes
from alice_jax import host
trims, real = [], ctypes.CDLL
ctypes.CDLL = lambda name: type("Libc", (), {{"malloc_trim": lambda self, pad: trims.append(pad)}})()
host.LARGE_PROGRAM_S = {large_s}
host.give_back_memory()
host.give_back_memory()
ctypes.CDLL = real
import jax
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
before = len(trims)
jax.jit(lambda x: x + 2)(1.0).block_until_ready()
print(len(trims) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize(("large_s", "trims"), [(0, 1), (3600, 0)])
def test_what_compiling_a_large_program_held_is_given_back_once(large_s, trims):
    """Here any program is large, or none."""
    assert int(run(TRIMS.format(large_s=large_s))) == trims


READY = """
from alice_jax import host
{first}
import jax, jax.numpy as jnp
program = jax.jit(lambda x: x @ x @ x)
x = program(jnp.ones((1500, 1500))).block_until_ready()
print(program(x).is_ready())
"""


def test_a_program_for_a_cpu_runs_where_it_is_called():
    """So that it has given back its memory when its results are there."""
    assert run(READY.format(first="")) == "False"
    assert run(READY.format(first="host.give_back_memory()")) == "True"


def test_compiled_programs_are_kept(tmp_path):
    unset = "import os; del os.environ['JAX_COMPILATION_CACHE_DIR']"
    cache = {"ALICE_JAX_CACHE": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    run(
        f"{unset}; import jax; from alice_jax import host; host.keep_compiled(); print(jax.jit(lambda x: x + 1)(1.0))",
        **cache,
    )
    folders = list((tmp_path / "compiled").iterdir())
    assert len(folders) == 1 and any(path.name.endswith("-cache") for path in folders[0].iterdir())


@pytest.mark.parametrize("command", startup.COMMANDS)
def test_commands_load_no_more_than_they_need_to_answer(command):
    """PyTorch alone would take over a second."""
    heavy = "{'torch', 'tensorboardX', 'matplotlib'} & set(sys.modules)"
    assert run(f"import sys, alice_jax.{command}; print({heavy} or 'none of them')") == "none of them"
