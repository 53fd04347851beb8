"""Four files of one phantom patient, differently oriented and spaced: one place in the store, and back to each file.

Bright beads are put at anatomical points of the files' own voxels, and found again in the stored volumes by their
brightness alone, so that nothing here relies on the arithmetic that is tested.
"""

import nibabel
import numpy as np
import pytest
from nibabel import orientations
from scipy import ndimage

from alice_jax import prepare
from alice_jax.data import phantom
from alice_jax.data.store import Store

PATIENT = phantom.Patient(4)
# Liver, spleen, heart, right kidney, bowel, bladder: canonical millimetres; no symmetry maps them onto each other.
BEADS_MM = np.array(
    [[325, 0, -70], [330, 45, 92], [392, -25, 22], [272, 44, -66], [182, -26, 0], [78, -32, 0]], np.float64
)
# Orientation (where the file's axes i, j, k grow to) and spacing of z, y, x in mm.
FILES = {
    "plain": ("LPS", (2.0, 2.0, 2.0)),
    "nifti": ("RAS", (3.0, 1.6, 1.6)),
    "sagittal": ("PSR", (1.7, 2.4, 3.0)),
    "coronal": ("ILA", (2.5, 2.9, 2.2)),
}


def write_file(path, axcodes: str, spacing_zyx_mm) -> np.ndarray:
    """Writes the patient with beads; returns the beads' places in the file, (n, 3) float voxel indices (i, j, k)."""
    volume = PATIENT.volume(spacing_zyx_mm).astype(np.float32)
    beads_zyx_vox = PATIENT.from_canonical_mm(BEADS_MM) * phantom.SPACING_MM / spacing_zyx_mm
    for bead in beads_zyx_vox:
        z, y, x = ((s * (np.arange(n) - b)) ** 2 for n, b, s in zip(volume.shape, bead, spacing_zyx_mm, strict=True))
        volume += 2500 * np.exp(-(z[:, None, None] + y[:, None] + x) / (2 * 3.5**2))
    sz, sy, sx = spacing_zyx_mm
    z0, y0, x0 = PATIENT.origin_zyx_mm
    affine_ras = np.array([[-sx, 0, 0, -x0], [0, -sy, 0, -y0], [0, 0, sz, z0], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(np.clip(np.rint(volume), -1024, 3071).astype(np.int16).transpose(2, 1, 0), affine_ras)
    change = orientations.ornt_transform(orientations.axcodes2ornt("LPS"), orientations.axcodes2ornt(axcodes))
    turned = image.as_reoriented(change)
    assert "".join(nibabel.aff2axcodes(turned.affine)) == axcodes
    nibabel.save(turned, path)
    back = np.linalg.inv(orientations.inv_ornt_aff(change, image.shape))  # LPS voxel indices -> the file's
    return nibabel.affines.apply_affine(back, beads_zyx_vox[:, ::-1])


def find_beads(volume: np.ndarray) -> np.ndarray:
    """Centres of the bright spots, (n, 3) float zyx voxels."""
    spots, count = ndimage.label(volume > 1400)
    weights = np.clip(volume.astype(np.float64) - 1000, 0, None) * (spots > 0)
    large = [i for i in range(1, count + 1) if (spots == i).sum() > 4]
    return np.array(ndimage.center_of_mass(weights, spots, large))


def nearest(points: np.ndarray, places: np.ndarray) -> np.ndarray:
    """For each of `points` the nearest of `places`."""
    return places[np.linalg.norm(points[:, None] - places, axis=2).argmin(axis=1)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The store, and for each scan the beads' places in its file."""
    folder = tmp_path_factory.mktemp("frames")
    (folder / "ct").mkdir()
    beads = {name: write_file(folder / "ct" / f"{name}.nii.gz", *FILES[name]) for name in FILES}
    arguments = ["--input", str(folder / "ct"), "--store", str(folder / "store"), "--workers", "1", "--strict"]
    assert prepare.main(arguments) == 0
    return Store.open(folder / "store"), beads


@pytest.mark.parametrize("name", FILES)
def test_bead_maps_back_to_its_file(prepared, name):
    store, beads_ijk = prepared
    assert store.ids() == sorted(FILES) and store.scan(name).original["axcodes"] == FILES[name][0]
    found = find_beads(store.read_volume(name))
    assert len(found) == len(BEADS_MM)
    in_file = store.to_original_ijk(name, found)
    assert np.abs(in_file - nearest(in_file, beads_ijk[name])).max() < 0.5
    expected = store.from_original_ijk(name, beads_ijk[name])
    assert np.abs(nearest(expected, found) - expected).max() < 0.5


@pytest.mark.parametrize("name", FILES)
def test_same_anatomy_same_place(prepared, name):
    """In the stored frame beads lie where the patient has them: x toward Left, y Posterior, z Superior."""
    store, _ = prepared
    assert store.scan(name).spacing_zyx_mm == (2.0, 2.0, 2.0)
    found = find_beads(store.read_volume(name))
    truth = PATIENT.from_canonical_mm(BEADS_MM)
    found = nearest(truth, found)
    # Grids keep the centre of their file, and files of another spacing end up to a voxel earlier.
    shift = np.array(store.scan(name).origin_xyz_lps_mm)[::-1] - PATIENT.origin_zyx_mm
    assert np.abs(shift).max() < 3.0
    assert np.abs(found + shift / 2.0 - truth).max() < 0.5
    liver, spleen, heart, _, _, bladder = found
    assert liver[2] < heart[2] < spleen[2]
    assert heart[1] < spleen[1]
    assert bladder[0] < liver[0] < heart[0]


@pytest.mark.parametrize("name", [name for name in FILES if name != "plain"])
def test_same_image_and_not_its_mirror(prepared, name):
    store, _ = prepared
    plain, other = (ndimage.gaussian_filter(store.read_volume(n).astype(np.float32), 2) for n in ("plain", name))
    shape = np.minimum(plain.shape, other.shape)
    plain, other = (v[tuple(slice(n) for n in shape)][::2, ::2, ::2] for v in (plain, other))

    def similarity(a, b):
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    same = similarity(plain, other)
    assert same > 0.97
    assert all(similarity(plain, np.flip(other, axis)) < same - 0.05 for axis in range(3))
