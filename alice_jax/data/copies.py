"""Copies of a bucket's arrays on this host's disk: read over the network once, then as fast as any local store.

    FOLDER/<store>/scans/<id>/<name>/     the array's files, and generations.json: which version of each they are

The bucket is asked whether an array has changed each time that it is opened. The arrays used longest ago are removed
before all together exceed the limit. Processes may share the folder: what one removes, another one fetches again. Each
looks through it when it first adds to it, and then whenever it has added SHARE of the limit; so that beside others it
may exceed the limit by that.
"""

import base64
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

from alice_jax.data.files import Files
from alice_jax.errors import UserError

GENERATIONS = "generations.json"
SHARE, LEFT = 0.02, 0.9  # of the limit: added between two looks through the folder; left by one that removes


@dataclasses.dataclass
class Copies:
    """Where copies lie and how many bytes they may take.

    folder: on a disk of this host, made when the first array is copied.
    limit_bytes: of all stores together; a larger array is still kept while it is the newest.
    """

    folder: str
    limit_bytes: int
    _added_bytes: float = dataclasses.field(default=math.inf, init=False, repr=False)  # since the last look

    def local(self, remote: Files, key: str) -> str:
        """The folder of a copy that equals what lies below `key` in the bucket, such as "scans/<id>/volume/".

        Raises:
          UserError: the disk is full or read-only.
          One of `files.ERRORS`: the bucket does not answer, or lacks the array.
        """
        place = self._place(remote, key)
        known = _generations(place)
        names = [name.removeprefix(key) for name in remote.list(key)]
        newer = {name: remote.read_newer(key + name, known.get(name)) for name in names}
        if not newer:
            raise KeyError(f"{key} is not there")
        try:
            if any(newer.values()) or set(newer) != set(known):
                _replace(place, known, newer)
                self._added_bytes += sum(len(found[0]) for found in newer.values() if found)
                if self._added_bytes > SHARE * self.limit_bytes:
                    self._added_bytes = 0
                    self._remove_oldest(but=place)
            os.utime(place / GENERATIONS)
        except FileNotFoundError as error:
            raise KeyError(f"{place} was removed by another process meanwhile") from error
        except OSError as error:
            raise UserError(
                f"data.cache_gb: {self.folder} cannot hold a copy of {remote.path}/{key} ({error.strerror}); make room "
                "there, name another folder in ALICE_JAX_CACHE, or set data.cache_gb to 0"
            ) from error
        return str(place)

    def forget(self, remote: Files, key: str) -> None:
        """Removes a copy, since it may be damaged."""
        shutil.rmtree(self._place(remote, key), ignore_errors=True)

    def _place(self, remote: Files, key: str) -> Path:
        return Path(self.folder, hashlib.sha256(remote.path.encode()).hexdigest()[:16], key)

    def _remove_oldest(self, but: Path) -> None:
        sizes: dict[Path, int] = {}
        used: dict[Path, float] = {}
        for stamp in Path(self.folder).rglob(GENERATIONS):
            try:
                used[stamp.parent] = stamp.stat().st_mtime
                sizes[stamp.parent] = sum(file.stat().st_size for file in stamp.parent.rglob("*") if file.is_file())
            except FileNotFoundError:
                used.pop(stamp.parent, None)
        total = sum(sizes.values())
        if total <= (1 - SHARE) * self.limit_bytes:
            return
        for place in sorted(sizes.keys() - {but}, key=used.__getitem__):
            if total <= LEFT * self.limit_bytes:
                return
            shutil.rmtree(place, ignore_errors=True)
            total -= sizes[place]


def _replace(place: Path, known: dict[str, bytes], newer: dict[str, tuple[bytes, bytes] | None]) -> None:
    """Puts a whole copy in place in one step; files of which there is nothing newer come from the old one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    generations = {name: known[name] if found is None else found[1] for name, found in newer.items()}
    try:
        for name, found in newer.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes((place / name).read_bytes() if found is None else found[0])
        text = json.dumps({name: base64.b64encode(generation).decode() for name, generation in generations.items()})
        (fresh / GENERATIONS).write_text(text, encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        os.rename(fresh, place)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # another process was faster, with the same copy
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _generations(place: Path) -> dict[str, bytes]:
    """Which versions of its files a copy holds; {} where there is none, or none that can be read."""
    try:
        written = json.loads((place / GENERATIONS).read_text(encoding="utf-8"))
        return {name: base64.b64decode(text) for name, text in written.items()}
    except (OSError, ValueError, AttributeError):
        return {}
