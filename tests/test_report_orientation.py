"""Stores that are broken on purpose: the checks at the top of a report name the guilty scan."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from builders import make_scan
from hypothesis import given
from hypothesis import strategies as st

from alice_jax.data import foreground, phantom
from alice_jax.data.store import Store
from alice_jax.reporting import orientation, stores
from alice_jax.reporting.orientation import Turn

SPACING = (4.0, 4.0, 4.0)
GUILTY = "case2"


@pytest.fixture(scope="module")
def volumes():
    """Six phantom patients, coarse."""
    return [phantom.Patient(seed).volume(SPACING) for seed in range(6)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, volumes):
    """The path of a store with all of them, as case0, case1, …"""
    store = Store.create(str(tmp_path_factory.mktemp("whole") / "store"), SPACING)
    for number, volume in enumerate(volumes):
        write(store, f"case{number}", volume)
    return store.path


def write(store, id, volume):
    """As `prepare` would."""
    volume = np.ascontiguousarray(volume)
    mask = foreground.body_mask(volume) if np.ptp(volume) else np.ones([-(-n // 2) for n in volume.shape], bool)
    box = foreground.foreground_box(mask, volume.shape)
    scan = dataclasses.replace(make_scan(id, volume.shape), spacing_zyx_mm=SPACING, foreground_box_zyx_vox=box)
    store.write_scan(scan, volume, mask)


def broken(whole, path, volume):
    """A copy of the store in which that is the volume of `GUILTY`."""
    store = Store.open(shutil.copytree(whole, path / "store"))
    write(store, GUILTY, volume)
    return store


def by_name(store):
    checks, guilty = orientation.inspect(store, store.ids())
    return {check.name: check for check in checks}, guilty


def test_of_whole_patients_nothing_is_wrong(whole):
    checks, guilty = by_name(Store.open(whole))
    assert {check.level for check in checks.values()} == {"good"} and not guilty
    assert "all scans" in checks["Axes agree"].text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v[::-1], "inferior-superior flipped"),
        (lambda v: v[:, ::-1], "anterior-posterior flipped"),
        (lambda v: v[:, :, ::-1], "right-left flipped"),
        (lambda v: v[:, ::-1, ::-1], "anterior-posterior and right-left flipped"),
        (lambda v: v.swapaxes(1, 2), "anterior-posterior and right-left swapped"),
    ],
    ids=["flipped z", "flipped y", "flipped x", "lying on the face", "swapped x y"],
)
def test_a_turned_scan_is_named_with_its_axes(whole, tmp_path, volumes, change, words):
    checks, guilty = by_name(broken(whole, tmp_path, change(volumes[2])))
    assert checks["Axes agree"].level == "bad" and f"{GUILTY}: {words}" in checks["Axes agree"].text
    assert guilty == {GUILTY: words}


def test_a_scan_of_one_value_is_named(whole, tmp_path, volumes):
    store = broken(whole, tmp_path, np.full_like(volumes[2], 40))
    checks, guilty = by_name(store)
    assert checks["Scans hold pictures"].level == "bad" and GUILTY in checks["Scans hold pictures"].text
    assert guilty == {GUILTY: "one value everywhere"}
    assert "Red" in "".join(stores.cohort_section(store, guilty).parts)  # and it can be drawn


def test_one_picture_under_two_names_is_named(whole, tmp_path, volumes):
    checks, guilty = by_name(broken(whole, tmp_path, volumes[4]))
    assert checks["Scans differ"].level == "bad" and "case4 and case2" in checks["Scans differ"].text
    assert set(guilty) == {"case4"}


def test_few_scans_are_not_compared(whole):
    checks, guilty = orientation.inspect(Store.open(whole), ["case0", "case1", "case2"])
    assert [check.name for check in checks] == ["Scans hold pictures"] and not guilty
    assert "3 of 6 scans" in checks[0].text


def test_scans_unlike_all_others_are_counted_not_judged():
    """Three turns decide here: as it is, the best for c, and another; similarities of four scans with each other."""
    values = np.full((4, len(orientation.TURNS), 4), 0.1)
    values[:3, 0] = 0.8
    values[2, 0], values[2, 7] = 0.3, 0.8
    for i in range(4):
        values[i, :, i] = np.nan
    turned, unlike = orientation.judge(list("abcd"), values)
    assert [(one.id, one.turn) for one in turned] == [("c", orientation.TURNS[7])] and unlike == ["d"]


def test_the_48_turns_are_different_and_the_first_changes_nothing():
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    turned = {
        np.flip(array.transpose(turn.axes), [i for i in range(3) if turn.flips[i]]).tobytes() + bytes(turn.axes)
        for turn in orientation.TURNS
    }
    assert len(turned) == 48 and orientation.TURNS[0] == Turn() and orientation.TURNS[0].words == ""


@given(st.integers(1, 12), st.integers(1, 12))
def test_resizing_keeps_the_mean_and_a_constant(size, parts):
    array = np.random.default_rng(size).normal(size=size)
    assert orientation.resized(array, (parts,)).mean() == pytest.approx(array.mean())
    np.testing.assert_allclose(orientation.resized(np.ones(size), (parts,)), 1)


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_similarity_is_that_of_the_best_overlap(shift):
    """A body of 10 cells and one that lacks its first ones: 1 where the cells meet, whatever the shift."""
    rng = np.random.default_rng(0)
    body = rng.normal(size=(10, 4, 4))
    values = orientation.similarities([[body] * 48, [body[shift:]] * 48])
    assert values[0, 0, 1] == pytest.approx(1) and values[1, 0, 0] == pytest.approx(1)
    assert np.isnan(values[0, 0, 0])
    others = [values[i, k, 1 - i] for i, k in itertools.product(range(2), range(48))]
    assert np.allclose(others, 1)
