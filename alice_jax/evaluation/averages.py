"""Scores of many cases: means with bootstrap intervals, of one run or of the differences between two."""

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from alice_jax.evaluation.surfaces import Scores

METRICS = tuple(field.name for field in dataclasses.fields(Scores))
TITLES = {"dice": ("Dice", "{:.3f}"), "hd95_mm": ("HD95 mm", "{:.1f}"), "nsd": ("NSD", "{:.3f}")}
COLUMNS = ("cases", "mean", "low", "high")
RESAMPLES, CONFIDENCE = 10_000, 0.95
ALL = "all"

Table = Mapping[str, Mapping[str, Mapping[str, float]]]  # {class: {metric: `summary`}}, "all" at last


@dataclasses.dataclass(frozen=True)
class Row:
    """One class of one case."""

    case: str
    name: str
    truth_voxels: int
    predicted_voxels: int
    scores: Scores


def by_case(rows: Sequence[Row], metric: str) -> dict[str, dict[str, float]]:
    """{class: {case: value}} of what is defined, and under "all" the mean over the classes of each case.

    >>> rows = [Row("a", "liver", 9, 9, Scores(1.0, 0.0, 1.0)), Row("a", "spleen", 9, 0, Scores(0.0, 50.0, 0.0))]
    >>> by_case(rows, "dice")
    {'liver': {'a': 1.0}, 'spleen': {'a': 0.0}, 'all': {'a': 0.5}}
    """
    table: dict[str, dict[str, float]] = {row.name: {} for row in rows}
    cases: dict[str, list[float]] = {}
    for row in rows:
        value = getattr(row.scores, metric)
        if not np.isnan(value):
            table[row.name][row.case] = value
            cases.setdefault(row.case, []).append(value)
    return table | {ALL: {case: float(np.mean(values)) for case, values in cases.items()}}


def interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """Bootstrap interval of the mean, by percentiles; NaN for fewer than two values."""
    if len(values) < 2:
        return np.nan, np.nan
    from scipy import stats  # here, since it takes a fifth of a second, and commands should answer at once

    found = stats.bootstrap(
        (np.asarray(values, float),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def summary(values: Sequence[float], seed: int) -> dict[str, float]:
    """Number, mean, and the ends of the interval of the mean."""
    low, high = interval(values, seed)
    return {"cases": len(values), "mean": float(np.mean(values)) if len(values) else np.nan, "low": low, "high": high}


def summaries(rows: Sequence[Row], seed: int) -> Table:
    """Means over the cases in which a class is defined."""
    tables = {metric: by_case(rows, metric) for metric in METRICS}
    return {
        name: {metric: summary(list(tables[metric][name].values()), seed) for metric in METRICS}
        for name in tables[METRICS[0]]
    }


def differences(rows: Sequence[Row], others: Sequence[Row], seed: int) -> Table:
    """As `summaries`, of what the first run has more than the other in the cases where both are defined."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for metric in METRICS:
        ours, theirs = by_case(rows, metric), by_case(others, metric)
        for name in ours:
            paired = [value - theirs[name][case] for case, value in ours[name].items() if case in theirs.get(name, {})]
            result.setdefault(name, {})[metric] = summary(paired, seed)
    return result


# -------------------------------------------------------------------- what is printed and written


def report(title: str, table: Table, signed: bool = False) -> str:
    """A line for each class with mean and interval of each metric."""
    heads = "".join(f"{TITLES[metric][0]:>26}" for metric in METRICS)
    lines = [title, f"{'':<24}{'cases':>6}{heads}"]
    for name, metrics in table.items():
        cells = "".join(f"{with_interval(metrics[metric], TITLES[metric][1], signed):>26}" for metric in METRICS)
        lines.append(f"{name[:23]:<24}{metrics[METRICS[0]]['cases']:>6}{cells}")
    return "\n".join(lines)


def with_interval(numbers: Mapping[str, float], form: str, signed: bool = False) -> str:
    """The mean of a `summary` and its interval, as people read it.

    >>> with_interval({"mean": 0.5, "low": 0.25, "high": 0.75}, "{:.2f}", signed=True)
    '+0.50 [+0.25, +0.75]'
    """
    form = form.replace(":", ":+") if signed else form
    if np.isnan(numbers["mean"]):
        return "–"
    mean = form.format(numbers["mean"])
    return (
        mean if np.isnan(numbers["low"]) else f"{mean} [{form.format(numbers['low'])}, {form.format(numbers['high'])}]"
    )


def write_rows(path: Path, runs: Mapping[str, Sequence[Row]]) -> None:
    """CSV: a line for each run, case and class; a number that is not defined is empty."""
    header = ["run", "case", "class", "truth_voxels", "predicted_voxels", *METRICS]
    lines = (
        [run, row.case, row.name, row.truth_voxels, row.predicted_voxels, *map(_text, dataclasses.astuple(row.scores))]
        for run, rows in runs.items()
        for row in rows
    )
    write_csv(path, header, lines)


def write_table(path: Path, table: Table) -> None:
    """CSV: a line for each class with the numbers of `summary` for each metric."""
    header = ["class", *(f"{metric}_{column}" for metric in METRICS for column in COLUMNS)]
    lines = (
        [name, *(_text(metrics[metric][column]) for metric in METRICS for column in COLUMNS)]
        for name, metrics in table.items()
    )
    write_csv(path, header, lines)


def _text(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"


def write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """A file of the header and these lines."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)
