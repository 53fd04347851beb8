"""What each part of the matcher and of the embedder's training contributes, on phantom patients that nothing has seen.

    python benchmarks/matching.py --workdir DIR               the matchers, for a trained embedder
    python benchmarks/matching.py --train --out DIR           trains the variants below, one after the other
    --json FILE                                               the numbers as well as the table

The points are the same for all rows: 200 of each of the six unseen patients of the built-in cohort, matched into the
next patient. A training takes `--steps` steps of configs/embedder.py:tiny (3 to 4 minutes of two cores at 150), and
goes on where it stopped when the command is repeated.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import measuring
import numpy as np

from alice_jax import builtin, cli, embed, evaluate, train
from alice_jax.data import consensus, landmarks, matching, phantom
from alice_jax.data.embeddings import Embedding
from alice_jax.data.store import Store

CONFIG = Path(__file__).parents[1] / "configs" / "embedder.py"
Matcher = Callable[[Embedding, np.ndarray, Embedding], tuple[np.ndarray, np.ndarray]]

LEVELS = ("fine", "coarse", "joint")
RECIPE = "tiny recipe"
TRAININGS: dict[str, dict[str, Any]] = {
    RECIPE: {},
    "without the joint term": {"loss.joint.weight": 0.0},
    "temperature 0.5, as published": {f"loss.{level}.temperature": 0.5 for level in LEVELS},
    "without bends": {"views.bend_mm": 0.0},
    "without tones and shades": {"views.tone_hu": 0.0, "views.shade_hu": 0.0},
    "with stretches of 16 mm": {"views.stretch_mm": 16.0},
    "positives spread over 5 mm": {"loss.fine.spread_mm": 5.0, "loss.joint.spread_mm": 5.0},
}
# Further trainings that start from the recipe's weights, of the same length, and so of the same cost.
FURTHER = {"recipe, then within patients": 0.0, "recipe, then half of it across patients": 0.5}


def dense(subcell: bool) -> Matcher:
    """The paper's search, with or without what is refined below a cell; everything is kept."""

    def run(query: Embedding, points: np.ndarray, key: Embedding) -> tuple[np.ndarray, np.ndarray]:
        return matching.dense(query, points, key, subcell=subcell).points_zyx_vox, np.full(len(points), True)

    return run


def searched(query: Embedding, points: np.ndarray, key: Embedding) -> tuple[np.ndarray, np.ndarray]:
    """The hierarchical search alone."""
    return matching.search(query, points, key).points_zyx_vox, np.full(len(points), True)


def searched_and_returned(query: Embedding, points: np.ndarray, key: Embedding) -> tuple[np.ndarray, np.ndarray]:
    """The hierarchical search, kept where its match is searched back to within 10 mm."""
    found = matching.search(query, points, key).points_zyx_vox
    back = matching.search(key, found, query).points_zyx_vox
    return found, np.linalg.norm((back - points) * query.codec.spacing_zyx_mm, axis=1) <= 10


def agreed(least: float) -> Matcher:
    """The matcher, kept where at least this share of the neighbours' weight agrees."""

    def run(query: Embedding, points: np.ndarray, key: Embedding) -> tuple[np.ndarray, np.ndarray]:
        found = matching.search(query, points, key).points_zyx_vox
        better = consensus.consensus(query, points, key, found)
        return better.points_zyx_vox, better.agreeing >= least

    return run


MATCHERS: dict[str, Matcher] = {
    "dense, cell to cell (paper)": dense(subcell=False),
    "dense, below a cell": dense(subcell=True),
    "hierarchical search, below a cell": searched,
    "… kept if back within 10 mm": searched_and_returned,
    "matcher: search + consensus": agreed(0.0),
    "… kept if 20 % agree": agreed(0.2),
    "… kept if 30 % agree": agreed(0.3),
}


def unseen_by(workdir: str, folder: str) -> Store:
    """The unseen patients in a folder, embedded by the embedder of a workdir."""
    store = phantom.write_cohort(folder, builtin.UNSEEN)
    embed.embed_store(store, embed.restore(workdir))
    return store


def matcher_rows(workdir: str) -> dict[str, dict[str, float]]:
    """Errors of all matchers with one embedder, and the share of the points that they keep."""
    with tempfile.TemporaryDirectory() as folder:
        store = unseen_by(workdir, folder)
        reader, ids = matching.EmbeddingReader(store), store.ids()
        truth = landmarks.KnownPoints(store, ids, builtin.POINTS)
        errors: dict[str, list[np.ndarray]] = {name: [] for name in MATCHERS}
        kept: dict[str, list[np.ndarray]] = {name: [] for name in MATCHERS}
        for pair in zip(ids, [*ids[1:], ids[0]], strict=True):
            questions = truth.ask(*pair)
            for name, matcher in MATCHERS.items():
                found, keep = matcher(reader(pair[0]), questions.points_zyx_vox, reader(pair[1]))
                off_mm = (found - questions.truth_zyx_vox) * store.scan(pair[1]).spacing_zyx_mm
                errors[name].append(np.linalg.norm(off_mm, axis=1))
                kept[name].append(keep)
    rows = {}
    for name in MATCHERS:
        keep = np.concatenate(kept[name])
        rows[name] = {"kept": round(float(keep.mean()), 3)} | evaluate.summary(np.concatenate(errors[name])[keep])
    return rows


def trained(name: str, changes: Mapping[str, Any], store: str, out: str, steps: int) -> str:
    """The workdir of a training of the tiny recipe with some fields changed."""
    config = cli.recipe(f"{CONFIG}:tiny", {"data.store": store, "steps": steps} | dict(changes))
    workdir = str(Path(out) / "".join(c if c.isalnum() else "_" for c in name))
    if train.run(config, workdir):
        raise SystemExit(f"{name}: interrupted; repeat the command to go on")
    return workdir


def judged(name: str, workdir: str) -> dict[str, float]:
    """Errors of the matcher with one embedder; also says them, since the next training takes minutes."""
    with tempfile.TemporaryDirectory() as folder:
        store = unseen_by(workdir, folder)
        errors = evaluate.matching_errors(store, store.ids(), builtin.POINTS, np.random.default_rng(0))
    row = evaluate.summary(errors["match"])
    print(f"{name}: {row['median_mm']} mm in the median", file=sys.stderr)
    return row


def training_rows(out: str, steps: int) -> dict[str, dict[str, float]]:
    """Errors of the matcher with the embedder of each training."""
    store, rows = builtin.patients(), {}
    for name, changes in TRAININGS.items():
        rows[name] = judged(name, trained(name, changes, store, out, steps))
    # Training across patients reads the recipe's embeddings, from a copy of the store.
    recipe, embedded = trained(RECIPE, {}, store, out, steps), str(Path(out) / "embedded")
    shutil.copytree(store, embedded, dirs_exist_ok=True)
    embed.embed_store(Store.open(embedded), embed.restore(recipe))
    for name, share in FURTHER.items():
        changes = {"init_from": recipe, "optimizer.lr": 4e-3, "views.partner_share": share}
        rows[name] = judged(name, trained(name, changes, embedded, out, steps))
    return rows


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """As Markdown."""
    names = [name for name in next(iter(rows.values())) if name not in ("points", "organ_points", "same_organ")]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(f"{values[name]:g}" for name in names) + " |" for row, values in rows.items()]
    return "\n".join(lines)


def main() -> int:
    """The command; returns its exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", help="of a trained embedder: compares the matchers")
    what.add_argument("--train", action="store_true", help="compares trainings")
    parser.add_argument("--out", default="runs/matching", help="where the trainings are kept")
    parser.add_argument("--steps", type=int, default=150, help="of each training")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    cli.check_folder_of("--json", args.json)
    rows = training_rows(args.out, args.steps) if args.train else matcher_rows(args.workdir)
    print(table(rows))
    measuring.save(args.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    cli.run(main)
