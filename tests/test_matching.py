"""Codec of embeddings and the search: small cases with known answers."""

import dataclasses
import pickle

import numpy as np
import pytest

from alice_jax.data import embeddings, matching, octree
from alice_jax.data.store import Scan, Store
from alice_jax.errors import UserError

SHAPE = (24, 20, 28)
STRIDE, COARSE_STRIDE = (2, 2, 2), (4, 8, 8)


def make_codec(channels=16, dims=16, embedder="a" * 64, seed=0):
    rng = np.random.default_rng(seed)
    levels = [
        embeddings.fit_level([embeddings.normalise(rng.normal(size=(500, channels)))], stride, dims)
        for stride in (STRIDE, COARSE_STRIDE)
    ]
    return embeddings.Codec(embedder, (2.0, 2.0, 2.0), *levels)


def make_store(path):
    return Store.create(path, (2.0, 2.0, 2.0))


def add_scan(store, id, shape=SHAPE, body=None):
    half = tuple(-(-n // 2) for n in shape)
    foreground = np.ones(half, bool) if body is None else body
    box = ((0, 0, 0), shape)
    original = {"affine_ras": np.eye(4).tolist(), "shape_ijk": list(shape), "dtype": "int16", "axcodes": "LPS"}
    direction = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    scan = Scan(id, "made", "0" * 64, id, shape, (2.0, 2.0, 2.0), (0.0, 0.0, 0.0), direction, box, original)
    store.write_scan(scan, np.zeros(shape, np.int16), foreground)


def random_vectors(grid, seed, channels=16):
    return embeddings.normalise(np.random.default_rng(seed).normal(size=(*grid, channels))).astype(np.float32)


def grids(shape=SHAPE):
    return [tuple(-(-n // s) for n, s in zip(shape, stride, strict=True)) for stride in (STRIDE, COARSE_STRIDE)]


@pytest.fixture
def store(tmp_path):
    store = make_store(tmp_path / "store")
    codec = make_codec()
    codec.save(store)
    fine_grid, coarse_grid = grids()
    for seed, id in enumerate(("a", "b")):
        add_scan(store, id)
        embeddings.write_embedding(store, id, codec, random_vectors(fine_grid, seed), random_vectors(coarse_grid, seed))
    return store


def test_a_scan_matches_to_itself_within_half_a_stride(store):
    embedding = matching.read_embedding(store, "a")
    points = np.array([[0, 0, 0], [23, 19, 27], [11, 6, 13], [4, 18, 1]])
    match = matching.dense(embedding, points, embedding)
    assert np.abs(match.points_zyx_vox - points).max() <= 0.5
    np.testing.assert_allclose(match.scores, 1, atol=5e-3)


def test_a_translated_volume_matches_with_the_translation(tmp_path):
    store, codec = make_store(tmp_path / "store"), make_codec()
    codec.save(store)
    fine_grid, coarse_grid = grids()
    big = random_vectors([n + 4 for n in fine_grid], 3)
    flat = np.broadcast_to(random_vectors((1, 1, 1), 4), (*coarse_grid, 16))
    for id, (dz, dy, dx) in (("a", (0, 0, 0)), ("b", (1, 2, 4))):
        add_scan(store, id)
        fine = big[dz : dz + fine_grid[0], dy : dy + fine_grid[1], dx : dx + fine_grid[2]]
        embeddings.write_embedding(store, id, codec, fine, flat)
    points = np.array([[10, 12, 14], [4, 6, 10], [20, 18, 26]])
    pair = matching.read_embedding(store, "a"), points, matching.read_embedding(store, "b")
    want = points - 2 * np.array([1, 2, 4])
    np.testing.assert_allclose(matching.dense(*pair).points_zyx_vox, want + 0.5)
    assert np.abs(matching.dense(*pair, subcell=True).points_zyx_vox - want).max() <= 1


def test_matches_between_cells_are_found_between_cells(tmp_path):
    """Vectors that turn smoothly with the position: a shift by a third of a cell is seen."""
    store, codec = make_store(tmp_path / "store"), make_codec()
    codec.save(store)
    fine_grid, coarse_grid = grids()
    flat = np.broadcast_to(random_vectors((1, 1, 1), 4), (*coarse_grid, 16))
    directions, shift = np.random.default_rng(0).normal(size=(3, 16)) / 8, np.array([0.7, -0.7, 0.4])
    for id, offset in (("a", np.zeros(3)), ("b", shift)):
        add_scan(store, id)
        centres = (np.argwhere(np.ones(fine_grid, bool)) + 0.5) * 2 - 0.5
        fine = embeddings.normalise(np.cos((centres + offset) @ directions + np.arange(16))).reshape(*fine_grid, 16)
        embeddings.write_embedding(store, id, codec, fine, flat)
    points = np.random.default_rng(1).integers(4, np.array(SHAPE) - 4, size=(60, 3))
    pair = matching.read_embedding(store, "a"), points, matching.read_embedding(store, "b")
    errors = [matching.dense(*pair, subcell=subcell).points_zyx_vox - (points - shift) for subcell in (False, True)]
    coarse, fine = (np.linalg.norm(error, axis=1).mean() for error in errors)
    assert fine < 0.5 and fine < 0.5 * coarse
    np.testing.assert_allclose(matching.search(*pair).points_zyx_vox, points - shift + errors[1], atol=1e-3)


# ---------------------------------------------------------------- the hierarchical search


BODY = (104, 88, 120)  # 52 × 44 × 60 cells of 4 mm: 13 × 11 × 15 cubes


def smooth_vectors(grid_zyx, stride_zyx_vox, shift_zyx_vox, channels=16):
    """Waves of 60 to 200 mm, so that no two places are alike and neighbours are."""
    rng = np.random.default_rng(5)
    waves, phases = rng.normal(size=(3, channels)) / 25, rng.uniform(0, 6, size=channels)
    places = (np.argwhere(np.ones(grid_zyx, bool)) + 0.5) * stride_zyx_vox - 0.5 + shift_zyx_vox
    return embeddings.normalise(np.cos(places @ waves + phases)).reshape(*grid_zyx, channels).astype(np.float32)


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    """A body and the same 8, −6 and 10 voxels off."""
    store, codec = make_store(tmp_path_factory.mktemp("bodies") / "store"), make_codec()
    codec.save(store)
    ball = sum(((np.indices([n // 2 for n in BODY])[i] - BODY[i] / 4) / BODY[i] * 4.2) ** 2 for i in range(3)) < 1
    for id, shift in (("a", (0, 0, 0)), ("b", (8, -6, 10))):
        add_scan(store, id, BODY, body=ball)
        levels = zip(grids(BODY), (STRIDE, COARSE_STRIDE), strict=True)
        embeddings.write_embedding(store, id, codec, *(smooth_vectors(*level, shift) for level in levels))
    return store


@pytest.mark.parametrize("count", [1, 7, 200])
def test_the_fast_search_agrees_with_the_dense_one_and_looks_at_little(bodies, count):
    query, key = (matching.read_embedding(bodies, id) for id in "ab")
    cells = np.stack(np.unravel_index(query.body, query.grid_zyx), axis=1)
    points = 2 * cells[np.random.default_rng(count).permutation(len(cells))[:count]] + 0.5
    fast = matching.search(query, points, key)
    read = key.rows.nbytes
    exact = matching.dense(query, points, key, subcell=True)
    near = (np.abs(fast.points_zyx_vox - exact.points_zyx_vox) <= STRIDE).all(axis=1)
    assert near.mean() >= 0.95
    np.testing.assert_allclose(fast.scores[near], exact.scores[near], atol=2e-3)
    if count == 1:
        assert read < 0.05 * key.rows.array.nbytes


def test_order_and_company_of_the_points_matter_little(bodies):
    query, key = (matching.read_embedding(bodies, id) for id in "ab")
    points = np.random.default_rng(0).integers(36, 60, size=(90, 3))
    together = matching.search(query, points, key).points_zyx_vox
    turned = matching.search(query, points[::-1], key).points_zyx_vox[::-1]
    alone = np.concatenate([matching.search(query, point[None], key).points_zyx_vox for point in points])
    for other in (turned, alone):
        assert (np.abs(together - other).max(axis=1) < 0.01).mean() >= 0.95


def test_cycle_is_the_way_back_in_mm(bodies):
    query, key = (matching.read_embedding(bodies, id) for id in "ab")
    points = np.array([[52.0, 44.0, 60.0], [40.0, 50.0, 70.0]])
    found = matching.match(query, points, key)
    back = matching.search(key, found.points_zyx_vox, query).points_zyx_vox
    np.testing.assert_allclose(found.cycle_mm, np.linalg.norm(2.0 * (back - points), axis=1))
    assert (found.cycle_mm < 3).all()
    np.testing.assert_allclose(found.points_zyx_vox, points - [8, -6, 10], atol=1)
    assert (found.agreeing > 0.2).all()


def test_cells_are_read_from_the_store_only_once(bodies, monkeypatch):
    query, key = (matching.read_embedding(bodies, id) for id in "ab")
    reads, read_rows = [], bodies.read_rows
    monkeypatch.setattr(bodies, "read_rows", lambda id, name, rows: reads.append(id) or read_rows(id, name, rows))
    points = np.array([[52, 44, 60]])
    for _ in range(3):
        matching.search(query, points, key)
    assert sorted(reads) == ["a", "b"]


@pytest.mark.parametrize(
    "mm, factors",
    [
        pytest.param((4, 4, 4), ((2, 2, 2), (2, 2, 2)), id="published"),
        pytest.param((8, 8, 8), ((2, 2, 2),), id="tiny"),
        pytest.param((2, 4, 4), ((2, 1, 1), (2, 2, 2), (2, 2, 2)), id="thin slices"),
        pytest.param((20, 20, 20), ((1, 1, 1),), id="cells beyond a cube"),
    ],
)
def test_octree_orders_every_cell(mm, factors):
    tree = octree.Octree.of_cells(mm)
    assert tree.factors == factors
    grid = np.random.default_rng(0).normal(size=(9, 6, 11, 2))
    cubes = tree.cubes(grid)
    cell = np.array([8, 3, 10])
    cube, place = np.divmod(cell, tree.cube_zyx)
    np.testing.assert_array_equal(cubes[tuple(cube)][tree.slots[tuple(place)]], grid[tuple(cell)])
    np.testing.assert_array_equal(tree.places[tree.slots[tuple(place)]], place)
    sums = tree.sums(cubes.reshape(-1, *cubes.shape[3:]))
    assert [level.shape[1] for level in sums] == list(tree.counts[:-1])
    for level in sums:
        np.testing.assert_allclose(level.sum(axis=(0, 1)), grid.sum(axis=(0, 1, 2)))


@pytest.mark.parametrize("stride", [(2, 2, 2), (4, 4, 4), (2, 4, 4), (12, 12, 12)], ids=str)
def test_any_grid_can_be_searched(tmp_path, stride):
    shape = (49, 61, 70)
    store = make_store(tmp_path / "store")
    coarse_stride = tuple(4 * s for s in stride)
    levels = make_codec().fine, make_codec().coarse
    levels = [dataclasses.replace(x, stride_zyx_vox=s) for x, s in zip(levels, (stride, coarse_stride), strict=True)]
    codec = embeddings.Codec("a" * 64, (2.0, 2.0, 2.0), *levels)
    codec.save(store)
    add_scan(store, "a", shape)
    grids = [tuple(-(-n // s) for n, s in zip(shape, step, strict=True)) for step in (stride, coarse_stride)]
    vectors = [smooth_vectors(grid, step, 0) for grid, step in zip(grids, (stride, coarse_stride), strict=True)]
    embeddings.write_embedding(store, "a", codec, *vectors)
    one = matching.read_embedding(store, "a")
    stored = codec.fine.encode(vectors[0])
    np.testing.assert_array_equal(one.dense(), stored)
    cells = np.argwhere(np.ones(grids[0], bool))[::37]
    np.testing.assert_array_equal(one.stored(cells), stored[tuple(cells.T)])
    points = matching.points_of_cells(cells, stride, shape)
    off = np.abs(matching.search(one, points, one).points_zyx_vox - points) / stride
    assert (off <= 1).all(axis=1).mean() >= 0.95


def test_each_axis_is_limited_by_its_own_length():
    # The release limits x by the number of rows and y by that of columns.
    grid, shape = (3, 5, 9), (6, 10, 17)
    cells = matching.cell_of_points(np.array([[99, 99, 99], [-5, -5, -5]]), (2, 2, 2), grid)
    np.testing.assert_array_equal(cells, [[2, 4, 8], [0, 0, 0]])
    points = matching.points_of_cells(np.array([[2, 4, 8]]), (2, 2, 2), shape)
    np.testing.assert_allclose(points, [[4.5, 8.5, 16.0]])


def test_dense_search_is_the_argmax_whatever_the_slabs(store):
    query, key = (matching.read_embedding(store, id) for id in "ab")
    cells = np.argwhere(np.ones(query.grid_zyx))[::7]
    vectors = query.vectors(cells) / 2
    dense = (vectors @ key.keys.T).argmax(axis=1)
    for size in (1000, 37):
        index, _ = matching.nearest(vectors, (key.keys[i : i + size] for i in range(0, len(key.keys), size)))
        np.testing.assert_array_equal(index, dense)


def test_a_lattice_of_cells_holds_the_vectors_of_its_cells(store):
    embedding = matching.read_embedding(store, "a")
    axes = [np.array([0, 2, 4]), np.array([3]), np.arange(embedding.grid_zyx[2])]
    cells = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    want = embedding.vectors(cells.reshape(-1, 3)).reshape(*cells.shape[:3], -1)
    np.testing.assert_allclose(embedding.vectors_on(axes), want, atol=1e-6)


def test_score_is_the_mean_of_fine_and_upsampled_coarse_similarity(store):
    query, key = (matching.read_embedding(store, id) for id in "ab")
    point = np.array([[11, 6, 13]])
    match = matching.dense(query, point, key)
    cell, found = point[0] // 2, (match.points_zyx_vox[0] // 2).astype(int)
    fine = [e.codec.fine.decode(e.dense())[tuple(c)] for e, c in ((query, cell), (key, found))]
    ratios = tuple(f / c for f, c in zip(STRIDE, COARSE_STRIDE, strict=True))
    coarse = [
        np.stack(list(embeddings.upsampled_slabs(e.codec.coarse.decode(e.coarse), e.grid_zyx, ratios)))[tuple(c)]
        for e, c in ((query, cell), (key, found))
    ]
    assert match.scores[0] == pytest.approx((fine[0] @ fine[1] + coarse[0] @ coarse[1]) / 2, abs=1e-6)


def test_background_is_neither_stored_nor_found(tmp_path):
    store, codec = make_store(tmp_path / "store"), make_codec()
    codec.save(store)
    fine_grid, coarse_grid = grids()
    body = np.zeros(fine_grid, bool)
    body[3:9, 2:8, 4:10] = True
    fine, coarse = random_vectors(fine_grid, 0), random_vectors(coarse_grid, 0)
    for id, mask in (("whole", None), ("part", body)):
        add_scan(store, id, body=mask)
        embeddings.write_embedding(store, id, codec, fine, coarse)
    part = matching.read_embedding(store, "part")
    assert not part.dense()[~body].any() and part.dense()[body].any(axis=-1).all()
    points = np.random.default_rng(0).integers(0, SHAPE, size=(50, 3))
    for search in (matching.dense, matching.search):
        found = search(matching.read_embedding(store, "whole"), points, part).points_zyx_vox
        assert body[tuple(np.rint((found - 0.5) / 2).astype(int).T)].all()


def test_empty_body_is_a_clear_error(tmp_path):
    store, codec = make_store(tmp_path / "store"), make_codec()
    codec.save(store)
    fine_grid, coarse_grid = grids()
    add_scan(store, "empty", body=np.zeros(fine_grid, bool))
    embeddings.write_embedding(store, "empty", codec, random_vectors(fine_grid, 0), random_vectors(coarse_grid, 0))
    empty = matching.read_embedding(store, "empty")
    for search in (matching.dense, matching.search, matching.match):
        with pytest.raises(UserError, match="its embedding is empty"):
            search(empty, np.zeros((1, 3), int), empty)


def test_missing_embedding_is_a_clear_error(store):
    add_scan(store, "new")
    with pytest.raises(UserError, match="new has no embedding; run python -m"):
        matching.read_embedding(store, "new")


def test_an_embedding_of_another_embedder_is_refused(store):
    old = matching.read_embedding(store, "a")
    other = make_codec(embedder="b" * 64)
    other.save(store)
    with pytest.raises(UserError, match="embedded by"):
        matching.read_embedding(store, "b")
    fine_grid, coarse_grid = grids()
    embeddings.write_embedding(store, "b", other, random_vectors(fine_grid, 1), random_vectors(coarse_grid, 1))
    with pytest.raises(UserError, match="different embedders"):
        matching.match(old, np.zeros((1, 3), int), matching.read_embedding(store, "b"))


def test_interrupted_writing_counts_as_not_embedded(store, monkeypatch):
    codec, (fine_grid, coarse_grid) = embeddings.read_codec(store), grids()
    write = store.write_array

    def stop_at_coarse(id, name, *args, **kwargs):
        if name == "coarse":
            raise KeyboardInterrupt
        write(id, name, *args, **kwargs)

    monkeypatch.setattr(store, "write_array", stop_at_coarse)
    with pytest.raises(KeyboardInterrupt):
        embeddings.write_embedding(store, "a", codec, random_vectors(fine_grid, 5), random_vectors(coarse_grid, 5))
    assert embeddings.embedded_by(store, "a") is None
    assert embeddings.embedded_by(store, "b") == codec.hash


def test_codec_survives_the_store(store):
    codec = make_codec()
    read = embeddings.read_codec(store)
    assert read.hash == codec.hash
    np.testing.assert_array_equal(read.fine.projection, codec.fine.projection)


def test_a_full_set_of_directions_keeps_cosines():
    codec = make_codec(channels=16, dims=16)
    vectors = random_vectors((200,), 7)
    stored = codec.fine.decode(codec.fine.encode(vectors))
    assert np.abs(stored @ stored.T - vectors @ vectors.T).max() < 0.02


def test_projection_finds_the_subspace_that_the_vectors_lie_in():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(128, 24)))[0]
    vectors = embeddings.normalise(random_vectors((4000,), 1, channels=24) @ basis.T)
    level = embeddings.fit_level([vectors[:3700]], STRIDE, 24)
    unseen = vectors[3700:]
    stored = level.decode(level.encode(unseen))
    assert np.abs(stored @ stored.T - unseen @ unseen.T).max() < 0.02


def test_body_cells_at_a_wider_stride_cover_every_body_mask_cell():
    foreground = np.zeros((5, 4, 4), bool)
    foreground[4, 3, 0] = True
    cells = embeddings.body_cells(foreground, (3, 2, 2), (4, 4, 4))
    assert np.argwhere(cells).tolist() == [[2, 1, 0]]


def test_reader_keeps_within_its_bytes_and_pickles(store):
    one = matching.read_embedding(store, "a")
    reader = matching.EmbeddingReader(store, cache_bytes=one.nbytes)
    assert reader("a") is reader("a")
    first = reader("a")
    reader("b")
    assert reader("a") is not first
    roomy = matching.EmbeddingReader(store, cache_bytes=2 * one.nbytes)
    first = roomy("a")
    roomy("b")
    assert roomy("a") is first
    matching.search(roomy("b"), np.zeros((1, 3), int), first)  # reads cells, beyond the limit
    roomy("b")
    assert roomy("a") is not first
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader))("a").dense(), one.dense())


@pytest.mark.parametrize(
    "point, expected",
    [
        pytest.param([-0.5, -0.5, -0.5], [9.5, -0.5, -0.5], id="low corner to low corner"),
        pytest.param([9.5, 19.5, 4.5], [19.5, 9.5, 9.5], id="high corner to high corner"),
        pytest.param([4.5, 9.5, 2.0], [14.5, 4.5, 4.5], id="centre to centre"),
    ],
)
def test_relative_position(point, expected):
    box_a, box_b = ((0, 0, 0), (10, 20, 5)), ((10, 0, 0), (20, 10, 10))
    np.testing.assert_allclose(matching.relative_position(np.array([point]), box_a, box_b), [expected])
