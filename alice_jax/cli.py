"""The edge of every command: a user's mistake becomes one line on stderr and exit code 1."""

import signal
import sys
from collections.abc import Callable

from alice_jax.errors import UserError


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
