"""Finds points of one scan in another: lesions in a follow-up scan, landmarks in another patient.

    python -m alice_jax.match --from A.nii.gz --point 12.5 -40 310 --to B.nii.gz --workdir DIR
    python -m alice_jax.match --from ID --points points.csv --to ID --store DIR --results found.csv

Prints the matched place in B, in world millimetres and as voxel of its file, with the score, the cycle error (how far
from the point the search back from its match ends), how much of its surroundings agrees, and whether to trust it, and
writes a picture of both. Files are any that `alice_jax.prepare` reads, DICOM folders included; with --store they are
ids of embedded scans. Numbers are world millimetres (RAS, as nibabel, ITK-SNAP and 3D Slicer show them) unless --lps or
--voxel says otherwise.
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alice_jax import builtin, cli, embed, host, train
from alice_jax.data import embeddings, matching, point_files, preparing
from alice_jax.data.foreground import STRIDE
from alice_jax.data.point_files import FLIP, Points
from alice_jax.data.rejection import Rejected
from alice_jax.data.scan import Scan
from alice_jax.data.store import Store
from alice_jax.errors import UserError
from alice_jax.reporting import figures, planes

MOST_ROWS = 12  # points in a picture


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Points of scan `query` and their matches in scan `key`, in the same order.

    Attributes:
      asked, found: places in either scan, in RAS millimetres and in voxels (i, j, k) of its file.
      query_zyx_vox, key_zyx_vox: (n, 3) the same in stored voxels.
      match: the scores, cycle errors and agreement of the neighbours, (n,) each, and whether to trust them.
    """

    query: Scan
    key: Scan
    asked: Points
    found: Points
    query_zyx_vox: np.ndarray
    key_zyx_vox: np.ndarray
    match: matching.Match

    def verdict(self, index: int) -> str:
        """What to think of a match, in a few words."""
        doubts = []
        if not self.match.scores[index] >= matching.TRUSTED_SCORE:
            doubts.append(f"score below {matching.TRUSTED_SCORE:g}")
        if not self.match.cycle_mm[index] <= matching.TRUSTED_CYCLE_MM:
            doubts.append(f"cycle error above {matching.TRUSTED_CYCLE_MM:g} mm")
        if not self.match.agreeing[index] >= matching.TRUSTED_AGREEING:
            doubts.append(f"less than {matching.TRUSTED_AGREEING:.0%} of its surroundings agree")
        return f"doubtful ({', '.join(doubts)})" if doubts else "trusted"


def embedded(files: Mapping[str, str | os.PathLike], workdir: str) -> Store:
    """Reads and embeds files into a store in memory, by the embedder of a workdir.

    Args:
      files: what a scan shall be called -> a file or a DICOM folder.

    Example:
      store = match.embedded({"before": "A.nii.gz", "after": "B.nii.gz"}, "runs/embedder")
      found = match.transfer(store, "before", [[12.5, -40, 310]], "after")
      found.found.world_ras_mm, found.found.voxel_ijk, found.match.scores, found.match.trusted
    """
    embedder = embed.restore(workdir)
    store = _read(files, embedder.spacing_mm)
    embed.embed_store(store, embedder)
    return store


def _read(files: Mapping[str, str | os.PathLike], spacing_mm: float) -> Store:
    """A store in memory, without embeddings."""
    store = Store.create(f"memory://match-{uuid.uuid4().hex}", (spacing_mm,) * 3)
    for id, path in files.items():
        print(f"reading {path}", file=sys.stderr)
        try:
            scan, volume, body = preparing.prepare_scan(path, spacing_mm)
        except Rejected as reason:
            raise UserError(f"{path}: {reason}") from reason
        store.write_scan(dataclasses.replace(scan, id=id, patient=id), volume, body)
    return store


def transfer(store: Store, query: str, points: Points | Any, key: str, *, voxel: bool = False) -> Transfer:
    """Finds points of the scan `query` in the scan `key` of a store with embeddings.

    Args:
      points: `Points`, or (n, 3) RAS millimetres, or with `voxel` indices (i, j, k) of the query's file.

    Raises:
      UserError: a point outside the volume or the body, or a scan without embedding.
    """
    if not isinstance(points, Points):
        points = point_files.numbered(points, voxel)
    at, scans = locate(store, query, points), (store.scan(query), store.scan(key))
    reader = matching.EmbeddingReader(store)
    found = matching.match(reader(query), at, reader(key))
    asked = point_files.describe(at, scans[0])._replace(names=points.names)
    places = point_files.describe(found.points_zyx_vox, scans[1])._replace(names=points.names)
    return Transfer(*scans, asked, places, at, found.points_zyx_vox, found)


def locate(store: Store, id: str, points: Points) -> np.ndarray:
    """(n, 3) stored voxels of points that lie in the volume and in the body; a `UserError` names the first other."""
    at = point_files.place(points, store.scan(id), "points")
    outside = np.flatnonzero(~_in_body(store, id, at))
    if len(outside):
        hu = int(store.read_crop(id, np.rint(at[outside[0]]).astype(int), (1, 1, 1))[0, 0, 0])
        words = point_files.named(points, int(outside[0]))
        raise UserError(f"points: {words} lies outside the body ({hu} HU there); give a place in the body")
    return at


def _in_body(store: Store, id: str, points_zyx_vox: np.ndarray) -> np.ndarray:
    """(n,) bool: the body, or within a cell of its mask, since the skin is cut roughly."""
    body = store.foreground(id)
    cells = np.rint(points_zyx_vox).astype(int) // STRIDE
    return np.array([body[tuple(slice(max(c - 1, 0), c + 2) for c in cell)].any() for cell in cells])


def draw(store: Store, result: Transfer, names: tuple[str, str] | None = None) -> bytes:
    """A PNG with a row for each point: axial, coronal and sagittal planes of the query, then of the key.

    Args:
      names: of the two scans, by default their ids.
    """
    rows = min(len(result.match.scores), MOST_ROWS)
    sheet = planes.Sheet(rows, planes.fitting_field_mm([result.query, result.key], least=200, most=420))
    names = names or (result.query.id, result.key.id)
    for row in range(rows):
        sides = (result.query, result.query_zyx_vox[row]), (result.key, result.key_zyx_vox[row])
        for side, (scan, point) in enumerate(sides):
            for i, plane in enumerate(planes.PLANES):
                panel, cut = (row, 3 * side + i), planes.window(scan, plane, point, sheet.field_mm)
                sheet.show(*panel, planes.read(store, scan.id, cut), cut)
                sheet.cross(*panel, cut, point)
        title = result.asked.names[row] + "   " if len(result.match.scores) > 1 else ""
        sheet.heading(row, 0, f"{title}{names[0]}"[-48:], bold=True)
        sheet.heading(row, 3, names[1][-30:], bold=True)
        words = f"score {result.match.scores[row]:.2f} · cycle {result.match.cycle_mm[row]:.0f} mm"
        if result.match.trusted[row]:
            sheet.note(row, f"{words} · trusted")
        else:
            sheet.note(row, f"{words} · doubtful", figures.WARNING_ON_SCREEN)
    return sheet.png()


# -------------------------------------------------------------------- what is said


def lines(result: Transfer, names: tuple[str, str], lps: bool = False) -> list[str]:
    """What the command prints."""
    text = []
    for n, name in enumerate(result.asked.names):
        if len(result.asked.names) > 1:
            text.append(f"point {name}")
        for word, where, file in (("from", result.asked, names[0]), ("to", result.found, names[1])):
            assert where.world_ras_mm is not None and where.voxel_ijk is not None
            mm = ", ".join(f"{v:.1f}" for v in where.world_ras_mm[n] * (FLIP if lps else 1))
            ijk = ", ".join(f"{v:.0f}" for v in where.voxel_ijk[n])
            text.append(f"{word:<6}({mm}) mm {'LPS' if lps else 'RAS'} = voxel ({ijk}) of {file}")
        match = result.match
        numbers = f"score {match.scores[n]:.2f}, cycle error {match.cycle_mm[n]:.1f} mm, {match.agreeing[n]:.0%} agree"
        text.append(f"{numbers}: {result.verdict(n)}")
    return text


def records(result: Transfer, lps: bool = False) -> list[dict[str, Any]]:
    """A flat record for each point: x, y, z and i, j, k of the match, score, cycle error, verdict, and whence."""
    table = []
    for n, name in enumerate(result.asked.names):
        record: dict[str, Any] = {"name": name}
        for prefix, where in (("", result.found), ("from_", result.asked)):
            assert where.world_ras_mm is not None and where.voxel_ijk is not None
            mm = where.world_ras_mm[n] * (FLIP if lps else 1)
            record |= {prefix + axis: round(float(v), 2) for axis, v in zip("xyz", mm, strict=True)}
            record |= {prefix + axis: round(float(v), 2) for axis, v in zip("ijk", where.voxel_ijk[n], strict=True)}
        match = result.match
        record |= {"score": round(float(match.scores[n]), 4), "cycle_mm": round(float(match.cycle_mm[n]), 2)}
        table.append(record | {"agreeing": round(float(match.agreeing[n]), 3), "trusted": bool(match.trusted[n])})
    return table


def _write_results(path: Path, result: Transfer, lps: bool) -> None:
    table = records(result, lps)
    if path.suffix.lower() == ".json":
        frame = "LPS" if lps else "RAS"
        about = {"from": result.query.file or result.query.id, "to": result.key.file or result.key.id, "frame": frame}
        text = json.dumps(about | {"points": table}, indent=1) + "\n"
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        text = buffer.getvalue()
    cli.write(path, text.encode(), "--results")


# -------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parse(argv)
    points = _points(args)
    host.settle()
    if args.store:
        store, ids = Store.open(args.store), (args.source, args.target)
        if args.workdir:
            _check_embedder(store, args.workdir)
        names = ids
    else:
        names = _short_names(args.source, args.target)
        for flag, path in (("--from", args.source), ("--to", args.target)):
            if not os.path.exists(path):
                raise UserError(f"{flag} {path}: there is no such file; give a scan, or with --store its id")
        ids, embedder = ("from", "to"), embed.restore(args.workdir or _builtin_workdir())
        store = _read({"from": args.source, "to": args.target}, embedder.spacing_mm)
        locate(store, "from", points)  # before the work
        embed.embed_store(store, embedder)
    result = transfer(store, ids[0], points, ids[1])
    print("\n".join(lines(result, names, args.lps)))
    out = Path(args.out or f"match_{_file_name(names[0])}_to_{_file_name(names[1])}.png")
    cli.write(out, draw(store, result, names), "--out")
    left = len(result.match.scores) - MOST_ROWS
    print(f"picture: {out}" + (f" (the first {MOST_ROWS} points)" if left > 0 else ""))
    if args.results:
        _write_results(Path(args.results), result, args.lps)
        print(f"results: {args.results}")
    return 0


def _points(args: argparse.Namespace) -> Points:
    """What was asked for, in RAS millimetres or voxels."""
    if args.points:
        points = point_files.read(args.points, args.voxel or None)
    else:
        array = np.array(args.point, float)
        if not np.isfinite(array).all():
            raise UserError(f"--point {' '.join(f'{v:g}' for v in array.ravel())}: give finite numbers")
        points = point_files.numbered(array, args.voxel)
    if args.lps and points.world_ras_mm is not None:
        points = points._replace(world_ras_mm=points.world_ras_mm * FLIP)
    kind = "voxels (i, j, k) of the first scan's file" if points.world_ras_mm is None else "world millimetres"
    frame = "" if points.world_ras_mm is None else " (LPS)" if args.lps else " (RAS)"
    print(f"points are read as {kind}{frame}")
    return points


def _check_embedder(store: Store, workdir: str) -> None:
    codec = embeddings.read_codec(store)
    wanted = embed.restore(workdir).hash()
    if codec is not None and codec.embedder != wanted:
        raise UserError(
            f"--workdir {workdir}: its embedder is {wanted[:12]}, the store was embedded by {codec.embedder[:12]}; "
            f"leave --workdir out, or run python -m alice_jax.embed --store {store.path} --workdir {workdir}"
        )


def _builtin_workdir() -> str:
    """The embedder of the built-in cohort, made if it is missing."""
    print("no --workdir: using the embedder of the built-in cohort, which has only seen phantoms", file=sys.stderr)
    return builtin.embedder(train.run)


def _short_names(first: str, second: str) -> tuple[str, str]:
    """File names, with their folders where the names alone are the same."""
    a, b = (Path(os.path.abspath(path)).parts for path in (first, second))
    last = 2 if a[-1] == b[-1] else 1
    return "/".join(a[-last:]), "/".join(b[-last:])


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", re.sub(r"\.nii(\.gz)?$|\.nrrd$|\.mh[ad]$", "", name)).strip("-") or "scan"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m alice_jax.match", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", required=True, metavar="SCAN", help="where the points are known")
    parser.add_argument("--to", dest="target", required=True, metavar="SCAN", help="where they are looked for")
    parser.add_argument(
        "--point", nargs=3, type=float, action="append", metavar=("X", "Y", "Z"), help="may be repeated"
    )
    parser.add_argument("--points", metavar="FILE", help="CSV (x,y,z or i,j,k, perhaps name) or JSON, instead")
    parser.add_argument("--voxel", action="store_true", help="the numbers are voxels i j k of the file, from 0")
    parser.add_argument("--lps", action="store_true", help="millimetres are LPS (DICOM, ITK), read and printed")
    parser.add_argument("--workdir", metavar="DIR", help="of a trained embedder (default: the built-in cohort's)")
    parser.add_argument("--store", metavar="DIR", help="SCAN is the id of an embedded scan of this store")
    parser.add_argument("--out", metavar="FILE.png", help="the picture (default: match_A_to_B.png)")
    parser.add_argument("--results", metavar="FILE", help="also write the matches as .csv or .json")
    args = parser.parse_args(argv)
    if bool(args.point) == bool(args.points):
        raise UserError("--point, --points: give one of them")
    if args.voxel and args.lps:
        raise UserError("--voxel, --lps: give one of them; voxels have no world frame")
    for flag, path, endings in (("out", args.out, (".png",)), ("results", args.results, (".csv", ".json"))):
        if path and Path(path).suffix.lower() not in endings:
            raise UserError(f"--{flag} {path}: name a file that ends in {' or '.join(endings)}")
        cli.check_folder_of(f"--{flag}", path)
    return args


if __name__ == "__main__":
    cli.run(main)
