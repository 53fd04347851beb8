"""PyTorch's file format; the only code of the package that needs PyTorch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from alice_jax.errors import UserError


def require_torch() -> None:
    """Says how to get PyTorch where it is missing."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError("PyTorch is not installed: pip install 'alice_jax[torch]'") from None


def save(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict that `torch.load(path)` gives back as tensors; an array of several names is written once."""
    require_torch()
    import torch

    tensors = {id(value): torch.from_numpy(np.array(value)) for value in state.values()}
    torch.save({name: tensors[id(value)] for name, value in state.items()}, path)
