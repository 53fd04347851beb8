"""Marked points and organ labels end in the right voxel of the store, however their files are oriented."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
from builders import add_volume, make_scan
from hypothesis import given
from hypothesis import strategies as st
from nibabel import orientations
from scipy.spatial.transform import Rotation

from alice_jax import prepare
from alice_jax.data import geometry, label_maps, landmarks, phantom, point_files
from alice_jax.data.label_maps import LabelMap
from alice_jax.data.point_files import Points
from alice_jax.data.store import Store
from alice_jax.errors import UserError

PATIENT = phantom.Patient(4)
# Liver, spleen, left kidney: canonical millimetres (z, y, x); no symmetry maps them onto each other.
PLACES_MM = {"liver": [325, 0, -70], "spleen": [330, 45, 92], "kidney": [272, 44, 66]}
FILES = {
    "nifti": ("RAS", (5.0, 2.6, 2.6)),
    "sagittal": ("PSR", (2.4, 3.2, 4.0)),
}


def image_of(array_zyx: np.ndarray, spacing_zyx_mm, axcodes: str) -> nib.Nifti1Image:
    """An array of PATIENT as a file of that orientation."""
    sz, sy, sx = spacing_zyx_mm
    z0, y0, x0 = PATIENT.origin_zyx_mm
    affine_ras = np.array([[-sx, 0, 0, -x0], [0, -sy, 0, -y0], [0, 0, sz, z0], [0, 0, 0, 1]])
    image = nib.Nifti1Image(array_zyx.transpose(2, 1, 0), affine_ras)
    change = orientations.ornt_transform(orientations.axcodes2ornt("LPS"), orientations.axcodes2ornt(axcodes))
    return image.as_reoriented(change)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of one patient, each with landmarks.json and labels.nii.gz in frames of its own, prepared."""
    folder = tmp_path_factory.mktemp("truth")
    voxels = PATIENT.from_canonical_mm(list(PLACES_MM.values()))
    world_lps = (PATIENT.origin_zyx_mm + 2.0 * voxels)[:, ::-1]
    world_ras = world_lps * (-1, -1, 1)
    for name, (axcodes, spacing) in FILES.items():
        (folder / name).mkdir()
        image = image_of(PATIENT.volume(spacing), spacing, axcodes)
        nib.save(image, folder / name / "ct.nii.gz")
        ijk = nib.affines.apply_affine(np.linalg.inv(image.affine), world_ras)
        marks = {
            "world_ras_mm": dict(zip(PLACES_MM, world_ras.round(1).tolist(), strict=True)),
            "voxel_ijk": dict(zip(PLACES_MM, ijk.round().astype(int).tolist(), strict=True)),
        }
        (folder / name / "landmarks.json").write_text(json.dumps(marks))
        # Labels on another grid and orientation than their scan's.
        nib.save(image_of(PATIENT.labels((4, 3, 3)), (4, 3, 3), "PIR"), folder / name / "labels.nii.gz")
        (folder / name / "meta.json").write_text(json.dumps({"labels": {str(c): n for c, n in phantom.LABELS.items()}}))
    arguments = ["--input", str(folder), "--store", str(folder / "store"), "--workers", "1"]
    assert prepare.main(arguments) == 0
    store = Store.open(folder / "store")
    assert store.ids() == sorted(FILES)
    return folder


@pytest.fixture(scope="module")
def store(folder):
    return Store.open(folder / "store")


# ---------------------------------------------------------------- landmarks


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("given", ["both", "world_ras_mm", "voxel_ijk"])
def test_landmarks_land_in_their_organ_in_every_orientation(folder, store, tmp_path, name, given):
    raw = json.loads((folder / name / "landmarks.json").read_text())
    path = tmp_path / "landmarks.json"
    path.write_text(json.dumps(raw if given == "both" else {given: raw[given]}))
    scan = store.scan(name)
    placed = point_files.place(point_files.read(path), scan, "x")
    truth = PATIENT.from_canonical_mm(list(PLACES_MM.values()))
    shift = np.array(scan.origin_xyz_lps_mm)[::-1] - PATIENT.origin_zyx_mm
    error_mm = np.abs(2 * (placed - truth) + shift)
    allowed = 0.06 if given != "voxel_ijk" else np.array(FILES[name][1]) / 2 + 0.01  # rounded to voxels
    assert (error_mm <= allowed).all()


@given(
    rotation=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    spacing=st.lists(st.floats(0.5, 5), min_size=3, max_size=3),
    at=st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_millimetres_and_voxels_of_any_file_name_the_same_place(rotation, spacing, at):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec(rotation).as_matrix() * spacing
    affine[:3, 3] = 30, -20, 10
    shape_ijk = np.array([20, 30, 40])
    view, affine_lps = geometry.reorient(np.zeros(shape_ijk, np.int16), affine)
    grid = geometry.stored_grid(view.shape, affine_lps, 2.0)
    scan = dataclasses.replace(
        make_scan("a", grid.shape_zyx),
        origin_xyz_lps_mm=tuple(grid.affine_lps[:3, 3]),
        direction=tuple(map(tuple, grid.affine_lps[:3, :3] / 2.0)),
        original={"affine_ras": affine.tolist(), "shape_ijk": shape_ijk.tolist()},
    )
    ijk = np.array([at]) * (shape_ijk - 1)
    world = nib.affines.apply_affine(affine, ijk)
    by_voxel = point_files.place(Points(["tip"], None, ijk), scan, "x")
    np.testing.assert_allclose(point_files.place(Points(["tip"], world, ijk), scan, "x"), by_voxel, atol=1e-6)
    back = point_files.describe(by_voxel, scan)
    # Thick voxels reach beyond the centres of the stored ones by less than a stored voxel.
    np.testing.assert_allclose(back.world_ras_mm, world, atol=2.0)


def test_places_that_disagree_are_refused():
    scan = make_scan("a", (20, 30, 40))  # LPS file at 2 mm whose voxel 0 is the world's origin
    good = Points(["tip"], np.array([[-20.0, -20.0, 20.0]]), np.array([[10.0, 11.0, 10.0]]))
    np.testing.assert_allclose(point_files.place(good, scan, "x"), [[10, 10, 10]])
    with pytest.raises(UserError, match=r"world_ras_mm and voxel_ijk of tip lie 2\.0 voxels apart"):
        point_files.place(good._replace(voxel_ijk=np.array([[10.0, 12.0, 10.0]])), scan, "x")


def test_a_point_outside_names_the_extent():
    scan = make_scan("a", (20, 30, 40))
    with pytest.raises(
        UserError, match=r"point tip \(voxel 45, 0, 0\) lies outside a.*40 × 30 × 20 voxels and spans x -79 to 1"
    ):
        point_files.place(Points(["tip"], None, np.array([[45.0, 0, 0]])), scan, "--point")


@pytest.mark.parametrize(
    "name, text, voxel, want",
    [
        ("a.csv", "name,x,y,z\ntip,1,2,3.5\n", None, (["tip"], [[1, 2, 3.5]], None)),
        ("a.csv", "k,j,i,name\n3,2,1,tip\n\n", None, (["tip"], None, [[1, 2, 3]])),
        ("a.csv", "1,2,3\n4,5,6\n", None, (["1", "2"], [[1, 2, 3], [4, 5, 6]], None)),
        ("a.csv", "1,2,3\n", True, (["1"], None, [[1, 2, 3]])),
        ("a.json", '{"tip": [1, 2, 3]}', None, (["tip"], [[1, 2, 3]], None)),
        ("a.json", "[[1, 2, 3]]", True, (["1"], None, [[1, 2, 3]])),
    ],
)
def test_files_of_points(tmp_path, name, text, voxel, want):
    (tmp_path / name).write_text(text)
    points = point_files.read(tmp_path / name, voxel)
    assert points.names == want[0]
    for have, expected in zip(points[1:], want[1:], strict=True):
        assert have is None if expected is None else have.tolist() == expected


@pytest.mark.parametrize(
    "name, text, voxel, message",
    [
        ("a.csv", "name,x,y\ntip,1,2\n", None, "name its columns x,y,z"),
        ("a.csv", "x,y,z\n1,2\n", None, "line 2 has too few columns"),
        ("a.csv", "x,y,z\n1,2,far\n", None, "is no point; give three numbers"),
        ("a.csv", "", None, "holds no points"),
        ("a.csv", "x,y,z\n1,2,3\n", True, "its points are in millimetres"),
        ("a.json", "{", None, "is no JSON"),
        ("a.json", '{"tip": [1, 2]}', None, "is no point"),
        ("a.json", '{"world_ras_mm": {"a": [1, 2, 3]}, "voxel_ijk": {"b": [1, 2, 3]}}', None, "a has no place in one"),
    ],
)
def test_files_that_are_no_points(tmp_path, name, text, voxel, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        point_files.read(tmp_path / name, voxel)


# ---------------------------------------------------------------- organ labels


@pytest.mark.parametrize("name", FILES)
def test_label_files_of_another_frame_agree_with_the_scan(folder, store, name):
    scan = store.scan(name)
    names = label_maps.names_of(folder / name / "meta.json")
    labels = label_maps.from_file(folder / name / "labels.nii.gz", scan, names)
    rng = np.random.default_rng(0)
    points = rng.uniform(2, np.array(scan.shape_zyx) - 3, size=(3000, 3))
    shift = np.array(scan.origin_xyz_lps_mm)[::-1] - PATIENT.origin_zyx_mm
    in_patient = np.rint(points + shift / 2.0).astype(int)
    truth = np.array([phantom.LABELS[code] for code in PATIENT.labels()[tuple(in_patient.T)]])
    truth[truth == "background"] = ""
    assert np.mean(labels.at(points) == truth) > 0.85  # thin structures and edges differ at 3 mm
    organs = np.isin(truth, ["liver", "lung_left", "lung_right", "spleen", "heart"])
    assert np.mean(labels.at(points)[organs] == truth[organs]) > 0.95


def test_centroids_of_organs():
    array = np.zeros((8, 9, 10), np.uint8)
    array[2:5, 3:6, 4:5] = 3
    array[0:2, 1, 1] = 7  # reaches the edge
    labels = LabelMap.of(array, {3: "spleen"})
    assert labels.names == ("spleen", "label 7") and labels.cut_off == ("label 7",)
    assert {name: centre.tolist() for name, centre in labels.centres.items()} == {"spleen": [3, 4, 4]}
    assert labels.at(np.array([[2, 3, 4], [2, 3, 5.2], [1.4, 1, 1], [99, 0, 0], [-5, 0, 0]])).tolist() == [
        "spleen", "", "label 7", "", "",
    ]  # fmt: skip
    assert labels.voxels("label 7").tolist() == [[0, 1, 1], [1, 1, 1]]


def test_what_is_no_label_map_is_refused(tmp_path):
    scan = make_scan("a", (20, 30, 40))
    affine = np.array(scan.original["affine_ras"])
    far = affine.copy()
    far[:3, 3] = 500
    cases = {
        "fractions": (np.full((40, 30, 20), 0.5, np.float32), affine, "is no label map"),
        "elsewhere": (np.ones((4, 4, 4), np.uint8), far, "labels nothing inside scan a"),
        "empty": (np.zeros((40, 30, 20), np.uint8), affine, "labels nothing inside scan a"),
    }
    for name, (array, affine_ras, message) in cases.items():
        nib.save(nib.Nifti1Image(array, affine_ras), tmp_path / f"{name}.nii.gz")
        with pytest.raises(UserError, match=message):
            label_maps.from_file(tmp_path / f"{name}.nii.gz", scan, {})
    with pytest.raises(UserError, match="missing: there is no such file"):
        label_maps.from_file(tmp_path / "none.nii.gz", scan, {})
    with pytest.raises(UserError, match="names of labels must be"):
        label_maps.read_names({"spleen": "one"}, "x")


# ---------------------------------------------------------------- questions


def test_truth_of_a_folder(folder, store):
    truth = landmarks.read_truth(store, store.ids(), str(folder), count=40)
    assert set(truth) == {"landmarks", "organs"}
    marks = truth["landmarks"].ask("nifti", "sagittal")
    assert marks.names.tolist() == list(PLACES_MM) and (marks.organs == "").all()
    assert truth["organs"].organ_at("nifti", marks.points_zyx_vox).tolist() == ["liver", "spleen", "kidney_left"]
    organs = truth["organs"].ask("nifti", "sagittal")
    centre = np.isfinite(organs.truth_zyx_vox[:, 0])
    assert centre.any() and (organs.organs[centre] == "").all()
    np.testing.assert_array_equal(
        truth["organs"].organ_at("nifti", organs.points_zyx_vox)[~centre], organs.organs[~centre]
    )
    again = truth["organs"].ask("nifti", "sagittal")
    np.testing.assert_array_equal(organs.points_zyx_vox, again.points_zyx_vox)


def test_only_some_names(folder, store):
    truth = landmarks.read_truth(store, store.ids(), str(folder), only=["liver"], count=40)
    assert truth["landmarks"].ask("nifti", "sagittal").names.tolist() == ["liver"]
    assert set(truth["organs"].ask("nifti", "sagittal").names) == {"liver"}


def test_nothing_known_is_said(tmp_path):
    store = Store.create(tmp_path / "store", (2.0, 2.0, 2.0))
    for id in "ab":
        add_volume(store, id, np.zeros((20, 30, 40)))
    with pytest.raises(UserError, match="no phantoms and have no array `labels`"):
        landmarks.read_truth(store, store.ids())
    with pytest.raises(UserError, match=r"no <scan id>/landmarks\.json"):
        landmarks.read_truth(store, store.ids(), str(tmp_path))
    with pytest.raises(UserError, match="there is no such folder"):
        landmarks.read_truth(store, store.ids(), str(tmp_path / "none"))


def test_near_names_are_offered(store):
    with pytest.raises(UserError, match="did you mean sagittal"):
        store.scan("sagital")
