"""casa*.npz: cross-attention of one query with two contexts, the attention itself, and gradients."""

import functools

import jax
import jax.numpy as jnp

from alice_jax.interop import casa as interop
from alice_jax.interop import names
from alice_jax.models.casa import CASA

PATTERNS = ("casa*.npz",)
LIMIT = 2e-5


def check(report) -> None:
    config, arrays = report.config, report.arrays
    report.configuration("query", "kv_student", "kv_teacher", "gradw_feat1")
    state = {name.removeprefix("sd/"): value for name, value in arrays.items() if name.startswith("sd/")}
    params = interop.from_torch(state)
    used = names.to_torch(interop.RULES, params)
    for name, value in used.items():
        report.equal(f"sd/{name}", value)
    unused = [name for name in interop.to_torch(params) if name not in used]
    report.unused(*(f"sd/{name}" for name in unused))
    report.equal("grad_none_names", unused)

    model = CASA(
        width=config["d_out"],
        inner=config["d_inner"],
        heads=config["n_head"],
        head_dim=config["d_k"],
        query_residual=True,
    )
    query, online, target = (jnp.asarray(arrays[name]) for name in ("query", "kv_student", "kv_teacher"))
    run = jax.jit(lambda query, context: model.apply({"params": params}, query, context))
    report.close("feat1_ali", run(query, online), LIMIT)
    report.close("feat2_ali", run(query, target), LIMIT)
    attention = model.apply({"params": params}, query, online, method="attention")
    report.close("attn_student_B_head_q_k", attention, LIMIT)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(params, query, online):
        return jnp.sum(model.apply({"params": params}, query, online) * arrays["gradw_feat1"])

    gradients = gradient(params, query, online)
    by_name = names.to_torch(interop.RULES, gradients[0]) | {"query": gradients[1], "kv_student": gradients[2]}
    for name in [name for name in arrays if name.startswith("grad/")]:
        report.close(name, by_name[name.removeprefix("grad/")], LIMIT)
