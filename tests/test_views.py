"""Pairs: partners, points, crops, masks, and what happens when nothing matches."""

import dataclasses

import numpy as np
import pytest
from builders import make_scan, noise_store

from alice_jax.data import matching, views
from alice_jax.data.consensus import Consensus
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
        by_region=False,
    )


class Scores:
    """Stands in for the search: hands out scores one after another, matching every point to itself; on the way back
    those of a high score miss by the next of the distances given, or by none."""

    def __init__(self):
        self.scores, self.back_mm, self.partners, self.rounds = [], [], [], []
        self.moved_vox, self.agreeing = 0.0, []

    def give(self, scores, back_mm=()):
        self.scores += scores
        self.back_mm += back_mm

    def search(self, query, points, key):
        if not self.rounds or (query, key) != self.rounds[-1]:
            self.rounds.append((query, key))
            self.partners.append(key)
        return matching.Found(np.asarray(points, float), np.array([self.scores.pop(0) for _ in points]))

    def consensus(self, query, points, key, found):
        return Consensus(found + self.moved_vox, np.array([self.agreeing.pop(0) if self.agreeing else 1.0]))

    def cycle_mm(self, query, points, key, found):
        return np.array([self.back_mm.pop(0) if self.back_mm else 0.0 for _ in points])


@pytest.fixture
def scores(monkeypatch):
    given = Scores()
    monkeypatch.setattr(views.matching, "search", given.search)
    monkeypatch.setattr(views.matching, "cycle_mm", given.cycle_mm)
    monkeypatch.setattr(views, "consensus", given.consensus)
    return given


def rng(seed=0):
    return np.random.default_rng(seed)


def test_first_match_above_the_threshold_is_kept(sampler, scores):
    scores.give([0.1, 0.8, 0.9])
    pair = sampler.mine(0, rng(), sampler.embeddings)
    assert (pair.score, pair.redraws, pair.weak) == (0.8, 1, False)


def test_a_match_that_its_neighbours_contradict_is_not_accepted(sampler, scores):
    scores.give([0.9, 0.8, 0.8])
    scores.agreeing = [0.05, 0.5]
    rejected = []
    pair = sampler.mine(0, rng(), sampler.embeddings, rejected)
    assert (pair.score, pair.agreeing, pair.redraws, pair.weak) == (0.8, 0.5, 1, False)
    assert [(each.score, each.agreeing) for each in rejected] == [(0.9, 0.05)]


def test_the_chosen_match_goes_where_its_neighbours_put_it(sampler, scores):
    scores.give([0.8, 0.1, 0.1])
    plain = sampler.mine(0, rng(), sampler.embeddings)
    scores.give([0.8, 0.1, 0.1])
    scores.moved_vox = np.array([3.0, -2.0, 1.0])
    moved = sampler.mine(0, rng(), sampler.embeddings)
    np.testing.assert_array_equal(moved.query_point_zyx_vox, plain.query_point_zyx_vox)
    np.testing.assert_array_equal(moved.key_point_zyx_vox, plain.key_point_zyx_vox + scores.moved_vox)


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


def test_a_match_that_does_not_lead_back_is_not_accepted(sampler, scores):
    scores.give([0.8, 0.9, 0.75], back_mm=[30.0, 10.0])
    pair = sampler.mine(0, rng(), sampler.embeddings)
    assert (pair.score, pair.cycle_mm, pair.redraws, pair.weak) == (0.9, 10.0, 1, False)


def test_the_way_back_is_only_looked_at_where_the_score_is_high(sampler, scores):
    scores.give([0.1, 0.2, 0.8], back_mm=[4.0])
    rejected = []
    pair = sampler.mine(0, rng(), sampler.embeddings, rejected)
    assert pair.cycle_mm == 4.0 and [p.score for p in rejected] == [0.1, 0.2]
    assert np.isnan([p.cycle_mm for p in rejected]).all()


def test_the_best_of_those_that_do_not_lead_back_is_the_nearest(sampler, scores):
    scores.give([0.69] + 8 * [0.9], back_mm=[40.0, 30.0, 20.0, 11.0, 50.0, 50.0, 50.0, 50.0])
    pair = sampler.mine(0, rng(), sampler.embeddings)
    assert (pair.weak, pair.cycle_mm, pair.redraws, pair.weight) == (True, 11.0, 8, 1.0)


def test_weak_pairs_are_down_weighted_and_others_are_not(sampler, scores):
    lighter = dataclasses.replace(sampler, weak="down-weight", weak_weight=0.25)
    scores.give(9 * [0.1] + [0.9, 0.1, 0.1])
    samples = [lighter(record, rng(record), rng(9)) for record in (0, 1)]
    assert [(s["weights"], s["meta"]["weak"]) for s in samples] == [(0.25, True), (1.0, False)]
    assert all(s["weights"].dtype == np.float32 and s["weights"].shape == () for s in samples)


def test_redrawing_goes_on_with_other_queries_and_ends(sampler, scores):
    again = dataclasses.replace(sampler, weak="redraw")
    scores.give(9 * [0.1] + [0.9, 0.1, 0.1])
    pair = again.mine(0, rng(3), again.embeddings)
    assert (pair.weak, pair.redraws, pair.score) == (False, 9, 0.9)
    assert again.scan_ids[pair.query] == scores.rounds[-1][0] and again.scan_ids[pair.key] == scores.rounds[-1][1]

    scores.give(20 * [0.1] + [0.3] + 6 * [0.2])
    rejected = []
    pair = again.mine(0, rng(4), again.embeddings, rejected)
    assert (pair.weak, pair.redraws, pair.score, pair.weight) == (True, 26, 0.3, 1.0) and len(rejected) == 27
    assert len({p.query for p in rejected}) > 1


def test_a_pair_is_a_function_of_its_generator(sampler, scores):
    scores.give([0.1, 0.8, 0.9] * 2)
    first, second = (sampler.mine(0, rng(7), sampler.embeddings) for _ in range(2))
    np.testing.assert_array_equal(first.query_point_zyx_vox, second.query_point_zyx_vox)
    assert (first.key, first.redraws) == (second.key, second.redraws)


def test_a_patient_is_never_paired_with_itself(store, sampler):
    names = {"case0": "Ann", "case1": "Ann", "case3": "Ann", "case2": "Bob", "case4": "Bob"}
    named = dataclasses.replace(sampler, embeddings=None, patients=names)
    assert {named.draw(0, rng(seed)).key for seed in range(50)} == {2, 4}
    assert {named.draw(4, rng(seed)).key for seed in range(50)} == {0, 1, 3}
    allowed = dataclasses.replace(named, same_patient="allow")
    assert {allowed.draw(0, rng(seed)).key for seed in range(50)} == {1, 2, 3, 4}


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
    assert (pair["score"], pair["redraws"], pair["weak"], pair["weight"]) == (0, 0, False, 1)
    assert np.isnan(pair["cycle_mm"])


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
    found = views.foreground_points(store.foreground("two_cells"), (7, 8, 8), rng(), 500)
    points = {tuple(p) for p in found.tolist()}
    first = {(z, y, x) for z in (2, 3) for y in (4, 5) for x in (6, 7)}
    second = {(6, y, x) for y in (0, 1) for x in (0, 1)}  # the volume ends inside this cell
    assert points == first | second


def test_mining_reads_no_whole_volume(sampler, scores, monkeypatch):
    # The release opens and decompresses the file three times for each match that it tries.
    monkeypatch.setattr(Store, "read_volume", lambda *_: pytest.fail("a volume was read"))
    scores.give([0.1] * 9)
    assert sampler(0, rng(), rng(1))["meta"]["weak"]
