"""The training loop, for every objective.

    python -m alice_jax.train --config=configs/pretrain.py [--config.data.store=DIR] [--workdir=DIR]

Any field of the configuration is set by --config.FIELD=VALUE. Running the same command again resumes. SIGTERM or
Ctrl-C finishes the step, saves and exits with 128 + the signal's number; a second one exits at once.

The order of a step, on which exact resuming rests:
  1. global batch k, a pure function of (seed, k), is consumed by the update from step k to k + 1;
  2. while an update runs, the next batch is fetched; then the update's numbers are examined;
  3. an update with a number that is not finite changes nothing but the step; the run stops, or goes on if it may;
  4. a state is validated or saved only between updates.
"""

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from alice_jax import (
    broken,
    builtin,
    checkpoint,
    cli,
    collapse,
    contract,
    coverage,
    distributed,
    host,
    layout,
    provenance,
    report,
    settings,
    sharding,
    tasks,
    train_state,
)
from alice_jax.data import embeddings, pipeline
from alice_jax.data.copies import Copies
from alice_jax.data.store import Store
from alice_jax.errors import UserError
from alice_jax.metrics import Metrics
from alice_jax.objectives import Objective
from alice_jax.preemption import StopSignal


def run(config: ConfigDict, workdir: str) -> int:
    """Trains to `config.steps`; returns 0, or 128 + the number of the signal that stopped it."""
    settings.check(config)
    settings.claim(workdir, config)

    # ---- Data, objective, devices
    copies = Copies(os.path.join(host.cache(), "copies"), round(config.data.cache_gb * 1e9))
    store = Store.open(config.data.store or built_in_store(config), copies if config.data.cache_gb else None)
    say(f"reading the store {store.path}")
    task = tasks.make(config, store)
    mesh, rules = sharding.make_mesh(parameters=config.mesh.parameters), config.mesh.rules
    parts = sharding.parts_of_batch(config.batch_size, config.microbatch, mesh)
    say(
        f"{len(task.scans)} scans to train on, {len(task.validation_scans)} held out; {config.batch_size} samples "
        f"a step, in {parts} part(s) on {mesh.size} {jax.default_backend()} device(s)"
    )
    for note in task.notes:
        say(note)

    # ---- State, made on its devices or restored
    key = jax.random.key(config.seed)
    init = sharding.compiled_init(task.objective, config.seed, mesh, rules)
    example = example_batch(task)
    described = sharding.described(jax.eval_shape(init, example), mesh, rules)
    if config.mesh.parameters > 1:
        say(layout.summary(described.params, mesh, rules))
    checkpoints = checkpoint.Checkpoints(workdir, config.keep_checkpoints)
    checkpoints.check_space(described)
    counted: dict[str, Any] = {}  # by the host, beside the state
    start = checkpoints.latest_step
    if start is None:
        start, state = 0, init(example)
    else:
        state, counted = checkpoints.restore(start, described)
        if "contract" in counted:
            before = contract.Contract.from_json(counted["contract"], f"--workdir {workdir}")
            contract.check(before, task.contract, f"--workdir {workdir}")
        say(f"resuming at step {start} of {config.steps}")
    if jax.process_index() == 0:
        mined = config.objective == "alice" and config.views.kind == "mined"
        codec = embeddings.read_codec(store) if mined else None
        provenance.record(workdir, start, None if codec is None else codec.embedder)
        if counted:
            coverage.write(workdir, start, counted["coverage"])
    train_step = sharding.compiled_step(task.objective, key, mesh, parts, rules)
    eval_step = sharding.compiled_eval(task.objective, key, mesh, rules)
    ranges = tasks.healthy_ranges(config)

    # ---- Batches
    validation = validation_batches(config, task, mesh, config.batch_size // parts)
    stream = training_batches(config, task, start)
    used_scans = coverage.Coverage(task.scans, counted.get("coverage"))
    watch = broken.Watch(workdir, allowed=config.numerics.skip, start=start, scans=task.scans, parts=parts)

    def next_batch() -> tuple[list[dict[str, jax.Array]], pipeline.Sample, float]:
        began = time.perf_counter()
        rows = next(stream)
        arrays = {name: values for name, values in rows.items() if name != "meta"}
        return sharding.global_parts(mesh, arrays, parts), rows, time.perf_counter() - began

    # ---- The loop
    metrics = Metrics(
        workdir,
        first_step=start,
        total_steps=config.steps,
        log_every=config.log_every,
        since=counted.get("since_logged"),
        enabled=jax.process_index() == 0,
    )
    with checkpoints, metrics, StopSignal() as stop:
        batch, rows, _ = next_batch()
        for done in range(start + 1, config.steps + 1):
            began = time.perf_counter()
            with jax.transfer_guard("disallow"):
                state, on_device = train_step(state, batch)
            used = rows
            batch, rows, data_wait = next_batch()
            scalars = {name: float(value) for name, value in jax.device_get(on_device).items()}
            noted = sharding.of_all_processes(used["meta"])
            step_time = time.perf_counter() - began
            if left_out := watch.examine(done, scalars, state, used):
                metrics.say(left_out)
                scalars = {name: value for name, value in scalars.items() if math.isfinite(value)}

            scalars |= used_scans.count(noted["scans"]) | view_metrics(noted)
            scalars |= {
                "skipped_updates": watch.skipped,
                "step_time_s": step_time,
                "data_wait_s": data_wait,
                "volumes_per_s": config.batch_size * task.volumes_per_sample / step_time,
            }
            metrics.step(done, scalars)
            last, collapsed = done == config.steps, ""
            if validation and (last or done % config.validate_every == 0):
                held_out = validated(task.objective, eval_step, state, validation)
                metrics.write(done, held_out)
                collapsed = collapse.judged(held_out, ranges)
                if collapsed and config.numerics.collapse != "stop":
                    metrics.say(f"step {done}: {collapsed}")
                    collapsed = ""
            stopping = stop.agreed()
            if last or stopping or collapsed or done % config.checkpoint_every == 0:
                counted = {
                    "coverage": used_scans.counted(),
                    "since_logged": metrics.since_logged,
                    "contract": task.contract.to_json(),
                }
                checkpoints.save(done, state, counted)
                if jax.process_index() == 0:
                    coverage.write(workdir, done, counted["coverage"])
            if collapsed:
                raise UserError(f"step {done}: {collapsed}; saved; numerics.collapse=warn would go on all the same")
            if stopping and not last:
                metrics.say(f"stopped by signal {stopping} after step {done}; the same command goes on from there")
                return 128 + stopping
    conclude(config, workdir)
    return 0


def built_in_store(config: ConfigDict) -> str:
    """The path of the built-in cohort, with embeddings where pairs are mined with them."""
    mined = config.objective == "alice" and config.views.kind == "mined"
    if jax.process_count() > 1 and not builtin.made(mined):
        raise UserError(
            "data.store: not set, and the built-in cohort is not there yet; run the same command in one process first, "
            "which makes it, or set data.store"
        )
    if config.objective == "classification":
        return builtin.labelled_patients()
    return builtin.embedded_patients(run) if mined else builtin.patients()


def conclude(config: ConfigDict, workdir: str) -> None:
    """Writes the report and says where everything lies; for one process."""
    if jax.process_index():
        return
    if config.objective == "alice" and not config.data.store and config.views.kind == "mined":
        say(f"matching by the embedder that mined the pairs: {builtin.matching_summary()}")
    workdir = os.path.abspath(workdir)
    files = {"weights": "checkpoints", "logs": "metrics.jsonl", "TensorBoard": "tensorboard", "report": "report.html"}
    say(f"finished {config.steps} steps; writing the report")
    try:
        report.write_report(os.path.join(workdir, files["report"]), workdir=workdir)
    except UserError as error:  # the run itself is complete and saved
        say(f"no report: {error}")
        del files["report"]
    for what, name in files.items():
        say(f"  {what:12}{os.path.join(workdir, name)}")


def example_batch(task: tasks.Task) -> dict[str, np.ndarray]:
    """One sample as a batch, for its shapes; drawing it also shows early whether the store can be read."""
    sample = task.sampler(0, np.random.default_rng(0), np.random.default_rng(0))
    return {name: value[None] for name, value in sample.items() if name != "meta"}


def training_batches(config: ConfigDict, task: tasks.Task, start: int) -> Iterator[pipeline.Sample]:
    """This process's part of the batches from step `start` on."""
    samples = pipeline.Samples(
        sampler=task.sampler,
        records=len(task.scans),
        seed=config.seed,
        global_batch=config.batch_size,
        steps=config.steps + 1,  # one more, since the next batch is fetched while the last update runs
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    data = config.data
    return pipeline.batches(
        samples, start_step=start, workers=data.workers, threads=data.threads, timeout_s=data.timeout_s
    )


def validation_batches(config: ConfigDict, task: tasks.Task, mesh: Mesh, at_once: int) -> list[dict[str, jax.Array]]:
    """The same samples of held-out scans at every validation, in batches of what the devices compute at once."""
    if not task.validation_scans:
        say("too few scans to hold any out: no validation")
        return []
    samples = pipeline.Samples(
        sampler=task.validation_sampler,
        records=len(task.validation_scans),
        seed=config.seed,
        global_batch=at_once,
        steps=math.ceil((config.data.validation_samples or len(task.validation_scans)) / at_once),
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    batches = []
    for rows in pipeline.batches(samples, threads=config.data.threads, timeout_s=config.data.timeout_s):
        rows.pop("meta")
        batches.append(sharding.global_batch(mesh, rows))
    return batches


def validated(
    objective: Objective, eval_step: Any, state: train_state.TrainState, batches: list[dict[str, jax.Array]]
) -> dict[str, float]:
    """Mean metrics over the held-out scans, the spread of their features, and what the objective judges of all."""
    results, features, predictions = zip(*(jax.device_get(eval_step(state, batch)) for batch in batches), strict=True)
    means = {name: float(np.mean([r[name] for r in results])) for name in results[0]}
    judged = objective.judge({name: np.concatenate([p[name] for p in predictions]) for name in predictions[0]})
    return {f"validation/{name}": value for name, value in (means | collapse.spread(features) | judged).items()}


def view_metrics(meta: dict[str, np.ndarray]) -> dict[str, float]:
    """Means of what the sampler noted of this batch's samples, over those for which it is known."""
    known = {name: values[np.isfinite(values)] for name, values in meta.items() if values.ndim == 1}
    return {f"views/{name}": float(np.mean(values)) for name, values in known.items() if len(values)}


def say(text: str) -> None:
    """One line for the user, from one process only."""
    if jax.process_index() == 0:
        cli.say(text)


_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file, such as configs/pretrain.py:tiny")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of this run; runs/NAME-OF-THE-CONFIG by default")


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line and runs."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help", "--helpfull"} & set(arguments):
        print(__doc__)
        print("Flags:\n  --config   configuration file, such as configs/pretrain.py:tiny; its fields are in the file")
        print("  --workdir  folder of this run; runs/NAME-OF-THE-CONFIG by default")
        print("  --distributed  one run of all processes that a cluster has started: srun, TPU hosts, Open MPI")
        print("  --coordinator=HOST:PORT --processes=N --process=I  the same without a cluster; docs/scaling.md")
        return 0
    config = cli.read_configuration(flags.FLAGS, _CONFIG, arguments)
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    host.settle()
    workdir = _WORKDIR.value or os.path.join("runs", os.path.basename(name).replace(".py", "").replace(":", "-"))
    with distributed.by_flags(facts(config, workdir)):
        return run_on_disk(config, workdir)


def facts(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """What must be the same in all processes of a run."""
    fields = {f"--config.{name}": value for name, value in settings.flat(config.to_dict()).items()}
    return {**fields, "--workdir": workdir, **provenance.code()}


def run_on_disk(config: ConfigDict, workdir: str) -> int:
    """`run`, with a `UserError` for what the disk of its folder refuses."""
    with cli.on_disk(workdir, "what was saved before is intact"):
        return run(config, workdir)


if __name__ == "__main__":
    cli.run(main)
