"""Labels scans with a trained network: `python -m alice_jax.predict --workdir RUN --input FILES --out DIR`.

RUN is the folder of a segmentation run (`alice_jax.train --config=configs/segment.py`). Scans are any that
`alice_jax.prepare` reads; each is turned, resampled and windowed as the run's scans were. DIR gets a NIfTI file for
each, on the voxels of the scan's own file, and labels.json with the names. Scans that DIR has are skipped, so running
the command again continues where it stopped. Many tasks may share the work: give each its --task-index of --task-count.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from alice_jax import checkpoint, cli, host
from alice_jax.contract import Contract
from alice_jax.data import geometry, label_maps, nifti, preparing, sources
from alice_jax.data.rejection import Rejected
from alice_jax.data.sources import Source
from alice_jax.errors import UserError
from alice_jax.inference import original
from alice_jax.inference.sliding import Sliding
from alice_jax.reporting import overlays
from alice_jax.tasks import segment

NAMES = "labels.json"


def find(inputs: Sequence[str], out: Path) -> list[Source]:
    """The scans that the inputs name, each with the id under which its labels are written."""
    found = [source for path in inputs for source in sources.find(path, skip=str(out)).sources]
    if not found:
        raise UserError(f"--input {' '.join(inputs)}: no scan in it; give NIfTI, NRRD, MetaImage or DICOM files")
    # nnU-Net calls the image case_0000.nii.gz and its labels case.nii.gz.
    return sources.assign_ids([dataclasses.replace(s, id=s.id.removesuffix("_0000")) for s in found], {})


def predict(source: Source, sliding: Sliding, contract: Contract, path: Path, picture: bool = False) -> None:
    """Writes the labels of one scan, and with `picture` a PNG beside them; raises `Rejected`.

    Beside the scan it needs memory for its labels and for a band of logits (see `sliding`).
    """
    if source.problem:
        raise source.problem
    scan, volume, _ = preparing.prepare_scan(source.path, contract.spacing_zyx_mm[0])
    affine_ras = np.array(scan.original["affine_ras"])
    labels = np.zeros(scan.original["shape_ijk"], original.label_dtype(len(contract.classes)), order="F")
    view, affine_lps = geometry.reorient(labels, affine_ras)
    slices = tqdm(sliding.slices(volume), source.id, len(volume), leave=False, unit="slice", file=sys.stderr)
    for z, plane in enumerate(original.planes(slices, scan, view.shape, affine_lps, labels.dtype)):
        view[z] = plane
    nifti.write(path, labels, affine_ras)
    if picture:
        stored = label_maps.on_stored_grid(labels, affine_ras, scan)
        drawn = overlays.draw(volume, stored, scan.spacing_zyx_mm, source.id, contract.classes)
        _picture(path).write_bytes(drawn)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where a scan could not be labelled."""
    args = _parse(argv)
    host.settle()
    out = Path(args.out)
    mine = find(args.input, out)[args.task_index :: args.task_count]
    todo: list[Source] = []
    done: list[Source] = []
    for source in mine:
        (done if _path(out, source).exists() and not args.overwrite else todo).append(source)
    print(f"{len(mine)} scans, {len(done)} of them done already; loading {args.workdir}", flush=True)
    undrawn = sum(not _picture(_path(out, source)).exists() for source in done) if args.overlay else 0
    if undrawn:
        print(f"{undrawn} of those done have no picture, which is drawn with the labels: add --overwrite", flush=True)
    network, params, contract = segment.load(args.workdir, args.step)
    _write_names(out, contract)

    sliding = Sliding.of(
        network,
        params,
        contract,
        overlap=args.overlap,
        mirror=_mirrored_axes(args.workdir) if args.mirror else (),
        batch=args.batch or (1 if jax.default_backend() == "cpu" else 8),
    )
    began, failed = time.perf_counter(), []
    for source in (bar := tqdm(todo, "Predicting", unit="scan", file=sys.stderr, disable=not todo)):
        try:
            predict(source, sliding, contract, _path(out, source), args.overlay)
        except (Rejected, MemoryError) as reason:
            failed.append(f"{source.path}: {reason}")
            bar.write(failed[-1], file=sys.stderr)
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror or error}; see to space and permissions") from None
    seconds = (time.perf_counter() - began) / max(len(todo), 1)
    print(f"labelled {len(todo) - len(failed)} scans in {out}" + (f"; {seconds:.1f} s a scan" if todo else ""))
    if failed:
        print(f"{len(failed)} could not be labelled:\n  " + "\n  ".join(failed))
    return 1 if failed else 0


def _path(out: Path, source: Source) -> Path:
    return out / f"{source.id}.nii.gz"


def _picture(path: Path) -> Path:
    return path.with_suffix("").with_suffix(".png")


def _mirrored_axes(workdir: str) -> Sequence[int]:
    """Those along which the run's crops were mirrored: along another, a left kidney would look like a right one."""
    axes = (checkpoint.read_config(workdir) or {})["augmentation"]["flip_axes"]
    if not axes:
        raise UserError("--mirror: this run never saw mirrored crops (augmentation.flip_axes is empty); leave it out")
    return axes


def _write_names(out: Path, contract: Contract) -> None:
    """{"labels": {"background": 0, "spleen": 1, …}}, as nnU-Net's dataset.json has it."""
    table = {name: code for code, name in enumerate(contract.classes)}
    path = out / NAMES
    try:
        out.mkdir(parents=True, exist_ok=True)
        known = label_maps.names_of(path) if path.exists() else None
        if known is not None and known != dict(enumerate(contract.classes[1:], 1)):
            raise UserError(f"--out {out}: has labels of other classes ({path}); name another folder")
        path.write_text(json.dumps({"labels": table}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}; name a folder that can be written to") from None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m alice_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, metavar="RUN", help="folder of a segmentation run")
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH", help="scans, folders, lists of paths")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the labels")
    parser.add_argument("--step", type=int, help="checkpoint to use; the newest by default")
    parser.add_argument("--overlay", action="store_true", help="also a PNG of each scan with its labels")
    parser.add_argument("--mirror", action="store_true", help="average over mirrored windows, if trained with such")
    parser.add_argument("--overlap", type=float, default=0.5, help="share of a side that windows share (default: 0.5)")
    parser.add_argument("--batch", type=int, default=0, help="windows a device computes at once (default: 1 or 8)")
    parser.add_argument("--overwrite", action="store_true", help="label again what is done")
    parser.add_task_arguments("scans")
    args = parser.parse_args(argv)
    cli.check_task(args)
    if not 0 <= args.overlap < 1:
        raise UserError(f"--overlap {args.overlap}: give a share of a window's side from 0 to below 1")
    if args.batch < 0:
        raise UserError(f"--batch {args.batch}: give a whole number of 1 or more")
    return args


if __name__ == "__main__":
    cli.run(main)
