"""Classification of scans: network, recipe and samples of `objectives/classification`."""

import os
from collections.abc import Mapping

import numpy as np
import optax
from ml_collections import ConfigDict

from alice_jax import optimizer
from alice_jax.data import class_labels
from alice_jax.data.class_labels import ClassLabels
from alice_jax.data.class_views import ClassSampler
from alice_jax.data.store import Store
from alice_jax.errors import UserError, check_at_least
from alice_jax.evaluation import class_scores
from alice_jax.models.backbone import Backbone
from alice_jax.objectives import classification
from alice_jax.tasks import backbones, segment
from alice_jax.tasks.task import Task, compute_dtype, contract_of, epoch_of, learning_rate, listed, split

KINDS = ("finetune", "probe")


def labels_of(config: ConfigDict, store: Store) -> ClassLabels:
    """The labels that a configuration names, by default those in the store's own folder."""
    path = config.data.labels or os.path.join(store.path, class_labels.FILE)
    return class_labels.read(path, store, listed(config.data.label_columns))


def divided(config: ConfigDict, labels: ClassLabels) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and validation scans: those of the file, or a share of each class; refuses what cannot be learnt."""
    if labels.splits:
        scans, held_out = labels.of_split("train"), labels.of_split("validation")
        for name, ids in (("train", scans), ("validation", held_out)):
            if not ids:
                raise UserError(f"data.labels: its column split has no {name!r}; give some scans to it, or no column")
    else:
        order = np.lexsort(labels.targets.T) if labels.multi else np.argsort(labels.targets, kind="stable")
        patients = dict(zip(labels.scans, labels.patients, strict=True))
        by_class = [labels.scans[i] for i in order]
        scans, held_out = split(by_class, config.data.validation_fraction, at_least=1, patients=patients)
    for name, (have, _) in labels.counts(labels.rows(scans)).items():
        if not have:
            raise UserError(f"data.labels: no scan to train on is of {name}; move one there, or leave the class out")
    return scans, held_out


def backbone_of(config: ConfigDict) -> Backbone:
    """The network whose encoder looks at the crops."""
    return backbones.make(
        config.model,
        position_index=config.model.position_index,
        mask_tokens=False,
        dtype=compute_dtype(config.precision),
    )


def judge(predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
    """AUROC, balanced accuracy and F1 of held-out scans, each counted once."""
    _, once = np.unique(predictions["records"], return_index=True)
    return class_scores.measures(predictions["targets"][once], predictions["scores"][once])


def task(config: ConfigDict, store: Store) -> Task:
    """Fine-tuning, or a linear probe, on the labelled scans of a store."""
    if config.method.kind not in KINDS:
        raise UserError(f"method.kind {config.method.kind!r}: choose {' or '.join(KINDS)}")
    check_at_least(1, "views.crops", config.views.crops)
    labels = labels_of(config, store)
    scans, held_out = divided(config, labels)
    network = backbone_of(config)
    here = contract_of(store, config.views.window_hu, config.views.crop_shape_zyx, labels.names)
    start = segment.start_of(config, network, here, "encode")
    recipe, frozen = config.optimizer, config.method.kind == "probe"
    rate = learning_rate(config, epoch_of(scans, config))

    def sampler(ids: tuple[str, ...], crops: int) -> ClassSampler:
        return ClassSampler(store, ids, labels.targets[labels.rows(ids)], here.crop_shape_zyx, here.window_hu, crops)

    return Task(
        objective=classification.make(
            network,
            len(labels.names),
            multi=labels.multi,
            frozen=frozen,
            optimizer=optimizer.grouped_adamw(
                learning_rate=rate,
                weight_decay=lambda step: recipe.weight_decay,
                group_rules=[(r"^backbone/", "frozen")] * frozen + optimizer.DECAY_RULES,
                clip=optax.clip_by_global_norm(recipe.clip),
            ),
            schedules={"learning_rate": rate},
            judge=judge,
            start=start.taken if start else None,
        ),
        sampler=sampler(scans, config.views.crops),
        scans=scans,
        validation_sampler=sampler(held_out, 0),
        validation_scans=held_out,
        contract=here,
        volumes_per_sample=config.views.crops,
        notes=(start.account(f"init_from {config.init_from}"),) if start else (),
    )
