"""Public data sets with labels, in the folders and names in which they are distributed."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from alice_jax.data.sources import Found, LabelFile, Source, find, slug
from alice_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Preset:
    """Where a data set keeps its files; one without `image` has a dataset.json that says it.

    Attributes:
      about: for --help.
      image: regex of the images' paths below the folder; its group "id" names the scan.
      labels: template of the label map's path, or, ending in a star, of a folder with a mask for each organ.
      names: of the label map's numbers from 1 on; () where the masks' own names are meant.
    """

    about: str
    image: str = ""
    labels: str = ""
    names: tuple[str, ...] = ()


# fmt: off
PRESETS = {
    "flare22": Preset(
        "images/FLARE22_Tr_0001_0000.nii.gz with labels/FLARE22_Tr_0001.nii.gz",
        r"(?P<at>(.*/)?)images/(?P<id>FLARE22_Tr_\d{4})_0000\.nii\.gz", "{at}labels/{id}.nii.gz",
        ("liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava", "right adrenal gland",
         "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum", "left kidney"),
    ),
    "btcv": Preset(
        "RawData/Training/img/img0001.nii.gz with label/label0001.nii.gz",
        r"(?P<at>(.*/)?)img/(?P<id>img(?P<case>\d{4}))\.nii\.gz", "{at}label/label{case}.nii.gz",
        ("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
         "inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland",
         "left adrenal gland"),
    ),
    "amos": Preset(
        "imagesTr/amos_0001.nii.gz with labelsTr/amos_0001.nii.gz, imagesVa likewise; CT, numbers up to 500",
        r"(?P<at>(.*/)?)images(?P<part>Tr|Va|Ts)/(?P<id>amos_0([0-4]\d\d|500))\.nii\.gz",
        "{at}labels{part}/{id}.nii.gz",
        ("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
         "inferior vena cava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder",
         "prostate or uterus"),
    ),
    "msd": Preset("a folder such as Task09_Spleen, with its dataset.json"),
    "totalsegmentator": Preset(
        "s0001/ct.nii.gz with s0001/segmentations/liver.nii.gz and the other organs",
        r"(?P<at>(.*/)?)(?P<id>s\d{4})/ct\.nii\.gz", "{at}{id}/segmentations/*",
    ),
}
# fmt: on
ENDING = ".nii.gz"


def search(folder: str | os.PathLike, preset: str) -> Found:
    """All scans of a data set, those with labels and those that are distributed without."""
    chosen, root = PRESETS[preset], Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"--input {folder}: --preset {preset} needs the data set's folder")
    found = Found() if chosen.image else find(root)
    scans: dict[Path, re.Match[str]] = {}
    for path in sorted(root.rglob(f"*{ENDING}")) if chosen.image else ():
        if match := re.fullmatch(chosen.image, path.relative_to(root).as_posix()):
            scans[path] = match
    masks = {path: _masks(root, chosen, match) for path, match in scans.items()}
    names = chosen.names or sorted({name for of_scan in masks.values() for name in of_scan})
    codes = {name: code for code, name in enumerate(names, 1)}
    for path, match in scans.items():
        labels = _label_map(root, chosen, match) if chosen.names else _in_order(masks[path], codes)
        id = slug(match["id"])
        found.sources.append(Source(str(path), id=id, patient=id, labels=labels))
    if not any(source.labels for source in found.sources):
        raise UserError(f"--input {folder}: no scan with labels there; --preset {preset} looks for {chosen.about}")
    if codes:
        found.names[str(root)] = {str(code): name for name, code in codes.items()}
    return found


def _label_map(root: Path, preset: Preset, match: re.Match[str]) -> tuple[LabelFile, ...]:
    path = root / preset.labels.format(**match.groupdict())
    return (LabelFile(str(path)),) if path.exists() else ()


def _masks(root: Path, preset: Preset, match: re.Match[str]) -> dict[str, Path]:
    """The mask of each organ, by the organ's name."""
    if not preset.labels.endswith("*"):
        return {}
    folder = root / preset.labels.format(**match.groupdict()).removesuffix("*")
    return {path.name.removesuffix(ENDING): path for path in folder.glob(f"[!.]*{ENDING}")}


def _in_order(masks: Mapping[str, Path], codes: Mapping[str, int]) -> tuple[LabelFile, ...]:
    return tuple(LabelFile(str(path), codes[name]) for name, path in sorted(masks.items()))
