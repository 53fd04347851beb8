"""A store that fails while it is read: another try where that can help, otherwise one line naming scan and file."""

import collections
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorstore as ts
from builders import noise_store
from test_readers import ct_like, write_nifti
from test_store import damage, make_scan, make_volume, shard_of
from test_store_bucket import Bucket, run, serve

from alice_jax.data import files
from alice_jax.data.store import Store
from alice_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
VOLUME, FOREGROUND = make_volume()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """One whose voxels are in no cache of this process."""
    written = Store.create(tmp_path / "s", (2, 2, 2))
    written.write_scan(make_scan(), VOLUME, FOREGROUND)
    monkeypatch.setattr(files, "CONTEXT", ts.Context({"cache_pool": {"total_bytes_limit": 0}}))
    return Store.open(written.path)


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited for, though not here."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


FAULTS = {
    "lost": os.remove,
    "cut": lambda path: os.truncate(path, os.path.getsize(path) - 10),
    "emptied": lambda path: os.truncate(path, 0),
    "flipped": lambda path: damage(path, 5000, 5001),
    "lost with its folder": lambda path: shutil.rmtree(path.split("/volume/")[0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_stays_broken_in_the_middle_of_a_run_is_one_line(store, waits, fault):
    np.testing.assert_array_equal(store.read_crop("case", (0, 0, 0), (8, 8, 8)), VOLUME[:8, :8, :8])
    FAULTS[fault](shard_of(store))
    with pytest.raises(UserError) as caught:
        store.read_volume("case")
    words = f"scan case: {store.path}/scans/case/volume is missing or damaged ("
    assert str(caught.value).startswith(words) and str(caught.value).endswith("prepare this scan again")
    assert "\n" not in str(caught.value) and "tensorstore_spec" not in str(caught.value)
    assert waits == [0.5, 2.0]


def test_what_comes_back_is_read(store, monkeypatch):
    """As on a network disk that is gone for a moment."""
    store.read_crop("case", (0, 0, 0), (8, 8, 8))
    folder, away, waited = f"{store.path}/scans/case", f"{store.path}/away", []
    os.rename(folder, away)

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            os.rename(away, folder)

    monkeypatch.setattr(time, "sleep", sleep)
    np.testing.assert_array_equal(store.read_volume("case"), VOLUME)
    assert waited == [0.5, 2.0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[70,45,90]", "[60,45,90]", "it holds (60, 45, 90) int16, where the scan has (70, 45, 90)"),
        ("[70,45,90]", "[1048576,1048576,90]", "where the scan has (70, 45, 90)"),
        ('"int16"', '"int8"', "it holds (70, 45, 90) int8"),
        ('"lz4"', '"lzz"', "is missing or damaged"),
    ],
)
def test_a_description_of_the_array_that_lies_is_not_believed(store, waits, old, new, message):
    path = pathlib.Path(store.path, "scans", "case", "volume", "zarr.json")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new).replace('"fill_value":-1024', '"fill_value":0'))
    with pytest.raises(UserError) as caught:
        store.read_volume("case")
    assert "scan case: " in str(caught.value) and message in str(caught.value)


def test_another_array_that_claims_terabytes_is_an_error(store, waits):
    store.write_array("case", "fine", np.ones((8, 8, 8, 4), np.int8))
    path = pathlib.Path(store.path, "scans", "case", "fine", "zarr.json")
    path.write_text(path.read_text().replace('"shape":[8,8,8,4]', '"shape":[1048576,1048576,8,4]'))
    with pytest.raises(UserError, match="more than its shard of"):
        Store.open(store.path).read_array("case", "fine")


def test_a_scan_that_is_replaced_by_another_shape_stops_the_reader(store, waits):
    """What was worked out for the old voxels must not be used on the new ones."""
    store.read_crop("case", (0, 0, 0), (8, 8, 8))
    smaller, foreground = make_volume((40, 40, 40), seed=1)
    Store.open(store.path).write_scan(make_scan(shape=smaller.shape), smaller, foreground)
    with pytest.raises(UserError, match=r"it holds \(40, 40, 40\) int16, where the scan has \(70, 45, 90\)"):
        store.read_volume("case")


@pytest.mark.parametrize("text", ["", "{", "[]", "\0"])
def test_a_damaged_description_names_its_file(store, text):
    path = pathlib.Path(store.path, "scans", "case", "scan.json")
    path.write_text(text)
    with pytest.raises(UserError, match=r"scan case: .*scan.json"):
        store.scan("case")
    with pytest.raises(UserError, match=r"scan case: .*scan.json"):
        store.read_volume("case")


def test_a_place_that_is_not_finite_is_damage(store):
    path = pathlib.Path(store.path, "scans", "case", "scan.json")
    path.write_text(path.read_text().replace("10.0", "1e999"))
    with pytest.raises(UserError, match="its geometry is not finite"):
        store.scan("case")


# ---------------------------------------------------------------- a server with moods


class MoodyBucket(Bucket):
    """Requests for the voxels of a scan go wrong in the way that the scan is called."""

    objects: dict[str, bytes] = {}  # noqa: RUF012 - shared on purpose
    requests: collections.Counter = collections.Counter()  # noqa: RUF012
    moody = flips = False

    def do_GET(self):
        key, _ = self.parse()
        mood = key.split("/scans/")[1].split("/")[0] if self.moody and "/volume/c/" in key else ""
        turn = self.requests[mood]
        self.requests[mood] += 1
        self.flips = mood == "rotten" or (mood == "garbled" and turn < 2)
        if mood == "down" or (mood == "busy" and turn < 2):
            return self.reply(503, b"come back later")
        if mood in ("denied", "lost"):
            return self.reply(403 if mood == "denied" else 404)
        if mood == "dumb" or (mood == "stalled" and turn == 0):
            time.sleep(5)
        if mood == "slow":
            time.sleep(0.5)
        super().do_GET()

    def reply(self, code, body=b"", **headers):
        if self.flips and body:
            body = bytes([body[0] ^ 1, *body[1:]])
        super().reply(code, body, **headers)


MOODS = """
moods = "well busy slow stalled garbled down dumb denied rotten lost".split()
volume, foreground = make_volume((40, 40, 40))
"""
WRITE_ALL = """
store = Store.create("gs://a-bucket/moody", (2, 2, 2))
for mood in moods:
    store.write_scan(make_scan(mood, volume.shape), volume, foreground)
"""
READ_ALL = """
import json
import tensorstore as ts
from alice_jax.data import files, store as stores
from alice_jax.errors import UserError
files.CONTEXT = ts.Context({"gcs_request_retries": {"max_retries": 2, "initial_delay": "50ms", "max_delay": "200ms"}})
stores.WAITS_S = (0.05, 0.05)
store = Store.open("gs://a-bucket/moody")
outcomes = {}
for mood in moods:
    try:
        outcomes[mood] = bool((store.read_volume(mood) == volume).all())
    except UserError as error:
        outcomes[mood] = str(error)
print(json.dumps(outcomes))
"""


def test_a_server_with_errors_and_delays():
    with serve(MoodyBucket) as url:
        run(MOODS + WRITE_ALL, url)
        MoodyBucket.moody = True
        outcomes = json.loads(run(MOODS + READ_ALL, url, TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS="1"))
    well = {mood for mood, outcome in outcomes.items() if outcome is True}
    assert well == {"well", "busy", "slow", "stalled", "garbled"}
    place = "scan {0}: gs://a-bucket/moody/scans/{0}/volume is "
    for mood in ("down", "dumb", "denied"):
        assert outcomes[mood].startswith(place.format(mood) + "out of reach ("), outcomes[mood]
        assert outcomes[mood].endswith("run the same command again when the server answers")
    for mood in ("rotten", "lost"):
        assert outcomes[mood].startswith(place.format(mood) + "missing or damaged ("), outcomes[mood]
    assert MoodyBucket.requests["down"] == 3  # one and two more, and no second round


# ---------------------------------------------------------------- commands


def test_a_full_disk_stops_prepare_with_one_line_and_it_goes_on_later(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii.gz", ct_like())
    command = [sys.executable, "-m", "alice_jax.prepare", "--input", "in", "--store", "store", "--workers", "1"]
    no_file_above_10_kb = ["bash", "-c", 'trap "" XFSZ; ulimit -f 10; exec "$@"', "bash"]
    # Python itself would leave half a .pyc file.
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    options = dict(cwd=tmp_path, capture_output=True, encoding="utf-8", env=variables)
    full = subprocess.run([*no_file_above_10_kb, *command], **options)
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert full.stderr.count("error: ") == 1, full.stderr
    assert "error: scan a: volume cannot be written to the store" in full.stderr
    assert Store.open(tmp_path / "store").ids() == []
    later = subprocess.run(command, **options)
    assert later.returncode == 0 and Store.open(tmp_path / "store").ids() == ["a"]


@pytest.mark.slow  # a training in a process of its own
@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_stops_with_one_line_when_its_store_is_cut(tmp_path, workers):
    """The store is larger than what TensorStore keeps in memory, or nobody would notice."""
    noise_store(str(tmp_path / "store"), scans=10, shape_zyx=(160, 160, 164))
    command = [sys.executable, "-m", "alice_jax.train", "--config=tests/configs/small.py", "--config.steps=100000"]
    command += [f"--config.data.store={tmp_path}/store", f"--workdir={tmp_path}/run", "--config.views.kind=random"]
    running = subprocess.Popen(
        [*command, f"--config.data.workers={workers}"], cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8"
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.time() + 300
    while not (metrics.exists() and metrics.read_text()) and running.poll() is None and time.time() < deadline:
        time.sleep(0.2)
    for shard in (tmp_path / "store" / "scans").glob("*/volume/c/0/0/0"):
        os.truncate(shard, 5000)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 1 and "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "/volume is missing or damaged (" in lines[0]
