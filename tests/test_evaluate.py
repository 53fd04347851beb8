"""Errors of matching on phantoms, whose correspondence is known."""

import json

import numpy as np
import pytest
from test_matching import add_scan, make_codec, make_store, random_vectors

from alice_jax import evaluate
from alice_jax.data import embeddings, phantom
from alice_jax.errors import UserError


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Two patients whose fine vectors are a smooth random function of the true anatomical place."""
    store = phantom.write_cohort(tmp_path_factory.mktemp("cohort") / "store", seeds=[1, 2])
    codec = make_codec()
    codec.save(store)
    directions = np.random.default_rng(0).normal(size=(3, 16)) / 12.0
    for id in store.ids():
        patient = phantom.patient_of(store.scan(id))
        grids = [
            [-(-n // s) for n, s in zip(patient.shape_zyx, stride, strict=True)] for stride in ((2,) * 3, (4, 8, 8))
        ]
        vectors = []
        for grid, stride in zip(grids, ((2, 2, 2), (4, 8, 8)), strict=True):
            centres = (np.argwhere(np.ones(grid, bool)) + 0.5) * stride - 0.5
            phases = patient.to_canonical_mm(centres) @ directions
            vectors.append(embeddings.normalise(np.cos(phases + np.arange(16))).reshape(*grid, 16))
        embeddings.write_embedding(store, id, codec, *vectors)
    return store


def test_perfect_vectors_match_better_than_the_baseline(cohort):
    errors = evaluate.matching_errors(cohort, cohort.ids(), 60, np.random.default_rng(0))
    assert np.median(errors["embedder"]) < 6 < 12 < np.median(errors["baseline"])
    assert errors["embedder"].shape == errors["baseline"].shape == (120,)


def test_command_prints_a_table_and_writes_json(cohort, tmp_path, capsys):
    out = tmp_path / "errors.json"
    assert evaluate.main(["--task", "landmarks", "--store", cohort.path, "--points", "20", "--json", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("relative position") and printed[2].startswith("embedder")
    numbers = json.loads(out.read_text())
    assert numbers["points"] == 40 and numbers["embedder"]["median_mm"] < numbers["baseline"]["median_mm"]


def test_stores_without_known_correspondence_are_refused(tmp_path):
    store, codec = make_store(tmp_path / "store"), make_codec()
    codec.save(store)
    add_scan(store, "a")
    with pytest.raises(UserError, match="two scans or more"):
        evaluate.matching_errors(store, store.ids(), 10, np.random.default_rng(0))
    add_scan(store, "b")
    for id in "ab":
        vectors = (random_vectors((12, 10, 14), 0), random_vectors((6, 3, 4), 0))
        embeddings.write_embedding(store, id, codec, *vectors)
    with pytest.raises(UserError, match="not a phantom"):
        evaluate.matching_errors(store, store.ids(), 10, np.random.default_rng(0))
