"""ResEnc and Primus compute what nnU-Net's own classes compute, from the same weights, which go both ways."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from random_weights import random_weights

from alice_jax.interop import primus, resenc
from alice_jax.models.primus import Primus
from alice_jax.models.resenc import ResEnc

FOLDER = Path(__file__).parent / "nnunet"
SIZES = {"resenc": ((3, 4, 5, 5), (1, 2, 1, 1)), "primus": (12, 2, 2)}  # those of nnunet/make.py
LIMIT = 1e-4


def ours(name, mask_tokens=False):
    fields = {"mask_tokens": mask_tokens, "out_channels": 2, "deep_supervision": name == "resenc"}
    return {"resenc": ResEnc, "primus": Primus}[name](*SIZES[name], **fields)


def from_torch(name, state):
    return resenc.from_torch(state, deep_supervision=True) if name == "resenc" else primus.from_torch(state, False)


def to_torch(name, params):
    return {"resenc": resenc, "primus": primus}[name].to_torch(params)


def segmented(name, params, volume):
    """volume (b, 1, d, h, w) -> logits (b, classes, d, h, w), as nnU-Net has them."""
    model = ours(name)
    logits = jax.jit(lambda x: model.apply({"params": params}, x, method="segment"))(np.moveaxis(volume, 1, -1))
    return [np.moveaxis(np.asarray(level), -1, 1) for level in logits]


@pytest.fixture(scope="module", params=["resenc", "primus"])
def stored(request):
    """(name, input, outputs, state dict) of one of nnU-Net's networks."""
    with np.load(FOLDER / f"{request.param}.npz") as arrays:
        state = {name.removeprefix("state/"): arrays[name] for name in arrays if name.startswith("state/")}
        outputs = [arrays[f"output{i}"] for i in range(sum(name.startswith("output") for name in arrays))]
        return request.param, arrays["input"], outputs, state


def test_outputs_agree(stored):
    name, volume, want, state = stored
    got = segmented(name, from_torch(name, state), volume)
    assert len(got) == (3 if name == "resenc" else 1)
    for ours, theirs in zip(got, want, strict=True):
        assert np.abs(theirs).max() > 0.3
        np.testing.assert_allclose(ours, theirs, atol=LIMIT, rtol=0)


def test_the_state_dict_comes_back_whole_and_in_order(stored):
    name, _, _, state = stored
    again = to_torch(name, from_torch(name, state))
    assert list(again) == list(state)
    for tensor, value in again.items():
        np.testing.assert_array_equal(value, state[tensor], err_msg=tensor)


def test_pretraining_fills_every_tensor_of_nnunets_class(stored):
    """One output channel and no deep supervision: heads that were not trained are zeros of the right shape."""
    name, _, _, state = stored
    model = ours(name, mask_tokens=True).clone(deep_supervision=False)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 16, 24, 16, 1), np.float32)))
    written = to_torch(name, random_weights(shapes)["params"])
    assert {tensor: x.shape for tensor, x in written.items()} == {tensor: x.shape for tensor, x in state.items()}


def test_nnunets_classes_compute_the_same_from_our_weights(stored):
    torch = pytest.importorskip("torch")
    pytest.importorskip("dynamic_network_architectures")
    name, volume, _, state = stored
    spec = importlib.util.spec_from_file_location("nnunet_make", FOLDER / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    params = random_weights(from_torch(name, state), seed=1)
    net = {"resenc": make.resenc, "primus": make.primus}[name]()
    net.load_state_dict({tensor: torch.from_numpy(x) for tensor, x in to_torch(name, params).items()}, strict=True)
    for mine, theirs in zip(segmented(name, params, volume), make.outputs(net, volume), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=LIMIT, rtol=0)


# Of nnU-Net's classes with one class, without deep supervision's unused heads.
PUBLISHED = {
    "ResEnc for crops of 128": (ResEnc(mask_tokens=False), 64, 102_348_193),
    "ResEnc for crops of 64": (ResEnc((32, 64, 128, 256, 320), (1, 3, 4, 6, 6), mask_tokens=False), 64, 62_808_993),
    "Primus-S": (Primus(mask_tokens=False), 64, 23_303_037),
    "Primus-B": (Primus(792, 12, 12, mask_tokens=False), 64, 92_027_569),
    "Primus-M": (Primus(864, 16, 12, mask_tokens=False), 64, 145_316_897),
    "Primus-L": (Primus(1056, 24, 16, mask_tokens=False), 64, 323_916_433),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_nnunets_classes(name):
    model, side, parameters = PUBLISHED[name]
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, side, side, side, 1), np.float32)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
