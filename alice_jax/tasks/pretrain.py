"""Pretraining: networks, recipe and samples of `objectives/alice`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alice_jax import schedules
from alice_jax.data.cells import triple
from alice_jax.data.embeddings import EmbeddingReader
from alice_jax.data.partners import read_patients
from alice_jax.data.store import Store
from alice_jax.data.views import WEAK, WINDOW_HU, PairSampler
from alice_jax.errors import UserError, check_at_least
from alice_jax.objectives import Objective, alice
from alice_jax.tasks import backbones
from alice_jax.tasks.task import Task, check_weights, checked_crop, compute_dtype, contract_of, epoch_of, split

RANDOM_START = 0.1  # of the teacher, from which a run is warned of


def networks(config: ConfigDict) -> alice.Alice:
    """The networks of a pretraining configuration; export and report build them from a workdir's config."""
    model, mode_name = config.model, config.method.mode
    if mode_name not in alice.MODES:
        raise UserError(f"method.mode {mode_name!r}: choose paper or release")
    mode, dtype = alice.MODES[mode_name], compute_dtype(config.precision)
    release = mode_name == "release"
    casa_width = model.prototypes if mode.casa_on == "logits" else model.bottleneck
    if casa_width % model.casa_heads:
        raise UserError(f"model.casa_heads {model.casa_heads}: must divide the width of the alignment, {casa_width}")
    position_index = "release" if release else "correct"
    backbone = backbones.make(model, position_index=position_index, mask_tokens=not release, dtype=dtype)
    return alice.Alice(
        mode=mode,
        backbone=backbone,
        head=alice.Head(
            width=backbone.encoder_channels,
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


def schedules_of(config: ConfigDict, steps_per_epoch: int) -> dict[str, Callable[[Any], Any]]:
    """Every scalar of the recipe as a function of the step."""
    method, optimizer, total = config.method, config.optimizer, config.steps
    peak = optimizer.lr
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
        "learning_rate": lambda step: schedules.warmup_cosine(step, peak, optimizer.min_lr, total, warmup),
        "weight_decay": lambda step: schedules.warmup_cosine(step, decay_from, decay_to, total),
        "momentum": lambda step: schedules.warmup_cosine(step, momentum_from, momentum_to, total),
        "temperature_cls": temperature,
        "temperature_tokens": temperature,
    }


def objective(config: ConfigDict, steps_per_epoch: int) -> Objective:
    """Networks, losses and recipe of a pretraining configuration."""
    held = config.method.freeze_last_layer
    return alice.make(
        networks(config),
        **schedules_of(config, steps_per_epoch),
        clip=config.optimizer.clip,
        held_steps=schedules.duration(held, "method.freeze_last_layer", steps_per_epoch, config.steps),
    )


def lagging(momentum: Callable[[Any], Any], steps: int) -> str:
    """A warning for a run that ends before its teacher has left its random start, "" for a longer one.

    The teacher is what students imitate and what fine-tuning begins with. Its start keeps the product of all momenta.

    >>> lagging(lambda step: 0.996 + 0 * step, 500)
    'warning: 13% of the teacher will still be its random start; take more steps or a lower method.teacher_momentum'
    """
    kept = float(np.prod(momentum(np.arange(steps))))
    remedy = "take more steps or a lower method.teacher_momentum"
    return f"warning: {kept:.0%} of the teacher will still be its random start; {remedy}" if kept > RANDOM_START else ""


def check(config: ConfigDict) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Crop shape and mask grid, one cell for each encoder token; refuses what the networks cannot take."""
    stride = backbones.make(config.model).token_stride_zyx
    crop = checked_crop(config.views.crop_shape_zyx, stride)
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
        check_at_least(1, f"views.{name}", config.views[name])
    ratio = config.views.mask_ratio
    if isinstance(ratio, bool) or not 0 < ratio < 1:
        raise UserError(f"views.mask_ratio {ratio}: give a share between 0 and 1")
    check_weights(config.loss)
    grid = triple(np.array(crop) // stride)
    if math.prod(grid) - math.ceil(ratio * math.prod(grid)) < 1:
        raise UserError(f"views.mask_ratio {ratio}: hides all {math.prod(grid)} cells of the crop {crop}")
    return crop, grid


def batch_shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """What `alice.Alice.forward` and its losses are given: the arrays of a global batch."""
    crop, grid = check(config)
    pairs = config.batch_size
    return {
        "volumes": jax.ShapeDtypeStruct((pairs, 2, *crop, 1), jnp.float32),
        "hidden": jax.ShapeDtypeStruct((pairs, 2, *grid), jnp.bool_),
        "weights": jax.ShapeDtypeStruct((pairs,), jnp.float32),
    }


def divided(config: ConfigDict, store: Store) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]:
    """Training scans, validation scans, and the patients of all; refuses a store in which nothing can be paired."""
    ids = store.ids()
    if len(ids) < 2:
        raise UserError(f"data.store {store.path}: holds {len(ids)} scans and a pair needs two; prepare more")
    patients = store.patients(ids)
    patients |= read_patients(config.data.patients) if config.data.patients else {}
    if config.views.same_patient == "allow":
        return *split(ids, config.data.validation_fraction, at_least=2), patients
    for what, count in (
        ("of one patient", len({patients[id] for id in ids})),
        ("copies of one scan", len({scan.sha256 for scan in store.scans(ids)})),
    ):
        if count < 2:
            raise UserError(
                f"data.store {store.path}: its {len(ids)} scans are all {what} and a pair needs two; prepare more, "
                "name the patients in data.patients, or set views.same_patient to allow"
            )
    return *split(ids, config.data.validation_fraction, at_least=2, patients=patients), patients


def task(config: ConfigDict, store: Store) -> Task:
    """Pretraining on pairs mined from a store."""
    crop, grid = check(config)
    scans, validation_scans, patients = divided(config, store)
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

    steps_per_epoch = epoch_of(scans, config)
    late = lagging(schedules_of(config, steps_per_epoch)["momentum"], config.steps)
    return Task(
        objective=objective(config, steps_per_epoch),
        sampler=sampler(scans),
        scans=scans,
        validation_sampler=sampler(validation_scans),
        validation_scans=validation_scans,
        contract=contract_of(store, WINDOW_HU, crop),
        notes=(late,) if late else (),
    )
