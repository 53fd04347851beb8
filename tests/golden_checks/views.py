"""crop*.npz: crops around points; masks*.npz: the release's column masks."""

import json

import numpy as np
from builders import add_volume

from alice_jax.data import masks, views
from alice_jax.data.store import Store

PATTERNS = ("crop*.npz", "masks*.npz")


def check(report) -> None:
    """Either of the two files, told apart by what they hold."""
    if "img" in report.arrays:
        _check_crops(report)
    for name in [name for name in report.arrays if name.endswith("/config_json")]:
        report.configuration(name)
        _check_masks(report, name.removesuffix("config_json"), json.loads(str(report.arrays[name])))


def _check_crops(report) -> None:
    image = report.arrays["img"]
    report.configuration("img", "roi", "points")
    crops = {f"crop{i}": (point, report.arrays["roi"]) for i, point in enumerate(report.arrays["points"])}
    for prefix in sorted({name.split("/")[0] for name in report.arrays if name.startswith("odd")}):
        report.configuration(f"{prefix}/point", f"{prefix}/roi")
        crops[f"{prefix}/crop"] = (report.arrays[f"{prefix}/point"], report.arrays[f"{prefix}/roi"])
    for name, (point, roi) in crops.items():
        # The release crops 2·(roi // 2) voxels; asked for that many, our crop is the same for odd sizes too.
        got = np.stack([[stored_crop(channel, point, 2 * (roi // 2)) for channel in item] for item in image])
        report.equal(name, got)


def stored_crop(volume: np.ndarray, point: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """The crop of a float volume as the store gives it: its values' ranks are written as int16 digits and read back.

    Rank 0 stands for what lies outside, 0 after windowing.
    """
    values, ranks = np.unique(volume, return_inverse=True)
    ranks = ranks.reshape(volume.shape) + 1
    digits = [ranks % 2**14, ranks // 2**14]
    store = Store.create("memory://golden_crops", spacing_zyx_mm=(2, 2, 2))
    crops = []
    for i, digit in enumerate(digits):
        add_volume(store, f"digit{i}", digit)
        crop = views.crop_around(store, f"digit{i}", point, shape)
        crops.append(np.where(crop == views.AIR_HU, 0, crop).astype(int))
    return np.concatenate([[0], values])[crops[0] + 2**14 * crops[1]].astype(volume.dtype)


def _check_masks(report, prefix: str, config: dict) -> None:
    size, cell = config["size"], config["mp"]
    grid = tuple(n // cell for n in size)
    cells = grid[0] * grid[1]
    report.equal(prefix + "token_count", np.array(cells))
    report.equal(prefix + "mask_count", np.array(masks.hidden_count(cells, config["ratio"])))
    report.equal(prefix + "mask_shape_for_model", np.array([1, 1, *(n // 2 for n in size)]))

    prefixes = report.arrays[prefix + "np_legacy_permutation_prefix"]
    permutation = np.random.RandomState(config["seed"]).permutation(cells)
    report.equal(prefix + "np_legacy_permutation_prefix", permutation[: len(prefixes)])
    # The release draws from one legacy generator, mask after mask.
    generator = np.random.RandomState(config["seed"])
    drawn = [
        masks.columns(generator.permutation(cells), grid, config["ratio"]) for _ in report.arrays[prefix + "masks"]
    ]
    report.equal(prefix + "masks", np.stack([upsampled(m, cell // 2) for m in drawn]).astype(np.uint8))
    report.equal(prefix + "mask0_upsampled_to_voxels", upsampled(drawn[0], cell).astype(np.uint8))


def upsampled(grid: np.ndarray, times: int) -> np.ndarray:
    """Nearest-neighbour upsampling on all three axes."""
    return grid.repeat(times, 0).repeat(times, 1).repeat(times, 2)
