"""Logs: averages between log points, every step once even after resuming, nothing that is not JSON."""

import json

import numpy as np

from alice_jax import coverage, metrics


def log(workdir, steps, first_step=0, total=10, since=None):
    """Logs the steps and returns what has not been written."""
    with metrics.Metrics(str(workdir), first_step=first_step, total_steps=total, log_every=2, since=since) as writer:
        for step in steps:
            writer.step(step, {"loss": float(step)})
        return writer.since_logged


def test_averages_between_log_points(tmp_path):
    log(tmp_path, [1, 2, 3, 4])
    assert metrics.read(str(tmp_path)) == [{"step": 2, "loss": 1.5}, {"step": 4, "loss": 3.5}]


def test_the_last_step_is_always_logged(tmp_path):
    log(tmp_path, [1, 2, 3], total=3)
    assert metrics.read(str(tmp_path))[-1] == {"step": 3, "loss": 3.0}


def test_resuming_drops_what_was_logged_after_the_checkpoint(tmp_path):
    log(tmp_path, [1, 2, 3, 4, 5, 6])
    log(tmp_path, [3, 4], first_step=2)
    assert [line["step"] for line in metrics.read(str(tmp_path))] == [2, 4]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    log(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in metrics.read(str(tmp_path))] == [2]
    log(tmp_path, [3, 4], first_step=2)
    assert [line["step"] for line in metrics.read(str(tmp_path))] == [2, 4]


def test_not_a_number_becomes_null(tmp_path):
    with metrics.Metrics(str(tmp_path), first_step=0, total_steps=1, log_every=1) as writer:
        writer.write(1, {"loss": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}


def test_tensorboard_events_are_there(tmp_path):
    log(tmp_path, [1, 2])
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_averages_go_on_where_a_run_stopped_between_two_log_points(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    log(whole, [1, 2, 3, 4])
    since = json.loads(json.dumps(log(parts, [1, 2, 3])))
    log(parts, [4], first_step=3, since=since)
    assert metrics.read(str(parts)) == metrics.read(str(whole))


def test_coverage_counts_and_resumes(tmp_path):
    scans = ["a", "b", "c", "d"]
    first = coverage.Coverage(scans)
    assert first.count(np.array([[0, 1], [0, 2]]))["coverage/share"] == 0.75
    coverage.write(str(tmp_path), 1, first.counted())
    assert coverage.read(str(tmp_path)) == {
        "step": 1,
        "counts": {"a": 2, "b": 1, "c": 1, "d": 0},
        "keys": {"a": 0, "b": 1, "c": 1, "d": 0},
    }
    again = coverage.Coverage(scans, first.counted())
    assert again.count(np.array([[3, 3]])) == {
        "coverage/share": 1.0,
        "coverage/least": 1,
        "coverage/most": 2,
        "coverage/key_least": 0,
        "coverage/key_most": 1,
    }
    assert coverage.Coverage(scans).count(np.array([[3, 3]]))["coverage/share"] == 0.25
