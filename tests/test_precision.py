"""Computing in bfloat16: which arrays are, which must not be, and that the losses are still the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_alice
from jax.extend.core import jaxprs_in_params
from test_embedder import SMALL

from alice_jax import train_state
from alice_jax.models.embedder import Embedder
from alice_jax.models.layers import Linear
from alice_jax.objectives import embedder

KEY = jax.random.key(0)


def alice(mode, dtype):
    """Objective and batch."""
    nets = test_alice.networks(mode)
    parts = {name: getattr(nets, name).clone(dtype=dtype) for name in ("backbone", "head", "casa")}
    return test_alice.objective(dataclasses.replace(nets, **parts)), test_alice.make_batch(2)


def embedding(mode, dtype):
    network = Embedder(**SMALL, dtype=dtype)
    rng = np.random.default_rng(0)
    grid = (4, 16, 16)  # of the fine cells
    batch = {
        "volumes": rng.random((2, 2, 8, 32, 32, 1), np.float32),
        "positions_mm": np.broadcast_to(np.moveaxis(np.indices(grid, np.float32), 0, -1) * 4, (2, 2, *grid, 3)),
        "body": np.ones((2, 2, *grid), bool),
        "pairs": rng.integers(0, np.prod(grid), (2, 2, 16)),
        "weights": np.ones((2, 16), np.float32),
    }
    contrasts = {level: embedder.Contrast(hard_pool=0, negatives=0) for level in ("fine", "coarse", "joint")}
    adam = optax.adamw(1e-3)
    return embedder.make(network, contrasts, candidates=0, statistics_momentum=0.9, optimizer=adam, schedules={}), batch


PAPER, RELEASE, EMBEDDER = (
    pytest.param(make, mode, id=mode or "embedder")
    for make, mode in ((alice, "paper"), (alice, "release"), (embedding, ""))
)


def equations(jaxpr):
    """All of a program, those inside others too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def program(function, *arguments):
    return list(equations(jax.make_jaxpr(function)(*arguments).jaxpr))


def in_bfloat16(equation):
    return all(x.aval.dtype == jnp.bfloat16 for x in equation.invars)


def multiplications(equation):
    """Of a matmul or convolution."""
    first, second = (x.aval.shape for x in equation.invars)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        each = np.prod([first[axis] for axis in contracted])
    else:
        each = np.prod(second) / second[equation.params["dimension_numbers"].rhs_spec[0]]
    return np.prod(equation.outvars[0].aval.shape) * each


@pytest.mark.parametrize(("make", "mode"), [PAPER, RELEASE, EMBEDDER])
def test_products_are_bfloat16_and_long_sums_and_the_state_are_not(make, mode):
    objective, batch = make(mode, jnp.bfloat16)
    state = jax.eval_shape(lambda: train_state.create(objective, 0, batch))
    step = train_state.make_train_step(objective, KEY)
    floating = {
        x.dtype for x in jax.tree.leaves(jax.eval_shape(step, state, batch)) if jnp.issubdtype(x.dtype, jnp.floating)
    }
    assert floating == {jnp.dtype("float32")}  # parameters, teacher, centers, moments, losses

    found = program(step, state, batch)
    products = [e for e in found if e.primitive.name in ("dot_general", "conv_general_dilated")]
    rounded = sum(multiplications(e) for e in products if in_bfloat16(e))
    assert rounded > 0.9 * sum(map(multiplications, products))
    for equation in found:
        if equation.primitive.name == "reduce_sum" and in_bfloat16(equation):
            # Gradients of what was repeated, at most 2 cells along each axis; not those of biases, over all voxels.
            assert equation.invars[0].aval.size <= 8 * equation.outvars[0].aval.size


@pytest.mark.parametrize(("make", "mode"), [PAPER, EMBEDDER])
def test_losses_and_softmax_are_float32_and_close_to_those_of_float32(make, mode):
    objective, batch = make(mode, jnp.float32)
    params, extra = jax.jit(objective.init)(KEY, batch)
    values = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        objective, _ = make(mode, dtype)

        def loss(params, extra, batch, objective=objective):
            return objective.loss(params, extra, batch, KEY, jnp.int32(0), False)[0]

        values[dtype] = float(jax.jit(loss)(params, extra, batch))
    for equation in program(loss, params, extra, batch):
        if equation.primitive.name in ("exp", "log", "rsqrt", "sqrt", "reduce_sum", "reduce_max"):
            short = equation.invars[0].aval.size <= 2 * equation.outvars[0].aval.size  # pooling of two cells
            assert not in_bfloat16(equation) or (short and equation.primitive.name == "reduce_max")
    assert values[jnp.bfloat16] == pytest.approx(values[jnp.float32], rel=0.01)


def test_the_gradient_of_a_bias_counts_every_voxel():
    layer, rows = Linear(1, dtype=jnp.bfloat16), jnp.ones((3000, 1), jnp.bfloat16)
    params = layer.init(KEY, rows)
    gradient = jax.jit(jax.grad(lambda params: layer.apply(params, rows).astype(jnp.float32).sum()))(params)
    assert float(gradient["params"]["bias"][0]) == 3000.0  # a sum in bfloat16 stops at 256
