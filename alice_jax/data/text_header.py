"""NRRD and MetaImage: a header of text lines, then voxels in the same file or in one that the header names.

They are not read through ITK: its MetaImage reader can be made to crash and to loop for ever, and it follows any path.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from alice_jax.data import geometry, voxels
from alice_jax.data.rejection import Rejected, path_within
from alice_jax.data.voxels import Place, Stored

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
MAX_TEXT_BYTES = 2**16

_TYPES = {
    "i1": "signed char|int8|int8_t|MET_CHAR",
    "u1": "uchar|unsigned char|uint8|uint8_t|MET_UCHAR",
    "i2": "short|short int|signed short|signed short int|int16|int16_t|MET_SHORT",
    "u2": "ushort|unsigned short|unsigned short int|uint16|uint16_t|MET_USHORT",
    "i4": "int|signed int|int32|int32_t|MET_INT",
    "u4": "uint|unsigned int|uint32|uint32_t|MET_UINT",
    "i8": "longlong|long long|long long int|signed long long|signed long long int|int64|int64_t|MET_LONG_LONG",
    "u8": "ulonglong|unsigned long long|unsigned long long int|uint64|uint64_t|MET_ULONG_LONG",
    "f4": "float|MET_FLOAT",
    "f8": "double|MET_DOUBLE",
}
_TO_LPS = {
    "left-posterior-superior": (1, 1, 1),
    "lps": (1, 1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
}


def read_header(path: Path) -> Stored:
    """The volume of a .nrrd, .nhdr, .mha or .mhd file; raises `Rejected`."""
    with open(path, "rb") as file:
        text = file.read(MAX_TEXT_BYTES)
    header = (_metaimage if path.suffix.lower() in (".mha", ".mhd") else _nrrd)(path, text)
    shape = voxels.check_shape(header.shape)
    place, size = header.place, math.prod(shape) * header.dtype.itemsize
    if header.skip == -1 and not place.packing:  # the voxels are the end of the file
        place = dataclasses.replace(place, start=max(0, place.path.stat().st_size - size))
    elif header.skip >= 0:
        place = dataclasses.replace(place, skip=header.skip)
    else:
        raise Rejected("unreadable", f"its header skips {header.skip} bytes")
    pieces = voxels.pieces(place, header.dtype, shape)
    if header.affine_lps is None:
        raise Rejected("no orientation", "the header does not state it")
    return Stored(shape, voxels.check_affine(geometry.RAS_FROM_LPS @ header.affine_lps), header.dtype, pieces)


@dataclasses.dataclass(frozen=True)
class _Header:
    """What both formats say."""

    shape: tuple[int, ...]
    dtype: np.dtype
    place: Place
    skip: int  # bytes before the voxels; -1: they end with the file
    affine_lps: np.ndarray | None  # None where the header does not orient it


def _place(path: Path, end: int, detached: str, packing: str) -> Place:
    """Where a header says that its voxels begin: behind its own end, or in a file beside it."""
    if not detached:
        return Place(path, end, packing)
    if detached.upper().startswith("LIST") or "%" in detached:
        raise Rejected("unreadable", "its voxels are spread over several files")
    data_path = path_within(path.parent, detached)
    if not data_path.is_file():
        raise Rejected("missing", f"the header names {detached}")
    return Place(data_path, 0, packing)


def _affine_lps(axes_xyz, steps, origin) -> np.ndarray:
    """From the first three of the file's axes, a row each, their steps in millimetres, and the first voxel's place."""
    affine_lps = np.eye(4)
    affine_lps[:3, :3] = (np.asarray(axes_xyz)[:3, :3] * np.asarray(steps)[:3, None]).T
    affine_lps[:3, 3] = np.asarray(origin)[:3]
    return affine_lps


def _of(fields: Mapping[str, str], *names: str) -> str:
    """The first field that is there."""
    for name in names:
        if fields.get(name):
            return fields[name]
    raise Rejected("unreadable", f"its header has no {names[0]}")


def _numbers(text: str, count: int) -> list[float]:
    numbers = [float(word) for word in text.split()]
    if len(numbers) != count:
        raise Rejected("unreadable", f"its header has {len(numbers)} numbers where {count} belong: {text[:80]}")
    return numbers


def _dtype(name: str, big_endian: bool) -> np.dtype:
    for code, names in _TYPES.items():
        if name in names.split("|"):
            return np.dtype((">" if big_endian else "<") + code)
    raise Rejected("unreadable", f"its header has the number type {name[:80]}")


# -------------------------------------------------------------------- MetaImage


def _metaimage(path: Path, text: bytes) -> _Header:
    fields: dict[str, str] = {}
    end = 0
    for line in text.split(b"\n"):
        end += len(line) + 1
        key, _, value = line.decode("latin-1").partition("=")
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            break
    detached = _of(fields, "ElementDataFile")
    packed = _is_true(fields, "CompressedData")
    place = _place(path, end, "" if detached.upper() == "LOCAL" else detached, "zlib" if packed else "")
    size, claimed = place.path.stat().st_size, int(fields.get("CompressedDataSize") or 0)
    if packed and claimed > size:
        raise Rejected("truncated", f"the header announces {claimed} bytes, the file has {size}")
    if int(fields.get("ElementNumberOfChannels") or 1) != 1:
        raise Rejected("several values per voxel", f"{fields['ElementNumberOfChannels']} channels")
    if fields.get("BinaryData", "True").lower() != "true":
        raise Rejected("unreadable", "its voxels are written as text; only binary ones are read")
    shape = tuple(int(word) for word in _of(fields, "DimSize").split())
    affine = None
    if names := fields.keys() & {"TransformMatrix", "Rotation", "Orientation"}:
        n = len(shape)
        axes = np.reshape(_numbers(fields[min(names)], n * n), (n, n))
        origin = next((fields[name] for name in ("Offset", "Position", "Origin") if name in fields), "0 " * n)
        affine = _affine_lps(axes, _numbers(_of(fields, "ElementSpacing", "ElementSize"), n), _numbers(origin, n))
    big_endian = _is_true(fields, "BinaryDataByteOrderMSB") or _is_true(fields, "ElementByteOrderMSB")
    dtype = _dtype(_of(fields, "ElementType"), big_endian)
    skip = int(fields.get("HeaderSize") or 0)
    if skip > 0:  # counted from the start of the file
        place, skip = dataclasses.replace(place, start=skip), 0
    return _Header(shape, dtype, place, skip, affine)


def _is_true(fields: Mapping[str, str], name: str) -> bool:
    return fields.get(name, "").lower() == "true"


# -------------------------------------------------------------------- NRRD


def _nrrd(path: Path, text: bytes) -> _Header:
    if not text.startswith(b"NRRD000"):
        raise Rejected("unreadable", "its first bytes are no NRRD header")
    fields: dict[str, str] = {}
    end = 0
    for line in text.split(b"\n"):
        end += len(line) + 1
        if not line.strip():
            break
        key, _, value = line.decode("latin-1").partition(":")
        if not value.startswith("="):  # of the user's own
            fields[key.replace(" ", "").lower()] = value.strip()
    detached = fields.get("datafile", "")
    if end >= MAX_TEXT_BYTES:
        raise Rejected("unreadable", f"its header does not end within {MAX_TEXT_BYTES} bytes")
    packing = {"raw": "", "gzip": "gzip", "gz": "gzip"}.get(encoding := _of(fields, "encoding").lower())
    if packing is None or int(fields.get("lineskip") or 0):
        raise Rejected("unreadable", f"encoding {encoding[:80]}; only raw and gzip, without skipped lines, are read")
    place = _place(path, end, detached, packing)
    shape = tuple(int(word) for word in _of(fields, "sizes").split())
    for kind, size in zip(fields.get("kinds", "").lower().split(), shape, strict=False):
        if kind not in ("domain", "space", "time", "none", "???") and size > 1:
            raise Rejected("complex" if kind == "complex" else "several values per voxel", f"an axis of {kind} values")
    affine = None
    signs = _TO_LPS.get(fields.get("space", "").lower().removesuffix("-time"))
    vectors = [_vector(words) for words in re.findall(r"\(([^()]*)\)", fields.get("spacedirections", ""))]
    if signs and vectors:
        if len(vectors) < 3 or min(map(len, vectors[:3])) < 3:
            raise Rejected("unreadable", "its header has fewer than three space directions")
        origin = _vector(fields.get("spaceorigin", "(0,0,0)").strip("()"))
        axes = [vector[:3] for vector in vectors[:3]]
        affine = np.diag([*signs, 1]) @ _affine_lps(axes, np.ones(3), (origin + [math.nan] * 3)[:3])
    if other := set(re.findall(r'"([^"]+)"', fields.get("spaceunits", ""))) - {"mm", "millimeter", "millimeters"}:
        raise Rejected("spacing", f"its unit is {min(other)[:80]}, where millimetres are read")
    big_endian = fields.get("endian", "").lower() == "big"
    dtype = _dtype(_of(fields, "type").lower(), big_endian)
    return _Header(shape, dtype, place, int(fields.get("byteskip") or 0), affine)


def _vector(words: str) -> list[float]:
    return [float(word) for word in words.split(",")]
