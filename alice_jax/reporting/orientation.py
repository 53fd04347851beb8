"""Finds scans that resemble the others only when they are turned: an axis flipped, or two of them swapped.

Those that show nothing, and copies of one another, are found on the way.

No embedding is asked, since one that knows where in a volume a point lies matches a flipped body as if it were none.
Each body is reduced to a small picture of its inside in which only the outline's size is normalised; two bodies are
compared where they overlap best along z. A scan whose nearest others fit one of its 47 turned copies clearly better
than the scan itself is named.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from alice_jax.data.scan import Scan
from alice_jax.data.store import Store
from alice_jax.reporting import planes
from alice_jax.reporting.page import NAMED, Check, listed

STEP_MM, DEPTH, WIDTH = 10.0, 12, 16  # of the small picture: mm along z, cells along y and x
MOST_CELLS = 100  # along z
SMALL_MM = 3.0  # voxels below this are read every second one
OVERLAP = 0.7  # of the shorter of two bodies, at least
NEAREST = 5  # others that decide
FEWEST_SCANS = 4
ALIKE, CLEARLY = 0.45, 0.1  # a turned copy must be this similar, and by so much more than the scan as it is
SAME, FLAT = 0.9999, 0.01  # similarity of copies; the range of greys in a body that shows nothing
AXES = ("inferior-superior", "anterior-posterior", "right-left")  # z, y, x


@dataclasses.dataclass(frozen=True)
class Turn:
    """Swaps axes of a (z, y, x) array, `axes` being those it takes, then flips some."""

    axes: tuple[int, ...] = (0, 1, 2)
    flips: tuple[bool, ...] = (False, False, False)

    @property
    def words(self) -> str:
        """What is wrong with a scan that this turn mends.

        >>> Turn(flips=(True, False, False)).words, Turn(axes=(0, 2, 1)).words
        ('inferior-superior flipped', 'anterior-posterior and right-left swapped')
        """
        moved = [AXES[i] for i in range(3) if self.axes[i] != i]
        flipped = [AXES[i] for i in range(3) if self.flips[i]]
        words = [f"{' and '.join(moved)} swapped"] if moved else []
        return ", ".join(words + ([f"{' and '.join(flipped)} flipped"] if flipped else []))


TURNS = [
    Turn(axes, flips)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((False, True), repeat=3)
]


@dataclasses.dataclass(frozen=True)
class Turned:
    """A scan that fits the others as it is with a similarity of `upright`, and with `similarity` after `turn`."""

    id: str
    turn: Turn
    upright: float
    similarity: float


def judge(ids: Sequence[str], values: np.ndarray) -> tuple[list[Turned], list[str]]:
    """Those that resemble the others only when they are turned, and those that resemble none.

    Args:
      values: `similarities` of these scans.
    """
    count = min(NEAREST, max(1, (len(ids) - 1) // 2))
    turned, unlike = [], []
    for id, mine in zip(ids, values, strict=True):
        nearest = np.sort(mine[:, ~np.isnan(mine[0])], axis=1)[:, -count:].mean(axis=1)
        best = int(nearest.argmax())
        if nearest[best] < ALIKE:
            unlike.append(id)
        elif nearest[best] - nearest[0] >= CLEARLY:
            turned.append(Turned(id, TURNS[best], float(nearest[0]), float(nearest[best])))
    return turned, unlike


def inspect(store: Store, ids: Sequence[str]) -> tuple[list[Check], dict[str, str]]:
    """Checks of these scans, and what is wrong with those that show nothing, the same as another, or are turned."""
    bodies = {id: inside(store, id) for id in ids}
    of = "all" if len(ids) == len(store.ids()) else f"{len(ids)} of {len(store.ids())}"
    guilty = {id: "one value everywhere" for id, body in bodies.items() if np.ptp(body) < FLAT}
    words = f"{listed(list(guilty))}: one value everywhere" if guilty else f"{of} scans do"
    found = [Check("bad" if guilty else "good", "Scans hold pictures", words)]
    ids = [id for id in ids if id not in guilty]
    if len(ids) < FEWEST_SCANS:
        return found, guilty
    values = similarities([small(bodies[id], store.scan(id)) for id in ids])
    twins = {ids[j]: ids[i] for i, j in np.argwhere(values[:, 0] > SAME) if i < j}
    if twins:
        words = listed([f"{one} and {other}" for one, other in twins.items()])
        found.append(Check("bad", "Scans differ", f"{words}: the same picture under two names"))
    turned, unlike = judge(ids, values)
    words = f"of {of} scans none resembles the others better when it is turned"
    if turned:
        words = "; ".join(f"{one.id}: {one.turn.words}" for one in turned[:NAMED])
        words += f"; {len(turned) - NAMED} more" if len(turned) > NAMED else ""
        words += (
            f". As it is, {turned[0].id} is {turned[0].upright:.2f} similar to the scans that resemble it most, "
            f"turned {turned[0].similarity:.2f}"
        )
    if unlike:
        words += f"; {len(unlike)} resemble no other and cannot be judged ({unlike[0]} for one)"
    found.append(Check("bad" if turned else "good", "Axes agree", words))
    guilty |= {id: f"the same as {other}" for id, other in twins.items()}
    return found, guilty | {one.id: one.turn.words for one in turned}


# ---------------------------------------------------------------- small pictures


def inside(store: Store, id: str) -> np.ndarray:
    """The body in its box, each second voxel where they are small: grey less the body's mean, 0 outside of it."""
    scan, step = store.scan(id), _step(store.scan(id))
    grey = planes.tone(store.read_volume(id)[tuple(slice(None, None, s) for s in step)])
    body = store.foreground(id)
    for axis, size in enumerate(grey.shape):
        body = body.repeat(2 // step[axis], axis).take(range(size), axis)
    if not body.any():
        return np.zeros((1, 1, 1))
    box = np.array(scan.foreground_box_zyx_vox)
    region = tuple(slice(low // s, -(-high // s)) for (low, high), s in zip(box.T, step, strict=True))
    return np.where(body, grey - grey[body].mean(), 0)[region]


def _step(scan: Scan) -> list[int]:
    return [2 if spacing < SMALL_MM else 1 for spacing in scan.spacing_zyx_mm]


def small(body: np.ndarray, scan: Scan) -> list[np.ndarray]:
    """float32 (cells, DEPTH, WIDTH) for each of `TURNS`, of what `inside` gives."""
    pictures = []
    size_mm = np.array(body.shape) * _step(scan) * scan.spacing_zyx_mm
    for axes in itertools.permutations(range(3)):
        shape = (int(np.clip(round(size_mm[axes[0]] / STEP_MM), 2, MOST_CELLS)), DEPTH, WIDTH)
        picture = resized(body.transpose(axes), shape).astype(np.float32)
        for turn in (turn for turn in TURNS if turn.axes == axes):
            pictures.append(np.flip(picture, tuple(axis for axis in range(3) if turn.flips[axis])))
    return pictures


def resized(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Means over the equal parts that `shape` divides an array into.

    >>> resized(np.array([1.0, 3, 5]), (2,)).round(2).tolist()
    [1.67, 4.33]
    """
    for axis, parts in enumerate(shape):
        edges = np.linspace(0, array.shape[axis], parts + 1)
        below = np.minimum(edges.astype(int), array.shape[axis] - 1)
        sums = np.cumsum(np.insert(array, 0, 0, axis=axis), axis=axis)
        share = (edges - below).reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        upto = sums.take(below, axis) + share * array.take(below, axis)
        array = np.diff(upto, axis=axis) * parts / array.shape[axis]
    return array


# ---------------------------------------------------------------- comparison


def similarities(pictures: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """(scans, turns, others): the cosine of each turned picture and each other one as it is, at their best overlap."""
    upright = [turns[0].reshape(len(turns[0]), -1) for turns in pictures]
    every = np.concatenate(upright)
    ends = np.cumsum([len(picture) for picture in upright])
    values = np.full((len(pictures), len(TURNS), len(pictures)), np.nan)
    for i, turns in enumerate(pictures):
        for k, picture in enumerate(turns):
            mine = picture.reshape(len(picture), -1)
            products = mine @ every.T
            for j, other in enumerate(upright):
                if j != i:
                    values[i, k, j] = _cosine(mine, other, products[:, ends[j] - len(other) : ends[j]])
    return values


def _cosine(first: np.ndarray, second: np.ndarray, products: np.ndarray) -> float:
    """The highest over all shifts along z. products: (first's, second's cells along z)."""
    shifts, overlap = _shifts(*products.shape)
    number = len(overlap)
    shared = np.bincount(shifts, products.ravel(), number)
    squares = [
        np.bincount(shifts, np.broadcast_to(square, products.shape).ravel(), number)
        for square in ((first**2).sum(axis=1)[:, None], (second**2).sum(axis=1)[None])
    ]
    enough = overlap >= OVERLAP * min(products.shape)
    return float((shared[enough] / np.sqrt(np.maximum(squares[0] * squares[1], 1e-12)[enough])).max())


@functools.cache
def _shifts(first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
    """The shift, from 0, at which each pair of cells meets, and how many pairs meet at each shift."""
    shifts = (np.arange(first)[:, None] - np.arange(second)[None] + second - 1).ravel()
    return shifts, np.bincount(shifts)
