"""Segmentation: network, recipe and samples of `objectives/segmentation`."""

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from alice_jax import checkpoint, contract, optimizer, pretrained, schedules
from alice_jax.contract import Contract
from alice_jax.data import label_maps, phantom_tissues
from alice_jax.data.segmentation_views import Augmentation, SegmentationSampler, read_labels
from alice_jax.data.store import Store
from alice_jax.errors import UserError, check_at_least
from alice_jax.interop.names import leaves
from alice_jax.models.backbone import Backbone
from alice_jax.objectives import segmentation
from alice_jax.tasks import backbones
from alice_jax.tasks.task import (
    Task,
    check_weights,
    checked_crop,
    compute_dtype,
    contract_of,
    epoch_of,
    learning_rate,
    listed,
    split,
)

PARTS = ("all", "encoder")
Shapes = dict[str, tuple[int, ...]]


def network_of(config: Mapping[str, Any], classes: int) -> Backbone:
    """The network of a segmentation configuration (a ConfigDict or a workdir's config.json)."""
    return backbones.make(
        config["model"],
        position_index=config["model"]["position_index"],
        mask_tokens=False,
        out_channels=classes,
        deep_supervision=config["model"]["deep_supervision"],
        dtype=compute_dtype(config["precision"]),
    )


def load(workdir: str, step: int | None = None) -> tuple[Backbone, Any, Contract]:
    """The network of a finished run, its parameters and its contract, for `network.apply({"params": params}, volume,
    method="segment")[0]`, logits (b, d, h, w, classes)."""
    config, state = checkpoint.restore_arrays(workdir, step, ("params", "host"))
    if config.get("objective") != "segmentation":
        raise UserError(f"--workdir {workdir}: objective {config.get('objective')!r}; give a run of configs/segment.py")
    agreed = Contract.from_json(state["host"].get("contract"), f"--workdir {workdir}")
    return network_of(config, len(agreed.classes)), state["params"]["backbone"], agreed


# -------------------------------------------------------------------- which scans, which classes


def classes_of(chosen: Sequence[str], store: Store, names: Mapping[int, str]) -> dict[int, str]:
    """The numbers in the labels that are to be told apart, and their names.

    chosen: names; () for all, of phantoms for those that are learnt soon.
    """
    if not names:
        raise UserError(f"data.store {store.path}: nothing says what its labels mean; prepare it with --labels")
    if not chosen and "phantom" in store.manifest["extra"]:
        chosen = phantom_tissues.LEARNT_SOON
    if absent := [name for name in chosen if name not in names.values()]:
        raise UserError(f"data.classes {absent[0]!r}: the store has {', '.join(names.values())}; choose among these")
    return {code: name for code, name in names.items() if not chosen or name in chosen}


def subset(scans: Sequence[str], data: ConfigDict) -> tuple[str, ...]:
    """The training scans that a configuration leaves: those it lists, a number or a share of them.

    Of one seed a smaller subset lies inside every larger one.
    """
    if data.train_scans:
        wanted = _ids_in(data.train_scans)
        if not wanted:
            raise UserError(f"data.train_scans {data.train_scans!r}: names no scan; give ids, or a file with some")
        if other := [id for id in wanted if id not in scans]:
            raise UserError(
                f"data.train_scans {other[0]}: is no labelled scan of the store, or one held out for validation; "
                f"choose among {', '.join(scans[:5])} …"
            )
        return tuple(id for id in scans if id in wanted)
    if not 0 < data.fraction <= 1:
        raise UserError(f"data.fraction {data.fraction}: give a share above 0 and up to 1")
    if data.shots and data.fraction < 1:
        raise UserError(f"data.shots {data.shots}, data.fraction {data.fraction}: give one of the two")
    if not 0 <= data.shots <= len(scans):
        raise UserError(
            f"data.shots {data.shots}: there are {len(scans)} labelled scans to train on; give 1 to {len(scans)}, or 0 "
            "for all"
        )
    check_at_least(0, "data.subset_seed", data.subset_seed)
    count = data.shots or max(1, round(data.fraction * len(scans)))
    chosen = np.random.default_rng(data.subset_seed).permutation(len(scans))[:count]
    return tuple(scans[i] for i in sorted(chosen))


def _ids_in(text: str) -> list[str]:
    """Ids separated by commas, or one on each line of a file."""
    if not os.path.isfile(text):  # which takes a text of any length
        return listed(text)
    return [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]


def divided(config: ConfigDict, store: Store) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and validation scans, all of them labelled; those of a patient stay together."""
    labelled = store.ids(having=label_maps.ARRAY)
    if not labelled:
        raise UserError(
            f"data.store {store.path}: none of its {len(store.ids())} scans has labels; see docs/prepare.md"
        )
    patients = store.patients(labelled)
    scans, held_out = split(labelled, config.data.validation_fraction, at_least=1, patients=patients)
    return subset(scans, config.data), held_out


def absent_classes(store: Store, scans: Sequence[str], names: Mapping[int, str], classes: Mapping[int, str]) -> str:
    """A warning that names the classes which no training scan shows, "" if there are none; an error if all are."""
    shown: set[int] = set()
    for id in scans:
        counted = store.scan(id).extra.get("labels")
        shown |= set(map(int, counted["voxels"])) if counted else set(np.unique(read_labels(store, id, names)).tolist())
    absent = [name for code, name in classes.items() if code not in shown]
    if len(absent) == len(classes):
        raise UserError(f"data.classes: none of {', '.join(absent)} is in the {len(scans)} training scans; add others")
    return f"warning: no training scan shows {', '.join(absent)}, which cannot be learnt" if absent else ""


# -------------------------------------------------------------------- from pretrained weights


def shapes_of(network: Backbone, crop: Sequence[int], method: str | Callable[..., Any]) -> Shapes:
    """Of the parameters that a method of the network, or a function of it and a volume, uses, by name."""
    volume = jnp.zeros((1, *crop, 1))
    tree = jax.eval_shape(lambda: network.init(jax.random.key(0), volume, method=method)["params"])
    return {name: value.shape for name, value in leaves(tree, "backbone/")}


def start_of(config: ConfigDict, network: Backbone, here: Contract, method: str = "segment") -> pretrained.Fit | None:
    """What the network takes over from `config.init_from` for a method; None where it starts from nothing."""
    parts = config.get("init_parts", "all")
    if parts not in PARTS:
        raise UserError(f"init_parts {parts!r}: choose {' or '.join(PARTS)}")
    if not config.init_from:
        return None
    source = pretrained.read(config.init_from, config.which)
    contract.check(dataclasses.replace(source.contract, classes=()), here, source.what)
    if source.position_index != getattr(network, "position_index", source.position_index):
        raise UserError(f"{source.what}: set model.position_index to {source.position_index}, as it was trained")
    crop = here.crop_shape_zyx
    wanted = shapes_of(network, crop, "encode") if parts == "encoder" else None
    return pretrained.fit(source, shapes_of(network, crop, method), wanted)


def rate_rules(taken: Collection[str], layers: Mapping[str, int], rate: float, layer_decay: float) -> optimizer.Rules:
    """Factors on the learning rate: 1 for what is new, `rate` for what was taken over, and for what `layers` names,
    with the number of its layer in the encoder, `layer_decay` once more for each layer from there to the last.
    """
    end = max(layers.values(), default=0) + 1
    factors = {name: rate * layer_decay ** (end - layers.get(name, end)) for name in taken}
    return [*((f"^{re.escape(name)}$", factor) for name, factor in factors.items()), ("", 1.0)]


def group_rules(taken: Collection[str], held: bool) -> optimizer.Rules:
    """`DECAY_RULES`, and what was taken over held, if anything is."""
    if not (held and taken):
        return optimizer.DECAY_RULES
    of_taken = "^(" + "|".join(map(re.escape, taken)) + ")$"
    return [(f"(?=.*{optimizer.UNDECAYED}){of_taken}", "held plain"), (of_taken, "held"), *optimizer.DECAY_RULES]


# -------------------------------------------------------------------- the task


def check(config: ConfigDict) -> None:
    """Refuses settings that the network or the sampler could not work with."""
    checked_crop(config.views.crop_shape_zyx, network_of(config, 2).token_stride_zyx)
    check_weights({name: config.loss[name] for name in ("dice", "cross_entropy")})
    low, high = config.views.window_hu
    if not low < high:
        raise UserError(f"views.window_hu {tuple(config.views.window_hu)}: give the lowest and the highest HU")
    if not 0 <= config.views.foreground <= 1:
        raise UserError(f"views.foreground {config.views.foreground}: give a share from 0 to 1")
    for name, value in config.augmentation.items():
        if name == "flip_axes":
            continue
        factor = name in ("zoom", "gamma")
        low = min(value[1:], default=-1)
        possible = low > 0 if factor else low >= 0
        if not (0 <= value[0] <= 1 and possible and list(value[1:]) == sorted(value[1:])):
            raise UserError(
                f"augmentation.{name} {tuple(value)}: give a share of the crops from 0 to 1, then the range, "
                f"{'above 0' if factor else '0 or more'}"
            )
    if not set(config.augmentation.flip_axes) <= {0, 1, 2}:
        raise UserError(f"augmentation.flip_axes {config.augmentation.flip_axes}: choose among 0 (z), 1 (y) and 2 (x)")
    for name in ("layer_decay", "pretrained_rate"):
        if not 0 <= config.optimizer[name] <= 1:
            raise UserError(f"optimizer.{name} {config.optimizer[name]}: give a factor from 0 to 1")


def task(config: ConfigDict, store: Store) -> Task:
    """Segmentation of the labelled scans of a store, from pretrained weights or from nothing."""
    check(config)
    names = label_maps.names_in(store)
    classes = classes_of(config.data.classes, store, names)
    scans, validation_scans = divided(config, store)
    notes = [absent_classes(store, scans, names, classes)]
    class_names = ("background", *classes.values())
    here = contract_of(store, config.views.window_hu, config.views.crop_shape_zyx, class_names)
    network = network_of(config, len(class_names))
    start = start_of(config, network, here)
    taken = start.taken if start else {}
    if start:
        notes.append(start.account(f"init_from {config.init_from}"))

    recipe, epoch = config.optimizer, epoch_of(scans, config)
    rate = learning_rate(config, epoch)
    held_steps = schedules.duration(recipe.freeze, "optimizer.freeze", epoch, config.steps)
    encoder = shapes_of(network, here.crop_shape_zyx, "encode")
    layers = {name: network.layer_of(name.split("/")[1]) for name in encoder}

    def sampler(ids: tuple[str, ...], augmentation: Augmentation | None) -> SegmentationSampler:
        return SegmentationSampler(
            store=store,
            scan_ids=ids,
            classes=tuple(classes),
            names=names,
            crop_shape_zyx=here.crop_shape_zyx,
            window_hu=here.window_hu,
            foreground=config.views.foreground,
            augmentation=augmentation,
        )

    return Task(
        objective=segmentation.make(
            network,
            class_names,
            segmentation.Weights(**config.loss),
            optimizer=optimizer.grouped_adamw(
                learning_rate=rate,
                weight_decay=lambda step: recipe.weight_decay,
                group_rules=group_rules(taken, held_steps > 0),
                clip=optax.clip_by_global_norm(recipe.clip),
                held_steps=held_steps,
                rate_rules=rate_rules(taken, layers, recipe.pretrained_rate, recipe.layer_decay),
            ),
            schedules={"learning_rate": rate},
            start=taken,
        ),
        sampler=sampler(scans, Augmentation(**{name: tuple(value) for name, value in config.augmentation.items()})),
        scans=scans,
        validation_sampler=sampler(validation_scans, None),
        validation_scans=validation_scans,
        contract=here,
        volumes_per_sample=1,
        notes=tuple(filter(None, notes)),
    )
