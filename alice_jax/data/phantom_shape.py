"""The shape of a phantom patient: a random smooth map between the patient and the canonical anatomy, both ways."""

import dataclasses

import numpy as np

from alice_jax.data import splines

CENTER = np.array([280.0, 0.0, 0.0])  # canonical place of patient millimetre (0, 0, 0), but for the displacement
# Places whose size differs between patients: canonical centre (z, y, x), radius, largest relative change.
_SIZES = (
    ((395, -18, 15), 48, 0.25),
    ((318, -5, -60), 58, 0.28),
    ((330, 44, 92), 34, 0.45),
    ((312, -20, 55), 36, 0.4),
    ((272, 44, -60), 32, 0.3),
    ((287, 44, 60), 32, 0.3),
    ((76, -32, 0), 42, 0.4),
    ((430, 10, -72), 62, 0.25),
    ((430, 10, 72), 62, 0.25),
    ((195, -30, 0), 80, 0.3),
    ((465, 0, 5), 32, 0.25),
    ((160, 50, 0), 50, 0.2),
)


@dataclasses.dataclass(frozen=True)
class Deformation:
    """canonical = affine @ patient + CENTER + field(patient), all in millimetres (z, y, x); it has an inverse.

    Attributes:
      affine: (3, 3).
      field: displacement, three components.
    """

    affine: np.ndarray
    field: splines.SplineField

    def __call__(self, points_zyx_mm: np.ndarray) -> np.ndarray:
        """Patient millimetres (n, 3) -> canonical millimetres (n, 3)."""
        return points_zyx_mm @ self.affine.T + CENTER + self.field.at(points_zyx_mm)

    def inverse(self, canonical_zyx_mm: np.ndarray) -> np.ndarray:
        """Canonical millimetres (n, 3) -> patient millimetres (n, 3), by damped Newton steps."""
        linear = np.linalg.inv(self.affine)
        points = (canonical_zyx_mm - CENTER) @ linear.T
        for _ in range(6):
            points = points + 0.8 * (canonical_zyx_mm - self(points)) @ linear.T
        for _ in range(20):
            missing = canonical_zyx_mm - self(points)
            if not len(missing) or np.abs(missing).max() < 1e-4:
                break
            step = np.linalg.solve(self.affine + self.field.jacobian(points), missing[..., None])[..., 0]
            length = np.linalg.norm(step, axis=1, keepdims=True)
            points = points + step * np.minimum(1, 20.0 / np.maximum(length, 1e-9))
        return points

    def on_grid(self, axes_mm: list[np.ndarray]) -> np.ndarray:
        """Canonical millimetres of every voxel of a patient grid, given its three axes -> (3, z, y, x) float32."""
        canonical = self.field.on_grid(*axes_mm)
        for row, values in enumerate(canonical):
            values += np.float32(CENTER[row])
            for column, axis in enumerate(axes_mm):
                shape = [-1 if i == column else 1 for i in range(3)]
                values += (self.affine[row, column] * axis).astype(np.float32).reshape(shape)
        return canonical


def draw(rng: np.random.Generator) -> Deformation:
    """A new patient's shape: size, proportions, posture, organ sizes, fatness; smooth and without folds."""
    size = rng.uniform(0.84, 1.0) * rng.uniform(0.93, 1.07, 3)
    rz, ry, rx = np.deg2rad(rng.normal(0, (3.0, 1.5, 2.0)))
    turn = np.eye(3) + np.array([[0, rx, ry], [-rx, 0, rz], [-ry, -rz, 0]])
    turn, _ = np.linalg.qr(turn)
    affine = np.diag(1 / size) @ (turn * np.sign(np.diag(turn)))
    reach = np.array([280.0, 132.0, 236.0]) * size * 1.08 + 20
    field = splines.SplineField.covering(-reach, reach, 30.0, components=3)
    nodes = field.nodes_zyx_mm()
    base = nodes @ affine.T + CENTER
    bend = splines.random_field(rng, -reach, reach, (100, 80, 90), components=3).at(nodes.reshape(-1, 3))
    shift = bend.reshape(base.shape) * (8.5, 6.5, 6.5)
    # Some have long chests, others long bellies.
    stretch = splines.random_field(rng, -reach, reach, (105, 4000, 4000))
    shift[..., 0] += 12.0 * stretch.at(nodes.reshape(-1, 3)).reshape(base.shape[:3])
    for center, radius, change in _SIZES:
        away = base - center
        near = np.exp(-np.sum(away**2, axis=-1, keepdims=True) / (2 * radius**2))
        shift -= rng.uniform(-change, change) * near * away
    away = (base - (0, 4, 0)) * (0, 1, 1)
    near = np.exp(-np.sum((away / (1, 70, 95)) ** 2, axis=-1, keepdims=True) / 2)
    shift -= rng.uniform(-0.28, 0.12) * near * away  # thin or fat: the cavity against the layers around it
    # A map that folds has no inverse: keep the volume ratio well above zero everywhere.
    probes = nodes[1:-1, 1:-1, 1:-1].reshape(-1, 3)
    for _ in range(30):
        field.coefficients[...] = np.moveaxis(shift, -1, 0)
        derivative = affine + field.jacobian(np.concatenate([probes, probes + 15.0]))
        if np.linalg.det(derivative).min() > 0.35 * np.linalg.det(affine):
            break
        shift *= 0.93
    return Deformation(affine, field)
