"""The edge of every command: a user's mistake becomes one line on stderr and exit code 1."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from alice_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Reads a command's arguments; a mistake in them is a `UserError` like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def check_folder_of(flag: str, path: str | None) -> None:
    """A `UserError` where the file that a flag names could not be written for want of its folder."""
    if path and not Path(path).absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: its folder does not exist; create it or name another file")


def run(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits: its return value, 1 after a `UserError`, 130 after Ctrl-C."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code or 0)
