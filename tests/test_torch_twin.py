"""The PyTorch twin of release mode takes the step that we take, so that the speed of both may be compared."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from golden_checks.train_steps import named, strict
from random_weights import random_weights

from alice_jax import train_state
from alice_jax.models.casa import CASA
from alice_jax.models.heads import Head
from alice_jax.models.nnformer import NNFormer, drop_rates
from alice_jax.objectives import alice

torch = pytest.importorskip("torch")

PAIRS, CROP, CELLS = 2, 32, 4
BACKBONE = {"width": 12, "depths": (2, 1, 1), "heads": (3, 6, 12), "windows": (4, 4, 4), "drop_path": 0.0}
HIDDEN, BOTTLENECK, PROTOTYPES, INNER = 64, 16, 32, 64
RATE, DECAY, CLIP, MOMENTUM, TEMPERATURE = 1e-3, 0.1, 0.1, 0.9, 0.05
LOSSES, GRADIENTS, PARAMETERS, CENTERS = 1e-4, 3e-3, 3e-5, 2e-5  # the limits of the release's own steps


def our_networks():
    """Release mode without noise: three stages, the first of them with shifted windows."""
    return alice.Alice(
        mode=alice.MODES["release"],
        backbone=NNFormer(**BACKBONE, position_index="release", mask_tokens=False),
        head=Head(48, HIDDEN, BOTTLENECK, PROTOTYPES, PROTOTYPES),
        casa=CASA(PROTOTYPES, INNER, heads=8, head_dim=4, dropout=0.0, query_residual=True),
        weights=alice.Weights(),
        mask_ratio=0.75,
    )


def our_step(nets, params, extra, batch):
    """(state, metrics) after one step."""
    goal = alice.make(
        nets,
        learning_rate=lambda step: RATE,
        weight_decay=lambda step: DECAY,
        momentum=lambda step: MOMENTUM,
        temperature_cls=lambda step: TEMPERATURE,
        temperature_tokens=lambda step: TEMPERATURE,
        clip=CLIP,
        held_steps=0,
    )

    @jax.jit
    def step(params, extra):
        state = train_state.TrainState(jnp.int32(0), params, extra, goal.optimizer.init(params))
        return train_state.make_train_step(goal, jax.random.key(0))(state, batch)

    return step(params, extra)


def adam_means(state):
    """The first moments of all groups of parameters as one tree; zeros for those that are never trained."""
    tree = {path: np.zeros_like(x) for path, x in traverse_util.flatten_dict(state.params).items()}
    for path, value in jax.tree_util.tree_leaves_with_path(state.opt_state):
        parts = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        if "mu" in parts:
            tree[tuple(parts[parts.index("mu") + 1 :])] = np.asarray(value)
    return traverse_util.unflatten_dict(tree)


def tensors(arrays):
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def filled_twin(params, extra):
    """The twin with our values in every tensor that an output depends on."""
    from torch_twin import Twin

    sizes = {"head_hidden": HIDDEN, "bottleneck": BOTTLENECK, "prototypes": PROTOTYPES, "casa_inner": INNER}
    twin = Twin(crop=CROP, **BACKBONE, **sizes, dropout=0.0)
    twin.student.load_state_dict(tensors(strict(params, "release")))
    twin.teacher.load_state_dict(tensors(strict(extra["teacher"], "release")))
    casa = {name: value for name, value in named(params, "student").items() if name.startswith("casa/")}
    twin.casa.load_state_dict(tensors({name.removeprefix("casa/Cross_Att."): x for name, x in casa.items()}))
    buffers = {name: extra[name] for name in ("center_cls", "center_tokens")}
    buffers |= {f"{name}_position": table for name, table in extra["position"].items()}
    twin.load_state_dict(tensors(buffers), strict=False)
    return twin


def by_name(twin):
    """{name as `named` gives it: parameter}."""
    parts = {"student/": twin.student, "teacher/": twin.teacher, "casa/Cross_Att.": twin.casa}
    return {f"{prefix}{name}": value for prefix, part in parts.items() for name, value in part.named_parameters()}


@pytest.fixture(scope="module")
def both():
    """Both programs after one step from the same random state on the same batch."""
    from torch_step import TrainStep, losses

    rng = np.random.default_rng(0)
    batch = {
        "volumes": rng.random((PAIRS, 2, CROP, CROP, CROP, 1), np.float32),
        "hidden": rng.random((PAIRS, 2, CELLS, CELLS, CELLS)) < 0.5,  # each pair its own, to see whose is used
        "weights": np.ones(PAIRS, np.float32),
    }
    nets = our_networks()
    params, extra = random_weights(jax.eval_shape(nets.init, jax.random.key(0), batch))
    state, metrics = our_step(nets, params, extra, batch)

    twin = filled_twin(params, extra)
    step = TrainStep(twin, lr=RATE, weight_decay=DECAY, clip=CLIP, momentum=MOMENTUM, temperature=TEMPERATURE)
    volumes, hidden = torch.from_numpy(batch["volumes"]).movedim(-1, 2), torch.from_numpy(batch["hidden"])
    with torch.no_grad():
        parts = losses(twin(volumes, hidden), volumes, twin.center_cls, twin.center_tokens, TEMPERATURE)
    loss = step(volumes, hidden)
    return SimpleNamespace(state=state, metrics=metrics, twin=twin, step=step, parts=parts, loss=loss)


def test_the_losses_agree_and_the_centers_that_they_leave(both):
    assert float(both.loss) == pytest.approx(float(both.metrics["loss"]), rel=LOSSES)
    assert set(both.parts) == {"invariance", "alignment", "reconstruction"}
    for name, value in both.parts.items():
        assert float(value) == pytest.approx(float(both.metrics[f"loss_{name}"]), rel=LOSSES), name
    for name in ("center_cls", "center_tokens"):
        np.testing.assert_allclose(getattr(both.twin, name), both.state.extra[name], atol=CENTERS, rtol=0)


def test_the_gradients_agree_after_clipping(both):
    """A first moment is a tenth of the gradient that the optimizer has seen."""
    theirs, norms = by_name(both.twin), {}
    for name, mean in named(adam_means(both.state), "student").items():
        if name.endswith("weight_g"):
            assert theirs[name] not in both.step.optimizer.state
            continue
        seen = both.step.optimizer.state[theirs[name]]["exp_avg"].numpy()
        np.testing.assert_allclose(seen, mean, atol=GRADIENTS * np.abs(mean).max(), rtol=0, err_msg=name)
        norms[name] = 10 * np.linalg.norm(seen)
    student = np.array([norm for name, norm in norms.items() if name.startswith("student/")])
    at_limit = np.isclose(student, CLIP, rtol=1e-3)
    assert at_limit.any() and (student[~at_limit] < CLIP).sum() > 10
    assert max(norm for name, norm in norms.items() if name.startswith("casa/")) > 2 * CLIP


def test_the_updated_student_casa_and_teacher_agree(both):
    theirs, means = by_name(both.twin), named(adam_means(both.state), "student")
    ours = named(both.state.params, "student") | named(both.state.extra["teacher"], "teacher")
    for name, value in ours.items():
        # Adam's first step is the gradient's sign: where that is rounding, so is the step.
        mean = means[name.replace("teacher/", "student/")]
        firm = (np.abs(mean) > 1e-7) | name.endswith("weight_g")
        np.testing.assert_allclose(theirs[name].detach()[firm], value[firm], atol=PARAMETERS, rtol=0, err_msg=name)


def test_the_twin_starts_as_we_do_and_is_as_noisy():
    from torch_nnformer import DropPath
    from torch_twin import Twin

    twin = Twin(crop=CROP, **BACKBONE | {"drop_path": 0.3})
    student, teacher = twin.student.state_dict(), twin.teacher.state_dict()
    different = {name for name in student if not torch.equal(student[name], teacher[name])}
    assert different == {"head.last_layer.weight_v"}
    assert torch.equal(teacher["head.last_layer.weight_v"], student["head.last_layer2.weight_v"])

    for network in (twin.student, twin.teacher):
        rates = [module.rate for module in network.backbone.modules() if isinstance(module, DropPath)]
        encoder, decoder = drop_rates(0.3, (2, 1, 1)), drop_rates(0.3, (1, 2))[::-1]
        assert rates == pytest.approx([rate for stage in encoder + decoder for rate in stage])
    assert {module.p for module in twin.casa.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    kept = DropPath(0.25)(torch.ones(64, 3, 5))
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(kept[:, 0, 0], kept[:, 2, 4]), "whole samples"
