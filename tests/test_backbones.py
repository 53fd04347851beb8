"""What every backbone must do: shapes, masking, gradients, compute types, remat, segmentation, pretraining, export."""

import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import noise_store
from random_weights import random_weights

from alice_jax import checkpoint, export, settings, tasks, train_state
from alice_jax.contract import Contract
from alice_jax.data.store import FRAME
from alice_jax.errors import UserError
from alice_jax.evaluation import backbone
from alice_jax.interop import primus, resenc, torch_file
from alice_jax.models.nnformer import NNFormer
from alice_jax.models.primus import Primus
from alice_jax.models.resenc import ResEnc
from configs import segment

CROP = (1, 16, 16, 16, 1)
SMALL = {
    "nnformer": NNFormer(8, depths=(1, 1), heads=(1, 2), windows=(2, 2), drop_path=0.0),
    "resenc": ResEnc((4, 6, 8), (1, 1, 1)),
    "primus": Primus(24, 2, 2, drop_path=0.0),
}
CELLS = {"nnformer": 4, "resenc": 4, "primus": 2}  # encoder tokens along each axis of the crop


@pytest.fixture(scope="module", params=SMALL)
def case(request):
    """(name, backbone, random weights, volume, hidden cells)."""
    model = SMALL[request.param]
    weights = random_weights(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(CROP)))
    rng = np.random.default_rng(0)
    hidden = np.zeros((1, *(CELLS[request.param],) * 3), bool)
    hidden[0, 0], hidden[0, 1, 0, 1] = True, True
    return request.param, model, weights, jnp.asarray(rng.random(CROP), jnp.float32), jnp.asarray(hidden)


@pytest.fixture(scope="module")
def computed(case):
    """The case's `run(volume)` with hidden cells, compiled once."""
    _, model, weights, _, hidden = case
    return jax.jit(lambda volume: model.apply(weights, volume, hidden))


def test_shapes_are_those_that_the_backbone_states(case):
    name, model, weights, volume, _ = case
    out = jax.eval_shape(lambda: model.apply(weights, volume))
    cells = tuple(n // stride for n, stride in zip(CROP[1:4], model.token_stride_zyx, strict=True))
    assert cells == (CELLS[name],) * 3
    assert out.encoder_tokens.shape == (1, *cells, model.encoder_channels)
    assert out.decoder_tokens.shape == (1, *(2 * n for n in cells), model.decoder_channels)
    assert out.cls.shape == (1, model.encoder_channels) and out.reconstruction.shape == CROP


def test_hidden_voxels_change_nothing_at_all_and_visible_ones_everything(case, computed):
    *_, volume, hidden = case
    size = 16 // hidden.shape[1]
    cells = np.asarray(hidden).repeat(size, 1).repeat(size, 2).repeat(size, 3)[..., None]
    before = computed(volume)
    after = computed(jnp.where(cells, jnp.nan, volume))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    moved = computed(jnp.where(cells, volume, volume + jnp.linspace(0, 1, 16)[:, None]))
    assert all(np.any(x != y) for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(before), strict=True))


def test_the_mask_token_tells_hidden_from_zero_voxels(case, computed):
    _, model, weights, volume, hidden = case
    size = 16 // hidden.shape[1]
    cells = hidden.repeat(size, 1).repeat(size, 2).repeat(size, 3)[..., None]
    plain = {"params": {name: tree for name, tree in weights["params"].items() if name != "mask_token"}}
    model = model.clone(mask_tokens=False)
    run = jax.jit(lambda volume, hidden: model.apply(plain, volume, hidden).encoder_tokens)
    zeroed = run(jnp.where(cells, 0.0, volume), None)
    np.testing.assert_allclose(run(volume, hidden), zeroed, rtol=1e-5, atol=1e-6)
    assert np.abs(computed(volume).encoder_tokens - zeroed).max() > 1e-3


def test_gradients_reach_every_parameter_and_recomputing_changes_none(case):
    _, model, weights, volume, hidden = case
    found = []
    for remat in ((), (0,)):
        again = model.clone(remat=remat)

        def loss(weights, model=again):
            out = model.apply(weights, volume, hidden, train=True)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))

        kept = jax.eval_shape(lambda weights, loss=loss: jax.vjp(loss, weights)[1], weights)
        found.append((jax.jit(jax.grad(loss))(weights), sum(x.size for x in jax.tree.leaves(kept))))
    (first, many), (second, few) = found
    assert few < 0.9 * many
    for path, leaf in jax.tree_util.tree_leaves_with_path(first):
        # A convolution's bias before an instance norm is taken away again by it.
        dead = "bias" in str(path[-1]) and isinstance(model, ResEnc) and "conv" in str(path[-2])
        assert np.isfinite(leaf).all() and (dead or np.any(leaf)), jax.tree_util.keystr(path)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * max(1.0, np.abs(one).max()))


def test_from_the_start_the_features_of_unlike_crops_are_unlike(case):
    """Self-distillation has nothing to tell apart otherwise; plain mean tokens of ResEnc have cosines of 0.996."""
    _, model, *_ = case
    z, y, x = np.indices(CROP[1:4]) / 16
    crops = jnp.asarray([z, (y > 0.5) * 1.0, np.hypot(z - 0.5, x - 0.5) < 0.3, np.sin(9 * x) * y])[..., None]
    weights = jax.jit(model.init)(jax.random.key(0), crops[:1])
    cls = np.asarray(jax.jit(lambda crops: model.apply(weights, crops).cls)(crops.astype(jnp.float32)))
    unit = cls / np.linalg.norm(cls, axis=1, keepdims=True)
    assert (unit @ unit.T)[~np.eye(4, dtype=bool)].mean() < 0.99


def test_bfloat16_is_close_and_keeps_float32_parameters(case, computed):
    _, model, weights, volume, hidden = case
    model = model.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), volume)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    rough, exact = jax.jit(model.apply)(weights, volume, hidden), computed(volume)
    assert rough.encoder_tokens.dtype == jnp.bfloat16 and rough.reconstruction.dtype == jnp.float32
    for x, y in ((rough.cls, exact.cls), (rough.reconstruction, exact.reconstruction)):
        assert np.linalg.norm(x - y) < 0.05 * np.linalg.norm(y)


def test_segment_gives_logits_of_every_decoder_level(case):
    name, model, _, volume, _ = case
    model = model.clone(out_channels=3, deep_supervision=True, mask_tokens=False)
    weights = random_weights(jax.eval_shape(lambda: model.init(jax.random.key(0), volume, method="segment")))
    logits = jax.jit(lambda weights: model.apply(weights, volume, method="segment"))(weights)
    sides = {"nnformer": (16, 8), "resenc": (16, 8), "primus": (16, 8, 4)}[name]
    assert [(x.shape, x.dtype) for x in logits] == [((1, side, side, side, 3), jnp.float32) for side in sides]
    plain = model.clone(deep_supervision=False)
    (alone,) = jax.jit(lambda weights: plain.apply(weights, volume, method="segment"))(weights)
    np.testing.assert_array_equal(alone, logits[0])


@pytest.mark.parametrize(
    ("model", "crop", "message"),
    [
        (SMALL["resenc"], (1, 16, 18, 16, 1), r"multiple of \(4, 4, 4\)"),
        (SMALL["primus"], (1, 16, 20, 16, 1), r"multiple of \(8, 8, 8\)"),
        (ResEnc((4, 8), (1,)), CROP, "one per stage"),
        (Primus(20, 1, 2), CROP, "multiple of 6"),
        (SMALL["primus"].clone(remat=(1,)), CROP, "remat"),
    ],
)
def test_sizes_that_cannot_work_are_refused(model, crop, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(crop))


def tiny_config(name):
    config = runpy.run_path("tests/configs/small.py")["get_config"]().unlock()
    config.model.backbone = name
    config.model.resenc.update(features=(4, 6, 8), blocks=(1, 1, 1))
    config.model.primus.update(width=24, depth=2, heads=2)
    return config


@pytest.fixture(scope="module", params=["resenc", "primus"])  # nnFormer's run is test_export's and test_train's
def trained(request, tmp_path_factory):
    """(name, config, losses, state, workdir) of three steps of pretraining on one batch."""
    config = tiny_config(request.param)
    config.optimizer.lr, config.optimizer.warmup = 1e-2, "0 steps"
    crop, grid = tasks.pretrain.check(config)
    rng = np.random.default_rng(0)
    hidden = np.zeros((2, 2, *grid), bool)
    hidden.reshape(4, -1)[:, : int(0.75 * np.prod(grid))] = True
    batch = {"volumes": rng.random((2, 2, *crop, 1), np.float32), "hidden": hidden, "weights": np.ones(2, np.float32)}
    goal = tasks.pretrain.objective(config, steps_per_epoch=1)
    state = jax.jit(lambda: train_state.create(goal, 0, batch))()
    step, losses = jax.jit(train_state.make_train_step(goal, jax.random.key(0))), []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(jax.device_get(metrics))
    workdir, agreed = (
        str(tmp_path_factory.mktemp(request.param)),
        Contract(FRAME, (2.0, 2.0, 2.0), (-125.0, 225.0), crop),
    )
    checkpoint.write_config(workdir, config.to_dict())
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(3, state, {"contract": agreed.to_json()})
    return request.param, config, losses, jax.device_get(state), workdir


def test_alice_learns_with_it(trained):
    _, _, losses, state, _ = trained
    assert all(np.isfinite(value) for metrics in losses for value in metrics.values())
    assert losses[-1]["loss_reconstruction"] < losses[0]["loss_reconstruction"]
    student, teacher = state.params["backbone"], state.extra["teacher"]["backbone"]
    assert jax.tree.structure(student) == jax.tree.structure(teacher)
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(student), jax.tree.leaves(teacher), strict=True))


def test_export_round_trip(trained, tmp_path):
    pytest.importorskip("torch")
    name, config, _, state, workdir = trained
    out = tmp_path / "backbone.pth"
    assert export.main(["--workdir", workdir, "--out", str(out)]) == 0
    about = json.loads((tmp_path / "backbone.pth.json").read_text())
    assert about["model"] == json.loads(json.dumps({"backbone": name} | config.model[name].to_dict()))
    trained_values = state.extra["teacher"]["backbone"]
    tensors = torch_file.load(str(out))
    if name == "resenc":
        trained_values = {part: tree for part, tree in trained_values.items() if part != "mask_token"}
    returned = resenc.from_torch(tensors) if name == "resenc" else primus.from_torch(tensors, mask_token=True)
    jax.tree.map(np.testing.assert_array_equal, returned, trained_values)


def test_cells_of_runs_and_of_exported_files(trained, tmp_path):
    name, config, _, state, workdir = trained
    store = noise_store(str(tmp_path / "store"), scans=1, shape_zyx=(16, 16, 16))
    network = tasks.backbones.make(config.model, mask_tokens=False)
    assert backbone.load(workdir, "student").network == network
    cells = backbone.load(workdir, "student").cell_vectors(store, "case0")
    assert cells.vectors.shape[1] == network.decoder_channels and np.isfinite(cells.vectors).all()
    pytest.importorskip("torch")
    out = str(tmp_path / "backbone.pth")
    assert export.main(["--workdir", workdir, "--out", out, "--which", "student"]) == 0
    exported = backbone.load(out)
    assert exported.network == network
    jax.tree.map(np.testing.assert_array_equal, exported.params["decoder_0" if name == "resenc" else "up_0"],
                 state.params["backbone"]["decoder_0" if name == "resenc" else "up_0"])  # fmt: skip
    sidecar = tmp_path / "backbone.pth.json"
    about = json.loads(sidecar.read_text())
    for model in ("resenc", {"backbone": "unet"}):
        sidecar.write_text(json.dumps(about | {"model": model}))
        with pytest.raises(UserError, match=r"backbone\.pth\.json, which says how to use it, cannot be read"):
            backbone.load(out)


def test_cells_of_a_segmentation_run_whose_decoder_depends_on_the_classes(tmp_path):
    config = segment.get_config("tiny")
    config.model.update(backbone="primus", primus={"width": 24, "depth": 1, "heads": 2, "drop_path": 0.0})
    network = tasks.segment.network_of(config, 14)
    weights = random_weights(jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros(CROP), method="segment")))
    agreed = Contract(FRAME, (2.0, 2.0, 2.0), (-125.0, 225.0), CROP[1:4], tuple(f"class {i}" for i in range(14)))
    workdir = str(tmp_path / "run")
    checkpoint.write_config(workdir, config.to_dict())
    with checkpoint.Checkpoints(workdir) as checkpoints:
        state = train_state.TrainState(jnp.array(1), {"backbone": weights["params"]}, {}, opt_state={})
        checkpoints.save(1, state, {"contract": agreed.to_json()})
    store = noise_store(str(tmp_path / "store"), scans=1, shape_zyx=(16, 16, 16))
    assert backbone.load(workdir).cell_vectors(store, "case0").vectors.shape == (64, network.decoder_channels)


def test_mask_cells_are_the_encoders_tokens():
    assert {name: tasks.pretrain.check(tiny_config(name))[1][0] for name in SMALL} == CELLS


@pytest.mark.parametrize("name", SMALL)
def test_release_mode_wires_all(name):
    config = tiny_config(name)
    config.method.mode = "release"
    crop, grid = tasks.pretrain.check(config)
    alice = tasks.pretrain.networks(config)
    batch = {"volumes": jnp.zeros((2, 2, *crop, 1)), "hidden": jnp.zeros((2, 2, *grid), bool)}
    params, extra = jax.eval_shape(alice.init, jax.random.key(0), batch)
    run = jax.eval_shape(lambda *trees: alice.forward(*trees, batch, jax.random.key(0), True), params, extra)
    assert run.reconstruction.shape == (4, *crop, 1) and "mask_token" not in params["backbone"]


def test_runs_of_older_versions_are_nnformers(tmp_path):
    model = tiny_config("nnformer").model.to_dict()
    older = {field: value for field, value in model.items() if field not in ("backbone", "resenc", "primus", "remat")}
    assert tasks.backbones.make(older) == tasks.backbones.make(model)
    assert isinstance(tasks.backbones.make(older), NNFormer)
    checkpoint.write_config(str(tmp_path), tiny_config("nnformer").to_dict() | {"model": older})
    settings.claim(str(tmp_path), tiny_config("nnformer"))
    with pytest.raises(UserError, match=r"model\.backbone nnformer there and resenc here"):
        settings.claim(str(tmp_path), tiny_config("resenc"))


def test_an_unknown_backbone_is_one_clear_line():
    with pytest.raises(UserError, match=r"model\.backbone 'unet': choose one of nnformer, resenc, primus"):
        tasks.backbones.make({"backbone": "unet"})
