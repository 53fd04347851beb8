"""Schedules and durations, with numbers a person can check."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from alice_jax import schedules
from alice_jax.errors import UserError


def test_cosine_falls_from_peak_towards_end():
    values = [float(schedules.warmup_cosine(i, 1.0, 0.2, total=10)) for i in range(10)]
    assert values[0] == 1.0
    assert values[5] == pytest.approx(0.6)
    assert all(a > b for a, b in itertools.pairwise(values)) and values[-1] > 0.2


def test_traced_and_plain_numbers_agree():
    for step in (0, 3, 4, 50, 99):
        plain = schedules.warmup_cosine(step, 2e-4, 1e-6, total=100, warmup=4)
        traced = schedules.warmup_cosine(jnp.int32(step), 2e-4, 1e-6, total=100, warmup=4)
        assert float(traced) == pytest.approx(float(plain), rel=1e-4)


def test_rate_never_rises_after_the_warmup_of_the_paper_recipe():
    steps = np.arange(1000)
    values = schedules.warmup_cosine(steps, 2e-4, 1e-6, total=1000, warmup=100)
    assert np.all(np.diff(values[:100]) > 0) and np.all(np.diff(values[100:]) < 0)


def test_a_run_shorter_than_its_warmup_only_rises():
    values = schedules.warmup_cosine(np.arange(10), 1.0, 0.0, total=10, warmup=30)
    assert np.all(np.diff(values) > 0) and values[-1] < 1.0


@pytest.mark.parametrize(
    ("text", "steps"),
    [("500 steps", 500), ("1 step", 1), ("2 epochs", 14), ("10 %", 100), ("2.5%", 25), ("50 epochs, 10 %", 100)],
)
def test_durations(text, steps):
    assert schedules.duration(text, "warmup", steps_per_epoch=7, total_steps=1000) == steps


@pytest.mark.parametrize("text", ["", "10", "ten steps", "-5 steps", "5 steps 3 epochs", "0.1"])
def test_a_duration_without_exactly_one_unit_is_refused(text):
    with pytest.raises(UserError, match=r"optimizer\.warmup"):
        schedules.duration(text, "optimizer.warmup", steps_per_epoch=7, total_steps=1000)
