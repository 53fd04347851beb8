"""The anatomical embedder: network, recipe and samples of `objectives/embedder`."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import optax
from ml_collections import ConfigDict

from alice_jax import checkpoint
from alice_jax.data.embedder_views import Distortion, EmbedderSampler
from alice_jax.data.embeddings import EmbeddingReader, read_codec
from alice_jax.data.store import Store
from alice_jax.errors import UserError, check_at_least
from alice_jax.interop import embedder as embedder_weights
from alice_jax.models.embedder import Embedder, strides_zyx
from alice_jax.objectives import embedder
from alice_jax.tasks.task import Task, compute_dtype, contract_of, epoch_of, learning_rate, split


def network_of(model: Mapping[str, Any], dtype: Any) -> Embedder:
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
    if config.get("objective") != "embedder" or network_of(config["model"], network.dtype) != network:
        raise UserError(f"init_from {path}: not a run of this embedder; give the workdir of one with the same model.*")
    _, state = checkpoint.restore_arrays(path)
    return {"params": state["params"], "batch_stats": state["extra"]["batch_stats"]}


def check(config: ConfigDict, store: Store, network: Embedder) -> None:
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
        check_at_least(1, f"views.{name}", views[name])
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


def task(config: ConfigDict, store: Store) -> Task:
    """The anatomical embedder on views of single scans."""
    network = network_of(config.model.to_dict(), compute_dtype(config.precision))
    check(config, store, network)
    ids = store.ids()
    scans, validation_scans = split(ids, config.data.validation_fraction, at_least=1, patients=store.patients(ids))
    if not scans:
        raise UserError(f"data.store {store.path}: holds no scans; prepare some")
    optimizer, views = config.optimizer, config.views
    rate = learning_rate(config, epoch_of(scans, config))
    if optimizer.kind == "sgd":
        update = optax.sgd(rate, momentum=optimizer.momentum)
        update = optax.chain(optax.add_decayed_weights(optimizer.weight_decay), update)
    elif optimizer.kind == "adamw":
        update = optax.adamw(rate, b2=optimizer.b2, weight_decay=optimizer.weight_decay)
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
            schedules={"learning_rate": rate},
            start=start_values(config.init_from, network) if config.init_from else None,
        ),
        sampler=sampler(scans),
        scans=scans,
        validation_sampler=sampler(validation_scans),
        validation_scans=validation_scans,
        contract=contract_of(store, views.window_hu, [views.reduce * size for size in views.shape_zyx]),
    )
