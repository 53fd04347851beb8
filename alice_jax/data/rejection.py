"""Why a file cannot become a scan: short stable names, each with what its owner can do about it."""

import os
from pathlib import Path

REMEDIES = {
    "missing": "check the path; a link may point to nothing",
    "outside the data set": "a data set may only name files in its own folder; move the file there",
    "unreadable": "the file is damaged or of another format; copy or export it again",
    "truncated": "the file ends before its voxels do; copy or download it again",
    "too large": "more voxels than a scan can have; check the header, or crop the scan",
    "not a volume": "give a volume of at least two slices, not a single picture, a localizer or a matrix",
    "4-D": "save one time point or phase as a 3-D file",
    "several values per voxel": "colour and vector images are not CT; export the original series",
    "complex": "complex numbers are not CT; export the original series",
    "NaN or infinite voxels": "replace them by -1024 (air) if they lie outside the field of view",
    "singular affine": "its axes do not span a volume; write the affine anew from the original series",
    "no orientation": "left and right cannot be told apart; convert the original series again",
    "spacing": "must lie between 0.1 and 20 mm; check the header's spacing and its units",
    "uneven slices": "slices are missing, doubled or mixed; export the complete series again",
    "too small": "at least 16 voxels are needed on each axis after resampling",
    "not a CT intensity range": "CT in Hounsfield units is needed; label maps and other modalities do not belong here",
    "stored with an offset": "subtract the offset (often 1024) or set the rescale intercept, so that air is near -1000",
    "duplicate": "nothing to do: the same voxels are in the store already",
    "labels": "give labels of exactly this scan, with whole numbers that all have a name",
    "reader crashed": "the file is damaged or needs more memory than there is; try fewer --workers",
}


class Rejected(Exception):
    """A file that cannot be used; its text is the reason that the user reads.

    >>> print(Rejected("4-D", "shape (64, 64, 30, 3)"))
    4-D: shape (64, 64, 30, 3); save one time point or phase as a 3-D file
    """

    def __init__(self, name: str, detail: str):
        # All arguments are kept in `args`, so that the exception survives the way back from a worker process.
        super().__init__(name, detail)
        self.name, self.detail = name, " ".join(detail.split())

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}; {REMEDIES[self.name]}"


def path_within(folder: Path, entry: str) -> Path:
    """The file that a header or data set names, which must lie in its own folder."""
    path = os.path.normpath(folder / entry.replace("\0", "?"))
    if os.path.isabs(entry) or os.path.relpath(path, folder).split(os.sep)[0] == os.pardir:
        raise Rejected("outside the data set", f"it names {entry[:200]}")
    return Path(path)
