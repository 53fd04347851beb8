"""The backbone: sizes, masking, drop path, compute types. Its numbers are compared in test_goldens.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_weights

from alice_jax.errors import UserError
from alice_jax.models import layers, nnformer
from alice_jax.models.nnformer import NNFormer

SMALL = NNFormer(width=8, depths=(2, 2, 2), heads=(1, 2, 4), windows=(2, 4, 4))
CROP = (1, 16, 16, 16, 1)  # grids 8³ (its second block shifted), 4³ and 2³


@pytest.fixture(scope="module")
def weights():
    shapes = jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros(CROP))
    return random_weights(shapes)


@pytest.fixture(scope="module")
def volume():
    return jnp.asarray(np.random.default_rng(0).random(CROP), jnp.float32)


HIDDEN = jnp.zeros((1, 2, 2, 2), bool).at[0, 0, 1, 0].set(True).at[0, 1].set(True)  # 5 of 8 cells


@jax.jit
def encode(weights, volume, hidden):
    return SMALL.apply(weights, volume, hidden, method="encode")


def count(model: NNFormer, crop: tuple[int, ...], channels: int = 1) -> int:
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *crop, channels)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


SIZES = {
    "default": (NNFormer(), (64, 64, 64), 1, 9.726e6),
    "synapse": (NNFormer(192, ((2, 2, 2), (1, 2, 2)), out_channels=14), (64, 128, 128), 1, 150.0e6),
    "brain tumour": (
        NNFormer(96, ((2, 2, 2), (2, 2, 2)), heads=(3, 6, 12, 24), out_channels=4),
        (128, 128, 128),
        4,
        37.5e6,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    """Published totals also count the output layers of lower resolutions, at most one in two hundred parameters."""
    model, crop, channels, published = SIZES[name]
    assert count(model, crop, channels) == pytest.approx(published, rel=1 / 200)


def test_default_size_exactly():
    never_used = sum(48 * factor * 8 + 1 for factor in (2, 4))  # the reference's final.1 and final.2
    assert count(NNFormer(), (64, 64, 64)) + never_used == 9_725_763


def test_shapes_of_a_default_crop():
    shapes = jax.eval_shape(
        lambda x: NNFormer().init_with_output(jax.random.key(0), x)[0], jnp.zeros((2, 64, 64, 64, 1))
    )
    got = {field.name: getattr(shapes, field.name).shape for field in dataclasses.fields(shapes)}
    assert got == {
        "cls": (2, 384),
        "encoder_tokens": (2, 4, 4, 4, 384),
        "decoder_tokens": (2, 8, 8, 8, 192),
        "reconstruction": (2, 64, 64, 64, 1),
    }


def test_a_hidden_voxel_changes_no_encoder_token(weights, volume):
    """[A]'s figure 2: the encoder sees the visible part only. Even NaN stays out."""
    inside_hidden = volume.at[0, 10, 5, 5].set(jnp.nan).at[0, 0, 8, 0].set(1e6)
    for before, after in zip(encode(weights, volume, HIDDEN), encode(weights, inside_hidden, HIDDEN), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_visible_voxel_changes_the_encoder_tokens(weights, volume):
    before, after = (encode(weights, x, HIDDEN)[-1] for x in (volume, volume.at[0, 5, 5, 5].add(1.0)))
    assert not np.array_equal(before, after)


def test_hidden_tokens_are_the_mask_token(weights, volume):
    changed = {"params": weights["params"] | {"mask_token": weights["params"]["mask_token"] + 1}}
    assert not np.array_equal(encode(weights, volume, HIDDEN)[-1], encode(changed, volume, HIDDEN)[-1])
    np.testing.assert_array_equal(encode(weights, volume, None)[-1], encode(changed, volume, None)[-1])


def test_hidden_cells_may_lie_on_any_grid_that_divides(weights, volume):
    fine = HIDDEN.repeat(4, 1).repeat(4, 2).repeat(4, 3)
    np.testing.assert_array_equal(encode(weights, volume, HIDDEN)[-1], encode(weights, volume, fine)[-1])


def test_without_mask_tokens_hiding_means_zero_voxels(weights, volume):
    model = SMALL.clone(mask_tokens=False)
    params = {"params": {name: tree for name, tree in weights["params"].items() if name != "mask_token"}}
    blank = volume * ~HIDDEN.repeat(8, 1).repeat(8, 2).repeat(8, 3)[..., None]
    run = jax.jit(lambda x, hidden: model.apply(params, x, hidden, method="encode"))
    np.testing.assert_allclose(run(volume, HIDDEN)[-1], run(blank, None)[-1], rtol=1e-6)


def test_gradients_reach_every_parameter(weights, volume):
    @jax.jit
    @jax.grad
    def gradient(weights):
        out = SMALL.apply(weights, volume, HIDDEN)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(weights)):
        assert np.isfinite(leaf).all() and np.any(leaf), jax.tree_util.keystr(path)


def test_segment_gives_logits_of_every_decoder_stage_and_gradients_reach_all(volume):
    model = SMALL.clone(out_channels=3, deep_supervision=True, mask_tokens=False)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), volume, method="segment"))
    weights = random_weights(shapes)

    @jax.jit
    def outputs(weights):
        return model.apply(weights, volume, method="segment")

    @jax.jit
    @jax.grad
    def gradient(weights):
        return sum(jnp.sum(jnp.sin(level)) for level in outputs(weights))

    logits = outputs(weights)
    assert [(level.shape, level.dtype) for level in logits] == [
        ((1, side, side, side, 3), jnp.float32) for side in (16, 8, 4)
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(weights)):
        assert np.isfinite(leaf).all() and np.any(leaf), jax.tree_util.keystr(path)
    # The first is what the same weights reconstruct with; without deep supervision it is the only one.
    plain = model.clone(deep_supervision=False)
    backbone = {"params": {k: v for k, v in weights["params"].items() if not k.startswith("level_head")}}
    (alone,) = jax.jit(lambda weights: plain.apply(weights, volume, method="segment"))(backbone)
    np.testing.assert_array_equal(alone, logits[0])
    np.testing.assert_array_equal(alone, jax.jit(plain.apply)(backbone, volume).reconstruction)


def test_recomputed_blocks_give_the_same_gradients_and_keep_less(weights, volume):
    """Stage 0 of three, in encoder and decoder, with blocks dropped at random: the draws must be the same again.

    What is kept for the gradient is counted before compiling: on a CPU, XLA computes early what should come late.
    """
    found = []
    for remat in ((), (0,)):
        model = SMALL.clone(drop_path=0.5, remat=remat)
        assert jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0), volume)) == jax.tree.structure(weights)

        def loss(weights, model=model):
            out = model.apply(weights, volume, HIDDEN, train=True, rngs={"drop_path": jax.random.key(1)})
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))

        kept = jax.eval_shape(lambda weights, loss=loss: jax.vjp(loss, weights)[1], weights)
        found.append((jax.jit(jax.value_and_grad(loss))(weights), sum(x.size for x in jax.tree.leaves(kept))))
    ((all_kept, many), (again, few)) = found
    assert few < 0.6 * many
    for one, other in zip(jax.tree.leaves(all_kept), jax.tree.leaves(again), strict=True):
        assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(one)


def test_drop_path_acts_in_training_only(weights, volume):
    model = SMALL.clone(drop_path=0.5)
    run = jax.jit(
        lambda key, train: model.apply(weights, volume, train=train, rngs={"drop_path": key}).cls, static_argnums=1
    )
    one, two = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(run(one, False), run(two, False))
    np.testing.assert_array_equal(run(one, True), run(one, True))
    assert not np.array_equal(run(one, True), run(two, True))


def test_drop_path_drops_whole_samples_and_scales_the_rest():
    x = jnp.ones((200, 2, 2, 2, 3))
    y = np.asarray(layers.DropPath(0.25).apply({}, x, True, rngs={"drop_path": jax.random.key(0)}))
    for sample in y:
        assert np.all(sample == sample.flat[0])
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert y.mean() == pytest.approx(1.0, abs=0.1)


def test_drop_rates_grow_with_depth():
    assert nnformer.drop_rates(0.2, (2, 2, 2, 2))[-1] == (0.171428571, 0.2)
    bound = NNFormer(mask_tokens=False).bind({})
    rates = [bound.decoder[i].drop_paths for i in range(3)]
    assert rates == [(0.16, 0.2), (0.08, 0.12), (0.0, 0.04)], "the coarsest decoder stage runs first"


def test_bfloat16_keeps_float32_parameters(weights, volume):
    model = SMALL.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), volume)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    out = jax.jit(model.apply)(weights, volume)
    assert out.cls.dtype == out.reconstruction.dtype == jnp.float32
    assert out.encoder_tokens.dtype == jnp.bfloat16
    exact = SMALL.apply(weights, volume).cls
    assert np.abs(out.cls - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("model", "crop", "message"),
    [
        (SMALL, (1, 20, 16, 16, 1), "multiple of"),
        (SMALL.clone(heads=(1, 2)), CROP, "one per stage"),
        (SMALL.clone(remat=(0, 3)), CROP, "remat .*from 0 to 2"),
    ],
)
def test_sizes_that_cannot_work_are_refused(model, crop, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(crop))


def test_hidden_cells_that_do_not_divide_are_refused(volume):
    with pytest.raises(UserError, match="hidden cells"):
        jax.eval_shape(SMALL.init, jax.random.key(0), volume, jnp.zeros((1, 3, 2, 2)))


@pytest.mark.parametrize(
    ("kernel", "strides"),
    [
        ((3, 3, 3), (1, 1, 1)),
        ((3, 3, 3), (2, 2, 2)),
        ((3, 3, 3), (1, 2, 2)),
        ((1, 3, 3), (1, 2, 2)),
        ((3, 7, 7), (1, 1, 1)),
    ],
)
def test_convolution_by_planes_is_a_3d_convolution(kernel, strides):
    x = np.random.default_rng(0).standard_normal((2, 5, 6, 7, 3)).astype(np.float32)
    model = layers.Conv(4, kernel, strides)
    params = model.init(jax.random.key(0), x)["params"]
    dims, padding = ("NDHWC", "DHWIO", "NDHWC"), [(size // 2, size // 2) for size in kernel]
    want = jax.lax.conv_general_dilated(x, params["kernel"], strides, padding, dimension_numbers=dims)
    np.testing.assert_allclose(model.apply({"params": params}, x), want + params["bias"], atol=1e-5)


def test_starting_values_of_encoder_and_decoder():
    """The encoder's linear layers start from N(0, 0.02) with zero biases, the decoder's as PyTorch's do."""
    encoder, decoder = (
        layers.Linear(64, start=start).init(jax.random.key(0), jnp.zeros((1, 400)))["params"]
        for start in ("normal", "uniform")
    )
    assert encoder["kernel"].std() == pytest.approx(0.02, rel=0.05) and not encoder["bias"].any()
    assert np.abs(decoder["kernel"]).max() == pytest.approx(0.05, rel=0.01) and decoder["bias"].any()
