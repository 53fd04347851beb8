"""Global batches on host CPUs through Grain.

Batch k is a pure function of (seed, k): sample `index = k·B + row` takes its record from the epoch's shuffle and its
random numbers from generators addressed by (seed, index). Processes and workers only divide the rows among them, so
their number changes nothing, and the step is the whole position of the data.
"""

import dataclasses
import functools
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain.python as grain
import numpy as np
from absl import flags

from alice_jax.data import worker_process
from alice_jax.errors import Stalled, UserError

Sample = dict[str, Any]  # arrays for the devices, and under "meta" arrays for the host's records
Sampler = Callable[[int, np.random.Generator, np.random.Generator], Sample]

CLOSING_S = 10.0  # that workers get to end by themselves
_SAMPLE, _BATCH, _SHUFFLE = range(3)  # first part of a generator's address


@dataclasses.dataclass(frozen=True)
class Samples(grain.RandomAccessDataSource):
    """The rows of all global batches that one process computes.

    Attributes:
      sampler: `(record, rng, batch_rng) -> sample`; `rng` is the sample's own, `batch_rng` equal for a whole batch.
      records: number of records; every epoch uses each once.
      seed: of the run.
      global_batch: samples in a batch over all processes.
      steps: batches in all.
      process, processes: which contiguous share of the rows is this process's.
    """

    sampler: Sampler
    records: int
    seed: int
    global_batch: int
    steps: int
    process: int = 0
    processes: int = 1

    @property
    def local_batch(self) -> int:
        return self.global_batch // self.processes

    def __len__(self) -> int:
        return self.steps * self.local_batch

    def __getitem__(self, position: int) -> Sample:
        step, row = divmod(position, self.local_batch)
        index = step * self.global_batch + self.process * self.local_batch + row
        epoch, place = divmod(index, self.records)
        record = int(self._generator(_SHUFFLE, epoch).permutation(self.records)[place])
        return self.sampler(record, self._generator(_SAMPLE, index), self._generator(_BATCH, step))

    def _generator(self, *address: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *address])


def batches(
    samples: Samples, *, start_step: int = 0, workers: int = 0, threads: int = 2, timeout_s: float = 600.0
) -> Iterator[Sample]:
    """This process's part of the batches start_step, start_step + 1, …

    Args:
      workers: processes that compute samples; 0 computes them in threads of this one.
      threads: threads per process, each holding about one sample.
      timeout_s: the longest wait for a batch; after that, something hangs.

    Raises:
      UserError: a worker process died.
      Stalled: after `timeout_s`.
    """
    dataset = grain.MapDataset.source(samples).batch(samples.local_batch, drop_remainder=True)[start_step:]
    # Grain's default buffer of 500 elements suits small records and would fill the memory with volumes.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    stream = dataset.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        stream = stream.mp_prefetch(processes, worker_init_fn=functools.partial(_settle, os.getpid()))
    return _watched(iter(stream), timeout_s)


def _settle(parent: int, *_: int) -> None:
    """In a worker: stopping is left to the loop, which still needs a batch to finish its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker_process.tie_to(parent)


def _watched(stream: Any, timeout_s: float) -> Iterator[Sample]:
    """The elements of `stream`, fetched in another thread, since a wait in this one could not be ended."""
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
    fetched: queue.SimpleQueue[Sample | Exception] = queue.SimpleQueue()

    def fetch() -> None:
        while asked.get():
            try:
                fetched.put(next(stream))
            except Exception as error:
                fetched.put(error)
        stream.close()  # ends its threads and processes

    fetching = threading.Thread(target=fetch, daemon=True)
    fetching.start()
    patience_s = CLOSING_S
    try:
        while True:
            asked.put(True)
            got = fetched.get(timeout=timeout_s)
            if isinstance(got, StopIteration):
                return
            if isinstance(got, RuntimeError) and "Worker process was terminated" in str(got):
                raise UserError(
                    "a data worker died without a word, as it does when memory runs out; lower data.workers, "
                    "data.threads or batch_size, then run the same command to go on from the last checkpoint"
                ) from got
            if isinstance(got, Exception):
                raise got
            yield got
    except queue.Empty:
        patience_s = 0.0
        for worker in multiprocessing.active_children():
            worker.kill()
        raise Stalled(
            f"no batch within {timeout_s:g} s: a data worker hangs, or reading the store does; see to its disk, or "
            "raise data.timeout_s, then run the same command to go on from the last checkpoint"
        ) from None
    finally:
        asked.put(False)
        fetching.join(patience_s)
