"""Points travel between files of any frame: the same body gives the same place in the world."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from builders import add_volume
from nibabel import orientations
from scipy import ndimage
from test_embed import make_embedder
from test_evaluate import perfectly_embedded
from test_matching import make_codec

from alice_jax import embed, match
from alice_jax.data import embeddings, phantom
from alice_jax.data.store import Store
from alice_jax.errors import UserError

PATIENT = phantom.Patient(4)
SPACING = 4.0
# Liver, spleen, heart, left kidney, thigh: canonical millimetres (z, y, x).
PLACES_MM = [[325, 0, -70], [330, 45, 92], [392, -25, 22], [272, 44, 66], [400, 30, -90]]


def turned(image: nib.Nifti1Image, axcodes: str) -> nib.Nifti1Image:
    have, want = (orientations.axcodes2ornt(c) for c in (nib.aff2axcodes(image.affine), axcodes))
    return image.as_reoriented(orientations.ornt_transform(have, want))


def resampled(image: nib.Nifti1Image, affine_ras, shape) -> nib.Nifti1Image:
    matrix = np.linalg.inv(image.affine) @ affine_ras
    array = ndimage.affine_transform(image.get_fdata(), matrix[:3, :3], matrix[:3, 3], shape, order=1, cval=-1024)
    return nib.Nifti1Image(np.rint(array).astype(np.int16), affine_ras)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One patient at 4 mm as it is, flipped and permuted, in uneven voxels, and turned by 20 degrees."""
    folder = tmp_path_factory.mktemp("scans")
    z0, y0, x0 = PATIENT.origin_zyx_mm
    affine = np.array([[-SPACING, 0, 0, -x0], [0, -SPACING, 0, -y0], [0, 0, SPACING, z0], [0, 0, 0, 1]])
    plain = nib.Nifti1Image(PATIENT.volume(SPACING).transpose(2, 1, 0), affine)
    shape = plain.shape
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    centre = nib.affines.apply_affine(affine, (np.array(shape) - 1) / 2)
    oblique = affine.copy()
    oblique[:3, :3] = turn @ affine[:3, :3]
    oblique[:3, 3] = centre - oblique[:3, :3] @ ((np.array(shape) - 1) / 2)
    uneven = affine @ np.diag([0.7, 0.8, 1.2, 1])
    uneven_shape = tuple(int(n / f) for n, f in zip(shape, (0.7, 0.8, 1.2), strict=True))
    images = {
        "plain": plain,
        "flipped": turned(plain, "PIR"),
        "uneven": turned(resampled(plain, uneven, uneven_shape), "RAS"),
        "oblique": resampled(plain, oblique, shape),
    }
    for name, image in images.items():
        nib.save(image, folder / f"{name}.nii.gz")
    return folder


class Surroundings:
    """In place of a trained network: vectors of what lies some way off in each direction, blurred."""

    def __init__(self, embedder, device=None):
        self.strides = embedder.strides_zyx_vox

    def __call__(self, volume_hu):
        blurred = ndimage.gaussian_filter(volume_hu.clip(-1000, 300).astype(np.float32), 2)
        far = 12
        padded = np.pad(blurred, far, mode="edge")
        offsets = [far + r * np.array(d) for r in (5, 12) for d in np.ndindex(3, 3, 3) for d in [np.array(d) - 1]]
        window = [padded[tuple(slice(o, o + n) for o, n in zip(at, volume_hu.shape, strict=True))] for at in offsets]
        vectors = np.stack(window, axis=-1) + 400
        levels = []
        for stride in self.strides:
            at = [
                np.minimum((np.arange(-(-n // s)) + 0.5) * s, n - 1)
                for n, s in zip(volume_hu.shape, stride, strict=True)
            ]
            levels.append(embeddings.normalise(vectors[np.ix_(*(a.astype(int) for a in at))]))
        return levels


@pytest.fixture(scope="module")
def embedder():
    return make_embedder(spacing_mm=SPACING, dims=32)


@pytest.fixture(scope="module", autouse=True)
def surroundings(embedder):
    """`--workdir given` holds an embedder by `Surroundings`."""
    real = embed.restore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "WholeVolume", Surroundings)
        patch.setattr(embed, "restore", lambda workdir: embedder if workdir == "given" else real(workdir))
        yield


@pytest.fixture(scope="module")
def places():
    """RAS millimetres."""
    voxels = PATIENT.from_canonical_mm(PLACES_MM)
    return (PATIENT.origin_zyx_mm + 2.0 * voxels)[:, ::-1] * (-1, -1, 1)


@pytest.fixture(scope="module")
def store(files):
    return match.embedded({path.name.split(".")[0]: path for path in sorted(files.iterdir())}, "given")


@pytest.mark.parametrize(
    "name, within_mm", [("plain", 2), ("flipped", 2), ("uneven", 4), ("oblique", 8)]
)  # cells are 8 mm
@pytest.mark.parametrize("back", [False, True])
def test_the_same_body_gives_the_same_place_in_the_world(store, places, name, within_mm, back):
    query, key = (name, "plain") if back else ("plain", name)
    result = match.transfer(store, query, places, key)
    off_mm = np.linalg.norm(result.found.world_ras_mm - places, axis=1)
    assert np.median(off_mm) <= within_mm, off_mm
    np.testing.assert_allclose(result.asked.world_ras_mm, places, atol=0.01)


@pytest.mark.parametrize("name", ["flipped", "uneven", "oblique"])
def test_voxels_are_those_of_the_file(files, store, places, name):
    affine = nib.load(files / f"{name}.nii.gz").affine
    result = match.transfer(store, "plain", places, name)
    np.testing.assert_allclose(nib.affines.apply_affine(affine, result.found.voxel_ijk), result.found.world_ras_mm)
    ijk = nib.affines.apply_affine(np.linalg.inv(affine), places)
    from_voxels = match.transfer(store, name, ijk, "plain", voxel=True)
    np.testing.assert_allclose(from_voxels.asked.world_ras_mm, places, atol=0.01)


def test_another_patient(tmp_path):
    """Vectors that are a function of the true place find it, in the world of the other patient."""
    store = perfectly_embedded(tmp_path / "store", [1, 2])
    a, b = (store.scan(id) for id in store.ids())
    points, truth = phantom.shared_points(*(phantom.patient_of(s) for s in (a, b)), 40, np.random.default_rng(0))
    world_ras = store.to_world(a.id, points) * (-1, -1, 1)
    result = match.transfer(store, a.id, world_ras, b.id)
    want_ras = store.to_world(b.id, truth) * (-1, -1, 1)
    assert np.median(np.linalg.norm(result.found.world_ras_mm - want_ras, axis=1)) < 6
    np.testing.assert_allclose(result.asked.world_ras_mm, world_ras)
    assert result.match.trusted.tolist() == [
        score >= 0.7 and cycle_mm <= 10 and agreeing >= 0.2
        for score, cycle_mm, agreeing in zip(*result.match[1:], strict=True)
    ]
    assert match.draw(store, result).startswith(b"\x89PNG")


# ---------------------------------------------------------------- the command


def run(*args) -> int:
    return match.main([str(a) for a in args])


def test_command_prints_and_draws(files, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x, y, z = places[0]
    pair = ["--from", files / "plain.nii.gz", "--to", files / "flipped.nii.gz", "--workdir", "given"]
    assert run(*pair, "--point", x, y, z, "--results", "found.json") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "points are read as world millimetres (RAS)"
    assert printed[1].startswith(f"from  ({x:.1f}, {y:.1f}, {z:.1f}) mm RAS = voxel (")
    assert printed[1].endswith("of plain.nii.gz") and printed[2].endswith("of flipped.nii.gz")
    assert printed[3].startswith("score ") and "cycle error" in printed[3]
    assert printed[4] == "picture: match_plain_to_flipped.png"
    assert (tmp_path / "match_plain_to_flipped.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["frame"] == "RAS" and set(found["points"][0]) == {
        "name", "x", "y", "z", "i", "j", "k", "from_x", "from_y", "from_z", "from_i", "from_j", "from_k", "score",
        "cycle_mm", "agreeing", "trusted",
    }  # fmt: skip
    np.testing.assert_allclose([found["points"][0][axis] for axis in "xyz"], places[0], atol=SPACING)


def test_tables_in_and_out_and_lps(files, places, tmp_path, capsys):
    lps = places * (-1, -1, 1)
    rows = "\n".join(f"place{n},{x},{y},{z}" for n, (x, y, z) in enumerate(lps))
    (tmp_path / "points.csv").write_text(f"name,x,y,z\n{rows}\n")
    pair = ["--from", files / "plain.nii.gz", "--to", files / "flipped.nii.gz", "--workdir", "given", "--lps"]
    out = ["--out", tmp_path / "a.png", "--results", tmp_path / "found.csv"]
    assert run(*pair, "--points", tmp_path / "points.csv", *out) == 0
    assert "points are read as world millimetres (LPS)" in capsys.readouterr().out
    with open(tmp_path / "found.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == [f"place{n}" for n in range(len(places))]
    off = [[float(row[axis]) for axis in "xyz"] for row in table] - lps
    assert np.median(np.linalg.norm(off, axis=1)) < SPACING
    # What was found is a file of points again.
    back = ["--from", files / "flipped.nii.gz", "--to", files / "plain.nii.gz", "--workdir", "given", "--lps"]
    assert run(*back, "--points", tmp_path / "found.csv", *out) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ["--point", "900", "0", "0"],
            r"point 1 \(mm RAS 900, 0, 0\) lies outside .*plain.nii.gz, which has .* voxels and",
        ),
        (["--point", "0", "0", "0", "--voxel"], r"point 1 \(voxel 0, 0, 0\) lies outside the body \(-\d+ HU there\)"),
        (["--point", "nan", "0", "0"], "--point nan 0 0: give finite numbers"),
        (["--workdir", "/nowhere"], "--workdir /nowhere: holds no run"),
        (["--to", "/nowhere/b.nii.gz"], "--to /nowhere/b.nii.gz: there is no such file"),
        (["--to", __file__], "test_match.py: unreadable: not a known format"),
        (["--voxel", "--lps"], "give one of them; voxels have no world frame"),
        (["--points", "p.csv"], "--point, --points: give one of them"),
        (["--out", "a.jpg"], "--out a.jpg: name a file that ends in .png"),
        (["--results", "/nowhere/a.csv"], "--results /nowhere/a.csv: its folder does not exist"),
    ],
)
def test_mistakes_are_one_line(files, places, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    arguments = {"--from": [files / "plain.nii.gz"], "--to": [files / "plain.nii.gz"], "--workdir": ["given"]}
    arguments |= {"--point": places[0]} | {change[0]: change[1:4]}
    flat = [word for flag, values in arguments.items() for word in (flag, *values)] + change[4:]
    with pytest.raises(UserError, match=message) as caught:
        run(*flat)
    assert "\n" not in str(caught.value)


def test_stores_that_do_not_fit(tmp_path, places):
    store = Store.create(tmp_path / "store", (2.0, 2.0, 2.0))
    for id in ("case_a", "case_b"):
        add_volume(store, id, np.zeros((20, 30, 40)))
    pair = ["--store", store.path, "--point", 20, 20, 10, "--voxel", "--out", tmp_path / "a.png"]
    with pytest.raises(UserError, match=r"has no embeddings?; run python -m alice_jax\.embed"):
        run(*pair, "--from", "case_a", "--to", "case_b")
    with pytest.raises(UserError, match=r"scan casea: not in the store .* did you mean case_"):
        run(*pair, "--from", "casea", "--to", "case_b")


def test_the_embedder_must_be_the_stores(tmp_path):
    store = Store.create(tmp_path / "store", (2.0, 2.0, 2.0))
    make_codec().save(store)
    scans = ["--from", "a", "--to", "b", "--point", 0, 0, 0]
    with pytest.raises(UserError, match=r"--workdir given: its embedder is .* the store was embedded by aaaa"):
        run("--store", store.path, "--workdir", "given", *scans)
