"""Partners: what scans show, who is kept apart, and that all are drawn equally often."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from builders import make_scan

from alice_jax.data import embeddings, matching, regions, views
from alice_jax.data.embeddings import Codec, Level
from alice_jax.data.partners import Partners, balanced, read_patients
from alice_jax.data.store import Store
from alice_jax.errors import UserError

SHAPE = (64, 64, 64)  # of 2 mm: 4 coarse cells of 32 mm along each axis
DIMS = 16


READ = Store.read_json


def codec_of(embedder="a" * 64):
    fine, coarse = (
        Level((stride,) * 3, np.eye(DIMS, dtype=np.float32), np.full(DIMS, 1 / 127, np.float32)) for stride in (4, 16)
    )
    return Codec(embedder, (2.0, 2.0, 2.0), fine, coarse)


def add_body(store, id, kind, patient=None, sha256=None, codec=None):
    """A scan whose vectors are those of its kind of body, all bodies of a kind being nearly alike."""
    scan = make_scan(id, SHAPE)
    scan = dataclasses.replace(scan, patient=patient or id, sha256=sha256 or scan.sha256)
    store.write_scan(scan, np.zeros(SHAPE, np.int16), np.ones((32, 32, 32), bool))
    own = np.random.default_rng(sum(map(ord, id)))
    levels = []
    for cells in (16, 4):
        places = (np.argwhere(np.ones((cells,) * 3)) + 0.5) / cells  # 0 to 1 through the body
        directions = np.random.default_rng(1).normal(size=(3, DIMS // 2))
        half = embeddings.normalise(np.cos(7 * places @ directions + np.arange(DIMS // 2)))
        half += own.normal(scale=0.02, size=half.shape)
        vectors = np.zeros((len(places), DIMS))
        vectors[:, {"thigh": slice(0, 8), "chest": slice(8, 16)}[kind]] = half
        levels.append(embeddings.normalise(vectors).reshape(cells, cells, cells, DIMS))
    embeddings.write_embedding(store, id, codec or codec_of(), *levels)


def cohort(path, **kinds):
    """kinds: {"scan": "thigh" or "chest"}"""
    store = Store.create(str(path), (2.0, 2.0, 2.0))
    codec_of().save(store)
    for id, kind in kinds.items():
        add_body(store, id, kind)
    return store


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    kinds = {f"c{i}": "chest" for i in range(6)} | {f"t{i}": "thigh" for i in range(4)}
    return cohort(tmp_path_factory.mktemp("mixed") / "store", **kinds)


def sampler_of(store, **changes):
    reader = embeddings.EmbeddingReader(store)
    return views.PairSampler(store, reader, tuple(store.ids()), (16,) * 3, (2,) * 3, **changes)


def mined(sampler, count):
    return [
        sampler.mine(i % len(sampler.scan_ids), np.random.default_rng([1, i]), sampler.embeddings) for i in range(count)
    ]


# ---------------------------------------------------------------- regions


def test_a_thigh_is_kept_from_a_chest(mixed):
    sampler = sampler_of(mixed)
    for pair in mined(sampler, 100):
        assert sampler.scan_ids[pair.query][0] == sampler.scan_ids[pair.key][0]
        assert not (pair.weak or pair.fallback) and pair.query != pair.key
        assert np.abs(pair.query_point_zyx_vox - pair.key_point_zyx_vox).max() <= 8 and pair.cycle_mm <= 10


def test_without_the_index_thighs_meet_chests(mixed):
    sampler = sampler_of(mixed, by_region=False, threshold=-1.0, cycle_mm=1e3, agreeing=0.0)
    assert len({(sampler.scan_ids[p.query][0], sampler.scan_ids[p.key][0]) for p in mined(sampler, 60)}) == 4


def test_a_body_part_that_nobody_else_shows_is_paired_with_any_scan_and_flagged(tmp_path):
    store = cohort(tmp_path / "store", **{f"c{i}": "chest" for i in range(6)}, lone="thigh")
    sampler = sampler_of(store, tries=20)
    pairs = mined(sampler, 28)
    assert {p.fallback for p in pairs if p.query == 6} == {True} and {p.weak for p in pairs if p.query == 6} == {True}
    assert {p.fallback for p in pairs if p.query != 6} == {False}
    assert 6 not in {p.key for p in pairs}


def test_a_region_index_is_kept_and_made_anew_only_where_it_is_stale(tmp_path, monkeypatch):
    store = cohort(tmp_path / "store", a="thigh", b="thigh", c="chest")
    describe, made = regions.describe, []
    monkeypatch.setattr(regions, "describe", lambda *a: made.append(1) or describe(*a))
    ids = store.ids()
    regions.open_index(store, ids)
    first = (tmp_path / "store" / regions.FILE).read_bytes()
    regions.open_index(store, ids)
    assert len(made) == 3
    assert len(first) / 3 < 2000  # bytes a scan

    (tmp_path / "store" / regions.FILE).unlink()
    regions.open_index(store, ids[::-1])
    assert (tmp_path / "store" / regions.FILE).read_bytes() == first and len(made) == 6  # whoever makes it

    add_body(store, "b", "chest", sha256="1" * 64)  # prepared again
    regions.open_index(store, ids)
    assert len(made) == 7

    other = codec_of("b" * 64)
    other.save(store)
    for id in ids:
        add_body(store, id, "chest", codec=other)
    regions.open_index(store, ids[:2])
    assert len(made) == 9 and set(json.loads((tmp_path / "store" / regions.FILE).read_text())["scans"]) == set(ids[:2])


def test_a_scan_without_embedding_is_named(tmp_path):
    store = cohort(tmp_path / "store", a="thigh", b="thigh")
    store.write_scan(make_scan("bare", SHAPE), np.zeros(SHAPE, np.int16), np.ones((32, 32, 32), bool))
    with pytest.raises(UserError, match=r"scan bare has no embedding; run python -m alice_jax.embed"):
        regions.open_index(store, store.ids())


def test_a_store_that_can_only_be_read_is_no_obstacle(mixed, monkeypatch, capsys):
    def refuse(*_):
        raise UserError("no space")

    monkeypatch.setattr(Store, "read_json", lambda self, name: None if name == regions.FILE else READ(self, name))
    monkeypatch.setattr(Store, "write_json", refuse)
    assert regions.open_index(mixed, mixed.ids()).coverage.shape[1] == 10
    assert "made again for each run" in capsys.readouterr().err


def test_centres_find_clusters_and_use_no_random_numbers():
    rng = np.random.default_rng(0)
    corners = np.eye(4)
    vectors = embeddings.normalise(np.repeat(corners, 50, 0) + rng.normal(scale=0.05, size=(200, 4)))
    found = regions.centres(vectors, 4)
    assert (found @ corners.T).max(axis=0).min() > 0.99
    np.testing.assert_array_equal(found, regions.centres(vectors, 4))
    assert regions.centres(vectors[:2], 4).shape == (4, 4)


# ---------------------------------------------------------------- patients, copies, balance


def test_patients_and_copies_are_kept_apart(tmp_path):
    store = Store.create(str(tmp_path / "store"), (2.0, 2.0, 2.0))
    codec_of().save(store)
    for id, patient, content in (("a", "Ann", "1"), ("b", "Ann", "2"), ("c", "Cid", "1"), ("d", "Dan", "3")):
        add_body(store, id, "chest", patient, 64 * content)
    sampler = sampler_of(store)
    drawn = [{sampler.partners.draw(i, None, np.random.default_rng(seed))[0] for seed in range(60)} for i in range(4)]
    assert drawn == [{3}, {2, 3}, {1, 3}, {0, 1, 2}]
    assert {pair.key for pair in mined(sampler, 40) if pair.query == 0} == {3}
    for other in (sampler_of(store, same_patient="allow"), sampler_of(store, patients={"b": "Bea"})):
        assert 1 in {pair.key for pair in mined(other, 80) if pair.query == 0}


def test_where_all_are_of_one_patient_any_other_is_drawn_and_flagged():
    same = Partners(np.zeros(3, int), np.arange(3))
    assert {same.draw(1, None, np.random.default_rng(seed)) for seed in range(30)} == {(0, True), (2, True)}


def test_partners_are_drawn_equally_often(mixed):
    """Of 10 scans 4 are thighs: drawn from their own kind, each of 10 scans is the key of a tenth."""
    keys = np.bincount([pair.key for pair in mined(sampler_of(mixed), 400)], minlength=10)
    assert keys.std() / keys.mean() < 0.2  # chance alone: 0.16


def test_scans_that_show_more_are_not_drawn_more():
    shown = np.zeros((90, 10), bool)
    shown[:, 0] = True  # a whole body shows every place, the others show a third of them
    for scan in range(1, 10):
        shown[scan % 3 :: 3, scan] = True

    def use(weights):
        return (shown * weights / (shown @ weights)[:, None]).sum(axis=0)

    assert use(np.ones(10)).max() / use(np.ones(10)).mean() > 2
    even = use(balanced(shown))
    assert even.std() / even.mean() < 0.02


def test_pairs_are_the_same_in_another_process(mixed):
    sampler = sampler_of(mixed)
    copy = pickle.loads(pickle.dumps(sampler))
    for ours, theirs in zip(mined(sampler, 12), mined(copy, 12), strict=True):
        assert (ours.key, ours.redraws, ours.score) == (theirs.key, theirs.redraws, theirs.score)
        np.testing.assert_array_equal(ours.key_point_zyx_vox, theirs.key_point_zyx_vox)


def test_the_cycle_error_is_that_of_the_matcher(mixed):
    sampler = sampler_of(mixed)
    for pair in mined(sampler, 5):
        a, b = (sampler.embeddings(sampler.scan_ids[scan]) for scan in (pair.query, pair.key))
        asked = pair.query_point_zyx_vox[None]
        there = matching.search(a, asked, b)
        back_mm = matching.cycle_mm(a, asked, b, there.points_zyx_vox)
        assert pair.cycle_mm == pytest.approx(back_mm[0], abs=1e-3)
        assert pair.score == pytest.approx(there.scores[0], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", '{"a": "Ann", "b": 7}'),
        ("p.csv", "a,Ann\nb,7\n"),
        ("q.csv", "\ufeffscan,patient\r\na, Ann\r\n\r\nb,7\r\n"),
    ],
)
def test_patients_from_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = read_patients(str(tmp_path / name))
    assert found["a"] == "Ann" and found["b"] == "7"


@pytest.mark.parametrize(("name", "text"), [("p.json", "[1]"), ("p.json", "{"), ("p.csv", "a,Ann,x\n"), ("gone", None)])
def test_a_bad_file_of_patients_is_said_in_one_line(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"data.patients .*give JSON") as error:
        read_patients(str(tmp_path / name))
    assert "\n" not in str(error.value)
