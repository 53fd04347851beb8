"""Files to arrays, whatever their format.

Nothing trusts a header: what it declares is compared with the size of the file before memory is asked for, and whatever
goes wrong ends in a `Rejected`.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alice_jax.data import dicom, hounsfield, nifti, text_header
from alice_jax.data.rejection import Rejected
from alice_jax.data.voxels import Convert, Stored


@dataclasses.dataclass(frozen=True)
class Image:
    """A CT as its file has it."""

    hu_ijk: np.ndarray  # int16 Hounsfield units, or what `convert` gave
    affine_ras: np.ndarray  # (4, 4): (i, j, k, 1) -> RAS millimetres
    dtype: str  # of the stored numbers
    patient: str | None = None  # a pseudonym, where the file names its patient


def read(path: str | os.PathLike, series: Sequence[str] = (), convert: Convert = hounsfield.to_hu) -> Image:
    """Reads one file, or the DICOM slices `series`; raises `Rejected`.

    `convert` makes the voxels from what the file has stored.
    """
    try:
        stored = dicom.read_header(series) if series else _read_header(Path(path))
        return Image(convert(stored), stored.affine_ras, stored.dtype.name, stored.patient)
    except EOFError as error:
        raise Rejected("truncated", str(error)) from error
    except FileNotFoundError as error:  # a .hdr without its .img
        raise Rejected("missing", f"there is no {os.path.basename(str(error.filename))}") from error
    except MemoryError as error:
        raise Rejected("too large", "not enough memory to read it") from error
    except (Rejected, KeyboardInterrupt):
        raise
    except Exception as error:  # damaged files raise anything
        raise Rejected("unreadable", dicom.last_words(error)) from error


def _read_header(path: Path) -> Stored:
    name = path.name.lower()
    if not path.exists():
        raise Rejected("missing", "there is no such file")
    if not path.is_file():
        raise Rejected("unreadable", "not a regular file")
    if path.stat().st_size == 0:
        raise Rejected("unreadable", "the file is empty")
    if name.endswith(nifti.ENDINGS):
        return nifti.read_header(path)
    if name.endswith(text_header.ENDINGS):
        return text_header.read_header(path)
    raise Rejected("unreadable", "not a known format (NIfTI, NRRD, MetaImage, DICOM series)")
