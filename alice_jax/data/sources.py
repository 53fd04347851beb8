"""What the user points at -> the scans to read: a file, a folder, a list of paths, or a data set with dataset.json."""

import collections
import dataclasses
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alice_jax.data.rejection import Rejected, path_within
from alice_jax.errors import UserError

ENDINGS = (".nii.gz", ".nii", ".hdr", ".nrrd", ".nhdr", ".mha", ".mhd")
DICOM_ENDINGS = (".dcm", ".ima", ".dicom")
COMPANIONS = (".img", ".img.gz", ".raw", ".zraw", ".raw.gz")  # voxels of a .hdr, .mhd or .nhdr
MAX_TEXT_BYTES = 2**26  # of a dataset.json or a list of paths
# Names that say nothing: the folder names the scan, and is the folder of one patient.
GENERIC = ("ct", "image", "img", "imaging", "volume", "vol", "scan", "data", "ct_image", "orig", "original")


@dataclasses.dataclass(frozen=True)
class LabelFile:
    """A label map, or the mask of one organ."""

    path: str
    code: int = 0  # of the mask's organ; 0: the file has the numbers of all
    problem: Rejected | None = None  # why it cannot even be read


@dataclasses.dataclass(frozen=True)
class Source:
    """One file, or the DICOM files of one folder."""

    path: str  # as the user will recognise it
    id: str = ""  # proposed; `assign_ids` makes it unique
    patient: str = ""  # the folder of a patient, where the layout shows one
    files: tuple[str, ...] = ()  # DICOM
    labels: tuple[LabelFile, ...] = ()
    problem: Rejected | None = None  # why it cannot even be read


@dataclasses.dataclass
class Found:
    """What a search came upon."""

    sources: list[Source] = dataclasses.field(default_factory=list)
    ignored: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # endings of other files
    names: dict[str, Any] = dataclasses.field(default_factory=dict)  # by file: what it says that labels mean


def find(path: str | os.PathLike, skip: str = "") -> Found:
    """Everything that `path` names, in a fixed order. The folder `skip` (the store) is not searched."""
    path = Path(path).expanduser()
    found = Found()
    if not os.path.lexists(path):
        raise UserError(f"--input {path}: there is no such file or folder")
    if path.is_dir():
        _search(path, path, found, skip, set())
    elif path.name == "dataset.json":
        _search(path.parent, path.parent, found, skip, set())
    elif _ending(path.name) or not path.is_file() or _is_dicom(path):
        _add_named(path, found, skip)
    else:
        for entry in _list_entries(path):
            _add_named(entry, found, skip)
    return found


def files_below(folder: str | os.PathLike) -> dict[str, str]:
    """The files with a scan's ending below a folder by the ids that they propose, whatever a dataset.json there lists.

    A `UserError` where two propose the same.

    >>> files_below("no/such/folder")
    {}
    """
    root = Path(folder)
    files: dict[str, str] = {}
    for path in sorted(root.rglob("[!.]*")):
        if _ending(path.name) and path.is_file():
            id = _source(path, root, "", channel_suffix=True).id
            if id in files:
                raise UserError(f"{files[id]} and {path}: are both of case {id}; keep one of them")
            files[id] = str(path)
    return files


def assign_ids(sources: Iterable[Source], known: Mapping[str, str]) -> list[Source]:
    """Gives each source an id of its own; `known` are the ids that absolute paths have in the store already.

    A source keeps the id that it had. Where two would have the same, the later gets a few characters of its path's
    hash.
    """
    sources = list(sources)
    taken = {id.casefold() for id in known.values()}
    result = []
    for source in sources:
        absolute = os.path.abspath(source.path)
        id = known.get(absolute)
        if id is None:
            id = source.id
            if id.casefold() in taken:
                id = f"{id}-{hashlib.sha256(absolute.encode(errors='surrogateescape')).hexdigest()[:6]}"
        taken.add(id.casefold())
        result.append(dataclasses.replace(source, id=id))
    return result


# -------------------------------------------------------------------- folders


def _search(folder: Path, root: Path, found: Found, skip: str, visited: set[str]) -> None:
    """All scans below a folder. Links to folders are followed, each folder once."""
    real = os.path.realpath(folder)
    if real in visited or (skip and real == os.path.realpath(skip)):
        return
    visited.add(real)
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        found.sources.append(Source(str(folder), problem=Rejected("unreadable", f"folder: {error.strerror}")))
        return
    if "dataset.json" in names and _add_dataset(folder, found):
        return
    dicom, folders = [], []
    generic = any(_stem(name).casefold() in GENERIC for name in names if _ending(name))
    for name in names:
        path = folder / name
        if path.is_dir():
            folders.append(path)
        elif not path.exists():
            found.sources.append(Source(str(path), problem=Rejected("missing", _dangling(path))))
        elif path.is_file() and _ending(name):
            found.sources.append(_source(path, root, slug(_relative(folder, root)) if generic else ""))
        elif not path.is_file():  # a pipe would be waited for
            found.ignored["devices and pipes"] += 1
        elif name.endswith(COMPANIONS) and _header_of(path, names):
            continue
        elif name != "DICOMDIR" and _is_dicom(path):
            dicom.append(str(path))
        else:
            found.ignored["".join(path.suffixes[-1:]).lower() or "without ending"] += 1
    if dicom:
        found.sources.append(Source(str(folder), id=slug(_relative(folder, root)), files=tuple(dicom)))
    for path in folders:
        _search(path, root, found, skip, visited)


def _add_named(path: Path, found: Found, skip: str) -> None:
    """A path that the user named: it ends as a scan or with a reason, never ignored."""
    if path.is_dir():
        before = len(found.sources)
        _search(path, path, found, skip, set())
        if len(found.sources) == before:
            found.sources.append(Source(str(path), problem=Rejected("unreadable", "no scan in this folder")))
    elif not path.exists():
        found.sources.append(Source(str(path), problem=Rejected("missing", _dangling(path))))
    elif path.is_file() and _ending(path.name):
        found.sources.append(_source(path, path.parent, ""))
    elif path.is_file() and _is_dicom(path):
        found.sources.append(Source(str(path), id=slug(path.stem), files=(str(path),)))
    else:
        problem = Rejected("unreadable", "not a known format (NIfTI, NRRD, MetaImage, DICOM)")
        found.sources.append(Source(str(path), problem=problem))


def _list_entries(path: Path) -> Iterator[Path]:
    """Paths of a list: one per line, relative to the list; `#` starts a comment line."""
    try:
        text = path.read_text(encoding="utf-8-sig") if path.stat().st_size <= MAX_TEXT_BYTES else "\0"
    except (OSError, UnicodeDecodeError):
        text = "\0"
    if "\0" in text:
        raise UserError(f"--input {path}: neither a scan of a known format nor a text file that lists paths")
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield path.parent / line.strip()


# -------------------------------------------------------------------- dataset.json


def _add_dataset(folder: Path, found: Found) -> bool:
    """Adds the images of an nnU-Net or Decathlon data set, with their labels; False if the file describes none."""
    path = folder / "dataset.json"
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ValueError(f"more than {MAX_TEXT_BYTES} bytes")
        with open(path, encoding="utf-8") as file:
            dataset = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        found.sources.append(Source(str(path), problem=Rejected("unreadable", str(error))))
        return False
    if not isinstance(dataset, dict) or not dataset.keys() & {"training", "numTraining", "channel_names", "dataset"}:
        return False
    found.names[str(path)] = dataset.get("labels")
    seen = set()
    for entry, label in _listed(dataset):
        try:
            image = _listed_image(folder, entry)
        except Rejected as problem:
            found.sources.append(Source(f"{path}: {str(entry)[:200]}", problem=problem))
            continue
        if image not in seen:
            seen.add(image)
            source = _source(image, image.parent, "", channel_suffix=True)
            found.sources.append(dataclasses.replace(source, labels=_listed_label(folder, label)))
    for name in ("imagesTr", "imagesVal", "imagesTs"):
        images = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        for image in images:
            if image not in seen and not image.name.startswith(".") and _ending(image.name):
                source = _source(image, image.parent, "", channel_suffix=True)
                if name == "imagesTr" and (folder / "labelsTr").is_dir():
                    label = folder / "labelsTr" / (without_channel(_stem(image.name)) + _ending(image.name))
                    source = dataclasses.replace(source, labels=(LabelFile(str(label)),))
                found.sources.append(source)
    return True


def _listed(dataset: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Images and their labels, None where there are none."""
    for key in ("training", "validation", "test"):  # Decathlon and nnU-Net 1: {"image": path, "label": path} or path
        items = dataset.get(key)
        for item in items if isinstance(items, list) else ():
            yield (item.get("image"), item.get("label")) if isinstance(item, dict) else (item, None)
    cases = dataset.get("dataset")  # nnU-Net 2: {case: {"images": [path, ...], "label": path}}
    for item in cases.values() if isinstance(cases, dict) else ():
        images = item.get("images") if isinstance(item, dict) else None
        for image in images if isinstance(images, list) else ():
            yield image, item.get("label")


def _listed_label(folder: Path, entry: Any) -> tuple[LabelFile, ...]:
    if entry is None:
        return ()
    try:
        return (LabelFile(str(path_within(folder, str(entry)))),)
    except Rejected as problem:
        return (LabelFile(str(entry), problem=problem),)


def _listed_image(folder: Path, entry: Any) -> Path:
    if not isinstance(entry, str):
        raise Rejected("missing", f"the entry is no path: {str(entry)[:80]}")
    path = path_within(folder, entry)
    if path.exists():
        return path
    ending = _ending(path.name)
    first_channel = path.with_name(f"{path.name.removesuffix(ending)}_0000{ending}")  # as nnU-Net stores it
    if not first_channel.exists():
        raise Rejected("missing", _dangling(path))
    return first_channel


# -------------------------------------------------------------------- names


def slug(text: str) -> str:
    """A readable id: ASCII letters and digits, words joined by `_` and folders by `-`.

    >>> slug("Köln 2.1/Patient (7)")
    'Koln_2_1-Patient_7'
    """
    parts = text.split("/")
    plain = [unicodedata.normalize("NFKD", part).encode("ascii", "ignore").decode() for part in parts]
    words = [re.sub(r"[^A-Za-z0-9]+", "_", part).strip("_") for part in plain]
    readable = "-".join(word for word in words if word)
    if len(readable) > 100 or not all(words):  # too long, or in an alphabet that ASCII cannot show
        digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]
        readable = f"{readable[-80:].strip('-_')}-{digest}".strip("-")
    return readable


def _source(path: Path, root: Path, patient: str, channel_suffix: bool = False) -> Source:
    """The id comes from the path below the searched folder; a name such as ct.nii.gz takes its folder's."""
    stem = without_channel(_stem(path.name)) if channel_suffix else _stem(path.name)
    inner = os.path.relpath(path.parent, root)
    parts = [part for part in inner.split(os.sep) if part != "."]
    if stem.casefold() in GENERIC:
        parts = parts or [_folder_name(path.parent)]
        return Source(str(path), id=slug("/".join(parts)), patient=patient)
    return Source(str(path), id=slug("/".join([*parts, stem])), patient=patient)


def without_channel(stem: str) -> str:
    """nnU-Net numbers the channels of an image, CT having one; its labels have no number."""
    return re.sub(r"_0000$", "", stem)


def _relative(folder: Path, root: Path) -> str:
    inner = os.path.relpath(folder, root).replace(os.sep, "/")
    return _folder_name(folder) if inner == "." else inner


def _folder_name(folder: Path) -> str:
    return os.path.basename(os.path.abspath(folder)) or "scan"


def _ending(name: str) -> str:
    """The ending of a scan's name, as it is written there; empty for other files."""
    return next((name[-len(e) :] for e in ENDINGS if name.lower().endswith(e) and len(name) > len(e)), "")


def _stem(name: str) -> str:
    return name.removesuffix(_ending(name))


def _header_of(path: Path, names: list[str]) -> bool:
    stem = path.name[: -len(next(e for e in COMPANIONS if path.name.endswith(e)))]
    return any(stem + ending in names for ending in (".hdr", ".mhd", ".nhdr"))


def _is_dicom(path: Path) -> bool:
    if path.name.lower().endswith(DICOM_ENDINGS):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _dangling(path: Path) -> str:
    return f"a link to {os.readlink(path)}" if path.is_symlink() else "there is no such file"
