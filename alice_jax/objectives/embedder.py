"""Training of the anatomical embedder: contrast at two levels (SAM, arXiv 2012.02383, section III-C).

A positive is a pair of cells, one of either view, that show the same place of the body. Each of the two is drawn to
the other and pushed from cells of the other's view that lie farther away than the ignore radius: InfoNCE, in both
directions, at the fine and at the coarse level. Departures from the paper, so that training asks what matching asks:
coarse vectors are compared where matching reads them, interpolated at fine cells, which makes a coarse positive exact;
and a third, joint term contrasts by the very score of matching, the mean of both similarities.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alice_jax.data.upsampling import centres, linear
from alice_jax.models.embedder import Embedder, strides_zyx
from alice_jax.models.layers import l2_normalise
from alice_jax.objectives import Batch, Objective

Tree = Any
EXCLUDED = -1e9  # similarity of what is no negative: finite, so that its gradient is 0 and not NaN
ITSELF = 13  # of the 27 cells around one, the middle


@dataclasses.dataclass(frozen=True)
class Contrast:
    """What is contrasted at one level.

    Attributes:
      weight: of the term; at 0 it is not computed.
      temperature: divides the similarities.
      spread_mm: standard deviation over which the positive is spread among the cells around it; 0: one cell alone.
      ignore_mm: cells nearer than this to the positive are no negatives.
      hard_pool: negatives come from this many cells, the most similar by the matching score (0: from all).
      negatives: this many of the pool, drawn at random (0: all of it).
      other_volumes: further negatives from another scan of the batch.
    """

    weight: float = 1.0
    temperature: float = 0.5
    spread_mm: float = 0.0
    ignore_mm: float = 3.0
    hard_pool: int = 2000
    negatives: int = 500
    other_volumes: int = 0


def info_nce(positives: jax.Array, shares: jax.Array, negatives: jax.Array, temperature: float) -> jax.Array:
    """Cross-entropy of softmax(s/τ) over similarities s of positives and negatives: InfoNCE, arXiv 1807.03748.

    positives, shares: (…, p), the shares of the target, which sum to 1.  negatives: (…, n), whose share is 0.

    >>> one, alike = jnp.ones(1), jnp.ones(3)
    >>> round(float(info_nce(one, one, alike, 0.5)), 4)  # one of four alike: log 4
    1.3863
    """
    logits = jnp.concatenate([positives, negatives], axis=-1) / temperature
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(shares * positives, axis=-1) / temperature


def cells_around(cells: jax.Array, grid_zyx: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(n, 27) flat indices of flat cells (n,) and all that touch them, and which of these lie in the grid.

    >>> around, inside = cells_around(jnp.array([0]), (2, 2, 2))
    >>> int(around[0, 13]), int(inside.sum())  # the cell itself is in the middle
    (0, 8)
    """
    steps = np.array(list(np.ndindex(3, 3, 3))) - 1
    at = jnp.stack(jnp.unravel_index(cells, grid_zyx), axis=-1)[:, None] + steps
    inside = jnp.all((at >= 0) & (at < np.array(grid_zyx)), axis=-1)
    at = jnp.clip(at, 0, np.array(grid_zyx) - 1)
    return jnp.ravel_multi_index(tuple(jnp.moveaxis(at, -1, 0)), grid_zyx, mode="clip"), inside


def upsample_coarse(coarse: jax.Array, grid_zyx: tuple[int, ...], ratios_zyx: tuple[float, ...]) -> jax.Array:
    """(batch, z, y, x, c) on the fine grid as matching does it: trilinear, half-pixel centres, normalised again."""
    x = coarse
    for axis, (size, ratio) in enumerate(zip(grid_zyx, ratios_zyx, strict=True), start=1):
        weights = jnp.asarray(linear(centres(np.arange(size), x.shape[axis], ratio), x.shape[axis]))
        x = jnp.moveaxis(jnp.tensordot(x, weights, axes=(axis, 1)), -1, axis)
    return l2_normalise(x)


def choose_negatives(
    similarity: jax.Array, ranking: jax.Array, allowed: jax.Array, contrast: Contrast, key: jax.Array
) -> jax.Array:
    """(anchors, count) similarities of the negatives, `EXCLUDED` where there are too few.

    similarity, ranking, allowed: (anchors, candidates); the pool is the `hard_pool` largest of `ranking`.
    """
    similarity = jnp.where(allowed, similarity, EXCLUDED)
    if 0 < contrast.hard_pool < similarity.shape[1]:
        _, index = jax.lax.top_k(jnp.where(allowed, ranking, EXCLUDED), contrast.hard_pool)
        similarity = jnp.take_along_axis(similarity, index, axis=1)
    if 0 < contrast.negatives < similarity.shape[1]:
        similarity = similarity[:, jax.random.permutation(key, similarity.shape[1])[: contrast.negatives]]
    return similarity


def direction_terms(
    anchor_view: Tree,
    other_view: Tree,
    weights: jax.Array,
    key: jax.Array,
    contrasts: dict[str, Contrast],
    candidates: int,
    grid_zyx: tuple[int, ...],
) -> dict[str, jax.Array]:
    """Losses and metrics of one sample in one direction.

    Args:
      anchor_view, other_view: "fine" and "coarse" (cells, c) unit vectors, "positions" (cells, 3) mm, "body" (cells,)
        and "pairs" (pairs,) cells; `other_view` also "others", {level: (count, c)} vectors of another scan.
      weights: (pairs,).
      candidates: cells that may become negatives, drawn at random (0: all).
      grid_zyx: of the cells.
    """
    anchors, partners = anchor_view["pairs"], other_view["pairs"]
    cells = other_view["body"].shape[0]
    key_cells, key_negatives = jax.random.split(key)
    every = not 0 < candidates < cells
    chosen = jnp.arange(cells) if every else jax.random.randint(key_cells, (candidates,), 0, cells)
    around, inside = cells_around(partners, grid_zyx)
    inside &= other_view["body"][around]
    near, similarity = {}, {}
    for level in ("fine", "coarse"):
        queries = anchor_view[level][anchors]
        near[level] = jnp.einsum("pc,pnc->pn", queries, other_view[level][around])
        similarity[level] = queries @ other_view[level][chosen].T
    near["joint"] = (near["fine"] + near["coarse"]) / 2
    similarity["joint"] = (similarity["fine"] + similarity["coarse"]) / 2
    ranking, body = jax.lax.stop_gradient(similarity["joint"]), other_view["body"][chosen]
    at, places = anchor_view["positions"][anchors], other_view["positions"]
    square_mm = jnp.maximum(jnp.sum(at**2, 1)[:, None] + jnp.sum(places[chosen] ** 2, 1) - 2 * at @ places[chosen].T, 0)
    near_square_mm = jnp.sum((at[:, None] - places[around]) ** 2, axis=-1)

    average = lambda x: jnp.sum(weights * x) / jnp.maximum(jnp.sum(weights), 1)  # noqa: E731
    terms = {}
    for index, (level, contrast) in enumerate(contrasts.items()):
        if not contrast.weight:
            continue
        allowed = body & (square_mm > contrast.ignore_mm**2)
        key_level = jax.random.fold_in(key_negatives, index)
        negatives = choose_negatives(similarity[level], ranking, allowed, contrast, key_level)
        if level in other_view["others"]:
            others = anchor_view[level][anchors] @ other_view["others"][level].T
            negatives = jnp.concatenate([negatives, others], axis=1)
        if contrast.spread_mm:
            positives = jnp.where(inside, near[level], EXCLUDED)
            shares = jax.nn.softmax(jnp.where(inside, -near_square_mm / (2 * contrast.spread_mm**2), EXCLUDED))
        else:
            positives = near[level][:, ITSELF : ITSELF + 1]
            shares = jnp.ones_like(positives)
        terms[f"loss_{level}"] = average(info_nce(positives, shares, negatives, contrast.temperature))
    # How far off matching would be here, if all cells were the candidates and those around the right one.
    scores = jnp.concatenate([jnp.where(inside, near["joint"], EXCLUDED), jnp.where(body, ranking, EXCLUDED)], axis=1)
    best = jnp.argmax(scores, axis=1)[:, None]
    found_mm = jnp.sqrt(jnp.take_along_axis(jnp.concatenate([near_square_mm, square_mm], axis=1), best, axis=1)[:, 0])
    terms["matching_error_mm"] = average(found_mm)
    terms["positive_similarity"] = average(near["joint"][:, ITSELF])
    return terms


def vectors_of_others(
    levels: dict[str, jax.Array], body: jax.Array, contrasts: dict[str, Contrast], key: jax.Array
) -> dict[str, jax.Array]:
    """{level: (batch, 2, count, c)} random body cells of the neighbouring sample; only levels that ask for some.

    levels: (batch, 2, cells, c); body: (batch, 2, cells). A batch of one has no neighbour and gets zero vectors.
    """
    drawn = {}
    for index, (level, vectors) in enumerate(levels.items()):
        count = contrasts[level].other_volumes if level in contrasts else 0
        if count:
            order = jax.random.uniform(jax.random.fold_in(key, index), body.shape) + body
            _, cells = jax.lax.top_k(order, count)
            own = jnp.take_along_axis(vectors, cells[..., None], axis=2)
            drawn[level] = jnp.roll(own, 1, axis=0) * (len(body) > 1)
    return drawn


def make(
    model: Embedder,
    contrasts: dict[str, Contrast],
    *,
    candidates: int,
    statistics_momentum: float,
    optimizer: optax.GradientTransformation,
    schedules: dict[str, Any],
    start: Tree | None = None,
) -> Objective:
    """The objective for batches of `data.embedder_views.EmbedderSampler`.

    Args:
      contrasts: by level: "fine", "coarse", "joint".
      candidates: cells of the other view that may become negatives, drawn at random (0: all).
      statistics_momentum: of the running mean and variance of the batch norms, which live in `extra`.
      start: {"params", "batch_stats"} to start from instead of random values.
    """
    fine_stride, coarse_stride = strides_zyx(model)
    ratios = tuple(f / c for f, c in zip(fine_stride, coarse_stride, strict=True))

    def init(key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        variables = model.init(key, batch["volumes"][:1, 0]) if start is None else jax.tree.map(jnp.asarray, start)
        return variables["params"], {"batch_stats": variables["batch_stats"]}

    def loss(params: Tree, extra: Tree, batch: Batch, key: jax.Array, step: jax.Array, train: bool):
        volumes = batch["volumes"].reshape(-1, *batch["volumes"].shape[2:])  # (batch · 2, d, h, w, 1)
        if train:
            (fine, coarse), stats = model.apply({"params": params, **extra}, volumes, True, mutable=["batch_stats"])
        else:
            (fine, coarse), stats = model.apply({"params": params, **extra}, volumes), {}
        coarse = upsample_coarse(coarse, fine.shape[1:4], ratios)
        samples = len(batch["volumes"])
        flat = lambda x: x.reshape(samples, 2, -1, x.shape[-1])  # noqa: E731  (batch, 2, cells, c)
        views = {
            "fine": flat(fine),
            "coarse": flat(coarse),
            "positions": flat(batch["positions_mm"]),
            "body": batch["body"].reshape(samples, 2, -1),
            "pairs": batch["pairs"],
        }
        levels = {level: views[level] for level in ("fine", "coarse")}
        others = vectors_of_others(levels, views["body"], contrasts, jax.random.fold_in(key, 0))
        swapped = jax.tree.map(lambda x: x[:, ::-1], views | {"others": others})
        keys = jax.random.split(jax.random.fold_in(key, 1), (samples, 2))

        def one(anchor_view, other_view, weights, key):
            return direction_terms(anchor_view, other_view, weights, key, contrasts, candidates, fine.shape[1:4])

        both_directions = jax.vmap(one, in_axes=(0, 0, None, 0))
        terms = jax.vmap(both_directions)(views, swapped, batch["weights"], keys)
        metrics = {name: jnp.mean(value) for name, value in terms.items()}
        total = sum(c.weight * metrics[f"loss_{level}"] for level, c in contrasts.items() if c.weight)
        return total, (stats, metrics)

    def update(new_params: Tree, extra: Tree, stats: Tree, step: jax.Array) -> Tree:
        blend = lambda old, new: statistics_momentum * old + (1 - statistics_momentum) * new  # noqa: E731
        return jax.tree.map(blend, extra, stats)

    def features(params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        volumes = batch["volumes"].reshape(-1, *batch["volumes"].shape[2:])
        levels: Any = model.apply({"params": params, **extra}, volumes)
        fine, coarse = levels
        channels = fine.shape[-1]
        pairs = batch["pairs"].reshape(len(volumes), -1, 1)  # all fine cells would be too many
        fine = jnp.take_along_axis(fine.reshape(len(volumes), -1, channels), pairs, axis=1)
        return {"fine": fine.reshape(-1, channels), "coarse": coarse.reshape(-1, channels)}

    return Objective(init=init, loss=loss, update=update, optimizer=optimizer, schedules=schedules, features=features)
