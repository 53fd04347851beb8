"""How fast a compiled program can be at best, and how large a batch fits: arithmetic on what the compiler counted.

A bound and no measurement: a chip that computes and moves at the speeds of its data sheet, all the time. Times are
seconds, sizes bytes, everything of one chip and one step.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from alice_jax.ahead.topologies import Chip

FORMULA = """\
step ≥ max(computing, moving) + network, since the gradients travel when all of them are there
computing = FLOPs / peak FLOP/s of bfloat16; moving = bytes / HBM bandwidth; both as the compiler counts them
network = (n − 1) / n · bytes of each gather or scatter among n chips, twice that of an all-reduce, / what links send;
n is all chips, for gathers and scatters those of a group (mesh.parameters) where the state is divided
assumed: peaks of the data sheet, every link busy and no delay, batches there in time"""

# How often the bytes of an array leave a chip in a ring of n chips, as a multiple of (n - 1) / n.
TRIPS = {"all-reduce": 2}


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least times that a step's computing, memory and network take."""

    computing: float
    moving: float
    network: float

    @property
    def step(self) -> float:
        return max(self.computing, self.moving) + self.network


def network_seconds(collectives: Iterable[Sequence], chips: int, link_rate: float, parameters: int = 1) -> float:
    """The least time of (kind, bytes, count) in rings of chips.

    Args:
      parameters: chips of a group that divides the state, as in `sharding.make_mesh`; gathers and scatters stay in it.

    >>> network_seconds([("all-reduce", 100e9, 1)], chips=4, link_rate=200e9)
    0.75
    >>> network_seconds([("all-gather", 100e9, 1)], chips=4, link_rate=200e9, parameters=2)
    0.25
    """
    seconds = 0.0
    for kind, size, count in collectives:
        ring = chips if kind == "all-reduce" or parameters == 1 else parameters
        seconds += TRIPS.get(kind, 1) * size * count * (ring - 1) / ring / link_rate
    return seconds


def bound(
    flops: float, moved: float, collectives: Iterable[Sequence], chip: Chip, chips: int, parameters: int = 1
) -> Bound:
    """The roofline (Williams et al. 2009, doi:10.1145/1498765.1498785) and a ring's time for the collectives."""
    network = network_seconds(collectives, chips, chip.link_rate, parameters)
    return Bound(flops / chip.flops, moved / chip.memory_rate, network)


def cost_per_million(pairs_per_s: float, chips: int, price_per_chip_hour: float) -> float:
    """What a million pairs cost.

    >>> cost_per_million(pairs_per_s=1000, chips=36, price_per_chip_hour=2.0)
    20.0
    """
    return chips * price_per_chip_hour / 3600 * 1e6 / pairs_per_s


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Start and slope of the straight line through the first and the last of some points.

    >>> line([(1, 3.0), (5, 11.0)])
    (1.0, 2.0)
    """
    (x0, y0), (x1, y1) = min(points), max(points)
    slope = (y1 - y0) / (x1 - x0)
    return y0 - slope * x0, slope


def largest(points: Sequence[tuple[float, float]], capacity: float) -> int:
    """The largest x on the line at or below `capacity`.

    >>> largest([(1, 3.0), (5, 11.0)], capacity=16.0), largest([(1, 20.0), (2, 21.0)], capacity=16.0)
    (7, 0)
    """
    start, slope = line(points)
    return max(math.floor((capacity - start) / slope), 0)
