"""The arms of a study beside each other: Dice, and how much more than other arms' in the same cases and seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alice_jax.evaluation.averages import RESAMPLES, with_interval, write_csv

SCRATCH, LONG = "scratch", "scratch-long"


def case_means(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, list[float]]:
    """The mean over the classes of each case that has any, in each of the runs.

    >>> case_means([{"a": {"liver": 1.0, "spleen": 0.5}, "b": {}}, {"a": {"liver": 0.5, "spleen": 0.0}, "b": {}}])
    {'a': [0.75, 0.25]}
    """
    return {
        case: [float(np.mean(list(run[case].values()))) for run in runs] for case, found in runs[0].items() if found
    }


def summarised(values: np.ndarray) -> dict[str, float]:
    """The mean of (cases, seeds), and a 95 % interval of it: both cases and seeds are drawn anew, 10,000 times.

    A bootstrap over cases alone would take what one training has by chance for what all have.
    """
    rng = np.random.default_rng(0)
    cases, seeds = (rng.integers(n, size=(RESAMPLES, n)) for n in values.shape)
    means = values[cases[:, :, None], seeds[:, None, :]].mean(axis=(1, 2))
    low, high = np.percentile(means, (2.5, 97.5))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def others_of(arm: str, rungs: Sequence[str]) -> dict[str, str]:
    """The arms that one is compared with, by what they are to it; rungs: of the ladder, each built on the last.

    >>> others_of("casa, frozen", ["random-crops", "mined-crops", "casa"])
    {'scratch': 'scratch', 'scratch-long': 'scratch-long', 'rung before': 'mined-crops, frozen'}
    """
    rung, comma, frozen = arm.partition(",")
    before = {"rung before": rungs[rungs.index(rung) - 1] + comma + frozen} if rung in rungs[1:] else {}
    return {} if arm == SCRATCH else {SCRATCH: SCRATCH} | ({} if arm == LONG else {LONG: LONG}) | before


def compared(
    results: Mapping[tuple[str, str], Mapping[str, Sequence[float]]], rungs: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each (arm, subset): its Dice, and how much more than other arms' in the same cases and seeds."""
    rows = []
    for (arm, subset), cases in results.items():
        dice = np.array(list(cases.values()))
        others = {what: results.get((other, subset)) for what, other in others_of(arm, rungs).items()}
        more = {what: summarised(dice - [their[case] for case in cases]) for what, their in others.items() if their}
        row = {"arm": arm, "subset": subset, "cases": len(cases), "dice": summarised(dice), "more_than": more}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each arm and subset, as people read it; in brackets 95 % intervals."""
    columns = list(dict.fromkeys(what for row in rows for what in row["more_than"]))
    lines = [f"{'':<24}{'labels':>8}{'Dice':>24}" + "".join(f"{f'more than {what}':>27}" for what in columns)]
    for row in rows:
        more = {what: with_interval(numbers, "{:.3f}", signed=True) for what, numbers in row["more_than"].items()}
        line = f"{row['arm']:<24}{row['subset']:>8}{with_interval(row['dice'], '{:.3f}'):>24}"
        lines.append((line + "".join(f"{more.get(what, ''):>27}" for what in columns)).rstrip())
    return "\n".join(lines)


def write_dice(path: Path, runs: Mapping[tuple[str, str], Sequence[Mapping[str, Mapping[str, float]]]]) -> None:
    """CSV: a line for each arm, subset, seed, case and class."""
    lines = (
        [arm, subset, seed, case, name, f"{dice:.6g}"]
        for (arm, subset), seeds in runs.items()
        for seed, cases in enumerate(seeds)
        for case, classes in cases.items()
        for name, dice in classes.items()
    )
    write_csv(path, ["arm", "subset", "seed", "case", "class", "dice"], lines)
