"""Names, order, shapes and counts of the authors' full-size state dicts, and clear errors for foreign ones."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alice_jax.errors import UserError
from alice_jax.interop import casa, heads, names, nnformer
from alice_jax.models.casa import CASA
from alice_jax.models.heads import Head
from alice_jax.models.nnformer import NNFormer

NAMES = Path(__file__).parent / "goldens" / "export_names"
CLS, ENCODER, DECODER = jnp.ones((1, 384)), jnp.ones((1, 1, 384)), jnp.ones((1, 1, 192))


def zeros(model, *inputs):
    """The model's parameters, all zero, without computing anything."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def described(state):
    return {name: (list(value.shape), str(value.dtype)) for name, value in state.items()}


def listed(file):
    return {name: (about["shape"], about["dtype"]) for name, about in json.loads((NAMES / file).read_text()).items()}


@pytest.mark.parametrize("mask_tokens", [True, False])
def test_backbone_has_all_names_in_order(mask_tokens):
    params = zeros(NNFormer(mask_tokens=mask_tokens), jnp.ones((1, 64, 64, 64, 1)))
    state, want = nnformer.to_torch(params, "correct"), listed("nnformer_default_state_dict.json")
    assert described(state) == want and list(state) == list(want)
    assert nnformer.position_index(state) == "correct"
    assert nnformer.position_index(nnformer.to_torch(params, "release")) == "release"
    returned = nnformer.from_torch(state, mask_token=mask_tokens)
    assert jax.tree.structure(returned) == jax.tree.structure(params)


@pytest.mark.parametrize(("separate", "file"), [(True, "student"), (False, "teacher_shared")])
def test_head_has_all_names_in_order(separate, file):
    state = heads.to_torch(zeros(Head(separate_last=separate), CLS, ENCODER, DECODER))
    want = listed(f"alice_head_{file}_state_dict.json")
    assert described(state) == want and list(state) == list(want)


def test_casa_has_all_names_in_order():
    token = jnp.ones((1, 1, 512))
    state, want = casa.to_torch(zeros(CASA(512, 2048, 8, 64), token, token)), listed("casa_state_dict.json")
    assert described(state) == want and list(state) == list(want)


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_layouts_undo_each_other(layout):
    shapes = {"same": (2,), "linear": (2, 3), "column": (2, 1), "token": (1, 1, 4), "table": (1, 4, 3)} | {
        "point": (2, 3, 1, 1, 1)
    }
    value = np.random.default_rng(0).random(shapes.get(layout, (2, 3, 4, 5, 6)))
    ours, theirs = names.LAYOUTS[layout]
    np.testing.assert_array_equal(theirs(ours(value)), value)


def test_foreign_names_are_refused():
    with pytest.raises(UserError, match=r"module\.final\.0\.up\.bias"):
        nnformer.from_torch({"module.final.0.up.bias": np.zeros(1)}, mask_token=False)
    with pytest.raises(UserError, match="encoder_9/other"):
        nnformer.to_torch({"encoder_9": {"other": np.zeros(1)}}, "correct")
