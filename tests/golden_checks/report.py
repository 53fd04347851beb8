"""The comparison of one golden file: what was compared, how well, and why the rest was not."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

# the only reasons for which an array may go without comparison, or with a part left out
CONFIGURATION = "configuration"
UNUSED = "never influences an output"
KEY_BIAS = "key part of qkv and kv biases"


@dataclasses.dataclass
class Comparison:
    """The outcome for one array; `limit` 0 means exactly equal, and `error` counts the differing elements."""

    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN

    @property
    def badness(self) -> tuple[bool, float]:
        return not self.ok, self.error / self.limit if self.limit else self.error


class Report:
    """Collects comparisons of our numbers with `arrays`; each array must end up compared or excused."""

    def __init__(self, file: str, arrays: Mapping[str, np.ndarray]):
        self.file = file
        self.arrays = arrays
        self.compared: dict[str, Comparison] = {}
        self.excused: dict[str, str] = {}
        self.problems: list[str] = []

    @property
    def config(self) -> dict[str, Any]:
        """The file's `config_json`; {} without one."""
        return json.loads(str(self.arrays.get("config_json", "{}")))

    def close(self, name: str, got: Any, limit: float, scale: str = "max", where: Any = True) -> float:
        """Compares with tolerance and returns the largest error.

        scale: errors are divided by the largest magnitude ("max"), element by element ("relative"), or not at all
        ("absolute"). Arrays named `…_stats` (mean, standard deviation, minimum, maximum, sum of magnitudes) are
        scaled by the largest magnitude they tell of, the sum by itself.
        where: elements to compare; leave some out only together with `key_bias(name)`.
        """
        want = np.asarray(self.arrays[name], np.float64)
        got = np.asarray(got, np.float64)
        if got.shape != want.shape:
            return self._record(name, np.inf, limit, f"shape {got.shape}, golden {want.shape}")
        difference = np.abs(got - want)
        largest = np.max(np.abs(want), initial=0.0)
        if name.endswith("_stats") and want.shape == (5,):
            reach = max(abs(want[2]), abs(want[3]))
            divisor = np.array([reach] * 4 + [want[4]])
        elif scale == "max":
            divisor = np.full(want.shape, largest)
        elif scale == "relative":
            divisor = np.maximum(np.abs(want), 1e-12 * largest)
        elif scale == "absolute":
            divisor = np.ones(want.shape)
        else:
            raise ValueError(f"scale {scale!r}: choose 'max', 'relative' or 'absolute'")
        error = np.where(difference == 0, 0.0, difference / np.where(divisor == 0, 1.0, divisor))
        return self._record(name, float(np.max(error, initial=0.0, where=where)), limit)

    def equal(self, name: str, got: Any) -> None:
        """Compares exactly: integers, booleans, strings, and weights that only travelled."""
        want, got = np.asarray(self.arrays[name]), np.asarray(got)
        if got.shape != want.shape:
            self._record(name, np.inf, 0.0, f"shape {got.shape}, golden {want.shape}")
        else:
            self._record(name, float(np.count_nonzero(got != want)), 0.0)

    def configuration(self, *names: str) -> None:
        """Excuses inputs, sizes and settings that a comparison starts from."""
        self._excuse(CONFIGURATION, names)

    def unused(self, *names: str) -> None:
        """Excuses what never influences an output."""
        self._excuse(UNUSED, names)

    def key_bias(self, *names: str) -> None:
        """Excuses the key part of qkv and kv biases: its true gradient is zero, so that rounding alone moves it."""
        self._excuse(KEY_BIAS, names)

    def _record(self, name: str, error: float, limit: float, problem: str = "") -> float:
        outcome = Comparison(error, limit)
        earlier = self.compared.get(name)
        if earlier is None or outcome.badness > earlier.badness or np.isnan(error):
            self.compared[name] = outcome
        if not outcome.ok:
            self.problems.append(f"{name}: {problem or f'error {error:.3g}, limit {limit:.3g}'}")
        return error

    def _excuse(self, reason: str, names: tuple[str, ...]) -> None:
        self.excused.update({name: reason for name in names if name in self.arrays})

    @property
    def forgotten(self) -> list[str]:
        """Arrays that are neither compared nor excused."""
        return [name for name in self.arrays if name not in self.compared and name not in self.excused]

    @property
    def ok(self) -> bool:
        return bool(self.compared) and not self.problems and not self.forgotten

    def lines(self) -> list[str]:
        """The report: a line for each group of arrays, then the count, then every array that was not compared."""
        groups: dict[str, list[Comparison]] = {}
        for name, outcome in self.compared.items():
            groups.setdefault(name.split("/")[0], []).append(outcome)
        lines = [f"{self.file}", f"  {'group':40} {'compared':>8}  {'largest error':>13}  {'limit':>8}"]
        for group, outcomes in groups.items():
            worst = max(outcomes, key=lambda outcome: (np.isnan(outcome.error), *outcome.badness))
            limit = f"{worst.limit:8.1e}" if worst.limit else "   exact"
            verdict = "ok" if all(outcome.ok for outcome in outcomes) else "FAILED"
            lines.append(f"  {group:40} {len(outcomes):8d}  {worst.error:13.2e}  {limit}  {verdict}")
        lines.append(f"  {len(self.compared)} arrays compared of {len(self.arrays)} present")
        for name, reason in self.excused.items():
            kind = "part not compared" if name in self.compared else "not compared"
            if name not in self.compared or reason == KEY_BIAS:
                lines.append(f"  {kind}: {name} ({reason})")
        lines += [f"  FAILED: {problem}" for problem in self.problems]
        lines += [f"  FAILED: {name} was not compared, and no reason covers it" for name in self.forgotten]
        if not self.compared:
            lines.append("  FAILED: nothing was compared")
        return lines
