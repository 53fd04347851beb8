"""Label maps beside the volumes: layouts in which data sets are distributed, resampling, and labels that do not fit."""

import json
import re

import numpy as np
import pytest
from prepare_command import reasons, report_of
from test_readers import AFFINE, ct_like, write_nifti

from alice_jax.data import geometry, label_maps
from alice_jax.data.store import Store
from alice_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("in_this_process")

SHAPE = (36, 32, 24)
BONE, FAT = 1, 2


def labels_of(hu: np.ndarray) -> np.ndarray:
    """The bone of `ct_like` and the fat around it as labels."""
    return np.select([hu > 400, (hu > -200) & (hu < -40)], [BONE, FAT], 0).astype(np.uint8)


def write_case(image, label, seed=0, affine=AFFINE):
    hu = ct_like(SHAPE, seed)
    write_nifti(image, hu, affine)
    if label is not None:
        write_nifti(label, labels_of(hu), affine)


def checked(tmp_path, id):
    """The stored labels of a scan, after a look that they lie on its bone and fat."""
    store = Store.open(tmp_path / "store")
    labels, volume = store.read_array(id, "labels"), store.read_volume(id)
    assert labels.shape == store.scan(id).shape_zyx and labels.dtype == np.uint8
    bone = [code for code in np.unique(labels) if code and volume[labels == code].mean() > 300]
    assert len(bone) == 1 and (volume > 500)[labels == bone[0]].mean() > 0.5
    counts = {str(code): int((labels == code).sum()) for code in np.unique(labels) if code}
    assert store.scan(id).extra["labels"]["voxels"] == counts
    return labels


# ---------------------------------------------------------------- dataset.json


DATASETS = {
    "Decathlon": {
        "labels": {"0": "background", "1": "bone", "2": "fat"},
        "training": [{"image": "./imagesTr/a_1.nii.gz", "label": "./labelsTr/a_1.nii.gz"}],
        "numTraining": 1,
    },
    "nnU-Net 1": {
        "labels": {"0": "background", "1": "bone", "2": "fat"},
        "training": [{"image": "./imagesTr/a_1.nii.gz", "label": "./labelsTr/a_1.nii.gz"}],
        "numTraining": 1,
    },
    "nnU-Net 2": {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "bone": 1, "fat": 2},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    },
    "nnU-Net 2 with a list": {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "bone": 1, "fat": 2},
        "numTraining": 1,
        "dataset": {"a_1": {"images": ["imagesTr/a_1_0000.nii.gz"], "label": "labelsTr/a_1.nii.gz"}},
    },
}


@pytest.mark.parametrize("kind", DATASETS)
def test_data_sets_with_dataset_json(tmp_path, kind):
    data = tmp_path / "data"
    suffix = "" if kind == "Decathlon" else "_0000"
    write_case(data / f"imagesTr/a_1{suffix}.nii.gz", data / "labelsTr/a_1.nii.gz")
    write_case(data / f"imagesTs/a_2{suffix}.nii.gz", None, seed=1)
    (data / "dataset.json").write_text(json.dumps(DATASETS[kind]))
    code, report = report_of(tmp_path, data, "--labels")
    store = Store.open(tmp_path / "store")
    assert code == 0 and not report["quarantined"] and store.ids() == ["a_1", "a_2"]
    assert label_maps.names_in(store) == {1: "bone", 2: "fat"}
    assert set(np.unique(checked(tmp_path, "a_1"))) == {0, BONE, FAT}
    assert not store.has_array("a_2", "labels")
    assert label_maps.from_store(store, "a_1").names == ("bone", "fat")


def test_labels_come_and_change_without_the_scan_being_prepared_anew(tmp_path):
    data = tmp_path / "data"
    write_case(data / "imagesTr/a_0000.nii.gz", data / "labelsTr/a.nii.gz")
    (data / "dataset.json").write_text(json.dumps(DATASETS["nnU-Net 2"]))
    report_of(tmp_path, data)
    store = Store.open(tmp_path / "store")
    assert not store.has_array("a", "labels")  # without the flag they are left alone
    store.write_array("a", "fine", np.ones(3, np.int8))  # of an embedding, say
    report_of(tmp_path, data, "--labels")
    before = checked(tmp_path, "a")
    swapped = np.select([before == BONE, before == FAT], [FAT, BONE], 0)
    write_nifti(data / "labelsTr/a.nii.gz", np.array([0, FAT, BONE], np.uint8)[labels_of(ct_like(SHAPE))])
    report_of(tmp_path, data, "--labels")
    np.testing.assert_array_equal(Store.open(tmp_path / "store").read_array("a", "labels"), swapped)
    report_of(tmp_path, data)  # and stay without the flag
    assert Store.open(tmp_path / "store").has_array("a", "labels") and store.has_array("a", "fine")


def shifted(hu, by=3.0):
    affine = AFFINE.copy()
    affine[0, 3] += by
    return labels_of(hu), affine


BAD_LABELS = {
    "shape": (lambda hu: (labels_of(hu)[:-1], AFFINE), r"a.nii.gz has shape \(35, 32, 24\), the image \(36, 32, 24\)"),
    "affine": (shifted, "lies elsewhere: its affine puts a corner 2.0 voxels off"),
    "flipped": (lambda hu: (labels_of(hu), np.diag([-1, 1, 1, 1]) @ AFFINE), "lies elsewhere"),
    "unknown value": (lambda hu: (labels_of(hu) * 7, AFFINE), "holds 7, which has no name"),
    "fractions": (lambda hu: (labels_of(hu) * np.float32(0.5), AFFINE), "no label map of whole numbers"),
    "negative": (lambda hu: (-labels_of(hu).astype(np.int16), AFFINE), "no label map of whole numbers"),
    "missing": (None, "No such file"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_that_do_not_fit_cost_the_scan_and_no_other(tmp_path, kind):
    make, said = BAD_LABELS[kind]
    data = tmp_path / "data"
    write_case(data / "imagesTr/a_0000.nii.gz", None)
    write_case(data / "imagesTr/b_0000.nii.gz", data / "labelsTr/b.nii.gz", seed=1)
    if make:
        write_nifti(data / "labelsTr/a.nii.gz", *make(ct_like(SHAPE)))
    (data / "dataset.json").write_text(json.dumps(DATASETS["nnU-Net 2"]))
    code, report = report_of(tmp_path, data, "--labels")
    assert code == 0 and reasons(report) == {"a_0000.nii.gz": "labels"}
    (quarantined,) = report["quarantined"]
    assert re.search(said, quarantined["reason"]), quarantined
    assert Store.open(tmp_path / "store").ids() == ["b"]


def test_an_affine_that_differs_by_rounding_fits(tmp_path):
    data = tmp_path / "data"
    write_case(data / "imagesTr/a_0000.nii.gz", None)
    write_nifti(data / "labelsTr/a.nii.gz", *shifted(ct_like(SHAPE), by=0.01))
    (data / "dataset.json").write_text(json.dumps(DATASETS["nnU-Net 2"]))
    assert report_of(tmp_path, data, "--labels")[1]["quarantined"] == []


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"background": 0, "whole": [1, 2], "core": [2]}, "whole is a region"),
        ({"background": 0, "bone": 1, "ignore": 2}, "ignore is not supported"),
        ({"background": 0}, "names no label"),
        (None, "names of labels must be"),
        ({"bone": "one"}, "names of labels must be"),
        ({"1": "bone", "2": "fat", "3": "bone"}, "label 1 is 'bone' and 3 is 'bone'; give each its own name"),
        ({"background": 0, "bone": 1, "fat": 1}, "label 1 is 'bone' and 1 is 'fat'; give each its own name"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, labels, said):
    data = tmp_path / "data"
    write_case(data / "imagesTr/a_0000.nii.gz", data / "labelsTr/a.nii.gz")
    (data / "dataset.json").write_text(json.dumps(DATASETS["nnU-Net 2"] | {"labels": labels}))
    with pytest.raises(UserError, match=f"dataset.json: .*{said}"):
        report_of(tmp_path, data, "--labels")


def test_a_store_keeps_to_one_table(tmp_path):
    for name, labels in (("one", {"bone": 1, "fat": 2}), ("two", {"fat": 1, "bone": 2})):
        write_case(tmp_path / name / "imagesTr/a_0000.nii.gz", tmp_path / name / "labelsTr/a.nii.gz")
        (tmp_path / name / "dataset.json").write_text(json.dumps(DATASETS["nnU-Net 2"] | {"labels": labels}))
    report_of(tmp_path, tmp_path / "one", "--labels")
    with pytest.raises(UserError, match=r"its labels are bone, fat, and those of .*two fat, bone"):
        report_of(tmp_path, tmp_path / "two", "--labels")
    with pytest.raises(UserError, match=r"no dataset\.json"):
        report_of(tmp_path, tmp_path / "one" / "imagesTr", "--labels")


# ---------------------------------------------------------------- presets


def flare22(root):
    write_case(root / "images/FLARE22_Tr_0001_0000.nii.gz", root / "labels/FLARE22_Tr_0001.nii.gz")
    write_case(root / "images/FLARE22_Tr_0002_0000.nii.gz", root / "labels/FLARE22_Tr_0002.nii.gz", seed=1)
    return ["FLARE22_Tr_0001", "FLARE22_Tr_0002"], [], 13, {1: "liver", 2: "right kidney", 13: "left kidney"}


def btcv(root):
    write_case(root / "RawData/Training/img/img0001.nii.gz", root / "RawData/Training/label/label0001.nii.gz")
    write_case(root / "RawData/Testing/img/img0061.nii.gz", None, seed=1)
    return ["img0001"], ["img0061"], 13, {1: "spleen", 6: "liver", 13: "left adrenal gland"}


def amos(root):
    write_case(root / "imagesTr/amos_0001.nii.gz", root / "labelsTr/amos_0001.nii.gz")
    write_case(root / "imagesVa/amos_0008.nii.gz", root / "labelsVa/amos_0008.nii.gz", seed=1)
    write_case(root / "imagesTs/amos_0002.nii.gz", None, seed=2)
    write_case(root / "imagesTr/amos_0507.nii.gz", root / "labelsTr/amos_0507.nii.gz", seed=3)  # MR: left out
    (root / "dataset.json").write_text("{}")
    return ["amos_0001", "amos_0008"], ["amos_0002"], 15, {1: "spleen", 6: "liver", 15: "prostate or uterus"}


def msd(root):
    write_case(root / "imagesTr/spleen_2.nii.gz", root / "labelsTr/spleen_2.nii.gz")
    (root / "imagesTr/._spleen_2.nii.gz").write_bytes(b"Mac OS X")
    (root / "labelsTr/._spleen_2.nii.gz").write_bytes(b"Mac OS X")
    write_case(root / "imagesTs/spleen_1.nii.gz", None, seed=1)
    about = {
        "name": "Spleen",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen", "2": "rest"},
        "numTraining": 1,
        "training": [{"image": "./imagesTr/spleen_2.nii.gz", "label": "./labelsTr/spleen_2.nii.gz"}],
        "test": ["./imagesTs/spleen_1.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(about))
    return ["spleen_2"], ["spleen_1"], 2, {1: "spleen"}


def totalsegmentator(root):
    for seed, subject in enumerate(("s0000", "s0011")):
        hu = ct_like(SHAPE, seed)
        write_nifti(root / subject / "ct.nii.gz", hu)
        labels = labels_of(hu)
        for organ, code in (("rib_left_1", BONE), ("autochthon_left", FAT), ("aorta", 9)):
            write_nifti(root / subject / f"segmentations/{organ}.nii.gz", (labels == code).astype(np.uint8))
    (root / "meta.csv").write_text("image_id;age;gender\ns0000;60;m\n")
    return ["s0000", "s0011"], [], 3, {1: "aorta", 2: "autochthon_left", 3: "rib_left_1"}


LAYOUTS = {"flare22": flare22, "btcv": btcv, "amos": amos, "msd": msd, "totalsegmentator": totalsegmentator}


@pytest.mark.parametrize("preset", LAYOUTS)
def test_presets(tmp_path, preset):
    labelled, unlabelled, count, some = LAYOUTS[preset](tmp_path / "data")
    code, report = report_of(tmp_path, tmp_path / "data", "--preset", preset)
    store = Store.open(tmp_path / "store")
    assert code == 0 and not report["quarantined"] and store.ids() == sorted(labelled + unlabelled)
    names = label_maps.names_in(store)
    assert len(names) == count and some.items() <= names.items()
    for id in labelled:
        assert len(np.unique(checked(tmp_path, id))) == 3
        assert store.scan(id).patient == id
    assert not any(store.has_array(id, "labels") for id in unlabelled)
    report = report_of(tmp_path, tmp_path / "data", "--preset", preset)[1]
    assert len(report["prepared"]) == len(labelled + unlabelled)


@pytest.mark.parametrize("preset", ["flare22", "totalsegmentator"])
def test_a_folder_of_another_layout_is_named(tmp_path, preset):
    write_case(tmp_path / "data/x/scan.nii.gz", None)
    with pytest.raises(UserError, match=f"no scan with labels there; --preset {preset} looks for"):
        report_of(tmp_path, tmp_path / "data", "--preset", preset)
    with pytest.raises(UserError, match="needs the data set's folder"):
        report_of(tmp_path, tmp_path / "nowhere", "--preset", preset)


# ---------------------------------------------------------------- resampling


def balls(shape, spacing):
    """Labels 1 and 3, two half balls of radius 20 mm that touch, around the middle of a box."""
    z, y, x = (spacing * (np.arange(n) - (n - 1) / 2) for n in shape)
    inside = z[:, None, None] ** 2 + y[:, None] ** 2 + x**2 < 20**2
    return np.where(inside, np.where(x < 0, 1, 3), 0).astype(np.uint8)


def grid_of(shape, spacing, turned=0.0):
    """A grid around the world's origin."""
    affine = np.diag([spacing] * 3 + [1.0])
    cos, sin = np.cos(turned), np.sin(turned)
    affine[:3, :3] = affine[:3, :3] @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return geometry.Grid(shape, affine)


@pytest.mark.parametrize(("spacing", "shape"), [(2.0, (30, 30, 30)), (1.0, (60, 60, 60)), (3.0, (20, 20, 20))])
def test_two_classes_that_touch_never_make_a_third(spacing, shape):
    fine = grid_of((60, 60, 60), 1.0)
    got = geometry.resample_labels(balls((60, 60, 60), 1.0), fine.affine_lps, grid_of(shape, spacing))
    want = balls(shape, spacing)
    assert set(np.unique(got)) == {0, 1, 3}
    for code in (1, 3):
        overlap = 2 * np.sum((got == code) & (want == code)) / (np.sum(got == code) + np.sum(want == code))
        assert overlap > 0.97, (code, overlap)
    if spacing == 1.0:
        np.testing.assert_array_equal(got, want)


def test_oblique_labels_end_where_the_file_does():
    box = grid_of((40, 40, 40), 1.0, turned=0.4)
    got = geometry.resample_labels(np.full((40, 40, 40), 5, np.uint8), box.affine_lps, grid_of((30, 30, 30), 2.0))
    assert set(np.unique(got)) == {0, 5} and got[15, 15, 15] == 5 and not got[:, 0].any()
    assert got.sum() / 5 * 8 == pytest.approx(40**3, rel=0.05)
