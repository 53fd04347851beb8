"""loss*.npz: the three losses, their gradients and the moving centers over consecutive calls."""

import jax
import jax.numpy as jnp
import numpy as np

from alice_jax import schedules
from alice_jax.objectives.alice import MODES, Alice, Outputs, Weights

PATTERNS = ("loss*.npz",)
LIMIT = 2e-5


def check(report) -> None:
    """Every call of the file, each starting from the centers that the one before it left."""
    config = report.config
    report.configuration("config_json")
    epochs = np.arange(config["nepochs"])
    warm_cls, final_cls, warm_tokens, final_tokens = config["temps"]
    cls_temperature = schedules.ramp(epochs, warm_cls, final_cls, config["warm"])
    tokens_temperature = schedules.ramp(epochs - config["mim"], warm_tokens, final_tokens, config["warm"])
    report.close("teacher_temp_schedule", cls_temperature, 1e-6, scale="relative")
    report.close("teacher_temp2_schedule", tokens_temperature, 1e-6, scale="relative")

    weights = Weights(*map(float, config["lam"]))
    alice = Alice(mode=MODES["release"], backbone=None, head=None, casa=None, weights=weights, mask_ratio=0.75)
    centers = {
        "center_cls": jnp.zeros(report.arrays["call0/student_cls"].shape[-1]),
        "center_tokens": jnp.zeros(report.arrays["call0/feat1_ali"].shape[-1]),
    }
    for index in range(sum(name.endswith("/epoch") for name in report.arrays)):
        call = f"call{index}/"
        epoch = int(report.arrays[call + "epoch"])
        centers = _check_call(report, call, alice, centers, cls_temperature[epoch], tokens_temperature[epoch])


def _check_call(report, call: str, alice: Alice, centers: dict, cls_temperature: float, tokens_temperature: float):
    inputs = ("epoch", "image_view0", "image_view1", "student_cls", "teacher_cls", "feat1_ali", "feat2_ali")
    report.configuration(*(call + name for name in inputs), call + "student_recon")
    given = {name: report.arrays[call + name] for name in inputs[1:]}
    volumes = np.stack([given["image_view0"], given["image_view1"]], axis=1)  # (batch, view, 1, ...)

    def total(student_cls, aligned, recon):
        outputs = Outputs(
            student_cls=by_sample(student_cls),
            teacher_cls=by_sample(given["teacher_cls"]),
            aligned=by_sample(aligned),
            aligned_target=by_sample(given["feat2_ali"]),
            reconstruction=by_sample(recon),
        )
        hidden, weights = np.zeros((len(volumes), 2, 1, 1, 1), bool), np.ones(len(volumes), np.float32)
        batch = {"volumes": volumes, "hidden": hidden, "weights": weights}
        return alice.losses(outputs, centers, batch, cls_temperature, tokens_temperature)

    arguments = (given["student_cls"], given["feat1_ali"], report.arrays[call + "student_recon"])
    (loss, (stats, metrics)), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*arguments)
    weights = alice.weights
    report.close(call + "cls", weights.invariance * metrics["loss_invariance"], LIMIT)
    report.close(call + "patch", weights.alignment * metrics["loss_alignment"], LIMIT)
    scale = weights.reconstruction * alice.mode.reconstruction_scale
    report.close(call + "recon", scale * metrics["loss_reconstruction"], LIMIT)
    report.close(call + "loss", loss, LIMIT)
    report.close(call + "grad_student_cls", gradients[0], LIMIT)
    report.close(call + "grad_feat1_ali", gradients[1], LIMIT)
    g = np.asarray(gradients[2], np.float64)
    statistics = [g.mean(), g.std(), g.min(), g.max(), np.abs(g).sum()]
    report.close(call + "grad_student_recon_stats", np.array(statistics), LIMIT)
    moved = alice.moved_centers(centers, stats)
    report.close(call + "center_after", moved["center_cls"][None], LIMIT)
    report.close(call + "center2_after", moved["center_tokens"][None, None], LIMIT)
    return moved


def by_sample(rows):
    """The release's rows, all of view 0 then all of view 1, in our order: the two views of a sample side by side."""
    return jnp.reshape(jnp.swapaxes(jnp.reshape(rows, (2, -1, *rows.shape[1:])), 0, 1), rows.shape)
