"""The pretraining objective on a network of two stages: what each mode wires, and what must never leak."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alice_jax import sharding, train_state
from alice_jax.data import masks
from alice_jax.models.casa import CASA
from alice_jax.models.heads import Head
from alice_jax.models.nnformer import NNFormer
from alice_jax.objectives import alice

CROP, GRID, RATIO = (16, 16, 16), (4, 4, 4), 0.75
KEY = jax.random.key(0)


def networks(mode="paper", **weights):
    release = mode == "release"
    return alice.Alice(
        mode=alice.MODES[mode],
        backbone=NNFormer(
            width=8,
            depths=(1, 1),
            heads=(1, 2),
            windows=(2, 2),
            position_index="release" if release else "correct",
            mask_tokens=not release,
        ),
        head=Head(width=16, hidden=24, bottleneck=8, prototypes=16, token_prototypes=16),
        casa=CASA(
            width=16 if release else 8,
            inner=16,
            heads=2,
            head_dim=4,
            dropout=0.1 if release else 0.0,
            query_residual=release,
        ),
        weights=alice.Weights(**weights),
        mask_ratio=RATIO,
    )


def objective(nets, held_steps=0):
    return alice.make(
        nets,
        learning_rate=lambda step: 1e-3,
        weight_decay=lambda step: 0.1,
        momentum=lambda step: 0.9,
        temperature_cls=lambda step: 0.05,
        temperature_tokens=lambda step: 0.05,
        clip=3.0,
        held_steps=held_steps,
    )


def make_batch(size, seed=0):
    rng = np.random.default_rng(seed)
    hidden = [[masks.random_blocks(rng, GRID, RATIO) for _ in range(2)] for _ in range(size)]
    volumes = rng.random((size, 2, *CROP, 1), np.float32)
    return {"volumes": volumes, "hidden": np.array(hidden), "weights": np.ones(size, np.float32)}


@functools.cache
def started(mode="paper"):
    """Networks of a mode with their first parameters and extra state, made once."""
    nets = networks(mode)
    return nets, *jax.jit(nets.init)(KEY, make_batch(1))


def forward(nets, params, extra, batch, key=KEY, train=False):
    return jax.jit(nets.forward, static_argnums=4)(params, extra, batch, key, train)


def train_step(goal):
    return jax.jit(train_state.make_train_step(goal, KEY))


def first_state(goal):
    return jax.jit(lambda: train_state.create(goal, 0, make_batch(1)))()


@pytest.fixture(scope="module", params=["paper", "release"])
def trained(request):
    """(networks, objective, a state with distinct teacher and student) in either mode."""
    nets = networks(request.param)
    goal = objective(nets)
    state, step = first_state(goal), train_step(goal)
    for seed in range(2):
        state, metrics = step(state, make_batch(2, seed))
    return nets, goal, state, metrics


def test_all_losses_are_finite_and_entropies_lie_between_their_extremes(trained):
    _, _, _, metrics = trained
    assert all(np.isfinite(float(value)) for value in metrics.values())
    for name in ("teacher_entropy", "teacher_entropy_tokens"):
        assert 0 < metrics[name] < np.log(16)


def test_teacher_gets_no_gradient_and_follows_the_updated_student():
    nets, params, extra = started()
    far = jax.tree.map(lambda x: x + 1.0, extra["teacher"])
    moved = nets.update(params, extra | {"teacher": far}, {}, momentum=0.9)
    gap = jax.tree.map(lambda t, s: float(jnp.abs(t - s - 0.9).max()), moved["teacher"], params)
    assert max(jax.tree.leaves(gap)) < 1e-5

    def loss(teacher):
        state = extra | {"teacher": teacher}
        return objective(nets).loss(params, state, make_batch(1), KEY, jnp.int32(0), True)[0]

    gradient = jax.jit(jax.grad(loss))(extra["teacher"])
    assert all(not np.any(g) for g in jax.tree.leaves(gradient))


def test_release_teacher_has_one_last_layer_that_starts_as_the_token_layer():
    _, params, extra = started("release")
    teacher = extra["teacher"]
    assert set(teacher) == {"backbone", "head"} and "last_tokens" not in teacher["head"]
    np.testing.assert_array_equal(teacher["head"]["last"]["direction"], params["head"]["last_tokens"]["direction"])
    assert np.any(extra["position"]["student"] != extra["position"]["teacher"])


def test_paper_teacher_is_the_twin_of_everything_that_is_trained():
    _, params, extra = started()
    assert jax.tree.structure(params) == jax.tree.structure(extra["teacher"])
    assert "position" not in extra


def test_hidden_voxels_change_nothing_that_the_student_computes():
    nets, params, extra = started()
    batch = make_batch(2)
    cells = batch["hidden"].repeat(4, 2).repeat(4, 3).repeat(4, 4)[..., None]
    other = batch | {"volumes": np.where(cells, np.float32(0.123), batch["volumes"])}
    first, second = (forward(nets, params, extra, b) for b in (batch, other))
    np.testing.assert_array_equal(first.student_cls, second.student_cls)
    np.testing.assert_array_equal(first.reconstruction, second.reconstruction)
    np.testing.assert_array_equal(first.aligned, second.aligned)
    assert np.abs(first.teacher_cls - second.teacher_cls).max() > 1e-6


def test_visible_tokens_keep_their_order():
    tokens = jnp.arange(8.0).reshape(1, 8, 1)
    hidden = jnp.array([True, False, True, True, True, False, True, True]).reshape(1, 2, 2, 2)
    np.testing.assert_array_equal(alice.visible_tokens(tokens, hidden, RATIO)[0, :, 0], [1.0, 5.0])


def test_paper_teacher_is_deterministic_and_release_teacher_is_not():
    for mode, same in (("paper", True), ("release", False)):
        nets, params, extra = started(mode)
        outputs = [forward(nets, params, extra, make_batch(4), jax.random.key(k), train=True) for k in (1, 2)]
        assert np.array_equal(outputs[0].teacher_cls, outputs[1].teacher_cls) == same
        assert not np.array_equal(outputs[0].student_cls, outputs[1].student_cls)  # drop path is on, always


def test_release_hides_the_same_cells_in_all_samples():
    nets, params, extra = started("release")
    batch = make_batch(2)
    same = batch | {"hidden": np.broadcast_to(batch["hidden"][:1], batch["hidden"].shape)}
    outputs = [forward(nets, params, extra, b).student_cls for b in (batch, same)]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize(
    ("weights", "computed"),
    [
        ({"alignment": 0.0, "reconstruction": 0.0}, {"student_cls", "teacher_cls"}),
        ({"invariance": 0.0, "reconstruction": 0.0}, {"aligned", "aligned_target"}),
        ({"invariance": 0.0, "alignment": 0.0}, {"reconstruction"}),
    ],
)
def test_a_zero_weight_saves_its_work(weights, computed):
    _, params, extra = started()

    def flops_and_outputs(nets):
        step = jax.jit(lambda p: nets.forward(p, extra, make_batch(1), KEY, True))
        return step.lower(params).cost_analysis()["flops"], jax.eval_shape(step, params)

    (less, outputs), (full, _) = flops_and_outputs(networks(**weights)), flops_and_outputs(networks())
    assert less < full
    present = {field.name for field in dataclasses.fields(outputs) if getattr(outputs, field.name) is not None}
    assert present == computed
    goal = objective(networks(**weights))
    _, metrics = jax.eval_shape(train_step(goal), jax.eval_shape(lambda: first_state(goal)), make_batch(1))
    assert {name for name in metrics if name.startswith("loss_")} == {
        f"loss_{name}" for name in ("invariance", "alignment", "reconstruction") if weights.get(name, 1.0)
    }


def test_last_layers_are_held_and_gains_never_move():
    goal = objective(networks(), held_steps=1)
    start, step = first_state(goal), train_step(goal)
    first, _ = step(start, make_batch(2))
    second, _ = step(first, make_batch(2))
    for name in ("last", "last_tokens"):
        before, held, moved = (s.params["head"][name] for s in (start, first, second))
        np.testing.assert_array_equal(held["direction"], before["direction"])
        assert np.any(moved["direction"] != before["direction"])
        np.testing.assert_array_equal(moved["gain"], 1.0)


def test_clipping_is_global_in_paper_mode_and_by_tensor_without_casa_in_release_mode():
    gradients = {"backbone": {"a": jnp.full(4, 3.0)}, "head": {"b": jnp.full(4, 0.5)}, "casa": {"c": jnp.full(4, 4.0)}}
    clipped = {}
    for mode in ("paper", "release"):
        clip = alice.clipping(networks(mode), 2.0)
        clipped[mode], _ = clip.update(gradients, clip.init(gradients))
    assert float(optax.global_norm(clipped["paper"])) == pytest.approx(2.0, rel=1e-5)
    norms = {name: float(optax.global_norm(clipped["release"][name])) for name in gradients}
    assert norms == pytest.approx({"backbone": 2.0, "head": 1.0, "casa": 8.0}, rel=1e-5)


@pytest.mark.parametrize("mode", ["paper", "release"])
def test_a_pair_of_weight_zero_only_makes_the_batch_larger(mode):
    """The mean is over pairs, not over weights, so that parts of a batch and devices can be averaged."""
    nets, params, extra = started(mode)
    batch = make_batch(2)

    def losses_of(batch):
        outputs = nets.forward(params, extra, batch, KEY, False)
        return nets.losses(outputs, extra, batch, 0.05, 0.05)

    both, (stats, _) = jax.jit(losses_of)(batch)
    halved, _ = jax.jit(losses_of)(batch | {"weights": np.full(2, 0.5, np.float32)})
    first, (weighted_stats, _) = jax.jit(losses_of)(batch | {"weights": np.array([1, 0], np.float32)})
    second, _ = jax.jit(losses_of)(batch | {"weights": np.array([0, 1], np.float32)})
    alone, _ = jax.jit(losses_of)({name: value[:1] for name, value in batch.items()})
    assert float(first) == pytest.approx(float(alone) / 2, rel=1e-5)
    assert float(first + second) == pytest.approx(float(both), rel=1e-5)
    assert float(halved) == pytest.approx(float(both) / 2, rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, weighted_stats, stats)  # centers are those of all pairs alike


@pytest.mark.parametrize("mode", ["paper", "release"])
def test_eight_devices_in_two_parts_compute_what_one_device_computes(mode):
    # Without noise, which micro-batches draw anew, and with one mask for all, which release mode shares in a batch.
    nets = networks(mode)
    nets = dataclasses.replace(nets, backbone=nets.backbone.clone(drop_path=0.0), casa=nets.casa.clone(dropout=0.0))
    goal = objective(nets)
    batch = make_batch(16)
    batch["weights"] = np.linspace(0, 1, 16, dtype=np.float32)
    batch["hidden"] = np.ascontiguousarray(np.broadcast_to(batch["hidden"][:1], batch["hidden"].shape))
    state = first_state(goal)
    expected_state, expected = train_step(goal)(state, batch)
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    step = sharding.compiled_step(goal, KEY, mesh, parts=2)
    new_state, metrics = step(
        jax.device_put(state, sharding.replicated(mesh)), sharding.global_parts(mesh, batch, parts=2)
    )
    for name in ("loss", "gradient_norm", "loss_alignment", "teacher_entropy"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-4), name
    for name in ("center_cls", "center_tokens"):
        np.testing.assert_allclose(new_state.extra[name], expected_state.extra[name], atol=1e-5)
