"""From a configuration to what the training loop needs: an objective and its samples.

The one place inside the package that reads configuration fields; everything below takes plain arguments.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from alice_jax import checkpoint, collapse, schedules
from alice_jax.data.embedder_views import Distortion, EmbedderSampler
from alice_jax.data.embeddings import EmbeddingReader, read_codec
from alice_jax.data.partners import read_patients
from alice_jax.data.pipeline import Sampler
from alice_jax.data.store import Store
from alice_jax.data.views import WEAK, PairSampler
from alice_jax.errors import UserError
from alice_jax.interop import embedder as embedder_weights
from alice_jax.models.embedder import Embedder, strides_zyx
from alice_jax.objectives import Objective, alice, embedder


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run optimises and on what.

    Attributes:
      objective: the device side.
      sampler: the host side, over `scans`.
      scans: the training scans.
      validation_sampler, validation_scans: the same over the scans held out.
      volumes_per_sample: crops that a sample carries, for the throughput.
    """

    objective: Objective
    sampler: Sampler
    scans: tuple[str, ...]
    validation_sampler: Sampler
    validation_scans: tuple[str, ...]
    volumes_per_sample: int = 2


def make(config: ConfigDict, store: Store) -> Task:
    """The task that `config.objective` names."""
    if config.objective not in TASKS:
        raise UserError(f"objective {config.objective!r}: choose one of {', '.join(TASKS)}")
    return TASKS[config.objective](config, store)


def healthy_ranges(config: ConfigDict) -> collapse.Ranges:
    """What metrics of held-out scans keep to unless features collapse; none if that is to be ignored."""
    limits = config.numerics
    if limits.collapse not in collapse.ACTIONS:
        raise UserError(f"numerics.collapse {limits.collapse!r}: choose {', '.join(collapse.ACTIONS)}")
    if limits.collapse == "ignore":
        return {}
    ranges = {"variance": (limits.variance, math.inf), "effective_rank": (limits.effective_rank, math.inf)}
    if "entropy" in limits:
        low, high = (share * math.log(config.model.prototypes) for share in limits.entropy)
        ranges["teacher_entropy"] = (low, high)
    return {f"validation/{name}": limit for name, limit in ranges.items()}


def split(
    scans: Sequence[str], fraction: float, at_least: int, patients: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and validation scans: at least `at_least` on either side, or none held out.

    Those held out are evenly spaced over the sorted ids.

    Args:
      patients: of the scans; those of one patient stay together, and patients are what is counted.

    >>> split(["a", "b", "c", "d"], 0.25, at_least=1)
    (('b', 'c', 'd'), ('a',))
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.validation_fraction {fraction}: give a share of the scans from 0 to below 1")
    patient_of = {scan: patients.get(scan, scan) if patients else scan for scan in scans}
    names = list(dict.fromkeys(patient_of.values()))
    count = max(at_least, round(fraction * len(names))) if fraction else 0
    if len(names) - count < at_least:
        count = 0
    held_out = {names[i * len(names) // count] for i in range(count)}
    return tuple(s for s in scans if patient_of[s] not in held_out), tuple(
        s for s in scans if patient_of[s] in held_out
    )


def compute_dtype(precision: str) -> Any:
    """The dtype of matmuls and convolutions; parameters, normalisation, softmax and losses stay in float32."""
    if precision == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if precision not in ("float32", "bfloat16"):
        raise UserError(f"precision {precision!r}: choose auto, float32 or bfloat16")
    return jnp.dtype(precision)


def alice_networks(config: ConfigDict) -> alice.Alice:
    """The networks of a pretraining configuration; export and report build them from a workdir's config."""
    model, mode_name = config.model, config.method.mode
    if mode_name not in alice.MODES:
        raise UserError(f"method.mode {mode_name!r}: choose paper or release")
    mode, dtype = alice.MODES[mode_name], compute_dtype(config.precision)
    release = mode_name == "release"
    casa_width = model.prototypes if mode.casa_on == "logits" else model.bottleneck
    if casa_width % model.casa_heads:
        raise UserError(f"model.casa_heads {model.casa_heads}: must divide the width of the alignment, {casa_width}")
    return alice.Alice(
        mode=mode,
        backbone=alice.NNFormer(
            width=model.width,
            depths=tuple(model.depths),
            heads=tuple(model.heads),
            windows=tuple(model.windows),
            drop_path=model.drop_path,
            position_index="release" if release else "correct",
            mask_tokens=not release,
            remat=tuple(model.get("remat", ())),  # runs of older versions have none
            dtype=dtype,
        ),
        head=alice.Head(
            width=model.width * 2 ** (len(model.depths) - 1),
            hidden=model.head_hidden,
            bottleneck=model.bottleneck,
            prototypes=model.prototypes,
            token_prototypes=model.prototypes,
            separate_last=True,
            dtype=dtype,
        ),
        casa=alice.CASA(
            width=casa_width,
            inner=model.casa_inner,
            heads=model.casa_heads,
            head_dim=casa_width // model.casa_heads,
            dropout=0.1 if release else 0.0,
            query_residual=release,
            dtype=dtype,
        ),
        weights=alice.Weights(**config.loss),
        mask_ratio=config.views.mask_ratio,
    )


def alice_schedules(config: ConfigDict, steps_per_epoch: int) -> dict[str, Callable[[Any], Any]]:
    """Every scalar of the recipe as a function of the step."""
    method, optimizer, total = config.method, config.optimizer, config.steps
    peak, start = optimizer.lr, 0.0
    if method.mode == "release":
        peak *= config.batch_size / 256
    warmup = schedules.duration(optimizer.warmup, "optimizer.warmup", steps_per_epoch, total)
    temperature_warmup = schedules.duration(
        method.temperature_warmup, "method.temperature_warmup", steps_per_epoch, total
    )
    decay_from, decay_to = optimizer.weight_decay
    momentum_from, momentum_to = method.teacher_momentum

    def temperature(step):
        index, length = step, temperature_warmup
        if method.mode == "release":  # one value an epoch
            index, length = step // steps_per_epoch, temperature_warmup // steps_per_epoch
        return schedules.ramp(index, *method.teacher_temperature, length)

    return {
        "learning_rate": lambda step: schedules.warmup_cosine(step, peak, optimizer.min_lr, total, warmup, start),
        "weight_decay": lambda step: schedules.warmup_cosine(step, decay_from, decay_to, total),
        "momentum": lambda step: schedules.warmup_cosine(step, momentum_from, momentum_to, total),
        "temperature_cls": temperature,
        "temperature_tokens": temperature,
    }


def alice_objective(config: ConfigDict, steps_per_epoch: int) -> Objective:
    """Networks, losses and recipe of a pretraining configuration."""
    held = config.method.freeze_last_layer
    return alice.make(
        alice_networks(config),
        **alice_schedules(config, steps_per_epoch),
        clip=config.optimizer.clip,
        held_steps=schedules.duration(held, "method.freeze_last_layer", steps_per_epoch, config.steps),
    )


def check_alice(config: ConfigDict) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Crop shape and mask grid, one cell for each last-stage token; refuses what the networks cannot take."""
    crop = tuple(config.views.crop_shape_zyx)
    stride = 2 ** len(config.model.depths)
    if len(crop) != 3 or any(size <= 0 or size % stride for size in crop):
        raise UserError(f"views.crop_shape_zyx {crop}: give three multiples of {stride}")
    if config.views.kind not in ("mined", "random"):
        raise UserError(f"views.kind {config.views.kind!r}: choose mined or random")
    for name, choices in (("weak", WEAK), ("same_patient", ("avoid", "allow")), ("partners", ("region", "any"))):
        if config.views[name] not in choices:
            raise UserError(f"views.{name} {config.views[name]!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")
    if not 0 <= config.views.weak_weight <= 1:
        raise UserError(f"views.weak_weight {config.views.weak_weight}: give a weight from 0 to 1")
    if not config.views.cycle_mm > 0:
        raise UserError(f"views.cycle_mm {config.views.cycle_mm}: give a distance above 0 mm")
    if not 0 <= config.views.agreeing <= 1:
        raise UserError(f"views.agreeing {config.views.agreeing}: give a share from 0 to 1")
    for name in ("tries", "tries_per_partner"):
        if config.views[name] < 1:
            raise UserError(f"views.{name} {config.views[name]}: give a whole number of 1 or more")
    ratio = config.views.mask_ratio
    if isinstance(ratio, bool) or not 0 < ratio < 1:
        raise UserError(f"views.mask_ratio {ratio}: give a share between 0 and 1")
    if not any(config.loss.values()) or any(weight < 0 for weight in config.loss.values()):
        raise UserError(f"loss {dict(config.loss)}: the weights must be 0 or more, one of them above 0")
    grid = tuple(size // stride for size in crop)
    if math.prod(grid) - math.ceil(ratio * math.prod(grid)) < 1:
        raise UserError(f"views.mask_ratio {ratio}: hides all {math.prod(grid)} cells of the crop {crop}")
    return crop, grid


def alice_scans(config: ConfigDict, store: Store) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]:
    """Training scans, validation scans, and the patients of all; refuses a store in which nothing can be paired."""
    ids = store.ids()
    if len(ids) < 2:
        raise UserError(f"data.store {store.path}: holds {len(ids)} scans and a pair needs two; prepare more")
    patients = {id: store.scan(id).patient for id in ids}
    patients |= read_patients(config.data.patients) if config.data.patients else {}
    if config.views.same_patient == "allow":
        return *split(ids, config.data.validation_fraction, at_least=2), patients
    for what, count in (
        ("of one patient", len({patients[id] for id in ids})),
        ("copies of one scan", len({store.scan(id).sha256 for id in ids})),
    ):
        if count < 2:
            raise UserError(
                f"data.store {store.path}: its {len(ids)} scans are all {what} and a pair needs two; prepare more, "
                "name the patients in data.patients, or set views.same_patient to allow"
            )
    return *split(ids, config.data.validation_fraction, at_least=2, patients=patients), patients


def alice_task(config: ConfigDict, store: Store) -> Task:
    """Pretraining on pairs mined from a store."""
    crop, grid = check_alice(config)
    scans, validation_scans, patients = alice_scans(config, store)
    embeddings = EmbeddingReader(store) if config.views.kind == "mined" else None

    def sampler(ids: tuple[str, ...]) -> PairSampler:
        return PairSampler(
            store=store,
            embeddings=embeddings,
            scan_ids=ids,
            crop_shape_zyx=crop,
            mask_grid=grid,
            mask_ratio=config.views.mask_ratio,
            column_masks=alice.MODES[config.method.mode].share_mask,
            threshold=config.views.threshold,
            cycle_mm=config.views.cycle_mm,
            agreeing=config.views.agreeing,
            tries_per_partner=config.views.tries_per_partner,
            tries=config.views.tries,
            weak=config.views.weak,
            weak_weight=config.views.weak_weight,
            by_region=config.views.partners == "region",
            same_patient=config.views.same_patient,
            patients=patients,
        )

    return Task(
        objective=alice_objective(config, steps_per_epoch=math.ceil(len(scans) / config.batch_size)),
        sampler=sampler(scans),
        scans=scans,
        validation_sampler=sampler(validation_scans),
        validation_scans=validation_scans,
    )


def embedder_network(model: Mapping[str, Any], dtype: Any) -> Embedder:
    """The network of an embedder's configuration (`config.model`, from a ConfigDict or a workdir's config.json)."""
    fixed = {name: _tuples(value) for name, value in model.items() if name != "statistics_momentum"}
    if any(len(fixed[name]) != 4 for name in ("channels", "blocks", "stage_strides_zyx", "stage_kernels_zyx")):
        raise UserError("model.channels, blocks, stage_strides_zyx, stage_kernels_zyx: give four values, one per stage")
    return Embedder(**fixed, dtype=dtype)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def start_values(path: str, network: Embedder) -> dict[str, Any]:
    """Weights to start an embedder from: those of another run's workdir, or of a PyTorch file."""
    if not os.path.isdir(path):
        return embedder_weights.load(path, network)
    config = checkpoint.read_config(path) or {}
    if config.get("objective") != "embedder" or embedder_network(config["model"], network.dtype) != network:
        raise UserError(f"init_from {path}: not a run of this embedder; give the workdir of one with the same model.*")
    _, state = checkpoint.restore_arrays(path)
    return {"params": state["params"], "batch_stats": state["extra"]["batch_stats"]}


def check_embedder(config: ConfigDict, store: Store, network: Embedder) -> None:
    """Refuses settings that do not fit the store or the network."""
    spacing, views = tuple(store.manifest["spacing_zyx_mm"]), config.views
    if any(abs(s - config.data.spacing_mm) > 1e-3 for s in spacing):
        raise UserError(
            f"data.spacing_mm {config.data.spacing_mm}: the store {store.path} has {spacing} mm; prepare the scans "
            f"again with --spacing {config.data.spacing_mm}, or set data.spacing_mm to train for the store's"
        )
    fine, coarse = strides_zyx(network)
    shifts = config.storage.shifts
    if shifts < 1 or any(views.reduce * step % (2 * shifts) for step in fine):
        raise UserError(
            f"storage.shifts {shifts}, views.reduce {views.reduce}: a fine cell spans "
            f"{tuple(views.reduce * step for step in fine)} voxels of the store; each must be a multiple of 2·shifts"
        )
    if any(size <= 0 or size % step for size, step in zip(views.shape_zyx, coarse, strict=True)):
        raise UserError(f"views.shape_zyx {views.shape_zyx}: give multiples of the coarse stride {coarse}")
    for name in ("reduce", "pairs"):
        if views[name] < 1:
            raise UserError(f"views.{name} {views[name]}: give a whole number of 1 or more")
    if not 0 <= views.partner_share <= 1:
        raise UserError(f"views.partner_share {views.partner_share}: give a share from 0 to 1")
    if views.partner_share and read_codec(store) is None:
        raise UserError(
            f"views.partner_share {views.partner_share}: pairs of patients need embeddings and {store.path} has none; "
            "train with 0 first, run alice_jax.embed, then train again with init_from set to the first workdir"
        )
    if not views.window_hu[0] < views.window_hu[1]:
        raise UserError(f"views.window_hu {views.window_hu}: give the lowest and the highest HU")
    if not 0 < views.scale[0] <= 1 <= views.scale[1]:
        raise UserError(f"views.scale {views.scale}: give the smallest and the largest zoom, around 1")


def embedder_task(config: ConfigDict, store: Store) -> Task:
    """The anatomical embedder on views of single scans."""
    network = embedder_network(config.model.to_dict(), compute_dtype(config.precision))
    check_embedder(config, store, network)
    scans, validation_scans = split(store.ids(), config.data.validation_fraction, at_least=1)
    if not scans:
        raise UserError(f"data.store {store.path}: holds no scans; prepare some")
    optimizer, views = config.optimizer, config.views
    steps_per_epoch = math.ceil(len(scans) / config.batch_size)
    warmup = schedules.duration(optimizer.warmup, "optimizer.warmup", steps_per_epoch, config.steps)

    def learning_rate(step):
        return schedules.warmup_cosine(step + 1, optimizer.lr, optimizer.min_lr, config.steps + 1, warmup)

    if optimizer.kind == "sgd":
        update = optax.sgd(learning_rate, momentum=optimizer.momentum)
        update = optax.chain(optax.add_decayed_weights(optimizer.weight_decay), update)
    elif optimizer.kind == "adamw":
        update = optax.adamw(learning_rate, b2=optimizer.b2, weight_decay=optimizer.weight_decay)
    else:
        raise UserError(f"optimizer.kind {optimizer.kind!r}: choose sgd or adamw")
    if optimizer.clip:
        update = optax.chain(optax.clip_by_global_norm(optimizer.clip), update)
    contrasts = {level: embedder.Contrast(**config.loss[level]) for level in ("fine", "coarse", "joint")}
    if not any(contrast.weight > 0 for contrast in contrasts.values()):
        raise UserError("loss: every weight is 0; set loss.fine.weight, loss.coarse.weight or loss.joint.weight")
    distortion = Distortion(**{f.name: views[f.name] for f in dataclasses.fields(Distortion)})

    def sampler(ids: tuple[str, ...]) -> EmbedderSampler:
        return EmbedderSampler(
            store=store,
            scan_ids=ids,
            shape_zyx=tuple(views.shape_zyx),
            fine_stride_zyx=strides_zyx(network)[0],
            reduce=views.reduce,
            pairs=views.pairs,
            positive_mm=views.positive_mm,
            shift=views.shift,
            window_hu=tuple(views.window_hu),
            distortion=distortion,
            partner_share=views.partner_share,
            embeddings=EmbeddingReader(store) if views.partner_share else None,
        )

    return Task(
        objective=embedder.make(
            network,
            contrasts,
            candidates=config.loss.candidates,
            statistics_momentum=config.model.statistics_momentum,
            optimizer=update,
            schedules={"learning_rate": learning_rate},
            start=start_values(config.init_from, network) if config.init_from else None,
        ),
        sampler=sampler(scans),
        scans=scans,
        validation_sampler=sampler(validation_scans),
        validation_scans=validation_scans,
    )


TASKS = {"alice": alice_task, "embedder": embedder_task}
