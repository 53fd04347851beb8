"""Measures a trained part on data with known answers.

    python -m alice_jax.evaluate --task landmarks --store DIR

`landmarks`: how far matched points lie from the true ones, beside the baseline that maps a point to the same relative
position of the other body's box. The store needs embeddings and known correspondence (phantom patients).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alice_jax import cli
from alice_jax.data import matching, phantom
from alice_jax.data.store import Store
from alice_jax.errors import UserError

WITHIN_MM = 10.0


def matching_errors(store: Store, ids: Sequence[str], n_points: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Errors in mm of `n_points` random points of each scan matched into the next one, the last into the first.

    Returns:
      {"embedder", "baseline"}: (points,) arrays in the same order.
    """
    if len(ids) < 2:
        raise UserError(f"store {store.path}: landmarks need two scans or more, got {len(ids)}")
    reader = matching.EmbeddingReader(store)
    errors: dict[str, list[np.ndarray]] = {"embedder": [], "baseline": []}
    for id_a, id_b in zip(ids, [*ids[1:], ids[0]], strict=True):
        a, b = store.scan(id_a), store.scan(id_b)
        points, truth = phantom.shared_points(phantom.patient_of(a), phantom.patient_of(b), n_points, rng)
        boxes = np.array(a.foreground_box_zyx_vox), np.array(b.foreground_box_zyx_vox)
        found = {
            "embedder": matching.match(reader(id_a), points, reader(id_b)).points_zyx_vox,
            "baseline": matching.relative_position(points, boxes[0], boxes[1]),
        }
        for name, value in found.items():
            errors[name].append(np.linalg.norm((value - truth) * np.array(b.spacing_zyx_mm), axis=1))
    return {name: np.concatenate(value) for name, value in errors.items()}


def summary(errors_mm: np.ndarray) -> dict[str, float]:
    """Median, mean and 95th percentile in mm, and the share within 10 mm.

    >>> summary(np.array([1.0, 3.0, 14.0]))
    {'median_mm': 3.0, 'mean_mm': 6.0, 'p95_mm': 12.9, 'within_10_mm': 0.667}
    """
    values = {
        "median_mm": np.median(errors_mm),
        "mean_mm": np.mean(errors_mm),
        "p95_mm": np.percentile(errors_mm, 95),
        "within_10_mm": np.mean(errors_mm <= WITHIN_MM),
    }
    return {name: round(float(value), 3) for name, value in values.items()}


def table(errors_mm: dict[str, np.ndarray]) -> str:
    """The summaries as lines of text."""
    lines = [f"{'matching error':<20}{'median':>10}{'mean':>10}{'p95':>10}{'within 10 mm':>15}"]
    for name, label in (("baseline", "relative position"), ("embedder", "embedder")):
        s = summary(errors_mm[name])
        numbers = "".join(f"{s[key]:>7.1f} mm" for key in ("median_mm", "mean_mm", "p95_mm"))
        lines.append(f"{label:<20}{numbers}{s['within_10_mm']:>13.0%}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = cli.Parser(
        prog="python -m alice_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=["landmarks"])
    parser.add_argument("--store", required=True, help="store with embeddings")
    parser.add_argument("--points", type=int, default=200, help="points matched from each scan")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of points")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if args.points < 1:
        raise UserError(f"--points {args.points}: give a whole number of 1 or more")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it or name another file")
    store = Store.open(args.store)
    errors = matching_errors(store, store.ids(), args.points, np.random.default_rng(args.seed))
    print(table(errors))
    if args.json:
        numbers = {name: summary(value) for name, value in errors.items()} | {"points": len(errors["embedder"])}
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
