"""What a run was computed with, noted in its workdir each time it starts or resumes.

WORKDIR/provenance.json   a list with one entry for each start, oldest first:
    step        the step that it started from, 0 for a new run
    time        UTC
    versions    of Python and the packages that the numbers depend on
    commit      of the project's git repository, "+" after it for uncommitted changes; null without one
    devices     how many over all processes, and their kind
    processes   over which the batch is divided
    embedder    hash of the embedder that mines the pairs, null without any

Nothing names the computer or its user, so a workdir can be given away.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    "alice_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorstore",
    "numpy",
    "scipy",
)
NAME = "provenance.json"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code() -> dict[str, str]:
    """What computes: a hash of this package's source files, and `versions`."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return {"sources of alice_jax": digest.hexdigest()[:12], **versions()}


def commit(folder: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the repository whose top is `folder`, marked "+" where tracked files differ; None without one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None  # installed somewhere inside another project
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def record(workdir: str, step: int, embedder: str | None = None) -> None:
    """Adds an entry for a run that starts from `step`; for one process."""
    entry = {
        "step": step,
        "time": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
        "versions": versions(),
        "commit": commit(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "embedder": embedder,
    }
    path = os.path.join(workdir, NAME)
    temporary = f"{path}.partial"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump([*read(workdir), entry], file, indent=1)
    os.replace(temporary, path)


def read(workdir: str) -> list[dict[str, Any]]:
    """The entries, oldest first; none where the file is missing or damaged, since no run should end for its sake."""
    try:
        with open(os.path.join(workdir, NAME), encoding="utf-8") as file:
            entries = json.load(file)
    except (OSError, json.JSONDecodeError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
