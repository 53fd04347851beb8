"""Measures a trained part on data with known answers.

    python -m alice_jax.evaluate --task landmarks --store DIR [--truth FOLDER] [--only ID ...]
    python -m alice_jax.evaluate --task segmentation --predictions DIR --truth DIR [--against DIR]
    python -m alice_jax.evaluate --task classification --workdir RUN [--store DIR] [--labels CSV]

`segmentation` (Dice, HD95, NSD) and `classification` (k-NN and a linear probe on features) say more with `--help`.
`landmarks`: how far matched points lie from the true ones, in millimetres, for the project's matcher, for the dense
matching of the paper, for the baseline that maps a point to the same relative position of the other body's box, and,
with --backbone RUN, for the features of a pretrained backbone; all get the same points. What is true comes from
phantoms, from FOLDER/<scan id>/landmarks.json, or from FOLDER/<scan id>/labels.nii.gz (docs/landmarks.md). The store
needs embeddings.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from alice_jax import cli
from alice_jax.data import label_maps, landmarks, matching
from alice_jax.data.landmarks import Questions, Truth
from alice_jax.data.store import Store
from alice_jax.errors import UserError, check_at_least
from alice_jax.evaluation import backbone, classification, segmentation
from alice_jax.evaluation.backbone import CellVectors

WITHIN_MM = 10.0
METHODS = ("baseline", "dense", "match")
LABELS = {
    "baseline": "relative position",
    "dense": "dense, as in the paper",
    "match": "matcher",
    "trusted": "matcher, where trusted",
    "backbone": "backbone, dense",
}


@dataclasses.dataclass(frozen=True)
class Answers:
    """Questions of one kind over all pairs, and how each method did.

    Attributes:
      names: (n,) landmark or organ.
      pairs: of scans.
      errors_mm: (n,) by method; NaN where the true place is unknown.
      same_organ: (n,) by method, 1 where the match lies in the organ that it should, else 0; NaN where nobody asked.
      trusted: (n,) whether the matcher trusts itself.
    """

    names: np.ndarray
    pairs: int
    errors_mm: dict[str, np.ndarray]
    same_organ: dict[str, np.ndarray]
    trusted: np.ndarray


def answer(
    store: Store,
    reader: matching.EmbeddingReader,
    pair: tuple[str, str],
    questions: Questions,
    cells_of: Callable[[str], CellVectors] | None = None,
) -> dict[str, np.ndarray]:
    """The places (n, 3) that each method finds in the key, and whether the matcher trusts itself.

    cells_of: a backbone's vectors of a scan, which then are another method.
    """
    query, key = (reader(id) for id in pair)
    boxes = [np.array(store.scan(id).foreground_box_zyx_vox) for id in pair]
    points = questions.points_zyx_vox
    found = matching.match(query, points, key)
    answers = {
        "baseline": matching.relative_position(points, *boxes),
        "dense": matching.dense(query, points, key, subcell=False).points_zyx_vox,
        "match": found.points_zyx_vox,
        "trusted": found.trusted,
    }
    if cells_of is not None:
        answers["backbone"] = cells_of(pair[0]).match(points, cells_of(pair[1]))
    return answers


def measure(
    store: Store,
    truth: Truth,
    pairs: Sequence[tuple[str, str]],
    cells_of: Callable[[str], CellVectors] | None = None,
) -> Answers:
    """Asks all questions of these pairs (query, key); `cells_of` as for `answer`."""
    if not pairs:
        raise UserError(f"store {store.path}: no two of these scans share a landmark or organ; choose others by --only")
    reader = matching.EmbeddingReader(store)
    names, trusted = [], []
    methods = METHODS if cells_of is None else (*METHODS, "backbone")
    errors: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    same: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    for pair in tqdm(pairs, desc="Matching", unit="pair", file=sys.stderr):
        questions = truth.ask(*pair)
        found = answer(store, reader, pair, questions, cells_of)
        spacing = np.array(store.scan(pair[1]).spacing_zyx_mm)
        asked = questions.organs != ""
        names.append(questions.names)
        trusted.append(found["trusted"])
        for method in methods:
            errors[method].append(np.linalg.norm((found[method] - questions.truth_zyx_vox) * spacing, axis=1))
            hits = np.full(len(asked), np.nan)
            if asked.any():
                hits[asked] = truth.organ_at(pair[1], found[method][asked]) == questions.organs[asked]
            same[method].append(hits)
    join = {name: np.concatenate(value) for name, value in errors.items()}
    hits_of = {name: np.concatenate(value) for name, value in same.items()}
    return Answers(np.concatenate(names), len(pairs), join, hits_of, np.concatenate(trusted))


def matching_errors(store: Store, ids: Sequence[str], n_points: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Errors in mm of `n_points` random points of each phantom matched into the next one, the last into the first.

    Returns:
      {"baseline", "dense", "match"}: (points,) arrays in the same order.
    """
    if len(ids) < 2:
        raise UserError(f"store {store.path}: landmarks need two scans or more, got {len(ids)}")
    truth = landmarks.KnownPoints(store, ids, n_points, int(rng.integers(2**31)))
    return measure(store, truth, landmarks.pairs(ids, truth, len(ids))).errors_mm


# -------------------------------------------------------------------- numbers


def summary(errors_mm: np.ndarray, same_organ: np.ndarray | None = None) -> dict[str, float]:
    """Median, mean and 95th percentile in mm, the share within 10 mm, and the share in the right organ.

    What is unknown (NaN) is left out; a number of nothing is NaN.

    >>> summary(np.array([1.0, 3.0, 14.0, np.nan]), np.array([np.nan, np.nan, np.nan, 1.0]))
    ... # doctest: +NORMALIZE_WHITESPACE
    {'points': 3, 'median_mm': 3.0, 'mean_mm': 6.0, 'p95_mm': 12.9, 'within_10_mm': 0.667,
     'organ_points': 1, 'same_organ': 1.0}
    """
    known = errors_mm[~np.isnan(errors_mm)]
    values: dict[str, float] = {"points": len(known)}
    values |= {
        "median_mm": np.median(known) if len(known) else np.nan,
        "mean_mm": known.mean() if len(known) else np.nan,
        "p95_mm": np.percentile(known, 95) if len(known) else np.nan,
        "within_10_mm": np.mean(known <= WITHIN_MM) if len(known) else np.nan,
    }
    if same_organ is not None and not np.isnan(same_organ).all():
        hits = same_organ[~np.isnan(same_organ)]
        values |= {"organ_points": len(hits), "same_organ": hits.mean()}
    return {name: value if isinstance(value, int) else round(float(value), 3) for name, value in values.items()}


def summaries(answers: Answers) -> dict[str, dict[str, dict[str, float]]]:
    """{row: {method: summary}}; the rows are the landmarks or organs and at last "all".

    The method "trusted" is the matcher where it trusts itself; its "share" tells how often.
    """
    rows = {}
    for name in [*dict.fromkeys(sorted(answers.names)), "all"]:
        chosen = answers.names == name if name != "all" else np.full(len(answers.names), True)
        kept = chosen & answers.trusted
        rows[name] = {
            method: summary(errors_mm[chosen], answers.same_organ[method][chosen])
            for method, errors_mm in answers.errors_mm.items()
        }
        judged = summary(answers.errors_mm["match"][kept], answers.same_organ["match"][kept])
        rows[name]["trusted"] = judged | {"share": round(float(kept.sum() / max(chosen.sum(), 1)), 3)}
    return rows


def table(errors_mm: dict[str, np.ndarray]) -> str:
    """The summaries of methods as lines of text."""
    return "\n".join([_header("matching error"), *(_line(name, summary(values)) for name, values in errors_mm.items())])


def report(kind: str, answers: Answers) -> str:
    """A line for each landmark or organ, then all of them with more numbers."""
    rows = summaries(answers)
    organs = not all(np.isnan(values).all() for values in answers.same_organ.values())
    methods = tuple(answers.errors_mm)
    lines = [f"{kind}: {answers.pairs} ordered pairs of scans, {len(answers.names)} points"]
    if len(rows) > 2:
        columns = f"{'median':>10}{'p95':>6}{'≤10':>6}" + (f"{'organ':>7}" if organs else "")
        titles = "".join(f"   {LABELS[m].split(',')[0]:<{len(columns) - 3}}" for m in methods)
        lines += [f"{'':<26}{titles}", f"{'':<20}{'points':>6}{columns * len(methods)}{'trusted':>9}"]
        lines += [_row(name, row, methods, organs) for name, row in rows.items() if name != "all"]
    lines += [_header("all") + (f"{'same organ':>12}" if organs else "")]
    for method, values in rows["all"].items():
        line = _line(method, values) + (_cell(values.get("same_organ"), "{:.0%}", 12) if organs else "")
        lines.append(line + (f"   ({values['share']:.0%} trusted)" if method == "trusted" else ""))
    return "\n".join(lines)


def _row(name: str, row: dict[str, dict[str, float]], methods: Sequence[str], organs: bool) -> str:
    parts = [f"{name[:19]:<20}{row['match']['points']:>6}"]
    for method in methods:
        values = row[method]
        parts += [_cell(values["median_mm"], "{:.1f}", 10), _cell(values["p95_mm"], "{:.1f}", 6)]
        parts.append(_cell(values["within_10_mm"], "{:.0%}", 6))
        parts += [_cell(values.get("same_organ"), "{:.0%}", 7)] if organs else []
    return "".join(parts) + _cell(row["trusted"]["share"], "{:.0%}", 9)


def _header(title: str) -> str:
    return f"{title:<26}{'points':>8}{'median':>10}{'mean':>10}{'p95':>10}{'≤ 10 mm':>10}"


def _line(method: str, values: Mapping[str, float]) -> str:
    numbers = "".join(_cell(values[key], "{:.1f} mm", 10) for key in ("median_mm", "mean_mm", "p95_mm"))
    return (
        f"{LABELS.get(method, method):<26}{values['points']:>8}{numbers}{_cell(values['within_10_mm'], '{:.0%}', 10)}"
    )


def _cell(value: float | None, form: str, width: int) -> str:
    return f"{'–' if value is None or np.isnan(value) else form.format(value):>{width}}"


# -------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    which = cli.Parser(add_help=False)
    which.add_argument("--task")
    task, rest = which.parse_known_args(argv)
    if task.task == "segmentation":
        return segmentation.main(rest)
    if task.task == "classification":
        return classification.main(rest)
    args = _parse(argv)
    store = Store.open(args.store)
    for id in args.only:
        store.scan(id)  # or an error that names near ones
    ids = list(dict.fromkeys(args.only)) or store.ids()
    if len(ids) < 2:
        raise UserError(f"--store {store.path}: landmarks need two scans or more, got {len(ids)}")
    matching.read_embedding(store, ids[0])  # where there is none, an error before the work
    names = label_maps.names_of(args.label_names) if args.label_names else None
    truths = landmarks.read_truth(store, ids, args.truth, names, args.names, args.points, args.seed)
    cells_of = None
    if args.backbone:
        trained = backbone.load(args.backbone, args.which, "--backbone")
        cells_of = functools.cache(functools.partial(trained.cell_vectors, store))
    numbers: dict[str, Any] = {}
    for kind, truth in truths.items():
        found = landmarks.pairs(ids, truth, args.pairs)
        if not found and len(truths) > 1:
            print(f"{kind}: no two of these scans share one\n")
            continue
        answers = measure(store, truth, found, cells_of)
        print(report(kind, answers))
        print(_about(kind, truth) + "\n")
        numbers[kind] = {"pairs": answers.pairs, "rows": summaries(answers)}
    if args.json:
        cli.write_numbers(args.json, numbers)
    return 0


def _about(kind: str, truth: Truth) -> str:
    """What the numbers of a kind mean, in a line."""
    if isinstance(truth, landmarks.Organs):
        cut = {name for labels in truth.labels.values() for name in labels.cut_off}
        words = "mm: centroid of the organ against its centroid; organ: random points of it that stay in it."
        if cut:
            shown = ", ".join(sorted(cut)[:6]) + (", …" if len(cut) > 6 else "")
            words += f" Not the centroids that the edge of a scan cuts off ({shown})."
        return words
    if kind == "landmarks":
        return "Distances from the marks, whose own error they hold. Places: world_ras_mm where given, else voxel_ijk."
    return "Random points of phantom bodies, whose true places are known exactly."


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m alice_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=["landmarks", "segmentation", "classification"])
    parser.add_argument("--store", required=True, metavar="DIR", help="store with embeddings")
    parser.add_argument("--backbone", metavar="RUN", help="run of pretraining whose own features are matched too")
    parser.add_argument("--which", choices=backbone.WHICH, default="teacher", help="network of that run")
    parser.add_argument("--truth", metavar="FOLDER", help="of <scan id>/landmarks.json and <scan id>/labels.nii.gz")
    parser.add_argument("--label-names", metavar="JSON", help='{"1": "spleen", …} (default: "labels" of meta.json)')
    parser.add_argument("--only", nargs="+", default=[], metavar="ID", help="scans to judge (default: all)")
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help="landmarks and organs (default: all)")
    parser.add_argument("--pairs", type=int, default=200, help="ordered pairs of scans at most (default: 200)")
    parser.add_argument("--points", type=int, default=200, help="random points of each pair (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of points")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    args = parser.parse_args(argv)
    for name, least in (("pairs", 1), ("points", 1), ("seed", 0)):
        check_at_least(least, f"--{name}", getattr(args, name))
    cli.check_folder_of("--json", args.json)
    return args


if __name__ == "__main__":
    cli.run(main)
