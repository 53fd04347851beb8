"""The body is found with its lungs, without the table, in thin and small fields of view."""

import numpy as np
import pytest

from alice_jax.data.foreground import body_mask, foreground_box


def torso(shape=(40, 90, 110), centre=(45, 55), radii=(28, 40)) -> tuple[np.ndarray, np.ndarray]:
    """HU and the true body: an ellipse with two lungs, on a table top 4 mm thick."""
    _, y, x = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    inside = np.hypot((y - centre[0]) / radii[0], (x - centre[1]) / radii[1]) < 1
    hu = np.where(inside, 40, -1000)
    for side in (-1, 1):
        hu[np.hypot((y - centre[0]) / 18, (x - centre[1] - side * 18) / 13) < 1] = -820
    hu[:, centre[0] + radii[0] + 3 : centre[0] + radii[0] + 5] = -100
    noise = np.random.default_rng(0).normal(0, 15, shape)
    return (hu + noise).clip(-1024).astype(np.int16), inside


def overlap(mask, inside):
    full = mask.repeat(2, 0).repeat(2, 1).repeat(2, 2)[tuple(slice(n) for n in inside.shape)]
    return (full & inside).sum() / (full | inside).sum()


@pytest.mark.parametrize("depth", [16, 17, 40])
def test_body_with_lungs_and_without_table(depth):
    hu, inside = torso((depth, 91, 110))
    mask = body_mask(hu)
    assert mask.dtype == bool and mask.shape == (-(-depth // 2), 46, 55)
    assert overlap(mask, inside) > 0.93
    assert mask[:, 22, 18].all()  # in a lung
    assert not mask[:, 38:].any()  # table
    low, high = foreground_box(mask, hu.shape)
    assert low[0] == 0 and high[0] == depth
    np.testing.assert_allclose([low[1:], high[1:]], [[17, 15], [73, 95]], atol=3)


def test_a_field_of_view_inside_the_chest_is_all_body():
    hu, _ = torso()
    crop = hu[:, 28:62, 30:80]  # cuts both lungs, shows neither skin nor room
    assert body_mask(crop).mean() > 0.97


def test_two_legs_are_one_body():
    hu, inside = torso(centre=(45, 28), radii=(20, 20))
    other, there = torso(centre=(45, 82), radii=(18, 18))
    hu, inside = np.maximum(hu, other), inside | there
    hu[inside] = 40
    assert overlap(body_mask(hu), inside) > 0.9


def test_nothing_in_air():
    assert not body_mask(np.full((20, 20, 20), -1000, np.int16)).any()
