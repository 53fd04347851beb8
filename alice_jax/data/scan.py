"""The description of one prepared scan: what it is, where its voxels lie and where it came from."""

import dataclasses
from typing import Any

import numpy as np

from alice_jax.data import geometry
from alice_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Scan:
    """What is known of a prepared scan (scan.json)."""

    id: str
    file: str  # where it came from
    sha256: str  # of its voxels and geometry, so that copies are recognised whatever their file format
    patient: str  # scans of one patient are never paired
    shape_zyx: tuple[int, int, int]
    spacing_zyx_mm: tuple[float, float, float]
    origin_xyz_lps_mm: tuple[float, float, float]  # centre of voxel (0, 0, 0)
    direction: tuple[tuple[float, ...], ...]  # (3, 3): columns are the stored axes x, y, z in LPS
    foreground_box_zyx_vox: tuple[tuple[int, ...], tuple[int, ...]]  # half-open corners around the body
    original: dict[str, Any]  # affine_ras (4, 4) in nibabel's convention, shape_ijk, dtype, axcodes
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def affine_lps(self) -> np.ndarray:
        """(4, 4): stored index (x, y, z, 1) -> LPS millimetres."""
        return geometry.stored_affine(self.origin_xyz_lps_mm, self.direction, self.spacing_zyx_mm)

    @staticmethod
    def from_json(record: Any, what: str) -> "Scan":
        """The inverse of `json.dumps(dataclasses.asdict(scan))`; `what` names it in the error."""
        try:
            values: dict[str, Any] = {field.name: _tuples(record[field.name]) for field in dataclasses.fields(Scan)}
            scan = Scan(**values)
            if not np.isfinite(scan.affine_lps).all():
                raise ValueError("its geometry is not finite")
            return scan
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{what}: is damaged ({error}); prepare this scan again") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
