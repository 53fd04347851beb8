"""What class each scan is of, from a CSV with a row for each scan.

    scan,split,phase         scan: id in the store, or the path of the file that it was prepared from
    case_7,train,portal      split: train, validation or test; may be left out
    case_9,test,arterial     every other column is a label

One label column names one of K classes. Of several each is 0 or 1, and a scan may have any number of them.
"""

import csv
import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from alice_jax.data.store import Store
from alice_jax.errors import UserError

FILE = "labels.csv"  # in a store's folder, where no other file is named
SCAN, SPLIT = "scan", "split"
SPLITS = ("train", "validation", "test")
FEWEST = 2  # scans of a class: one to learn from and one to judge by


@dataclasses.dataclass(frozen=True)
class ClassLabels:
    """The classes of some scans.

    Attributes:
      scans: (n,) ids in the store.
      names: of the K classes, or of the labels.
      targets: (n,) int32 class, or (n, labels) float32 of 0 and 1.
      splits: (n,) one of `SPLITS`; empty where the file does not say.
      patients: (n,) of the scans, as the store has them.
    """

    scans: tuple[str, ...]
    names: tuple[str, ...]
    targets: np.ndarray
    splits: tuple[str, ...]
    patients: tuple[str, ...]

    @property
    def multi(self) -> bool:
        """Whether a scan may have several labels."""
        return self.targets.ndim == 2

    def rows(self, scans: Sequence[str]) -> np.ndarray:
        """(n,) places of these scans."""
        place = {scan: row for row, scan in enumerate(self.scans)}
        return np.array([place[scan] for scan in scans], int)

    def of_split(self, split: str) -> tuple[str, ...]:
        """The scans of a split of the file."""
        return tuple(scan for scan, name in zip(self.scans, self.splits, strict=bool(self.splits)) if name == split)

    def counts(self, rows: np.ndarray) -> dict[str, tuple[int, int]]:
        """Of each class or label, how many of these scans have it and how many have not."""
        told = self.targets[rows] > 0 if self.multi else self.targets[rows, None] == np.arange(len(self.names))
        have = told.sum(axis=0)
        return {name: (int(n), len(rows) - int(n)) for name, n in zip(self.names, have, strict=True)}


def read(path: str, store: Store, columns: Sequence[str] = ()) -> ClassLabels:
    """The labels in a CSV.

    Args:
      columns: the label columns to take; all by default.

    Raises:
      UserError: what is missing, unknown or too few, in one line.
    """
    header, rows = _rows(path)
    labels = _columns(path, header, columns)
    scans = _scans(path, {line: row[SCAN].strip() for line, row in rows.items()}, store)
    values = {name: _values(path, rows, name) for name in labels}
    splits = _values(path, rows, SPLIT) if SPLIT in header else {}
    for line, split in splits.items():
        if split not in SPLITS:
            raise UserError(f"{path}, line {line}: {SPLIT} {split!r}; write {', '.join(SPLITS)}")
    if len(labels) > 1:
        names, targets = tuple(labels), np.stack([_binary(path, name, values[name]) for name in labels], axis=1)
    else:
        of_scans = values[labels[0]].values()
        names = tuple(sorted(set(of_scans)))
        targets = np.array([names.index(value) for value in of_scans], np.int32)
    patients = tuple(scan.patient for scan in store.scans(scans))
    read = ClassLabels(scans, names, targets, tuple(splits.values()), patients)
    _check_patients(path, read)
    _check_counts(path, labels, read)
    return read


def _rows(path: str) -> tuple[list[str], dict[int, dict[str, str]]]:
    """The names in the first row, and the rows below it by their lines; lines without a value are passed over."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a CSV with the columns {SCAN} and a label") from error
    reader = csv.reader(text.splitlines())
    numbered = ((reader.line_num, row) for row in reader)
    rows = {line: row for line, row in numbered if any(map(str.strip, row))}
    header = [name.strip() for name in rows.pop(min(rows))] if rows else []
    if SCAN not in header or not rows or len(set(header)) < len(header):
        raise UserError(
            f"{path}: give a first row of names, {SCAN} and the labels, each once, then a row for each scan"
        )
    for line, row in rows.items():
        if len(row) != len(header):
            raise UserError(f"{path}, line {line}: has {len(row)} values and the first row has {len(header)} names")
    return header, {line: dict(zip(header, row, strict=True)) for line, row in rows.items()}


def _columns(path: str, header: list[str], wanted: Sequence[str]) -> list[str]:
    there = [name for name in header if name not in (SCAN, SPLIT)]
    if not there:
        raise UserError(f"{path}: has no column of labels beside {', '.join(header)}")
    for name in wanted:
        if name not in there:
            raise UserError(f"{path}: has no label {name!r}; there are {', '.join(there)}")
    return list(dict.fromkeys(wanted)) or there


def _scans(path: str, given: dict[int, str], store: Store) -> tuple[str, ...]:
    """The ids of scans that are given, by their lines, by id or by the path of their file."""
    ids = store.ids()
    unknown = set(given.values()) - set(ids)
    by_name = {os.path.abspath(scan.file): scan.id for scan in store.scans(ids)} if unknown else {}
    by_name |= {id: id for id in ids}
    found: dict[str, int] = {}
    for line, name in given.items():
        id = by_name.get(name) or by_name.get(os.path.abspath(name))
        if id is None:
            near = difflib.get_close_matches(name, ids, n=1, cutoff=0.5) or ids[:1]
            hint = f" such as {near[0]}" if near else ""
            raise UserError(
                f"{path}, line {line}: {name!r} is no scan of the store {store.path}; give ids{hint}, or paths"
            )
        if id in found:
            raise UserError(f"{path}, line {line}: scan {id} stands in line {found[id]} already; keep one of the two")
        found[id] = line
    return tuple(found)


def _values(path: str, rows: dict[int, dict[str, str]], name: str) -> dict[int, str]:
    values = {line: row[name].strip() for line, row in rows.items()}
    for line, value in values.items():
        if not value:
            raise UserError(f"{path}, line {line}: {name} is empty; fill it in or leave the row out")
    return values


def _binary(path: str, name: str, values: dict[int, str]) -> np.ndarray:
    for line, value in values.items():
        if value not in ("0", "1"):
            raise UserError(
                f"{path}, line {line}: {name} is {value!r}; of several labels each is 0 or 1, or choose one alone "
                "(data.label_columns, --columns)"
            )
    return np.array(list(values.values())).astype(np.float32)


def _check_patients(path: str, labels: ClassLabels) -> None:
    """What was learnt of a patient would show on another scan of theirs."""
    first: dict[str, tuple[str, str]] = {}
    for patient, scan, split in zip(labels.patients, labels.scans, labels.splits, strict=bool(labels.splits)):
        other, there = first.setdefault(patient, (scan, split))
        if there != split:
            raise UserError(
                f"{path}: scans {other} ({there}) and {scan} ({split}) are of one patient, {patient}; "
                f"give all scans of a patient the same {SPLIT}"
            )


def _check_counts(path: str, columns: list[str], labels: ClassLabels) -> None:
    if len(labels.names) < 2:
        raise UserError(f"{path}: {columns[0]} is {labels.names[0]!r} everywhere; there is nothing to tell apart")
    for name, counts in labels.counts(np.arange(len(labels.scans))).items():
        for having, count in zip(("has", "lacks") if labels.multi else ("is of",), counts, strict=False):
            if count < FEWEST:
                what = f"{name} at all" if labels.multi and not count else name
                raise UserError(
                    f"{path}: {('no scan' if not count else 'a single scan')} {having} {what}; "
                    f"each class needs {FEWEST} scans or more: add some, merge it with another, or leave it out"
                )


def summary(counts: Mapping[str, tuple[int, int]]) -> str:
    """How many scans have each label.

    >>> summary({"portal": (14, 10), "none": (6, 18)})
    '14 portal, 6 none'
    """
    return ", ".join(f"{have} {name}" for name, (have, _) in counts.items())
