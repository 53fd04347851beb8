"""One training sample of segmentation: a crop of a scan and its labels, both turned, zoomed and mirrored alike.

The recipe is nnU-Net's (arXiv 1809.10486): a third of the crops show a class that is drawn evenly among those of the
scan, the others any part of the body. Everything is drawn from the generator that is handed in, so a sample is a pure
function of (seed, index).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy import ndimage

from alice_jax.data import geometry, label_maps
from alice_jax.data.cells import Triple
from alice_jax.data.hounsfield import AIR_HU
from alice_jax.data.store import Store
from alice_jax.data.views import WINDOW_HU, foreground_points, windowed
from alice_jax.errors import UserError

POINTS = 256  # of each class that are remembered of a scan, evenly spread over all its voxels


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How a crop differs from the scan: for each kind the share of the crops, and from where to where it is drawn.

    Intensities are those of the window, 0 to 1.

    Attributes:
      rotation_degrees: (share, largest angle about each axis).
      zoom: (share, smallest, largest), one factor for all axes.
      gamma, contrast: (share, smallest, largest); contrast is a factor around the crop's mean.
      noise: (share, largest standard deviation).
      blur_voxels: (share, smallest, largest standard deviation).
      flip_axes: of 0 (z), 1 (y) and 2 (x), each mirrored in half of the crops. None by default: a mirrored body has its
        liver at the left, and its left kidney would be taught to look like the right one.
    """

    rotation_degrees: tuple[float, float] = (0.2, 30.0)
    zoom: tuple[float, float, float] = (0.2, 0.7, 1.4)
    gamma: tuple[float, float, float] = (0.3, 0.7, 1.5)
    contrast: tuple[float, float, float] = (0.15, 0.75, 1.25)
    noise: tuple[float, float] = (0.1, 0.1)
    blur_voxels: tuple[float, float, float] = (0.2, 0.5, 1.0)
    flip_axes: tuple[int, ...] = ()

    def draw_matrix(self, rng: np.random.Generator) -> np.ndarray | None:
        """(3, 3) from the crop's voxels to the scan's, both from the crop's middle; None where they are the same."""
        matrix = np.eye(3)
        if rng.random() < self.rotation_degrees[0]:
            matrix = geometry.rotation(np.deg2rad(self.rotation_degrees[1]) * rng.uniform(-1, 1, 3))
        if rng.random() < self.zoom[0]:
            matrix = matrix / np.exp(rng.uniform(*np.log(self.zoom[1:])))
        return None if np.array_equal(matrix, np.eye(3)) else matrix

    def change_intensities(self, volume: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """float32 from 0 to 1 of the same shape."""
        if rng.random() < self.noise[0]:
            volume = volume + rng.uniform(0, self.noise[1]) * rng.standard_normal(volume.shape, np.float32)
        if rng.random() < self.blur_voxels[0]:
            volume = ndimage.gaussian_filter(volume, rng.uniform(*self.blur_voxels[1:]), truncate=3)
        if rng.random() < self.contrast[0]:
            mean = volume.mean()
            volume = mean + (volume - mean) * rng.uniform(*self.contrast[1:])
        volume = np.clip(volume, 0, 1)
        if rng.random() < self.gamma[0]:
            volume = volume ** rng.uniform(*self.gamma[1:])
        return volume.astype(np.float32)

    def draw_flips(self, rng: np.random.Generator) -> tuple[slice, ...]:
        """The order of each axis."""
        drawn = rng.random(3) < 0.5
        return tuple(slice(None, None, -1 if drawn[axis] and axis in self.flip_axes else 1) for axis in range(3))


@dataclasses.dataclass(frozen=True)
class SegmentationSampler:
    """`sampler(record, rng, batch_rng)` gives a crop of the record-th scan.

    Attributes:
      classes: the numbers in the store's labels that are classes 1, 2, …; what else has a name is background.
      names: of all numbers in the store's labels; any other number is an error.
      foreground: share of the crops that show a class for certain.
      augmentation: None for crops as they are.
    """

    store: Store
    scan_ids: tuple[str, ...]
    classes: tuple[int, ...]
    names: Mapping[int, str]
    crop_shape_zyx: Triple
    window_hu: tuple[float, float] = WINDOW_HU
    foreground: float = 1 / 3
    augmentation: Augmentation | None = None

    def __call__(
        self, record: int, rng: np.random.Generator, batch_rng: np.random.Generator | None = None
    ) -> dict[str, Any]:
        """Arrays of one sample.

        "volume" (depth, height, width, 1) float32 from 0 to 1.
        "labels" (depth, height, width), 0 for the background and beyond the scan.
        "meta": "scans" (1,) the record, "foreground" whether a class was aimed at.
        """
        id = self.scan_ids[record]
        start, aimed = self._start(id, rng)
        matrix = self.augmentation.draw_matrix(rng) if self.augmentation else None
        volume_hu, labels = self._cut(id, start) if matrix is None else self._turned(id, start, matrix)
        volume = windowed(volume_hu, self.window_hu)
        if self.augmentation:
            volume = self.augmentation.change_intensities(volume, rng)
            flips = self.augmentation.draw_flips(rng)
            volume, labels = volume[flips], labels[flips]
        return {
            "volume": np.ascontiguousarray(volume)[..., None],
            "labels": np.ascontiguousarray(labels),
            "meta": {"scans": np.array([record], np.int32), "foreground": np.float32(aimed)},
        }

    # ---- where

    def _start(self, id: str, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
        """The crop's first voxel, inside the scan as far as the scan is large enough."""
        places, scan = self._places_of(id), self.store.scan(id)
        aimed = bool(rng.random() < self.foreground and places)
        if aimed:
            points = places[rng.integers(len(places))]
            point = points[rng.integers(len(points))]
        else:
            (point,) = foreground_points(self.store.foreground(id), scan.shape_zyx, rng, 1)
        room = np.array(scan.shape_zyx) - self.crop_shape_zyx
        wanted = point.astype(int) - np.array(self.crop_shape_zyx) // 2
        return np.where(room > 0, np.clip(wanted, 0, np.maximum(room, 0)), room // 2), aimed

    def _places_of(self, id: str) -> list[np.ndarray]:
        """Voxels (n, 3) of each class that the scan shows; found once for each scan."""
        if id not in self._places:
            labels = read_labels(self.store, id, self.names)
            boxes = ndimage.find_objects(labels)
            found = []
            for code in self.classes:
                if code <= len(boxes) and boxes[code - 1] is not None:
                    box = boxes[code - 1]
                    voxels = np.argwhere(labels[box] == code)
                    chosen = voxels[np.linspace(0, len(voxels) - 1, min(POINTS, len(voxels))).astype(int)]
                    found.append((chosen + [side.start for side in box]).astype(np.int16))
            self._places[id] = found
        return self._places[id]

    @cached_property
    def _places(self) -> dict[str, list[np.ndarray]]:
        return {}

    @cached_property
    def _class_of(self) -> np.ndarray:
        """The class of each number in the labels."""
        table = np.zeros(max(self.names, default=0) + 1, np.uint8 if len(self.classes) < 256 else np.uint16)
        table[list(self.classes)] = 1 + np.arange(len(self.classes))
        return table

    # ---- what

    def _cut(self, id: str, start: np.ndarray, shape: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """HU and classes of a box, air and background beyond the scan."""
        shape = tuple(shape or self.crop_shape_zyx)
        labels = self.store.read_array_region(id, label_maps.ARRAY, tuple(start), shape)
        return self.store.read_crop(id, tuple(start), shape, fill=AIR_HU), self._class_of[labels]

    def _turned(self, id: str, start: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same through `matrix` about the crop's middle; reads only what is shown.

        A voxel takes the nearest label: at most half a voxel off, and classes never mix.
        """
        shape = np.array(self.crop_shape_zyx)
        middle = (shape - 1) / 2
        reach = np.abs(matrix) @ middle
        low = np.floor(start + middle - reach).astype(int)
        size = np.ceil(start + middle + reach).astype(int) - low + 1
        volume, labels = self._cut(id, low, tuple(size))
        offset = start + middle - low - matrix @ middle
        return (
            ndimage.affine_transform(volume, matrix, offset, tuple(shape), order=1, mode="nearest", output=np.float32),
            ndimage.affine_transform(labels, matrix, offset, tuple(shape), order=0, mode="nearest"),
        )


def read_labels(store: Store, id: str, names: Mapping[int, str]) -> np.ndarray:
    """The labels of a scan (z, y, x); refuses those that do not fit it or have a number without a name."""
    labels, shape = store.read_array(id, label_maps.ARRAY), store.scan(id).shape_zyx
    remedy = "prepare this scan and its labels again"
    if labels.shape != shape:
        raise UserError(f"scan {id}: its labels have shape {labels.shape} and the scan {shape}; {remedy}")
    if unknown := sorted(set(np.unique(labels).tolist()) - {0, *names}):
        raise UserError(f"scan {id}: its labels hold {unknown[0]}, which has no name in {store.path}; {remedy}")
    return labels
