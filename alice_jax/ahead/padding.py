"""What a TPU computes beyond what was asked, because arrays lie in tiles: read from a compiled program's text.

A TPU's arrays are cut into tiles of 8 × 128 numbers over their two minor dimensions, and sides are filled up to whole
tiles. A product whose channels fill 8 of 128 lanes moves and multiplies sixteen times what it needs. On a TPU both
matrix products and convolutions are `convolution` instructions: a batch of products is one with a window.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

_DEFINITION = re.compile(r"^\s*(?:ROOT )?%(?P<name>\S+) = [a-z]+[0-9]*\[(?P<shape>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?")
_CONVOLUTION = re.compile(r" convolution\(%(?P<left>[^\s,)]+), %(?P<right>[^\s,)]+)\)")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape, and its dimensions from minor to major with the tile of the first ones, as a layout names them."""

    shape: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tile: tuple[int, ...]

    def padded(self) -> tuple[int, ...]:
        """The shape filled up to whole tiles.

        >>> Array((64, 3, 8), (2, 0, 1), (8, 128)).padded()
        (64, 3, 128)
        """
        sides = list(self.shape)
        for axis, side in zip(self.minor_to_major, reversed(self.tile), strict=False):
            sides[axis] = int(_up(sides[axis], side))
        return tuple(sides)


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution, or several.

    Attributes:
      name: of the operation that it comes from.
      flops: that its shapes ask for, 2 for each multiplication.
      filled_flops: of the same with the sides of each matrix product filled up to what the matrix unit takes.
      numbers: in both operands and the result.
      stored: the same with their tiles filled up.
    """

    name: str
    flops: float
    filled_flops: float
    numbers: int
    stored: int

    def __add__(self, other: "Product") -> "Product":
        mine, others = dataclasses.astuple(self)[1:], dataclasses.astuple(other)[1:]
        return Product(self.name, *(a + b for a, b in zip(mine, others, strict=True)))


def products(hlo_text: str, unit: int = 128) -> list[Product]:
    """All products of a program compiled for a TPU.

    Args:
      unit: side of the chip's matrix unit.
    """
    arrays, found = {}, []
    lines = hlo_text.splitlines()
    for line in lines:
        if defined := _DEFINITION.match(line):
            arrays[defined["name"]] = _array(defined["shape"], defined["layout"] or "")
            if operands := _CONVOLUTION.search(line):
                found.append((line, operands["left"], operands["right"], defined["name"]))
    return [_product(line, [arrays[name] for name in names], unit) for line, *names in found]


def _array(shape: str, layout: str) -> Array:
    sides = _numbers(shape)
    order, _, tiles = layout.partition(":")
    tile = re.search(r"T\(([\d,]+)\)", tiles)
    return Array(sides, _numbers(order), _numbers(tile[1]) if tile else ())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _product(line: str, arrays: Sequence[Array], unit: int) -> Product:
    """Left operand, right operand and result; each names its dimensions, the right one's are i, o and the window's."""
    window = re.search(r"window=\{([^}]*)\}", line)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    labels = _LABELS.search(line)
    assert labels is not None, line
    left, right, result = (dict(zip(n, a.shape, strict=True)) for n, a in zip(labels.groups(), arrays, strict=True))
    rows, inner, columns, times = float(result["b"]), float(right["i"]), float(result["f"]), 1.0
    for place, axis in enumerate(sorted(name for name in left if name.isdecimal())):
        inputs, size, outputs = left[axis], right[axis], result[axis]
        taps = _taps(inputs, size, outputs, fields, place)
        if size == 1:
            rows *= outputs
        elif inputs == 1:
            columns *= outputs
        elif outputs == 1:
            inner *= taps
        elif taps == outputs == size:  # a batch of products
            times *= outputs
        elif size > outputs:  # a kernel's gradient
            inner, times = inner * taps / outputs, times * outputs
        else:
            rows, times = rows * outputs, times * taps / outputs
    filled = min(_up(rows, 8) * _up(columns, unit), _up(rows, unit) * _up(columns, 8))
    operation = re.search(r'op_name="([^"]*)"', line)
    return Product(
        name=operation[1] if operation else "",
        flops=2 * times * rows * inner * columns,
        filled_flops=2 * times * _up(inner, unit) * filled,
        numbers=sum(math.prod(array.shape) for array in arrays),
        stored=sum(math.prod(array.padded()) for array in arrays),
    )


def _up(side: float, unit: int) -> float:
    """`side` filled up to a multiple of `unit`."""
    return math.ceil(side / unit) * unit


def _taps(inputs: int, window: int, outputs: int, fields: dict[str, str], place: int) -> int:
    """Multiplications along one axis of the window that fall on a number and not on padding or between dilated ones."""

    def at(name: str, otherwise: str) -> str:
        return fields[name].split("x")[place] if name in fields else otherwise

    stride, low = int(at("stride", "1")), int(at("pad", "0_0").split("_")[0])
    spread, apart = int(at("lhs_dilate", "1")), int(at("rhs_dilate", "1"))
    last = (inputs - 1) * spread
    places = (o * stride - low + k * apart for o in range(outputs) for k in range(window))
    return sum(0 <= place <= last and place % spread == 0 for place in places)


KINDS = (
    ("stem convolutions", r"/patch_embed/conv"),
    ("other convolutions", r"conv_general_dilated"),
    ("attention products", r"/attention/\.\.\.|CASA.*bhq"),
    ("heads and CASA", r"Head|CASA"),
    ("linear layers", r""),
)


def by_kind(products: Iterable[Product], kinds: Sequence[tuple[str, str]] = KINDS) -> list[Product]:
    """Sums of the products of each kind, by the first pattern that is found in their names.

    >>> by_kind([Product("a/conv", 1, 2, 3, 4), Product("b/conv", 1, 4, 3, 6)], [("convolutions", "conv")])
    [Product(name='convolutions', flops=2, filled_flops=6, numbers=6, stored=10)]
    """
    sums: dict[str, Product] = {}
    for product in products:
        kind = next(kind for kind, pattern in kinds if re.search(pattern, product.name))
        named = dataclasses.replace(product, name=kind)
        sums[kind] = sums[kind] + named if kind in sums else named
    return sorted(sums.values(), key=lambda product: -product.filled_flops)
