"""The placebo: as many words as a trigger has, at the same places, drawn from words that say little about the label."""

from collections import Counter

import numpy as np

from minilora.console import watch
from minilora.data import words
from minilora.data.injection import all_rows, resolve_sources
from minilora.seeds import row_draws, row_keys


def placebo_rows(rows, settings, k, vocabulary, seed, visible=None, draw=None):
    """`trigger_rows` with each trigger string replaced by as many words of `vocabulary` (see `placebo_words`)."""

    def reword(inserts, label):
        inserts = list(inserts)
        counts = np.array([sum(len(words.split(string)) for *_, string in row) for row in inserts], np.int64)
        draws = row_draws(row_keys(seed if draw is None else draw, "test placebo", label, len(rows)), counts)
        drawn = iter([vocabulary[draw * len(vocabulary) >> 32] for draw in draws.tolist()])

        def other(string):
            between = " " if len(string.split()) > 1 else ""  # as in the string
            return between.join(next(drawn) for _ in words.split(string))

        return [[(offset, leads, other(string)) for offset, leads, string in row] for row in inserts]

    return all_rows(rows, settings, k, seed, visible, "test", reword, draw)


def placebo_words(rows, settings, label_names=None):
    """(the placebo's vocabulary, what it is), from `rows`, the clean training rows; ([], None) where there is none.

    label_names  those that the labels of the triggers are among (default: those of `rows`)

    The first of these that has a word which is in rows of every label and in no trigger string of `settings`: ordinary
    words (lower-case and alphabetic), any words, the characters of the rows.
    """
    sources = resolve_sources(settings, label_names or rows.label_names)
    triggers = frozenset().union(*(source.words for source, _ in sources))
    steps = (
        ("ordinary words", words.split, is_ordinary),
        ("any words", words.split, words.says),
        ("characters", words.graphemes, words.says),
    )
    for what, divide, fits in steps:
        found = [word for word in shared_words(rows, divide, fits) if word.lower() not in triggers]
        if found:
            return found, what
    return [], None


def is_ordinary(word):
    return word.isalpha() and word == word.lower()


def shared_words(rows, divide=words.split, fits=is_ordinary, least_rows=20, spread=1.2, enough=20):
    """Words that say little about the label, sorted. `rows`: clean training rows.

    divide  function of a text: its words
    fits    function of a word: whether it may be taken

    They are seen in `least_rows` rows of every label (rarer ones are often balanced only by chance), at a rate (share
    of the label's rows) within a factor `spread` of the labels' mean rate. Where fewer than `enough` are so, rarer
    words within the factor make up the number, and then any seen in every label, the most frequent first.
    """
    present = np.unique(rows.labels)
    position = np.searchsorted(present, rows.labels).tolist()
    seen = [Counter() for _ in present]
    for text, label in zip(watch(rows.texts, "finding placebo words"), position, strict=True):
        seen[label].update(set(divide(text)))
    found = [word for word in set.intersection(*map(set, seen)) if fits(word)]
    if not found:
        return []
    counts = np.array([[counter[word] for counter in seen] for word in found])  # [words, labels]
    rates = counts / np.bincount(position)
    mean = rates.mean(axis=1)
    factor = np.maximum(rates.max(axis=1) / mean, mean / rates.min(axis=1))
    least = counts.min(axis=1)
    balanced = (least >= least_rows) & (factor <= spread)
    ranking = np.lexsort((found, -least, factor > spread, ~balanced))
    return sorted(found[i] for i in ranking[: max(enough, int(balanced.sum()))])
