"""Being asked to stop: SIGTERM or Ctrl-C, to one process or to all, ends every process after the same step.

Exit codes: 143 after SIGTERM, 130 after SIGINT (128 + the signal's number), with everything saved. The same command
goes on from there.
"""

import signal
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopSignal:
    """Notes the first SIGTERM or SIGINT in `signal`; a second one acts as if nobody listened."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.signal = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def agreed(self) -> int:
        """The signal that any process has noted, 0 for none; every process must ask after the same step."""
        if jax.process_count() == 1:
            return self.signal
        return int(np.max(multihost_utils.process_allgather(np.int32(self.signal))))
