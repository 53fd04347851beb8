"""One HTML file that shows whether a store and a run are as they should be.

    python -m alice_jax.report --store DIR --out report.html      a preview before any training
    python -m alice_jax.report --workdir DIR --out report.html    a run, and the store that it trains on
    python -m alice_jax.report --store DIR --out pairs.png        only the picture of the first mined pairs

Of a store with embeddings: the first mined pairs, unselected and as training with this seed would use them, scores and
cycle errors with their limits, the worst accepted and the best rejected pairs, the embedder's principal components, and
scans from the front and the side. Of a run also: curves, coverage, what the newest checkpoint reconstructs of masked
crops, where its tokens look, configuration and provenance. Checks at the top name what is wrong; docs/report.md
explains all of it.
"""

import argparse
import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from alice_jax import builtin, cli, tasks
from alice_jax.data import embeddings
from alice_jax.data.embeddings import EmbeddingReader
from alice_jax.data.pipeline import Samples
from alice_jax.data.store import Store
from alice_jax.data.views import PairSampler
from alice_jax.errors import UserError, check_at_least
from alice_jax.reporting import orientation, page, pair_checks, runs, stores, student
from alice_jax.reporting.page import Check, Section
from alice_jax.reporting.pair_pictures import draw_pairs
from alice_jax.reporting.pairs import Pair, first_pairs, limits_of, sampler_of

__all__ = ["draw_pairs", "first_pairs", "preview", "write_report"]

# What configs/pretrain.py has, for a preview without a run.
CROP_SHAPE_ZYX, MASK_GRID, VALIDATION_FRACTION = (64, 64, 64), (4, 4, 4), 0.1
STATISTICS_PAIRS, MOST_PAIRS = 64, 50
MINING_SECONDS = 10.0  # after which the statistics make do with fewer pairs
ENDLESS = 1 << 40  # steps


def preview(store: Store, only: Sequence[str] = (), seed: int = 0) -> Samples:
    """The samples that pretraining with its default settings would use.

    Args:
      only: the scans to pair; by default those that are not held out for validation.

    Example:
      samples = preview(store)
      png = draw_pairs(store, first_pairs(samples, 6), CROP_SHAPE_ZYX)
    """
    ids = store.ids()
    scan_ids = tuple(dict.fromkeys(only)) or tasks.split(ids, VALIDATION_FRACTION, 2, store.patients(ids))[0]
    sampler = PairSampler(store, EmbeddingReader(store), scan_ids, CROP_SHAPE_ZYX, MASK_GRID)
    return Samples(sampler, len(scan_ids), seed, global_batch=1, steps=ENDLESS)


def write_report(
    path: str | os.PathLike,
    store: str | None = None,
    workdir: str | None = None,
    *,
    pairs: int = 6,
    seed: int | None = None,
    only: Sequence[str] = (),
    seconds: float = MINING_SECONDS,
    say: Callable[[str], None] = lambda words: None,
) -> list[Check]:
    """Writes the page (or, for a path that ends in .png, the picture of the pairs) and returns its checks.

    Args:
      store: by default the run's own.
      workdir: of a run; none for a preview of the store.
      pairs: drawn, from the first one on.
      seed: of the pairs; by default the run's, or 0.
      only: scans to pair, instead of the training scans.
      seconds: for mining the further pairs of the statistics.
      say: is told what is being done.

    Raises:
      UserError: there is nothing to show, or it cannot be written.
    """
    path = Path(path)
    check_at_least(0, "--seed", seed or 0)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: name a file in an existing folder")
    if not 1 <= pairs <= MOST_PAIRS:
        raise UserError(f"--pairs {pairs}: give a whole number from 1 to {MOST_PAIRS}")
    run = None if workdir is None else runs.read(workdir)
    opened, lost = _open(store, run)
    task = _task(run, opened) if run and opened else None
    samples = _pair_samples(opened, task, run, only, seed) if opened else None
    if path.suffix == ".png":
        if opened is None or samples is None:
            raise UserError(f"--out {path}: there are no pairs to draw; {lost or 'embed the store first'}")
        say(f"mining {pairs} pairs")
        sampler = sampler_of(samples)
        _write(path, draw_pairs(opened, first_pairs(samples, pairs), sampler.crop_shape_zyx, limits_of(sampler)))
        return []

    checks: list[Check] = []
    sections: list[Section] = []
    if run:
        say(f"drawing the curves of {run.workdir}")
        checks += runs.checks(run)
        sections += runs.curve_sections(run)
    if lost:
        checks.append(Check("look", "The store can be read", lost))
    if opened:
        for some_checks, section in _store_parts(opened, samples, task, run, pairs, seconds, say):
            checks += some_checks
            sections.append(section)
    if run:
        sections.append(runs.setup_section(run))
    _write(path, page.render(*_titles(opened, run), checks, sections).encode())
    return checks


def _open(store: str | None, run: runs.Run | None) -> tuple[Store | None, str]:
    """The store, or why a run is shown without one."""
    if store is not None:
        return Store.open(store), ""
    if run is None:
        raise UserError("--store, --workdir: name a store with embeddings, the folder of a run, or both")
    try:
        return Store.open(run.config.data.store or builtin.path_for(run.config.objective)), ""
    except UserError as error:
        return None, f"{error}; if it has moved, name it by --store"


def _task(run: runs.Run, store: Store) -> tasks.Task:
    try:
        return tasks.make(run.config, store)
    except (AttributeError, KeyError) as error:  # a field that is not there
        raise UserError(f"--workdir {run.workdir}: its config.json is not of this version ({error})") from error


def _pair_samples(
    store: Store, task: tasks.Task | None, run: runs.Run | None, only: Sequence[str], seed: int | None
) -> Samples | None:
    """Where pairs come from; None for a run whose store has no embeddings (yet)."""
    missing = sorted(set(only) - set(store.ids()))
    if missing or len(set(only)) == 1:
        wrong = f"{missing[0]}: not in the store {store.path}" if missing else f"{only[0]}: a pair needs two scans"
        raise UserError(f"--only {wrong}; give ids such as {', '.join(store.ids()[:3])}")
    if task and run and isinstance(task.sampler, PairSampler):
        sampler = dataclasses.replace(task.sampler, scan_ids=tuple(dict.fromkeys(only)) or task.scans)
        samples = Samples(sampler, len(sampler.scan_ids), run.config.seed, run.config.batch_size, ENDLESS)
    else:
        samples = preview(store, only)
    if seed is not None:
        samples = dataclasses.replace(samples, seed=seed)
    wanted = set(sampler_of(samples).scan_ids)
    if len(wanted) < 2:
        raise UserError(f"store {store.path}: holds {len(wanted)} scans and a pair needs two; prepare more")
    lacking = sorted(wanted - set(stores.embedded(store))) if sampler_of(samples).embeddings else []
    if lacking and not run:
        other = embeddings.embedded_by(store, lacking[0]) is not None
        what = "an embedding of another embedder than the store's" if other else "no embedding"
        raise UserError(
            f"store {store.path}: {len(lacking)} of {len(wanted)} scans have {what} ({lacking[0]} for one); run "
            f"python -m alice_jax.embed --store {store.path} --workdir DIR, DIR being that of a trained embedder"
        )
    return None if lacking else samples


def _store_parts(
    store: Store,
    samples: Samples | None,
    task: tasks.Task | None,
    run: runs.Run | None,
    count: int,
    seconds: float,
    say: Callable[[str], None],
) -> Iterator[tuple[list[Check], Section]]:
    """Sections that read the store, each with its checks."""
    done, ids = stores.embedded(store), store.ids()
    embedder = run.starts[-1].get("embedder") if run and run.starts else None
    if samples:
        say(f"mining pairs, up to {max(count, STATISTICS_PAIRS)}")
        sampler = sampler_of(samples)
        tries: list[Pair] = []
        found = first_pairs(samples, count, STATISTICS_PAIRS, seconds, tries)
        limits = limits_of(sampler)
        whose = f"seed {samples.seed}, of {len(sampler.scan_ids)} of the {len(ids)} scans"
        section = stores.pairs_section(store, found, tries, count, limits, sampler.crop_shape_zyx, whose)
        yield pair_checks.checks(store, found, tries, limits), section
    if samples and run and task and run.config.objective == "alice":
        say("asking the newest checkpoint")
        shown, scans, whose = task.sampler, task.scans, "training"
        if task.validation_scans:
            shown, scans, whose = task.validation_sampler, task.validation_scans, "held-out"
        sample = runs.samples_of(run, shown, scans)[0]
        names = [scans[i] for i in sample["meta"]["scans"]]
        for section in student.sections(run.config, run.workdir, sample, names, whose):
            yield [], section
    if run and task and run.config.objective == "embedder":
        yield [], runs.views_section(run, task)
    if len(done) > 1:
        say("drawing the embeddings")
        yield [stores.embedding_check(store, done, embedder)], stores.embeddings_section(store, done)
    elif samples is None:
        yield (
            [stores.embedding_check(store, done, embedder)],
            Section("Embeddings", [page.text("None in this store yet.")]),
        )
    say("comparing and drawing the scans")
    checks, guilty = orientation.inspect(store, stores.evenly(ids, stores.COMPARED_SCANS))
    yield checks, stores.cohort_section(store, guilty)


def _titles(store: Store | None, run: runs.Run | None) -> tuple[str, str]:
    """Title and subtitle."""
    made = f"made {datetime.datetime.now():%Y-%m-%d %H:%M}"
    where = f"store {store.path}, {len(store.ids())} scans" if store else "without its store"
    if run is None:
        assert store is not None
        return f"Store {os.path.basename(store.path)}", f"{where}; {made}"
    name = os.path.basename(os.path.abspath(run.workdir))
    return f"Run {name}", f"{run.config.objective} at step {run.step} of {run.config.steps}; {where}; {made}"


def _write(path: Path, content: bytes) -> None:
    """In one piece."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror}; choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = cli.Parser(
        prog="python -m alice_jax.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", metavar="DIR", help="a store with embeddings (default: the run's own)")
    parser.add_argument("--workdir", metavar="DIR", help="the folder of a run")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the page, or with the ending .png the pairs alone"
    )
    parser.add_argument("--pairs", type=int, default=6, metavar="N", help="pairs to draw (default: 6)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the pairs (default: the run's, or 0)")
    parser.add_argument("--only", nargs="+", default=[], metavar="ID", help="pair these scans alone")
    args = parser.parse_args(argv)
    began = time.monotonic()

    def say(words: str) -> None:
        print(f"{time.monotonic() - began:3.0f} s  {words}", file=sys.stderr, flush=True)

    checks = write_report(args.out, args.store, args.workdir, pairs=args.pairs, seed=args.seed, only=args.only, say=say)
    for check in checks:
        if check.level != "good":
            print(f"{'look' if check.level == 'look' else 'WRONG'}: {check.name}: {check.text}")
    size = Path(args.out).stat().st_size / 1e6
    print(f"wrote {args.out}: {size:.1f} MB, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    cli.run(main)
