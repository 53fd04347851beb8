"""One sample of a classification: crops of a scan and its target.

Training draws crops at random places of the body; a prediction is made from a fixed grid of crops that covers it.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from alice_jax.data.cells import Triple
from alice_jax.data.foreground import STRIDE
from alice_jax.data.store import Store
from alice_jax.data.views import WINDOW_HU, crop_around, foreground_points, windowed


def even_starts(low: int, high: int, size: int) -> list[int]:
    """Where the fewest segments of a length begin that cover [low, high), evenly; around its middle if one is enough.

    >>> even_starts(0, 100, 40), even_starts(10, 40, 50)
    ([0, 30, 60], [0])
    """
    count = max(-(-(high - low) // size), 1)
    if count == 1:
        return [(low + high - size) // 2]
    return [low + i * (high - low - size) // (count - 1) for i in range(count)]


def with_body(store: Store, id: str, starts: np.ndarray, shape_zyx: Sequence[int]) -> np.ndarray:
    """Those of the starts (n, 3) whose crops show any of the body."""
    foreground = store.foreground(id)
    ends = -(-(starts + shape_zyx) // STRIDE)
    boxes = zip(np.maximum(starts, 0) // STRIDE, ends, strict=True)
    return starts[[bool(foreground[tuple(map(slice, low, high))].any()) for low, high in boxes]]


def grid_starts(store: Store, id: str, shape_zyx: Sequence[int]) -> np.ndarray:
    """(n, 3) voxels at which crops begin that together cover the body; those without any of it are left out."""
    low, high = store.scan(id).foreground_box_zyx_vox
    return with_body(store, id, np.array(list(itertools.product(*map(even_starts, low, high, shape_zyx)))), shape_zyx)


def grid_crops(store: Store, id: str, shape_zyx: Triple, window_hu: tuple[float, float]) -> Iterator[np.ndarray]:
    """The crops (depth, height, width, 1) in [0, 1] that begin at `grid_starts`."""
    for start in grid_starts(store, id, shape_zyx):
        yield windowed(store.read_crop(id, tuple(start), shape_zyx), window_hu)[..., None]


@dataclasses.dataclass(frozen=True)
class ClassSampler:
    """`sampler(record, rng, batch_rng)` gives crops of the record-th scan and its target.

    Attributes:
      targets: of the scans, (n,) classes or (n, labels).
      crop_shape_zyx: voxels of a crop.
      window_hu: intensities are clipped to it.
      crops: at random places; 0: the grid that covers the body.
    """

    store: Store
    scan_ids: tuple[str, ...]
    targets: np.ndarray
    crop_shape_zyx: Triple
    window_hu: tuple[float, float] = WINDOW_HU
    crops: int = 0

    def __call__(self, record: int, rng: np.random.Generator, batch_rng: np.random.Generator) -> dict[str, Any]:
        """The sample as arrays.

        "volumes" (crops, depth, height, width, 1) in [0, 1], "weights" (crops,) 1, or 0 for what only fills up,
        "targets" () or (labels,), "records" () the number of the scan; "meta": "scans" (1,) the same.
        """
        id = self.scan_ids[record]
        if self.crops:
            shape = self.store.scan(id).shape_zyx
            points = foreground_points(self.store.foreground(id), shape, rng, self.crops)
            around = (crop_around(self.store, id, point, self.crop_shape_zyx) for point in points)
            crops = [windowed(crop, self.window_hu)[..., None] for crop in around]
        else:
            crops = list(grid_crops(self.store, id, self.crop_shape_zyx, self.window_hu))
        count = self.crops or self.most
        volumes = np.zeros((count, *self.crop_shape_zyx, 1), np.float32)
        volumes[: len(crops)] = crops
        return {
            "volumes": volumes,
            "weights": (np.arange(count) < len(crops)).astype(np.float32),
            "targets": self.targets[record],
            "records": np.int32(record),
            "meta": {"scans": np.array([record], np.int32)},
        }

    @cached_property
    def most(self) -> int:
        """The crops of the scan with the largest grid; the others are filled up, so that all have one shape."""
        return max(len(grid_starts(self.store, id, self.crop_shape_zyx)) for id in self.scan_ids)
