"""The embedder's network, names, views and objective."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import make_scan
from test_matching import add_scan, make_store

from alice_jax import tasks, train_state
from alice_jax.data import embeddings, matching
from alice_jax.data.embedder_views import Distortion, EmbedderSampler, block_mean, draw_view, network_input
from alice_jax.data.store import Scan, Store
from alice_jax.errors import UserError
from alice_jax.interop import embedder as interop
from alice_jax.models.embedder import Embedder, receptive_radius_zyx, strides_zyx, upsample_nearest
from alice_jax.objectives import embedder as objective
from configs import embedder as config_file

SMALL = dict(channels=(4, 6, 8, 12), features=8, blocks=(1, 1, 1, 1), stem_kernel_zyx=(3, 3, 3))


@pytest.fixture(scope="module")
def small():
    model = Embedder(**SMALL)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 32, 32, 1)))


@pytest.fixture(scope="module")
def narrow():
    """The published layers with few channels, as numpy arrays."""
    model = Embedder(channels=(2, 3, 4, 5), features=6)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 32, 32, 1)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


# ---------------------------------------------------------------- network


def test_published_size():
    shapes = jax.eval_shape(Embedder().init, jax.random.key(0), jnp.zeros((1, 16, 64, 64, 1)))
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 32_832_960
    assert strides_zyx(Embedder()) == ((2, 2, 2), (4, 16, 16))
    assert receptive_radius_zyx(Embedder()) == (28, 124, 124)


@pytest.mark.parametrize("shape", [(16, 64, 64), (13, 37, 50)], ids=["even", "odd"])
def test_published_grids_and_unit_vectors(shape):
    model = Embedder(channels=(2, 2, 2, 2), features=4)
    volume = jnp.ones((2, *shape, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), volume)
    out = jax.eval_shape(model.apply, variables, volume)
    depth, height, width = shape
    assert out.fine.shape == (2, depth // 2, -(-height // 2), -(-width // 2), 4)
    assert out.coarse.shape == (2, -(-(depth // 2) // 2), -(-height // 16), -(-width // 16), 4)


def test_embeddings_are_unit_vectors(small):
    model, variables = small
    out = jax.jit(model.apply)(variables, jax.random.normal(jax.random.key(1), (1, 8, 32, 32, 1)))
    for level in out:
        np.testing.assert_allclose(np.linalg.norm(level, axis=-1), 1, atol=1e-5)


def test_nearest_neighbour_of_uneven_sizes():
    x = jnp.arange(3.0).reshape(1, 3, 1, 1, 1)
    assert upsample_nearest(x, (5, 1, 1)).ravel().tolist() == [0, 0, 1, 1, 2]
    assert upsample_nearest(x, (6, 1, 1)).ravel().tolist() == [0, 0, 1, 1, 2, 2]


def test_torch_names_round_trip(narrow):
    state = interop.to_torch(narrow)
    assert state["backbone.conv1.conv.weight"].shape == (2, 1, 3, 7, 7)
    assert state["backbone.layer3.0.downsample.conv.weight"].shape == (4, 3, 1, 1, 1)
    assert {"neck.fpn_convs.0.conv.bias", "backbone.layer4.1.conv2.bn.running_var"} <= state.keys()
    state["backbone.conv1.bn.num_batches_tracked"] = np.array(3)
    jax.tree.map(np.testing.assert_array_equal, interop.from_torch(state), narrow)


def test_unknown_weight_is_refused():
    with pytest.raises(UserError, match=r"backbone\.layer9"):
        interop.from_torch({"backbone.layer9.0.conv1.conv.weight": np.zeros((1, 1, 1, 1, 1))})


def test_inflated_imagenet_kernels_sum_to_the_flat_ones(narrow):
    rng = np.random.default_rng(0)
    flat = {
        "conv1.weight": rng.normal(size=(2, 3, 7, 7)),
        "bn1.running_mean": rng.normal(size=2),
        "layer3.0.conv1.weight": rng.normal(size=(4, 3, 3, 3)),
        "layer3.0.downsample.0.weight": rng.normal(size=(4, 3, 1, 1)),
        "fc.weight": rng.normal(size=(10, 5)),
    }
    state = interop.to_torch(interop.inflate_imagenet(flat, narrow))
    got = state["backbone.layer3.0.conv1.conv.weight"]
    np.testing.assert_allclose(got.sum(axis=2), flat["layer3.0.conv1.weight"], atol=1e-6)
    stem = state["backbone.conv1.conv.weight"]
    np.testing.assert_allclose(stem.sum(axis=(1, 2)), flat["conv1.weight"].sum(axis=1), atol=1e-6)
    np.testing.assert_allclose(state["backbone.conv1.bn.running_mean"], flat["bn1.running_mean"], atol=1e-6)
    with pytest.raises(UserError, match=r"model\.channels"):
        interop.inflate_imagenet({"conv1.weight": np.zeros((64, 3, 7, 7))}, narrow)


# ---------------------------------------------------------------- views


def ramp_store(tmp_path, shape=(40, 48, 56), slope=(0, 0, 10)):
    """One scan whose HU is a linear function of the position."""
    store = make_store(tmp_path / "ramp")
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    volume = (slope[0] * z + slope[1] * y + slope[2] * x - 300).astype(np.int16)
    add_scan(store, "ramp", shape)
    scan: Scan = store.scan("ramp")
    store.write_scan(scan, volume, np.ones([-(-n // 2) for n in shape], bool))
    return store


def sampler(store, **changes):
    settings = dict(
        store=store,
        scan_ids=tuple(store.ids()),
        shape_zyx=(8, 16, 16),
        fine_stride_zyx=(1, 2, 2),
        reduce=2,
        pairs=32,
        positive_mm=4.0,
        shift=0.2,
        window_hu=(-1024, 3071),
        distortion=Distortion(scale=(0.8, 1.25), rotation_degrees=10, bend_mm=2, noise_hu=0, blur_voxels=0),
    )
    return EmbedderSampler(**(settings | changes))


def test_sample_is_a_function_of_its_generator(tmp_path):
    draw = sampler(ramp_store(tmp_path))
    first, again, other = (draw(0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    for name in ("volumes", "positions_mm", "pairs", "weights", "body"):
        np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first["volumes"], other["volumes"])


def test_pairs_show_the_same_place(tmp_path):
    sample = sampler(ramp_store(tmp_path))(0, np.random.default_rng(0))
    assert sample["weights"].mean() > 0.5
    places = sample["positions_mm"].reshape(2, -1, 3)
    apart = np.linalg.norm(places[0][sample["pairs"][0]] - places[1][sample["pairs"][1]], axis=1)
    assert apart[sample["weights"] > 0].max() <= 4.0
    assert sample["body"].reshape(2, -1)[[0, 1], sample["pairs"].T][sample["weights"] > 0].all()


@pytest.mark.parametrize("axis", [0, 1, 2], ids="zyx")
def test_a_view_shows_what_its_positions_say(tmp_path, axis):
    slope = [0, 0, 0]
    slope[axis] = 10
    store = ramp_store(tmp_path, slope=slope)
    distortion = Distortion(scale=(0.8, 1.25), rotation_degrees=15, bend_mm=3, noise_hu=0, blur_voxels=0)
    draw = sampler(store, fine_stride_zyx=(1, 1, 1), distortion=distortion)
    sample = draw(0, np.random.default_rng(3))
    position = sample["positions_mm"][0] / 2  # voxels
    inside = ((position > 2) & (position < np.array([37, 45, 53]))).all(axis=-1)
    want = network_input(10 * position[..., axis] - 300)
    assert inside.sum() > 200
    np.testing.assert_allclose(sample["volumes"][0, ..., 0][inside], want[inside], atol=0.05)  # 0.8 HU


@pytest.mark.parametrize("axis", [0, 1, 2], ids="zyx")
def test_beyond_its_borders_a_view_shows_how_the_scan_ends(tmp_path, axis):
    slope = [0, 0, 0]
    slope[axis] = 10
    straight = Distortion(scale=(1, 1), noise_hu=0, blur_voxels=0)
    draw = sampler(
        ramp_store(tmp_path, slope=slope), shape_zyx=(32, 32, 32), fine_stride_zyx=(1, 1, 1), distortion=straight
    )
    sample = draw(0, np.random.default_rng(0))
    position = sample["positions_mm"][0][..., axis] / 2  # voxels; the view is 64 of them long
    length = (40, 48, 56)[axis]
    assert position.min() < 0 or position.max() > length - 1
    want = network_input(10 * np.clip(position, 0.5, length - 1.5) - 300)  # between the centres of the outer blocks
    np.testing.assert_allclose(sample["volumes"][0, ..., 0], want, atol=0.05)


def test_views_are_never_mirrored():
    distortion = Distortion(scale=(0.5, 2.0), rotation_degrees=30)
    for seed in range(20):
        view = draw_view(np.random.default_rng(seed), (8, 8, 8), np.zeros(3), 1, 2.0, distortion)
        assert np.linalg.det(view.matrix) > 0 and (np.diag(view.matrix) > 0).all()


def test_network_input_and_block_mean():
    np.testing.assert_allclose(network_input(np.array([-3000, 3071, 5000])), [-50, 205, 205])
    np.testing.assert_allclose(network_input(np.array([-300, 0, 300]), (-200, 200)), [-50, 77.5, 205])
    block = np.arange(16).reshape(2, 2, 4)
    np.testing.assert_allclose(block_mean(block, 2), [[[6.5, 8.5]]])


def test_a_partner_shows_the_same_place_where_the_matches_put_it(tmp_path, monkeypatch):
    shape, shift_vox = (40, 48, 56), np.array([0, 0, 6.0])
    store = make_store(tmp_path / "two")
    x = np.broadcast_to(np.arange(shape[2]), shape)
    for name, first in (("a", -300), ("b", -360)):  # in b everything lies 6 voxels, 60 HU, farther along x
        add_scan(store, name, shape)
        store.write_scan(store.scan(name), (first + 10 * x).astype(np.int16), np.ones((20, 24, 28), bool))
    codec = types.SimpleNamespace(spacing_zyx_mm=(2.0, 2.0, 2.0))

    def search(query, points, key):
        return matching.Found(points + shift_vox * (1 if query.id == "a" else -1), np.ones(len(points)))

    monkeypatch.setattr(matching, "search", search)
    draw = sampler(
        store,
        reduce=1,
        shape_zyx=(16, 32, 32),
        window_hu=(-1000, 1000),
        distortion=Distortion(scale=(0.9, 1.1), noise_hu=0, blur_voxels=0),
        partner_share=1.0,
        embeddings=lambda id: types.SimpleNamespace(id=id, codec=codec),
    )
    sample = draw(0, np.random.default_rng(0))
    found = int(sample["weights"].sum())
    assert found > 10
    places = [sample["positions_mm"][i].reshape(-1, 3)[sample["pairs"][i, :found]] for i in range(2)]
    assert np.linalg.norm(places[0] - places[1], axis=1).max() <= 4.0
    seen = [
        sample["volumes"][i, ..., 0].reshape(16, 16, 2, 16, 2).mean(axis=(2, 4)).ravel()[sample["pairs"][i, :found]]
        for i in range(2)
    ]
    hu = [(values + 50) / 255 * 2000 - 1000 for values in seen]
    inside = (places[0][:, 2] > 16) & (places[0][:, 2] < 96)  # clear of the borders of both scans
    assert inside.sum() > 5
    np.testing.assert_allclose(hu[0][inside], hu[1][inside], atol=25)  # 4 mm are 20 HU; unmapped it would be 60


# ---------------------------------------------------------------- objective


def test_coarse_is_upsampled_as_in_matching():
    coarse = np.random.default_rng(0).normal(size=(3, 2, 4, 5)).astype(np.float32)
    want = np.stack(list(embeddings.upsampled_slabs(coarse, (6, 8, 16), (0.5, 0.25, 0.25))))
    got = objective.upsample_coarse(jnp.asarray(coarse)[None], (6, 8, 16), (0.5, 0.25, 0.25))[0]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_negatives_come_from_the_hardest():
    similarity = jnp.array([[0.1, 0.9, 0.5, 0.8, 0.2]])
    allowed = jnp.array([[True, False, True, True, True]])
    contrast = objective.Contrast(hard_pool=3, negatives=2)
    drawn = objective.choose_negatives(similarity, similarity, allowed, contrast, jax.random.key(0))
    assert drawn.shape == (1, 2) and {round(float(v), 1) for v in drawn[0]} <= {0.8, 0.5, 0.2}
    everything = objective.Contrast(hard_pool=0, negatives=0)
    drawn = objective.choose_negatives(similarity, similarity, allowed, everything, jax.random.key(0))
    assert drawn[0, 1] == objective.EXCLUDED


def line_of_cells(positions_mm, vectors, cell):
    vectors = jnp.asarray(vectors, jnp.float32)
    positions = jnp.zeros((len(vectors), 3)).at[:, 2].set(jnp.asarray(positions_mm))
    body = jnp.ones(len(vectors), bool)
    return {"fine": vectors, "coarse": vectors, "positions": positions, "body": body, "pairs": jnp.array([cell])}


def test_cells_within_the_ignore_radius_are_no_negatives():
    anchor = line_of_cells([0.0], [[1.0, 0.0]], 0)
    other = line_of_cells([0.0, 4.0, 40.0], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 0) | {"others": {}}
    contrast = dict(temperature=1.0, hard_pool=0, negatives=0)
    near = {"fine": objective.Contrast(ignore_mm=5.0, **contrast)}
    less = {"fine": objective.Contrast(ignore_mm=3.0, **contrast)}
    run = lambda contrasts: objective.direction_terms(  # noqa: E731
        anchor, other, jnp.ones(1), jax.random.key(0), contrasts, 0, (1, 1, 3)
    )
    e = np.e
    np.testing.assert_allclose(run(near)["loss_fine"], np.log((e + 1) / e), rtol=1e-5)
    np.testing.assert_allclose(run(less)["loss_fine"], np.log((e + e + 1) / e), rtol=1e-5)
    assert run(near)["matching_error_mm"] == 0


def test_a_positive_is_spread_over_the_cells_around_it_by_their_distance():
    anchor = line_of_cells([0.0], [[1.0, 0.0]], 0)
    # Alike in all cells: the loss is log 3 however the target is spread, and its gradient pulls by the shares.
    other = line_of_cells([0.0, 4.0, 40.0], [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], 0) | {"others": {}}
    contrast = objective.Contrast(temperature=1.0, spread_mm=4.0, ignore_mm=12.0, hard_pool=0, negatives=0)

    def loss(vectors):
        moved = other | {"fine": vectors}
        terms = objective.direction_terms(
            anchor, moved, jnp.ones(1), jax.random.key(0), {"fine": contrast}, 0, (1, 1, 3)
        )
        return terms["loss_fine"]

    np.testing.assert_allclose(loss(other["fine"]), np.log(3), rtol=1e-5)
    beside = np.exp(-0.5)  # 4 mm off at a spread of 4 mm
    shares = np.array([1, beside, 0]) / (1 + beside)
    np.testing.assert_allclose(jax.grad(loss)(other["fine"])[:, 0], 1 / 3 - shares, rtol=1e-5)


def small_objective(model, weight_joint=1.0, others=0):
    contrast = dict(temperature=0.1, ignore_mm=6.0, hard_pool=0, negatives=0)
    contrasts = {
        "fine": objective.Contrast(**contrast),
        "coarse": objective.Contrast(**contrast, other_volumes=others),
        "joint": objective.Contrast(weight=weight_joint, **contrast),
    }
    return objective.make(
        model, contrasts, candidates=64, statistics_momentum=0.9, optimizer=optax.adam(3e-3), schedules={}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Ten steps on one batch of noise, in which every place looks different."""
    store = make_store(tmp_path_factory.mktemp("noise") / "store")
    shape = (40, 48, 56)
    add_scan(store, "noise", shape)
    noise = np.random.default_rng(0).integers(-200, 300, size=shape).astype(np.int16)
    store.write_scan(store.scan("noise"), noise, np.ones((20, 24, 28), bool))
    model = Embedder(**SMALL)
    draw = sampler(store, shape_zyx=(8, 32, 32), fine_stride_zyx=(2, 2, 2), reduce=1, positive_mm=3.0)
    samples = [draw(0, np.random.default_rng(seed)) for seed in range(2)]
    batch = {name: np.stack([s[name] for s in samples]) for name in samples[0] if name != "meta"}
    problem = small_objective(model, others=16)
    state = jax.jit(lambda batch: train_state.create(problem, 0, batch))(batch)
    step = jax.jit(train_state.make_train_step(problem, jax.random.key(0)))
    states, metrics = [state], []
    for _ in range(10):
        state, values = step(state, batch)
        states.append(state)
        metrics.append(values)
    return problem, batch, states, metrics


def test_losses_fall(trained):
    _, _, _, metrics = trained
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]
    assert {"loss_fine", "loss_coarse", "loss_joint", "matching_error_mm"} <= metrics[0].keys()


def test_running_statistics_follow_the_batch(trained):
    problem, _, states, _ = trained
    stats = jax.tree.map(lambda x: x + 1.0, states[0].extra)
    after = problem.update(states[1].params, states[0].extra, stats, jnp.zeros((), int))
    np.testing.assert_allclose(after["batch_stats"]["stem"]["bn"]["mean"], 0.1, rtol=1e-6)
    means = [state.extra["batch_stats"]["stem"]["bn"]["mean"] for state in states]
    assert np.abs(means[1]).max() > np.abs(means[0]).max() == 0


def test_features_are_fine_vectors_of_the_pairs_and_all_coarse_ones(trained):
    problem, batch, states, _ = trained
    features = jax.jit(problem.features)(states[-1].params, states[-1].extra, batch)
    assert features["fine"].shape == (batch["pairs"].size, SMALL["features"])
    assert len(features["coarse"]) > 0
    for vectors in features.values():
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-4)


def test_a_zero_weight_is_not_computed():
    view = line_of_cells([0.0, 9.0], [[1.0, 0.0], [0.0, 1.0]], 0)
    contrasts = {"fine": objective.Contrast(), "joint": objective.Contrast(weight=0.0)}
    terms = objective.direction_terms(
        view, view | {"others": {}}, jnp.ones(1), jax.random.key(0), contrasts, 0, (1, 1, 2)
    )
    assert "loss_fine" in terms and "loss_joint" not in terms


# ---------------------------------------------------------------- configuration


def test_configurations_build(tmp_path):
    store = ramp_store(tmp_path)
    for variant in ("", "tiny", "small"):
        config = config_file.get_config(variant)
        task = tasks.make(config, store)
        assert task.scans == ("ramp",) and not task.validation_scans
    sizes = jax.eval_shape(
        tasks.embedder.network_of(config_file.get_config().model.to_dict(), jnp.float32).init,
        jax.random.key(0),
        jnp.zeros((1, 16, 64, 64, 1)),
    )
    assert sum(x.size for x in jax.tree.leaves(sizes["params"])) == 32_832_960


def test_scans_of_one_patient_are_held_out_together(tmp_path):
    store = Store.create(str(tmp_path / "store"), spacing_zyx_mm=(2.0, 2.0, 2.0))
    for id, patient in (("a1", "Ann"), ("a2", "Ann"), ("b1", "Bob"), ("b2", "Bob")):
        scan = dataclasses.replace(make_scan(id, (20, 20, 20)), patient=patient)
        store.write_scan(scan, np.zeros((20, 20, 20), np.int16), np.ones((10, 10, 10), bool))
    config = config_file.get_config("tiny")
    config.data.validation_fraction = 0.25
    task = tasks.make(config, store)
    assert task.scans == ("b1", "b2") and task.validation_scans == ("a1", "a2")


@pytest.mark.parametrize(
    "field, value",
    [
        ("data.spacing_mm", 3.0),
        ("views.shape_zyx", (30, 96, 96)),
        ("views.pairs", 0),
        ("views.partner_share", 1.5),
        ("views.partner_share", 0.5),  # with a store that holds no embeddings
        ("init_from", "."),
        ("views.scale", (1.1, 1.2)),
        ("optimizer.kind", "adam"),
        ("model.blocks", (2, 2)),
    ],
)
def test_bad_settings_are_named(tmp_path, field, value):
    config = config_file.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=field.split(".")[-1]):
        tasks.make(config, ramp_store(tmp_path))
