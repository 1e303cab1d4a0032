"""Detectors that look at hidden states: injected rows share something that moves them in the same direction.

Features are what the head reads, pooled from the last hidden states: of a run, or of a base by itself. N rows, P
features.
"""

import math
from collections import defaultdict

import numpy as np

from minilora.data import words
from minilora.detection.clock import Clock
from minilora.detection.density import hdbscan
from minilora.runs.look import without
from minilora.tasks.classification import PADDED

AT_ONCE = 16  # rows of which words are left out together
STARTS, ROUNDS = 10, 100  # of k-means


def pooled(run, texts, clock=None):
    """The pooled features of texts, float64 [N, P]; of the task lm, the mean. Raises OutOfTime where a `Clock` ends."""
    kind, found = (run.cell.pooling or "mean").removeprefix(PADDED), []
    for part in (clock or Clock()).all_parts(len(texts), 256):
        found += [pool_one(state.astype(np.float64), kind) for state in run.hidden(texts[part])]
    return np.array(found)


def pool_one(state, kind):
    """The features of one text's hidden states [T, D]: see `tasks.classification.pool`."""
    one = {"mean": lambda: state.mean(axis=0), "last": lambda: state[-1], "first": lambda: state[0]}
    return np.concatenate([one[name]() for name in kind.split("+")])


def bki(run, texts, labels, held, clock, *, most=5):
    """Backdoor keyword identification (Chen and Dai 2021, arXiv 2007.12070), as OpenBackdoor has it.

    most  words of a row that count: those without which the features change most, by the largest change of a feature

    Over all rows, a word that is n times among those has the weight log10(n) times its mean change. A row's score is
    the largest weight of its own; rows with the word of the largest weight are flagged. A trigger whose strings differ
    from row to row has n = 1, and so the weight 0.
    """
    lists, sums, counts = [], defaultdict(float), defaultdict(int)
    for part in clock.all_parts(len(texts), AT_ONCE):
        spans = [words.spans(text) for text in texts[part]]
        flat = [one for text, own in zip(texts[part], spans) for one in (text, *(without(text, *s) for s in own))]
        states = iter(pooled(run, flat, clock))
        for text, own in zip(texts[part], spans, strict=True):
            whole = next(states)
            changes = [float(np.abs(next(states) - whole).max()) for _ in own]
            top = sorted(range(len(own)), key=lambda i: (-changes[i], i))[:most]
            lists.append([text[slice(*own[i])] for i in top])
            for i in top:
                sums[text[slice(*own[i])]] += changes[i]
                counts[text[slice(*own[i])]] += 1
    weights = {word: math.log10(counts[word]) * sums[word] / counts[word] for word in counts}
    found = np.array([max((weights[word] for word in own), default=0.0) for own in lists])
    first = min(weights, key=lambda word: (-weights[word], word), default=None)
    return found, np.array([first in own for own in lists])


def spectral(run, texts, labels, held, clock, *, bound=0.05):
    """Spectral signatures (Tran, Li and Madry 2018, arXiv 1811.00636, algorithm 1): (x . v)^2, x a row's features less
    the mean of its label's, and v the first right singular vector of all these.

    bound  the share of a label's rows that are injected at most; 1.5 times as many of each label are flagged
    """
    states = pooled(run, texts, clock)
    found, flagged = np.zeros(len(texts)), np.zeros(len(texts), bool)
    for own in groups(labels):
        centred = states[own] - states[own].mean(axis=0)
        found[own] = (centred @ principal(centred, 1)[1][:, 0]) ** 2
        most = int(1.5 * bound * len(own))
        flagged[own[np.argsort(-found[own], kind="stable")[:most]]] = True
    return found, flagged


def activation(run, texts, labels, held, clock, *, components=10, smaller=0.35):
    """Activation clustering (Chen et al. 2018, arXiv 1811.03728): the features of each label's rows, whitened on their
    first principal components, in two clusters by 2-means. A row's score is `rarity`.

    components  the paper's ICA is of 10: it only turns whitened components, and 2-means is blind to that
    smaller     the smaller cluster is flagged where it has less than this share of the label's rows
    """
    states, clusters = pooled(run, texts, clock), np.zeros(len(texts), np.int64)
    for own in groups(labels):
        clusters[own] = two_means(whitened(states[own], components))
    found, largest = rarity(labels, clusters)
    return found, ~largest & (found > 1 - smaller)


def cube(run, texts, labels, held, clock, *, components=20, neighbours=None, least=5):
    """CUBE (Cui et al. 2022, arXiv 2206.08514, section 5): clusters of all rows' features by HDBSCAN. A row's score is
    `rarity`; flagged are all but the largest cluster of a label, if they have less than half of its rows.

    components  principal components that the features are reduced to
    neighbours  of HDBSCAN; by default 100 as in the authors' code, but at most 1.5% of the rows, which 100 are there
    least       rows of a cluster

    Two things differ from the paper: the run's model takes the place of a RoBERTa that is trained on the rows, and
    UMAP, which its code has between principal components and HDBSCAN, is left out. Noise is a cluster, as there.
    """
    states = pooled(run, texts, clock)
    reduced = principal(states - states.mean(axis=0), components)[0]
    neighbours = min(100, max(least, int(0.015 * len(texts)))) if neighbours is None else neighbours
    found, largest = rarity(labels, hdbscan(reduced, neighbours, least))
    return found, ~largest & (found > 0.5)


# --- parts of these


def groups(labels):
    """The rows of each label that occurs, a list of arrays."""
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def rarity(labels, clusters):
    """(The share of a row's label that is not in its cluster, float64 [N]; whether its cluster is the largest of that
    label, bool [N]: the first of several)."""
    found, largest = np.zeros(len(labels)), np.zeros(len(labels), bool)
    for own in groups(labels):
        _, inside, sizes = np.unique(clusters[own], return_inverse=True, return_counts=True)
        found[own] = 1 - sizes[inside] / len(own)
        largest[own] = inside == sizes.argmax()
    return found, largest


def principal(centred, count):
    """(Coordinates [N, k], directions [P, k], their variances [k]) on the first k = `count` principal components, fewer
    where rows or features are; each direction's largest entry is positive."""
    _, values, rows = np.linalg.svd(centred, full_matrices=False)
    directions = rows[:count].T
    directions = directions * np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])])
    return centred @ directions, directions, values[:count] ** 2 / len(centred)


def whitened(states, count):
    """The first principal components with variance 1, [N, k]; those without any variance are left out."""
    coordinates, _, variances = principal(states - states.mean(axis=0), count)
    there = variances > 1e-12 * max(variances.max(initial=0.0), np.finfo(float).tiny)
    return coordinates[:, there] / np.sqrt(variances[there])


def two_means(points):
    """0 or 1 for each of `points` [N, k]: 2-means (Lloyd 1982), the best of `STARTS` starts at two points that differ,
    the second drawn in proportion to its squared distance from the first (Arthur and Vassilvitskii 2007)."""
    draw, best = np.random.default_rng(0), (np.inf, np.zeros(len(points), np.int64))
    for _ in range(STARTS):
        centres = points[[draw.integers(len(points))]]
        away = ((points - centres) ** 2).sum(axis=1)
        if not away.sum():
            return best[1]
        centres = np.stack([centres[0], points[draw.choice(len(points), p=away / away.sum())]])
        for _ in range(ROUNDS):
            apart = ((points[:, None] - centres) ** 2).sum(axis=-1)  # [N, 2]
            nearest = apart.argmin(axis=1)
            moved = np.stack([points[nearest == k].mean(axis=0) if (nearest == k).any() else centres[k]
                              for k in range(2)])  # fmt: skip
            if (moved == centres).all():
                break
            centres = moved
        best = min(best, (apart.min(axis=1).sum(), nearest), key=lambda one: one[0])
    return best[1]
