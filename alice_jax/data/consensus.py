"""Refines matches by what their surroundings say: a smooth map that cycle-consistent neighbours agree on.

A single match errs where the body looks alike for centimetres: fat, muscle, bowel. Its neighbours err too, but each in
its own way, while the anatomy of one patient is a smooth deformation of another's. So some dozens of cells around a
point are matched there and back again, inside a window around the match; the nearer one returns to where it began, the
more it counts (fixed-point iteration as in UAE, arXiv 2311.15111, without its strict equality); and an affine map is
fitted to them, robustly, by iteratively reweighted least squares (Geman and McClure's weights, their scale falling step
by step). Where it takes the point is the match.
"""

import functools
from typing import NamedTuple

import numpy as np
from scipy import special

from alice_jax.data.cells import cell_of_points, peak_offsets
from alice_jax.data.embeddings import Embedding, in_body

NEIGHBOURS = 64
SPREAD_MM = 16.0  # standard deviation of the neighbours' distances along each axis
WINDOW_MM = 40.0  # on each side of a match its neighbours' are looked for
STEP_MM = 8.0  # cells of a window are this far apart, or one cell
CYCLE_MM = 6.0  # a neighbour that returns this far from where it began counts half
SCALES_MM = (24.0, 16.0, 11.0, 8.0, 6.0)  # residuals of this size count a quarter, in one iteration after the other
NOISE_MM, STRAIN = 8.0, 0.2  # expected errors of single matches, and deviations of the affine map from a shift


class Consensus(NamedTuple):
    """points_zyx_vox: (n, 3) float.  agreeing: (n,) share of the neighbours' weight that the map rests on."""

    points_zyx_vox: np.ndarray
    agreeing: np.ndarray


@functools.cache
def offsets_mm() -> np.ndarray:
    """(NEIGHBOURS, 3) evenly spread normal offsets of at most two standard deviations, always the same."""
    from scipy.stats import qmc  # here, since it takes a fifth of a second, and commands should answer at once

    uniform = qmc.Halton(3, scramble=True, seed=0).random(NEIGHBOURS)
    low = special.ndtr(-2)
    return SPREAD_MM * special.ndtri(low + (1 - 2 * low) * uniform)


class Window(NamedTuple):
    """A lattice of cells of one scan around a point.

    low_zyx, step_zyx: its first cell and the distance of its cells, in fine cells; shape_zyx: cells along each axis.
    vectors: (cells, 2·dims); body: (cells,) whether the cell holds a vector.
    """

    low_zyx: np.ndarray
    step_zyx: np.ndarray
    shape_zyx: tuple[int, ...]
    vectors: np.ndarray
    body: np.ndarray


def window(embedding: Embedding, point_zyx_vox: np.ndarray) -> Window:
    """The window around a voxel, cut at the borders of the grid."""
    codec, grid = embedding.codec, np.array(embedding.grid_zyx)
    stride = np.array(codec.fine.stride_zyx_vox)
    cell_mm = stride * codec.spacing_zyx_mm
    step = np.maximum(np.rint(STEP_MM / cell_mm).astype(int), 1)
    middle = cell_of_points(point_zyx_vox, codec.fine.stride_zyx_vox, embedding.grid_zyx)
    reach = np.rint(WINDOW_MM / (cell_mm * step)).astype(int)
    low = middle - step * np.minimum(reach, middle // step)
    counts = (middle - low) // step + 1 + np.minimum(reach, (grid - 1 - middle) // step)
    axes = [first + np.arange(count) * jump for first, count, jump in zip(low, counts, step, strict=True)]
    vectors = embedding.vectors_on(axes).reshape(np.prod(counts), -1)
    return Window(low, step, tuple(counts), vectors, in_body(vectors, codec))


def best_cells(queries: np.ndarray, inside: Window) -> np.ndarray:
    """(n, 3) fine cells, as floats: the peak of each query's (n, 2·dims) scores in a window, refined by a parabola."""
    scores = queries @ inside.vectors.T
    scores += np.where(inside.body, np.float32(0), -np.inf)
    best = scores.argmax(axis=1)
    at, shape = np.stack(np.unravel_index(best, inside.shape_zyx), axis=1), np.array(inside.shape_zyx)
    jumps = np.array([[-1], [1]]) * (shape[1] * shape[2], shape[2], 1)  # to the cells before and behind on each axis
    within = ((at > 0) & (at < shape - 1))[:, None]
    rows = np.arange(len(best))[:, None, None]
    beside = scores[rows, np.where(within, best[:, None, None] + jumps, best[:, None, None])]
    beside = np.where(within & np.isfinite(beside), beside, np.nan)
    offsets = peak_offsets(scores[rows[:, 0, 0], best], beside.swapaxes(1, 2).reshape(len(best), 6))
    return inside.low_zyx + (at + offsets) * inside.step_zyx


def consensus(query: Embedding, points_zyx_vox: np.ndarray, key: Embedding, found_zyx_vox: np.ndarray) -> Consensus:
    """Better matches for points (n, 3) of `query` that were found (n, 3) in `key` one by one.

    A point without enough neighbours in the body stays where it was found, with nothing agreeing.
    """
    spacing_mm, stride = np.array(query.codec.spacing_zyx_mm), np.array(query.codec.fine.stride_zyx_vox)
    moved, agreeing = np.array(found_zyx_vox, float), np.zeros(len(points_zyx_vox))
    for i, (point, found) in enumerate(zip(points_zyx_vox, found_zyx_vox, strict=True)):
        here, there = window(query, point), window(key, found)
        cells = np.floor((point + offsets_mm() / spacing_mm + 0.5) / stride).astype(int)
        cells = np.unique(cells[((cells >= 0) & (cells < query.grid_zyx)).all(axis=1)], axis=0)
        vectors = query.vectors(cells)
        inside = in_body(vectors, query.codec)
        if inside.sum() < 4 or not there.body.any():
            continue
        cells, vectors = cells[inside], vectors[inside]
        targets = best_cells(vectors, there)
        back = best_cells(key.vectors(np.rint(targets).astype(int)), here)
        cycle_mm = np.linalg.norm((back - cells) * stride * spacing_mm, axis=1)
        weights = 1 / (1 + (cycle_mm / CYCLE_MM) ** 2)
        places = (cells + 0.5) * stride - 0.5
        moves = (targets - cells) * stride
        shift_mm, agreed = robust_shift(
            ((places - point) * spacing_mm)[None], (moves * spacing_mm)[None], weights[None]
        )
        moved[i] = point + shift_mm[0] / spacing_mm
        agreeing[i] = agreed[0] / len(weights)
    return Consensus(np.clip(moved, 0, np.array(key.shape_zyx) - 1), agreeing)


def robust_shift(starts_mm: np.ndarray, moves_mm: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The move at the origin of robust affine fits to moves (n, neighbours, 3) at places (n, neighbours, 3).

    Args:
      weights: (n, neighbours), 0 for neighbours that do not exist; where all are 0 the move is 0.

    Returns:
      (n, 3) mm, and (n,) the weight of the neighbours that agree.

    >>> starts = np.array([[[0.0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 9], [0, 9, 9]]])
    >>> moves = np.full((1, 5, 3), 7.0)
    >>> moves[0, 0] = 90  # one that went astray
    >>> shift_mm, agreeing = robust_shift(starts, moves, np.ones((1, 5)))
    >>> shift_mm.round(1), agreeing.round(1)
    (array([[7., 7., 7.]]), array([4.]))
    """
    terms = np.concatenate([np.ones((*starts_mm.shape[:2], 1)), starts_mm], axis=-1)
    prior = np.diag([1e-6, *[(NOISE_MM / STRAIN) ** 2] * 3])
    fitted = np.broadcast_to(np.median(moves_mm, axis=1, keepdims=True), moves_mm.shape)
    coefficients, counted = np.zeros((len(terms), 4, 3)), weights
    for scale_mm in SCALES_MM:
        square = ((fitted - moves_mm) ** 2).sum(axis=-1) / scale_mm**2
        counted = weights / (1 + square) ** 2
        weighted = terms * counted[..., None]
        normal = np.einsum("nki,nkj->nij", weighted, terms) + prior
        coefficients = np.linalg.solve(normal, np.einsum("nki,nkj->nij", weighted, moves_mm))
        fitted = terms @ coefficients
    return coefficients[:, 0], counted.sum(axis=1)
