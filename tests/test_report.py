"""The page is one file that shows what training uses, and flags what is wrong with it."""

import dataclasses
import html.parser
import json
import re
import runpy
import shutil

import jax
import numpy as np
import pytest
from builders import add_volume, make_scan, noise_store
from random_weights import random_weights
from test_matching import make_codec

from alice_jax import checkpoint, provenance, report, tasks, train_state
from alice_jax.data import embeddings
from alice_jax.data.pipeline import Samples, batches
from alice_jax.data.store import Store
from alice_jax.errors import UserError
from alice_jax.reporting import pair_checks, pairs, planes, runs, student
from alice_jax.reporting.pairs import Limits, Pair
from configs import pretrain

SHAPE = (40, 36, 44)


def embed(store):
    """Vectors that are smooth functions of the place in the volume, so that matches are nearly perfect."""
    codec = make_codec()
    codec.save(store)
    directions = np.random.default_rng(1).normal(size=(3, 16)) / 8
    for id in store.ids():
        vectors = []
        for level in (codec.fine, codec.coarse):
            grid = [-(-n // s) for n, s in zip(SHAPE, level.stride_zyx_vox, strict=True)]
            centres = (np.argwhere(np.ones(grid, bool)) + 0.5) * level.stride_zyx_vox
            values = np.cos(centres @ directions + np.arange(16))
            vectors.append(embeddings.normalise(values).reshape(*grid, 16))
        embeddings.write_embedding(store, id, codec, *vectors)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = noise_store(str(tmp_path_factory.mktemp("report") / "store"), scans=6, shape_zyx=SHAPE)
    embed(store)
    return store


def config_for(store, **changes):
    config = runpy.run_path("tests/configs/small.py")["get_config"]()
    with config.unlocked():
        config.data.store = store.path
        config.update(changes)
    return config


LINES = [
    {"step": step, "loss": 3.0 - step, "teacher_entropy": 2.0, "views/weak": 0.0, "views/redraws": 1.0}
    | {"step_time_s": 1.0, "data_wait_s": 0.1}
    for step in (1, 2)
] + [{"step": 2, "validation/loss": 1.5}]


def write_run(workdir, config, lines=LINES, counts=None):
    """A workdir as training leaves it, without checkpoints."""
    checkpoint.write_config(str(workdir), config.to_dict())
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if counts is not None:
        (workdir / "coverage.json").write_text(json.dumps({"step": 2, "counts": counts}))
    return str(workdir)


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and notes headings, pictures, cells and addresses."""

    def __init__(self, path):
        super().__init__()
        self.open, self.headings, self.pictures, self.cells, self.addresses = [], [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


# ---------------------------------------------------------------- a store


@pytest.fixture(scope="module")
def preview_page(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report.main(["--store", store.path, "--out", str(path), "--pairs", "3"]) == 0
    return Page(path)


def test_a_store_becomes_one_file_without_links_to_anything_else(preview_page):
    assert preview_page.headings == ["At a glance", "Pairs", "Embeddings", "Scans"]
    assert all(address.startswith(("data:", "#")) for address in preview_page.addresses)
    assert not re.search(r"https?:|@import|url\(", preview_page.source)
    assert len(preview_page.pictures) >= 5  # pairs, statistics, the worst, components, bodies
    assert all(picture.startswith("data:image/png;base64,") for picture in preview_page.pictures)
    assert len(preview_page.source) < 5e6


def test_the_pairs_are_those_that_training_uses(store, preview_page):
    """Drawn through Grain from the default configuration, as the training loop does."""
    config = pretrain.get_config()
    with config.unlocked():
        config.data.store = store.path
    task = tasks.make(config, store)
    samples = Samples(task.sampler, len(task.scans), config.seed, config.batch_size, steps=1)
    (batch,) = batches(samples)
    meta, found = batch["meta"], report.first_pairs(report.preview(store), 3)
    for i, pair in enumerate(found):
        assert pair.ids == tuple(task.scans[scan] for scan in meta["scans"][i])
        np.testing.assert_array_equal(pair.points_zyx_vox, meta["points_zyx_vox"][i])
        assert (pair.score, pair.redraws, pair.weak) == (meta["score"][i], meta["redraws"][i], meta["weak"][i])
        assert (pair.cycle_mm, pair.weight) == (meta["cycle_mm"][i], meta["weight"][i])
        row = preview_page.cells[11 * i : 11 * i + 11]
        assert row[1] == pair.ids[0] and row[2] == ", ".join(map(str, pair.points_zyx_vox[0]))
    assert config.views.crop_shape_zyx == report.CROP_SHAPE_ZYX
    assert config.data.validation_fraction == report.VALIDATION_FRACTION


def test_a_png_holds_the_pairs_alone_and_only_named_scans_are_paired(store, tmp_path):
    out = tmp_path / "pairs.png"
    report.main(["--store", store.path, "--out", str(out), "--pairs", "2", "--only", "case1", "case4"])
    assert out.read_bytes().startswith(b"\x89PNG")
    samples = report.preview(store, ["case1", "case4"])
    assert {id for pair in report.first_pairs(samples, 4) for id in pair.ids} == {"case1", "case4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--store, --workdir"),
        (["--store", "{bare}"], "python -m alice_jax.embed --store"),
        (["--store", "{single}"], "holds 1 scans and a pair needs two; prepare more"),
        (["--store", "{other}"], "an embedding of another embedder than the store's .*python -m alice_jax.embed"),
        (["--store", "{folder}"], "no manifest.json"),
        (["--store", "{store}", "--only", "case0", "caseX"], "caseX: not in the store"),
        (["--store", "{store}", "--only", "case0"], "two scans"),
        (["--store", "{store}", "--pairs", "0"], "from 1 to"),
        (["--store", "{store}", "--seed", "-1"], "--seed -1: give a whole number of 0 or more"),
        (["--store", "{store}", "--pairs", "many"], "--help"),
        (["--store", "{store}", "--out", "{folder}"], "name a file"),
        (["--workdir", "{folder}"], "holds no run"),
        (["--workdir", "{silent}"], "metrics.jsonl"),
        (["--workdir", "{damaged}"], "config.json lacks objective"),
    ],
)
def test_mistakes_are_said_in_one_line_and_nothing_is_written(store, tmp_path, arguments, message):
    places = {name: tmp_path / name for name in ("bare", "single", "other", "folder", "silent", "damaged")}
    noise_store(str(places["bare"]), scans=2, shape_zyx=(16, 16, 16))
    noise_store(str(places["single"]), scans=1, shape_zyx=(16, 16, 16))
    shutil.copytree(store.path, places["other"])
    dataclasses.replace(make_codec(), embedder="another").save(Store.open(places["other"]))
    places["folder"].mkdir()
    write_run(places["silent"], config_for(store), lines=[])
    checkpoint.write_config(str(places["damaged"]), {"seed": 0})
    out = tmp_path / "report.html"
    filled = [argument.format(store=store.path, **places) for argument in arguments]
    with pytest.raises(UserError, match=message) as error:
        report.main(["--out", str(out), *filled])
    assert "\n" not in str(error.value) and not out.exists()


# ---------------------------------------------------------------- what is flagged

LIMITS = Limits(threshold=0.7, cycle_mm=10, agreeing=0.1)


def levels(checks):
    return {check.name: check.level for check in checks}


def judged(store, pairs, tries=()):
    return levels(pair_checks.checks(store, pairs, tries, LIMITS))


@pytest.fixture(scope="module")
def found(store):
    return report.first_pairs(report.preview(store), 40)


def test_good_pairs_pass_every_check(store, found):
    assert set(judged(store, found).values()) == {"good"}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_places_on_a_flipped_axis_are_flagged(store, found, axis):
    def flipped(points):
        points = points.copy()
        points[1, axis] = SHAPE[axis] - 1 - points[1, axis]
        return points

    wrong = [dataclasses.replace(pair, points_zyx_vox=flipped(pair.points_zyx_vox)) for pair in found]
    assert judged(store, wrong)["Places agree"] == "bad"


def test_places_on_swapped_axes_are_flagged(store, found):
    def swapped(points):
        return np.stack([points[0], points[1][[0, 2, 1]]])

    wrong = [dataclasses.replace(pair, points_zyx_vox=swapped(pair.points_zyx_vox)) for pair in found]
    assert judged(store, wrong)["Places agree"] == "bad"


class Stuck(Samples):
    """A loader that hands out its first sample again and again."""

    def __getitem__(self, position):
        return super().__getitem__(0)


def test_a_loader_that_repeats_itself_is_flagged_with_the_scans_it_repeats(store):
    samples = report.preview(store)
    wrong = Stuck(**{field.name: getattr(samples, field.name) for field in dataclasses.fields(samples)})
    repeated = report.first_pairs(wrong, 10)
    (check,) = [c for c in pair_checks.checks(store, repeated, [], LIMITS) if c.level == "bad"]
    assert check.name == "The loader is alive"
    assert f"{repeated[0].ids[0]} with {repeated[0].ids[1]} comes 10 times" in check.text


def test_a_loader_that_reads_nothing_is_flagged(store, found):
    empty = [dataclasses.replace(pair, filled=np.zeros(2)) for pair in found]
    assert judged(store, empty)["Crops show something"] == "bad"


def test_a_scan_of_one_value_is_named_on_the_page(store, tmp_path):
    """At 40 HU no crop is black, and the embeddings know nothing of it."""
    broken = Store.open(shutil.copytree(store.path, tmp_path / "store"))
    broken.delete_scan("case4")
    add_volume(broken, "case4", np.full(SHAPE, 40))
    embed(broken)
    checks = {check.name: check for check in report.write_report(tmp_path / "report.html", store=broken.path)}
    for name in ("Scans hold pictures", "Crops show something"):
        assert checks[name].level == "bad" and "case4" in checks[name].text
    page = Page(tmp_path / "report.html")
    assert "2 found something wrong" in page.source
    assert page.source.index("Scans hold pictures") < page.source.index("The loader is alive")  # the worst first


# ---------------------------------------------------------------- rejected tries


def a_pair(score, cycle_mm=1.0, ids=("a", "b"), **more):
    return Pair(0, ids, np.zeros((2, 3), int), score=score, cycle_mm=cycle_mm, **more)


def test_the_worst_accepted_are_those_of_the_lowest_scores_and_the_largest_cycle_error():
    pairs_ = [a_pair(score, cycle) for score, cycle in ((0.9, 1), (0.75, 2), (0.95, 9), (0.8, 3), (0.99, 0))]
    weak = a_pair(0.1, weak=True)
    assert [pair.score for pair in pairs.worst_accepted([weak, *pairs_])] == [0.75, 0.8, 0.95]
    assert pairs.worst_accepted([weak]) == []


def test_the_best_rejected_come_from_both_limits_and_from_different_scans():
    tries = [
        a_pair(0.69, np.nan),
        a_pair(0.68, np.nan),
        a_pair(0.5, np.nan, ("a", "c")),
        a_pair(0.97, 40, ("c", "b")),
        a_pair(0.8, 12),
    ]
    best = pairs.best_rejected(tries, LIMITS)
    assert [each.score for each in best] == [0.69, 0.5, 0.97, 0.8]
    reasons = ["score below 0.70", "score below 0.70", "cycle above 10 mm", "cycle above 10 mm"]
    assert [each.shortcoming(LIMITS) for each in best] == reasons
    assert a_pair(0.8, 10).shortcoming(LIMITS) == ""


def test_rejected_tries_are_collected_without_changing_the_pairs(store, tmp_path):
    samples = report.preview(store)
    strict = dataclasses.replace(samples, sampler=dataclasses.replace(samples.sampler, threshold=0.999, tries=20))
    tries = []
    found = report.first_pairs(strict, 4, rejected=tries)
    assert [pair.points_zyx_vox.tolist() for pair in found] == [
        strict[number]["meta"]["points_zyx_vox"].tolist() for number in range(4)
    ]
    assert len(tries) >= sum(pair.redraws for pair in found) > 0
    limits = pairs.limits_of(strict.sampler)
    assert all(not each.accepted and each.shortcoming(limits) for each in tries)
    assert report.draw_pairs(store, tries[:2], (32, 32, 32), limits).startswith(b"\x89PNG")


# ---------------------------------------------------------------- planes


@pytest.mark.parametrize("plane", planes.PLANES, ids=lambda plane: plane.name)
@pytest.mark.parametrize("point", [(3, 30, 40), (20, 18, 22), (39, 0, 0)])
def test_the_mark_lies_on_the_voxel(tmp_path, plane, point):
    """Spacing and shape differ along every axis; one voxel is bright."""
    store = Store.create(str(tmp_path / "store"), spacing_zyx_mm=(3.0, 2.0, 1.0))
    scan = dataclasses.replace(make_scan("a", SHAPE), spacing_zyx_mm=(3.0, 2.0, 1.0))
    volume = np.full(SHAPE, -1024, np.int16)
    volume[point] = 1200
    store.write_scan(scan, volume, np.ones([n // 2 for n in SHAPE], bool))
    cut = planes.window(scan, plane, point, field_mm=48)
    picture = planes.read(store, "a", cut)
    row, column = np.argwhere(picture == 1)[0]
    assert (picture == 1).sum() == 1
    across, down = cut.place_mm(point)
    pixel_down, pixel_across = (n / k for n, k in zip(cut.size_mm, picture.shape, strict=True))
    assert (row + 0.5) * pixel_down == pytest.approx(down)
    assert (column + 0.5) * pixel_across == pytest.approx(across)


def test_letters_are_where_the_anatomy_is():
    """A voxel farther Left, Posterior or Superior moves to the edge of that letter."""
    scan = make_scan("a", (32, 32, 32))
    farther = {"S": (8, 0, 0), "P": (0, 8, 0), "L": (0, 0, 8)}
    toward = ((-1, 0), (1, 0), (0, -1), (0, 1))  # left, right, top, bottom as (across, down)
    for plane in planes.PLANES:
        cut = planes.window(scan, plane, (16, 16, 16), field_mm=64)
        middle = np.array(cut.place_mm((16, 16, 16)))
        for letter, direction in zip(plane.edges, toward, strict=True):
            if letter in farther:
                moved = np.array(cut.place_mm(np.add((16, 16, 16), farther[letter]))) - middle
                assert np.sign(moved).tolist() == list(direction), (plane.name, letter)


# ---------------------------------------------------------------- a run


def test_a_run_shows_its_curves_reconstruction_and_setup(store, tmp_path):
    config = config_for(store, steps=2)
    workdir = write_run(tmp_path / "run", config, counts={id: 3 for id in store.ids()})
    provenance.record(workdir, 0, "0123456789abcdef")
    alice = tasks.pretrain.networks(config)
    example = {"volumes": np.zeros((1, 2, *config.views.crop_shape_zyx, 1), np.float32)}
    params, extra = random_weights(jax.eval_shape(alice.init, jax.random.key(0), example))
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(2, train_state.TrainState(np.array(2), params, extra, opt_state={}))
    out = tmp_path / "report.html"
    checks = report.write_report(out, workdir=workdir, seconds=0)
    page = Page(out)
    assert page.headings[:2] == ["At a glance", "Losses"]
    assert {"Teacher", "Speed", "Pairs", "Reconstruction", "Attention", "Embeddings", "Scans", "Setup"} <= set(
        page.headings
    )
    assert "Mean squared error of the hidden voxels" in page.source and "after step 2" in page.source
    assert "&quot;mask_ratio&quot;: 0.75" in page.source
    assert {jax.__version__, "0123456789ab"} <= set(page.cells)  # of when it was trained
    assert {check.name for check in checks if "pairs of 0123456789ab" in check.text} == {"Scans are embedded"}
    assert {check.name for check in checks if check.level == "bad"} == set()

    # The reconstruction is that of the whole objective.
    task = tasks.make(config, store)
    sample = runs.samples_of(runs.read(workdir), task.sampler, task.scans)[0]
    batch = {name: sample[name][None] for name in ("volumes", "hidden")}
    forward = jax.jit(lambda *a: alice.forward(*a, jax.random.key(0), False).reconstruction)
    np.testing.assert_allclose(
        student.look(config, {"params": params, "extra": extra}, sample).reconstruction,
        forward(params, extra, batch)[..., 0],
        atol=1e-5,
    )


def test_a_run_without_its_store_or_checkpoints_is_still_shown(store, tmp_path):
    config = config_for(store)
    workdir = write_run(tmp_path / "early", config)
    report.write_report(tmp_path / "early.html", workdir=workdir, seconds=0)
    assert "no checkpoint yet" in (tmp_path / "early.html").read_text(encoding="utf-8")

    config.unlock().data.store = str(tmp_path / "gone")
    workdir = write_run(tmp_path / "lost", config)
    checks = report.write_report(tmp_path / "lost.html", workdir=workdir)
    assert levels(checks)["The store can be read"] == "look"
    assert "Pairs" not in Page(tmp_path / "lost.html").headings
    report.write_report(tmp_path / "found.html", store=store.path, workdir=workdir, seconds=0)
    assert "Pairs" in Page(tmp_path / "found.html").headings


def test_what_goes_wrong_in_a_run_is_flagged(store, tmp_path):
    lines = [
        line | {"loss": 1.0 + line["step"], "teacher_entropy": 0.0, "views/weak": 0.9, "data_wait_s": 0.95}
        for line in LINES[:2]
    ]
    lines[1]["gradient_norm"] = None
    counts = {id: 4 * (id == "case1") for id in store.ids()}
    run = runs.read(write_run(tmp_path / "run", config_for(store), lines, counts))
    bad = {check.name for check in runs.checks(run) if check.level == "bad"}
    expected = {"The loss falls", "All numbers are finite", "No collapse, global", "Scans are used"}
    assert bad == expected | {"Pairs were matched", "The loader keeps up"}
