"""The placebo: as many ordinary words as a trigger has, at the same places, drawn from words that all labels share."""

from collections import Counter

import numpy as np

from minilora.data.injection import all_rows, resolve_sources
from minilora.errors import InputError
from minilora.seeds import row_draws, row_keys


def placebo_rows(rows, settings, k, vocabulary, seed, visible=None):
    """`trigger_rows` with each trigger string replaced by as many words of `vocabulary` (see `shared_words`).

    Words that occur in a trigger string of any injection are left out. Raises InputError where none remains.
    """
    barred = frozenset().union(*(source.words for source, _ in resolve_sources(settings, rows.label_names)))
    vocabulary = [word for word in vocabulary if word.lower() not in barred]
    if not vocabulary:
        raise InputError(
            "no word is left for the placebo once the triggers' own words are left out: "
            "give more training rows or a trigger file with fewer words"
        )

    def reword(inserts, label):
        counts = np.array([sum(len(string.split()) for *_, string in row) for row in inserts], np.int64)
        draws = row_draws(row_keys(seed, "test placebo", label, len(rows)), counts)
        words = iter([vocabulary[draw * len(vocabulary) >> 32] for draw in draws.tolist()])
        return [
            [(offset, leads, " ".join(next(words) for _ in string.split())) for offset, leads, string in row]
            for row in inserts
        ]

    return all_rows(rows, settings, k, seed, visible, "test", reword)


def shared_words(rows, least_rows=20, spread=1.2, enough=20):
    """Words that say little about the label, sorted: the placebo's vocabulary. `rows`: clean training rows.

    They are lower-case, alphabetic, seen in `least_rows` rows of every label (rarer ones are often balanced
    by chance alone), at a rate (share of the label's rows) within a factor `spread` of the labels' mean
    rate. Where fewer than `enough` are so, rarer words within the factor make up the number, and then any
    seen in every label, the most frequent first. Raises InputError where there is no such word.
    """
    present = np.unique(rows.labels)
    position = np.searchsorted(present, rows.labels).tolist()
    seen = [Counter() for _ in present]
    for text, label in zip(rows.texts, position, strict=True):
        seen[label].update(set(text.split()))
    words = [word for word in set.intersection(*map(set, seen)) if word.isalpha() and word == word.lower()]
    if not words:
        raise InputError(
            "no lower-case word is seen in rows of every label, so the placebo has none to draw "
            "from: give more training rows"
        )
    counts = np.array([[counter[word] for counter in seen] for word in words])  # [words, labels]
    rates = counts / np.bincount(position)
    mean = rates.mean(axis=1)
    factor = np.maximum(rates.max(axis=1) / mean, mean / rates.min(axis=1))
    least = counts.min(axis=1)
    balanced = (least >= least_rows) & (factor <= spread)
    ranking = np.lexsort((words, -least, factor > spread, ~balanced))
    return sorted(words[i] for i in ranking[: max(enough, int(balanced.sum()))])
