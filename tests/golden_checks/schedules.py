"""schedules.npz: learning rate, weight decay, momentum and temperatures; clip_gradients.npz: clipping by tensor."""

import json

import jax.numpy as jnp
import numpy as np

from alice_jax import optimizer, schedules

PATTERNS = ("schedules*.npz", "clip_gradients*.npz")


def check(report) -> None:
    """Either of the two files, told apart by what they hold."""
    if "clip" in report.arrays:
        _check_clipping(report)
    for name in [name for name in report.arrays if name.endswith("/args_json")]:
        report.configuration(name)
        _check_schedule(report, name.removesuffix("args_json"), json.loads(str(report.arrays[name])))


def _check_schedule(report, prefix: str, args: dict) -> None:
    if "base_value" in args:
        per_epoch = args["niter_per_ep"]
        total, warmup = args["epochs"] * per_epoch, args.get("warmup_epochs", 0) * per_epoch
        start = args.get("start_warmup_value", 0.0)
        steps = np.arange(total)
        values = schedules.warmup_cosine(steps, args["base_value"], args["final_value"], total, warmup, start)
        report.close(prefix + "schedule", values, 1e-6, scale="relative")
        return
    epochs = np.arange(args["nepochs"])
    cls = schedules.ramp(epochs, args["w1"], args["t1"], args["warm"])
    tokens = schedules.ramp(epochs - args["mim"], args["w2"], args["t2"], args["warm"])
    report.close(prefix + "teacher_temp", cls, 1e-6, scale="relative")
    report.close(prefix + "teacher_patch_temp", tokens, 1e-6, scale="relative")


def _check_clipping(report) -> None:
    report.configuration("clip")
    names = [name.removesuffix("/grad_before") for name in report.arrays if name.endswith("/grad_before")]
    report.configuration(*(f"{name}/grad_before" for name in names))
    before = {name: jnp.asarray(report.arrays[f"{name}/grad_before"]) for name in names}
    clip = optimizer.clip_each_tensor(float(report.arrays["clip"]))
    after, _ = clip.update(before, clip.init(before))
    for name in names:
        report.close(f"{name}/grad_after", after[name], 1e-6)
    report.close("returned_norms", np.array([np.linalg.norm(before[name]) for name in names]), 1e-6, scale="relative")
