"""The fast 3×3 convolution of CPUs beside the plain one, on planes whose sides are and are not whole tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alice_jax.models import winograd
from alice_jax.models.layers import Conv, planewise

CLOSE = 3e-5  # of the largest value: float32, through sums with factors up to 8


def drawn(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=CLOSE * np.abs(wanted).max())


def test_an_impulse_becomes_the_kernel_mirrored():
    x = jnp.zeros((1, 3, 9, 9, 1)).at[0, 1, 4, 5, 0].set(1.0)
    kernel = jnp.arange(27.0).reshape(3, 3, 3, 1, 1)
    y = winograd.convolve(x, kernel)[0, ..., 0]
    assert_close(y[:, 3:6, 4:7], kernel[::-1, ::-1, ::-1, 0, 0])
    assert np.abs(y.at[:, 3:6, 4:7].set(0)).max() < 27 * CLOSE


@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 11), st.integers(1, 11)),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    taps=st.sampled_from([1, 3]),
    batch=st.integers(1, 2),
)
@settings(max_examples=10, deadline=None)
def test_outputs_and_gradients_are_those_of_the_plain_convolution(size, channels, taps, batch):
    x, kernel = drawn((batch, *size, channels[0])), drawn((taps, 3, 3, *channels), 1)
    gradient = drawn((batch, *size, channels[1]), 2)

    @functools.partial(jax.jit, static_argnums=0)
    def output_and_gradients(convolve, x, kernel):
        output, back = jax.vjp(convolve, x, kernel)
        return output, *back(gradient)

    both = (output_and_gradients(convolve, x, kernel) for convolve in (winograd.convolve, planewise))
    for got, wanted in zip(*both, strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize(
    ("change", "pays"),
    [
        ({}, True),
        ({"kernel": (1, 3, 3, 16, 16)}, True),
        ({"kernel": (3, 3, 3, 16, 8)}, False),  # few channels
        ({"shape": (1, 64, 16, 12, 16)}, False),  # small planes
        ({"kernel": (3, 5, 5, 16, 16)}, False),
        ({"strides": (2, 1, 1)}, False),
        ({"dtype": jnp.bfloat16}, False),  # the sums would lose what is left
    ],
)
def test_where_it_pays(change, pays):
    usual = {"shape": (1, 4, 16, 16, 16), "kernel": (3, 3, 3, 16, 16), "strides": (1, 1, 1), "dtype": jnp.float32}
    assert winograd.pays(**usual | change) == pays


def test_a_layer_takes_it_on_a_cpu_alone():
    layer, x = Conv(16), drawn((1, 2, 16, 16, 16))
    params = layer.init(jax.random.key(0), x)
    jitted = jax.jit(layer.apply)
    assert "convolution" not in jitted.lower(params, x).as_text()
    assert "convolution" in jitted.trace(params, x).lower(lowering_platforms=("tpu",)).as_text()
    assert_close(layer.apply(params, x), planewise(x, params["params"]["kernel"]) + params["params"]["bias"])
