"""head*.npz: the projection head with separate, freely scaled and shared last layers, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from random_weights import random_weights

from alice_jax.interop import heads as interop
from alice_jax.interop import names
from alice_jax.models.heads import Head, shared_last

PATTERNS = ("head*.npz",)
LIMIT = 2e-5


def check(report) -> None:
    config = report.config
    report.configuration("cls_token", "encoder", "decoder")
    for prefix in sorted({name.split("/")[0] for name in report.arrays if name.endswith("/out_cls")}):
        check_head(report, prefix, config)
    check_copy(report)


def sequence(x: np.ndarray) -> np.ndarray:
    """(b, c, ...) -> (b, n, c)."""
    return x.reshape(*x.shape[:2], -1).swapaxes(1, 2)


def check_head(report, prefix: str, config: dict) -> None:
    arrays, at = report.arrays, f"{prefix}/sd/"
    state = {name.removeprefix(at): value for name, value in arrays.items() if name.startswith(at)}
    separate = "last_layer2.weight_v" in arrays[f"{prefix}/named_parameters"]
    params = interop.from_torch(state, separate)
    for name, value in interop.to_torch(params).items():
        report.equal(at + name, value)

    model = Head(
        width=config["in_dim"],
        hidden=config["hidden"],
        bottleneck=config["bott"],
        prototypes=config["out_dim"],
        token_prototypes=config["patch_out_dim"],
        separate_last=separate,
        train_gain=bool(np.any(state["last_layer.weight_g"] != 1)),  # frozen gains are set to 1
    )
    factors = [arrays[f"{prefix}/gradw{i}"] for i in range(3)]
    report.configuration(*(f"{prefix}/gradw{i}" for i in range(3)))
    inputs = (arrays["cls_token"], sequence(arrays["encoder"]), sequence(arrays["decoder"]))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(params):
        outputs = model.apply({"params": params}, *inputs)
        return sum(jnp.sum(x * factor) for x, factor in zip(outputs, factors, strict=True)), outputs

    gradients, outputs = run(params)
    for name, value in zip(("out_cls", "out_enc", "out_dec"), outputs, strict=True):
        report.close(f"{prefix}/{name}", value, LIMIT)
    gradients = names.in_order(names.to_torch(interop.RULES, gradients), interop.ORDER)
    for name in [name for name in arrays if name.startswith(f"{prefix}/grad/")]:
        report.close(name, gradients[name.removeprefix(f"{prefix}/grad/")], LIMIT)
    report.equal(f"{prefix}/named_parameters", list(gradients))
    report.equal(f"{prefix}/requires_grad", [bool(np.any(gradient)) for gradient in gradients.values()])


def check_copy(report) -> None:
    """Which of the student's last layers the release's teacher starts with."""
    head = Head(width=8, hidden=8, bottleneck=4, prototypes=6, token_prototypes=6)
    inputs = (jnp.ones((1, 8)), jnp.ones((1, 2, 8)), jnp.ones((1, 2, 4)))
    student = random_weights(jax.eval_shape(head.init, jax.random.key(0), *inputs))["params"]
    teacher = shared_last(student)
    for torch_name, ours in (("last_layer", "last"), ("last_layer2", "last_tokens")):
        name = f"copy_quirk/teacher_last_layer_equals_student_{torch_name}"
        if name in report.arrays:
            report.equal(name, np.array_equal(teacher["last"]["direction"], student[ours]["direction"]))
