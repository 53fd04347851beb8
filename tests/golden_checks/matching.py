"""Matching (find_point*.npz)."""

import re

import numpy as np

from alice_jax.data import embeddings, matching

PATTERNS = ("find_point*.npz",)
SCORE_LIMIT = 1e-5


def release_find_point(
    query: dict[str, np.ndarray], points_xyz: np.ndarray, key: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What the authors' release computes, mistakes included; the project's own way is `matching.match`.

    The mistakes: half a voxel is added to the matched cell instead of half a cell (B14), the point is cut off instead
    of rounded, and x is limited by the number of rows, y by that of columns, all by the length instead of the last
    index (B13). Every cell is searched, and fine vectors are not normalised again.

    Args:
      query, key: "fine" (z, y, x, c), "coarse" upsampled and normalised (z, y, x, c), "norm_ratio_xyz" (3,),
        "im_shape" (1, Y, X, Z).
      points_xyz: (n, 3) int.
    """
    cells_xyz = np.floor(points_xyz * query["norm_ratio_xyz"] / 2).astype(int)
    at = tuple(cells_xyz[:, ::-1].T)
    vectors = np.concatenate([query["fine"][at], query["coarse"][at]], axis=1) / 2
    keys = np.concatenate([key["fine"], key["coarse"]], axis=-1)
    index, scores = matching.nearest(vectors, keys.reshape(len(keys), -1, keys.shape[-1]))
    cells_zyx = np.stack(np.unravel_index(index, keys.shape[:3]), axis=1)
    matched_xyz = ((2 * cells_zyx[:, ::-1] + 0.5) / key["norm_ratio_xyz"]).astype(int)
    return {
        "fine_query_cell_xyz": cells_xyz,
        "matched_fine_cell_zyx": cells_zyx,
        "matched_points_xyz": np.minimum(matched_xyz, key["im_shape"][1:]),
        "scores": scores,
    }


def margins(query: dict[str, np.ndarray], cells_xyz: np.ndarray, key: dict[str, np.ndarray]) -> np.ndarray:
    """Best minus second-best score of each query."""
    at = tuple(cells_xyz[:, ::-1].T)
    scores = sum(query[level][at] @ key[level].reshape(-1, key[level].shape[-1]).T for level in ("fine", "coarse")) / 2
    second, best = np.partition(scores, -2, axis=1)[:, -2:].T
    return best - second


def check(report) -> None:
    cases = {}
    for name in sorted({name.split("/")[0] for name in report.arrays if name.endswith("/fine_half")}):
        halves = (report.arrays[f"{name}/{level}_half"][0] for level in ("fine", "coarse"))
        fine, coarse = (np.moveaxis(half.astype(np.float32), 0, -1) for half in halves)
        upsampled = np.stack(list(embeddings.upsampled_slabs(coarse, fine.shape[:3])))
        subsampled = f"{name}/coarse_upsampled_normalised_sub2"
        if subsampled in report.arrays:
            report.close(subsampled, np.moveaxis(upsampled, -1, 0)[None, :, ::2, ::2, ::2], SCORE_LIMIT, "absolute")
        inputs = ("fine_half", "coarse_half", "norm_ratio_xyz", "im_shape_read_info", "image_size_xyz")
        report.configuration(*(f"{name}/{x}" for x in inputs if f"{name}/{x}" in report.arrays))
        cases[name] = {
            "fine": fine,
            "coarse": upsampled,
            "norm_ratio_xyz": report.arrays[f"{name}/norm_ratio_xyz"],
            "im_shape": report.arrays[f"{name}/im_shape_read_info"],
        }
    for name in sorted(name for name in report.arrays if name.endswith("/query_points_xyz")):
        pair = name.rpartition("/")[0]
        query, key = (cases[case] for case in re.fullmatch(r"(.+)_to_(.+)", pair).groups())
        report.configuration(name)
        got = release_find_point(query, report.arrays[name], key)
        for part in ("fine_query_cell_xyz", "matched_fine_cell_zyx", "matched_points_xyz"):
            if f"{pair}/{part}" in report.arrays:
                report.equal(f"{pair}/{part}", got[part])
        report.close(f"{pair}/scores", got["scores"], SCORE_LIMIT, "absolute")
        margin = f"{pair}/score_margin_to_second_best"
        if margin in report.arrays:
            report.close(margin, margins(query, got["fine_query_cell_xyz"], key), SCORE_LIMIT, "absolute")
