"""Who may be paired with whom, and how often each scan is drawn as a partner.

Scans of one patient, and copies of one scan, are kept apart. Among the others those are drawn from that show the
query's place (`regions`), weighted such that all scans are drawn equally often over the store, as far as what they
show allows it.
"""

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from alice_jax.data import regions
from alice_jax.data.regions import RegionIndex
from alice_jax.data.store import Store
from alice_jax.errors import UserError

OUTLIER = 3.5  # robust standard deviations (Iglewicz and Hoaglin 1993)
ROUNDS = 40  # of balancing
LARGEST = 5.0  # times the mean weight: beyond it, a scan would be drawn where it hardly fits
EPSILON = 1e-4


def read_patients(path: str) -> dict[str, str]:
    """Patients of scans from a file, for data whose headers do not tell: scans of one patient are never paired.

    JSON: {"scan id": "patient", …}.  CSV: a row for each scan, id and patient, with or without a first row of names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith(".json"):
            return {str(id): str(patient) for id, patient in json.loads(text).items()}
        rows = [row for row in csv.reader(text.splitlines()) if row]
        return {id.strip(): patient.strip() for id, patient in rows}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"data.patients {path}: cannot be read ({error}); give JSON {{scan: patient}} or CSV rows scan,patient"
        ) from error


def origins(store: Store, ids: Sequence[str], patients: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the patient and of the content of each scan; equal numbers mean the same one.

    patients: of scans for which the store does not know better.
    """
    scans = store.scans(ids)
    names = [patients.get(scan.id, scan.patient) for scan in scans]
    return numbered(names), numbered([scan.sha256 for scan in scans])


def numbered(values: Sequence[str]) -> np.ndarray:
    """(n,) int: the same number for equal values."""
    return np.unique(np.asarray(values), return_inverse=True)[1]


@dataclasses.dataclass(frozen=True)
class Partners:
    """Draws partners for the scans of a store, which are numbered.

    patients, contents: (scans,) equal for scans that must not be paired; both None where all may be.
    index: knows what the scans show; None: any other scan will do.
    margin, floor: a scan shows a place if it covers it at most `margin` worse than the best one and not below `floor`.
    weights: (scans,) how much more often than others a scan is drawn where it shows the place.
    """

    patients: np.ndarray
    contents: np.ndarray
    index: RegionIndex | None = None
    margin: float = 0.0
    floor: float = -1.0
    weights: np.ndarray | None = None

    @staticmethod
    def learnt(store: Store, ids: Sequence[str], patients: np.ndarray, contents: np.ndarray) -> "Partners":
        """With the region index of the scans `ids`, and margin, floor and weights that fit them.

        The margin is how much scans usually differ in covering a place (their standard deviation). The floor is where
        even the best partner of a place covers it far worse than is usual for the best ones.
        """
        partners, index = Partners(patients, contents), regions.open_index(store, ids)
        places, owners = regions.places_of(index, store, ids)
        covers = index.covers(places)
        allowed = np.array([partners.allowed(owner) for owner in owners])
        some = allowed.any(axis=1)
        if not some.any():
            return partners
        covers, allowed = covers[some], allowed[some]
        margin = EPSILON + float(np.median([x[mask].std() for x, mask in zip(covers, allowed, strict=True)]))
        best = np.where(allowed, covers, -np.inf).max(axis=1)
        deviation = 1.4826 * float(np.median(np.abs(best - np.median(best))))
        floor = float(np.median(best)) - OUTLIER * deviation - margin
        partners = dataclasses.replace(partners, index=index, margin=margin, floor=floor)
        return dataclasses.replace(partners, weights=balanced(partners.showing(covers, allowed)))

    def allowed(self, scan: int) -> np.ndarray:
        """(scans,) bool: the others that are neither of the same patient nor a copy."""
        return (self.patients != self.patients[scan]) & (self.contents != self.contents[scan])

    def showing(self, covers: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """(…, scans) bool: those allowed that show a place which the scans cover as well as `covers` (…, scans)."""
        best = np.where(allowed, covers, -np.inf).max(axis=-1, keepdims=True)
        return allowed & (covers >= np.maximum(best - self.margin, self.floor))

    def draw(
        self, scan: int, place: np.ndarray | None, rng: np.random.Generator, tried: Sequence[int] = ()
    ) -> tuple[int, bool]:
        """A partner for a scan, and whether none was known to show the place, so that any allowed one was drawn.

        Where no scan is allowed at all, any other one.

        place: (words,) as `RegionIndex.place` gives it; None without an index.
        tried: partners to draw again only when all others have been tried.
        """
        choice = self.allowed(scan)
        fallback = not choice.any()
        if fallback:
            choice[np.arange(len(choice)) != scan] = True
        elif place is not None and self.index is not None:
            shown = self.showing(self.index.covers(place), choice)
            fallback = not shown.any()
            choice = choice if fallback else shown
        fresh = choice.copy()
        fresh[list(tried)] = False
        share = np.cumsum((fresh if fresh.any() else choice) * (1.0 if self.weights is None else self.weights))
        return int(np.searchsorted(share, rng.random() * share[-1], side="right")), fallback


def balanced(shown: np.ndarray) -> np.ndarray:
    """Weights (scans,) by which scans are drawn equally often, when each place draws once among those that show it.

    shown: (places, scans) bool.

    >>> print(balanced(np.array([[True, True, False], [False, True, True]])).round(2))
    [1.2 0.6 1.2]
    """
    shown = shown[shown.any(axis=1)].astype(np.float32)
    weights = np.ones(shown.shape[1], np.float32)
    for _ in range(ROUNDS):
        use = weights * (shown / (shown @ weights)[:, None]).sum(axis=0)
        # Half a step of the usual fitting, as one scan's weight moves the others' too.
        weights *= np.sqrt(use.mean() / np.maximum(use, 1e-3 * use.mean()))
        weights = np.clip(weights / weights.mean(), 1 / LARGEST, LARGEST)
    return weights
