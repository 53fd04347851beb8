"""How well classes are told apart: k-NN and a linear probe on features, AUROC, balanced accuracy, F1, their intervals.

The one file that uses scikit-learn. Truth is (n,) classes or (n, labels) of 0 and 1; scores are (n, K) probabilities of
the K classes or labels.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from alice_jax.errors import UserError

NEIGHBOURS = 5
MEASURES = ("auroc", "balanced_accuracy", "f1")
LEVEL = 0.95  # of the intervals


def measures(truth: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """AUROC (mean over the classes or labels, each against the rest), balanced accuracy and F1 (mean likewise).

    Decided for the likeliest class, and for labels above 0.5. A class or label that the truth does not hold both with
    and without counts in no mean; NaN where none is left.

    >>> measures(np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]]))
    {'auroc': 1.0, 'balanced_accuracy': 0.75, 'f1': 0.7333}
    """
    from sklearn import metrics

    multi = truth.ndim == 2
    columns = np.arange(scores.shape[1])
    are = truth > 0 if multi else truth[:, None] == columns
    said = scores > 0.5 if multi else scores.argmax(axis=1)[:, None] == columns
    told = are.any(axis=0) & ~are.all(axis=0)
    if not told.any():
        return dict.fromkeys(MEASURES, np.nan)
    _, recall, f1, _ = metrics.precision_recall_fscore_support(are, said, average=None, zero_division=0)
    if multi:  # a label's balanced accuracy counts those without it too
        recall = (recall + metrics.recall_score(~are, ~said, average=None, zero_division=0)) / 2
    auroc = metrics.roc_auc_score(are[:, told], scores[:, told], average="macro")
    values = {"auroc": auroc, "balanced_accuracy": recall[told].mean(), "f1": f1[told].mean()}
    return {name: round(float(value), 4) for name, value in values.items()}


def with_intervals(
    truth: np.ndarray, scores: Sequence[np.ndarray], patients: Sequence[str], draws: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """{measure: (value, low, high)}: the mean over the repeats, and the percentile bootstrap over patients.

    Args:
      scores: (n, K) of each repeat; every draw takes one of them in turn.
      patients: (n,); the scans of one are drawn together.
    """
    values = [measures(truth, each) for each in scores]
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(np.asarray(patients) == name) for name in dict.fromkeys(patients)]
    drawn: dict[str, list[float]] = {name: [] for name in MEASURES}
    for draw in range(draws):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        for name, value in measures(truth[rows], scores[draw % len(scores)][rows]).items():
            drawn[name].append(value)
    found = {}
    for name in MEASURES:
        low, high = np.nanpercentile(drawn[name], [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        found[name] = float(np.mean([value[name] for value in values])), float(low), float(high)
    return found


# ---------------------------------------------------------------- classifiers of features


def _nearest_neighbours(rows: int):
    from sklearn import neighbors

    count = min(NEIGHBOURS, rows)
    return neighbors.KNeighborsClassifier(count, weights="distance", metric="cosine", algorithm="brute")


def _linear_probe(rows: int):
    from sklearn import linear_model

    return linear_model.LogisticRegression(class_weight="balanced", max_iter=2000)


CLASSIFIERS: dict[str, Callable] = {"k-NN": _nearest_neighbours, "linear probe": _linear_probe}


def scores_of(kind: str, features: np.ndarray, truth: np.ndarray, others: np.ndarray, classes: int) -> np.ndarray:
    """(m, K) scores of features `others` (m, c) by a classifier fitted on `features` (n, c); all are standardised."""
    if truth.ndim == 2:  # each label for itself
        each = [scores_of(kind, features, truth[:, label].astype(int), others, 2)[:, 1] for label in range(classes)]
        return np.stack(each, axis=1)
    scores = np.zeros((len(others), classes))
    present = np.unique(truth)
    if len(present) == 1:
        scores[:, present] = 1
        return scores
    from sklearn import pipeline, preprocessing

    model = pipeline.make_pipeline(preprocessing.StandardScaler(), CLASSIFIERS[kind](len(truth)))
    scores[:, present] = model.fit(features, truth).predict_proba(others)
    return scores


def cross_validated(
    kind: str,
    features: np.ndarray,
    truth: np.ndarray,
    patients: Sequence[str],
    classes: int,
    folds: int = 5,
    repeats: int = 5,
    seed: int = 0,
) -> list[np.ndarray]:
    """For each repeat the scores (n, K) of scans by classifiers that have seen neither them nor their patients.

    Folds are stratified by class, or by the combination of labels; there are at most as many as the rarest class has
    patients, or the commonest combination scans.

    Raises:
      UserError: all scans are of one patient.
    """
    from sklearn import model_selection

    strata = np.unique(truth, axis=0, return_inverse=True)[1].ravel()
    groups = np.unique(np.asarray(patients), return_inverse=True)[1]
    if not groups.any():
        raise UserError(f"--labels: all of its scans are of patient {patients[0]}; cross-validation needs two or more")
    if strata.max() + 1 == len(strata):  # each scan stands alone
        strata = np.zeros_like(strata)
    if truth.ndim == 1:
        folds = min(folds, *(len(np.unique(groups[strata == s])) for s in range(strata.max() + 1)))
    folds = max(2, min(folds, np.bincount(strata).max(), groups.max() + 1))
    found = []
    for repeat in range(repeats):
        division = model_selection.StratifiedGroupKFold(folds, shuffle=True, random_state=seed + repeat)
        scores = np.zeros((len(truth), classes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of combinations of labels that are rarer than the folds
            parts = list(division.split(features, strata, groups))
        for train, test in parts:
            scores[test] = scores_of(kind, features[train], truth[train], features[test], classes)
        found.append(scores)
    return found
