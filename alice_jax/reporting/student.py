"""What the student of a run makes of a masked pair of crops: its reconstruction, and where its tokens look.

One sample passes through the networks once, and CASA's attention is noted on the way.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from alice_jax import checkpoint, tasks
from alice_jax.data.pipeline import Sample
from alice_jax.errors import UserError
from alice_jax.models.casa import CASA
from alice_jax.objectives import alice
from alice_jax.reporting import figures, page, planes
from alice_jax.reporting.page import Section
from alice_jax.sharding import runs_once

TOKENS = 2  # of each crop whose attention is drawn
HIDDEN = 0.35  # brightness of what the student does not see
STRONG = 1.2  # times the even share: attention that is drawn in full, unless there is a stronger one


@dataclasses.dataclass(frozen=True)
class Seen:
    """What came of one sample; None where the run's losses do not need it.

    Attributes:
      reconstruction: (2, depth, height, width) of the two masked crops.
      online, target: (2, queries, *grid), how each query of a crop divides its attention among the tokens of the
        student's decoder and of the teacher; mean of the heads, so each sums to 1.
      queries: (2, queries) cells of the mask's grid that the queries come from.
    """

    reconstruction: np.ndarray | None = None
    online: np.ndarray | None = None
    target: np.ndarray | None = None
    queries: np.ndarray | None = None


def look(config: ConfigDict, state: dict[str, Any], sample: Sample) -> Seen:
    """What the networks of a checkpoint make of a sample."""
    networks = tasks.pretrain.networks(config)
    wanted = networks.weights
    networks = dataclasses.replace(networks, weights=dataclasses.replace(wanted, invariance=0))
    if not (wanted.alignment or wanted.reconstruction):
        return Seen()
    batch = {name: sample[name][None] for name in ("volumes", "hidden")}

    def forward(params: Any, extra: Any, batch: Any) -> tuple[Any, list[Any]]:
        attended: list[Any] = []

        def noting(call, args, kwargs, context):
            result = call(*args, **kwargs)
            if isinstance(context.module, CASA) and context.method_name == "attention":
                attended.append(result.mean(axis=1))
            return result

        with nn.intercept_methods(noting):
            outputs = networks.forward(params, extra, batch, jax.random.key(0), False)
        return outputs.reconstruction, attended

    once = jax.jit(forward, compiler_options=runs_once(jax.default_backend()))
    made, attended = jax.device_get(once(state["params"], state["extra"], batch))
    grid = sample["hidden"].shape[1:]
    online, target = (_as_grid(each, grid) for each in attended) if attended else (None, None)
    return Seen(
        reconstruction=None if made is None else np.asarray(made, np.float32)[..., 0],
        online=online,
        target=target,
        queries=_queries(networks, sample["hidden"]) if attended else None,
    )


def _as_grid(attention: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """(2, queries, keys) -> (2, queries, *grid of the keys), which is the mask's or a finer one."""
    finer = round((attention.shape[-1] / np.prod(grid)) ** (1 / 3))
    return attention.reshape(*attention.shape[:2], *(finer * n for n in grid))


def _queries(networks: alice.Alice, hidden: np.ndarray) -> np.ndarray:
    """(2, queries) cells, in the order of the objective's queries."""
    flat = hidden.reshape(2, -1)
    if not networks.mode.visible_queries:
        return np.tile(np.arange(flat.shape[1]), (2, 1))
    return np.stack([np.flatnonzero(~each) for each in flat])


# ---------------------------------------------------------------- sections


def sections(config: ConfigDict, workdir: str, sample: Sample, names: Sequence[str], whose: str) -> list[Section]:
    """Reconstruction and attention after the newest checkpoint.

    Args:
      sample: two crops with their masks.
      names: of the two scans.
      whose: pair this is, for the caption.
    """
    try:
        _, state = checkpoint.restore_arrays(workdir)
    except UserError as error:
        return [Section("Reconstruction", [page.text(str(error))])]
    seen, step = look(config, state, sample), int(state["step"])
    parts = [page.text("loss.reconstruction is 0: nothing is reconstructed.")]
    if seen.reconstruction is not None:
        square = float(np.mean((seen.reconstruction - sample["volumes"][..., 0])[hidden_voxels(sample)] ** 2))
        caption = (
            f"The first {whose} pair after step {step}, windowed as the network sees it. Mean squared error of the "
            f"hidden voxels: {square:.4f}."
        )
        parts = [page.picture(draw_reconstruction(sample, seen.reconstruction, names), caption)]
    found = [Section("Reconstruction", parts)]
    if seen.online is not None:
        caption = (
            f"CASA after step {step}: a visible token of the student (yellow frame) completes itself from all tokens "
            "of its crop: at the left those of the student's decoder, which does not know the dark cells, at the "
            "right the teacher's, which sees all. Red: more attention than if all tokens had the same; the numbers "
            "say how much. At first it is even; later both sides should look at the same places."
        )
        found.append(Section("Attention", [page.picture(draw_attention(sample, seen, names), caption)]))
    return found


def hidden_voxels(sample: Sample) -> np.ndarray:
    """(2, depth, height, width) bool from the mask's cells."""
    return enlarged(sample["hidden"], sample["volumes"].shape[1:4])


def enlarged(cells: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """(n, *grid) -> (n, *shape): each voxel gets its cell's value."""
    for axis, size in enumerate(shape, start=1):
        cells = cells.repeat(size // cells.shape[axis], axis=axis)
    return cells


# ---------------------------------------------------------------- pictures


def draw_reconstruction(sample: Sample, made: np.ndarray, names: Sequence[str]) -> bytes:
    """A PNG: both crops, what the student sees of them, and what it makes of that."""
    volumes = sample["volumes"][..., 0]
    seen = np.where(hidden_voxels(sample), np.nan, volumes)
    sheet = planes.Sheet(3, max(volumes.shape[1:]))
    for row, (words, pair) in enumerate((("crop", volumes), ("what the student sees", seen), ("reconstruction", made))):
        for side in range(2):
            sheet.heading(row, 3 * side, f"{names[side]}: {words}" if row == 0 else words, bold=row == 0)
            for i, plane in enumerate(planes.PLANES):
                cut = planes.whole(volumes.shape[1:], plane, np.array(volumes.shape[1:]) // 2, (1, 1, 1))
                sheet.show(row, 3 * side + i, cut.of(pair[side]), cut)
    return sheet.png()


def chosen_queries(sample: Sample, queries: np.ndarray, side: int) -> list[int]:
    """Which of a crop's queries to draw: the visible one whose cell shows most, and those farthest from it."""
    volume, hidden = sample["volumes"][side, ..., 0], sample["hidden"][side]
    sides = [n for size, cells in zip(volume.shape, hidden.shape, strict=True) for n in (cells, size // cells)]
    contrast = volume.reshape(sides).std(axis=(1, 3, 5)).ravel()[queries[side]]
    contrast[hidden.ravel()[queries[side]]] = -1
    first = int(contrast.argmax())
    places = np.stack(np.unravel_index(queries[side], hidden.shape), axis=1)
    distance = np.where(contrast >= contrast[first] / 2, np.abs(places - places[first]).sum(axis=1), -1)
    distance[first] = -1
    farthest = np.argsort(-distance, kind="stable")[: TOKENS - 1]
    return [first, *(int(i) for i in farthest if distance[i] > 0)]


def draw_attention(sample: Sample, seen: Seen, names: Sequence[str]) -> bytes:
    """A PNG with a row for each token: its attention on the student's side, then on the teacher's."""
    assert seen.online is not None and seen.target is not None and seen.queries is not None
    volumes, hidden = sample["volumes"][..., 0], hidden_voxels(sample)
    shape, grid = volumes.shape[1:], sample["hidden"].shape[1:]
    cell = np.array(shape) // grid
    rows = [(side, query) for side in range(2) for query in chosen_queries(sample, seen.queries, side)]
    sheet = planes.Sheet(len(rows), max(shape))
    for row, (side, query) in enumerate(rows):
        start = np.array(np.unravel_index(seen.queries[side, query], grid)) * cell
        masked = np.where(hidden[side], volumes[side] * HIDDEN, volumes[side])
        most = []
        for which, (attention, grey) in enumerate(((seen.online, masked), (seen.target, volumes[side]))):
            share = attention[side, query] * attention[side, query].size  # 1: as if all were alike
            most.append(f"{share.max():.2f}")
            strength = enlarged(share[None], shape)[0]
            for i, plane in enumerate(planes.PLANES):
                cut = planes.whole(shape, plane, start + cell // 2, (1, 1, 1))
                sheet.show(row, 3 * which + i, overlay(cut.of(grey), cut.of(strength), max(share.max(), STRONG)), cut)
                sheet.box(row, 3 * which + i, cut, start, cell, planes.MARK)
        sheet.heading(row, 0, names[side], bold=True)
        sheet.heading(row, 3, "teacher's side", bold=True)
        sheet.note(row, f"up to {' and '.join(most)} times the even share")
    return sheet.png()


def overlay(grey: np.ndarray, share: np.ndarray, full: float) -> np.ndarray:
    """(rows, columns, 3): a grey picture under red, which is clear for an even share of 1 and strong for `full`."""
    opacity = 0.75 * np.clip((share - 1) / (full - 1), 0, 1)[..., None]
    red = np.array([int(figures.HEAT[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.clip(grey[..., None] * (1 - opacity) + red * opacity, 0, 1)
