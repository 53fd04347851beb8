"""A store in a bucket, against a small stand-in for Google's server that counts what is read."""

import contextlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse
import zlib

from alice_jax.data.copies import Copies

TESTS = pathlib.Path(__file__).parent

WRITE = """
store = Store.create("gs://a-bucket/some/store", (2, 2, 2))
store.write_scan(make_scan("c", volume.shape), volume, foreground)
store.write_json("side.json", {"a": 1})
"""
READ = """
import pickle
store = pickle.loads(pickle.dumps(Store.open("gs://a-bucket/some/store")))
assert store.ids() == ["c"] and store.has_array("c", "volume") and store.read_json("side.json") == {"a": 1}
assert (store.read_crop("c", (40, 50, 60), (16, 14, 4)) == volume[40:56, 50:64, 60:64]).all()
"""
REPLACE = """
store = Store.open("gs://a-bucket/some/store")
store.write_scan(make_scan("c", volume.shape), volume + np.int16(1), foreground)
assert (store.read_volume("c") == volume + 1).all()
store.delete_scan("c")
assert store.ids() == []
"""
COMMON = """
import numpy as np
from alice_jax.data.store import Store
from test_store import make_scan, make_volume
volume, foreground = make_volume((130, 140, 150))
"""


def generation(data: bytes) -> str:
    """A number that changes with what an object holds."""
    return str(1 + zlib.crc32(data))


class Bucket(http.server.BaseHTTPRequestHandler):
    """Objects in a dictionary; the four calls that the store needs."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes] = {}  # noqa: RUF012 - shared on purpose
    read_bytes = 0

    def log_message(self, *_):
        pass

    def reply(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"x_goog_generation": "1", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def parse(self):
        url = urllib.parse.urlparse(self.path)
        return urllib.parse.unquote(url.path.split("/o", 1)[1][1:]), urllib.parse.parse_qs(url.query)

    def do_GET(self):
        key, query = self.parse()
        if not key:
            prefix = query.get("prefix", [""])[0]
            low, high = query.get("startOffset", [""])[0], query.get("endOffset", ["~"])[0]
            found = [k for k in sorted(self.objects) if k.startswith(prefix) and low <= k < high]
            items = [{"name": k, "generation": "1", "size": str(len(self.objects[k]))} for k in found]
            return self.reply(200, json.dumps({"items": items}).encode())
        if key not in self.objects:
            return self.reply(404)
        data = self.objects[key]
        if query.get("ifGenerationNotMatch") == [generation(data)]:
            return self.reply(304)
        asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=")
        first, last = asked.split("-")
        start = int(first) if first else len(data) - int(last)
        stop = int(last) + 1 if first and last else len(data)
        part = data[start:stop]
        if "/volume/c/" in key:
            Bucket.read_bytes += len(part)
        span = {"Content_Range": f"bytes {start}-{stop - 1}/{len(data)}"} if "Range" in self.headers else {}
        return self.reply(206 if span else 200, part, x_goog_generation=generation(data), **span)

    def do_POST(self):
        _, query = self.parse()
        name = query["name"][0]
        self.objects[name] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(200, json.dumps({"generation": generation(self.objects[name]), "name": name}).encode())

    def do_DELETE(self):
        self.reply(204 if self.objects.pop(self.parse()[0], None) is not None else 404)


@contextlib.contextmanager
def serve(handler):
    """The address of a server that runs meanwhile."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(code, url, **variables) -> str:
    """What a process that takes the server for Google's prints."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = os.environ | {"TENSORSTORE_GCS_HTTP_URL": url, "PYTHONPATH": paths} | variables
    args = [sys.executable, "-c", COMMON + code]
    done = subprocess.run(args, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_store_in_a_bucket():
    with serve(Bucket) as url:
        run(WRITE, url)
        assert {key.split("some/store/")[1] for key in Bucket.objects} == {
            "manifest.json",
            "side.json",
            "scans/c/scan.json",
            *(f"scans/c/{name}/{file}" for name in ("volume", "foreground") for file in ("zarr.json", "c/0/0/0")),
        }
        whole = next(len(data) for key, data in Bucket.objects.items() if key.endswith("volume/c/0/0/0"))
        Bucket.read_bytes = 0
        run(READ, url)
        assert 0 < Bucket.read_bytes < whole / 50  # one chunk of 125 and the index
        run(REPLACE, url)
        assert not any("/scans/" in key for key in Bucket.objects)


COPIED = """
import os, pathlib, pickle
from alice_jax.data.copies import Copies
folder = pathlib.Path(os.environ["FOLDER"])
def read(limit_bytes=10**9, name="volume"):
    store = pickle.loads(pickle.dumps(Store.open("gs://a-bucket/some/store", Copies(str(folder), limit_bytes))))
    return store.read_array_region("c", name, (0, 0, 0), (5, 5, 5))
def copied():
    return sorted(path.parent.name for path in folder.rglob("generations.json"))
"""


def test_copies_are_read_once_follow_the_bucket_and_keep_to_their_limit(tmp_path):
    variables = {"FOLDER": str(tmp_path / "copies")}
    with serve(Bucket) as url:
        run(WRITE, url)
        whole = next(len(data) for key, data in Bucket.objects.items() if key.endswith("volume/c/0/0/0"))
        Bucket.read_bytes = 0
        run(COPIED + "assert (read() == volume[:5, :5, :5]).all() and copied() == ['volume']", url, **variables)
        assert Bucket.read_bytes == whole
        run(COPIED + "assert (read() == volume[:5, :5, :5]).all()", url, **variables)
        assert Bucket.read_bytes == whole  # nothing again, by another process

        damage = "shard = next(folder.rglob('c/0/0/0')); shard.write_bytes(shard.read_bytes()[:-9]); "
        run(COPIED + damage + "assert (read() == volume[:5, :5, :5]).all()", url, **variables)
        assert Bucket.read_bytes == 2 * whole

        run("store = Store.open('gs://a-bucket/some/store'); " + REPLACE.splitlines()[2], url)
        run(COPIED + "assert (read() == volume[:5, :5, :5] + 1).all()", url, **variables)

        run(COPIED + "read(limit_bytes=10, name='foreground'); assert copied() == ['foreground']", url, **variables)
        run(COPIED + "read(limit_bytes=10); assert copied() == ['volume']", url, **variables)
        assert list((tmp_path / "copies").rglob(".*")) == []


class Arrays:
    """As `Files`: each key is an array of 5,000 bytes in one file."""

    path = "gs://a-bucket/some/store"

    def list(self, key):
        return [f"{key}data"]

    def read_newer(self, key, generation):
        return None if generation else (bytes(5000), b"1")


def test_the_folder_of_copies_is_looked_through_once_for_many_of_them(tmp_path, monkeypatch):
    """200 arrays would fill 1 MB and 4 are 2 % of it: a look at the first and at each fifth after it."""
    looks, remove_oldest = [], Copies._remove_oldest
    monkeypatch.setattr(Copies, "_remove_oldest", lambda self, but: (looks.append(but), remove_oldest(self, but)))
    copies, arrays = Copies(str(tmp_path), 10**6), Arrays()
    for i in range(250):
        copies.local(arrays, f"scans/{i}/volume/")
    assert len(looks) == 1 + 249 // 5
    kept = {int(path.parent.parent.name) for path in tmp_path.rglob("generations.json")}
    assert 170 <= len(kept) < 200 and kept == set(range(250 - len(kept), 250))
