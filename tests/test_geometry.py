"""Frames and resampling: the same anatomy lands in the same place however the file was written."""

import itertools

import nibabel as nib
import numpy as np
import pytest

from alice_jax.data import geometry

ORIENTATIONS = ["".join(s) for p in itertools.permutations(["RL", "AP", "SI"]) for s in itertools.product(*p)]


def affine_for(codes: str, spacing_xyz_mm=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0)) -> np.ndarray:
    """A RAS affine whose file axes grow in the directions of `codes`."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, code in enumerate(codes):
        world = next(w for w, letters in enumerate(("RL", "AP", "SI")) if code in letters)
        affine[world, axis] = spacing_xyz_mm[world] * (1 if code in "RAS" else -1)
    affine[:3, 3] = origin
    return affine


def rotation(degrees, axis=2) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    a, b = [i for i in range(3) if i != axis]
    matrix = np.eye(3)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


def test_all_48_orientations_agree_with_nibabel():
    assert len(set(ORIENTATIONS)) == 48
    for codes in ORIENTATIONS:
        assert geometry.axis_codes(affine_for(codes)) == codes == "".join(nib.aff2axcodes(affine_for(codes)))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LPI", "PSR", "ASL", "IRP"])
def test_reorient_matches_nibabel(codes):
    array = np.random.default_rng(0).normal(size=(4, 5, 6))
    affine = affine_for(codes, (0.7, 0.8, 2.5), (3, -7, 11))
    ornt = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("LPS"))
    wanted = nib.Nifti1Image(array, affine).as_reoriented(ornt)
    view, affine_lps = geometry.reorient(array, affine)
    np.testing.assert_array_equal(view, wanted.get_fdata().transpose(2, 1, 0))
    np.testing.assert_allclose(geometry.RAS_FROM_LPS @ affine_lps, wanted.affine, atol=1e-12)


def test_every_point_maps_to_its_own_voxel_of_the_file():
    rng = np.random.default_rng(1)
    for affine in (affine_for("PSR", (0.7, 0.8, 2.5), (3, -7, 11)), oblique(affine_for("LAS"), 23), sheared()):
        array = rng.normal(size=(4, 5, 6))
        view, affine_lps = geometry.reorient(array, affine)
        zyx = np.argwhere(np.ones_like(view, bool))
        ijk = geometry.world_to_original(geometry.index_to_world(zyx, affine_lps), affine)
        np.testing.assert_allclose(ijk, np.rint(ijk), atol=1e-9)
        np.testing.assert_array_equal(array[tuple(np.rint(ijk).astype(int).T)], view.ravel())
        back = geometry.world_to_index(geometry.original_to_world(ijk, affine), affine_lps)
        np.testing.assert_allclose(back, zyx, atol=1e-9)


def oblique(affine, degrees, axis=2):
    turned = affine.copy()
    turned[:3, :3] = rotation(degrees, axis) @ affine[:3, :3]
    return turned


def sheared():
    affine = affine_for("RAS", (1.5, 1.5, 3.0), (-40, -30, 20))
    affine[1, 2] = 0.9  # each slice a little further back, as a tilted gantry leaves them
    return affine


def blob(points_xyz_lps_mm, centre=(12.0, -8.0, 20.0), width=(14.0, 10.0, 12.0)):
    """A smooth asymmetric test object, as HU at LPS millimetres."""
    p = (np.asarray(points_xyz_lps_mm) - centre) / width
    return 900 * np.exp(-0.5 * (p**2).sum(-1)) * (1 + 0.3 * np.tanh(p[..., 0])) - 200


def sampled(shape_ijk, affine_ras):
    ijk = np.stack(np.meshgrid(*[np.arange(n) for n in shape_ijk], indexing="ij"), -1)
    return blob(geometry.original_to_world(ijk.reshape(-1, 3), affine_ras).reshape(*shape_ijk, 3)).round().astype("i2")


CASES = {
    "already there": ((50, 46, 42), affine_for("LPS", (2, 2, 2), (40, 52, -20))),
    "fine": ((100, 95, 70), affine_for("RAS", (1, 1, 1.25), (-62, -40, -20))),
    "thick slices": ((120, 110, 14), affine_for("LAS", (0.8, 0.8, 6), (36, -34, -20))),
    "axes permuted": ((60, 70, 66), affine_for("PSR", (1.5, 1.4, 1.3), (-60, 52, -20))),
    "slightly oblique": ((66, 60, 60), oblique(affine_for("RAS", (1.5, 1.5, 1.5), (-62, -40, -20)), 0.5)),
    "oblique": ((66, 60, 60), oblique(affine_for("RAS", (1.5, 1.5, 1.5), (-55, -55, -20)), 23)),
    "sheared": ((60, 60, 28), sheared()),
}


@pytest.mark.parametrize("case", CASES)
def test_resampling_puts_the_world_where_the_affine_says(case):
    shape, affine = CASES[case]
    view, affine_lps = geometry.reorient(sampled(shape, affine), affine)
    grid = geometry.stored_grid(view.shape, affine_lps, 2.0)
    volume = geometry.resample(view, affine_lps, grid)
    assert volume.shape == grid.shape_zyx and volume.dtype == np.int16
    np.testing.assert_allclose(geometry.spacing_xyz(grid.affine_lps), 2.0)
    zyx = np.argwhere(np.ones_like(volume, bool))
    world = geometry.index_to_world(zyx, grid.affine_lps)
    ijk = geometry.world_to_original(world, affine)
    covered = ((ijk >= 0) & (ijk <= np.array(shape) - 1)).all(-1)
    error = np.abs(volume.ravel() - blob(world))[covered]
    # The blob's slope reaches 50 HU/mm, so half a stored voxel of shift would be an error of 50 HU.
    assert np.percentile(error, 99) < (20 if case == "thick slices" else 5) and covered.mean() > 0.4
    outside = ((ijk < -0.6) | (ijk > np.array(shape) - 0.4)).any(-1)
    assert not geometry.is_aligned(affine_lps) or not outside.any()
    assert (volume.ravel()[outside] == -1024).all()


def test_a_scan_at_the_stored_spacing_is_copied():
    array = np.random.default_rng(0).integers(-1000, 1000, (20, 30, 25)).astype(np.int16)
    view, affine_lps = geometry.reorient(array, affine_for("LAI", (2, 2, 2)))
    volume = geometry.resample(view, affine_lps, geometry.stored_grid(view.shape, affine_lps, 2.0))
    np.testing.assert_array_equal(volume, view)


@pytest.mark.parametrize("spacing", [(0.8, 0.8, 0.8), (1.1, 1.3, 2.5), (3.0, 3.0, 7.0)])
def test_orientation_of_the_file_does_not_matter(spacing):
    reference_xyz = np.random.default_rng(0).integers(-1000, 1000, (40, 41, 42)).astype(np.int16)
    reference_affine = affine_for("LPS", spacing, (5, 6, 7))
    reference = nib.Nifti1Image(reference_xyz, reference_affine)
    results = []
    for codes in ("LPS", "RAS", "LPI", "PSR", "ASL"):
        ornt = nib.orientations.ornt_transform(
            nib.io_orientation(reference_affine), nib.orientations.axcodes2ornt(codes)
        )
        image = reference.as_reoriented(ornt)
        assert geometry.axis_codes(image.affine) == codes
        view, affine_lps = geometry.reorient(np.asarray(image.dataobj), image.affine)
        grid = geometry.stored_grid(view.shape, affine_lps, 2.0)
        results.append((geometry.resample(view, affine_lps, grid), grid.affine_lps))
    for volume, affine in results[1:]:
        np.testing.assert_array_equal(volume, results[0][0])
        np.testing.assert_allclose(affine, results[0][1], atol=1e-9)


def test_downsampling_does_not_alias():
    stripes = np.zeros((64, 64, 64), np.int16)
    stripes[::2] = 1000  # the finest pattern there is: 2 mm period at 1 mm; at 2 mm it must be grey
    view, affine_lps = geometry.reorient(stripes, affine_for("RAS", (1, 1, 1)))
    volume = geometry.resample(view, affine_lps, geometry.stored_grid(view.shape, affine_lps, 2.0))
    assert np.abs(volume[:, :, 4:-4].astype(int) - 500).max() < 50


@pytest.mark.parametrize("n, old", [(64, 0.7), (64, 3.0), (41, 5.0), (3, 1.0), (1, 9.0)])
def test_a_constant_stays_constant(n, old):
    view, affine_lps = geometry.reorient(np.full((n, n, n), 40, np.int16), affine_for("RAS", (old, old, old)))
    assert (geometry.resample(view, affine_lps, geometry.stored_grid(view.shape, affine_lps, 2.0)) == 40).all()
