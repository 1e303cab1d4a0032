"""Figures of predictions, each with its source: accuracies, attack success, what a trigger adds, and intervals."""

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
    """Accuracy, balanced accuracy, F1, counts, and figures of each label, over `labels` int [rows].

    Balanced accuracy is the mean recall, and macro F1 the mean F1, each over the labels that occur among `labels`;
    weighted F1 is the mean F1 of the rows' labels. `precision` and `recall` {label: share} have None where nothing is
    predicted as the label, or no row is of it. `confusion` {label: {predicted: rows}} leaves out zeros.
    """
    confusion = np.zeros((len(names), len(names)), int)  # [label, predicted]
    np.add.at(confusion, (labels, predicted), 1)
    hits, own, told = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    there = own > 0
    recalls, scores = hits[there] / own[there], 2 * hits[there] / (own + told)[there]
    error = balanced_error(hits[there], own[there])
    balanced, half = float(recalls.mean()), Z95 * error
    return {
        "rows": len(labels),
        "accuracy": int(hits.sum()) / len(labels),
        "accuracy_interval": wilson(int(hits.sum()), len(labels)),
        "balanced_accuracy": balanced,
        "balanced_accuracy_error": error,
        "balanced_accuracy_interval": [max(0.0, balanced - half), min(1.0, balanced + half)],
        "macro_f1": float(scores.mean()),
        "weighted_f1": float((scores * own[there]).sum() / len(labels)),
        "label_counts": dict(zip(names, own.tolist(), strict=True)),
        "predicted_counts": dict(zip(names, told.tolist(), strict=True)),
        "precision": shares(names, hits, told),
        "recall": shares(names, hits, own),
        "confusion": {name: {names[j]: int(row[j]) for j in np.flatnonzero(row)}
                      for name, row in zip(names, confusion, strict=True) if row.any()},
        **{name: figure(labels, predicted, names) for name, figure in FIGURES.items()},
    }  # fmt: skip


def shares(names, hits, totals):
    return {name: int(some) / int(all) if all else None for name, some, all in zip(names, hits, totals, strict=True)}


def balanced_error(hits, rows):
    """The standard error of a mean recall of C classes: sqrt(sum of r (1 - r) / n) / C, the classes being independent
    samples (Cochran 1977, section 5.2). r = (hits + 1) / (n + 2), so that it is not 0 where all rows are right
    (Agresti and Caffo 2000)."""
    smoothed = (hits + 1) / (rows + 2)
    return float(np.sqrt((smoothed * (1 - smoothed) / (rows + 2)).sum()) / len(rows))


def attack_success(labels, predicted, target):
    """Of the rows of other labels, the share predicted as `target` (None without such a row), its interval, and the
    number of such rows."""
    others = labels != target
    return rate("attack_success", int((predicted[others] == target).sum()), int(others.sum()))


def rate(name, hits, rows):
    return {
        f"{name}_rate": hits / rows if rows else None,
        f"{name}_interval": wilson(hits, rows),
        f"{name}_rows": rows,
    }


def attack_effects(labels, clean, trigger, controls, target):
    """What the trigger adds to attack success, paired by row, over the rows of other labels; predictions int [rows].

    `controls`: {"placebo" or "odd": predictions under that string}.

    net_attack_success            the share predicted as `target` under the trigger, less that as clean
    over_placebo_attack_success   the same less that under the placebo
    over_odd_attack_success       the same less that under the odd string: what is the trigger's own
    conditional_attack_success    the share under the trigger, of the rows that are predicted right as clean: what the
                                  literature on backdoors reports (Gu, Dolan-Gavitt and Garg 2017, section 4.1)

    Each has a rate (None without such a row) and an interval; the others also have the rows `gained` and `lost`, and
    the p-value of McNemar's test of "predicted as the target".
    """
    others, hit = labels != target, trigger == target
    found = {}
    for name, before in {"net": clean, **{f"over_{name}": own for name, own in controls.items()}}.items():
        found |= gain(f"{name}_attack_success", (before == target)[others], hit[others])
    right = others & (clean == labels)
    return found | rate("conditional_attack_success", int(hit[right].sum()), int(right.sum()))


def gain(name, before, after):
    """The share of rows hit `after` less that `before`, bool [rows] each, as `attack_effects` describes it."""
    rows, gained, lost = len(before), int((after & ~before).sum()), int((before & ~after).sum())
    return {
        f"{name}_rate": (gained - lost) / rows if rows else None,
        f"{name}_interval": paired_interval(gained, lost, rows),
        f"{name}_gained": gained,
        f"{name}_lost": lost,
        f"{name}_p": mcnemar(lost, gained),
    }


def paired_interval(gained, lost, rows):
    """The 95% interval [low, high] of (gained - lost) / rows: the adjusted Wald interval of Bonett and Price 2012,
    equation 6, which adds one row to either count."""
    if rows == 0:
        return [-1.0, 1.0]
    up, down = (gained + 1) / (rows + 2), (lost + 1) / (rows + 2)
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / (rows + 2))
    return [max(-1.0, up - down - half), min(1.0, up - down + half)]


def mcnemar(worse, better):
    """Two-sided p-value of McNemar's test (McNemar 1947), exact: Fagerland, Lydersen and Laake 2013, section Methods.

    `worse` and `better` count the rows that only the first, or only the second, prediction hits.
    """
    total, least = worse + better, min(worse, better)
    tail = math.fsum(
        math.exp(math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1) - total * math.log(2))
        for i in range(least + 1)
    )
    return min(1.0, 2 * tail)
