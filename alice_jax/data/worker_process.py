"""What every worker process does first: it leaves stopping to its parent, and does not outlive it."""

import os
import signal
import threading
import time


def tie_to(parent: int) -> None:
    """To be called in the worker.

    Args:
      parent: process id of the one that started it, which cannot tell its workers when it is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
