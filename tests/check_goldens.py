"""Compares the project with golden arrays: python tests/check_goldens.py DIR

Every file in DIR is given to the check whose name pattern fits. A line for each group of arrays says how many were
compared, the largest error and its limit; then come the arrays that were not compared, each with a reason. Exit code
1: a number off its limit, an array that is neither compared nor excused, a file that no check knows or in which
nothing was compared, or no file at all.
"""

import argparse
import fnmatch
import importlib
import pathlib
import sys
import zipfile
from types import ModuleType

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
from golden_checks.report import Report

from alice_jax import cli
from alice_jax.errors import UserError

# A check is a module of golden_checks with PATTERNS (file names) and check(report). The first fitting pattern counts.
HANDLERS = (
    "nnformer",
    "windows",
    "heads",
    "casa",
    "losses",
    "schedules",
    "train_steps",
    "views",
    "axes",
    "embedder",
    "matching",
)
DOCUMENTATION = ("README.md", "MANIFEST.txt")


def handler(file: str) -> ModuleType | None:
    """The check for a file name."""
    for name in HANDLERS:
        module = importlib.import_module(f"golden_checks.{name}")
        if any(fnmatch.fnmatch(file, pattern) for pattern in module.PATTERNS):
            return module
    return None


def check_file(path: pathlib.Path) -> Report:
    """Runs the check for one file; what goes wrong is a problem of the report."""
    try:
        with np.load(path) as file:
            report = Report(path.name, {name: file[name] for name in file.files})
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        report = Report(path.name, {})
        report.problems.append(f"not a readable .npz file ({error})")
        return report
    report.configuration("config_json")
    module = handler(path.name)
    if module is None:
        report.problems.append("no check knows a file of this name")
        return report
    try:
        module.check(report)
    except Exception as error:
        report.problems.append(f"the check stopped: {type(error).__name__}: {error}")
    return report


def golden_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Everything in a folder but its subfolders, hidden files and documentation."""
    if not folder.is_dir():
        raise UserError(f"DIR {folder}: not a folder; name one that holds golden .npz files")
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(path for path in files if path.name not in DOCUMENTATION)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=pathlib.Path, help="folder of golden .npz files")
    files = golden_files(folder := parser.parse_args().directory)
    if not files:
        raise UserError(f"DIR {folder}: no golden file in it; name a folder that holds some")
    jax.config.update("jax_default_matmul_precision", "highest")  # else GPUs and TPUs round the factors
    failed, compared, present = [], 0, 0
    for path in files:
        report = check_file(path)
        print("\n".join(report.lines()), flush=True)
        compared, present = compared + len(report.compared), present + len(report.arrays)
        failed += [] if report.ok else [report.file]
    print(f"\n{compared} arrays compared of {present} present in {len(files)} files")
    print(f"FAILED: {', '.join(failed)}" if failed else "all ok")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
