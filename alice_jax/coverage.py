"""How often each training scan has been used, kept beside the checkpoints of a workdir."""

import json
import os
from collections.abc import Sequence

import numpy as np


class Coverage:
    """Counts the scans of this process's batches; resumes from WORKDIR/coverage.json.

    Args:
      scans: ids, in the order that samples number them.
      step: the step that training starts from.
    """

    def __init__(self, workdir: str, scans: Sequence[str], step: int):
        self._path, self._scans = os.path.join(workdir, "coverage.json"), scans
        self._counts, self._keys = np.zeros(len(scans), int), np.zeros(len(scans), int)
        saved = read(workdir)
        if saved.get("step") == step:
            self._counts = np.array([saved["counts"].get(scan, 0) for scan in scans])
            self._keys = np.array([saved.get("keys", {}).get(scan, 0) for scan in scans])

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

    def save(self, step: int) -> None:
        counts, keys = (
            {scan: int(count) for scan, count in zip(self._scans, numbers, strict=True)}
            for numbers in (self._counts, self._keys)
        )
        temporary = f"{self._path}.partial"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"step": step, "counts": counts, "keys": keys}, file, indent=1)
        os.replace(temporary, self._path)


def read(workdir: str) -> dict:
    """What `Coverage.save` wrote: {"step", "counts": {scan: times used}, "keys": {scan: times as a partner}}; empty
    where there is none."""
    path = os.path.join(workdir, "coverage.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)
