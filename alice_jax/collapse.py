"""Whether features still tell things apart: their spread, and the range that it must keep to.

A network that is trained to agree with itself may end with the same answer for everything, which no loss shows. Then
the teacher's entropy, the variance of its features or the number of directions that they use leaves its range.
"""

from collections.abc import Mapping, Sequence

import numpy as np

ACTIONS = ("warn", "stop", "ignore")
Ranges = Mapping[str, tuple[float, float]]


def variance(features: np.ndarray) -> float:
    """Total variance of the directions of `(rows, channels)` vectors: 0 where all agree, 1 where they cancel out.

    >>> variance(np.array([[2.0, 0.0], [0.0, 1.0]]))  # two at right angles
    0.5
    """
    features = features.astype(np.float64)
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return float(directions.var(axis=0).sum())


def effective_rank(features: np.ndarray) -> float:
    """How many directions `(rows, channels)` vectors use: exp of the entropy of their normalised singular values
    (RankMe, arXiv 2210.02885, eq. 1 and 2), from 1 to the smaller of the two sizes.

    >>> round(effective_rank(np.diag([3.0, 1.0])), 4)  # exp of the entropy of 3/4 and 1/4
    1.7548
    """
    features = features.astype(np.float64)  # of a float32 product the square roots would be noise of 1e-3
    product = features.T @ features if len(features) > features.shape[1] else features @ features.T
    if not np.isfinite(product).all():
        return np.nan
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(product), 0))
    shares = singular / max(singular.sum(), 1e-12)
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def spread(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Variance and effective rank of each kind of features `(rows, channels)` over all batches."""
    metrics: dict[str, float] = {}
    for name in batches[0]:
        features = np.concatenate([batch[name] for batch in batches])
        metrics |= {f"variance_{name}": variance(features), f"effective_rank_{name}": effective_rank(features)}
    return metrics


def judged(metrics: Mapping[str, float], ranges: Ranges) -> str:
    """Names the metrics that have left their range; "" if all keep to it.

    Args:
      ranges: (lowest, highest) by the beginning of a metric's name.

    >>> judged({"effective_rank_crops": 1.25, "effective_rank_tokens": 7.5}, {"effective_rank": (1.5, np.inf)})
    'features have collapsed or are about to: effective_rank_crops 1.25 (healthy: 1.5 to inf)'
    """
    found = [
        f"{name} {value:.3g} (healthy: {low:.3g} to {high:.3g})"
        for name, value in metrics.items()
        for start, (low, high) in ranges.items()
        if name.startswith(start) and not low <= value <= high
    ]
    return f"features have collapsed or are about to: {', '.join(found)}" if found else ""
