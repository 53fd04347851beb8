"""What a study makes of the Dice of its runs: which arms are compared, case by case, and intervals."""

import numpy as np
import pytest

from alice_jax.evaluation.arms import compared, summarised, table
from alice_jax.reporting import study_curves
from alice_jax.study import LADDER


def test_each_rung_is_compared_with_the_one_before_case_by_case():
    dice = {
        "scratch": (0.1, 0.5),
        "scratch-long": (0.2, 0.6),
        "reconstruction": (0.2, 0.7),
        "random-crops": (0.3, 0.8),
        "mined-crops, frozen": (0.3, 0.4),
        "casa, frozen": (0.5, 0.2),
    }
    rows = compared({(arm, "1-shot"): {"a": [a], "b": [b]} for arm, (a, b) in dice.items()}, list(LADDER))
    more = {row["arm"]: {what: round(value["mean"], 6) for what, value in row["more_than"].items()} for row in rows}
    assert more == {
        "scratch": {},
        "scratch-long": {"scratch": 0.1},
        "reconstruction": {"scratch": 0.15, "scratch-long": 0.05},
        "random-crops": {"scratch": 0.25, "scratch-long": 0.15, "rung before": 0.1},
        "mined-crops, frozen": {"scratch": 0.05, "scratch-long": -0.05},  # whose rung before is not there
        "casa, frozen": {"scratch": 0.05, "scratch-long": -0.05, "rung before": 0.0},
    }
    assert rows[-1]["more_than"]["rung before"] == pytest.approx({"mean": 0.0, "low": -0.2, "high": 0.2})
    casa = table(rows).splitlines()[-1]
    assert casa.endswith("+0.000 [-0.200, +0.200]") and "0.350 [0.200, 0.500]" in casa
    assert study_curves.draw(rows).startswith(b"\x89PNG")


def test_intervals_hold_the_chance_of_seeds_beside_that_of_cases():
    """Two cases that agree and two seeds that do not: a quarter of all draws is of either seed alone."""
    found = summarised(np.array([[0.0, 0.2], [0.0, 0.2]]))
    assert found == pytest.approx({"mean": 0.1, "low": 0.0, "high": 0.2})
