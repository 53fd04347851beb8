"""Computes an update again that a run left out, and says where its numbers went wrong.

    python -m alice_jax.reproduce --workdir DIR [--step N]

The batch and the state before the update lie in DIR/broken/N. For a run of one process, devices of the same kind and
number give the same numbers bit for bit; otherwise they differ by rounding. Exits with 0 if the update is broken here
too, and with 1 if it is not.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from alice_jax import broken, builtin, checkpoint, cli, host, layout, numerics, sharding, tasks, train_state
from alice_jax.data.store import Store
from alice_jax.errors import UserError
from alice_jax.objectives import Objective
from alice_jax.train_state import TrainState

SHOWN = 5  # layers before the first broken one, and gradients


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    host.settle()
    update = broken.read(args.workdir, args.step)
    config = ConfigDict(checkpoint.read_config(args.workdir))
    if not config:
        raise UserError(f"--workdir {args.workdir}: its config.json is missing; restore it")
    objective = tasks.make(config, Store.open(config.data.store or builtin.path_for(config.objective))).objective
    parts, samples, key = update.batch(), update.samples(), jax.random.key(config.seed)
    devices = jax.devices()[: math.gcd(jax.device_count(), len(samples) // len(parts))]
    divided = config.get("mesh", ConfigDict({"parameters": 1, "rules": layout.RULES}))  # runs of older versions: none
    mesh, rules = sharding.make_mesh(devices, math.gcd(len(devices), divided.parameters)), divided.rules
    batch = [sharding.global_batch(mesh, part) for part in parts]
    shapes = jax.eval_shape(sharding.compiled_init(objective, config.seed, mesh, rules), samples[0])
    state = broken.state_before(args.workdir, update.step, sharding.described(shapes, mesh, rules))

    broken_numbers = [sum(int(np.sum(~np.isfinite(x))) for x in sample.values()) for sample in samples]
    alone = losses_alone(objective, key, state, samples)
    part, gradients, layers = first_broken_part(objective, key, state, batch)
    train_step = sharding.compiled_step(objective, key, mesh, len(parts), rules)  # the last, since it takes the state
    now = {name: float(value) for name, value in jax.device_get(train_step(state, batch)[1]).items()}

    first = next((i for i, layer in enumerate(layers) if layer.not_finite), len(layers) - 1)
    shown = layers if args.all else layers[max(first - SHOWN, 0) : first + 2]
    largest = sorted(gradients, key=lambda name: np.nan_to_num(gradients[name], nan=math.inf), reverse=True)
    scans = [", ".join(names) for names in update.scans]
    print(f"step {update.step} of {args.workdir}: {len(samples)} samples in {len(parts)} part(s)\n")
    print_table(
        ("metric", "in the run", "here"),
        *((name, f"{update.metrics[name]:.9g}", f"{value:.9g}") for name, value in now.items()),
    )
    print_table(
        ("sample", "scans", "not finite", "loss alone, without noise"),
        *((f"{i}", scans[i], f"{broken_numbers[i]}", f"{alone[i]:.4g}") for i in range(len(samples))),
    )
    print_table(
        (f"output in part {part}, in order", "largest", "not finite"),
        *((layer.name, f"{layer.largest:.4g}", f"{layer.not_finite}") for layer in shown),
    )
    print_table(
        (f"layer in part {part}", "norm of its gradient"),
        *((name, f"{gradients[name]:.4g}") for name in (gradients if args.all else largest[:SHOWN])),
    )
    print(verdict([scans[i] for i, count in enumerate(broken_numbers) if count], layers[first], now))
    return 0 if numerics.not_finite(now) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m alice_jax.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the folder of a run")
    parser.add_argument("--step", type=int, metavar="N", help="of the update (default: the newest)")
    parser.add_argument("--all", action="store_true", help="every layer, not only those around the first broken one")
    return parser.parse_args(argv)


def losses_alone(
    objective: Objective, key: jax.Array, state: TrainState, samples: Sequence[Mapping[str, np.ndarray]]
) -> list[float]:
    """The loss of each sample as a batch of its own, as validation computes it."""
    eval_step = jax.jit(train_state.make_eval_step(objective, key))
    return [float(eval_step(state, sample)[0]["loss"]) for sample in samples]


def first_broken_part(
    objective: Objective, key: jax.Array, state: TrainState, batch: Sequence[Mapping[str, jax.Array]]
) -> tuple[int, dict[str, float], list[numerics.Layer]]:
    """The first part with a loss or gradient that is not finite, or the last one; its gradients' norms and layers."""
    watched = dataclasses.replace(objective, loss=numerics.with_layers(objective.loss))
    part_of = jax.jit(train_state.make_partial_steps(watched, key, parts=1)[0])
    for index, part in enumerate(batch):
        gradients, _, metrics = jax.device_get(part_of(state, part, index))
        norms = numerics.norm_by_layer(gradients)
        if not all(map(math.isfinite, (metrics["loss"], *norms.values()))):
            break
    return index, norms, numerics.layers_of(metrics)


def verdict(inputs: Sequence[str], layer: numerics.Layer, now: Mapping[str, float]) -> str:
    """One line that says where the numbers go wrong.

    Args:
      inputs: the scans of each sample that has such a number itself.
      layer: the first with an output that is not finite, if there is one.
      now: metrics.
    """
    still = numerics.not_finite(now)
    if not still:
        return "not reproduced: every number is finite here"
    words = f"reproduced: {', '.join(still)} not finite"
    if inputs:
        return f"{words}; nor are the samples of {'; '.join(inputs)}"
    if layer.not_finite:
        return f"{words}, first in the output of {layer.name}"
    terms = [name for name, value in now.items() if name.startswith("loss_") and not math.isfinite(value)]
    if terms:
        return f"{words}, though every layer is finite: in {' and '.join(terms)}"
    if "gradient_norm" in still:
        return f"{words}, though the loss is finite"
    return f"{words}, though loss and gradient are finite: the update itself is too large; lower optimizer.lr"


def print_table(*rows: Sequence[str]) -> None:
    """Columns of text, all but the first to the right; the first row is the header."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    for row in rows:
        print(f"{row[0]:{first}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], others, strict=True)), sep="  ")
    print()


if __name__ == "__main__":
    cli.run(main)
