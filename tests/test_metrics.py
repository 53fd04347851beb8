"""Logs: averages between log points, every step once even after resuming, nothing that is not JSON."""

import json

import numpy as np

from alice_jax import metrics
from alice_jax.coverage import Coverage
from alice_jax.coverage import read as read_coverage


def log(workdir, steps, first_step=0, total=10):
    with metrics.Metrics(str(workdir), first_step=first_step, total_steps=total, log_every=2) as writer:
        for step in steps:
            writer.step(step, {"loss": float(step)})


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


def test_not_a_number_becomes_null(tmp_path):
    with metrics.Metrics(str(tmp_path), first_step=0, total_steps=1, log_every=1) as writer:
        writer.write(1, {"loss": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}


def test_tensorboard_events_are_there(tmp_path):
    log(tmp_path, [1, 2])
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_coverage_counts_and_resumes(tmp_path):
    coverage = Coverage(str(tmp_path), ["a", "b", "c", "d"], step=0)
    assert coverage.count(np.array([[0, 1], [0, 2]]))["coverage/share"] == 0.75
    coverage.save(1)
    assert read_coverage(str(tmp_path)) == {
        "step": 1,
        "counts": {"a": 2, "b": 1, "c": 1, "d": 0},
        "keys": {"a": 0, "b": 1, "c": 1, "d": 0},
    }
    again = Coverage(str(tmp_path), ["a", "b", "c", "d"], step=1)
    assert again.count(np.array([[3, 3]])) == {
        "coverage/share": 1.0,
        "coverage/least": 1,
        "coverage/most": 2,
        "coverage/key_least": 0,
        "coverage/key_most": 1,
    }
    fresh = Coverage(str(tmp_path), ["a", "b", "c", "d"], step=0)
    assert fresh.count(np.array([[3, 3]]))["coverage/share"] == 0.25
