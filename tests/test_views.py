"""Pairs: partners, points, crops, masks, and what happens when nothing matches."""

import dataclasses

import numpy as np
import pytest
from builders import make_scan, noise_store

from alice_jax.data import matching, views
from alice_jax.data.store import Store

SHAPE = (40, 36, 44)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return noise_store(str(tmp_path_factory.mktemp("views") / "store"))


@pytest.fixture
def sampler(store):
    return views.PairSampler(
        store=store,
        embeddings=lambda scan_id: scan_id,
        scan_ids=tuple(store.ids()),
        crop_shape_zyx=(16, 16, 16),
        mask_grid=(2, 2, 2),
        mask_ratio=0.75,
        threshold=0.7,
        tries_per_partner=3,
        tries=9,
    )


@pytest.fixture
def scores(monkeypatch):
    """Stands in for the search: hands out these scores one after another, matching every point to itself."""
    given = []
    partners = []

    def match(query, points, key):
        partners.append(key)
        taken = [given.pop(0) for _ in points]
        return matching.Match(np.asarray(points, float), np.asarray(taken))

    monkeypatch.setattr(views.matching, "match", match)
    match.give, match.partners = given.extend, partners
    return match


def rng(seed=0):
    return np.random.default_rng(seed)


def test_first_match_above_the_threshold_is_kept(sampler, scores):
    scores.give([0.1, 0.8, 0.9])
    pair = sampler.mine(0, rng(), sampler.embeddings)
    assert (pair.score, pair.redraws, pair.weak) == (0.8, 1, False)


def test_after_failures_another_partner_is_tried(sampler, scores):
    scores.give([0.1, 0.2, 0.3, 0.1, 0.2, 0.75])
    pair = sampler.mine(0, rng(1), sampler.embeddings)
    assert (pair.score, pair.redraws, pair.weak) == (0.75, 5, False)
    assert len(scores.partners) == 2 and sampler.scan_ids[pair.key] == scores.partners[1]


def test_the_best_of_all_tries_is_kept_and_flagged_when_none_is_good(sampler, scores):
    scores.give([0.1, 0.2, 0.3, 0.1, 0.65, 0.2, 0.4, 0.2, 0.1])
    pair = sampler.mine(0, rng(2), sampler.embeddings)
    assert (pair.score, pair.redraws, pair.weak) == (0.65, 8, True)
    assert sampler.scan_ids[pair.key] == scores.partners[1]


def test_a_scan_is_never_its_own_partner_and_all_others_are(sampler):
    partners = [sampler.partner(2, rng(seed)) for seed in range(200)]
    assert set(partners) == {0, 1, 3, 4}


def test_each_sample_has_its_own_match(sampler, scores):
    scores.give([0.9] * 6)
    first = sampler(0, rng(0), rng(9))["meta"]
    second = sampler(1, rng(1), rng(9))["meta"]
    assert not np.array_equal(first["points_zyx_vox"][0], second["points_zyx_vox"][0])


def test_crops_are_centred_on_the_points_of_their_own_scans(store, sampler, scores):
    scores.give([0.9] * 3)
    sample = sampler(3, rng(5), rng(6))
    pairs = zip(sample["meta"]["scans"], sample["meta"]["points_zyx_vox"], strict=True)
    for view, (scan, point) in enumerate(pairs):
        centre = sample["volumes"][view, 8, 8, 8, 0]
        assert centre == views.windowed(store.read_volume(sampler.scan_ids[scan]))[tuple(point)]


def test_outside_the_volume_is_zero(store):
    crop = views.windowed(views.crop_around(store, "case0", np.array([0, 0, 0]), (16, 16, 16)))
    assert not crop[:8].any() and not crop[:, :8].any() and not crop[:, :, :8].any()
    assert crop[8:, 8:, 8:].any()


def test_without_embeddings_points_are_random_and_nothing_is_weak(sampler):
    pair = dataclasses.replace(sampler, embeddings=None)(0, rng(0), rng(1))["meta"]
    assert (pair["score"], pair["redraws"], pair["weak"]) == (0, 0, False)


def test_paper_masks_differ_between_samples_and_release_masks_do_not(sampler):
    plain = dataclasses.replace(sampler, embeddings=None, mask_grid=(4, 4, 4))
    columns = dataclasses.replace(plain, column_masks=True)
    assert not np.array_equal(plain(0, rng(0), rng(7))["hidden"], plain(1, rng(1), rng(7))["hidden"])
    assert np.array_equal(columns(0, rng(0), rng(7))["hidden"], columns(1, rng(1), rng(7))["hidden"])
    both = columns(0, rng(0), rng(7))["hidden"]
    assert not np.array_equal(both[0], both[1])  # the two views hide different columns


def test_points_lie_in_the_body_and_reach_all_of_it(tmp_path):
    store = Store.create(str(tmp_path / "store"), spacing_zyx_mm=(2.0, 2.0, 2.0))
    foreground = np.zeros((4, 4, 4), bool)
    foreground[1, 2, 3] = foreground[3, 0, 0] = True
    store.write_scan(make_scan("two_cells", (7, 8, 8)), np.zeros((7, 8, 8), np.int16), foreground)
    points = {tuple(p) for p in views.foreground_points(store, "two_cells", rng(), 500).tolist()}
    first = {(z, y, x) for z in (2, 3) for y in (4, 5) for x in (6, 7)}
    second = {(6, y, x) for y in (0, 1) for x in (0, 1)}  # the volume ends inside this cell
    assert points == first | second


def test_mining_reads_no_whole_volume(sampler, scores, monkeypatch):
    # The release opens and decompresses the file three times for each match that it tries.
    monkeypatch.setattr(Store, "read_volume", lambda *_: pytest.fail("a volume was read"))
    scores.give([0.1] * 9)
    assert sampler(0, rng(), rng(1))["meta"]["weak"]
