"""Every backbone's weights in PyTorch's names: those of the authors' nnFormer and of nnU-Net's classes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alice_jax.interop import nnformer, primus, resenc
from alice_jax.interop.names import State


class Translation(NamedTuple):
    """Both directions.

    Attributes:
      from_torch: a state dict as the parameters of a reconstructing network with a mask token.
      to_torch: parameters and the index of relative positions, "correct" or "release", as a state dict.
    """

    from_torch: Callable[[State], Mapping[str, Any]]
    to_torch: Callable[[Mapping[str, Any], str], State]


TRANSLATIONS = {
    "nnformer": Translation(functools.partial(nnformer.from_torch, mask_token=True), nnformer.to_torch),
    "resenc": Translation(resenc.from_torch, lambda params, _: resenc.to_torch(params)),
    "primus": Translation(
        functools.partial(primus.from_torch, mask_token=True), lambda params, _: primus.to_torch(params)
    ),
}
