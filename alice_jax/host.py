"""What the process asks of its computer before it computes: memory that stays, and programs compiled once."""

import ctypes
import functools
import hashlib
import os
import platform
import sys

# glibc's mallopt (malloc.h)
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
PLENTY_BYTES = 6 << 30  # a full-size step holds 4.4, of however many pairs
LARGE_PROGRAM_S = 1.0  # of compiling; smaller ones hold little, and giving back costs the next step its pages


def cache() -> str:
    """$ALICE_JAX_CACHE or a folder in the user's cache."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("ALICE_JAX_CACHE") or os.path.join(user_cache, "alice_jax")


def settle() -> None:
    """For commands that compile and compute, before their first array."""
    keep_memory()
    give_back_memory()
    keep_compiled()


def keep_memory() -> None:
    """Makes malloc keep what was freed; to be called before JAX has threads.

    On a CPU XLA asks for the memory of a program anew at each call, and glibc, left alone, gives gigabytes of it back
    to the kernel, which must find and clear every page again: a fifth of a train step's processor time. What is kept
    is lost to other programs: only where there is plenty.
    """
    if platform.libc_ver()[0] == "glibc" and _main_memory() >= PLENTY_BYTES:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)  # further ones cannot grow beyond 64 MB and would ask the kernel for more
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


@functools.cache
def give_back_memory() -> None:
    """Makes programs for a CPU give back what they work with before the next one asks; to be called before the first.

    JAX says that results are there a moment before their program gives back its memory, unless the program runs where
    it is called: else full-size steps of four pairs came to hold 10.3 GiB in place of 4.4, and took twice as long. And
    what compilers of large programs freed lies in pieces that the program's arrays do not fit into: two pairs whose
    programs had been compiled before held 7.1 GiB in place of 4.4.
    """
    import jax  # here, since whoever wants the memory alone may have another library to measure

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if platform.libc_ver()[0] != "glibc":
        return
    malloc_trim = ctypes.CDLL(None).malloc_trim

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs > LARGE_PROGRAM_S:
            malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)


def _main_memory() -> int:
    """Bytes of this computer's main memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keep_compiled() -> None:
    """Keeps compiled programs for the next process, in $JAX_COMPILATION_CACHE_DIR or beside the built-in cohort.

    Programs for a CPU use its instruction set, so computers of another kind that share the folder get their own.
    """
    import jax  # as in give_back_memory

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache(), "compiled", _processor()))


def _processor() -> str:
    """A name for the kind of this computer's processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            features = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = ""
    return f"{sys.platform}-{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
