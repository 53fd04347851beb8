"""How well predicted labels fit the true ones: Dice, HD95 and NSD for each case and class.

    python -m alice_jax.evaluate --task segmentation --predictions DIR --truth DIR [--against DIR2] [--out DIR3]

Folders hold one label file a case, named alike (case.nii.gz). Classes are compared by name where both folders say what
their numbers mean (labels.json or dataset.json there or one folder up), else by number. A class that neither of the two
files has is left out of all means; one that only one of them has counts with Dice 0, NSD 0 and the image's diagonal as
HD95. With --against the same cases of another run are compared pair by pair (docs/predict.md).
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from alice_jax import cli
from alice_jax.data import geometry, label_maps, sources
from alice_jax.data.rejection import Rejected
from alice_jax.errors import UserError, check_at_least
from alice_jax.evaluation import averages
from alice_jax.evaluation.averages import Row
from alice_jax.evaluation.surfaces import score

NAMES = ("labels.json", "dataset.json")


@dataclasses.dataclass(frozen=True)
class Labels:
    """A folder of label files.

    Attributes:
      files: path of each case.
      names: of the numbers from 1 upward; None where nothing says.
    """

    files: dict[str, str]
    names: dict[int, str] | None

    @staticmethod
    def of(folder: str, flag: str, names_file: str | None = None) -> "Labels":
        """Those of a folder, or a `UserError` where there are none."""
        files = sources.files_below(folder)
        if not files:
            raise UserError(f"{flag} {folder}: is no folder of label files; give one with a NIfTI file for each case")
        nearby = [at / name for at in (Path(folder), Path(folder).absolute().parent) for name in NAMES]
        table = names_file or next((path for path in nearby if path.is_file()), None)
        return Labels(files, label_maps.names_of(table) if table else None)

    def codes(self, case: str) -> tuple[np.ndarray, np.ndarray]:
        """The numbers (i, j, k) of a case and their affine; a `UserError` for numbers without name."""
        try:
            image = label_maps.read_codes(self.files[case])
        except Rejected as reason:
            raise UserError(f"{self.files[case]}: {reason}") from None
        codes = image.hu_ijk
        if self.names is not None and (unknown := set(np.unique(codes).tolist()) - {0, *self.names}):
            raise UserError(
                f"{self.files[case]}: has the label {min(unknown)}, which has no name; names are known of "
                f"{', '.join(map(str, self.names))}"
            )
        return codes, image.affine_ras


def agree(truth: Labels, predicted: Labels, chosen: Sequence[str]) -> tuple[Labels, Labels, tuple[str, ...]]:
    """Both with names, or none where neither has any, and the classes to judge; a `UserError` where they do not fit.

    Args:
      chosen: names of the classes to judge; all of the truth by default.
    """
    truth = dataclasses.replace(truth, names=truth.names or predicted.names)
    predicted = dataclasses.replace(predicted, names=predicted.names or truth.names)
    if truth.names is None or predicted.names is None:
        if chosen:
            raise UserError(f"--names {' '.join(chosen)}: nothing says which number is which; give --label-names")
        return truth, predicted, ()
    judged = tuple(chosen) or tuple(dict.fromkeys(truth.names.values()))
    for labels, words in ((truth, "the truth"), (predicted, "the predictions")):
        known = set((labels.names or {}).values())
        if unknown := [name for name in judged if name not in known]:
            raise UserError(
                f"{words} have no class {unknown[0]!r}, but {', '.join(sorted(known))}; choose what to judge by --names"
            )
    return truth, predicted, judged


def compare(truth: Labels, predicted: Labels, case: str, judged: Sequence[str], tolerance_mm: float) -> list[Row]:
    """The judged classes of a case, or where nothing has a name all its numbers."""
    true_codes, affine_ras = truth.codes(case)
    codes, other_affine = predicted.codes(case)
    files = f"{predicted.files[case]} and {truth.files[case]}"
    if codes.shape != true_codes.shape:
        raise UserError(
            f"{files}: have {codes.shape} and {true_codes.shape} voxels; predict on the file that was labelled"
        )
    if (shift := geometry.corner_shift(codes.shape, other_affine, affine_ras)) > geometry.LARGEST_SHIFT:
        raise UserError(f"{files}: have a corner {shift:.1f} voxels apart; predict on the file that was labelled")
    if judged:
        pairs = [(name, _number(truth, name), _number(predicted, name)) for name in judged]
    else:
        numbers = sorted({*np.unique(true_codes).tolist(), *np.unique(codes).tolist()} - {0})
        pairs = [(f"label {number}", number, number) for number in numbers]
    rows = []
    for name, true_code, code in pairs:
        true_mask, mask = true_codes == true_code, codes == code
        scores = score(true_mask, mask, geometry.spacing_xyz(affine_ras).tolist(), tolerance_mm)
        rows.append(Row(case, name, int(true_mask.sum()), int(mask.sum()), scores))
    return rows


def _number(labels: Labels, name: str) -> int:
    return next(code for code, known in (labels.names or {}).items() if known == name)


def evaluate(
    truth: Labels, predicted: Labels, flag: str, only: Sequence[str], chosen: Sequence[str], tolerance_mm: float
) -> list[Row]:
    """All cases, which must be the same on both sides unless `only` names them."""
    truth, predicted, judged = agree(truth, predicted, chosen)
    cases = list(dict.fromkeys(only)) or sorted({*truth.files, *predicted.files})
    for case in cases:
        for labels, where in ((truth, "--truth"), (predicted, flag)):
            if case not in labels.files:
                raise UserError(f"{where}: has no file for case {case}; add it, or name the cases to judge by --only")
    bar = tqdm(cases, f"Comparing {flag[2:]}", unit="case", file=sys.stderr)
    return [row for case in bar for row in compare(truth, predicted, case, judged, tolerance_mm)]


# -------------------------------------------------------------------- the task


def main(argv: Sequence[str] | None = None) -> int:
    """The task; returns its exit code."""
    args = _parse(argv)
    truth = Labels.of(args.truth, "--truth", args.label_names)
    folders = {"--predictions": args.predictions} | ({"--against": args.against} if args.against else {})
    found = {
        flag: evaluate(truth, Labels.of(folder, flag), flag, args.only, args.names, args.tolerance)
        for flag, folder in folders.items()
    }
    tables = {}
    for flag, rows in found.items():
        name = "classes" if flag == "--predictions" else "classes_against"
        tables[name] = table = averages.summaries(rows, args.seed)
        print(averages.report(f"{folders[flag]}: mean and {averages.CONFIDENCE:.0%} interval over cases", table))
        print(_empty(rows) + "\n")
    if args.against:
        tables["differences"] = table = averages.differences(found["--predictions"], found["--against"], args.seed)
        title = f"{args.predictions} minus {args.against}, the same cases: mean and {averages.CONFIDENCE:.0%} interval"
        print(averages.report(title, table, signed=True))
    if args.out:
        _write(Path(args.out), found, tables)
    return 0


def _empty(rows: Sequence[Row]) -> str:
    """How often a class was empty, and what that counts as."""
    absent = sum(not row.truth_voxels and not row.predicted_voxels for row in rows)
    missed = sum(bool(row.truth_voxels) and not row.predicted_voxels for row in rows)
    invented = sum(not row.truth_voxels and bool(row.predicted_voxels) for row in rows)
    return (
        f"{len(rows)} masks: {missed} missed and {invented} invented (Dice and NSD 0, HD95 the image's diagonal), "
        f"{absent} in neither file (left out)"
    )


def _write(out: Path, found: Mapping[str, Sequence[Row]], tables: Mapping[str, averages.Table]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        averages.write_rows(out / "cases.csv", {flag[2:]: rows for flag, rows in found.items()})
        for name, table in tables.items():
            averages.write_table(out / f"{name}.csv", table)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}; name a folder that can be written to") from None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m alice_jax.evaluate --task segmentation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--predictions", required=True, metavar="DIR", help="labels that alice_jax.predict wrote")
    parser.add_argument("--truth", required=True, metavar="DIR", help="the true labels")
    parser.add_argument("--against", metavar="DIR", help="labels of another run for the same cases")
    parser.add_argument("--tolerance", type=float, default=2.0, metavar="MM", help="of the NSD (default: 2)")
    parser.add_argument("--label-names", metavar="JSON", help="of the truth (default: its labels.json or dataset.json)")
    parser.add_argument(
        "--names", nargs="+", default=[], metavar="CLASS", help="classes to judge (default: the truth's)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="cases to judge (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling of cases")
    parser.add_argument("--out", metavar="DIR", help="also write cases.csv, classes.csv and differences.csv there")
    args = parser.parse_args(argv)
    if not args.tolerance >= 0:
        raise UserError(f"--tolerance {args.tolerance}: give millimetres, 0 or more")
    check_at_least(0, "--seed", args.seed)
    return args
