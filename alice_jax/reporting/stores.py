"""The sections of a store: its scans, the pairs mined from them, and what the embedder makes of a body."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from alice_jax.data import cohort, embeddings, geometry, matching
from alice_jax.data.scan import Scan
from alice_jax.data.store import Store
from alice_jax.reporting import figures, page, planes
from alice_jax.reporting.page import Check, Section
from alice_jax.reporting.pair_pictures import draw_pairs, draw_statistics
from alice_jax.reporting.pairs import Limits, Pair, best_rejected, worst_accepted

SHEET_SCANS, PCA_SCANS, TABLE_SCANS, READ_SCANS, COMPARED_SCANS = 24, 4, 200, 24, 32
SLAB_MM = 32.0
FIT_CELLS = 3000  # of each scan, for the principal components


def evenly(ids: Sequence[str], count: int) -> list[str]:
    """At most `count` of them, evenly taken.

    >>> evenly(["a", "b", "c", "d"], 2)
    ['a', 'c']
    """
    count = min(count, len(ids))
    return [ids[i * len(ids) // count] for i in range(count)]


# ---------------------------------------------------------------- scans


def cohort_section(store: Store, guilty: Mapping[str, str]) -> Section:
    """Scans from the front and from the side, and their numbers.

    Args:
      guilty: what is wrong with scans; these are shown first.
    """
    ids = store.ids()
    scans = store.scans(evenly(ids, TABLE_SCANS))
    marked = list(guilty)[:SHEET_SCANS]
    shown = marked + evenly([id for id in ids if id not in guilty], SHEET_SCANS - len(marked))
    caption = (
        f"{len(shown)} of {len(ids)} scans: mean of {SLAB_MM:.0f} mm through the middle of the body, from the front "
        "and from the patient's left. Heads are up, livers on the left and hearts on the right; in the side views "
        "spines are on the right. A picture that differs has a wrong axis, and one of odd proportions a wrong spacing."
    )
    caption += " Red: named by the checks above." if guilty else ""
    rows = [_row(store, scan, i < READ_SCANS) for i, scan in enumerate(scans)]
    header = ("scan", "shape z, y, x", "field of view mm", "file's spacing mm", "file's axes", "HU 1, 50, 99 %")
    of = f" of {len(ids)}" if len(scans) < len(ids) else ""
    parts = [
        page.picture(draw_bodies(store, shown, guilty), caption),
        page.plain(cohort.summary(store, scans)),
        page.folded(f"{len(scans)}{of} scans", page.table(header, rows)),
    ]
    return Section("Scans", parts)


def _row(store: Store, scan: Scan, read: bool) -> tuple[str, ...]:
    size = np.array(scan.shape_zyx) * scan.spacing_zyx_mm
    affine = scan.original.get("affine_ras")
    spacing = "" if affine is None else " × ".join(f"{s:.2f}" for s in geometry.spacing_xyz(np.array(affine)))
    known = scan.extra.get("hu")
    percentiles = [known[name] for name in ("p1", "p50", "p99")] if known else []
    if read and not known:
        percentiles = np.percentile(store.read_volume(scan.id)[::2, ::2, ::2], (1, 50, 99))
    return (
        scan.id,
        " × ".join(map(str, scan.shape_zyx)),
        " × ".join(f"{s:.0f}" for s in size),
        spacing,
        str(scan.original.get("axcodes", "")),
        ", ".join(f"{p:.0f}" for p in percentiles),
    )


def draw_bodies(store: Store, ids: Sequence[str], guilty: Mapping[str, str], columns: int = 6) -> bytes:
    """A PNG with two slabs of each scan in true proportions, each scan as large as its cell allows."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    gap, label = 0.015, 0.11  # in cells
    slabs = [[_slab(store, store.scan(id), plane) for plane in planes.PLANES[1:]] for id in ids]
    scales = [
        min(1.1 / max(height for _, (height, _) in pair), (1 - 3 * gap) / sum(width for _, (_, width) in pair))
        for pair in slabs
    ]
    heights = [scale * max(height for _, (height, _) in pair) for scale, pair in zip(scales, slabs, strict=True)]
    rows = [max(heights[i : i + columns]) + label + gap for i in range(0, len(ids), columns)]
    figure = figures.new_figure(12, 12 * sum(rows) / columns, figures.SCREEN)
    axes = figure.add_axes((0, 0, 1, 1))
    for i, (id, pair, scale) in enumerate(zip(ids, slabs, scales, strict=True)):
        top, left = sum(rows[: i // columns]) + label, i % columns + gap
        color = figures.WARNING_ON_SCREEN if id in guilty else figures.ON_SCREEN
        axes.text(left, top - 0.02, _short(id), fontsize=9.5, color=color, va="bottom")
        if id in guilty:
            words = "\n".join(textwrap.wrap(guilty[id], 30))
            note = axes.text(left + 0.02, top + 0.03, words, fontsize=8.5, color=color, va="top", zorder=3)
            note.set_path_effects([withStroke(linewidth=3, foreground=figures.SCREEN)])
            frame = (left, top), sum(width for _, (_, width) in pair) * scale + gap, heights[i]
            axes.add_patch(Rectangle(*frame, fill=False, edgecolor=color, linewidth=2, zorder=3))
        for picture, (height, width) in pair:
            extent = (left, left + width * scale, top + height * scale, top)
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="bilinear")
            left += width * scale + gap
    axes.set(xlim=(0, columns), ylim=(sum(rows), 0))
    axes.set_axis_off()
    return figures.png(figure)


def _slab(store: Store, scan: Scan, plane: planes.Plane) -> tuple[np.ndarray, tuple[float, float]]:
    """The mean of a slab through the middle of the body, and its height and width in mm."""
    spacing, shape = np.array(scan.spacing_zyx_mm), np.array(scan.shape_zyx)
    thick = max(1, round(SLAB_MM / spacing[plane.normal]))
    start = np.zeros(3, int)
    start[plane.normal] = np.mean(scan.foreground_box_zyx_vox, axis=0)[plane.normal] - thick / 2
    shape[plane.normal] = thick
    picture = planes.tone(store.read_crop(scan.id, tuple(start), tuple(shape))).mean(axis=plane.normal)
    height, width = (spacing * scan.shape_zyx)[[plane.down, plane.right]]
    return picture[::-1], (height, width)


def _short(id: str, length: int = 26) -> str:
    return id if len(id) <= length else f"{id[: length - 1]}…"


# ---------------------------------------------------------------- pairs


def pairs_section(
    store: Store,
    pairs: Sequence[Pair],
    tries: Sequence[Pair],
    count: int,
    limits: Limits | None,
    crop_shape_zyx: Sequence[int],
    whose: str,
) -> Section:
    """The first pairs, unselected, then the statistics and the extremes of all.

    Args:
      pairs: from the first one on.
      tries: that were not accepted on the way.
      limits: to accept a match; None where nothing is matched.
      whose: what these are the first pairs of.
    """
    legend = "Yellow: the point of the query (left), and its match in the key (right). Blue: the crop."
    if any("phantom" in store.scan(id).extra for id in pairs[0].ids):
        legend += " Green: the true place of the point."
    first = pairs[:count]
    parts = [
        page.text(f"The first {len(first)} pairs of {whose}, unselected. {legend}"),
        page.picture(draw_pairs(store, first, crop_shape_zyx, limits), alt=f"The first {len(first)} pairs"),
        page.folded(f"The points of these {len(first)} pairs", _pair_table(first)),
        page.heading(f"Statistics of the first {len(pairs)} pairs"),
        page.picture(
            draw_statistics(store, pairs, tries, limits),
            "Dashed: the limits of what is accepted. The last three: where the points lie in the two bodies' boxes; "
            "a cloud instead of the diagonal means bad matches or very different fields of view.",
            chart=True,
        ),
    ]
    if limits is None:
        return Section("Pairs", parts)
    worst = worst_accepted(pairs)
    best = best_rejected(tries, limits)
    weak = sorted((pair for pair in pairs if pair.weak), key=lambda pair: -pair.score)[:1]
    lowest = "The two of the lowest score, and the one of the largest cycle error among the others."
    tried = 'Of the highest score among those that each limit turned down. "For 3": tried on the way to pair 3.'
    for title, words, chosen in (
        ("The worst accepted pairs", lowest, worst),
        ("A weak pair", "No try was accepted, and this is the best of them.", weak),
        ("The best rejected tries", tried, best),
    ):
        if chosen:
            picture = page.picture(draw_pairs(store, chosen, crop_shape_zyx, limits), alt=title)
            parts += [page.heading(title), page.text(words), picture]
    if not best:
        parts.append(page.text("No try was rejected on the way."))
    return Section("Pairs", parts)


def _pair_table(pairs: Sequence[Pair]) -> str:
    header = (
        "pair",
        "query",
        "point z, y, x",
        "key",
        "point z, y, x",
        "score",
        "cycle mm",
        "agreeing",
        "redrawn",
        "weak",
        "weight",
    )
    rows = [
        (
            pair.number + 1,
            pair.ids[0],
            ", ".join(map(str, pair.points_zyx_vox[0])),
            pair.ids[1],
            ", ".join(map(str, pair.points_zyx_vox[1])),
            f"{pair.score:.3f}",
            f"{pair.cycle_mm:.1f}" if np.isfinite(pair.cycle_mm) else "",
            f"{pair.agreeing:.0%}" if np.isfinite(pair.agreeing) else "",
            pair.redraws,
            "yes" if pair.weak else "no",
            f"{pair.weight:.2g}",
        )
        for pair in pairs
    ]
    return page.table(header, rows)


# ---------------------------------------------------------------- embeddings


def embedded(store: Store) -> list[str]:
    """The scans that the store's embedder has embedded."""
    codec = embeddings.read_codec(store)
    return [] if codec is None else [id for id in store.ids() if embeddings.embedded_by(store, id) == codec.hash]


def embedding_check(store: Store, done: Sequence[str], trained_with: str | None = None) -> Check:
    """Whether all scans are embedded.

    Args:
      trained_with: the embedder whose vectors lay in the store when a run was last started.
    """
    codec, count = embeddings.read_codec(store), len(store.ids())
    words = f"{len(done)} of {count}" + ("" if codec is None else f" by the embedder {codec.embedder[:12]}")
    level = "good" if len(done) == count else "bad" if done else "look"
    if codec is not None and trained_with not in (None, codec.embedder):
        level = "look" if level == "good" else level
        words += f"; the run was last started with pairs of {trained_with[:12]}, so those shown here are others"
    return Check(level, "Scans are embedded", words)


def embeddings_section(store: Store, ids: Sequence[str]) -> Section:
    """The same place of a few bodies, with the vectors' three principal components as colours."""
    shown = evenly(ids, PCA_SCANS)
    caption = (
        "Red, green and blue are the three main directions of the vectors, the same in all scans: like anatomy has "
        "like colours, and body and colours have one outline. The planes go through the middle of the first body "
        "and through its matches in the others."
    )
    return Section("Embeddings", [page.picture(draw_components(store, shown), caption)])


def draw_components(store: Store, ids: Sequence[str]) -> bytes:
    """A PNG with a row for each scan: three planes, and the same of the embedding's principal components."""
    reader = embeddings.EmbeddingReader(store)
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.choice(reader(id).keys, FIT_CELLS) for id in ids])
    mean = vectors.mean(axis=0)
    directions = np.linalg.svd(vectors - mean, full_matrices=False)[2][:3].T
    low, high = np.percentile((vectors - mean) @ directions, (2, 98), axis=0)

    scans = store.scans(ids)
    sheet = planes.Sheet(len(ids), planes.fitting_field_mm(scans, least=200, most=440))
    middle = np.mean(scans[0].foreground_box_zyx_vox, axis=0)[None]
    for row, (id, scan) in enumerate(zip(ids, scans, strict=True)):
        embedding = reader(id)
        point = middle[0] if row == 0 else matching.match(reader(ids[0]), middle, embedding).points_zyx_vox[0]
        sheet.heading(row, 0, id, bold=True)
        for i, plane in enumerate(planes.PLANES):
            cut = planes.window(scan, plane, point, sheet.field_mm)
            sheet.show(row, i, planes.read(store, id, cut), cut)
            voxels = np.stack(np.meshgrid(*map(np.arange, cut.shape_zyx), indexing="ij"), axis=-1) + cut.start_zyx_vox
            colors = np.zeros((*cut.shape_zyx, 3))
            inside = ((voxels >= 0) & (voxels < scan.shape_zyx)).all(axis=-1)
            cells = matching.cell_of_points(voxels[inside], embedding.codec.fine.stride_zyx_vox, embedding.grid_zyx)
            colors[inside] = _colors(embedding, cells, mean, directions, low, high)
            sheet.show(row, 3 + i, cut.turned(colors), cut)
    return sheet.png()


def _colors(
    embedding: embeddings.Embedding,
    cells_zyx: np.ndarray,
    mean: np.ndarray,
    directions: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray:
    """(n, 3) colours of fine cells (n, 3), black outside the body."""
    wanted = np.ravel_multi_index(tuple(cells_zyx.T), embedding.grid_zyx)
    row = np.minimum(np.searchsorted(embedding.body, wanted), len(embedding.body) - 1)
    colors = np.clip(((embedding.keys[row] - mean) @ directions - low) / (high - low), 0, 1)
    colors[embedding.body[row] != wanted] = 0
    return colors
