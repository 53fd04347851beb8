"""Named points in JSON and CSV files, and their way into the voxels of a scan.

    landmarks.json  {"world_ras_mm": {"carina": [1.4, -18.9, -116.2]}, "voxel_ijk": {"carina": [97, 66, 112]}}
    points.json     {"carina": [1.4, -18.9, -116.2]}   or   [[1.4, -18.9, -116.2]]
    points.csv      name,x,y,z   or   name,i,j,k   or   three numbers a line

Millimetres are RAS (nibabel, ITK-SNAP and 3D Slicer show these); voxels (i, j, k) are those of the file that the scan
was made from, counted from 0. Where a file has both, the millimetres are used, and the voxels must agree with them.
"""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alice_jax.data import geometry
from alice_jax.data.scan import Scan
from alice_jax.errors import UserError

FLIP = np.array([-1.0, -1.0, 1.0])  # RAS <-> LPS
AGREE_VOX = 1.0  # along each axis; both are rounded in files


class Points(NamedTuple):
    """names: n of them.  world_ras_mm, voxel_ijk: (n, 3) float, one of them perhaps None."""

    names: list[str]
    world_ras_mm: np.ndarray | None
    voxel_ijk: np.ndarray | None


def numbered(places: Any, voxel: bool) -> Points:
    """Places (n, 3), voxels or millimetres, under the names 1 to n."""
    array = np.asarray(places, float).reshape(-1, 3)
    names = [str(n + 1) for n in range(len(array))]
    return Points(names, None, array) if voxel else Points(names, array, None)


def read(path: str | os.PathLike, voxel: bool | None = None) -> Points:
    """The points of a JSON or CSV file.

    Args:
      voxel: what bare numbers are, voxels or millimetres; None takes millimetres. A file that says otherwise is an
        error.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name a JSON or CSV file of points") from error
    if path.suffix.lower() == ".json":
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: is no JSON ({error})") from error
        points = _of_json(raw, bool(voxel), str(path))
    else:
        points = _of_csv(text, bool(voxel), str(path))
    if not points.names:
        raise UserError(f"{path}: holds no points")
    if voxel and points.voxel_ijk is None:
        raise UserError(f"{path}: its points are in millimetres; leave --voxel out")
    if voxel:
        return points._replace(world_ras_mm=None)
    return points


def _of_json(raw: Any, voxel: bool, what: str) -> Points:
    if isinstance(raw, dict) and ("world_ras_mm" in raw or "voxel_ijk" in raw):
        world, voxels = (raw.get(key) or {} for key in ("world_ras_mm", "voxel_ijk"))
        if not isinstance(world, dict) or not isinstance(voxels, dict):
            raise UserError(f"{what}: world_ras_mm and voxel_ijk must be {{name: [three numbers]}}")
        if world and voxels and world.keys() != voxels.keys():
            odd = sorted(world.keys() ^ voxels.keys())[0]
            raise UserError(f"{what}: {odd} has no place in one of world_ras_mm and voxel_ijk; give both or one list")
        names = list(world or voxels)
        arrays = (_numbers([places[name] for name in names], what) if places else None for places in (world, voxels))
        return Points(names, *arrays)
    listed = enumerate(raw if isinstance(raw, list) else [], 1)
    values = raw if isinstance(raw, dict) else {str(n): value for n, value in listed}
    numbers = _numbers(list(values.values()), what)
    return Points(list(values), None if voxel else numbers, numbers if voxel else None)


def _of_csv(text: str, voxel: bool, what: str) -> Points:
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if any(map(str.strip, row))]
    if not rows:
        return Points([], None, None)
    header = [cell.lower() for cell in rows[0]]
    columns = next((c for c in ("xyz", "ijk") if set(c) <= set(header)), None)
    if columns is not None:
        at = [header.index(c) for c in columns]
        named, voxel = header.index("name") if "name" in header else None, columns == "ijk"
    elif len(header) == 3 and not any(cell.isalpha() for cell in header):
        at, named, rows = [0, 1, 2], None, [[], *rows]
    else:
        raise UserError(f"{what}: name its columns x,y,z (mm) or i,j,k (voxels), or give three numbers a line")
    short = [n for n, row in enumerate(rows[1:], 2) if len(row) <= max(*at, named or 0)]
    if short:
        raise UserError(f"{what}: line {short[0]} has too few columns")
    numbers = _numbers([[row[a] for a in at] for row in rows[1:]], what)
    names = [str(n + 1) if named is None else row[named] for n, row in enumerate(rows[1:])]
    return Points(names, None if voxel else numbers, numbers if voxel else None)


def _numbers(values: list[Any], what: str) -> np.ndarray:
    """(n, 3) finite numbers."""
    for value in values:
        try:
            good = np.shape(value) == (3,) and np.isfinite(np.array(value, float)).all()
        except (TypeError, ValueError):
            good = False
        if not good:
            raise UserError(f"{what}: {str(value)[:80]} is no point; give three numbers")
    return np.array(values, float).reshape(-1, 3)


# -------------------------------------------------------------------- frames


def place(points: Points, scan: Scan, what: str) -> np.ndarray:
    """(n, 3) float voxels of the stored scan (z, y, x).

    Args:
      what: names the points in errors.

    Raises:
      UserError: the two places given for a point lie more than a voxel apart, or a point lies outside the scan.
    """
    affine_ras = scan.original["affine_ras"]
    if points.world_ras_mm is not None:
        world_lps = points.world_ras_mm * FLIP
        ijk = geometry.world_to_original(world_lps, affine_ras)
        if points.voxel_ijk is not None:
            apart = np.abs(ijk - points.voxel_ijk).max(axis=1)
            worst = int(apart.argmax())
            if apart[worst] > AGREE_VOX:
                raise UserError(
                    f"{what}: world_ras_mm and voxel_ijk of {points.names[worst]} lie {apart[worst]:.1f} voxels apart "
                    f"in {scan.file}; the file may have been changed since, so remove the one that is wrong"
                )
    else:
        assert points.voxel_ijk is not None
        ijk = points.voxel_ijk
        world_lps = geometry.original_to_world(ijk, affine_ras)
    outside = np.flatnonzero((~inside(ijk, scan)).any(axis=1))
    if len(outside):
        raise UserError(
            f"{what}: {named(points, outside[0])} lies outside {scan.file or scan.id}, which has {extent(scan)}"
        )
    return np.clip(geometry.world_to_index(world_lps, scan.affine_lps), 0, np.array(scan.shape_zyx) - 1)


def inside(ijk: np.ndarray, scan: Scan) -> np.ndarray:
    """(n, 3) bool: which indices lie in the file, whose voxels reach half a step beyond their centres."""
    return (ijk >= -0.5) & (ijk <= np.array(scan.original["shape_ijk"]) - 0.5)


def extent(scan: Scan) -> str:
    """What a scan's file spans, in voxels and in millimetres."""
    shape = np.array(scan.original["shape_ijk"])
    corners = np.array(list(np.ndindex(2, 2, 2))) * shape - 0.5
    world = geometry.original_to_world(corners, scan.original["affine_ras"]) * FLIP
    sides = zip("xyz", world.min(axis=0), world.max(axis=0), strict=True)
    spans = ", ".join(f"{axis} {low:.0f} to {high:.0f}" for axis, low, high in sides)
    return f"{' × '.join(str(n) for n in shape)} voxels and spans {spans} mm (RAS)"


def describe(points_zyx_vox: np.ndarray, scan: Scan) -> Points:
    """Unnamed stored voxels as both millimetres and voxels of the file."""
    world_lps = geometry.index_to_world(points_zyx_vox, scan.affine_lps)
    ijk = geometry.world_to_original(world_lps, scan.original["affine_ras"])
    return Points([str(n + 1) for n in range(len(ijk))], world_lps * FLIP, ijk)


def named(points: Points, index: int) -> str:
    """A point for an error: its name and the numbers that were given."""
    at = points.voxel_ijk if points.world_ras_mm is None else points.world_ras_mm
    assert at is not None
    unit = "voxel" if points.world_ras_mm is None else "mm RAS"
    return f"point {points.names[index]} ({unit} {', '.join(f'{v:g}' for v in at[index])})"
