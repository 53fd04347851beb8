"""What a network's numbers mean: how a scan must be prepared before the network sees it, and what its outputs are.

A contract travels in each checkpoint and beside exported weights. Whoever uses the weights prepares scans by it; what
cannot be prepared so is an error, never a lower score.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from alice_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Contract:
    """See the module.

    Attributes:
      frame: order and directions of the axes, as `data.store.FRAME` has them.
      spacing_zyx_mm: of the store's voxels.
      window_hu: intensities are clipped to it and scaled linearly.
      crop_shape_zyx: voxels of the store that the network sees at once.
      classes: names of what the network tells apart, background first; () where it tells nothing apart.
    """

    frame: str
    spacing_zyx_mm: tuple[float, float, float]
    window_hu: tuple[float, float]
    crop_shape_zyx: tuple[int, int, int]
    classes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` is the inverse."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @staticmethod
    def from_json(record: Mapping[str, Any] | None, what: str) -> "Contract":
        """The contract in a checkpoint's record, or in the JSON file beside exported weights.

        Args:
          what: names the place in the error.

        >>> contract = Contract("zyx", (2.0, 2.0, 2.0), (-125.0, 225.0), (64, 64, 64), ("background", "liver"))
        >>> Contract.from_json(contract.to_json(), "here") == contract
        True
        """
        if record is None:
            raise UserError(
                f"{what}: says nothing of spacing, window and crop, as runs of older versions; "
                "let the run go on for a step, which writes it"
            )
        try:
            return Contract(
                frame=str(record["frame"]),
                spacing_zyx_mm=_triple(float, record["spacing_zyx_mm"]),
                window_hu=(float(record["window_hu"][0]), float(record["window_hu"][1])),
                crop_shape_zyx=_triple(int, record["crop_shape_zyx"]),
                classes=tuple(map(str, record.get("classes", ()))),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{what}: what it says of spacing, window and crop is damaged ({error!r})") from None


def _triple(kind: Any, values: Any) -> tuple[Any, Any, Any]:
    z, y, x = (kind(value) for value in values)
    return z, y, x


REMEDIES = {
    "frame": "prepare the scans with this version",
    "spacing_zyx_mm": "prepare the scans again at that spacing",
    "window_hu": "set views.window_hu to it",
    "crop_shape_zyx": "set views.crop_shape_zyx to it",
    "classes": "give a store with the same labels",
}


def check(trained: Contract, here: Contract, what: str) -> None:
    """A `UserError` where scans are prepared otherwise than the weights of `what` were trained on.

    Classes are compared only where both sides have some.
    """
    for field in dataclasses.fields(Contract):
        theirs, ours = getattr(trained, field.name), getattr(here, field.name)
        if theirs != ours and not (field.name == "classes" and not (theirs and ours)):
            raise UserError(f"{what}: {field.name} is {theirs} there and {ours} here; {REMEDIES[field.name]}")
