"""The settings of a run: which no run could have, and which may change when a workdir goes on."""

import json
from typing import Any

import jax
from ml_collections import ConfigDict

from alice_jax import checkpoint
from alice_jax.errors import UserError, check_at_least
from alice_jax.tasks import backbones

# Fields that may change between two runs of one workdir; with any other the numbers would belong to another run.
MAY_CHANGE = (
    "steps",
    "microbatch",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "validate_every",
    "mesh.parameters",
    "mesh.rules",
    "data.workers",
    "data.threads",
    "data.timeout_s",
    "data.cache_gb",
    "model.remat",
    "numerics.skip",
    "numerics.collapse",
    "numerics.entropy",
    "numerics.variance",
    "numerics.effective_rank",
)


def check(config: ConfigDict) -> None:
    """Refuses what no objective could run with."""
    for field in ("steps", "batch_size", "checkpoint_every", "keep_checkpoints", "log_every", "validate_every"):
        check_at_least(1, field, config[field])
    for least, field, value in (
        (0, "seed", config.seed),
        (0, "microbatch", config.microbatch),
        (0, "data.workers", config.data.workers),
        (0, "numerics.skip", config.numerics.skip),
        (1, "data.threads", config.data.threads),
    ):
        check_at_least(least, field, value)
    if config.data.timeout_s <= 0:
        raise UserError(f"data.timeout_s {config.data.timeout_s}: give a number of seconds above 0")
    if config.data.cache_gb < 0:
        raise UserError(f"data.cache_gb {config.data.cache_gb}: give a size in GB, or 0 for no copies")


def claim(workdir: str, config: ConfigDict) -> None:
    """Writes the configuration into a new workdir; refuses one that holds another run."""
    mine = flat(json.loads(json.dumps(config.to_dict())))  # with lists for tuples, as it is read back
    theirs = flat(checkpoint.read_config(workdir) or {})
    if theirs:
        theirs = {"model.backbone": "nnformer"} | theirs  # runs of older versions name none
    unused = tuple(f"model.{name}." for name in backbones.KINDS if name != mine.get("model.backbone"))
    checked = [name for name in mine if name not in MAY_CHANGE and not name.startswith(unused)]
    differing = [name for name in checked if theirs and mine[name] != theirs.get(name)]
    if differing:
        changes = ", ".join(f"{name} {theirs.get(name)} there and {mine[name]} here" for name in differing[:3])
        raise UserError(f"--workdir {workdir}: holds a run with other settings ({changes}); name another folder")
    if jax.process_index() == 0:
        checkpoint.write_config(workdir, config.to_dict())


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} as {"a.b": [1]}."""
    items: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            items |= flat(value, f"{prefix}{name}.")
        else:
            items[f"{prefix}{name}"] = value
    return items
