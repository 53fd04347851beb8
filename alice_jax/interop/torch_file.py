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


def load(path: str) -> dict[str, np.ndarray]:
    """The arrays of a .pth file by name; only plain tensors are read, no code is run."""
    require_torch()
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
        arrays = {name: value.numpy() for name, value in state.items() if isinstance(value, torch.Tensor)}
    except OSError as error:
        raise UserError(f"weights file {path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # torch raises many kinds for a bad file, and advises to run the code in it
        kind = type(error).__name__
        raise UserError(
            f"weights file {path}: not a PyTorch file of plain tensors ({kind}); save a state dict"
        ) from error
    if not arrays:
        raise UserError(f"weights file {path}: holds no tensors; give a state dict")
    return arrays
