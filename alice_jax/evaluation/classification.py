"""`evaluate --task classification`: how well classes can be told from a backbone's features.

    python -m alice_jax.evaluate --task classification --workdir RUN [--store STORE] [--labels CSV] [--columns NAME ...]

RUN is a run of pretraining, whose backbone is looked at as it is, or one of configs/classify.py, whose own head is
judged too, on patients that it has not seen. A scan's feature is the mean token over crops that cover its body; on it
k-NN and a linear probe are fitted, on "train" of the CSV's split or in repeated cross-validation, patients together.
AUROC, balanced accuracy and F1 come with 95 % intervals, from a bootstrap over patients.
"""

import argparse
import os
from collections.abc import Sequence

import numpy as np

from alice_jax import builtin, checkpoint, cli, host, tasks
from alice_jax.data import class_labels
from alice_jax.data.class_labels import ClassLabels
from alice_jax.data.store import Store
from alice_jax.errors import UserError, check_at_least
from alice_jax.evaluation import backbone, class_scores
from alice_jax.tasks.task import listed

Intervals = dict[str, tuple[float, float, float]]


def judged_rows(labels: ClassLabels) -> np.ndarray:
    """Of the file's "test", or "validation" if there is no test; all of a file that has no "train"."""
    if "train" not in labels.splits:
        return np.arange(len(labels.scans))
    rows = labels.rows(labels.of_split("test") or labels.of_split("validation"))
    if not len(rows):
        raise UserError("--labels: its column split has no 'test'; give some scans to it, or no column")
    return rows


def of_features(
    features: np.ndarray, labels: ClassLabels, folds: int, repeats: int, draws: int
) -> dict[str, Intervals]:
    """{classifier: measures} on features (n, c) of all labelled scans.

    Fitted on the file's "train" and judged on `judged_rows`; cross-validated where it has no "train".
    """
    classes, judged, fitted = len(labels.names), judged_rows(labels), labels.rows(labels.of_split("train"))
    patients, found = [labels.patients[row] for row in judged], {}
    for kind in class_scores.CLASSIFIERS:
        if len(fitted):
            scores = [class_scores.scores_of(kind, features[fitted], labels.targets[fitted], features[judged], classes)]
        else:
            scores = class_scores.cross_validated(kind, features, labels.targets, patients, classes, folds, repeats)
        found[kind] = class_scores.with_intervals(labels.targets[judged], scores, patients, draws)
    return found


def of_head(workdir: str, store: Store, labels: ClassLabels, features: np.ndarray, draws: int) -> dict[str, Intervals]:
    """What a run of configs/classify.py says itself of `judged_rows`, but for the patients that it has trained on.

    {} where nobody is left. Scans of the training are known by their ids, in whatever store.
    """
    _, state = checkpoint.restore_arrays(workdir, parts=("params", "host"))
    names = tuple(state["host"]["contract"]["classes"])
    if names != labels.names:
        raise UserError(
            f"--workdir {workdir}: tells {', '.join(names)} apart, the labels {', '.join(labels.names)}; give labels "
            "of these classes, in this order"
        )
    trained = set(state["host"]["coverage"]["counts"])
    seen = set(store.patients(sorted(trained & set(store.ids()))).values())
    rows = [row for row in judged_rows(labels) if labels.patients[row] not in seen]
    if not rows:
        return {}
    head = state["params"]["head"]
    logits = features[rows] @ head["kernel"] + head["bias"]
    scores = np.asarray(tasks.classify.classification.probabilities(logits, labels.multi))
    patients = [labels.patients[row] for row in rows]
    measures = class_scores.with_intervals(labels.targets[rows], [scores], patients, draws)
    return {f"its head, {len(rows)} unseen": measures}


def table(found: dict[str, Intervals]) -> str:
    """The measures as lines of text."""
    lines = [f"{'':<26}" + "".join(f"{name.replace('_', ' '):>22}" for name in class_scores.MEASURES)]
    for name, measures in found.items():
        cells = (f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in measures.values())
        lines.append(f"{name:<26}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parse(argv)
    host.settle()
    trained = backbone.load(args.workdir, args.which)
    store = Store.open(args.store or builtin.labelled_patients())
    config = checkpoint.read_config(args.workdir) or {}
    own_head = config.get("objective") == "classification" and args.which != "random"
    path = args.labels or (own_head and config["data"]["labels"]) or os.path.join(store.path, class_labels.FILE)
    columns = args.columns or (listed(config["data"]["label_columns"]) if own_head else [])
    labels = class_labels.read(path, store, columns)
    features = trained.scan_features(store, labels.scans)
    counts = class_labels.summary(labels.counts(np.arange(len(labels.scans))))
    how = (
        "the split of the file"
        if "train" in labels.splits
        else f"{args.repeats} cross-validations of up to {args.folds} folds"
    )
    print(f"{len(labels.scans)} scans ({counts}); {args.which} backbone of {args.workdir}; {how}")
    found = of_features(features, labels, args.folds, args.repeats, args.draws)
    if own_head:
        found |= (head := of_head(args.workdir, store, labels, features, args.draws))
        if not head:
            cli.say("its head is not judged: the run has trained on all patients of whom it would be")
    print(table(found))
    if args.json:
        cli.write_numbers(args.json, found)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m alice_jax.evaluate --task classification",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="run of pretraining or of configs/classify.py")
    parser.add_argument("--which", choices=backbone.WHICH, default="teacher", help="network of a pretraining run")
    parser.add_argument("--store", metavar="DIR", help="of the labelled scans (default: the built-in ones)")
    parser.add_argument("--labels", metavar="CSV", help="scan, labels and perhaps split (default: STORE/labels.csv)")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME", help="labels of the CSV (default: all)")
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation, at most (default: 5)")
    parser.add_argument("--repeats", type=int, default=5, help="of the cross-validation (default: 5)")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap (default: 1000)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    args = parser.parse_args(argv)
    for name, least in (("folds", 2), ("repeats", 1), ("draws", 2)):
        check_at_least(least, f"--{name}", getattr(args, name))
    cli.check_folder_of("--json", args.json)
    return args
