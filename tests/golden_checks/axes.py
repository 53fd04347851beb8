"""axes.npz: files in many orientations, as the release's loader and its embedder see them.

Our frame must equal the embedder's (LPS). The loader's is RAS, and the release uses the same integers in both: here
they are the same voxels only after turning the two axes named by `flips_loader_to_lps`.
"""

import numpy as np

from alice_jax.data import geometry

PATTERNS = ("axes*.npz",)
WINDOW_HU = (-125.0, 225.0)


def check(report) -> None:
    """Every case of the file."""
    for case in sorted({name.split("/")[0] for name in report.arrays}):
        _check_case(report, case)


def _check_case(report, case: str) -> None:
    arrays, prefix = report.arrays, f"{case}/"
    hu_ijk, affine_ras = arrays[prefix + "hu_file_ijk"], arrays[prefix + "affine"]
    report.configuration(*(prefix + name for name in ("hu_file_ijk", "affine", "oblique_deg", "loader_name")))
    report.equal(prefix + "axcodes", np.array(geometry.axis_codes(affine_ras)))

    lps_zyx, affine_lps = geometry.reorient(hu_ijk, affine_ras)
    lps_xyz = lps_zyx.transpose(2, 1, 0)
    report.equal(prefix + "lps_volume_xyz_hu", lps_xyz)
    report.equal(prefix + "read_info_shape", np.array((1, *lps_xyz.transpose(1, 0, 2).shape)))
    report.close(prefix + "read_info_norm_ratio", geometry.spacing_xyz(affine_lps) / 2, 1e-6)

    flips = arrays[prefix + "flips_loader_to_lps"]
    report.equal(prefix + "flips_loader_to_lps", np.array((0, 1)))
    low, high = WINDOW_HU
    loader_xyz = (np.flip(lps_xyz, tuple(flips)).clip(low, high).astype(np.float32) - low) / (high - low)
    report.close(prefix + "loader_tensor_1_1_h_w_d", loader_xyz[None, None], 1e-6)
