"""The phantom: the same for the same seed, true correspondence, tissue-like CT numbers, sides, and hard enough."""

import functools
import itertools

import numpy as np
import pytest

from alice_jax.data import foreground, geometry, matching, phantom
from alice_jax.data.phantom_tissues import TISSUES
from alice_jax.data.store import Store
from alice_jax.errors import UserError

SEEDS = range(6)
CODE = {name: code for code, name in phantom.LABELS.items()}


@functools.cache
def patient(seed):
    return phantom.Patient(seed)


@functools.cache
def scan(seed):
    """(volume, labels), int16 and uint8."""
    return patient(seed).volume(), patient(seed).labels()


def body_box(volume):
    return foreground.foreground_box(foreground.body_mask(volume), volume.shape)


def sample(labels, points_zyx_vox):
    return labels[tuple(np.rint(points_zyx_vox).astype(int).T)]


def test_same_seed_same_patient():
    again = phantom.Patient(3)
    np.testing.assert_array_equal(again.volume(), scan(3)[0])
    np.testing.assert_array_equal(again.labels(), scan(3)[1])
    assert again.lesions == patient(3).lesions


def test_volume_is_ct_like():
    volume, labels = scan(0)
    assert (
        volume.dtype == np.int16 and labels.dtype == np.uint8 and volume.shape == labels.shape == patient(0).shape_zyx
    )
    assert volume.min() == -1024 and 400 < volume.max() < 3000
    assert np.median(volume[:, :4, :4]) < -950  # air in the corner


def test_seeds_differ():
    shapes = [patient(s).shape_zyx for s in SEEDS]
    assert len(set(shapes)) == len(shapes)
    points = np.array([[60.0, 50, 60], [80, 60, 90]])
    places = [patient(s).to_canonical_mm(points) for s in SEEDS]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(places, 2)) > 5


@pytest.mark.parametrize("seed", SEEDS)
def test_round_trip(seed):
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, np.array(patient(seed).shape_zyx) - 1, (2000, 3))
    canonical = patient(seed).to_canonical_mm(points)
    back = patient(seed).from_canonical_mm(canonical)
    assert np.abs(back - points).max() * phantom.SPACING_MM < 0.5
    # The other way, from canonical points inside the body.
    points, _ = phantom.shared_points(patient(0), patient(seed), 300, rng)
    canonical = patient(0).to_canonical_mm(points)
    np.testing.assert_allclose(
        patient(seed).to_canonical_mm(patient(seed).from_canonical_mm(canonical)), canonical, atol=0.5
    )


@pytest.mark.parametrize("organ", ["liver", "spleen", "muscle", "fat", "heart", "lung_left", "lung_right", "bladder"])
def test_organ_hu_near_table(organ):
    rows = [t for t in TISSUES.values() if t.label == organ]
    for seed in range(3):
        volume, labels = scan(seed)
        values = volume[labels == CODE[organ]]
        if len(values) < 500:
            continue
        low = min(t.hu for t in rows) - 35
        high = max(t.hu + max(t.arterial_hu, t.portal_hu) for t in rows) + 35
        assert low < np.median(values) < high, (organ, seed, np.median(values))
        if organ in ("liver", "spleen"):
            arterial, portal = patient(seed)._contrast
            want = rows[0].hu + arterial * rows[0].arterial_hu + portal * rows[0].portal_hu
            assert abs(np.median(values) - want) < 20


@pytest.mark.parametrize("seed", SEEDS)
def test_left_is_left(seed):
    """x grows toward the patient's left, y toward the back, z upward."""
    _, labels = scan(seed)
    center = {
        name: np.argwhere(labels == CODE[name]).mean(axis=0)
        for name in (
            "liver",
            "spleen",
            "stomach",
            "kidney_left",
            "kidney_right",
            "lung_left",
            "lung_right",
            "heart",
            "sternum",
            "L1",
            "T11",
            "aorta",
            "L2",
        )
        if (labels == CODE[name]).any()
    }
    assert center["liver"][2] + 20 < center["spleen"][2] and center["liver"][2] < center["stomach"][2]
    assert center["kidney_right"][2] + 20 < center["kidney_left"][2]
    assert center["lung_right"][2] + 20 < center["lung_left"][2]
    assert center["sternum"][1] + 30 < center["T11"][1]
    assert center["L2"][0] < center["L1"][0] < center["T11"][0]
    assert center["L1"][0] < center["heart"][0]


@pytest.mark.parametrize("a, b", [(0, 1), (2, 3), (4, 0)])
def test_corresponding_points_lie_in_the_same_organ(a, b):
    points_a, points_b = phantom.shared_points(patient(a), patient(b), 3000, np.random.default_rng(0))
    label_a = sample(scan(a)[1], points_a)
    interior = np.ones(len(points_a), bool)
    for offset in np.concatenate([np.eye(3), -np.eye(3)]).astype(int):
        near = np.clip(points_a + 2 * offset, 0, np.array(patient(a).shape_zyx) - 1)
        interior &= sample(scan(a)[1], near) == label_a
    assert interior.sum() > 500
    assert (label_a == sample(scan(b)[1], points_b))[interior].mean() > 0.95
    assert (label_a > 0).all()


def test_baseline_fails_by_fifteen_millimetres():
    errors = []
    for a, b in itertools.permutations(range(5), 2):
        points_a, points_b = phantom.shared_points(patient(a), patient(b), 500, np.random.default_rng((a, b)))
        guess = matching.relative_position(points_a, body_box(scan(a)[0]), body_box(scan(b)[0]))
        errors.append(np.linalg.norm(guess - points_b, axis=1) * phantom.SPACING_MM)
    assert 15 < np.median(np.concatenate(errors)) < 40


def test_other_spacing_shows_the_same_body():
    spacing = (4.0, 3.0, 3.0)
    labels, coarse = scan(1)[1], patient(1).labels(spacing)
    same = labels[::2, ::3, ::3], coarse[:, ::2, ::2]
    shape = np.minimum(same[0].shape, same[1].shape)
    a, b = (s[tuple(slice(n) for n in shape)] for s in same)
    assert (a == b).mean() > 0.999
    assert patient(1).volume(spacing).shape == coarse.shape


def test_body_mask_is_the_body():
    for seed in range(3):
        volume, labels = scan(seed)
        mask = foreground.body_mask(volume).repeat(2, 0).repeat(2, 1).repeat(2, 2)[tuple(map(slice, volume.shape))]
        assert (mask & (labels > 0)).sum() / (mask | (labels > 0)).sum() > 0.95  # no table, all of the lungs


def test_lesions_are_seen():
    found = [s for s in range(12) if patient(s).has_lesion]
    assert 2 <= len(found) <= 10
    for seed in found[:2]:
        lesion = patient(seed).lesions[0]
        z, y, x = np.rint(lesion.center_zyx_vox).astype(int)
        volume, labels = scan(seed)
        assert phantom.LABELS[labels[z, y, x]].startswith(lesion.organ)
        assert abs(volume[z - 1 : z + 2, y - 1 : y + 2, x - 1 : x + 2].mean() - lesion.contrast_hu) < 25
        assert lesion.organ == patient(seed).lesion_organ and lesion.side == patient(seed).lesion_side
        if lesion.organ == "lung":
            assert phantom.LABELS[labels[z, y, x]] == f"lung_{lesion.side}"


def test_cohort_in_a_store(tmp_path):
    store = phantom.write_cohort(str(tmp_path / "store"), [2, 0])
    assert store.ids() == ["phantom_0000", "phantom_0002"]
    np.testing.assert_array_equal(store.read_volume("phantom_0002"), scan(2)[0])
    np.testing.assert_array_equal(store.read_array("phantom_0000", "labels"), scan(0)[1])
    a, b = store.scan("phantom_0000"), store.scan("phantom_0002")
    points_a, points_b = phantom.shared_points(patient(0), patient(2), 1000, np.random.default_rng(0))
    np.testing.assert_allclose(phantom.correspond(a, points_a, b), points_b, atol=1e-6)
    assert geometry.axis_codes(a.original["affine_ras"]) == "LPS"
    np.testing.assert_allclose(store.to_original_ijk(a.id, points_a), points_a[:, ::-1], atol=1e-9)
    assert store.foreground(a.id)[tuple((points_a // 2).T)].mean() > 0.97  # but for some of the skin
    assert np.ptp(a.foreground_box_zyx_vox, axis=0).min() > 90
    changed = (tmp_path / "store" / "scans" / "phantom_0000" / "scan.json").stat().st_mtime_ns
    phantom.write_cohort(str(tmp_path / "store"), [0, 2])  # what is there is kept
    assert (tmp_path / "store" / "scans" / "phantom_0000" / "scan.json").stat().st_mtime_ns == changed
    assert Store.open(store.path).manifest["extra"]["phantom"]["version"] == phantom.VERSION


def test_only_phantoms_correspond(tmp_path):
    store = phantom.write_cohort(str(tmp_path / "store"), [0])
    known = store.scan("phantom_0000")
    for extra, message in (({}, "not a phantom"), ({"phantom": {"seed": 0, "version": 99}}, "version 99")):
        with pytest.raises(UserError, match=message):
            phantom.correspond(known, [[1, 2, 3]], type(known)(**{**vars(known), "extra": extra}))
