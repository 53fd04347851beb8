"""tables*.npz: position index, region masks and window order; blocks*.npz: attention and stages alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from alice_jax.interop import names
from alice_jax.interop import nnformer as interop
from alice_jax.models import nnformer, windows

PATTERNS = ("tables*.npz", "blocks*.npz")
LIMIT = 2e-5


def check(report) -> None:
    """Either of the two files, told apart by what they hold."""
    for name in report.arrays:
        if match := re.fullmatch(r"index_w(\d+)", name):
            check_index(report, int(match[1]))
        elif match := re.fullmatch(r"mask_is_minus100/((\d+)x(\d+)x(\d+)_w(\d+))", name):
            *grid, window = map(int, match.groups()[1:])
            check_window_order(report, match[1], tuple(grid), window)
    for prefix in sorted({name.split("/sd/")[0] for name in report.arrays if "/sd/" in name}):
        state = {
            name.removeprefix(f"{prefix}/sd/"): value
            for name, value in report.arrays.items()
            if name.startswith(f"{prefix}/sd/")
        }
        if "qkv.weight" in state:
            check_self_attention(report, prefix, state)
        elif "kv.weight" in state:
            check_skip_attention(report, prefix, state)
        else:
            check_stage(report, prefix, state)


def check_index(report, window: int) -> None:
    index = windows.relative_position_index(window, "release")
    report.equal(f"index_w{window}", index)
    report.equal(f"table_rows_w{window}", (2 * window - 1) ** 3)
    report.equal(f"distinct_rows_used_w{window}", len(np.unique(index)))


def check_window_order(report, case: str, grid: tuple[int, int, int], window: int) -> None:
    """The region mask is judged for the window as configured, the order for the one that the grid allows."""
    mask = windows.region_mask(windows.padded_grid(grid, window), window, window // 2)
    report.equal(f"mask_is_minus100/{case}", mask)
    report.equal(f"mask_shape/{case}", mask.shape)
    effective, shift = windows.effective_window(grid, window, shifted=True)
    report.equal(f"block1_effective_window_shift/{case}", [effective, shift])
    if f"window_token_source/{case}" in report.arrays:
        places = jnp.arange(np.prod(grid)).reshape(1, *grid, 1)
        seen = []

        def remember(x, context, separate):
            seen.append(x[0, ..., 0])
            return x

        windows.over_windows(remember, places, window=window, shifted=True)
        report.equal(f"window_token_source/{case}", seen[0])


def parameters(report, prefix: str, state: dict[str, np.ndarray], at: str) -> dict:
    """The layer's parameters, found at the name `at` of a whole network; the way back must give the same weights."""
    whole = {f"{at}.{name}": value for name, value in state.items()}
    tree = interop.from_torch(whole, mask_token=False)
    returned = names.to_torch(interop.RULES, tree)
    for name in state:
        if name.endswith("relative_position_index"):
            window = round(len(state[name]) ** (1 / 3))
            report.equal(f"{prefix}/sd/{name}", windows.relative_position_index(window, "release"))
        else:
            report.equal(f"{prefix}/sd/{name}", returned[f"{at}.{name}"])
    return tree


def attention(heads: int) -> windows.WindowAttention:
    return windows.WindowAttention(heads, position_index="release")


def check_self_attention(report, prefix: str, state: dict[str, np.ndarray]) -> None:
    tree = parameters(report, prefix, state, "model_down.layers.0.blocks.0.attn")
    variables = {"params": tree["encoder_0"]["block0"]["attention"]}
    model = attention(state["relative_position_bias_table"].shape[1])
    x, mask = report.arrays[f"{prefix}/x"], report.arrays[f"{prefix}/mask_is_minus100"]
    report.configuration(f"{prefix}/x", f"{prefix}/mask_is_minus100")
    by_image = x.reshape(-1, len(mask), *x.shape[1:])
    run = jax.jit(model.apply)
    report.close(f"{prefix}/out_nomask", run(variables, by_image).reshape(x.shape), LIMIT)
    report.close(f"{prefix}/out_mask", run(variables, by_image, separate=mask).reshape(x.shape), LIMIT)


def check_skip_attention(report, prefix: str, state: dict[str, np.ndarray]) -> None:
    tree = parameters(report, prefix, state, "decoder.layers.0.blocks.0.attn")
    variables = {"params": tree["decoder_0"]["block0"]["attention"]}
    model = attention(state["relative_position_bias_table"].shape[1])
    report.configuration(f"{prefix}/skip", f"{prefix}/x_up")
    x, skip = report.arrays[f"{prefix}/x_up"], report.arrays[f"{prefix}/skip"]
    report.close(f"{prefix}/out", jax.jit(model.apply)(variables, x[None], skip[None])[0], LIMIT)


def check_stage(report, prefix: str, state: dict[str, np.ndarray]) -> None:
    tree = parameters(report, prefix, state, "model_down.layers.0")
    report.configuration(f"{prefix}/x")
    shapes, x = report.arrays[f"{prefix}/shape_in_and_down"], report.arrays[f"{prefix}/x"]
    grid, channels = tuple(int(n) for n in shapes[:3]), x.shape[-1]
    rows, heads = state["blocks.0.attn.relative_position_bias_table"].shape
    window = (round(rows ** (1 / 3)) + 1) // 2
    depth = len(tree["encoder_0"])
    stage = nnformer.EncoderStage(
        heads=heads,
        window=window,
        drop_paths=(0.0,) * depth,
        position_index="release",
        dtype=jnp.float32,
    )

    @jax.jit
    def run(x):
        out = stage.apply({"params": tree["encoder_0"]}, x, train=False)
        return out, nnformer.Downsample().apply({"params": tree["downsample_0"]}, out)

    out, down = run(x.reshape(-1, *grid, channels))
    report.equal(f"{prefix}/shape_in_and_down", [*out.shape[1:4], *down.shape[1:4]])
    used = [windows.effective_window(grid, window, shifted=j % 2 == 1) for j in range(depth)]
    report.equal(f"{prefix}/effective_window_shift", used)
    report.close(f"{prefix}/x_out", out.reshape(x.shape), LIMIT)
    report.close(f"{prefix}/x_down", down.reshape(len(x), -1, down.shape[-1]), LIMIT)
