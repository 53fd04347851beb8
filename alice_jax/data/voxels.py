"""What all file formats share: a header's claims are checked before memory is asked for, and voxels come in pieces.

A header says how many voxels there are, of what type and where in the file. That is compared with the size of the file,
and the numbers are then read and unpacked piece by piece, so that no file, however it was made, takes much more memory
than the volume that comes out of it.
"""

import contextlib
import dataclasses
import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from alice_jax.data import geometry
from alice_jax.data.rejection import Rejected

MAX_VOXELS = 2**30  # a 512 x 512 scan of two metres in half-millimetre slices
MAX_HEADER_BYTES = 2**26
MAX_RATIO = 1032  # of unpacked to packed bytes: deflate cannot do better
SPACING_MM = (0.1, 20.0)
MAX_ORIGIN_MM = 1e6  # single precision, in which headers have it, still tells a tenth of a millimetre there
PIECE = 2**18  # numbers, or bytes, held at once


@dataclasses.dataclass(frozen=True)
class Stored:
    """A volume as its file declares it, with the numbers yet to be read."""

    shape_ijk: tuple[int, ...]
    affine_ras: np.ndarray  # (4, 4): (i, j, k, 1) -> RAS millimetres
    dtype: np.dtype
    pieces: Iterator[np.ndarray]  # (n,) each; joined, they are the volume with i running fastest
    slope: float = 1.0
    intercept: float = 0.0
    patient: str | None = None  # a pseudonym, where the file names its patient


Convert = Callable[[Stored], np.ndarray]  # reads the numbers: an array of the shape `shape_ijk`


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the bytes of the voxels lie."""

    path: Path
    start: int = 0  # byte of the file where they, or what is packed, begin
    packing: str = ""  # "gzip", "zlib", or none
    skip: int = 0  # bytes to leave out after unpacking


# -------------------------------------------------------------------- checks


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The three axes of a volume; trailing axes of length one are dropped."""
    shape = tuple(int(n) for n in shape)
    if any(n <= 0 for n in shape):
        raise Rejected("unreadable", f"its header says shape {shape}")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise Rejected("4-D", f"shape {shape}")
    if len(shape) < 3 or min(shape) < 2:
        raise Rejected("not a volume", f"shape {shape}")
    if math.prod(shape) > MAX_VOXELS:
        raise Rejected("too large", f"shape {shape} is {math.prod(shape):.3g} voxels")
    return shape


def check_size(declared_bytes: int, file_bytes: int, packed: bool) -> None:
    """Whether a file can hold what its header announces."""
    if declared_bytes > file_bytes * (MAX_RATIO if packed else 1):
        raise Rejected("truncated", f"the header announces {declared_bytes} bytes of voxels, the file has {file_bytes}")


def check_affine(affine_ras: np.ndarray, unit: str = "mm") -> np.ndarray:
    """The affine, if it spans a volume of plausible voxels near the world's origin."""
    if not np.isfinite(affine_ras).all():
        raise Rejected("singular affine", "it is not finite")
    with np.errstate(over="ignore"):
        spacing = geometry.spacing_xyz(affine_ras)
    if (spacing == 0).any():
        raise Rejected("singular affine", "an axis has no length")
    if not ((spacing >= SPACING_MM[0]) & (spacing <= SPACING_MM[1])).all():
        stated = f", its unit being {unit}" if unit in ("meter", "micron") else ""
        raise Rejected("spacing", " x ".join(f"{s:.4g}" for s in spacing) + f" mm{stated}")
    volume = abs(np.linalg.det(affine_ras[:3, :3] / spacing))
    if volume < 0.3:  # a gantry tilted by 30 degrees leaves 0.87
        raise Rejected("singular affine", f"its axes are nearly parallel (volume of the unit cell {volume:.2g})")
    if (distance := np.abs(affine_ras[:3, 3]).max()) > MAX_ORIGIN_MM:
        raise Rejected("singular affine", f"its origin lies {distance:.3g} mm away")
    return affine_ras


# -------------------------------------------------------------------- reading


def pieces(place: Place, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The numbers at a place, after a check that the file can hold them; see `Stored.pieces`."""
    count = math.prod(shape)
    size = place.path.stat().st_size - place.start
    check_size(count * dtype.itemsize + place.skip, size, bool(place.packing))
    return _pieces(place, dtype, count)


def _pieces(place: Place, dtype: np.dtype, count: int) -> Iterator[np.ndarray]:
    with opened(place) as file:
        for _ in range(place.skip // PIECE):
            _read_exactly(file, PIECE)
        _read_exactly(file, place.skip % PIECE)
        for first in range(0, count, PIECE):
            yield np.frombuffer(_read_exactly(file, min(PIECE, count - first) * dtype.itemsize), dtype)
        file.read(PIECE)  # what was packed ends with a checksum, which is compared where it is read


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError("the file ends before its voxels do")
    return data


@contextlib.contextmanager
def opened(place: Place) -> Iterator[BinaryIO]:
    """The file, unpacked while it is read, from the place's start."""
    with open(place.path, "rb") as file:
        file.seek(place.start)
        yield cast(BinaryIO, io.BufferedReader(_Unpacked(file, place.packing), PIECE)) if place.packing else file


class _Unpacked(io.RawIOBase):
    """What a zlib stream or the members of a gzip file hold; zlib compares their checksums."""

    def __init__(self, file: BinaryIO, packing: str):
        self._file, self._rest = file, b""
        self._wbits = {"zlib": zlib.MAX_WBITS, "gzip": 16 + zlib.MAX_WBITS}[packing]
        self._stream = zlib.decompressobj(self._wbits)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            self._rest = self._rest or self._file.read(2**16)
            if self._stream.eof:
                if self._wbits == zlib.MAX_WBITS or not self._rest.startswith(b"\x1f"):
                    return 0
                self._stream = zlib.decompressobj(self._wbits)  # the next member
            if not self._rest:
                raise EOFError("the compressed data end too early")
            piece = self._stream.decompress(self._rest, len(buffer))
            self._rest = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)
