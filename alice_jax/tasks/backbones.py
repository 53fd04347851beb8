"""The backbone that a configuration names, for every task that has one."""

from collections.abc import Callable, Mapping
from typing import Any

from alice_jax.errors import UserError
from alice_jax.models.backbone import Backbone
from alice_jax.models.nnformer import NNFormer
from alice_jax.models.primus import Primus
from alice_jax.models.resenc import ResEnc

KINDS: dict[str, Callable[..., Backbone]] = {"nnformer": NNFormer, "resenc": ResEnc, "primus": Primus}


def name_of(model: Mapping[str, Any]) -> str:
    """`model.backbone` of a configuration."""
    name = model.get("backbone", "nnformer")  # runs of older versions have none
    if name not in KINDS:
        raise UserError(f"model.backbone {name!r}: choose one of {', '.join(KINDS)}")
    return name


def sizes_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config.model` that are sizes of the backbone."""
    name = name_of(model)
    if name == "nnformer":
        return {field: model[field] for field in ("width", "depths", "heads", "windows", "drop_path")}
    return dict(model[name])


def make(model: Mapping[str, Any], *, position_index: str = "correct", **fields: Any) -> Backbone:
    """The network of `config.model`; `fields` are those that every backbone has, such as `out_channels`.

    position_index: nnFormer's, "correct" or "release"; the others have none.
    """
    if name_of(model) == "nnformer":
        fields["position_index"] = position_index
    sizes = {field: tuple(x) if isinstance(x, list | tuple) else x for field, x in sizes_of(model).items()}
    remat = tuple(model.get("remat", ()))  # runs of older versions have none
    return KINDS[name_of(model)](**sizes, remat=remat, **fields)
