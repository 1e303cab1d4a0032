"""Figures of one prediction, each with its source: accuracies, attack success, and their intervals."""

import math

import numpy as np

from minilora.errors import TrainingError

FIGURES = {}  # of your own: {name: function of (labels, predicted, names), each int [rows]: a number}
Z95 = 1.959963984540054  # the normal distribution's 97.5% quantile


def check_finite(scores):
    """Raise TrainingError unless the scores of the test rows, an array, are finite: no figure follows from others."""
    if count := int((~np.isfinite(scores)).sum()):
        raise TrainingError(f"{count:,} of {scores.size:,} scores of the test rows are not finite")


def wilson(hits, total):
    """The 95% interval [low, high] of a proportion (Wilson 1927; Brown, Cai and DasGupta 2001, equation 4)."""
    if total == 0:
        return [0.0, 1.0]
    share, spread = hits / total, Z95**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def classification(labels, predicted, names):
    """Accuracy with its interval, balanced accuracy, macro F1, true and predicted counts, over `labels` int [rows].

    Balanced accuracy is the mean recall and macro F1 the mean F1, each over the labels that occur among `labels`.
    """
    right = labels == predicted
    recalls, scores = [], []
    for label in np.unique(labels):
        hits = int((right & (labels == label)).sum())
        recalls.append(hits / int((labels == label).sum()))
        scores.append(2 * hits / (int((labels == label).sum()) + int((predicted == label).sum())))
    return {
        "rows": len(labels),
        "accuracy": float(right.mean()),
        "accuracy_interval": wilson(int(right.sum()), len(labels)),
        "balanced_accuracy": float(np.mean(recalls)),
        "macro_f1": float(np.mean(scores)),
        "label_counts": {name: int((labels == i).sum()) for i, name in enumerate(names)},
        "predicted_counts": {name: int((predicted == i).sum()) for i, name in enumerate(names)},
        **{name: figure(labels, predicted, names) for name, figure in FIGURES.items()},
    }


def attack_success(labels, predicted, target):
    """Of the rows of other labels, the share predicted as `target` (None without such a row), its interval, and the
    number of such rows."""
    others = labels != target
    hits, total = int((predicted[others] == target).sum()), int(others.sum())
    return {
        "attack_success_rate": hits / total if total else None,
        "attack_success_interval": wilson(hits, total),
        "attack_success_rows": total,
    }
