"""Matches refined by their neighbours, and the smooth maps between patients that training may use."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alice_jax.data import matching
from alice_jax.data.consensus import NEIGHBOURS, SPREAD_MM, consensus, offsets_mm, robust_shift
from alice_jax.data.partner_map import partner_map

STRIDE = np.array([4, 4, 4])  # voxels of 2 mm a cell
SHIFT_VOX = np.array([10.0, -6.0, 3.0])  # where the key shows what the query has at 0


class FakeEmbedding:
    """Vectors that tell places apart: Fourier features of the position in the query."""

    def __init__(self, shift_vox, grid=(24, 24, 24)):
        fine = types.SimpleNamespace(stride_zyx_vox=tuple(STRIDE), step=np.ones(32))
        self.codec = types.SimpleNamespace(fine=fine, spacing_zyx_mm=(2.0, 2.0, 2.0))
        self.grid_zyx, self.shape_zyx = grid, tuple(np.array(grid) * STRIDE)
        self.shift_vox = shift_vox
        self.waves = np.random.default_rng(0).normal(0, 0.05, (3, 32))

    def vectors(self, cells_zyx):
        places = (np.asarray(cells_zyx) + 0.5) * STRIDE - 0.5 - self.shift_vox
        phases = 2 * places @ self.waves
        return np.concatenate([np.cos(phases), np.sin(phases)], axis=-1) / np.sqrt(32)

    def vectors_on(self, axes_zyx):
        return self.vectors(np.stack(np.meshgrid(*axes_zyx, indexing="ij"), axis=-1))


def test_offsets_are_spread_normally_and_bounded():
    offsets = offsets_mm()
    assert offsets.shape == (NEIGHBOURS, 3) and np.abs(offsets).max() <= 2 * SPREAD_MM
    np.testing.assert_allclose(offsets.mean(axis=0), 0, atol=2)
    np.testing.assert_allclose(offsets.std(axis=0), 0.88 * SPREAD_MM, rtol=0.1)  # 0.88: cut at two deviations


def test_neighbours_correct_a_match_that_went_astray():
    query, key = FakeEmbedding(np.zeros(3)), FakeEmbedding(SHIFT_VOX)
    points = np.array([[48.0, 48, 48], [40, 52, 45]])
    astray = points + SHIFT_VOX + [[9, 0, -8], [0, 7, 7]]  # 24 and 20 mm off
    better = consensus(query, points, key, astray)
    np.testing.assert_allclose(better.points_zyx_vox, points + SHIFT_VOX, atol=1)
    assert (better.agreeing > 0.5).all()


def test_where_nothing_matches_nothing_agrees():
    query, key = FakeEmbedding(np.zeros(3)), FakeEmbedding(SHIFT_VOX)
    key.waves = np.random.default_rng(1).normal(0, 0.05, (3, 32))  # another embedder's: unrelated
    points = np.array([[48.0, 48, 48]])
    assert consensus(query, points, key, points).agreeing < 0.2


def test_a_point_without_body_around_it_stays():
    query, key = FakeEmbedding(np.zeros(3)), FakeEmbedding(SHIFT_VOX)
    query.vectors = lambda cells: np.zeros((*cells.shape[:-1], 64))
    result = consensus(query, np.array([[48.0, 48, 48]]), key, np.array([[50.0, 51, 52]]))
    assert result.points_zyx_vox.tolist() == [[50, 51, 52]] and result.agreeing.tolist() == [0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_third_of_outliers_does_not_move_the_fit(seed):
    rng = np.random.default_rng(seed)
    starts = rng.normal(0, SPREAD_MM, (1, 60, 3))
    shift, bend = rng.uniform(-20, 20, 3), rng.normal(0, 0.1, (3, 3))
    moves = shift + starts @ bend
    moves[0, :20] += rng.uniform(-60, 60, (20, 3))
    found, agreeing = robust_shift(starts, moves, np.ones((1, 60)))
    assert np.linalg.norm(found[0] - shift) < 2.5
    assert 36 < agreeing[0] < 50


def test_a_map_to_the_partner_follows_the_matches_and_knows_where_there_are_none(monkeypatch):
    embedding = types.SimpleNamespace(codec=types.SimpleNamespace(spacing_zyx_mm=(2.0, 2.0, 2.0)))
    other = types.SimpleNamespace(codec=embedding.codec)
    body = np.stack(np.meshgrid(*[np.arange(0, 60, 3.0)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    body = body[body[:, 0] < 40]

    def search(query, points, key):
        found = points * 1.1 + 5 if key is other else (points - 5) / 1.1
        return matching.Found(found, np.ones(len(points)))

    monkeypatch.setattr(matching, "search", search)
    box = np.array([[0, 0, 0], [60, 60, 60]])
    to_partner = partner_map(embedding, other, body, box, np.random.default_rng(0))
    asked = np.array([[20.0, 30, 30], [10, 20, 50], [20, 30, 500]])
    places, known = to_partner(asked)
    np.testing.assert_allclose(places[:2], asked[:2] * 1.1 + 5, atol=0.5)
    assert known.tolist() == [True, True, False]


def test_a_map_without_body_knows_nothing(monkeypatch):
    monkeypatch.setattr(matching, "search", pytest.fail)
    embedding = types.SimpleNamespace(codec=types.SimpleNamespace(spacing_zyx_mm=(2.0, 2.0, 2.0)))
    to_partner = partner_map(
        embedding, embedding, np.zeros((0, 3)), np.array([[0, 0, 0], [9, 9, 9]]), np.random.default_rng(0)
    )
    assert not to_partner(np.zeros((2, 3)))[1].any()
