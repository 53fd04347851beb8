"""Windows, shifts, region masks and position bias on grids small enough to check by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from alice_jax.ahead import collectives
from alice_jax.models import windows


@pytest.mark.parametrize(
    ("grid", "window", "shifted", "expected"),
    [
        ((8, 8, 8), 4, False, (4, 0)),
        ((8, 8, 8), 4, True, (4, 2)),
        ((8, 8, 8), 8, True, (8, 0)),  # as large as the grid
        ((2, 3, 2), 4, True, (2, 0)),  # larger
        ((4, 16, 16), 4, True, (4, 0)),  # the smallest side counts
    ],
)
def test_effective_window(grid, window, shifted, expected):
    assert windows.effective_window(grid, window, shifted) == expected


def test_partition_lists_windows_and_tokens_in_c_order():
    x = jnp.arange(4 * 4 * 2).reshape(1, 4, 4, 2, 1)
    got = windows.partition(x, 2)[0, :, :, 0]
    assert got.shape == (4, 8)
    assert got[0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert got[1].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    np.testing.assert_array_equal(windows.merge(windows.partition(x, 2), (4, 4, 2), 2), x)


def test_region_mask_parts_only_what_the_shift_brought_together():
    mask = windows.region_mask((4, 4, 4), 2, 1)
    assert mask.shape == (8, 8, 8)
    assert not mask[0].any(), "the first window lies inside one region"
    assert (~mask[-1]).sum() == 8, "in the last one every token is alone"
    assert (mask == mask.transpose(0, 2, 1)).all()


@pytest.mark.parametrize(("window", "correct", "release"), [(2, 27, 19), (4, 343, 115), (8, 3375, 547)])
def test_rows_of_the_bias_table_in_use(window, correct, release):
    """Every offset has its own row; the release lets most rows lie idle."""
    assert len(np.unique(windows.relative_position_index(window, "correct"))) == correct == (2 * window - 1) ** 3
    assert len(np.unique(windows.relative_position_index(window, "release"))) == release


@pytest.mark.parametrize("kind", ["correct", "release"])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_position_bias_is_a_lookup_in_the_table(kind, window):
    table = np.random.default_rng(0).standard_normal(((2 * window - 1) ** 3, 5)).astype(np.float32)
    expected = table[windows.relative_position_index(window, kind)].transpose(2, 0, 1)
    biases = windows.position_biases(jnp.asarray(table), window, kind, samples=2)
    np.testing.assert_array_equal(biases, np.stack([expected, expected]))


def test_an_unknown_position_index_is_refused():
    with pytest.raises(ValueError, match="'correct' or 'release'"):
        windows.relative_position_index(2, "wrong")


@pytest.mark.parametrize("masked", [False, True])
def test_attention_has_the_gradients_of_its_plain_form(masked):
    rng = np.random.default_rng(0)
    shapes = *[(2, 3, 2, 8, 4)] * 3, (2, 2, 8, 8), (2, 3, 2, 8, 4)
    query, key, value, bias, weight = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    separate = jnp.asarray(rng.random((3, 8, 8)) < 0.3) if masked else None

    def plain(query, key, value, bias):
        logits = jnp.einsum("...qe,...pe->...qp", query, key) + bias[:, None]
        if masked:
            logits = logits + jnp.where(separate, windows.SEPARATE, 0.0)[:, None]
        return jax.nn.softmax(logits) @ value

    def ours(*args):
        return windows.attend(*args, separate)

    args = query, key, value, bias
    np.testing.assert_allclose(ours(*args), plain(*args), atol=1e-6)
    got, expected = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) * weight), argnums=(0, 1, 2, 3)))(*args) for f in (ours, plain)
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_gradients_of_position_bias_travel_as_offsets_and_not_as_pairs_of_tokens():
    """4 devices, windows of 8³ tokens, 2 heads: 15³ · 2 numbers of the table, where all pairs would be 512² · 2."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    of_pairs = jax.random.normal(jax.random.key(0), (4, 2, 512, 512))

    def loss(table, of_pairs, biases):
        return jnp.sum(biases(table) * of_pairs)

    def gradient(biases):
        return jax.jit(
            jax.grad(functools.partial(loss, biases=biases)), in_shardings=(whole, rows), out_shardings=whole
        )

    table = jax.random.normal(jax.random.key(1), (15**3, 2))
    for kind in ("correct", "release"):
        ours = gradient(lambda table, kind=kind: windows.position_biases(table, 8, kind, 4))
        index = windows.relative_position_index(8, kind)
        plain = gradient(lambda table, index=index: table[index].transpose(2, 0, 1))
        [(collective, size, count)] = collectives.found(ours.lower(table, of_pairs).compile().as_text())
        assert (collective, size, count) == ("all-reduce", 15**3 * 2 * 4, 1)
        np.testing.assert_allclose(ours(table, of_pairs), plain(table, of_pairs), rtol=1e-4, atol=1e-3)


def attend(x, context, separate):
    """Every token becomes the mean of what it may see."""
    source = x if context is None else context
    visible = np.ones((1, x.shape[2], x.shape[2])) if separate is None else 1.0 - separate
    return jnp.einsum("nqk,bnkc->bnqc", visible / visible.sum(-1, keepdims=True), source)


def test_shifted_windows_do_not_reach_around_the_border():
    x = jnp.zeros((1, 8, 8, 8, 1)).at[0, 0, 0, 0].set(1.0)
    y = windows.over_windows(attend, x, window=4, shifted=True)
    reached = np.argwhere(np.asarray(y[0, ..., 0]) > 0)
    assert reached.min(0).tolist() == [0, 0, 0] and reached.max(0).tolist() == [1, 1, 1]
    plain = windows.over_windows(attend, x, window=4, shifted=False)
    assert np.argwhere(np.asarray(plain[0, ..., 0]) > 0).max(0).tolist() == [3, 3, 3]


def test_padding_is_seen_but_cut_off():
    x = jnp.ones((1, 6, 8, 8, 1))
    y = windows.over_windows(attend, x, window=4, shifted=False)
    assert y.shape == x.shape
    np.testing.assert_allclose(y[0, :4], 1.0)
    np.testing.assert_allclose(y[0, 4:], 0.5)  # half of these windows' keys are padding


def weights_of(model, *inputs):
    return model.init(jax.random.key(0), *inputs)


def test_attention_without_bias_and_logits_is_the_mean():
    """Zero queries and keys attend evenly, so an identity of values and output gives the window's mean."""
    model = windows.WindowAttention(heads=2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 8, 4)), jnp.float32)
    zero = jax.tree.map(jnp.zeros_like, weights_of(model, x))
    params = zero["params"]
    params["qkv"]["kernel"] = jnp.concatenate([jnp.zeros((4, 8)), jnp.eye(4)], axis=1)
    params["out"]["kernel"] = jnp.eye(4)
    expected = jnp.broadcast_to(x.mean(2, keepdims=True), x.shape)
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, atol=1e-6)


def test_skip_attention_projects_no_queries():
    model = windows.WindowAttention(heads=2)
    x = jnp.ones((1, 1, 8, 4))
    assert set(weights_of(model, x, x)["params"]) == {"position_bias", "kv", "out"}


def test_bfloat16_keeps_float32_parameters_and_logits():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 8, 4)), jnp.float32)
    exact, rounded = (windows.WindowAttention(heads=2, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = weights_of(rounded, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    got = rounded.apply(variables, x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), exact.apply(variables, x), atol=2e-3)
