"""The label files of a data set -> an array `labels` beside the volume in the store, and what its numbers mean."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alice_jax.data import geometry, label_maps
from alice_jax.data.rejection import Rejected
from alice_jax.data.scan import Scan
from alice_jax.data.sources import Found, LabelFile, Source
from alice_jax.data.store import Store
from alice_jax.errors import UserError

# -------------------------------------------------------------------- what the numbers mean


def settle_names(store: Store, found: Found, path: str) -> None:
    """Writes the names of a data set's labels into the store; refuses those of another one beside them.

    Args:
      path: what was searched, for the error.
    """
    if not found.names:
        raise UserError(
            f"--labels: {path} has no dataset.json that names its labels; see --preset, or leave --labels out"
        )
    tables = {file: _named(table, file) for file, table in found.names.items()}
    (first, names), *others = tables.items()
    for file, table in others:
        if table != names:
            raise UserError(f"--labels: {first} and {file} name other labels; prepare each into a store of its own")
    wanted = {str(code): name for code, name in sorted(names.items())}
    there = store.settle_json(label_maps.NAMES, None, wanted)
    if there != wanted:
        raise UserError(
            f"--store {store.path}: its labels are {', '.join(there.values())}, and those of {path} "
            f"{', '.join(wanted.values())}; prepare them into another store"
        )


def _named(table: Any, file: str) -> dict[int, str]:
    """As `label_maps.read_names`; refuses what a voxel with one number cannot say."""
    if isinstance(table, dict):
        if regions := [name for name, value in table.items() if isinstance(value, list)]:
            raise UserError(f"{file}: {regions[0]} is a region of several labels; give each voxel one label")
        if "ignore" in table:
            raise UserError(f"{file}: the label ignore is not supported; give each voxel a label, or 0")
    names = label_maps.read_names(table, file)
    if not names:
        raise UserError(f"{file}: names no label beside the background")
    return names


# -------------------------------------------------------------------- into the store


def origin(source: Source) -> list[Any]:
    """What tells changed label files from unchanged ones."""
    found = []
    for file in source.labels:
        if file.problem:
            raise file.problem
        try:
            stat = Path(file.path).stat()
        except OSError as error:
            raise Rejected("labels", f"{file.path}: {error.strerror}") from error
        found.append([file.path, file.code, stat.st_size, stat.st_mtime_ns])
    return found


def read(files: tuple[LabelFile, ...], scan: Scan, names: Mapping[int, str]) -> np.ndarray:
    """(z, y, x) on the grid of the stored scan, uint8 or, with more than 255 names, uint16; raises `Rejected`.

    Where two masks overlap the later one counts.
    """
    codes_ijk = np.zeros(scan.original["shape_ijk"], np.uint16 if max(names) > 255 else np.uint8)
    for file in files:
        name = Path(file.path).name
        try:
            image = label_maps.read_codes(file.path)
        except Rejected as reason:
            raise Rejected("labels", f"{name}: {reason.name}, {reason.detail}") from reason
        _check_place(name, image.hu_ijk.shape, image.affine_ras, scan)
        if file.code:
            codes_ijk[image.hu_ijk > 0] = file.code
            continue
        if unknown := sorted(set(np.flatnonzero(np.bincount(image.hu_ijk.ravel())).tolist()) - {0, *names}):
            raise Rejected("labels", f"{name} holds {unknown[0]}, which has no name")
        codes_ijk[...] = image.hu_ijk
    view, affine_lps = geometry.reorient(codes_ijk, scan.original["affine_ras"])
    return geometry.resample_labels(view, affine_lps, geometry.Grid(scan.shape_zyx, scan.affine_lps))


def _check_place(name: str, shape_ijk: tuple[int, ...], affine_ras: np.ndarray, scan: Scan) -> None:
    """Labels must lie voxel on voxel of the image."""
    wanted = tuple(scan.original["shape_ijk"])
    if shape_ijk != wanted:
        raise Rejected("labels", f"{name} has shape {shape_ijk}, the image {wanted}")
    shift = geometry.corner_shift(wanted, affine_ras, scan.original["affine_ras"])
    if shift > geometry.LARGEST_SHIFT:
        raise Rejected("labels", f"{name} lies elsewhere: its affine puts a corner {shift:.1f} voxels off the image's")


def write(store: Store, id: str, labels: np.ndarray, of: list[Any]) -> None:
    """Beside a scan that is in the store; what was there is replaced.

    Args:
      of: the `origin` of the files.
    """
    store.write_array(id, label_maps.ARRAY, labels)
    scan = store.scan(id)
    counts = np.bincount(labels.ravel())
    voxels = {str(code): int(counts[code]) for code in np.flatnonzero(counts) if code}
    store.update_scan(dataclasses.replace(scan, extra=scan.extra | {"labels": {"origin": of, "voxels": voxels}}))


def is_current(store: Store, id: str, of: list[Any]) -> bool:
    """Whether the labels of these files lie beside the scan."""
    there = store.scan(id).extra.get("labels", {}).get("origin")
    wanted = [tuple(file) for file in of]
    return there is not None and [tuple(file) for file in there] == wanted and store.has_array(id, label_maps.ARRAY)
