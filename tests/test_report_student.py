"""Attention is CASA's own, over the tokens that the pictures show."""

import jax
import numpy as np
import pytest
from random_weights import random_weights
from test_report import config_for

from alice_jax import tasks
from alice_jax.reporting import student

CROP, GRID = (16, 16, 16), (4, 4, 4)


class Nowhere:
    path = "nowhere"


def a_sample():
    """Two crops, the last quarter of each axis' cells aside: hidden but for 16 of 64 cells."""
    rng = np.random.default_rng(0)
    hidden = np.ones((2, *GRID), bool)
    hidden.reshape(2, -1)[:, rng.permutation(64)[:16]] = False
    return {"volumes": rng.uniform(size=(2, *CROP, 1)).astype(np.float32), "hidden": hidden}


def restored(config):
    networks = tasks.pretrain.networks(config)
    example = {"volumes": np.zeros((1, 2, *CROP, 1), np.float32)}
    params, extra = random_weights(jax.eval_shape(networks.init, jax.random.key(0), example))
    return {"params": params, "extra": extra}


@pytest.mark.parametrize("mode", ["paper", "release"])
def test_each_query_divides_its_attention_among_all_keys(mode):
    config = config_for(Nowhere)
    config.unlock().method.mode = mode
    sample = a_sample()
    seen = student.look(config, restored(config), sample)
    count = 16 if mode == "paper" else 64
    target = (4, 4, 4) if mode == "paper" else (8, 8, 8)
    assert seen.online.shape == (2, count, 8, 8, 8) and seen.target.shape == (2, count, *target)
    for attention in (seen.online, seen.target):
        np.testing.assert_allclose(attention.sum(axis=(2, 3, 4)), 1, rtol=1e-5)
    assert seen.queries.shape == (2, count)
    for side in range(2):
        chosen = student.chosen_queries(sample, seen.queries, side)
        assert 1 <= len(set(chosen)) == len(chosen) <= student.TOKENS
        assert not sample["hidden"][side].ravel()[seen.queries[side, chosen]].any()
    assert student.draw_attention(sample, seen, ("a", "b")).startswith(b"\x89PNG")


def test_what_the_losses_do_not_need_is_not_shown():
    config = config_for(Nowhere)
    config.unlock().loss.update(alignment=0.0)
    seen = student.look(config, restored(config), a_sample())
    assert seen.online is None and seen.reconstruction.shape == (2, *CROP)
    config.loss.update(alignment=1.0, reconstruction=0.0)
    seen = student.look(config, restored(config), a_sample())
    assert seen.reconstruction is None and seen.online is not None
    config.loss.update(alignment=0.0, reconstruction=0.0, invariance=1.0)
    assert student.look(config, restored(config), a_sample()) == student.Seen()


def test_the_token_drawn_first_shows_most():
    sample = a_sample()
    sample["volumes"][0] *= 0.1
    cell = np.argwhere(~sample["hidden"][0])[5]
    sample["volumes"][0][tuple(slice(4 * c, 4 * c + 4) for c in cell)] *= 10
    queries = np.stack([np.flatnonzero(~hidden) for hidden in sample["hidden"].reshape(2, -1)])
    assert student.chosen_queries(sample, queries, 0) == [5]  # no other shows half as much


def test_attention_is_red_above_the_even_share_only():
    """Shares of 1, of the full one, and half way between."""
    grey = np.full((1, 3), 0.5)
    colors = student.overlay(grey, np.array([[1.0, 3.0, 2.0]]), full=3.0)
    assert colors[0, 0].tolist() == [0.5, 0.5, 0.5]
    assert colors[0, 1, 0] > colors[0, 2, 0] > 0.5 > colors[0, 2, 1] > colors[0, 1, 1]
