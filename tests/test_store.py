"""The store: what is written comes back, crops are cheap, damage is an error and interruptions leave nothing."""

import dataclasses
import json
import os
import pathlib
import pickle
import threading

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from alice_jax.data import files
from alice_jax.data.hounsfield import AIR_HU
from alice_jax.data.store import Scan, Store
from alice_jax.errors import UserError

SHAPE = (70, 45, 90)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """Damage does not heal here."""
    monkeypatch.setattr("alice_jax.data.store.WAITS_S", ())


def make_scan(id="case", shape=SHAPE, **changes) -> Scan:
    scan = Scan(
        id=id,
        file="case.nii.gz",
        sha256="0" * 64,
        patient=id,
        shape_zyx=shape,
        spacing_zyx_mm=(2.0, 2.0, 2.0),
        origin_xyz_lps_mm=(10.0, -20.0, 30.0),
        direction=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
        foreground_box_zyx_vox=((0, 0, 0), shape),
        original={"affine_ras": np.diag([-1.0, -1.0, 4.0, 1.0]).tolist(), "shape_ijk": [4, 5, 6]},
    )
    return dataclasses.replace(scan, **changes)


def make_volume(shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    foreground = rng.random([-(-n // 2) for n in shape]) > 0.5
    return rng.integers(-1024, 3000, shape).astype(np.int16), foreground


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    store = Store.create(tmp_path_factory.mktemp("store") / "s", (2, 2, 2))
    volume, foreground = make_volume()
    store.write_scan(make_scan(), volume, foreground)
    return store, volume, foreground


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "s", (2, 2, 2))


def shard_of(store, id="case", name="volume"):
    return os.path.join(store.path, "scans", id, name, "c", "0", "0", "0")


def test_round_trip(filled):
    store, volume, foreground = filled
    again = Store.open(store.path)
    assert again.ids() == ["case"]
    assert again.scan("case") == make_scan()
    np.testing.assert_array_equal(again.read_volume("case"), volume)
    np.testing.assert_array_equal(again.foreground("case"), foreground)
    assert again.read_volume("case").dtype == np.int16 and again.foreground("case").dtype == bool


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    start=st.tuples(*[st.integers(-40, 120)] * 3), shape=st.tuples(*[st.integers(1, 50)] * 3), fill=st.integers(-5, 5)
)
def test_crop_equals_numpy_with_padding(filled, start, shape, fill):
    store, volume, _ = filled
    margin = 200
    padded = np.pad(volume, margin, constant_values=fill)
    wanted = padded[tuple(slice(s + margin, s + margin + n) for s, n in zip(start, shape, strict=True))]
    np.testing.assert_array_equal(store.read_crop("case", start, shape, fill), wanted)


def test_outside_is_air(filled):
    assert (filled[0].read_crop("case", (-99, 0, 0), (4, 4, 4)) == AIR_HU).all()


def test_one_file_per_array_smaller_than_raw(store):
    smooth = np.broadcast_to(np.arange(64, dtype=np.int16), (64, 64, 64)).copy()
    store.write_scan(make_scan(shape=smooth.shape), smooth, np.ones((32, 32, 32), bool))
    folder = os.path.dirname(shard_of(store))
    assert os.listdir(folder) == ["0"]
    assert os.path.getsize(shard_of(store)) < smooth.nbytes / 2


def damage(path, start, stop):
    with open(path, "r+b") as file:
        file.seek(start)
        data = bytes(byte ^ 0xFF for byte in file.read(stop - start))
        file.seek(start)
        file.write(data)


def test_a_crop_reads_its_chunks_alone_and_a_damaged_chunk_is_an_error(store):
    volume, foreground = make_volume()
    store.write_scan(make_scan(), volume, foreground)
    path = shard_of(store)
    # Chunks are stored one after the other and the index lies at the end: spoil the second half of the data.
    size = os.path.getsize(path)
    index = 16 * 3 * 2 * 3 + 4
    damage(path, size // 2, size - index)
    fresh = Store.open(store.path)
    np.testing.assert_array_equal(fresh.read_crop("case", (0, 0, 0), (32, 32, 32)), volume[:32, :32, :32])
    with pytest.raises(UserError, match=r"scan case: .*s/scans/case/volume is missing or damaged"):
        fresh.read_volume("case")


@pytest.mark.parametrize("offset_from_end", [1, 40, 400, 40_000])
def test_a_flipped_bit_anywhere_is_an_error(store, offset_from_end):
    volume, foreground = make_volume()
    store.write_scan(make_scan(), volume, foreground)
    size = os.path.getsize(shard_of(store))
    damage(shard_of(store), size - offset_from_end, size - offset_from_end + 1)
    with pytest.raises(UserError, match=r"scan case: .*volume"):
        Store.open(store.path).read_volume("case")


@pytest.mark.parametrize("name", ["volume", "foreground", "fine"])
def test_a_lost_or_cut_file_is_an_error_and_not_air(store, name):
    volume, foreground = make_volume()
    store.write_scan(make_scan(), volume, foreground)
    store.write_array("case", "fine", volume.astype(np.float32))
    path = shard_of(store, name=name)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    with pytest.raises(UserError, match=f"scan case: .*{name}"):
        Store.open(store.path).read_array("case", name)
    os.remove(path)
    with pytest.raises(UserError, match=f"scan case: .*{name}"):
        Store.open(store.path).read_array("case", name)
    assert not Store.open(store.path).has_array("case", name)


def test_an_interrupted_write_is_invisible(store, monkeypatch):
    volume, foreground = make_volume()
    store.write_scan(make_scan("a"), volume, foreground)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "update_scan", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.write_scan(make_scan("b"), volume, foreground)
    again = Store.open(store.path)
    assert again.ids() == ["a"]
    with pytest.raises(UserError, match="scan b: not in the store"):
        again.scan("b")
    again.write_scan(make_scan("b"), volume, foreground)
    assert again.ids() == ["a", "b"]


def test_rewriting_replaces_everything(store):
    volume, foreground = make_volume()
    store.write_scan(make_scan(), volume, foreground)
    store.write_array("case", "fine", np.ones((3, 3, 3, 2), np.int8))
    assert store.has_array("case", "fine")
    store.read_volume("case")
    smaller, foreground = make_volume((20, 30, 40), seed=1)
    store.write_scan(make_scan(shape=smaller.shape, sha256="1" * 64), smaller, foreground)
    for view in (store, Store.open(store.path)):
        np.testing.assert_array_equal(view.read_volume("case"), smaller)
        assert view.scan("case").sha256 == "1" * 64
        assert not view.has_array("case", "fine")  # it belonged to the old voxels
    store.delete_scan("case")
    assert store.ids() == [] and Store.open(store.path).ids() == []


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "float16", "float32", "bool"])
def test_named_arrays(filled, dtype):
    store = filled[0]
    array = (np.random.default_rng(0).random((9, 20, 33, 5)) * 100).astype(dtype)
    store.write_array("case", "fine", array)
    np.testing.assert_array_equal(store.read_array("case", "fine"), array)
    region = store.read_array_region("case", "fine", (-1, 2, 30), (4, 5, 6), fill=0)
    wanted = np.zeros((4, 5, 6, 5), dtype)
    wanted[1:, :, :3] = array[:3, 2:7, 30:]
    np.testing.assert_array_equal(region, wanted)


def test_a_half_written_array_is_not_there(store):
    """Whatever the scan is called: the letter c is also the folder of zarr's chunks."""
    volume, foreground = make_volume()
    store.write_scan(make_scan("c"), volume, foreground)
    store.write_array("c", "fine", volume)
    assert store.has_array("c", "fine")
    os.remove(shard_of(store, "c", "fine"))
    assert not store.has_array("c", "fine") and store.has_array("c", "volume") and not store.has_array("c", "coarse")


def test_settings_must_agree(store, tmp_path):
    assert Store.create(store.path, (2.0, 2.0, 2.0)).path == store.path
    with pytest.raises(UserError, match=r"spacing_zyx_mm is .* name another folder"):
        Store.create(store.path, (3, 3, 3))
    with pytest.raises(UserError, match="extra is"):
        Store.create(store.path, (2, 2, 2), {"phantom": 1})


def test_what_is_not_a_store_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no manifest.json"):
        Store.open(tmp_path)
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(UserError, match="holds other files"):
        Store.create(tmp_path, (2, 2, 2))
    with pytest.raises(UserError, match="is a file"):
        Store.create(tmp_path / "letter.txt", (2, 2, 2))
    for text, message in [
        ("{", "cannot be read"),
        ("[]", "not that of a store"),
        ('{"format": "alice_jax store", "version": 99}', "format version 99"),
    ]:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message):
            Store.open(tmp_path)


def test_a_damaged_description_is_an_error(store):
    volume, foreground = make_volume()
    store.write_scan(make_scan(), volume, foreground)
    path = pathlib.Path(store.path, "scans", "case", "scan.json")
    record = json.loads(path.read_text())
    del record["sha256"]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"scan case: scan.json .* damaged"):
        Store.open(store.path).scan("case")


@pytest.mark.parametrize("id", ["../a", "a/b", "", ".hidden", "é"])
def test_names_cannot_leave_the_store(store, id):
    volume, foreground = make_volume()
    with pytest.raises(UserError, match="name"):
        store.write_scan(make_scan(id), volume, foreground)


def test_pickle_and_threads(filled):
    store, volume, _ = filled
    copy = pickle.loads(pickle.dumps(store))
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            z, y, x = rng.integers(0, 30, 3)
            crop = copy.read_crop("case", (z, y, x), (8, 8, 8))
            if not np.array_equal(crop, volume[z : z + 8, y : y + 8, x : x + 8]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_memory_store_and_side_files():
    store = Store.create("memory://test_store", (2, 2, 2), {"made_by": "test"})
    volume, foreground = make_volume()
    store.write_scan(make_scan(), volume, foreground)
    store.write_json("embedder.json", {"stride": 2})
    again = Store.open("memory://test_store")
    assert again.manifest["extra"] == {"made_by": "test"}
    assert again.ids() == ["case"] and again.read_json("embedder.json") == {"stride": 2}
    assert again.read_json("other.json") is None
    np.testing.assert_array_equal(again.read_crop("case", (1, 2, 3), (4, 5, 6)), volume[1:5, 2:7, 3:9])


def test_points_go_to_the_world_and_to_the_file(filled):
    store = filled[0]
    points_zyx_vox = np.array([[0.0, 0, 0], [1, 2, 3]])
    np.testing.assert_allclose(store.to_world("case", points_zyx_vox), [[10, -20, 30], [16, -16, 32]])
    # The file's affine is diag(-1, -1, 4) in RAS: i grows to the left by 1 mm, j to the back by 1 mm, k up by 4 mm.
    ijk = store.to_original_ijk("case", points_zyx_vox)
    np.testing.assert_allclose(ijk, [[10, -20, 7.5], [16, -16, 8]])
    np.testing.assert_allclose(store.from_original_ijk("case", ijk), points_zyx_vox)


def test_many_descriptions_are_read_at_once_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "AT_ONCE", 2)
    volume, foreground = make_volume((8, 8, 8))
    store = Store.create(tmp_path / "store", (2, 2, 2))
    for id in "abcde":
        store.write_scan(make_scan(id, volume.shape), volume, foreground)
    assert [scan.id for scan in Store.open(store.path).scans(["e", "a", "d", "b", "a"])] == ["e", "a", "d", "b", "a"]
    with pytest.raises(UserError, match="scan f: not in the store"):
        store.scans(["a", "f"])
