"""Finds the points of one scan in another by their embeddings (Alice [A] section 3.1; SAM, arXiv 2012.02383).

The score of a key cell is the mean of the fine and the coarse cosine similarity to the query's vector, the coarse
vectors being interpolated trilinearly to the fine grid and normalised again; the match is the cell of the highest
score. Cells outside the body are not searched. `dense` looks at all of them, as the paper does; `search` goes down from
cubes of 16 mm to the cells of the best parts of the best cubes and finds nearly always the same (benchmarks/mining.py);
`match` improves on both by what the neighbours of a point say.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from alice_jax.data.cells import cell_of_points, peak_offsets, points_of_cells
from alice_jax.data.consensus import consensus
from alice_jax.data.embeddings import Embedding, EmbeddingReader, in_body, read_embedding
from alice_jax.errors import UserError

__all__ = [
    "Embedding",
    "EmbeddingReader",
    "Found",
    "Match",
    "cell_of_points",
    "cycle_mm",
    "dense",
    "match",
    "nearest",
    "peak_offsets",
    "points_of_cells",
    "read_embedding",
    "relative_position",
    "search",
]

EPSILON = 1e-12
SLAB_CELLS = 16384  # keys searched at once: 4 MB, and the scores of 64 queries another 4 MB
TRUSTED_SCORE, TRUSTED_CYCLE_MM, TRUSTED_AGREEING = 0.7, 10.0, 0.2
BEAM = 16  # nodes of each level that a query goes down to
SAMPLED = 8 * BEAM  # maxima from which the least of the good scores is estimated
GROUP = 32  # queries that go down together, each looking at the nodes of all


class Found(NamedTuple):
    """Where n points are in the key scan, each searched alone: points_zyx_vox (n, 3) float, scores (n,) in [−1, 1]."""

    points_zyx_vox: np.ndarray
    scores: np.ndarray


class Match(NamedTuple):
    """Where n points are in the key scan, and how far that can be trusted.

    points_zyx_vox: (n, 3) float.
    scores: (n,) float in [−1, 1].
    cycle_mm: (n,) float, how far from a point the search back from its match ends.
    agreeing: (n,) float in [0, 1], the share of its neighbours' weight that agrees.
    """

    points_zyx_vox: np.ndarray
    scores: np.ndarray
    cycle_mm: np.ndarray
    agreeing: np.ndarray

    @property
    def trusted(self) -> np.ndarray:
        """(n,) bool: similar enough, found from there again, and not alone."""
        return (
            (self.scores >= TRUSTED_SCORE) & (self.cycle_mm <= TRUSTED_CYCLE_MM) & (self.agreeing >= TRUSTED_AGREEING)
        )


def nearest(queries: np.ndarray, slabs: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Index and value of the largest dot product of each query with any of the keys, the first of equals.

    queries: (n, dims).  slabs: the keys (cells, dims), some at a time.

    >>> nearest(np.eye(2), iter([np.array([[1.0, 0.0]]), np.array([[0.0, 2.0], [1.0, 0.0]])]))
    (array([0, 1]), array([1., 2.]))
    """
    best = np.full(len(queries), -np.inf, queries.dtype)
    index = np.zeros(len(queries), int)
    start = 0
    for keys in slabs:
        scores = queries @ keys.T
        here = scores.argmax(axis=1)
        value = scores[np.arange(len(queries)), here]
        better = value > best
        index[better], best[better] = start + here[better], value[better]
        start += len(keys)
    return index, best


def match(query: Embedding, points_zyx_vox: np.ndarray, key: Embedding) -> Match:
    """The project's matcher: where the points (n, 3) of `query` are in `key`, and how far that can be trusted.

    Each point is searched alone, what its neighbours agree on takes the place of that (see `consensus`), and a search
    back from there tells whether it leads to where it began.

    Raises:
      UserError: the embeddings are of different embedders, or one holds no body.

    Example:
      found = match(reader("a"), points_zyx_vox, reader("b"))
      reliable = found.points_zyx_vox[found.trusted]
    """
    alone = search(query, points_zyx_vox, key).points_zyx_vox
    points, agreeing = consensus(query, np.asarray(points_zyx_vox, float), key, alone)
    scores = np.einsum("nc,nc->n", query.vectors_at(points_zyx_vox), key.vectors_at(points)) / 2
    return Match(points, scores, cycle_mm(query, points_zyx_vox, key, points), agreeing)


def cycle_mm(query: Embedding, points_zyx_vox: np.ndarray, key: Embedding, found_zyx_vox: np.ndarray) -> np.ndarray:
    """(n,) how far from points (n, 3) of `query` the search back from their matches (n, 3) in `key` ends."""
    back = search(key, found_zyx_vox, query).points_zyx_vox
    return np.linalg.norm((back - points_zyx_vox) * query.codec.spacing_zyx_mm, axis=1)


def dense(query: Embedding, points_zyx_vox: np.ndarray, key: Embedding, subcell: bool = False) -> Found:
    """Every body cell of `key` is compared with every point (n, 3), in fp32, as in the paper.

    Args:
      subcell: read the query between the cells' centres, and move the match to the peak of a parabola through the
        scores of its neighbours, as `search` does; otherwise cells are matched to cells.
    """
    _comparable(query, key)
    if subcell:
        vectors = query.vectors_at(points_zyx_vox) / 2
    else:
        vectors = query.vectors(cell_of_points(points_zyx_vox, query.codec.fine.stride_zyx_vox, query.grid_zyx)) / 2
    slabs = (key.keys[start : start + SLAB_CELLS] for start in range(0, len(key.keys), SLAB_CELLS))
    index, scores = nearest(vectors, slabs)
    cells = np.stack(np.unravel_index(key.body[index], key.grid_zyx), axis=1)
    peaks = peak_offsets(scores, _scores_beside(vectors, cells, key)) if subcell else 0.0
    return _found(cells + peaks, scores, key)


def search(query: Embedding, points_zyx_vox: np.ndarray, key: Embedding) -> Found:
    """The match of each point (n, 3) without looking at the whole of `key`; points near each other cost the least.

    All cubes of the key are compared by their mean vectors, then the parts of the `BEAM` best of each point, and so on
    down to the cells; the match is refined below a cell by a parabola.
    """
    _comparable(query, key)
    vectors = query.vectors_at(points_zyx_vox) / 2
    scores = vectors @ key.cube_vectors.T
    order = np.argsort(scores.argmax(axis=1)) if len(vectors) > GROUP else np.arange(len(vectors))
    cells, best = np.empty((len(vectors), 3), int), np.empty(len(vectors), np.float32)
    for start in range(0, len(order), GROUP):
        some = order[start : start + GROUP]
        cells[some], best[some] = _descend(vectors[some], scores[some], key)
    return _found(cells + peak_offsets(best, _scores_beside(vectors, cells, key)), best, key)


def _comparable(query: Embedding, key: Embedding) -> None:
    if query.codec.hash != key.codec.hash:
        raise UserError(
            f"scans {query.id} and {key.id}: embedded by different embedders ({query.codec.hash[:12]}, "
            f"{key.codec.hash[:12]}); run alice_jax.embed on both with the same workdir"
        )
    if not len(key.cube_cells):
        raise UserError(
            f"scan {key.id}: its embedding is empty, so nothing can be matched in it; check its foreground in the store"
        )


def _found(cells_zyx: np.ndarray, scores: np.ndarray, key: Embedding) -> Found:
    points = points_of_cells(cells_zyx, key.codec.fine.stride_zyx_vox, key.shape_zyx)
    return Found(points, scores)


# ---------------------------------------------------------------- down the octree


def _descend(vectors: np.ndarray, scores: np.ndarray, key: Embedding) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) fine cells, the best of those in the good parts of the good cubes, and their scores (n,).

    vectors: (n, 2·dims).  scores: (n, cubes), of the cubes' mean vectors.
    """
    codec, tree, dims = key.codec, key.codec.octree, len(key.codec.fine.step)
    parents = _good(scores)  # nodes; one of any level is cube · nodes of a cube + place in the cube
    means = key.cube_vectors.take(parents, axis=0)
    key.rows.load(parents)
    guided = vectors * codec.step
    for level, start in enumerate(tree.starts[:-1], 1):
        stored = key.guide[:, start : start + tree.counts[level]]
        nodes, rows = _children(parents, stored, tree.counts[level - 1])
        rows = rows.astype(np.float32)
        kept = _good(guided @ rows.T)
        parents, means = nodes[kept], rows.take(kept, axis=0) * codec.step
    nodes, rows = _children(parents, key.cells, tree.counts[-2])
    rows = rows * codec.fine.step
    length = np.sqrt(np.einsum("nc,nc->n", rows, rows))
    fine = vectors[:, :dims] @ rows.T / np.maximum(length, EPSILON)
    fine[:, length == 0] = -np.inf
    # First with the mean coarse vector of the cells' parent, which is near their own and at hand.
    some = _good(fine + np.repeat(vectors[:, dims:] @ means[:, dims:].T, tree.fans[-1], axis=1))
    cube, place = np.divmod(nodes[some], tree.counts[-1])
    cells = key.cube_cells[cube] + tree.places[place]
    exact = fine[:, some] + vectors[:, dims:] @ key.coarse_at(cells).T
    best = exact.argmax(axis=1)
    return cells[best], exact[np.arange(len(best)), best]


def _good(scores: np.ndarray) -> np.ndarray:
    """Columns that are among the `BEAM` best of any row, and some more, ascending."""
    columns = scores.shape[1]
    if columns <= BEAM:
        return np.arange(columns)
    if columns > 2 * SAMPLED:  # the BEAM-th best of so many maxima is at most that of all, and found sooner
        maxima = scores[:, : columns // SAMPLED * SAMPLED].reshape(len(scores), -1, SAMPLED).max(axis=1)
    else:
        maxima = scores
    least = np.partition(maxima, -BEAM, axis=1)[:, -BEAM, None]
    return np.flatnonzero((scores >= least).any(axis=0))


def _children(parents: np.ndarray, stored: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """All children of the parents, and their rows of `stored` (cubes, nodes of their level, dims).

    count: of nodes of the parents' level in a cube.
    """
    fan = stored.shape[1] // count
    families = stored.reshape(len(stored), count, -1)  # a view: siblings lie together
    nodes = (parents[:, None] * fan + np.arange(fan)).ravel()
    return nodes, families[np.divmod(parents, count)].reshape(len(nodes), -1)


# ---------------------------------------------------------------- around a cell

_SIDES = np.array([[-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1]])


def _scores_beside(vectors: np.ndarray, cells_zyx: np.ndarray, key: Embedding) -> np.ndarray:
    """(n, 6) scores of the cells before and behind along z, y and x; NaN where that is not in the body."""
    at = cells_zyx[:, None] + _SIDES
    inside = ((at >= 0) & (at < key.grid_zyx)).all(axis=-1)
    at[~inside] = 0
    keys = key.vectors(at.reshape(-1, 3)).reshape(*inside.shape, -1)
    inside &= in_body(keys, key.codec)
    return np.where(inside, np.einsum("nc,nkc->nk", vectors, keys), np.nan)


# ---------------------------------------------------------------- without an embedding


def relative_position(points_zyx_vox: np.ndarray, box_a: np.ndarray, box_b: np.ndarray) -> np.ndarray:
    """The baseline without any embedding: the point at the same relative position of the other body's box.

    Args:
      points_zyx_vox: (n, 3) in scan a.
      box_a, box_b: (2, 3) foreground boxes, half-open, in voxels of each scan.

    >>> relative_position(np.array([[4.5, 4.5, 0]]), [[0, 0, 0], [10, 10, 10]], [[0, 0, 0], [20, 10, 10]])
    array([[9.5, 4.5, 0. ]])
    """
    (a_low, a_high), (b_low, b_high) = np.asarray(box_a, float), np.asarray(box_b, float)
    fraction = (np.asarray(points_zyx_vox) + 0.5 - a_low) / (a_high - a_low)
    return b_low + fraction * (b_high - b_low) - 0.5
