"""The built-in cohort: phantom patients, an embedder trained on them and their embeddings, made once in a cache.

    CACHE/store/               patients to pretrain on, with embeddings
    CACHE/study/               patients of `alice_jax.study` alone: unlabelled ones with embeddings, and labelled ones
    CACHE/unseen/              patients that nothing is trained on, with embeddings, for judging matches
    CACHE/labelled/            other patients, with labels.csv: what classification learns and is judged by
    CACHE/embedder-RECIPE/     the workdir of the embedder; RECIPE names its configuration and the format of embeddings
    CACHE/matching-RECIPE.json its errors on the unseen patients, beside those of the relative-position baseline

Every part resumes, so an interrupted build goes on where it stopped, and another recipe starts a new embedder.
"""

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from alice_jax import cli, host
from alice_jax.data import class_labels, phantom
from alice_jax.data.codec import FORMAT
from alice_jax.data.store import Store
from alice_jax.errors import UserError

PATIENTS, UNSEEN, LABELLED = range(24), range(1000, 1006), range(2000, 2048)
STUDY = {"unlabelled": range(3000, 3024), "labelled": range(5000, 5022)}  # nothing was tuned on them
POINTS = 200  # matched from each unseen patient
EMBEDDER = Path(__file__).parents[1] / "configs" / "embedder.py"


def root() -> str:
    """Where the cohort lies; another folder for each version of the generator."""
    return os.path.join(host.cache(), f"phantom{phantom.VERSION}")


def store_path() -> str:
    """Where the patients to train on lie."""
    return os.path.join(root(), "store")


def made(embedded: bool) -> bool:
    """Whether all patients are there, and their embeddings if asked for."""
    return len(_ids(store_path())) >= len(PATIENTS) and (not embedded or os.path.exists(_matching()))


def patients() -> str:
    """The path of the store, after making the phantoms if they are missing; embeddings may not be there yet."""
    cli.say(f"data.store is not set: using the built-in cohort of {len(PATIENTS)} phantom patients in {root()}")
    if not made(embedded=False):
        phantom.write_cohort(store_path(), PATIENTS)
    return store_path()


def path_for(objective: str) -> str:
    """Where the patients lie that a run of an objective used."""
    return labelled_path() if objective == "classification" else store_path()


def labelled_path() -> str:
    """Where the patients with labels lie."""
    return os.path.join(root(), "labelled")


def labelled_patients() -> str:
    """The path of the store with labels.csv, after making what is missing.

    Labels: what a scan shows ("view": torso, chest or abdomen), the "phase" of its contrast (none, arterial or portal),
    and 1 for a "lesion", else 0.
    """
    store = labelled_path()
    cli.say(f"data.store is not set: using {len(LABELLED)} labelled phantom patients in {store}")
    phantom.write_cohort(store, LABELLED)
    path = os.path.join(store, class_labels.FILE)
    with open(f"{path}.partial", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([class_labels.SCAN, "view", "phase", "lesion"])
        for patient in map(phantom.Patient, LABELLED):
            rows.writerow([phantom.scan_id(patient.seed), patient.view, patient.phase, int(patient.has_lesion)])
    os.replace(f"{path}.partial", path)
    return store


def embedded_patients(train: Callable[[ConfigDict, str], int]) -> str:
    """The path of the store with embeddings, after making what is missing.

    Args:
      train: `alice_jax.train.run`, handed in since the loop itself calls this function.
    """
    store = patients()
    if os.path.exists(_matching()):
        return store
    cli.say("making its embeddings, once: training the tiny embedder")
    from alice_jax import embed, evaluate  # here, since only this step needs them

    config = _recipe()
    with config.unlocked():
        config.data.store = store
    code = train(config, _workdir())
    if code:
        sys.exit(code)
    trained, unseen = embed.restore(_workdir()), os.path.join(root(), "unseen")
    for path in (store, unseen):
        embed.embed_store(phantom.write_cohort(path, UNSEEN) if path == unseen else Store.open(path), trained)
    judged = Store.open(unseen)
    errors_mm = evaluate.matching_errors(judged, judged.ids(), POINTS, np.random.default_rng(0))
    with open(f"{_matching()}.partial", "w", encoding="utf-8") as file:
        json.dump({name: values.tolist() for name, values in errors_mm.items()}, file)
    os.replace(f"{_matching()}.partial", _matching())
    return store


def embedder(train: Callable[[ConfigDict, str], int]) -> str:
    """The workdir of the embedder of the cohort, after making what is missing."""
    embedded_patients(train)
    return _workdir()


def study_store(name: str, train: Callable[[ConfigDict, str], int]) -> str:
    """The path of the "labelled" store or the "unlabelled", embedded one, of patients that serve for nothing else."""
    store = phantom.write_cohort(os.path.join(root(), "study", name), STUDY[name])
    if name == "unlabelled":
        from alice_jax import embed

        embed.embed_store(store, embed.restore(embedder(train)))
    return store.path


def matching_summary() -> str:
    """How well the embedder matches unseen patients, beside the baseline, as a small table."""
    from alice_jax import evaluate

    with open(_matching(), encoding="utf-8") as file:
        errors_mm = {name: np.array(values) for name, values in json.load(file).items()}
    return f"{len(UNSEEN)} unseen patients, {len(UNSEEN) * POINTS} points\n{evaluate.table(errors_mm)}"


def _recipe() -> ConfigDict:
    if not EMBEDDER.exists():
        raise UserError(f"{EMBEDDER}: not found; the built-in cohort needs a clone of the project, or set data.store")
    return cli.recipe(f"{EMBEDDER}:tiny")


def _recipe_name() -> str:
    text = json.dumps([FORMAT, _recipe().to_dict()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _workdir() -> str:
    return os.path.join(root(), f"embedder-{_recipe_name()}")


def _matching() -> str:
    return os.path.join(root(), f"matching-{_recipe_name()}.json")


def _ids(path: str) -> list[str]:
    return Store.open(path).ids() if os.path.exists(os.path.join(path, "manifest.json")) else []
