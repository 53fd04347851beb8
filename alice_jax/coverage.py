"""How often each training scan has been used: part of every checkpoint, and of the workdir for whoever looks."""

import json
import os
from collections.abc import Sequence

import numpy as np

Counted = dict[str, dict[str, int]]


class Coverage:
    """Counts the scans of global batches.

    Args:
      scans: ids, in the order that samples number them.
      counted: `counted()` of the run that this one goes on from.
    """

    def __init__(self, scans: Sequence[str], counted: Counted | None = None):
        self._scans = scans
        self._counts, self._keys = (
            np.array([(counted or {}).get(name, {}).get(scan, 0) for scan in scans]) for name in ("counts", "keys")
        )

    def count(self, used: np.ndarray) -> dict[str, float]:
        """Adds the numbers of the scans in a batch; returns the share of scans used so far and the extremes.

        used: (samples,), or (samples, 2) with the partners in the second column, which are then also counted alone.
        """
        np.add.at(self._counts, used.ravel(), 1)
        partners = {}
        if used.ndim == 2 and used.shape[1] == 2:
            np.add.at(self._keys, used[:, 1], 1)
            partners = {"coverage/key_least": int(self._keys.min()), "coverage/key_most": int(self._keys.max())}
        return partners | {
            "coverage/share": float(np.mean(self._counts > 0)),
            "coverage/least": int(self._counts.min()),
            "coverage/most": int(self._counts.max()),
        }

    def counted(self) -> Counted:
        """{"counts": {scan: times used}, "keys": {scan: times as a partner}}."""
        return {
            name: {scan: int(count) for scan, count in zip(self._scans, numbers, strict=True)}
            for name, numbers in (("counts", self._counts), ("keys", self._keys))
        }


def write(workdir: str, step: int, counted: Counted) -> None:
    """Shows the counts after `step` in WORKDIR/coverage.json, for whoever looks; nothing resumes from there."""
    path = os.path.join(workdir, "coverage.json")
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump({"step": step, **counted}, file, indent=1)
    os.replace(f"{path}.partial", path)


def read(workdir: str) -> dict:
    """What `write` wrote: {"step", "counts": {scan: times used}, "keys": {scan: times as a partner}}; empty where there
    is none."""
    path = os.path.join(workdir, "coverage.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)
