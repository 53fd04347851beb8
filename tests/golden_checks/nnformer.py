"""nnformer*.npz: the backbone with and without mask, every intermediate that is stored, and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from alice_jax.interop import names
from alice_jax.interop import nnformer as interop
from alice_jax.models import layers, nnformer

PATTERNS = ("nnformer*.npz",)
FORWARD_LIMIT, GRADIENT_LIMIT = 5e-5, 1e-4
OUTPUTS = ("cls_token", "neck", "defeat1", "recon")  # in the order of gradw/coeffs


def check(report) -> None:
    config = report.config
    report.configuration("x", "mask", "absolute_pos_embed")
    params = check_weights(report)
    grid = [n // 2 for n in config["img"]]
    model = nnformer.NNFormer(
        width=config["E"],
        depths=tuple(config["depths"]),
        heads=tuple(config["heads"]),
        windows=tuple(config["window"]),
        position_index=interop.position_index(weights(report)),
        mask_tokens=False,
    )
    volume = np.moveaxis(report.arrays["x"], 1, -1)
    position = report.arrays["absolute_pos_embed"].reshape(1, *grid, config["E"])
    runs = {"nomask": None, "mask": report.arrays["mask"][:, 0]}

    @jax.jit
    def run(params, hidden):
        features, state = model.apply(
            {"params": params}, volume, hidden, position, capture_intermediates=is_stored, mutable=["intermediates"]
        )
        return features, state["intermediates"]

    for prefix, hidden in runs.items():
        got = by_reference_name(*run(params, hidden), config["depths"])
        for name in [name for name in report.arrays if name.startswith(f"{prefix}/")]:
            check_output(report, name, got)
    if "grad_loss" in report.arrays:
        check_gradients(report, model, params, volume, runs["mask"], position)


def weights(report) -> dict[str, np.ndarray]:
    return {name.removeprefix("sd/"): value for name, value in report.arrays.items() if name.startswith("sd/")}


def check_weights(report) -> dict:
    """The state dict must survive the way into our tree and back, in names, order and values."""
    state = weights(report)
    params = interop.from_torch(state, mask_token=False)
    returned = interop.to_torch(params, interop.position_index(state))
    if list(returned) != list(state):
        report.problems.append("sd: our export has other names or another order than the state dict")
    unused = set(state) - set(names.to_torch(interop.RULES, params))
    for name, value in returned.items():
        if name in unused and not name.endswith("relative_position_index"):
            report.unused(f"sd/{name}")
        else:
            report.equal(f"sd/{name}", value)
    return params


def is_stored(module, method: str) -> bool:
    stored = (nnformer.PatchEmbed, nnformer.Block, nnformer.SkipBlock, nnformer.Downsample, nnformer.Upsample)
    skip_norm = isinstance(module, layers.LayerNorm) and module.name.startswith("skip_norm")
    return method == "__call__" and (isinstance(module, stored) or skip_norm)


def by_reference_name(features, captured: dict, depths: list[int]) -> dict[str, np.ndarray]:
    """Our arrays under the reference's names, in its axis order."""

    def first(x):
        return np.moveaxis(np.asarray(x), -1, 1)

    def tokens(x):
        return np.asarray(x).reshape(x.shape[0], -1, x.shape[-1])

    got = {
        "patch_embed": first(captured["patch_embed"]["__call__"][0]),
        "cls_token": np.asarray(features.cls),
        "neck": first(features.encoder_tokens),
        # the reference exchanges axes 1 and 4 of (b, s, h, w, c): space comes out as h, w, s
        "defeat1": np.asarray(features.decoder_tokens).swapaxes(1, 4),
        "recon": first(features.reconstruction),
    }
    for i, depth in enumerate(depths):
        for side, kind in (("encoder", "enc"), ("decoder", "dec")):
            for j in range(depth if f"{side}_{i}" in captured else 0):
                got[f"{kind}_layer{i}_block{j}"] = tokens(captured[f"{side}_{i}"][f"block{j}"]["__call__"][0])
        got[f"skip{i}"] = first(captured[f"skip_norm_{i}"]["__call__"][0])
        if i < len(depths) - 1:
            got[f"enc_layer{i}_downsample"] = tokens(captured[f"downsample_{i}"]["__call__"][0])
            got[f"dec_layer{i}_upsample"] = tokens(captured[f"decoder_{i}"]["upsample"]["__call__"][0])
            # outputs are numbered in running order, layers by resolution
            got[f"dec_out{len(depths) - 2 - i}"] = np.asarray(
                captured[f"decoder_{i}"][f"block{depth - 1}"]["__call__"][0]
            )
    return got


def check_output(report, name: str, got: dict[str, np.ndarray]) -> None:
    """One stored output: whole, every n-th element along space (`_subN`), or its statistics."""
    short, part = re.fullmatch(r"\w+/(\w+?)(?:_(sub\d+|stats))?", name).groups()
    if short not in got:
        return  # stays forgotten, which fails the file
    value = got[short]
    if part == "stats":
        x = value.astype(np.float64)
        value = np.array([x.mean(), x.std(), x.min(), x.max(), np.abs(x).sum()])
    elif part:
        every = (slice(None, None, int(part.removeprefix("sub"))),) * 3
        value = value[:, *every] if short.startswith("dec_out") else value[:, :, *every]
    report.close(name, value, FORWARD_LIMIT)


def check_gradients(report, model, params, volume, hidden, position) -> None:
    """The gradient of a weighted sum of the four outputs, for every parameter."""
    report.configuration("gradw/coeffs", *(f"gradw/{name}" for name in OUTPUTS))
    factors = [report.arrays[f"gradw/{name}"] for name in OUTPUTS]
    factors[1], factors[3] = (np.moveaxis(factors[i], 1, -1) for i in (1, 3))
    factors[2] = factors[2].swapaxes(1, 4)

    @jax.jit
    @jax.value_and_grad
    def run(params):
        features = model.apply({"params": params}, volume, hidden, position)
        ours = (features.cls, features.encoder_tokens, features.decoder_tokens, features.reconstruction)
        sums = [jnp.sum(x * factor) for x, factor in zip(ours, factors, strict=True)]
        return jnp.sum(jnp.stack(sums) * report.arrays["gradw/coeffs"])

    loss, gradients = run(params)
    for name in ("grad_loss", "grad_loss_f64"):
        report.close(name, loss, FORWARD_LIMIT)
    gradients = names.in_order(names.to_torch(interop.RULES, gradients), interop.ORDER)
    for name in [name for name in report.arrays if name.startswith("grad/")]:
        report.close(name, gradients[name.removeprefix("grad/")], GRADIENT_LIMIT)
    buffers = interop.BUFFER.fullmatch
    everything = [name for name in interop.to_torch(params, "release") if not buffers(name)]
    report.equal("grad_none_names", [name for name in everything if name not in gradients])
    report.equal("grad_norm_names", list(gradients))
    norms = [np.linalg.norm(gradient.astype(np.float64)) for gradient in gradients.values()]
    report.close("grad_norms_f64", norms, GRADIENT_LIMIT)
