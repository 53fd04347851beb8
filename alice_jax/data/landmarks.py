"""What is known of where a scan's anatomy lies in another scan: the questions that matching is judged by.

Three kinds of truth:

- "known points": phantom patients, in which every point of one has its place in the other;
- "landmarks": points that somebody marked, FOLDER/<scan id>/landmarks.json, under the same names;
- "organs": label maps, FOLDER/<scan id>/labels.nii.gz or the array `labels` of phantoms. Centroid against centroid,
  and random points of an organ, of which only is known that they belong to it in both scans.
"""

import difflib
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from alice_jax.data import label_maps, phantom, point_files
from alice_jax.data.label_maps import LabelMap
from alice_jax.data.store import Store
from alice_jax.errors import UserError


class Questions(NamedTuple):
    """Points of one scan and what is known of them in another.

    names: (n,) rows of the report, such as "carina".
    points_zyx_vox: (n, 3) in the query.
    truth_zyx_vox: (n, 3) in the key; NaN where unknown.
    organs: (n,) what the key's label map should show at the match; "" where nothing is asked.
    """

    names: np.ndarray
    points_zyx_vox: np.ndarray
    truth_zyx_vox: np.ndarray
    organs: np.ndarray


class Truth(Protocol):
    """One kind of truth about some scans."""

    names: set[str]  # of all landmarks or organs

    def shared(self, query: str, key: str) -> bool:
        """Whether anything can be asked of this pair."""

    def ask(self, query: str, key: str) -> Questions:
        """The same questions at every call."""

    def organ_at(self, id: str, points_zyx_vox: np.ndarray) -> np.ndarray:
        """(n,) names of the organs at points (n, 3) of a scan that questions ask about."""


class KnownPoints:
    """Random points of phantom bodies, named by the organ they lie in.

    Args:
      count: points for each pair, those outside the organs of `only` included.
    """

    def __init__(self, store: Store, ids: Sequence[str], count: int, seed: int = 0, only: Sequence[str] = ()):
        self.patients = {id: phantom.patient_of(store.scan(id)) for id in ids}
        self.labels = {id: label_maps.from_store(store, id) for id in ids}
        self.count, self.seed, self.only = count, seed, only
        self.names = {name for labels in self.labels.values() if labels for name in labels.names} | {"unlabelled"}

    def shared(self, query: str, key: str) -> bool:
        return query in self.patients and key in self.patients

    def ask(self, query: str, key: str) -> Questions:
        rng = _stream(self.seed, query, key)
        points, truth = phantom.shared_points(self.patients[query], self.patients[key], self.count, rng)
        labels = self.labels[query]
        organs = np.full(len(points), "") if labels is None else labels.at(points)
        expected = organs if self.labels[key] is not None else np.full(len(points), "")
        names = np.where(organs == "", "unlabelled", organs)
        asked = np.isin(names, self.only) if self.only else np.full(len(names), True)
        return Questions(names[asked], points[asked].astype(float), truth[asked], expected[asked])

    def organ_at(self, id: str, points_zyx_vox: np.ndarray) -> np.ndarray:
        labels = self.labels[id]
        assert labels is not None
        return labels.at(points_zyx_vox)


class Landmarks:
    """Marked points.

    Args:
      places: for each scan the stored voxels (3,) of its landmarks by name.
      only: those to ask for; all by default.
    """

    def __init__(self, places: Mapping[str, Mapping[str, np.ndarray]], only: Sequence[str] = ()):
        self.places, self.only = places, only
        self.names = {name for marks in places.values() for name in marks}

    def shared(self, query: str, key: str) -> bool:
        return bool(self._common(query, key))

    def ask(self, query: str, key: str) -> Questions:
        names = self._common(query, key)
        here, there = (np.array([self.places[id][name] for name in names]) for id in (query, key))
        return Questions(np.array(names), here, there, np.full(len(names), ""))

    def organ_at(self, id: str, points_zyx_vox: np.ndarray) -> np.ndarray:
        raise AssertionError("landmarks ask for no organ")

    def _common(self, query: str, key: str) -> list[str]:
        return _shared(self.places.get(query, ()), self.places.get(key, ()), self.only)


class Organs:
    """Centroids of organs, and random points that should stay in them.

    Args:
      count: random points for each pair, shared out equally over the organs that both scans show.
      only: the organs to ask for; all by default.
    """

    def __init__(self, labels: Mapping[str, LabelMap], count: int, seed: int = 0, only: Sequence[str] = ()):
        self.labels, self.count, self.seed, self.only = labels, count, seed, only
        self.names = {name for organs in labels.values() for name in organs.names}

    def shared(self, query: str, key: str) -> bool:
        return bool(self._common(query, key))

    def ask(self, query: str, key: str) -> Questions:
        a, b, rng = self.labels[query], self.labels[key], _stream(self.seed, query, key)
        names = self._common(query, key)
        whole = [name for name in names if name in a.centres and name in b.centres]
        centres = [np.array([labels.centres[name] for name in whole]).reshape(-1, 3) for labels in (a, b)]
        each = max(1, self.count // len(names))
        points = [rng.permutation(a.voxels(name))[:each] for name in names]
        random_names = np.repeat(names, [len(p) for p in points])
        nowhere = np.full((len(random_names), 3), np.nan)
        return Questions(
            np.concatenate([np.array(whole, random_names.dtype), random_names]),
            np.concatenate([centres[0], *points]),
            np.concatenate([centres[1], nowhere]),
            np.concatenate([np.full(len(whole), "", random_names.dtype), random_names]),
        )

    def organ_at(self, id: str, points_zyx_vox: np.ndarray) -> np.ndarray:
        return self.labels[id].at(points_zyx_vox)

    def _common(self, query: str, key: str) -> list[str]:
        if query not in self.labels or key not in self.labels:
            return []
        return _shared(self.labels[query].names, self.labels[key].names, self.only)


def _shared(here: Collection[str], there: Collection[str], only: Sequence[str]) -> list[str]:
    return [name for name in here if name in there and (not only or name in only)]


def _stream(seed: int, query: str, key: str) -> np.random.Generator:
    return np.random.default_rng((seed, zlib.crc32(query.encode()), zlib.crc32(key.encode())))


# -------------------------------------------------------------------- pairs


def pairs(ids: Sequence[str], truth: Truth, limit: int) -> list[tuple[str, str]]:
    """Up to `limit` ordered pairs of which something can be asked, such that every scan comes up equally often.

    >>> pairs("abc", Landmarks({id: {"carina": np.zeros(3)} for id in "abc"}), limit=4)
    [('a', 'b'), ('b', 'c'), ('c', 'a'), ('a', 'c')]
    """
    found: list[tuple[str, str]] = []
    for pair in _rings(ids):
        if len(found) == limit:
            break
        if truth.shared(*pair):
            found.append(pair)
    return found


def _rings(ids: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each scan with the next one, then each with the next but one, and so on."""
    for step in range(1, len(ids)):
        for n, id in enumerate(ids):
            yield id, ids[(n + step) % len(ids)]


# -------------------------------------------------------------------- reading


def read_truth(
    store: Store,
    ids: Sequence[str],
    folder: str | None = None,
    names: Mapping[int, str] | None = None,
    only: Sequence[str] = (),
    count: int = 200,
    seed: int = 0,
) -> dict[str, Truth]:
    """All that is known of these scans of a store, by kind.

    Args:
      folder: holds <scan id>/landmarks.json and <scan id>/labels.nii.gz, with the names of labels in
        <scan id>/meta.json unless `names` gives them.
      only: landmarks and organs to ask for; all by default.
      count: random points for each pair.

    Raises:
      UserError: nothing is known.
    """
    found: dict[str, Truth] = {}
    if folder is None:
        if all("phantom" in store.scan(id).extra for id in ids):
            found["known points"] = KnownPoints(store, ids, count, seed, only)
        maps = {id: labels for id in ids if (labels := label_maps.from_store(store, id)) is not None}
        what = f"store {store.path}"
        remedy = "these scans are no phantoms and have no array `labels`; give landmarks or labels by --truth FOLDER"
    else:
        if not Path(folder).is_dir():
            raise UserError(f"--truth {folder}: there is no such folder")
        marks = {id: _read_landmarks(store, id, Path(folder, id, "landmarks.json")) for id in ids}
        if any(marks.values()):
            found["landmarks"] = Landmarks(marks, only)
        maps = _read_label_maps(store, ids, Path(folder), names)
        what = f"--truth {folder}"
        remedy = "no <scan id>/landmarks.json and no <scan id>/labels.nii.gz for the scans chosen" + (
            f", of which {ids[0]} is one" if ids else ""
        )
    if maps:
        found["organs"] = Organs(maps, count, seed, only)
    if not found:
        raise UserError(f"{what}: {remedy}")
    known = {name for truth in found.values() for name in truth.names}
    for name in only:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)[:5]
            raise UserError(f"--names {name}: nothing is called so; there are {', '.join(near)}")
    return found


def _read_landmarks(store: Store, id: str, path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    points = point_files.read(path)
    return dict(zip(points.names, point_files.place(points, store.scan(id), str(path)), strict=True))


def _read_label_maps(
    store: Store, ids: Sequence[str], folder: Path, names: Mapping[int, str] | None
) -> dict[str, LabelMap]:
    maps = {}
    for id in ids:
        path, about = folder / id / "labels.nii.gz", folder / id / "meta.json"
        if path.exists():
            table = names if names is not None else label_maps.names_of(about) if about.exists() else {}
            maps[id] = label_maps.from_file(path, store.scan(id), table)
    return maps
