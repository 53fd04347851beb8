"""Prepares CT files for training: `python -m alice_jax.prepare --input DIR_OR_LIST --store DIR`.

Every file ends as prepared or quarantined, named, with the reason. Running the command again continues where it was
stopped and prepares what has changed. Many tasks may share the work, on one or on many machines: give each its
--task-index of --task-count. Of files with the same content in the shares of two tasks both are kept; the command
without these flags, run afterwards, leaves one of them.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from alice_jax import cli
from alice_jax.data import cohort, label_files, label_maps, presets, sources, worker_process
from alice_jax.data.preparing import Outcome, prepare_scan, prepare_source
from alice_jax.data.rejection import REMEDIES, Rejected
from alice_jax.data.scan import Scan
from alice_jax.data.sources import Source
from alice_jax.data.store import Store
from alice_jax.errors import UserError

__all__ = ["main", "prepare", "prepare_scan"]

SPACING_MM = (0.5, 10.0)
MEMORY_OF_A_WORKER = 3 << 30  # bytes: a whole-body scan while it is resampled


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what a terminal cannot show
    cli.check_folder_of("--json", args.json)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found = presets.search(args.input, args.preset) if args.preset else sources.find(args.input, skip=args.store)
    store = Store.create(args.store, (args.spacing,) * 3)
    if args.labels or args.preset:
        label_files.settle_names(store, found, args.input)
    else:
        found.sources = [dataclasses.replace(source, labels=()) for source in found.sources]
    start = time.time()
    try:
        outcomes = prepare(store, found.sources, args.workers, args.task_index, args.task_count)
    except (KeyboardInterrupt, SystemExit):
        print(f"\nstopped; {store.path} keeps what is prepared, the same command continues", file=sys.stderr)
        raise
    if not outcomes and args.task_count > 1:
        print(f"no file falls to task {args.task_index} of {args.task_count}")
        return 0
    prepared = [outcome for outcome in outcomes if outcome.id is not None]
    quarantined = [outcome for outcome in outcomes if outcome.id is None]
    scans = store.scans([str(outcome.id) for outcome in prepared])
    _print_report(store, scans, prepared, quarantined, found.ignored, time.time() - start)
    if args.json:
        _write_json(Path(args.json), prepared, scans, quarantined)
    return 1 if not prepared or (args.strict and quarantined) else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m alice_jax.prepare",
        description="Prepares CT scans for training: validates each file, brings it to one orientation and spacing "
        "in Hounsfield units, and stores it compressed, in chunks.",
        epilog="Running the same command again continues and takes up changed files. Exit code: 0 if at least one scan "
        "is prepared (with --strict: and none quarantined), else 1.",
    )
    parser.add_argument(
        "--input",
        required=True,
        metavar="DIR_OR_LIST",
        help="a folder (searched for NIfTI, NRRD, MetaImage and DICOM series; with a dataset.json of nnU-Net or "
        "Decathlon its images are taken), a single file, or a text file with one path per line, relative to it",
    )
    parser.add_argument(
        "--store", required=True, metavar="DIR", help="where the scans go: a folder or gs://bucket/path"
    )
    parser.add_argument(
        "--labels",
        action="store_true",
        help="also store the label maps that the dataset.json of nnU-Net or Decathlon names",
    )
    parser.add_argument(
        "--preset",
        choices=presets.PRESETS,
        help="--input is this data set, as it is distributed, and labels are stored",
    )
    parser.add_argument("--spacing", type=float, default=2.0, metavar="MM", help="of the stored voxels (default: 2.0)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any file is quarantined")
    parser.add_argument("--json", metavar="PATH", help="write what was prepared and quarantined to this file")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: by processors and memory)")
    parser.add_task_arguments("files")
    args = parser.parse_args(argv)
    cli.check_task(args)
    if not SPACING_MM[0] <= args.spacing <= SPACING_MM[1]:
        raise UserError(f"--spacing {args.spacing:g}: give millimetres between {SPACING_MM[0]} and {SPACING_MM[1]:g}")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: give at least 1")
    return args


# -------------------------------------------------------------------- the work


def prepare(
    store: Store, found: Sequence[Source], workers: int | None = None, task_index: int = 0, task_count: int = 1
) -> list[Outcome]:
    """Prepares sources into the store, in processes; the outcomes come in the order of the sources.

    Args:
      task_index, task_count: this call takes every task_count-th source from task_index on.
    """
    scans = Store.open(store.path).scans(store.ids())  # `store` would remember what workers are about to change
    known_ids = {scan.extra["source"]["path"]: scan.id for scan in scans if "source" in scan.extra}
    jobs = sources.assign_ids(found, known_ids)[task_index::task_count]  # ids first, so that all tasks agree on them
    results: dict[int, list[Outcome]] = {}
    with tqdm(total=len(jobs), unit="file", desc="prepare", disable=not jobs) as bar:
        running = _run(store, jobs, {scan.sha256: scan.id for scan in scans}, workers or _workers())
        with contextlib.closing(running):
            for index, outcomes in running:
                results[index] = outcomes
                bar.update()
    return _without_duplicates(store, [outcome for index in sorted(results) for outcome in results[index]])


def _without_duplicates(store: Store, outcomes: list[Outcome]) -> list[Outcome]:
    """Workers do not see each other: of files with the same content prepared side by side the first one stays."""
    scans = store.scans([outcome.id for outcome in outcomes if outcome.id is not None])
    hashes = {scan.id: scan.sha256 for scan in scans}
    first: dict[str, Outcome] = {}
    result = []
    for outcome in outcomes:
        if outcome.id is not None:
            original = first.setdefault(hashes[outcome.id], outcome)
            if original.id != outcome.id:
                store.delete_scan(outcome.id)
            if original is not outcome:
                reason = Rejected("duplicate", f"of {original.file} (scan {original.id})")
                outcome = Outcome(outcome.file, reason=reason)
        result.append(outcome)
    return result


def _workers() -> int:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(processors, memory // MEMORY_OF_A_WORKER, 32))


def _run(
    store: Store, jobs: Sequence[Source], known: Mapping[str, str], workers: int
) -> Generator[tuple[int, list[Outcome]], None, None]:
    """Yields (index, outcomes) as jobs finish. A worker that dies takes no other file with it."""
    waiting = collections.deque(enumerate(jobs))
    while waiting:
        flying: dict[futures.Future, tuple[int, Source]] = {}
        try:
            with _pool(min(workers, len(waiting)), store, known) as pool:
                while waiting or flying:
                    while waiting and len(flying) < 2 * workers:
                        flying[pool.submit(_work, waiting[0][1])] = waiting[0]
                        waiting.popleft()
                    done, _ = futures.wait(flying, return_when=futures.FIRST_COMPLETED)
                    for future in done:
                        outcomes = future.result()
                        yield flying.pop(future)[0], outcomes
        except BrokenProcessPool:  # a C library crashed or memory ran out: who was it?
            for index, source in flying.values():
                yield index, _run_alone(store, source, known)


def _run_alone(store: Store, source: Source, known: Mapping[str, str]) -> list[Outcome]:
    try:
        with _pool(1, store, known) as pool:
            return pool.submit(_work, source).result()
    except BrokenProcessPool:
        return [Outcome(source.path, reason=Rejected("reader crashed", "its process ended without a word"))]


@contextlib.contextmanager
def _pool(workers: int, store: Store, known: Mapping[str, str]) -> Iterator[futures.ProcessPoolExecutor]:
    """Spawned processes (TensorStore's threads do not survive a fork), each with one thread for linear algebra."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
    before = {name: os.environ.get(name) for name in names}
    others = set(multiprocessing.active_children())
    os.environ.update(dict.fromkeys(names, "1"))
    context = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(workers, context, _start_worker, (store, known, os.getpid()))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # what it was writing stays invisible
        raise
    finally:
        pool.shutdown()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


_worker: tuple[Store, Mapping[str, str]]


def _start_worker(store: Store, known: Mapping[str, str], parent: int) -> None:
    global _worker
    _worker = store, known
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    worker_process.tie_to(parent)


def _work(source: Source) -> list[Outcome]:
    return prepare_source(_worker[0], source, _worker[1])


# -------------------------------------------------------------------- what is said at the end


def _print_report(
    store: Store,
    scans: Sequence[Scan],
    prepared: Sequence[Outcome],
    quarantined: Sequence[Outcome],
    ignored: Mapping[str, int],
    seconds: float,
) -> None:
    by_reason: dict[str, list[Outcome]] = collections.defaultdict(list)
    for outcome in quarantined:
        by_reason[outcome.reason.name if outcome.reason else ""].append(outcome)
    for name, outcomes in by_reason.items():
        print(f"\nquarantined, {name} ({len(outcomes)}): {REMEDIES[name]}")
        for outcome in outcomes:
            print(_printable(f"  {outcome.file}: {outcome.reason.detail if outcome.reason else ''}"))
    if scans:
        print(f"\n{cohort.summary(store, scans)}")
        if labelled := sum("labels" in scan.extra for scan in scans):
            print(f"labels: {labelled} of {len(scans)} scans, {len(label_maps.names_in(store))} classes")
    kept = sum(outcome.kept for outcome in prepared)
    each = f", {seconds / (len(prepared) - kept):.2f} s a scan" if len(prepared) > kept else ""
    other = ", ".join(f"{ending} {count}" for ending, count in sorted(ignored.items()))
    print(
        f"\n{len(prepared)} prepared ({kept} of them were already there), {len(quarantined)} quarantined"
        + (f", other files ignored: {other}" if other else "")
        + f"\nstore {store.path}: {len(store.ids())} scans, {seconds:.0f} s{each}"
    )
    if not prepared:
        reason = "see the reasons above" if quarantined else "no scan was found in --input"
        print(f"error: nothing was prepared; {reason}", file=sys.stderr)


def _printable(line: str) -> str:
    """File names may hold line ends, and codes that a terminal would obey."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)


def _write_json(path: Path, prepared: Sequence[Outcome], scans: Sequence[Scan], quarantined: Sequence[Outcome]) -> None:
    report = {
        "prepared": [
            {
                "file": outcome.file,
                "id": scan.id,
                "shape_zyx": list(scan.shape_zyx),
                "spacing_zyx_mm": list(scan.spacing_zyx_mm),
                "sha256": scan.sha256,
            }
            for outcome, scan in zip(prepared, scans, strict=True)
        ],
        "quarantined": [{"file": outcome.file, "reason": str(outcome.reason)} for outcome in quarantined],
    }
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(json.dumps(report, indent=1), encoding="utf-8", errors="surrogateescape")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    cli.run(main)
