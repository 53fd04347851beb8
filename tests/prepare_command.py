"""The command `prepare`, run in this process, and what its report says."""

import json
import os
import signal

from alice_jax import prepare as command
from alice_jax.data.preparing import prepare_source
from alice_jax.data.store import Store


def one_after_the_other(store, jobs, known, workers):
    """In place of `prepare._run`, without its worker processes."""
    own = Store.open(store.path)
    for index, job in enumerate(jobs):
        yield index, prepare_source(own, job, known)


def run(*args) -> int:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return command.main([str(arg) for arg in args])
    finally:
        signal.signal(signal.SIGTERM, handler)


def report_of(tmp_path, source, *args, store="store"):
    code = run("--input", source, "--store", tmp_path / store, "--json", tmp_path / "report.json", *args)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"prepared", "quarantined"}
    for entry in report["prepared"]:
        assert set(entry) == {"file", "id", "shape_zyx", "spacing_zyx_mm", "sha256"}
    for entry in report["quarantined"]:
        assert set(entry) == {"file", "reason"} and entry["reason"]
    return code, report


def ids(report):
    return [entry["id"] for entry in report["prepared"]]


def reasons(report):
    """{file name: name of the reason}"""
    return {os.path.basename(e["file"]): e["reason"].split(":")[0] for e in report["quarantined"]}
