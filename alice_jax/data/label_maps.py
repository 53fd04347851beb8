"""Organ labels of a scan on its stored grid.

They come from FOLDER/<scan id>/labels.nii.gz, which may have any grid and orientation in the scan's world, or from the
array `labels` of a store (docs/prepare.md).
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from alice_jax.data import geometry, readers
from alice_jax.data.rejection import Rejected
from alice_jax.data.scan import Scan
from alice_jax.data.store import Store
from alice_jax.data.voxels import Stored
from alice_jax.errors import UserError

ARRAY, NAMES = "labels", "labels.json"  # in a store: of each scan, and what their numbers mean


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """Which organ each voxel of a scan belongs to.

    codes: (z, y, x) uint16, 0 for none, cut to the box of what is labelled.
    low_zyx_vox: where that box begins in the scan.
    names: of the codes 1, 2, …
    cut_off: those of organs that reach the edge of what was labelled.
    """

    codes: np.ndarray
    low_zyx_vox: np.ndarray
    names: tuple[str, ...]
    cut_off: tuple[str, ...]

    @staticmethod
    def of(array_zyx: np.ndarray, names: Mapping[int, str], edge: Collection[int] | None = None) -> "LabelMap":
        """From whole numbers on the stored grid; a number without a name is called "label 7".

        Args:
          edge: numbers of the organs that are cut off; by default those that touch the edge of the array.

        >>> labels = LabelMap.of(np.array([[[0, 7, 7, 7, 0]]]), {7: "cord"})
        >>> labels.at(np.array([[0, 0, 1.4], [0, 0, 9]])).tolist()
        ['cord', '']
        """
        boxes = ndimage.find_objects(array_zyx)
        present = [code for code, box in enumerate(boxes, 1) if box is not None]
        named = {code: names.get(code, f"label {code}") for code in present}
        words = list(dict.fromkeys(named.values()))
        recode = np.zeros(len(boxes) + 1, np.uint16)
        for code, name in named.items():
            recode[code] = 1 + words.index(name)
        low = np.min([[s.start for s in boxes[c - 1]] for c in present], axis=0) if present else np.zeros(3, int)
        high = np.max([[s.stop for s in boxes[c - 1]] for c in present], axis=0) if present else np.zeros(3, int)
        cut = array_zyx[tuple(map(slice, low, high))]
        cut_off = {name for code, name in named.items() if code in (at_the_edge(array_zyx) if edge is None else edge)}
        return LabelMap(recode[cut], low, tuple(words), tuple(sorted(cut_off)))

    def at(self, points_zyx_vox: np.ndarray) -> np.ndarray:
        """(n,) names of the organs at points (n, 3), "" where there is none."""
        cells = np.rint(points_zyx_vox).astype(int) - self.low_zyx_vox
        inside = ((cells >= 0) & (cells < self.codes.shape)).all(axis=1)
        codes = np.zeros(len(cells), int)
        codes[inside] = self.codes[tuple(cells[inside].T)]
        return np.array(["", *self.names])[codes]

    def voxels(self, name: str) -> np.ndarray:
        """(n, 3) int voxels of the scan that belong to an organ."""
        box = self._boxes[name]
        start = np.array([s.start for s in box]) + self.low_zyx_vox
        return np.argwhere(self.codes[box] == 1 + self.names.index(name)) + start

    @cached_property
    def centres(self) -> dict[str, np.ndarray]:
        """For each organ that is seen as a whole its centroid, (3,) voxels of the scan.

        That of a curved organ lies in what it surrounds: the mandible's in the mouth. It is taken as it is, since the
        nearest voxel of the organ would be on the left in one patient and on the right in another.
        """
        return {name: self.voxels(name).mean(axis=0) for name in self.names if name not in self.cut_off}

    @cached_property
    def _boxes(self) -> dict[str, Any]:
        return dict(zip(self.names, ndimage.find_objects(self.codes), strict=True)) if self.names else {}


def at_the_edge(array: np.ndarray) -> set[int]:
    """The labels on the faces of an array.

    >>> at_the_edge(np.pad([[[7]]], 1)), at_the_edge(np.array([[[7]]]))
    (set(), {7})
    """
    faces = [np.take(array, index, axis) for axis in range(3) for index in (0, -1)]
    return {int(code) for face in faces for code in np.unique(face)} - {0}


# -------------------------------------------------------------------- reading


def from_file(path: str | os.PathLike, scan: Scan, names: Mapping[int, str]) -> LabelMap:
    """A label file on the grid of its stored scan."""
    try:
        image = read_codes(path)
    except Rejected as reason:
        raise UserError(f"{path}: {reason}") from reason
    stored = on_stored_grid(image.hu_ijk, image.affine_ras, scan)
    if not stored.any():
        raise UserError(f"{path}: labels nothing inside scan {scan.id}; is it of another scan or frame?")
    return LabelMap.of(stored, names, at_the_edge(image.hu_ijk))


def read_codes(path: str | os.PathLike) -> readers.Image:
    """A label file as it is, with uint16 numbers; raises `Rejected`."""
    image = readers.read(path, convert=_scaled)
    with np.errstate(invalid="ignore"):
        codes = image.hu_ijk.astype(np.uint16)
    if not np.array_equal(codes, image.hu_ijk):  # NaN too
        raise Rejected("labels", "it is no label map of whole numbers from 0 to 65535, one for each organ")
    return dataclasses.replace(image, hu_ijk=codes)


def on_stored_grid(codes_ijk: np.ndarray, affine_ras: np.ndarray, scan: Scan) -> np.ndarray:
    """(z, y, x): each stored voxel takes the nearest label, and 0 where the labels do not reach."""
    matrix = (np.linalg.inv(geometry.RAS_FROM_LPS @ affine_ras) @ scan.affine_lps)[:3]
    return ndimage.affine_transform(
        codes_ijk, matrix[:, 2::-1], matrix[:, 3], scan.shape_zyx, order=0, mode="grid-constant", cval=0
    )


def _scaled(stored: Stored) -> np.ndarray:
    raw = np.concatenate(list(stored.pieces)).reshape(stored.shape_ijk, order="F")
    return raw if (stored.slope, stored.intercept) == (1, 0) else raw * np.float64(stored.slope) + stored.intercept


def from_store(store: Store, id: str) -> LabelMap | None:
    """The array `labels` of a scan; None where there is none."""
    if not store.has_array(id, ARRAY):
        return None
    return LabelMap.of(store.read_array(id, ARRAY), names_in(store))


def names_in(store: Store) -> dict[int, str]:
    """What the numbers of the arrays `labels` mean: STORE/labels.json, or the table of a phantom store."""
    table = store.read_json(NAMES)
    if table is None:
        table = store.manifest["extra"].get("phantom", {}).get("labels", {})
    return read_names(table, f"store {store.path}")


def names_of(raw_path: str | os.PathLike) -> dict[int, str]:
    """The table of names in a JSON file: the file itself, or its entry "labels"."""
    path = Path(raw_path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the names of labels as JSON") from error
    return read_names(raw.get("labels", raw) if isinstance(raw, dict) else raw, str(path))


def read_names(table: Any, what: str) -> dict[int, str]:
    """{"1": "spleen"}, or {"spleen": 1} as nnU-Net writes it; what is called background is no organ.

    Each number has one name and each name one number, or it is a `UserError`.

    >>> read_names({"background": 0, "spleen": 1}, "dataset.json")
    {1: 'spleen'}
    """
    if not isinstance(table, dict):
        raise UserError(f'{what}: the names of labels must be {{"1": "spleen", …}}')
    try:
        by_name = all(isinstance(value, int) for value in table.values())
        pairs = [(code, name) for name, code in table.items()] if by_name else table.items()
        labels = [(int(code), str(name)) for code, name in pairs if int(code) > 0]
    except ValueError as error:
        raise UserError(f'{what}: the names of labels must be {{"1": "spleen", …}} ({error})') from error
    for (code, name), (other, same) in itertools.combinations(labels, 2):
        if code == other or name == same:
            raise UserError(
                f"{what}: label {code} is {name!r} and {other} is {same!r}; give each its own name and number"
            )
    return dict(labels)
