"""What travels with weights, and what a mismatch says."""

import dataclasses
import json

import pytest

from alice_jax import contract
from alice_jax.contract import Contract
from alice_jax.data.store import FRAME
from alice_jax.errors import UserError

TRAINED = Contract(FRAME, (2.0, 2.0, 2.0), (-125.0, 225.0), (64, 64, 64), ("background", "liver"))


def test_through_json_and_back():
    assert Contract.from_json(json.loads(json.dumps(TRAINED.to_json())), "here") == TRAINED


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spacing_zyx_mm": (1.5, 1.5, 1.5)}, r"spacing_zyx_mm is \(2.0, 2.0, 2.0\) there and \(1.5, 1.5, 1.5\) here"),
        ({"window_hu": (-1024.0, 3071.0)}, "window_hu .*set views.window_hu"),
        ({"crop_shape_zyx": (32, 64, 64)}, "crop_shape_zyx .*set views.crop_shape_zyx"),
        ({"frame": "x, y, z"}, "frame"),
        ({"classes": ("background", "spleen")}, "classes"),
    ],
)
def test_a_mismatch_is_one_line_that_names_field_and_both_values(change, said):
    with pytest.raises(UserError, match=f"runs/a: {said}"):
        contract.check(TRAINED, dataclasses.replace(TRAINED, **change), "runs/a")


def test_weights_without_classes_fit_any():
    contract.check(dataclasses.replace(TRAINED, classes=()), TRAINED, "runs/a")
    contract.check(TRAINED, TRAINED, "runs/a")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, "older versions"),
        ({}, "damaged .*frame"),
        (TRAINED.to_json() | {"spacing_zyx_mm": [2.0, 2.0]}, "damaged"),
        (TRAINED.to_json() | {"window_hu": None}, "damaged"),
        ([1], "damaged"),
    ],
)
def test_a_record_that_says_nothing_or_nonsense(record, said):
    with pytest.raises(UserError, match=f"runs/a: .*{said}"):
        Contract.from_json(record, "runs/a")
