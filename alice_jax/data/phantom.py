"""Phantom patients: CT-like torsos, each a different smooth deformation of one anatomy, so that true matches are known.

Example:
  >>> a, b = Patient(0), Patient(1)
  >>> volume = a.volume()  # int16 HU (z, y, x), 2 mm; axes grow toward Superior, Posterior, Left
  >>> b.from_canonical_mm(a.to_canonical_mm([[90, 60, 80]])).shape  # the same anatomy in the other patient
  (1, 3)

Everything is a function of the seed. Change VERSION with any change of what a seed gives.
"""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Iterable

import numpy as np
import tqdm
from scipy import ndimage

from alice_jax.data import foreground, phantom_shape, splines
from alice_jax.data import phantom_tissues as tissues
from alice_jax.data.phantom_anatomy import atlas
from alice_jax.data.phantom_canvas import LOW_ZYX_MM
from alice_jax.data.phantom_canvas import SPACING_MM as ATLAS_SPACING_MM
from alice_jax.data.phantom_tissues import LABELS
from alice_jax.data.scan import Scan
from alice_jax.data.store import Store
from alice_jax.errors import UserError

VERSION = 1
SPACING_MM = 2.0

# How often, and where the field of view ends in canonical z (mm): bottom from-to, top from-to.
_VIEWS = {
    "torso": (0.65, (45, 100), (480, 530)),
    "chest": (0.10, (95, 150), (490, 540)),
    "abdomen": (0.25, (25, 80), (430, 480)),
}
# How far the arterial and the portal contrast has come, from-to.
_PHASES = {
    "none": (0.25, (0, 0), (0, 0)),
    "arterial": (0.25, (0.6, 1.0), (0.1, 0.4)),
    "portal": (0.5, (0.1, 0.25), (0.7, 1.0)),
}


@dataclasses.dataclass(frozen=True)
class Lesion:
    """A roughly spherical lesion. organ: "lung" or "liver"; side: "left" or "right" of the patient."""

    organ: str
    side: str
    center_zyx_vox: tuple[float, float, float]
    radius_mm: float
    contrast_hu: float


class Patient:
    """One phantom patient, a pure function of `seed`.

    Voxel coordinates are those of the 2 mm volume: array order (z, y, x), axes growing toward Superior, Posterior and
    Left, voxel centres at integers. `volume` and `labels` at another spacing share the centre of voxel (0, 0, 0).

    Attributes:
      seed, view ("torso", "chest", "abdomen"), phase ("none", "arterial", "portal"), has_arms.
      shape_zyx: of the 2 mm volume.
      lesions: none or one; has_lesion, lesion_organ and lesion_side ("" for none) describe it.
    """

    def __init__(self, seed: int):
        self.seed = int(seed)
        self._shape = phantom_shape.draw(self._stream("deformation"))
        self._draw_view()
        rng = self._stream("contrast")
        self.phase = str(rng.choice(list(_PHASES), p=[p for p, _, _ in _PHASES.values()]))
        self._contrast = tuple(rng.uniform(*span) for span in _PHASES[self.phase][1:])
        self.has_arms = bool(self._stream("arms").random() < 0.2)

    def _stream(self, name: str) -> np.random.Generator:
        """A random stream of its own for each purpose, so that one purpose cannot disturb another."""
        return np.random.default_rng((self.seed, zlib.crc32(name.encode())))

    def _draw_view(self) -> None:
        rng = self._stream("view")
        self.view = str(rng.choice(list(_VIEWS), p=[p for p, _, _ in _VIEWS.values()]))
        bottom, top = (rng.uniform(*span) for span in _VIEWS[self.view][1:])
        ends = self._shape.inverse(np.array([[bottom, 20.0, 0.0], [top, 20.0, 0.0]]))
        middle = 0.5 * (bottom + top)
        rim = [[middle, -103, 0], [middle, 110, 0], [middle, 0, -155], [middle, 0, 155]]
        front, back, right, left = self._shape.inverse(np.array(rim, float))
        extent = np.array(
            [
                ends[1, 0] - ends[0, 0],
                max(back[1] - front[1] + rng.uniform(35, 75), 220),
                max((left[2] - right[2]) * rng.uniform(1.04, 1.22), 260),
            ]
        )
        center = np.array(
            [
                0.5 * (ends[0, 0] + ends[1, 0]),
                0.5 * (front[1] + back[1]) + rng.uniform(0, 14),
                0.5 * (left[2] + right[2]) + rng.uniform(-10, 10),
            ]
        )
        self.shape_zyx = tuple(int(n) for n in np.round(extent / SPACING_MM))
        self.origin_zyx_mm = center - extent / 2

    def to_canonical_mm(self, points_zyx_vox) -> np.ndarray:
        """Voxel coordinates (n, 3) of the 2 mm volume -> canonical millimetres (z, y, x) (n, 3)."""
        return self._shape(self.origin_zyx_mm + SPACING_MM * np.asarray(points_zyx_vox, np.float64).reshape(-1, 3))

    def from_canonical_mm(self, points_zyx_mm) -> np.ndarray:
        """Inverse of `to_canonical_mm`: (n, 3) -> voxel coordinates (n, 3) float, some outside the volume."""
        return (
            self._shape.inverse(np.asarray(points_zyx_mm, np.float64).reshape(-1, 3)) - self.origin_zyx_mm
        ) / SPACING_MM

    # ---- what the scanner sees

    def _axes_mm(self, spacing_zyx_mm) -> list[np.ndarray]:
        spacing = _key(spacing_zyx_mm) or (SPACING_MM,) * 3
        return [
            o + s * np.arange(round((n - 1) * SPACING_MM / s) + 1)
            for o, s, n in zip(self.origin_zyx_mm, spacing, self.shape_zyx, strict=True)
        ]

    @functools.lru_cache(maxsize=1)  # noqa: B019  (one volume and its labels share it)
    def _tissue(self, spacing: tuple | None) -> np.ndarray:
        """Tissue codes of the atlas on the patient's grid (z, y, x)."""
        axes = self._axes_mm(spacing)
        canonical = atlas()
        index = np.zeros([len(a) for a in axes], np.int32)
        for values, low_mm, size in zip(self._shape.on_grid(axes), LOW_ZYX_MM, canonical.shape, strict=True):
            values += np.float32(ATLAS_SPACING_MM / 2 - low_mm)
            values *= np.float32(1 / ATLAS_SPACING_MM)
            np.clip(values, 0, size - 1, out=values)
            index *= size
            index += values.astype(np.int32)
        tissue = canonical.ravel().take(index)
        return tissue if self.has_arms else _WITHOUT_ARMS.take(tissue)

    def labels(self, spacing_zyx_mm=None) -> np.ndarray:
        """Organ labels uint8 (z, y, x); names in LABELS. Lesions and gas belong to the organ that they lie in."""
        return tissues.LABEL_OF_TISSUE.take(self._tissue(_key(spacing_zyx_mm)))

    def volume(self, spacing_zyx_mm=None) -> np.ndarray:
        """CT numbers int16 HU (z, y, x), at 2 mm or the given spacing, air -1024."""
        tissue, axes = self._tissue(_key(spacing_zyx_mm)), self._axes_mm(spacing_zyx_mm)
        arterial, portal = self._contrast
        rng = self._stream("tissue")
        rows = list(tissues.TISSUES.values())
        hu = np.array([t.hu + arterial * t.arterial_hu + portal * t.portal_hu for t in rows], np.float32)
        hu += rng.normal(0, 2.5 + 0.02 * np.abs(hu)) * (hu > -1000)
        bone = np.array([t.hu for t in rows]) > 100
        hu[bone] *= rng.uniform(0.75, 1.15)
        image = hu.take(tissue)
        fields = {
            name: splines.random_field(self._stream(name), *_corners(axes), spacing).on_grid(*axes)[0]
            for name, spacing in (("grain", 5.5), ("loops", 12.0), ("strands", 10.0), ("clumps", 30.0))
        }
        grain = np.array([t.texture_hu for t in rows], np.float32)
        self._fill_gut(image, tissue, fields)
        self._fill_lungs(image, tissue, fields, axes)
        self._add_lesions(image, fields["grain"], axes)
        image += grain.take(tissue) * fields["grain"]
        self._add_table(image, tissue, axes)
        image = ndimage.gaussian_filter(image, [0.7 * SPACING_MM / (a[1] - a[0]) for a in axes], truncate=2.5)
        self._add_noise(image, axes)
        return np.clip(np.rint(image), -1024, 3071).astype(np.int16)

    def _fill_gut(self, image, tissue, fields) -> None:
        """Bowel loops, stool, gas and the fluid level of the stomach: they correspond between no two patients."""
        rng = self._stream("gut")
        codes = tissues.CODES
        at = np.flatnonzero(tissue == codes["bowel"])
        loops, clumps = fields["loops"].ravel()[at], fields["clumps"].ravel()[at]
        values = image.ravel()[at]
        values[loops < -0.75] = -95.0
        values[np.abs(loops - 0.1) < 0.2] += 30.0
        values[loops > 0.3] = rng.uniform(0, 30)
        values[(loops > 0.3) & (clumps > rng.uniform(1.2, 2.0))] = -880.0
        image.ravel()[at] = values
        at = np.flatnonzero(tissue == codes["colon_lumen"])
        stool = -20 + 60 * fields["strands"].ravel()[at]
        image.ravel()[at] = np.where(fields["clumps"].ravel()[at] > rng.uniform(-0.3, 1.0), -920.0, stool)
        at = np.flatnonzero(tissue == codes["stomach_lumen"])
        if len(at):
            y = (at // tissue.shape[2]) % tissue.shape[1]
            food = rng.uniform(0, 45) + rng.uniform(0, 30) * fields["strands"].ravel()[at]
            image.ravel()[at] = np.where(y < np.quantile(y, rng.uniform(0.05, 0.6)), -950.0, food)

    def _fill_lungs(self, image, tissue, fields, axes) -> None:
        """Fine vessels where two fields cross zero together; denser lung toward the back."""
        for name in ("lung_right", "lung_left"):
            at = np.flatnonzero(tissue == tissues.CODES[name])
            a, b = fields["loops"].ravel()[at], fields["strands"].ravel()[at]
            y = axes[1][(at // tissue.shape[2]) % tissue.shape[1]].astype(np.float32)
            image.ravel()[at] += 560 * np.exp(-(a * a + b * b) / 0.016) + 0.35 * y + 14 * fields["clumps"].ravel()[at]

    def _add_lesions(self, image, grain, axes) -> None:
        for lesion in self.lesions:
            center = self.origin_zyx_mm + SPACING_MM * np.asarray(lesion.center_zyx_vox)
            window = tuple(
                slice(*np.searchsorted(a, (m - 1.5 * lesion.radius_mm, m + 1.5 * lesion.radius_mm)))
                for a, m in zip(axes, center, strict=True)
            )
            z, y, x = np.ix_(*(a[w] - m for a, w, m in zip(axes, window, center, strict=True)))
            distance = np.sqrt(z * z + y * y + x * x) + 1.2 * grain[window] - lesion.radius_mm
            image[window] = np.where(distance < 0, lesion.contrast_hu, image[window])

    @functools.cached_property
    def lesions(self) -> tuple[Lesion, ...]:
        rng = self._stream("lesion")
        if rng.random() < 0.5:
            return ()
        organ = str(rng.choice(["lung", "liver"]))
        side = str(rng.choice(["left", "right"]))
        codes = [tissues.CODES[f"lung_{side}" if organ == "lung" else "liver"]]
        canonical, radius = atlas(), rng.uniform(6, 14)
        spots = np.argwhere(np.isin(canonical, codes))
        if organ == "liver":  # its two lobes meet near the gallbladder, to the right of the midline
            x_mm = LOW_ZYX_MM[2] + ATLAS_SPACING_MM * spots[:, 2]
            spots = spots[(x_mm > -40) == (side == "left")]
        spots = rng.permutation(spots)[:4000]
        inner = np.ones(len(spots), bool)
        for offset in np.concatenate([np.eye(3), -np.eye(3)]).astype(int) * 5:
            inner &= np.isin(canonical[tuple(np.clip(spots + offset, 0, np.array(canonical.shape) - 1).T)], codes)
        centers = self.from_canonical_mm(np.array(LOW_ZYX_MM) + ATLAS_SPACING_MM * spots[inner][:300])
        margin = radius / SPACING_MM + 3
        seen = ((centers > margin) & (centers < np.array(self.shape_zyx) - margin)).all(axis=1)
        if not seen.any():
            return ()
        hu = rng.uniform(10, 60) if organ == "lung" else rng.uniform(5, 40) + 20 * self._contrast[1]
        z, y, x = (float(v) for v in centers[seen][0])
        return (Lesion(organ, side, (z, y, x), float(radius), float(hu)),)

    @property
    def has_lesion(self) -> bool:
        return bool(self.lesions)

    @property
    def lesion_organ(self) -> str:
        return self.lesions[0].organ if self.lesions else ""

    @property
    def lesion_side(self) -> str:
        return self.lesions[0].side if self.lesions else ""

    def _add_table(self, image, tissue, axes) -> None:
        """Mattress, and a table with a thin shell and a foam core, curved under the back."""
        rng = self._stream("table")
        body = tissues.LABEL_OF_TISSUE.take(tissue[:, :, ::4]) > 0
        back = axes[1][np.flatnonzero(body.any(axis=(0, 2)))[-1]] + rng.uniform(6, 14)
        curve = rng.uniform(0, 0.0009)
        x = axes[2] - 0.5 * (axes[2][0] + axes[2][-1]) + rng.uniform(-15, 15)
        depth = axes[1][:, None] - back + curve * x**2  # (y, x): millimetres below the table's surface
        shell = rng.uniform(-350, -60)
        layers = {-8: 0, 0: 55, 5: shell + 1024, 30: 100, 35: shell + 1024}  # down to this depth: HU above air
        table = np.select([depth < d for d in layers], list(layers.values()), 0)
        image += table.astype(np.float32) * (tissue == tissues.CODES["air"])

    def _add_noise(self, image, axes) -> None:
        """Quantum noise, correlated between neighbours, and streaks where rays crossed much of the body sideways."""
        rng = self._stream("noise")
        level, smooth = rng.uniform(7, 22), rng.uniform(0.5, 0.8)
        spacing = [a[1] - a[0] for a in axes]
        path_mm = np.clip(1 + image / 1000, 0, 1.6).sum(axis=2) * spacing[2]  # (z, y), of water
        noise = rng.standard_normal(image.shape, np.float32)
        noise = ndimage.gaussian_filter(noise, [0.3, smooth, smooth], truncate=2.5)
        noise *= level / noise[::4].std()
        low, high = _corners(axes)
        streaks = splines.random_field(rng, low, high, (4.0, 3.5, 110.0)).on_grid(*axes)[0]
        strength = np.clip(rng.uniform(2, 6) * np.exp((path_mm - 300) / 60), 0, 45).astype(np.float32)
        image += noise * np.clip(0.55 + path_mm / 500, 0.6, 1.4).astype(np.float32)[:, :, None]
        image += streaks * strength[:, :, None]


_WITHOUT_ARMS = np.array([0 if name.startswith("arm_") else code for code, name in enumerate(tissues.NAMES)], np.uint8)


def _key(spacing_zyx_mm):
    if spacing_zyx_mm is None:
        return None
    return tuple(float(s) for s in np.broadcast_to(np.asarray(spacing_zyx_mm, np.float64), (3,)))


def _corners(axes) -> tuple[np.ndarray, np.ndarray]:
    return np.array([a[0] for a in axes]), np.array([a[-1] for a in axes])


# ---- known correspondence, and cohorts


@functools.lru_cache(maxsize=64)
def _patient(seed: int) -> Patient:
    return Patient(seed)


def patient_of(scan) -> Patient:
    """The patient that a scan of a phantom store shows."""
    about = scan.extra.get("phantom")
    if about is None:
        raise UserError(f"scan {scan.id}: is not a phantom; correspondence is known in the built-in cohort only")
    if about["version"] != VERSION:
        raise UserError(f"scan {scan.id}: phantom version {about['version']}, not {VERSION}; write the cohort again")
    return _patient(about["seed"])


def correspond(scan_a, points_zyx_vox, scan_b) -> np.ndarray:
    """Points (n, 3) of phantom scan a -> the same anatomy in phantom scan b, (n, 3) float voxels, possibly outside."""
    spacing_a, spacing_b = (np.asarray(s.spacing_zyx_mm, np.float64) / SPACING_MM for s in (scan_a, scan_b))
    canonical = patient_of(scan_a).to_canonical_mm(np.asarray(points_zyx_vox, np.float64) * spacing_a)
    return patient_of(scan_b).from_canonical_mm(canonical) / spacing_b


def shared_points(a: Patient, b: Patient, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random points of the body that both volumes show: integer voxels of a (n, 3), the same anatomy in b (n, 3) float.

    Returns up to `count` points; fewer only where the two hardly overlap.
    """
    body = np.zeros(len(tissues.NAMES), bool)
    body[1:] = True
    if not (a.has_arms and b.has_arms):
        body &= ~np.char.startswith(tissues.NAMES, "arm_")
    points = rng.integers(0, a.shape_zyx, size=(12 * count, 3))
    canonical = a.to_canonical_mm(points)
    index = np.floor((canonical - LOW_ZYX_MM) / ATLAS_SPACING_MM + 0.5).astype(int)
    shape = np.array(atlas().shape)
    known = np.all((index >= 0) & (index < shape), axis=1)
    known[known] &= body[atlas()[tuple(index[known].T)]]
    points, canonical = points[known], canonical[known]
    others = b.from_canonical_mm(canonical)
    seen = ((others >= 0) & (others <= np.array(b.shape_zyx) - 1)).all(axis=1)
    return points[seen][:count], others[seen][:count]


def write_cohort(store_path: str, seeds: Iterable[int]) -> Store:
    """Writes patients into a store as scans `phantom_<seed>` with an array `labels`; what is there already is kept.

    >>> store = write_cohort("memory://cohort", seeds=range(0))
    """
    extra = {"phantom": {"version": VERSION, "labels": {str(code): name for code, name in LABELS.items()}}}
    store = Store.create(store_path, (SPACING_MM,) * 3, extra)
    done = set(store.ids())
    todo = [seed for seed in seeds if not (scan_id(seed) in done and store.has_array(scan_id(seed), "labels"))]
    for seed in tqdm.tqdm(todo, desc="Phantom patients", unit="patient", disable=not todo):
        patient = Patient(seed)
        volume, labels = patient.volume(), patient.labels()
        mask = foreground.body_mask(volume)
        store.write_scan(_describe(patient, volume, mask), volume, mask)
        store.write_array(scan_id(seed), "labels", labels)
    return store


def scan_id(seed: int) -> str:
    return f"phantom_{seed:04d}"


def _describe(patient: Patient, volume: np.ndarray, mask: np.ndarray) -> Scan:
    x0, y0, z0 = (float(v) for v in patient.origin_zyx_mm[::-1])
    affine_ras = np.diag([-SPACING_MM, -SPACING_MM, SPACING_MM, 1.0])
    affine_ras[:3, 3] = -x0, -y0, z0
    return Scan(
        id=scan_id(patient.seed),
        file="",
        sha256=hashlib.sha256(volume.tobytes() + affine_ras.tobytes()).hexdigest(),
        patient=scan_id(patient.seed),
        shape_zyx=volume.shape,
        spacing_zyx_mm=(SPACING_MM,) * 3,
        origin_xyz_lps_mm=(x0, y0, z0),
        direction=((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)),
        foreground_box_zyx_vox=foreground.foreground_box(mask, volume.shape),
        original={
            "affine_ras": affine_ras.tolist(),
            "shape_ijk": list(volume.shape[::-1]),
            "dtype": "int16",
            "axcodes": "LPS",
        },
        extra={"phantom": {"seed": patient.seed, "version": VERSION}},
    )
