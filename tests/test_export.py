"""The exported backbone in plain PyTorch gives the numbers that we compute; a failed export leaves no file."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_weights

from alice_jax import checkpoint, export, pretrained, tasks, train_state
from alice_jax.contract import Contract
from alice_jax.data.store import FRAME
from alice_jax.errors import UserError

ROOT = Path(__file__).parents[1]
STEP = 7
CONTRACT = Contract(FRAME, (2.0, 2.0, 2.0), (-125.0, 225.0), (32, 48, 32))


def small_config(mode: str):
    spec = importlib.util.spec_from_file_location("pretrain_config", ROOT / "configs" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny").unlock()
    config.method.mode = mode
    config.views.crop_shape_zyx = (32, 48, 32)  # one stage of two pads its windows
    config.model.width, config.model.heads = 8, (1, 2, 4, 8)
    return config


@pytest.fixture(scope="module", params=["paper", "release"])
def run(request, tmp_path_factory):
    """(workdir, networks, parameters, other state) of a run whose every weight is random."""
    config = small_config(request.param)
    alice = tasks.pretrain.networks(config)
    batch = {"volumes": jnp.zeros((1, 2, *config.views.crop_shape_zyx, 1))}
    params, extra = random_weights(jax.eval_shape(alice.init, jax.random.key(0), batch))
    workdir = str(tmp_path_factory.mktemp(request.param))
    checkpoint.write_config(workdir, config.to_dict())
    with checkpoint.Checkpoints(workdir) as checkpoints:
        state = train_state.TrainState(jnp.array(STEP), params, extra, opt_state={})
        checkpoints.save(STEP, state, {"contract": CONTRACT.to_json()})
    return workdir, alice, params, extra


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_torch_computes_the_same(run, which, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from torch_nnformer import NNFormer

    workdir, alice, params, extra = run
    out = tmp_path / "backbone.pth"
    assert export.main(["--workdir", workdir, "--format", "torch", "--out", str(out), "--which", which]) == 0
    about = json.loads((tmp_path / "backbone.pth.json").read_text())
    assert about["step"] == STEP and about["network"] == which and about["window_hu"] == [-125, 225]
    assert about["crop_shape_zyx"] == [32, 48, 32] and about["spacing_zyx_mm"] == [2, 2, 2]
    assert "z, y, x" in about["frame"] and "z, y, x" in capsys.readouterr().out

    model = alice.backbone
    net = NNFormer((32, 48, 32), model.width, model.heads, model.windows)
    state = torch.load(out)
    net.load_state_dict(state, strict=True)
    assert list(state) == list(net.state_dict()), "the authors' order"
    position = None
    if "position_embedding" in about:
        position = np.load(tmp_path / about["position_embedding"])
    assert (position is not None) == (alice.mode.position_embedding)
    assert {pretrained.read(path).position_table for path in (str(out), workdir)} == {alice.mode.position_embedding}

    volume = np.random.default_rng(0).random((2, 32, 48, 32, 1), np.float32)
    networks = extra["teacher"] if which == "teacher" else params
    grid = None if position is None else extra["position"][which]
    ours = jax.jit(lambda x: model.apply({"params": networks["backbone"]}, x, None, grid))(volume)
    with torch.no_grad():
        theirs = net.eval()(
            torch.from_numpy(volume).permute(0, 4, 1, 2, 3), None if position is None else torch.from_numpy(position)
        )
    reconstruction = theirs[3].permute(0, 2, 3, 4, 1)
    for mine, other in zip(
        (ours.cls, ours.encoder_tokens, ours.decoder_tokens, ours.reconstruction),
        (*theirs[:3], reconstruction),
        strict=True,
    ):
        np.testing.assert_allclose(mine, other.numpy(), atol=1e-4)


def test_nothing_is_left_half_written(run, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    out = tmp_path / "backbone.pth"
    out.write_text("earlier export")

    def break_down(*_):
        raise OSError("disk full")

    monkeypatch.setattr(export.torch_file, "save", break_down)
    with pytest.raises(UserError, match="disk full"):
        export.main(["--workdir", run[0], "--out", str(out)])
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.pth"]
    assert out.read_text() == "earlier export"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir", "nowhere"], "--workdir nowhere"),
        (["--step", "8"], "--step 8"),
        (["--which", "both"], "--which"),
        (["--format", "onnx"], "--format"),
        (["--out", "no/such/folder/backbone.pth"], "--out"),
    ],
)
def test_bad_arguments_are_one_clear_line(run, tmp_path, arguments, message):
    given = {"--workdir": run[0], "--out": str(tmp_path / "backbone.pth")} | dict([arguments])
    with pytest.raises(UserError, match=message):
        export.main([word for pair in given.items() for word in pair])
    assert not list(tmp_path.iterdir())


def test_without_torch_the_remedy_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'alice_jax\[torch\]'"):
        export.main(["--workdir", run[0], "--out", str(tmp_path / "backbone.pth")])
