"""Windows over a scan: what they cover and weigh, blending against a plain loop, and how much is held at once."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alice_jax.inference.sliding import Sliding, Windows

SIDE = (6, 8, 8)
WINDOW_HU = (-100.0, 300.0)


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(-200, 400, shape).astype(np.int16)


def scaled(volume_hu):
    return (np.clip(volume_hu, *WINDOW_HU) + 100) / 400


def three_classes(params, windows):
    """Depends on the place in the window, so that the blending shows."""
    place = jnp.arange(windows.shape[3], dtype=jnp.float32)[:, None]
    return windows * params + place


PARAMS = np.array([1.0, -2.0, 0.5], np.float32)


def stacked(sliding, volume_hu):
    return np.stack([np.asarray(logits) for logits in sliding.slices(volume_hu)])


def dense(volume_hu, overlap):
    """The same with everything kept: a sum of weighed windows over a sum of weights."""
    axes = [Windows.along(n, side, overlap) for n, side in zip(volume_hu.shape, SIDE, strict=True)]
    gaussian = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in SIDE]
    weight = np.einsum("z,y,x->zyx", *gaussian)[..., None]
    total, weights = np.zeros((*volume_hu.shape, 3)), np.zeros((*volume_hu.shape, 1))
    for start in itertools.product(*(axis.starts for axis in axes)):
        region = tuple(slice(s, s + n) for s, n in zip(start, SIDE, strict=True))
        logits = three_classes(PARAMS, jnp.asarray(scaled(volume_hu[region]))[None, ..., None])[0]
        total[region] += weight * logits
        weights[region] += weight
    return total / weights


@given(st.integers(1, 40), st.integers(0, 200), st.floats(0, 0.9))
def test_windows_cover_an_axis_and_their_weights_sum_to_one(side, more, overlap):
    size = side + more
    windows = Windows.along(size, side, overlap)
    assert windows.starts[0] == 0 and windows.starts[-1] == size - side
    assert (np.diff(windows.starts) >= 1).all()
    assert (np.diff(windows.starts) <= np.ceil(max(side * (1 - overlap), 1))).all()
    total = np.zeros(size)
    for start, weights in zip(windows.starts, windows.weights, strict=True):
        total[start : start + side] += weights
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_nnunets_windows():
    assert Windows.along(110, 64).starts.tolist() == [0, 23, 46]  # their example has three windows 23 apart
    assert Windows.along(64, 64).starts.tolist() == [0]
    middle, edge = Windows.along(96, 64).weights[0][[32, 63]]
    assert middle > 0.49 and edge < 1e-3


@pytest.mark.parametrize("shape, overlap, batch, devices", [
    ((17, 13, 21), 0.5, 1, 1), ((17, 13, 21), 0.5, 5, 1), ((30, 8, 9), 0.3, 2, 8), ((6, 8, 8), 0.5, 1, 8),
])  # fmt: skip
def test_blending_equals_a_plain_loop_that_keeps_everything(shape, overlap, batch, devices):
    sliding = Sliding(
        three_classes, PARAMS, SIDE, WINDOW_HU, overlap=overlap, batch=batch, devices=jax.devices()[:devices]
    )
    volume = noise(shape)
    np.testing.assert_allclose(stacked(sliding, volume), dense(volume, overlap), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (11, 5, 13), (5, 16, 9)])
def test_a_network_that_changes_nothing_gives_back_scans_of_any_size(shape):
    sliding = Sliding(lambda _, x: x, (), SIDE, WINDOW_HU, devices=jax.devices()[:1])
    volume = noise(shape)
    np.testing.assert_allclose(stacked(sliding, volume)[..., 0], scaled(volume), atol=1e-6)


def test_a_small_scan_lies_in_the_middle_of_a_window_with_air_around_it():
    seen = []

    def look(_, windows):
        jax.debug.callback(lambda x: seen.append(np.array(x)), windows)
        return windows

    sliding = Sliding(look, (), SIDE, WINDOW_HU, devices=jax.devices()[:1])
    volume = np.full((2, 3, 8), 300, np.int16)
    assert stacked(sliding, volume).shape == (2, 3, 8, 1)
    jax.effects_barrier()
    expected = np.pad(np.ones((2, 3, 8)), ((2, 2), (2, 3), (0, 0)))
    np.testing.assert_array_equal(seen[0][0, ..., 0], expected)


def counted(sliding):
    """The windows that the network is called with, as they come."""
    windows, compute = [], sliding._logits

    def logits(params, batch, mirrored):
        windows.extend(np.asarray(batch))
        return compute(params, batch, mirrored)

    sliding._logits = logits
    return windows


def test_no_window_is_computed_twice_and_slices_leave_early():
    sliding = Sliding(three_classes, PARAMS, SIDE, WINDOW_HU, batch=4, devices=jax.devices()[:1])
    sliding.classes  # noqa: B018  before counting
    windows = counted(sliding)
    slices = sliding.slices(noise((60, 12, 12)))
    next(slices)
    assert len(windows) == 4  # the four windows of the first row, whose slices the second row does not reach
    for _ in slices:
        pass
    assert len({window.tobytes() for window in windows}) == len(windows) == 19 * 2 * 2


def test_memory_does_not_grow_with_the_length_of_a_scan():
    def most_bytes(depth):
        sliding = Sliding(three_classes, PARAMS, SIDE, WINDOW_HU, batch=2, devices=jax.devices()[:1])
        before = sum(array.nbytes for array in jax.live_arrays())
        return max(sum(a.nbytes for a in jax.live_arrays()) - before for _ in sliding.slices(noise((depth, 16, 16))))

    short, long = most_bytes(24), most_bytes(240)
    assert long == short < 4 * 24 * 16 * 16 * 3 * 4


def test_mirrored_windows_are_averaged():
    def place(_, windows):  # what a window says depends on where along y and x it is, and nothing else
        return jnp.arange(8.0)[:, None, None] + 10 * jnp.arange(8.0)[:, None] + 0 * windows

    one_window = noise(SIDE)
    plain = stacked(Sliding(place, (), SIDE, WINDOW_HU), one_window)
    assert np.ptp(plain[..., 0], axis=(0, 1, 2)) == pytest.approx(77)
    along_x = stacked(Sliding(place, (), SIDE, WINDOW_HU, mirror=[2]), one_window)
    np.testing.assert_allclose(along_x[0, :, :, 0], np.arange(8)[:, None] + 35 + np.zeros((8, 8)), atol=1e-4)
    along_both = stacked(Sliding(place, (), SIDE, WINDOW_HU, mirror=[1, 2]), one_window)
    np.testing.assert_allclose(along_both, 38.5, atol=1e-4)
    # What does not depend on the place is seen the right way round.
    same = Sliding(lambda _, x: x, (), SIDE, WINDOW_HU, mirror=[0, 1, 2])
    np.testing.assert_allclose(stacked(same, noise((9, 9, 9)))[..., 0], scaled(noise((9, 9, 9))), atol=1e-6)
