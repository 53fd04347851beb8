"""State divided over devices: the same numbers, each array where it belongs, and no more talk than that takes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train_state import no_compilation

from alice_jax import checkpoint, layout, losses, sharding
from alice_jax.ahead.collectives import found as collectives
from alice_jax.errors import UserError
from alice_jax.models.layers import gelu, layer_norm
from alice_jax.objectives import Objective

KEY = jax.random.key(0)
BATCH = {"x": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)}
RULES = (("scale$|bias$", ()), ("", 64))
KERNELS = {8 * 32 * 4, 32 * 16 * 4}  # bytes of what is divided
# devices, of which divide the parameters, parts of the batch
WHOLE, DATA, FSDP, MIXED, ACCUMULATED = (1, 1, 1), (8, 1, 1), (8, 8, 1), (8, 4, 1), (8, 4, 2)
DIVIDED = pytest.mark.parametrize("how", [FSDP, MIXED, ACCUMULATED], ids=["fsdp", "mixed", "accumulated"])
ALL = pytest.mark.parametrize(
    "how", [DATA, FSDP, MIXED, ACCUMULATED], ids=["data parallel", "fsdp", "mixed", "accumulated"]
)


def objective():
    """Two layers that follow their own moving average, with a center, as Alice does."""

    def init(key, batch):
        shapes = {"body": {"kernel": (8, 32), "bias": (32,), "scale": (32,)}, "last": {"kernel": (32, 16)}}
        leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
        keys = jax.random.split(key, len(leaves))
        params = tree.unflatten([jax.random.normal(k, shape) for k, shape in zip(keys, leaves, strict=True)])
        return params, {"teacher": jax.tree.map(jnp.copy, params), "center": jnp.zeros(16)}

    def logits(params, x):
        body = params["body"]
        return (
            gelu(layer_norm(x @ body["kernel"], body["scale"], body["bias"], 1e-5, x.dtype)) @ params["last"]["kernel"]
        )

    def loss(params, extra, batch, key, step, train):
        taught = jax.lax.stop_gradient(logits(extra["teacher"], batch["x"]))
        target = losses.teacher_distribution(taught, extra["center"], 1.0)
        value = losses.cross_entropy(target, logits(params, -batch["x"]))
        return value, ({"center": taught.mean(0)}, {"entropy": losses.entropy(target)})

    def update(params, extra, stats, step):
        teacher = jax.tree.map(lambda t, s: 0.9 * t + 0.1 * s, extra["teacher"], params)
        return {"teacher": teacher, "center": losses.moved_center(extra["center"], stats["center"])}

    return Objective(init, loss, update, optax.chain(optax.clip_by_global_norm(3.0), optax.adamw(1e-3)), {})


def made(how):
    """Mesh, first state, batch and step."""
    devices, parameters, parts = how
    mesh = sharding.make_mesh(jax.devices()[:devices], parameters)
    state = sharding.compiled_init(objective(), 0, mesh, RULES)({"x": BATCH["x"][:1]})
    step = sharding.compiled_step(objective(), KEY, mesh, parts, RULES)
    return mesh, state, sharding.global_parts(mesh, BATCH, parts), step


@functools.cache
def advanced(how):
    """The states before and after the first update, its metrics, and the collectives of its program."""
    _, state, batch, step = made(how)
    text = jax.jit(step).lower(state, batch).compile().as_text()
    before = jax.device_get(state)
    after, metrics = step(state, batch)
    return before, after, metrics, collectives(text)


@ALL
def test_losses_and_gradients_are_those_of_one_device(how):
    (start, one, metrics, _), (other_start, many, other_metrics, _) = advanced(WHOLE), advanced(how)
    jax.tree.map(np.testing.assert_array_equal, start, other_start)  # the same random parameters
    # The first moment is a tenth of the gradient; Adam's updates would magnify rounding.
    gradients, expected = (optax.tree_utils.tree_get(state.opt_state, "mu") for state in (many, one))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), gradients, expected)
    np.testing.assert_allclose(many.extra["center"], one.extra["center"], rtol=1e-5, atol=1e-6)
    for name, value in metrics.items():
        assert float(other_metrics[name]) == pytest.approx(float(value), rel=1e-5), name


@DIVIDED
def test_teacher_and_moments_lie_where_their_parameters_do(how):
    _, state, _, _ = advanced(how)
    specs = {"body": {"kernel": (None, "parameters"), "bias": (), "scale": ()}, "last": {"kernel": ("parameters",)}}
    moments = [optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu")]
    for tree in (state.params, state.extra["teacher"], *moments):
        assert jax.tree.map(lambda x: tuple(x.sharding.spec), tree) == specs
    assert state.params["last"]["kernel"].addressable_shards[0].data.shape == (32 // how[1], 16)
    assert state.extra["center"].sharding.is_fully_replicated


def test_devices_that_hold_everything_only_sum():
    assert {kind for kind, _, _ in advanced(DATA)[3]} == {"all-reduce"}
    assert advanced(WHOLE)[3] == []


@DIVIDED
def test_what_is_divided_is_gathered_once_for_student_and_teacher_and_summed(how):
    found = advanced(how)[3]
    # A CPU's compiler writes a reduce-scatter as a sum, of which each device keeps its share.
    assert {kind for kind, _, _ in found} == {"all-gather", "all-reduce"}
    gathers = {size: count for kind, size, count in found if kind == "all-gather"}
    assert gathers == dict.fromkeys(KERNELS, 2)  # parts compiled as one program share them


@ALL
def test_the_second_step_compiles_nothing(how):
    _, state, batch, step = made(how)
    state, _ = step(state, batch)
    with jax.transfer_guard("disallow"), no_compilation():
        step(state, batch)


def test_whatever_validation_computes_sees_whole_parameters():
    mesh, state, batch, _ = made(FSDP)
    seen = []

    def seeing(params, extra, batch):
        jax.debug.inspect_array_sharding(params["last"]["kernel"], callback=seen.append)
        return {}

    watching = dataclasses.replace(objective(), features=seeing, predict=seeing)
    sharding.compiled_eval(watching, KEY, mesh, RULES).lower(state, batch[0]).compile()
    assert [place.is_fully_replicated for place in seen] == [True, True]
    assert not state.params["last"]["kernel"].sharding.is_fully_replicated


def test_a_checkpoint_goes_on_upon_any_mesh(tmp_path):
    _, state, _, _ = advanced(MIXED)
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, state)
    for devices, parameters, _ in (FSDP, DATA, WHOLE, (4, 2, 1)):
        mesh = sharding.make_mesh(jax.devices()[:devices], parameters)
        like = sharding.described(jax.eval_shape(lambda: state), mesh, RULES)
        with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
            restored, _ = checkpoints.restore(1, like)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)


SHAPES = {"kernel": jax.ShapeDtypeStruct((6, 16), jnp.float32), "bias": jax.ShapeDtypeStruct((16,), jnp.float32)}


def specs(rules, parameters=4):
    mesh = sharding.make_mesh(parameters=parameters)
    return {name: tuple(place.spec) for name, place in layout.shardings(SHAPES, SHAPES, mesh, rules).items()}


def test_rules_by_hand():
    assert specs([("", 32)]) == {"kernel": (None, "parameters"), "bias": ()}  # 96 values and 16
    assert specs([("", 32)], parameters=2) == {"kernel": (None, "parameters"), "bias": ()}
    assert specs([("", 1)], parameters=1) == {"kernel": (), "bias": ()}
    assert specs([["bias", ["parameters"]], ["", []]]) == {"kernel": (), "bias": ("parameters",)}  # as JSON has them
    assert specs([("", 1)], parameters=8)["kernel"] == (None, "parameters")  # 6 is no multiple of 8


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("", 1), ("bias", ())], r"mesh\.rules 'bias': is no parameter's first match"),
        ([("bias", ())], r"mesh\.rules: no rule covers the parameter kernel; the last rule may be"),
        ([("(", 1)], r"mesh\.rules: missing \)"),
        ([("", ("model",))], r"mesh\.rules '', \('model',\): give a number, or for each axis None, 'data' or 'param"),
        ([("", "parameters")], r"mesh\.rules '', 'parameters': give a number"),
        ([("", ("parameters", "parameters"))], "none twice"),
        ([("", (None, "parameters"))], r"has more axes than bias of shape \(16,\)"),
        ([("kernel", ("parameters",)), ("", 1)], r"6 of kernel, shape \(6, 16\), is no multiple of 4 devices"),
    ],
)
def test_impossible_rules_are_refused_in_one_line(rules, message):
    with pytest.raises(UserError, match=message) as error:
        specs(rules)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("parameters", [0, 3, 16])
def test_a_mesh_that_does_not_divide_the_devices_is_refused(parameters):
    with pytest.raises(UserError, match=rf"mesh\.parameters {parameters}: must divide the number of devices, 8"):
        sharding.make_mesh(parameters=parameters)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0


def chips(shape, slices=1):
    """Chips of four to a host, 2 × 2, and hosts and chips numbered along rows, as in v6e:4x4."""
    rows, columns = shape
    places = [(k, x, y) for k in range(slices) for y in range(rows) for x in range(columns)]
    return [
        Chip(i, k * rows * columns // 4 + y // 2 * (columns // 2) + x // 2, k, (x, y, 0))
        for i, (k, x, y) in enumerate(places)
    ]


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("parameters", [1, 2, 4, 8, 16])
def test_devices_lie_in_the_order_of_their_processes(parameters, slices):
    """So that process i computes the i-th share of the rows, as `pipeline.Samples` has it.

    `jax.make_mesh` mixes processes in one slice, and refuses two slices and groups of 2 or 8.
    """
    mesh = sharding.make_mesh(chips((4, 4), slices)[::-1], parameters)
    assert mesh.shape == {"data": 16 * slices // parameters, "parameters": parameters}
    assert [chip.process_index for chip in mesh.devices.flat] == [i for i in range(4 * slices) for _ in range(4)]
    assert [chip.id for chip in mesh.devices.flat][:8] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_what_processes_know_of_their_rows_is_gathered_at_once(monkeypatch):
    gathered = []

    def twice(rows, tiled):  # as if another process held the same
        gathered.append(rows)
        return np.concatenate([rows, rows])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding.multihost_utils, "process_allgather", twice)
    weak, points = np.array([True, False, True]), np.arange(18, dtype=np.int32).reshape(3, 2, 3)
    local = {"score": np.float64([0.1, np.nan, 3]), "weak": weak, "points": points}
    found = sharding.of_all_processes(local)
    assert len(gathered) == 1 and list(found) == list(local)
    for name, values in local.items():
        np.testing.assert_array_equal(found[name], np.concatenate([values, values]), strict=True)
