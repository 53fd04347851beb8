"""The files of a store, on a local disk or in a bucket, through TensorStore: its patience, lists and small JSON files.

A bucket that is busy or out of reach is asked again after 1, 2, 4, … 32 seconds, eight times; a request that stalls
counts as failed after half a minute.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import tensorstore as ts

from alice_jax.errors import UserError

# TensorStore itself would wait for ever on a connection that says nothing. What the user has set stays.
for _name, _value in (("CONNECT_TIMEOUT_SECONDS", 30), ("LOW_SPEED_TIME_SECONDS", 30), ("LOW_SPEED_LIMIT_BYTES", 1)):
    os.environ.setdefault(f"TENSORSTORE_CURL_{_name}", str(_value))

# One for the process: TensorStore's cache, its thread limits and `memory://` live in a context.
CONTEXT = ts.Context(
    {
        "cache_pool": {"total_bytes_limit": 64 << 20},
        "data_copy_concurrency": {"limit": 2},
        "file_io_concurrency": {"limit": 8},
        "gcs_request_retries": {"max_retries": 8, "initial_delay": "1s", "max_delay": "32s"},
    }
)
ERRORS = (ValueError, OSError, KeyError, TypeError, IndexError)  # what TensorStore and JSON raise on a bad store
AT_ONCE = 1000  # reads of small files that wait for their answers together
_OUT_OF_REACH = ("retry attempts failed", "PERMISSION_DENIED", "UNAUTHENTICATED")


def normalised(path: str | os.PathLike) -> str:
    """A bucket's address, or an absolute local path."""
    path = os.fspath(path)
    return path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))


def refuse_foreign_folder(path: str) -> None:
    """A typing mistake must not scatter a store among somebody's files."""
    if "://" in path or not os.path.lexists(path):
        return
    if not os.path.isdir(path):
        raise UserError(f"store {path}: is a file; name a folder")
    names = os.listdir(path)
    if "manifest.json" in names:  # another process has just made it one
        return
    if any(not name.startswith((".", "manifest.json.")) for name in names):
        raise UserError(f"store {path}: the folder holds other files and no store; name a new or an empty folder")


def told(error: Exception) -> str:
    """What TensorStore says, without the specification that it appends."""
    return str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0][:300]


def out_of_reach(error: Exception) -> bool:
    """Whether the server failed, and not what it holds."""
    return any(words in str(error) for words in _OUT_OF_REACH)


class Files:
    """The files below a path. `what` names, in errors, whom a file belongs to."""

    def __init__(self, path: str):
        self.path = path
        spec = f"{path}/" if "://" in path else {"driver": "file", "path": f"{path}/"}
        try:
            self._kvstore = ts.KvStore.open(spec, context=CONTEXT).result()
        except ERRORS as error:
            raise UserError(f"store {path}: cannot be opened: {told(error)}") from error

    def spec(self, folder: str) -> dict[str, Any]:
        """The specification of a folder for TensorStore's drivers."""
        spec = self._kvstore.spec().to_json()
        return {**spec, "path": spec.get("path", "") + folder}

    def list(self, prefix: str) -> list[str]:
        """All that begins with a prefix."""
        try:
            return [key.decode() for key in self._kvstore.list(_range(prefix)).result()]
        except ERRORS as error:
            raise UserError(f"store {self.path}: cannot be listed: {told(error)}") from error

    def delete(self, prefix: str, what: str) -> None:
        """Removes all that begins with a prefix; no error if there is none."""
        try:
            self._kvstore.delete_range(_range(prefix)).result()
        except ERRORS as error:
            raise UserError(f"{what}: cannot be replaced in the store {self.path}: {told(error)}") from error

    def read_newer(self, key: str, generation: bytes | None) -> tuple[bytes, bytes] | None:
        """A file and its generation; None if it still is of the generation given. One of `ERRORS` if it fails."""
        result = self._kvstore.read(key, if_not_equal=generation).result()
        if result.state == "missing":
            raise KeyError(f"{key} is not there")
        return None if result.state == "unspecified" else (bytes(result.value), bytes(result.stamp.generation))

    def read_json(self, key: str, what: str) -> Any:
        """What a JSON file holds; None if there is none."""
        return next(self.read_jsons({key: what}))

    def read_jsons(self, files: Mapping[str, str]) -> Iterator[Any]:
        """What many JSON files hold, each {key: what}, in their order; as many at once as a bucket answers."""
        items = list(files.items())
        for start in range(0, len(items), AT_ONCE):
            for (key, what), read in [(item, self._kvstore.read(item[0])) for item in items[start : start + AT_ONCE]]:
                try:
                    result = read.result()
                    yield None if result.state == "missing" else json.loads(result.value)
                except ERRORS as error:
                    again = "run the command again when it answers"
                    remedy = again if out_of_reach(error) else "restore it, or prepare again"
                    raise UserError(f"{what}: {self.path}/{key} cannot be read ({told(error)}); {remedy}") from error

    def write_json(self, key: str, value: Any, what: str) -> None:
        """Writes a JSON file in one atomic step."""
        try:
            self._kvstore.write(key, json.dumps(value, indent=1, allow_nan=False).encode()).result()
        except ERRORS as error:
            raise UserError(f"{what}: {self.path}/{key} cannot be written ({told(error)})") from error

    def settle_json(self, key: str, old: Any, new: Any, what: str) -> Any:
        """Writes `new` if the file still holds `old` (None: is not there), and returns what it holds then.

        Of several processes that read the same `old`, the first one writes and all get what it wrote.
        """
        try:
            before = self._kvstore.read(key).result()
            if (None if before.state == "missing" else json.loads(before.value)) == old:
                value = json.dumps(new, indent=1, allow_nan=False).encode()
                self._kvstore.write(key, value, if_equal=before.stamp.generation).result()
        except ERRORS as error:
            raise UserError(f"{what}: {self.path}/{key} cannot be written ({told(error)})") from error
        return self.read_json(key, what)


def _range(prefix: str) -> ts.KvStore.KeyRange:
    return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))
