"""Batch k is a pure function of (seed, k), whatever computes it."""

import dataclasses

import numpy as np
import pytest

from alice_jax.data.pipeline import Samples, batches


def echo(record, rng, batch_rng):
    """A sample that shows what it was given."""
    return {"record": np.int32(record), "own": rng.random(), "shared": batch_rng.random(), "meta": {"n": np.int32(1)}}


SAMPLES = Samples(echo, records=7, seed=3, global_batch=4, steps=6)


def content(samples, **options):
    return [
        {name: batch[name].tolist() for name in ("record", "own", "shared")} for batch in batches(samples, **options)
    ]


def test_same_seed_same_batches_and_another_seed_others():
    assert content(SAMPLES) == content(SAMPLES)
    assert content(SAMPLES) != content(dataclasses.replace(SAMPLES, seed=4))


def test_every_epoch_uses_each_record_once():
    records = [record for batch in content(SAMPLES) for record in batch["record"]]
    assert sorted(records[:7]) == sorted(records[7:14]) == list(range(7))
    assert records[:7] != records[7:14]


def test_samples_have_their_own_numbers_and_share_the_batch_stream():
    for batch in content(SAMPLES):
        assert len(set(batch["own"])) == 4 and len(set(batch["shared"])) == 1


@pytest.mark.parametrize("start", [1, 4])
def test_starting_later_skips_nothing_else(start):
    assert content(SAMPLES, start_step=start) == content(SAMPLES)[start:]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_divide_the_rows_of_the_same_global_batch(processes):
    parts = [content(dataclasses.replace(SAMPLES, process=p, processes=processes)) for p in range(processes)]
    joined = [
        {name: [x for part in parts for x in part[step][name]] for name in ("record", "own", "shared")}
        for step in range(SAMPLES.steps)
    ]
    assert joined == content(SAMPLES)


@pytest.mark.parametrize("threads", [1, 8])
def test_threads_change_nothing(threads):
    assert content(SAMPLES, threads=threads) == content(SAMPLES)


def test_worker_processes_change_nothing():
    assert content(SAMPLES, workers=2) == content(SAMPLES)
