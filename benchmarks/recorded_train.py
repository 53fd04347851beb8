"""The training command, which also notes what each of its batches held; for tests and benchmarks of resuming.

    [STOP_AFTER=STEP] python benchmarks/recorded_train.py --config=... --workdir=...

WORKDIR/batches-INDEX.txt gets a line for each row of each batch that is fetched: the number of the batch, the row's in
the global batch, and a hash of its arrays, scans and points. With STOP_AFTER it gets SIGTERM during that step.
"""

import hashlib
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from alice_jax import cli, train
from alice_jax.data import pipeline

Contents = dict[tuple[int, int], str]  # by the number of a batch and of a row in it, the hash of the row


def row_hashes(batch: Mapping[str, Any]) -> tuple[str, ...]:
    """Of everything that the devices get and the host keeps of each row."""
    arrays = [values for _, values in sorted(batch.items()) if not isinstance(values, Mapping)]
    arrays += [values for _, values in sorted(batch["meta"].items())]
    rows = (b"".join(np.ascontiguousarray(values[row]).tobytes() for values in arrays) for row in range(len(arrays[0])))
    return tuple(hashlib.sha256(row).hexdigest()[:16] for row in rows)


def recording(samples: pipeline.Samples, **options: Any) -> Iterator[pipeline.Sample]:
    """`pipeline.batches` that writes down what it yields to training."""
    stream = pipeline_batches(samples, **options)
    if "start_step" not in options:  # validation
        yield from stream
        return
    path = Path(flags.FLAGS.workdir) / f"batches-{samples.process}.txt"
    with path.open("a", encoding="utf-8") as file:
        for step, batch in enumerate(stream, options["start_step"]):
            first = samples.process * samples.local_batch
            file.write("".join(f"{step} {first + row} {text}\n" for row, text in enumerate(row_hashes(batch))))
            file.flush()
            if step == int(os.environ.get("STOP_AFTER", -1)):  # batch k is fetched during the update to step k
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def fetched(workdir: str) -> Contents:
    """What all processes of a run have fetched so far.

    Raises:
      AssertionError: a row was fetched twice with different contents.
    """
    contents: Contents = {}
    for path in Path(workdir).glob("batches-*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            step, row, text = line.split()
            assert contents.setdefault((int(step), int(row)), text) == text, f"batch {step} came out differently"
    return contents


pipeline_batches = pipeline.batches

if __name__ == "__main__":
    pipeline.batches = recording
    train.conclude = lambda *_: None  # without the report, which takes longer than these runs
    cli.run(train.main)
