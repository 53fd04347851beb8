"""The train step of a configuration, compiled for devices that are not there, and what the compiler says of it."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from alice_jax import sharding, tasks
from alice_jax.ahead import collectives, padding
from alice_jax.errors import UserError

Tree = Any


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step; sizes are bytes on one device.

    Attributes:
      parameters, optimizer, extra, batch: what the step is given, by shape; `extra` is the teacher and the rest.
      tiles: what the same take beyond that, because their tiles are filled up.
      temporaries: at the most at one time, during the step; activations are the larger part.
      kept: activations that the gradient asks for as the program is written; the compiler keeps fewer or more.
      code: the program itself, which lies in the same memory; 0 where the compiler does not say.
      flops, moved: of a step; 0 where the compiler does not count them.
      collectives: (kind, bytes, count).
      products: matrix products and convolutions, by kind.
      too_large: the compiler's words where the step does not fit; all other figures but those of the state are 0 then.
    """

    parameters: int
    optimizer: int
    extra: int
    batch: int
    kept: int
    compile_s: float = 0.0
    tiles: int = 0
    temporaries: int = 0
    code: int = 0
    flops: float = 0.0
    moved: float = 0.0
    collectives: Sequence[tuple[str, int, int]] = ()
    products: Sequence[padding.Product] = ()
    too_large: str = ""

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Program":
        """What `dataclasses.asdict` made of one."""
        return cls(**fields | {"products": [padding.Product(**product) for product in fields["products"]]})

    @property
    def state_and_batch(self) -> int:
        return self.parameters + self.optimizer + self.extra + self.batch + self.tiles

    @property
    def total(self) -> int:
        return self.state_and_batch + self.temporaries + self.code


def compile_step(config: ConfigDict, devices: Sequence[jax.Device], unit: int = 128) -> Program:
    """The step as `alice_jax.train` would run it on `devices`, the whole batch at once.

    Args:
      unit: side of the devices' matrix unit.
    """
    if config.precision == "auto":
        config = config.copy_and_resolve_references()
        config.precision = "bfloat16"  # what "auto" means on an accelerator
    mesh, rules = sharding.make_mesh(devices, config.mesh.parameters), config.mesh.rules
    here = sharding.make_mesh(jax.devices()[:1])
    if sharding.parts_of_batch(config.batch_size, config.microbatch, mesh) > 1:
        raise UserError(f"microbatch {config.microbatch}: only whole batches are compiled ahead; set it to 0")
    objective = tasks.pretrain.objective(config, steps_per_epoch=1)
    rows = tasks.pretrain.batch_shapes(config)
    one = {name: jax.ShapeDtypeStruct((1, *row.shape[1:]), row.dtype) for name, row in rows.items()}
    state = jax.eval_shape(sharding.compiled_init(objective, 0, here, rules), one)
    place = sharding.by_sample(mesh)
    batch = {name: jax.ShapeDtypeStruct(row.shape, row.dtype, sharding=place) for name, row in rows.items()}
    given = sharding.described(state, mesh, rules)
    sizes = Program(
        parameters=_bytes(given.params),
        optimizer=_bytes(given.opt_state),
        extra=_bytes((given.extra, given.step)),
        batch=_bytes(batch),
        kept=_kept(objective, state, one) * config.batch_size // len(devices),
    )
    step = jax.jit(sharding.compiled_step(objective, jax.random.key(0), mesh, 1, rules), donate_argnums=0)
    began = time.perf_counter()
    lowered = step.lower(given, [batch])
    try:
        program: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(sizes, too_large=str(error).splitlines()[0])
    memory = program.memory_analysis()
    counted = dataclasses.replace(
        sizes,
        compile_s=time.perf_counter() - began,
        tiles=memory.argument_size_in_bytes - sizes.state_and_batch,
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives=collectives.found(text := program.as_text()),
    )
    if sharding.platform(mesh) != "tpu":  # the compiler for GPUs counts no operations
        return counted
    cost = program.cost_analysis()
    return dataclasses.replace(
        counted,
        code=memory.generated_code_size_in_bytes,
        flops=cost["flops"],
        moved=cost["bytes accessed"],
        products=padding.by_kind(padding.products(text, unit)),
    )


def _bytes(tree: Tree) -> int:
    """Of described arrays, on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _kept(objective: Any, state: Tree, batch: Tree) -> int:
    """Bytes that the gradient of the loss of a batch keeps from its forward half, beside what it was given."""

    def residuals(params: Tree, batch: Tree) -> list[jax.Array]:
        key, extra, step = jax.random.key(0), state.extra, state.step
        zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), (extra, step))
        return jax.tree.leaves(jax.vjp(lambda p: objective.loss(p, zeros[0], batch, key, zeros[1], True)[0], params)[1])

    jaxpr = jax.make_jaxpr(residuals)(state.params, batch).jaxpr
    given = {id(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
    kept = {id(var): var.aval for var in jaxpr.outvars if id(var) not in given}
    return sum(aval.size * aval.dtype.itemsize for aval in kept.values())
