"""What the embedder sees of a scan."""

import numpy as np


def network_input(volume_hu: np.ndarray) -> np.ndarray:
    """HU clipped to [−1024, 3071], scaled to [0, 255], minus 50 (SAM, arXiv 2012.02383): fp32 of the same shape.

    >>> network_input(np.array([-2000, -1024, 3071], np.int16)).tolist()
    [-50.0, -50.0, 205.0]
    """
    clipped = np.clip(volume_hu, -1024, 3071).astype(np.float32)
    return (clipped + 1024) / 4095 * 255 - 50
