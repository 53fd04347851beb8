"""One training sample of the embedder: two overlapping, differently distorted views of one scan, and where they agree.

SAM (arXiv 2012.02383, section III-B) rescales two random crops; here they are also rotated a little and bent smoothly,
as two patients differ. They are never mirrored: left and right must stay apart.

The network's voxels are blocks of `reduce`³ voxels of the store, averaged. A view's voxel u = (z, y, x) shows the
store position centre + A (u − middle) + bend(u); both ends of a pair are cells of the fine grid that show one place.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from alice_jax.data import geometry
from alice_jax.data.cells import Triple
from alice_jax.data.embeddings import Embedding
from alice_jax.data.hounsfield import AIR_HU
from alice_jax.data.partner_map import partner_map
from alice_jax.data.splines import SplineField, random_field
from alice_jax.data.store import Store

LEAST_KNOWN = 0.1  # share of a view's body that a partner must be known to show
TONES_HU = (-1000, -700, -400, -130, -70, -20, 20, 50, 80, 120, 180, 280, 500, 1000, 2000)  # closer among soft tissues


def network_input(volume_hu: np.ndarray, window_hu: tuple[float, float] = (-1024, 3071)) -> np.ndarray:
    """HU clipped to the window, scaled to [0, 255], minus 50 (SAM, arXiv 2012.02383): fp32 of the same shape.

    >>> network_input(np.array([-2000, -1024, 3071], np.int16)).tolist()
    [-50.0, -50.0, 205.0]
    """
    low, high = window_hu
    clipped = np.clip(volume_hu, low, high).astype(np.float32)
    return (clipped - low) / (high - low) * 255 - 50


def block_mean(volume: np.ndarray, factor: int) -> np.ndarray:
    """Means over blocks of factor³ voxels, fp32; sides must divide.

    >>> block_mean(np.arange(8).reshape(2, 2, 2), 2).tolist()
    [[[3.5]]]
    """
    total = np.zeros([n // factor for n in volume.shape], np.float32)
    for z, y, x in np.ndindex(factor, factor, factor):  # several times faster than a mean over reshaped axes
        total += volume[z::factor, y::factor, x::factor]
    return total / factor**3


@dataclasses.dataclass(frozen=True)
class Distortion:
    """How a view differs from the scan.

    scale: smallest and largest zoom, drawn for each axis around one for all.
    rotation_degrees: largest angle about each axis.
    bend_mm, bend_spacing_mm: standard deviation and correlation length of a smooth displacement.
    stretch_mm, stretch_spacing_mm: of a second one, to reach as far as whole regions of the body differ in length.
    tone_hu: standard deviation of a random change of each tissue's HU, the same all over the view.
    shade_hu: standard deviation of a smooth random change over the view, of the same correlation length as the bend.
    noise_hu, blur_voxels: largest standard deviations.
    """

    scale: tuple[float, float] = (0.8, 1.2)
    rotation_degrees: float = 0.0
    bend_mm: float = 0.0
    bend_spacing_mm: float = 48.0
    stretch_mm: float = 0.0
    stretch_spacing_mm: float = 128.0
    tone_hu: float = 0.0
    shade_hu: float = 0.0
    noise_hu: float = 20.0
    blur_voxels: float = 0.5


@dataclasses.dataclass(frozen=True)
class View:
    """A drawn map from a view's voxels to the scan, in store voxels (z, y, x)."""

    shape_zyx: Triple
    centre_zyx_vox: np.ndarray
    matrix: np.ndarray
    bends: tuple[SplineField, ...]

    def positions(self, axes: Sequence[np.ndarray]) -> np.ndarray:
        """(3, z, y, x) store positions of the grid that the three axes of view coordinates span, fp32."""
        middle = (np.array(self.shape_zyx) - 1) / 2
        offsets = [(axis - m).astype(np.float32) for axis, m in zip(axes, middle, strict=True)]
        grid = np.empty((3, *(len(axis) for axis in axes)), np.float32)
        for row in range(3):
            z, y, x = (self.matrix[row, column] * offsets[column] for column in range(3))
            grid[row] = z[:, None, None] + y[:, None] + (x + self.centre_zyx_vox[row])
        return sum((bend.on_grid(*axes) for bend in self.bends), start=grid)


def draw_view(
    rng: np.random.Generator,
    shape_zyx: Triple,
    centre_zyx_vox: np.ndarray,
    voxel_vox: float,
    spacing_mm: float,
    distortion: Distortion,
) -> View:
    """voxel_vox: store voxels per voxel of the view; spacing_mm: of the store."""
    low, high = np.log(distortion.scale)
    zoom = np.exp((rng.uniform(low, high) + rng.uniform(low, high, 3)) / 2)
    angles = np.deg2rad(distortion.rotation_degrees) * rng.uniform(-1, 1, 3)
    matrix = geometry.rotation(angles) @ np.diag(voxel_vox / zoom)
    bends = []
    for size_mm, length_mm in (
        (distortion.bend_mm, distortion.bend_spacing_mm),
        (distortion.stretch_mm, distortion.stretch_spacing_mm),
    ):
        if size_mm:
            knots = length_mm / (spacing_mm * voxel_vox)
            bends.append(random_field(rng, (-0.5,) * 3, np.array(shape_zyx) - 0.5, knots, components=3))
            bends[-1].coefficients[...] *= size_mm / spacing_mm
    return View(shape_zyx, np.asarray(centre_zyx_vox, float), matrix, tuple(bends))


@dataclasses.dataclass(frozen=True)
class EmbedderSampler:
    """`sampler(record, rng, batch_rng)` gives two views of the record-th scan, or one of it and one of a partner.

    Attributes:
      shape_zyx: of a view in network voxels.
      fine_stride_zyx: network voxels per fine cell.
      reduce: store voxels per network voxel and axis.
      pairs: positives per sample.
      positive_mm: farthest that the two cells of a positive may lie apart.
      window_hu: what `network_input` clips to.
      shift: how far apart the views' centres may lie on each axis, as a share of a view's length.
      partner_share: of the samples whose second view shows another patient, where matches of the embeddings that the
        store holds already put it.
      embeddings: reads these; needed for a share above 0.
    """

    store: Store
    scan_ids: tuple[str, ...]
    shape_zyx: Triple
    fine_stride_zyx: Triple
    reduce: int
    pairs: int
    positive_mm: float
    shift: float
    window_hu: tuple[float, float]
    distortion: Distortion
    partner_share: float = 0.0
    embeddings: Callable[[str], Embedding] | None = None

    @property
    def grid_zyx(self) -> Triple:
        """The fine grid."""
        z, y, x = (n // s for n, s in zip(self.shape_zyx, self.fine_stride_zyx, strict=True))
        return z, y, x

    def __call__(
        self, record: int, rng: np.random.Generator, batch_rng: np.random.Generator | None = None
    ) -> dict[str, Any]:
        """Arrays of one sample.

        "volumes" (2, depth, height, width, 1): network inputs.
        "positions_mm" (2, z, y, x, 3): where the fine cells lie in the scan.
        "body" (2, z, y, x) bool: fine cells inside the body.
        "pairs" (2, pairs): flat fine cells of either view that show the same place.
        "weights" (pairs,): 1, or 0 for the filling where too few pairs were found.
        "meta": "scans" (1,) the record, "pairs" how many were found.
        """
        ids = [self.scan_ids[record]] * 2
        if self.embeddings is not None and len(self.scan_ids) > 1 and rng.random() < self.partner_share:
            ids[1] = self.scan_ids[(record + rng.integers(1, len(self.scan_ids))) % len(self.scan_ids)]
        spacing_mm = self.store.scan(ids[0]).spacing_zyx_mm[0]
        bodies = [self.store.foreground(id) for id in ids]
        cells = np.argwhere(bodies[0])
        first = 2.0 * cells[rng.integers(len(cells))] + 0.5
        extent = self.reduce * np.array(self.shape_zyx)
        views = [draw_view(rng, self.shape_zyx, first, self.reduce, spacing_mm, self.distortion)]
        fine_axes = tuple(
            (np.arange(n) + 0.5) * s - 0.5 for n, s in zip(self.grid_zyx, self.fine_stride_zyx, strict=True)
        )
        positions = [np.moveaxis(views[0].positions(fine_axes), 0, -1)]
        inside = [_lookup(bodies[0], positions[0])]
        second = first
        if self.embeddings is not None and ids[1] != ids[0]:
            box = np.array([positions[0].min(axis=(0, 1, 2)), positions[0].max(axis=(0, 1, 2))])
            query, key = (self.embeddings(id) for id in ids)
            to_partner = partner_map(query, key, 2.0 * cells + 0.5, box, rng)
            places, known = to_partner(positions[0])
            if (inside[0] & known).sum() >= LEAST_KNOWN * inside[0].sum():
                # From here on the first view's cells lie where the partner shows the same.
                positions[0], inside[0], second = places, inside[0] & known, to_partner(first[None])[0][0]
            else:  # the two share too little of this part
                ids[1], bodies[1] = ids[0], bodies[0]
        second = second + rng.uniform(-self.shift, self.shift, 3) * extent
        views.append(draw_view(rng, self.shape_zyx, second, self.reduce, spacing_mm, self.distortion))
        positions.append(np.moveaxis(views[1].positions(fine_axes), 0, -1))
        inside.append(_lookup(bodies[1], positions[1]))
        pairs, weights = self._pairs(rng, views, np.stack(positions), np.stack(inside), spacing_mm)
        volumes = np.stack([self._render(id, view, rng) for id, view in zip(ids, views, strict=True)])
        return {
            "volumes": volumes[..., None],
            "positions_mm": np.stack(positions).astype(np.float32) * np.float32(spacing_mm),
            "body": np.stack(inside),
            "pairs": pairs,
            "weights": weights,
            "meta": {"scans": np.array([record], np.int32), "pairs": np.int32(weights.sum())},
        }

    def _pairs(
        self, rng: np.random.Generator, views: list[View], positions: np.ndarray, inside: np.ndarray, spacing_mm: float
    ) -> tuple[np.ndarray, np.ndarray]:
        pairs, weights = np.zeros((2, self.pairs), np.int32), np.zeros(self.pairs, np.float32)
        candidates = np.flatnonzero(inside[0])
        if not len(candidates):
            return pairs, weights
        tried = rng.permutation(candidates)[: 8 * self.pairs]
        places, last = positions[0].reshape(-1, 3)[tried], np.array(self.grid_zyx) - 1
        # Walk to the nearest cell of the other view: a step by the inverse matrix leaves only what the bends add.
        inverse = np.linalg.inv(views[1].matrix * self.fine_stride_zyx).T
        cells = np.broadcast_to(last / 2, places.shape).astype(int)
        for _ in range(6):
            off = places - positions[1][tuple(cells.T)]
            cells = np.clip(np.rint(cells + off @ inverse), 0, last).astype(int)
        apart_mm = spacing_mm * np.linalg.norm(places - positions[1][tuple(cells.T)], axis=1)
        partner = np.ravel_multi_index(tuple(cells.T), self.grid_zyx)
        good = np.flatnonzero((apart_mm <= self.positive_mm) & inside[1].reshape(-1)[partner])[: self.pairs]
        if len(good):
            weights[: len(good)] = 1
            good = np.resize(good, self.pairs)
            pairs = np.stack([tried[good], partner[good]]).astype(np.int32)
        return pairs, weights

    def _render(self, id: str, view: View, rng: np.random.Generator) -> np.ndarray:
        """The view's network input, fp32; reads only the part of the scan that it shows."""
        distortion = self.distortion
        positions = view.positions(tuple(np.arange(n, dtype=float) for n in self.shape_zyx))
        # Beyond its borders a scan goes on as it ends, here and where it is embedded: air would look like anatomy.
        border = (self.reduce - 1) / 2  # the centres of the outer blocks
        last = np.array(self.store.scan(id).shape_zyx) - 1 - border
        positions = np.clip(positions, border, last.astype(np.float32)[:, None, None, None])
        flat = positions.reshape(3, -1)
        low = self.reduce * (np.floor(flat.min(axis=1) / self.reduce).astype(int) - 1)
        blocks = np.ceil((flat.max(axis=1) - low) / self.reduce).astype(int) + 2
        crop = block_mean(self.store.read_crop(id, tuple(low), tuple(blocks * self.reduce)), self.reduce)
        # A block of r voxels has its centre (r − 1) / 2 voxels behind its first.
        inner = (positions - (low + (self.reduce - 1) / 2)[:, None, None, None]) / self.reduce
        volume = ndimage.map_coordinates(crop, inner, order=1, mode="nearest", output=np.float32)
        if distortion.blur_voxels:
            volume = ndimage.gaussian_filter(volume, rng.uniform(0, distortion.blur_voxels), truncate=2)
        if distortion.tone_hu:
            volume += np.interp(volume, TONES_HU, distortion.tone_hu * rng.standard_normal(len(TONES_HU)))
        if distortion.shade_hu:
            knots = distortion.bend_spacing_mm / (self.store.scan(id).spacing_zyx_mm[0] * self.reduce)
            shade = random_field(rng, (-0.5,) * 3, np.array(self.shape_zyx) - 0.5, knots)
            volume += distortion.shade_hu * shade.on_grid(*(np.arange(n) for n in self.shape_zyx))[0]
        if distortion.noise_hu:
            volume += rng.uniform(0, distortion.noise_hu) * rng.standard_normal(volume.shape, np.float32)
        return network_input(np.maximum(volume, AIR_HU), self.window_hu)


def _lookup(body: np.ndarray, positions_vox: np.ndarray) -> np.ndarray:
    """Whether store positions (…, 3) lie in the body mask (a cell per 2 voxels)."""
    cells = np.floor((positions_vox + 0.5) / 2).astype(np.int32)
    within = ((cells >= 0) & (cells < body.shape)).all(axis=-1)
    cells = np.clip(cells, 0, np.array(body.shape) - 1)
    return within & body[cells[..., 0], cells[..., 1], cells[..., 2]]
