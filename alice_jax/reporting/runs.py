"""The sections of a run: its curves, what it has seen, and how it was set up."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from alice_jax import broken, checkpoint, coverage, metrics, provenance, tasks
from alice_jax.data.embedder_views import EmbedderSampler
from alice_jax.data.pipeline import Sampler, Samples
from alice_jax.errors import UserError
from alice_jax.reporting import figures, page, planes
from alice_jax.reporting.page import Check, Section

HELD_OUT = "validation/"
SHOWN_SCANS, FEWEST_SLOTS = 200, 24  # bars of the coverage

# Title, which metrics, and how to read them; a metric goes to the first group that takes it.
GROUPS = (
    ("Losses", r"loss|matching_error|positive_", "Lines: training. Dots: held-out scans."),
    ("Overlap", r"dice", "Dice of each class over the held-out crops."),
    (
        "Teacher",
        r"teacher_|norm_|variance_|effective_rank_",
        "Dashed: the entropy of one certain prototype (0) and of all alike; a teacher at either has collapsed, and so "
        "have features of variance 0 or effective rank 1.",
    ),
    ("Optimisation", r"learning_rate|weight_decay|gradient_norm|state_norm|skipped_|.*momentum|.*temperature", ""),
    ("Views and coverage", r"views/|coverage/", "What the loader handed out: means of each logged stretch of steps."),
    ("Speed", r"step_time_s|data_wait_s|volumes_per_s", "The first steps compile; waiting for data should be short."),
    ("Other", r"", ""),
)
LOGARITHMIC = ("step_time_s", "data_wait_s", "volumes_per_s")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir tells without its checkpoints.

    Attributes:
      lines: of metrics.jsonl.
      counts: how often each scan was used; empty before the first checkpoint.
      starts: what provenance.json says of each start.
    """

    workdir: str
    config: ConfigDict
    lines: list[dict[str, Any]]
    counts: dict[str, int]
    starts: list[dict[str, Any]]

    @property
    def step(self) -> int:
        return int(self.lines[-1]["step"])


def read(workdir: str) -> Run:
    """The run of a workdir that has logged something."""
    config = checkpoint.read_config(workdir)
    if config is None:
        raise UserError(f"--workdir {workdir}: holds no run; give the folder that `alice_jax.train --workdir` wrote")
    missing = [name for name in ("objective", "seed", "steps", "batch_size", "data", "model") if name not in config]
    if missing:
        raise UserError(f"--workdir {workdir}: its config.json lacks {', '.join(missing)}; restore it")
    lines = metrics.read(workdir)
    if not lines:
        raise UserError(f"--workdir {workdir}: nothing in its metrics.jsonl yet; let the run log its first steps")
    return Run(workdir, ConfigDict(config), lines, coverage.read(workdir).get("counts", {}), provenance.read(workdir))


def series(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric; NaN where the run logged a number that is not finite."""
    found = [(line["step"], math.nan if line[name] is None else line[name]) for line in run.lines if name in line]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, float), np.array(values, float)


# ---------------------------------------------------------------- curves


def curve_sections(run: Run) -> list[Section]:
    """All metrics as small charts."""
    names = sorted({name.removeprefix(HELD_OUT) for line in run.lines for name in line} - {"step"})
    left, sections = names, []
    for title, pattern, note in GROUPS:
        mine = [name for name in left if re.match(pattern, name)]
        left = [name for name in left if name not in mine]
        parts = [page.picture(draw_curves(run, mine), note, alt=title, chart=True)] if mine else []
        if title.startswith("Views") and run.counts:
            caption = f"How often each of {len(run.counts)} training scans has been used, up to the last checkpoint."
            parts.append(page.picture(draw_coverage(run.counts), caption, chart=True))
        if parts:
            sections.append(Section(title, parts))
    return sections


def draw_curves(run: Run, names: Sequence[str], columns: int = 4) -> bytes:
    """A PNG with a chart for each metric over the steps."""
    rows = -(-len(names) // columns)
    figure = figures.new_figure(12, 2.1 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    height = 2.1 * rows
    figure.subplots_adjust(left=0.045, right=0.99, bottom=0.28 / height, top=1 - 0.3 / height, wspace=0.24, hspace=0.42)
    for axes, name in zip(panels.flat, names, strict=False):
        figures.style(axes, name)
        steps, values = series(run, name)
        axes.plot(steps, values, color=figures.BLUE, linewidth=1.3, marker="." if len(steps) < 3 else None)
        held_steps, held = series(run, HELD_OUT + name)
        axes.plot(held_steps, held, color=figures.ORANGE, marker="o", markersize=3, linewidth=0.8)
        if name.startswith("teacher_entropy"):
            for limit in (0, math.log(run.config.model.prototypes)):
                axes.axhline(limit, color=figures.INK, linewidth=0.9, linestyle=(0, (4, 3)))
        if name in LOGARITHMIC and np.nanmin(values, initial=np.inf) > 0:
            axes.set_yscale("log")
        axes.ticklabel_format(axis="x", useOffset=False)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    return figures.png(figure)


def draw_coverage(counts: dict[str, int]) -> bytes:
    """A PNG with a bar for each scan, unused ones red."""
    ids = list(counts)[:SHOWN_SCANS]
    used = np.array([counts[id] for id in ids])
    figure = figures.new_figure(12, 2.6)
    axes = figure.add_axes((0.045, 0.42, 0.945, 0.54))
    figures.style(axes)
    axes.bar(
        range(len(ids)), np.maximum(used, 0.02 * max(used.max(), 1)), color=np.where(used, figures.BLUE, figures.RED)
    )
    axes.set_xlim(-0.6, max(len(ids), FEWEST_SLOTS) - 0.4)
    step = -(-len(ids) // 60)
    axes.set_xticks(range(0, len(ids), step), ids[::step], rotation=90, fontsize=7)
    return figures.png(figure)


# ---------------------------------------------------------------- pictures


def samples_of(run: Run, sampler: Sampler, scans: Sequence[str]) -> Samples:
    """The samples of a run."""
    return Samples(sampler, len(scans), run.config.seed, run.config.batch_size, run.config.steps)


def views_section(run: Run, task: tasks.Task, count: int = 3) -> Section:
    """The first samples of an embedder: two views of one scan, a shared place marked in both."""
    sampler = task.sampler
    assert isinstance(sampler, EmbedderSampler)
    samples = samples_of(run, sampler, task.scans)
    count = min(count, len(samples))
    sheet = planes.Sheet(count, max(sampler.shape_zyx))
    for row in range(count):
        sample = samples[row]
        volumes, pairs = sample["volumes"][..., 0], int(sample["meta"]["pairs"])
        sheet.heading(row, 0, task.scans[int(sample["meta"]["scans"][0])], bold=True)
        sheet.note(row, f"{pairs} shared places", figures.SOFT_ON_SCREEN if pairs else figures.WARNING_ON_SCREEN)
        low, high = np.percentile(volumes, (1, 99.5))
        for side in range(2):
            cell = np.array(np.unravel_index(sample["pairs"][side, 0], sampler.grid_zyx))
            point = (cell + 0.5) * sampler.fine_stride_zyx - 0.5
            for i, plane in enumerate(planes.PLANES):
                cut = planes.whole(volumes.shape[1:], plane, point, (1, 1, 1))
                sheet.show(row, 3 * side + i, (cut.of(volumes[side]) - low) / max(high - low, 1e-6), cut)
                if pairs:
                    sheet.cross(row, 3 * side + i, cut, point)
    caption = f"The first {count} samples: two distorted views of one scan. Yellow: a place that both show."
    return Section("Views", [page.picture(sheet.png(), caption)])


# ---------------------------------------------------------------- setup


def setup_section(run: Run) -> Section:
    """Configuration and provenance."""
    parts = [page.text(f"Run in {os.path.abspath(run.workdir)}."), page.heading("Provenance")]
    if run.starts:
        rows = [
            (
                entry.get("step"),
                entry.get("time"),
                entry.get("devices"),
                entry.get("processes"),
                (entry.get("commit") or "unknown")[:12] + ("+" if (entry.get("commit") or "").endswith("+") else ""),
                (entry.get("embedder") or "none")[:12],
            )
            for entry in run.starts
        ]
        words = "Noted by the training program at each start. A + after the commit: with uncommitted changes."
        parts += [
            page.text(words),
            page.table(("from step", "time (UTC)", "devices", "processes", "commit", "embedder of the pairs"), rows),
            page.folded("Versions at training time", page.table(*_version_table(run.starts))),
        ]
    else:
        parts.append(page.text("Nothing noted: the run is older than this record."))
    parts.append(page.folded("Configuration", page.plain(json.dumps(run.config.to_dict(), indent=2))))
    return Section("Setup", parts)


def _version_table(starts: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A column for the first start, and one for each that changed something."""
    columns = [("step", starts[0].get("step"), starts[0].get("versions", {}))]
    for entry in starts[1:]:
        if entry.get("versions") != columns[-1][2]:
            columns.append(("step", entry.get("step"), entry.get("versions", {})))
    names = list(dict.fromkeys(name for *_, versions in columns for name in versions))
    header = ("", *(f"{word} {step}" for word, step, _ in columns))
    return header, [(name, *(versions.get(name, "") for *_, versions in columns)) for name in names]


# ---------------------------------------------------------------- checks


def checks(run: Run) -> list[Check]:
    """What can be judged from the log."""
    config, found = run.config, []
    progress = f"step {run.step} of {config.steps}"
    found.append(Check("good" if run.step >= config.steps else "look", "The run is finished", progress))
    _, loss = series(run, "loss")
    if len(loss) > 1:
        tenth = max(1, len(loss) // 10)
        first, last = np.nanmean(loss[:tenth]), np.nanmean(loss[-tenth:])
        found.append(Check("good" if last < first else "bad", "The loss falls", f"from {first:.3g} to {last:.3g}"))
    lost = sum(value is None for line in run.lines for value in line.values())
    if lost:
        found.append(Check("bad", "All numbers are finite", f"{lost} logged values are not"))
    if left_out := broken.steps(run.workdir):
        text = f"not of steps {', '.join(map(str, left_out[:5]))}{' …' * (len(left_out) > 5)}: see alice_jax.reproduce"
        found.append(Check("look", "All updates were made", text))
    for name, words in (("teacher_entropy", "global"), ("teacher_entropy_tokens", "tokens")):
        _, values = series(run, name)
        if len(values):
            most = math.log(config.model.prototypes)
            share = values[-1] / most
            level = "good" if 0.05 < share < 0.98 else "look" if 0.02 < share < 0.995 else "bad"
            text = f"entropy {values[-1]:.2f}, of 0 (one certain prototype) to {most:.2f} (all alike)"
            found.append(Check(level, f"No collapse, {words}", text))
    if run.counts:
        found.append(_coverage_check(run))
    _, weak = series(run, "views/weak")
    if len(weak):
        level = "good" if weak.mean() <= 0.05 else "look" if weak.mean() <= 0.3 else "bad"
        redraws = series(run, "views/redraws")[1].mean()
        text = f"{weak.mean():.1%} of the pairs are weak; {redraws:.1f} redrawn on average"
        found.append(Check(level, "Pairs were matched", text))
    steps, wait = series(run, "data_wait_s")
    step_time = series(run, "step_time_s")[1]
    if len(steps) > 1:  # the first line holds the compilation
        share = wait[1:].sum() / step_time[1:].sum()
        level = "good" if share < 0.3 else "look" if share < 0.7 else "bad"
        text = f"{share:.0%} of a step of {np.median(step_time[1:]):.3g} s is spent waiting for data"
        found.append(Check(level, "The loader keeps up", text))
    return found


def _coverage_check(run: Run) -> Check:
    """Each epoch has every scan once, so after one epoch none may be missing."""
    used, number = sum(count > 0 for count in run.counts.values()), len(run.counts)
    expected = min(number, run.config.batch_size * coverage.read(run.workdir)["step"])
    most, least = max(run.counts.values()), min(run.counts.values())
    text = f"{used} of {number} training scans, {least} to {most} times"
    return Check("good" if used >= expected else "bad", "Scans are used", text)
