"""Overlap and surface distances of two masks, by DeepMind's surface-distance, the reference for surface Dice.

A surface is made of elements between the centres of 2 x 2 x 2 voxels, each with its area. The distance of an element is
that to the nearest element of the other surface (Nikolov et al. 2018, arXiv 1809.04430).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import surface_distance

PERCENT = 95.0


@dataclasses.dataclass(frozen=True)
class Scores:
    """How well a mask fits the true one; all NaN where both are empty, since nothing was to be found.

    Where one is empty, `dice` and `nsd` are 0 and `hd95_mm` is the diagonal of the image, the farthest that two voxels
    of it can lie apart, so that means stay finite.

    Attributes:
      dice: 2 |A ∩ B| / (|A| + |B|), of voxels.
      hd95_mm: 95th percentile, by area, of the distances from either surface to the other; the greater of the two.
      nsd: share of both surfaces that lies within the tolerance of the other (surface Dice).
    """

    dice: float
    hd95_mm: float
    nsd: float


def dice(truth: np.ndarray, predicted: np.ndarray) -> float:
    """2 |A ∩ B| / (|A| + |B|) of two bool masks of the same shape; NaN where both are empty."""
    return float(surface_distance.compute_dice_coefficient(truth, predicted))


def score(truth: np.ndarray, predicted: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float) -> Scores:
    """Of two bool masks of the same shape, with the spacing along each axis."""
    if not truth.any() and not predicted.any():
        return Scores(math.nan, math.nan, math.nan)
    if not truth.any() or not predicted.any():
        return Scores(0.0, float(np.linalg.norm(np.multiply(truth.shape, spacing_mm))), 0.0)
    distances = surface_distance.compute_surface_distances(truth, predicted, spacing_mm)
    return Scores(
        dice(truth, predicted),
        float(surface_distance.compute_robust_hausdorff(distances, PERCENT)),
        float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm)),
    )
