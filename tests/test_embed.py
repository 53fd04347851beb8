"""Embedding whole stores: tiles, what is skipped, and what is refused."""

import dataclasses
import json
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_matching import add_scan, make_codec, make_store

from alice_jax import checkpoint, embed
from alice_jax.data import codec as codec_module
from alice_jax.data import embeddings, matching
from alice_jax.data.store import Store
from alice_jax.errors import UserError
from alice_jax.models.embedder import Embedder

SHAPE = (24, 40, 36)


def make_embedder(seed=0, features=8, **settings):
    network = Embedder(channels=(4, 4, 6, 6), features=features, blocks=(1, 1, 1, 1), stem_kernel_zyx=(3, 3, 3))
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 32, 32, 1)))
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    statistics = jax.tree_util.tree_map_with_path(
        lambda path, x: 5 * np.abs(x) + 1 if path[-1].key == "var" else x, variables["batch_stats"]
    )
    variables = {"params": variables["params"], "batch_stats": statistics}
    return embed.TrainedEmbedder(
        network, variables, **({"reduce": 1, "window_hu": (-1024, 3071), "spacing_mm": 2.0, "dims": 8} | settings)
    )


@pytest.fixture(scope="module")
def embedder():
    return make_embedder()


def add_noise(store, id, seed, shape=SHAPE):
    add_scan(store, id, shape)
    noise = np.random.default_rng(seed).integers(-500, 500, size=shape).astype(np.int16)
    body = np.zeros([-(-n // 2) for n in shape], bool)
    body[2:-2, 2:-2, 2:-2] = True
    store.write_scan(store.scan(id), noise, body)


@pytest.fixture
def store(tmp_path):
    store = make_store(tmp_path / "store")
    for seed, id in enumerate("abc"):
        add_noise(store, id, seed)
    return store


def test_every_scan_is_embedded_and_matches_to_itself(store, embedder):
    summary = embed.embed_store(store, embedder)
    assert (summary.embedded, summary.skipped) == (3, 0)
    scan = matching.read_embedding(store, "b")
    fine = scan.dense()
    assert fine.shape == (12, 20, 18, 8) and fine.dtype == np.int8
    assert not fine[:2].any() and fine[2:-2, 2:-2, 2:-2].any(axis=-1).all()
    # Cells' centres, since between the cells of an untrained network the vectors mean little.
    points = 2 * np.random.default_rng(0).integers(3, np.array(SHAPE) // 2 - 3, size=(40, 3)) + 0.5
    match = matching.dense(scan, points, scan, subcell=True)
    assert np.abs(match.points_zyx_vox - points).max() <= 2  # one stride
    assert embed.bytes_per_scan(store) > 1000


def test_devices_take_a_scan_each_and_embed_as_one_would(store, embedder, monkeypatch):
    used, put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda tree, device: used.append(device) or put(tree, device))
    first, all_at_once = jax.devices()[:1], threading.Barrier(3)
    embed.embed_store(store, embedder, devices=first)
    alone = {(id, name): store.read_array(id, name) for id in store.ids() for name in embeddings.ARRAYS}
    read = Store.read_volume
    monkeypatch.setattr(Store, "read_volume", lambda *args: all_at_once.wait(60) is not None and read(*args))
    assert embed.embed_store(store, embedder, force=True).embedded == 3
    assert used == [*first, *jax.devices()] and len(set(used)) == 8
    for (id, name), array in alone.items():
        np.testing.assert_array_equal(store.read_array(id, name), array)


def test_what_is_done_is_skipped_and_another_embedder_replaces_it(store, embedder):
    embed.embed_store(store, embedder)
    add_noise(store, "d", 9)
    first = store.read_array("a", "fine")
    again = embed.embed_store(store, embedder)
    assert (again.embedded, again.skipped) == (1, 3)
    np.testing.assert_array_equal(store.read_array("a", "fine"), first)
    assert embed.embed_store(store, embedder, force=True).embedded == 4
    other = embed.embed_store(store, make_embedder(seed=1))
    assert other.embedded == 4 and not np.array_equal(store.read_array("a", "fine"), first)


def test_tasks_share_the_scans(store, embedder):
    assert embed.embed_store(store, embedder, task_index=0, task_count=2).embedded == 2
    assert embeddings.embedded_by(store, "b") is None
    assert embed.embed_store(store, embedder, task_index=1, task_count=2).embedded == 1
    codec = embeddings.read_codec(store)
    assert {embeddings.embedded_by(store, id) for id in store.ids()} == {codec.hash}


def test_tasks_that_begin_at_once_on_a_fresh_store_share_one_codec(store, embedder, monkeypatch):
    both_fit, fit = threading.Barrier(2), embed.fit_codec

    def fit_at_once(*args):
        both_fit.wait(60)
        codec = fit(*args)
        # Two machines may differ in the last bits, which makes another codec.
        return dataclasses.replace(codec, spacing_zyx_mm=(2.0, 2.0, 2.0 + 1e-9 * threading.get_ident()))

    monkeypatch.setattr(embed, "fit_codec", fit_at_once)
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(embed.embed_store, Store.open(store.path), embedder, task, 2) for task in range(2)]
        summaries = [task.result() for task in tasks]
    assert sorted(summary.embedded for summary in summaries) == [1, 2]
    hashes = {embeddings.embedded_by(store, id) for id in store.ids()}
    assert hashes == {embeddings.read_codec(store).hash} == {summary.codec.hash for summary in summaries}


def settle(path, seed, gate, out):
    """A task of its own process: a codec that no other task fits."""
    gate.wait(60)
    out.put(codec_module.settle_codec(Store.open(path), "a" * 64, lambda: make_codec(seed=seed)).hash)


def test_of_codecs_fitted_in_several_processes_the_first_one_written_counts(tmp_path):
    store = make_store(tmp_path / "store")
    make_codec(embedder="b" * 64).save(store)  # an older embedder's, which all of them find
    context = multiprocessing.get_context("spawn")
    gate, out = context.Barrier(3), context.Queue()
    workers = [context.Process(target=settle, args=(store.path, seed, gate, out)) for seed in range(3)]
    for worker in workers:
        worker.start()
    hashes = {out.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join(60)
    assert hashes == {embeddings.read_codec(store).hash}


def test_embeddings_of_another_format_are_replaced(store, embedder):
    embed.embed_store(store, embedder)
    old = store.read_json("embedder.json")
    store.write_json("embedder.json", old | {"format": 1})
    with pytest.raises(UserError, match=r"embeddings of format 1, this version reads 3; run .*embed again"):
        matching.read_embedding(store, "a")
    assert embed.embed_store(store, embedder).codec.hash == old["hash"]
    assert matching.read_embedding(store, "a").shape_zyx == SHAPE


def test_an_embedder_that_comes_too_late_gives_way(store, embedder):
    other = make_codec(embedder="c" * 64)

    def fit_while_another_begins():
        other.save(store)
        return make_codec(embedder="a" * 64)

    with pytest.raises(UserError, match="another task has begun to embed it by another embedder"):
        codec_module.settle_codec(store, "a" * 64, fit_while_another_begins)
    assert embeddings.read_codec(store).hash == other.hash


@pytest.mark.parametrize("shape", [(200, 32, 20), (161, 20, 32)], ids=["even", "odd"])
def test_tiles_give_what_the_whole_gives(embedder, shape):
    volume = np.random.default_rng(0).integers(-500, 500, size=shape).astype(np.int16)
    whole = embed.WholeVolume(embedder)
    tiled = embed.WholeVolume(embedder, tile_bytes=4 * 4 * 32 * 32 * 96)
    assert len(list(tiled._tiles((224, 32, 32)))) > 2
    for one, other in zip(whole(volume), tiled(volume), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_tiles_cover_each_voxel_once(embedder):
    tiled = embed.WholeVolume(embedder, tile_bytes=4 * 4 * 32 * 32 * 96)
    for depth in range(96, 480, 32):
        kept = [np.arange(depth)[tile][keep] for tile, keep in tiled._tiles((depth, 32, 32))]
        np.testing.assert_array_equal(np.concatenate(kept), np.arange(depth))
        assert {tile.stop - tile.start for tile, _ in tiled._tiles((depth, 32, 32))} == {96}


def test_reduced_voxels_widen_the_grids():
    embedder = make_embedder(reduce=2)
    assert embedder.strides_zyx_vox == ((4, 4, 4), (8, 32, 32))
    fine, coarse = embed.WholeVolume(embedder)(np.zeros((50, 61, 70), np.int16))
    assert fine.shape[:3] == (13, 16, 18) and coarse.shape[:3] == (7, 2, 3)


def test_beyond_its_borders_a_volume_goes_on_as_it_ends(embedder):
    volume = np.random.default_rng(0).integers(-500, 500, size=(50, 61, 70)).astype(np.int16)
    whole = embed.WholeVolume(embedder)
    continued = whole(np.pad(volume, [(0, 14), (0, 3), (0, 26)], mode="edge"))  # to multiples of 32
    for level, longer in zip(whole(volume), continued, strict=True):
        np.testing.assert_array_equal(level, longer[tuple(map(slice, level.shape))])


def test_shifted_copies_interleave_into_finer_cells():
    """Cells of 8 voxels become cells of 4, each as the network sees it in a copy in which its centre is that of one."""
    volume = np.random.default_rng(0).integers(-500, 500, size=(64, 96, 90)).astype(np.int16)
    embedder = make_embedder(reduce=4, shifts=2)
    assert embedder.strides_zyx_vox == ((4, 4, 4), (16, 64, 64))
    fine, coarse = embed.WholeVolume(embedder)(volume)
    assert fine.shape == (16, 24, 23, 8) and coarse.shape == (4, 2, 2, 8)
    np.testing.assert_allclose(np.linalg.norm(coarse, axis=-1), 1, rtol=1e-5)
    own = embed.WholeVolume(dataclasses.replace(embedder, shifts=1))
    # Finer cell 0 spans voxels 0 to 3: the network's cell 0 does so around its centre where two voxels lie before it.
    np.testing.assert_allclose(fine[::2, ::2, ::2], own(np.pad(volume, [(2, 0)] * 3, mode="edge"))[0][:8, :12, :12])
    # Finer cell 1 spans voxels 4 to 7: so does the network's cell 0 where two voxels are cut off.
    np.testing.assert_allclose(fine[1::2, 1::2, 1::2], own(volume[2:, 2:, 2:])[0][:8, :12, :11])


def test_int8_and_the_projection_keep_the_match(store):
    """A scan against a noisy copy; its vectors lie mostly in 24 of 32 directions, as trained ones do."""
    embedder = make_embedder(features=32, dims=24)
    basis = np.linalg.svd(np.random.default_rng(0).normal(size=(32, 32)))[0]
    for head in ("fine_output", "coarse_output"):
        kernel = embedder.variables["params"][head]["kernel"]
        kernel[...] = (kernel @ basis) * 0.8 ** np.arange(32) @ basis.T
    noise = np.random.default_rng(1).normal(scale=60, size=SHAPE)
    add_scan(store, "copy", SHAPE)
    volume = (store.read_volume("a") + noise).astype(np.int16)
    store.write_scan(store.scan("copy"), volume, store.foreground("a"))
    embed.embed_store(store, embedder)
    whole = embed.WholeVolume(embedder)
    cells = np.argwhere(matching.read_embedding(store, "a").dense().any(axis=-1))
    exact = []
    for id in ("a", "copy"):
        fine, coarse = whole(store.read_volume(id))
        ratios = tuple(f / c for f, c in zip(*embedder.strides_zyx_vox, strict=True))
        up = np.stack(list(embeddings.upsampled_slabs(coarse, fine.shape[:3], ratios)))
        exact.append(np.concatenate([fine[tuple(cells.T)], up[tuple(cells.T)]], axis=1))
    want = (exact[0] @ exact[1].T).argmax(axis=1)
    a, copy = (matching.read_embedding(store, id) for id in ("a", "copy"))
    got, _ = matching.nearest(a.vectors(cells) / 2, [copy.keys])
    assert np.mean(got == want) >= 0.95


def test_hash_names_weights_and_settings(embedder):
    assert embedder.hash() == make_embedder().hash()
    assert embedder.hash() != make_embedder(seed=1).hash()
    assert embedder.hash() != dataclasses.replace(embedder, reduce=2).hash()
    bf16 = dataclasses.replace(embedder, network=embedder.network.clone(dtype=jnp.bfloat16))
    assert embedder.hash() == bf16.hash()


def test_store_that_does_not_fit_is_refused(tmp_path, embedder):
    with pytest.raises(UserError, match="holds no scans"):
        embed.embed_store(make_store(tmp_path / "empty"), embedder)
    store = make_store(tmp_path / "store")
    add_noise(store, "a", 0)
    with pytest.raises(UserError, match=r"spacing is \(2\.0, 2\.0, 2\.0\) mm and the embedder was trained at 3\.0"):
        embed.embed_store(store, dataclasses.replace(embedder, spacing_mm=3.0))


def test_workdir_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        embed.restore(str(tmp_path / "nothing"))
    checkpoint.write_config(str(tmp_path / "fresh"), {"objective": "embedder"})
    with pytest.raises(UserError, match="no checkpoint yet"):
        embed.restore(str(tmp_path / "fresh"))


def test_workdir_of_another_objective_is_refused(tmp_path):
    workdir = str(tmp_path / "alice")
    checkpoint.write_config(workdir, {"objective": "alice"})
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, {"step": np.zeros(()), "params": {"a": np.zeros(2)}, "extra": {"b": np.zeros(2)}})
    with pytest.raises(UserError, match="its objective is 'alice'"):
        embed.restore(workdir)


def test_command_restores_embeds_and_reports(tmp_path, store, embedder, capsys):
    workdir = str(tmp_path / "run")
    network = {
        f.name: getattr(embedder.network, f.name)
        for f in dataclasses.fields(embedder.network)
        if f.name not in ("parent", "name", "dtype")
    }
    config = {
        "objective": "embedder",
        "precision": "float32",
        "model": network | {"statistics_momentum": 0.9},
        "views": {"reduce": 1, "window_hu": [-1024, 3071]},
        "data": {"spacing_mm": 2.0},
        "storage": {"dims": 8, "shifts": 1},
    }
    checkpoint.write_config(workdir, json.loads(json.dumps(config)))
    state = {
        "step": np.array(3),
        "params": embedder.variables["params"],
        "extra": {"batch_stats": embedder.variables["batch_stats"]},
    }
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(3, state)
    assert embed.restore(workdir).hash() == embedder.hash()
    assert embed.main(["--store", store.path, "--workdir", workdir, "--task-count", "2"]) == 0
    printed, said = capsys.readouterr()
    assert f"reading the store {store.path}\n" in said
    assert "embedded 2 scans, 0 were done already" in printed and "MB a scan on disk" in printed
    with pytest.raises(UserError, match="--task-index 2"):
        embed.main(["--store", store.path, "--workdir", workdir, "--task-index", "2", "--task-count", "2"])
