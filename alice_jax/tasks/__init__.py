"""From a configuration to what the training loop needs: an objective and its samples.

The one place inside the package that reads configuration fields, a file for each recipe of `configs/`; everything below
takes plain arguments.
"""

import math

from ml_collections import ConfigDict

from alice_jax import collapse
from alice_jax.data.store import Store
from alice_jax.errors import UserError
from alice_jax.tasks import backbones, classify, embedder, pretrain, segment
from alice_jax.tasks.task import Task, check_recipe, compute_dtype, split

__all__ = [
    "Task",
    "backbones",
    "classify",
    "compute_dtype",
    "embedder",
    "healthy_ranges",
    "make",
    "pretrain",
    "segment",
    "split",
]

TASKS = {
    "alice": pretrain.task,
    "classification": classify.task,
    "embedder": embedder.task,
    "segmentation": segment.task,
}


def make(config: ConfigDict, store: Store) -> Task:
    """The task that `config.objective` names."""
    if config.objective not in TASKS:
        raise UserError(f"objective {config.objective!r}: choose one of {', '.join(TASKS)}")
    check_recipe(config)
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
