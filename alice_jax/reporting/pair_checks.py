"""What can be judged from pairs alone: a dead loader, scans that yield nothing, bad matches."""

import collections
from collections.abc import Sequence

import numpy as np

from alice_jax.data.store import Store
from alice_jax.reporting.page import Check, listed
from alice_jax.reporting.pairs import Limits, Pair, errors_mm, relative_places

AXES = ("I–S", "A–P", "R–L")  # z, y, x
FEWEST_FOR_PLACES = 12  # pairs
EMPTY = 0.02  # share of voxels that are not black


def checks(store: Store, pairs: Sequence[Pair], tries: Sequence[Pair], limits: Limits | None) -> list[Check]:
    """limits: None for pairs that were not matched."""
    found = [_alive(pairs), _full(pairs)]
    if limits is None:
        return found
    found.append(_accepted(pairs, tries, limits))
    found += _places(store, pairs)
    errors, baseline = errors_mm(store, pairs)
    if len(errors):
        ours, theirs = np.median(errors), np.median(baseline)
        level = "good" if ours < 0.7 * theirs else "look" if ours < theirs else "bad"
        words = f"median {ours:.0f} mm, where the same relative place in the body's box is off by {theirs:.0f} mm"
        found.append(Check(level, "Matches are near the truth", words))
    return found


def _alive(pairs: Sequence[Pair]) -> Check:
    """Each sample is another one, and every scan is a query before any is so twice."""
    counts = collections.Counter(pair.content for pair in pairs)
    words = f"the first {len(pairs)} pairs of crops are {len(counts)} different ones"
    if len(counts) >= 0.9 * len(pairs):
        return Check("good", "The loader is alive", words)
    content, times = counts.most_common(1)[0]
    first = next(pair for pair in pairs if pair.content == content)
    words += f"; {first.ids[0]} with {first.ids[1]} comes {times} times"
    return Check("bad", "The loader is alive", words)


def _full(pairs: Sequence[Pair]) -> Check:
    """Crops show something; scans are named most of whose crops do not."""
    crops: dict[str, list[bool]] = collections.defaultdict(list)
    for pair in pairs:
        for id, filled, flat in zip(pair.ids, pair.filled, pair.flat, strict=True):
            crops[id].append(bool(flat or filled < EMPTY))
    share = float(np.mean([nothing for each in crops.values() for nothing in each]))
    words = f"{share:.0%} of the crops are empty or of one value"
    guilty = [id for id, each in crops.items() if len(each) > 1 and np.mean(each) > 0.5]
    if guilty:
        words += f": nearly all of {listed(sorted(guilty))}"
    level = "bad" if guilty or share > 0.3 else "look" if share > 0.1 else "good"
    return Check(level, "Crops show something", words)


def _accepted(pairs: Sequence[Pair], tries: Sequence[Pair], limits: Limits) -> Check:
    weak = float(np.mean([pair.weak for pair in pairs]))
    level = "good" if weak <= 0.05 else "look" if weak <= 0.3 else "bad"
    low = sum(each.score <= limits.threshold for each in tries)
    alone = sum(each.agreeing < limits.agreeing for each in tries)
    words = f"{weak:.0%} of {len(pairs)} are weak; {np.mean([pair.redraws for pair in pairs]):.1f} tries redrawn a pair"
    if tries:
        words += f": {low} for a low score, {len(tries) - low - alone} for a cycle error above {limits.cycle_mm:.0f} mm"
        words += f", {alone} since less than {limits.agreeing:.0%} of the surroundings agree"
    return Check(level, "Matches are accepted", words)


def _places(store: Store, pairs: Sequence[Pair]) -> list[Check]:
    """Places in the two bodies correlate along each axis, and with no other axis more."""
    if len(pairs) < FEWEST_FOR_PLACES:
        return []
    places = relative_places(store, pairs)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.nan_to_num(np.corrcoef(places[:, 0].T, places[:, 1].T)[:3, 3:])
    own = np.diag(correlation)
    words = "places in query and key correlate: " + ", ".join(
        f"{name} {value:.2f}" for name, value in zip(AXES, own, strict=True)
    )
    swapped = any(abs(correlation[i]).argmax() != i for i in range(3))
    if own.min() < -0.3 or (swapped and own.min() < 0.3):
        return [Check("bad", "Places agree", f"{words}; an axis is flipped or two are swapped")]
    level = "look" if own.min() < 0.3 else "good"
    return [Check(level, "Places agree", words + ("; low where fields of view differ much" if level == "look" else ""))]
