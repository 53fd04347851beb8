"""The edge of every command: a user's mistake becomes one line on stderr and exit code 1."""

import argparse
import contextlib
import json
import math
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

from alice_jax.errors import Stalled, UserError


class Parser(argparse.ArgumentParser):
    """Reads a command's arguments; a mistake in them is a `UserError` like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def add_task_arguments(self, what: str) -> None:
        """--task-index and --task-count, for work that many tasks share; see `check_task`."""
        self.add_argument(
            "--task-index", type=int, default=0, metavar="I", help=f"which share of the {what} to take, from 0"
        )
        self.add_argument("--task-count", type=int, default=1, metavar="N", help="how many tasks share the work")


def check_task(args: argparse.Namespace) -> None:
    """A `UserError` for a share that there is not."""
    if not 0 <= args.task_index < args.task_count:
        last = args.task_count - 1
        raise UserError(f"--task-index {args.task_index}: give 0 to {last} with --task-count {args.task_count}")


def check_folder_of(flag: str, path: str | None) -> None:
    """A `UserError` where the file that a flag names could not be written for want of its folder."""
    if path and not Path(path).absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: its folder does not exist; create it or name another file")


def write(path: Path, content: bytes, flag: str) -> None:
    """Writes the file that a flag names; a `UserError` where that cannot be."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error.strerror}; choose another place") from error


@contextlib.contextmanager
def on_disk(workdir: str, kept: str) -> Iterator[None]:
    """Makes a `UserError` of what a disk that is full, gone or read-only refuses; `kept` says what is not lost."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        raise UserError(
            f"--workdir {workdir}: {reason}; {kept}; see to space and permissions, then run the same command again"
        ) from error


def write_numbers(path: str, numbers: Mapping[str, Any]) -> None:
    """The file of --json: nested numbers, in which NaN, which JSON has not, is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    write(Path(path), json.dumps(plain(numbers), indent=2).encode() + b"\n", "--json")


def complain(error: UserError) -> None:
    """One line on stderr."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def read_configuration(values: flags.FlagValues, config: flags.FlagHolder, arguments: Sequence[str]) -> Any:
    """Reads all flags of a command that takes --config=FILE and --config.FIELD=VALUE, and returns the configuration."""
    try:
        rest = values(["", *arguments])
        given = config.value is not None and bool(config.value.to_dict())  # a file that cannot be loaded fails here
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # An error inside a configuration file comes with its whole traceback; its last line says what is wrong.
        raise UserError(f"{str(error).strip().splitlines()[-1]}; see --help") from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: not a flag; see --help")
    if not given:
        raise UserError("--config: name a configuration, such as --config=configs/pretrain.py")
    return config.value


def say(text: str) -> None:
    """One line for the user, beside what a command prints."""
    print(text, file=sys.stderr, flush=True)


def recipe(name: str, fields: Mapping[str, Any] | None = None) -> ConfigDict:
    """A configuration file such as "configs/segment.py:tiny", with some fields set, {"data.store": "DIR"}."""
    path, _, variant = name.partition(":")
    try:
        config = runpy.run_path(path)["get_config"](variant)
        with config.unlocked():
            config.update_from_flattened_dict(dict(fields or {}))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}; name a configuration such as configs/segment.py:tiny") from None
    return config


def run(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits: its return value, 1 after a `UserError`, 130 after Ctrl-C."""
    try:
        code = main()
    except Stalled as error:
        complain(error)
        os._exit(1)
    except UserError as error:
        traceback.clear_frames(error.__traceback__)  # closes progress bars, so that the error has a line of its own
        complain(error)
        code = 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code or 0)
