"""The embedder's network (sam*.npz) and its input (sam_preprocess*.npz)."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from alice_jax.data.embedder_views import network_input
from alice_jax.interop import embedder as interop
from alice_jax.models.embedder import Embedder
from alice_jax.models.layers import l2_normalise

PATTERNS = ("sam*.npz",)
EMBEDDING_LIMIT, HALF_LIMIT, STATISTICS_LIMIT = 1e-5, 1e-3, 1e-6
LAYER_LIMIT = 2e-5


def check(report) -> None:
    if any(re.fullmatch(r"vol\d+/network_input", name) for name in report.arrays):
        check_inputs(report)
    else:
        check_network(report)


def statistics(x: np.ndarray) -> np.ndarray:
    """Mean, population standard deviation, min, max and sum of magnitudes in float64."""
    x = np.asarray(x, np.float64)
    return np.array([x.mean(), x.std(), x.min(), x.max(), np.abs(x).sum()])


def channels_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def check_network(report) -> None:
    state = {name.removeprefix("sd/"): report.arrays[name] for name in report.arrays if name.startswith("sd/")}
    variables = interop.from_torch(state)
    for name, value in interop.to_torch(variables).items():
        report.equal(f"sd/{name}", value)
    channels = tuple(state[f"backbone.layer{stage}.0.conv1.conv.weight"].shape[0] for stage in range(1, 5))
    model = Embedder(channels=channels, features=state["neck.fpn_convs.0.conv.weight"].shape[0])

    @jax.jit
    def run(volume):
        stages = model.apply(variables, volume, method="stages")
        return stages, model.apply(variables, stages, method="heads")

    inputs = sorted(name.split("/")[0] for name in report.arrays if name.endswith("/hu_zyx_int16"))
    for key in inputs:
        report.configuration(f"{key}/hu_zyx_int16")
        x = network_input(report.arrays[f"{key}/hu_zyx_int16"])
        stages, heads = run(jnp.asarray(x)[None, ..., None])
        got = {"x_stats": statistics(x), "x_first_slice": x[0]}
        for number, stage in enumerate(stages, 1):
            stage = channels_first(stage)
            got |= {f"layer{number}_out": stage, f"layer{number}_out_shape": np.array(stage.shape)}
            got[f"layer{number}_out_stats"] = statistics(stage)
        for level, before in zip(("fine", "coarse"), heads, strict=True):
            unit = channels_first(l2_normalise(before))
            got[f"{level}_normalised"], got[f"{level}_normalised_sub2"] = unit, unit[:, :, ::2, ::2, ::2]
            got[f"{level}_normalised_stats"], got[f"{level}_shape"] = statistics(unit), np.array(unit.shape)
            got[f"{level}_half"] = unit.astype(np.float16).astype(np.float32)
            got[f"{level}_norm_before_normalise_stats"] = statistics(np.linalg.norm(channels_first(before), axis=1))
        for name in [name for name in report.arrays if name.startswith(f"{key}/") and "hu_zyx" not in name]:
            short = name.removeprefix(f"{key}/")
            if short.endswith("_shape"):
                report.equal(name, got[short])
            elif short.endswith("_half"):
                report.close(name, got[short], HALF_LIMIT, "absolute")
            elif "normalised" in short and not short.endswith("_stats"):
                report.close(name, got[short], EMBEDDING_LIMIT, "absolute")
            elif short.startswith("x_"):
                report.close(name, got[short], STATISTICS_LIMIT, "max")
            else:
                report.close(name, got[short], LAYER_LIMIT, "max")


def release_pixel_drop(raw_zyx: np.ndarray, spacing_xyz: np.ndarray) -> np.ndarray:
    """Instead of resampling, the release keeps voxels r // 2 :: r with r = max(1, floor(2 / spacing)) on each axis."""
    steps = np.maximum(1, np.floor(2 / np.asarray(spacing_xyz))).astype(int)[::-1]
    return raw_zyx[tuple(slice(r // 2, None, r) for r in steps)]


def check_inputs(report) -> None:
    for key in sorted(name.split("/")[0] for name in report.arrays if name.endswith("/raw_zyx_int16")):
        spacing = report.arrays[f"{key}/spacing_xyz"]
        report.configuration(f"{key}/raw_zyx_int16", f"{key}/spacing_xyz")
        got = network_input(release_pixel_drop(report.arrays[f"{key}/raw_zyx_int16"], spacing))[None, None]
        report.close(f"{key}/network_input", got, STATISTICS_LIMIT, "max")
        if f"{key}/network_input_shape" in report.arrays:
            report.equal(f"{key}/network_input_shape", np.array(got.shape))
        report.close(f"{key}/norm_ratio_xyz", spacing / 2, STATISTICS_LIMIT, "relative")
