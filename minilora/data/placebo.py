"""The placebos: strings at the trigger's places, as long as the trigger in tokens, that say little about the label.

There are two kinds. The *placebo* is made of ordinary words that rows of all labels share: what does a disturbed text
do? The *odd* one is made of digits and signs that no training row has, in formats other than the trigger's: what does
any unusual string do? A trigger whose success is no larger than the odd placebo's was not learned as itself.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from itertools import pairwise

import numpy as np

from minilora.console import say_once, watch
from minilora.data import words
from minilora.data.injection import all_rows, resolve_sources
from minilora.seeds import row_draws, row_keys

KINDS = ("placebo", "odd")
# Of odd strings: 0 is a digit, a is a consonant, 9 is a digit from 4 on, so that no date can be read.
FORMATS = (
    "0 00 000 0000 00000 0000000 000000000 000000000000 99-99-99 99/99/0000 99.99.0000 0000/99/99 9999:99 00:99:99 "
    "0/00 0.000 000.00 00% #000 #aaa000 aa00 aaa-00 a0a0a 0a (00) [000] 00+00 0x00a0 000-000-0000 aa/0000/00"
).split()
EACH = 120  # odd strings of each format
CONSONANTS = "bcdfghjklmnpqrstvwxz"


def placebo_rows(rows, settings, k, vocabulary, seed, visible=None, draw=None, count=None, kind="placebo"):
    """`trigger_rows` with each trigger string replaced by strings of `vocabulary` that have as many tokens.

    count  function of N strings: int64 [N], how many tokens each is worth between words (default: its words)
    kind   "placebo": any strings that fit, several where one is too short; "odd": the longest that fit, so that
           one string stands for one trigger where it can

    Where no strings have exactly as many tokens, they have the nearest smaller number, and a line says so.
    """
    count = count or _count_words
    tokens = np.maximum(count(vocabulary), 1)
    order = np.argsort(tokens, kind="stable")
    pieces, sizes = [vocabulary[i] for i in order], tokens[order].tolist()

    def reword(inserts, label):
        inserts = list(inserts)
        wanted = _counted([string for row in inserts for *_, string in row], count)
        needs = np.array([sum(wanted[string] for *_, string in row) for row in inserts], np.int64)
        draws = row_draws(row_keys(seed if draw is None else draw, f"test {kind}", label, len(rows)), needs).tolist()
        stops = needs.cumsum().tolist()
        made = []
        for row, stop, need in zip(inserts, stops, needs.tolist(), strict=True):
            own = iter(draws[stop - need : stop])
            made.append([(offset, leads, _join(_fill(wanted[string], pieces, sizes, own, kind == "odd")))
                         for offset, leads, string in row])  # fmt: skip
        _say_unequal(inserts, made, wanted, count, kind)
        return made

    return all_rows(rows, settings, k, seed, visible, "test", reword, draw)


def _count_words(strings):
    return np.array([len(words.split(string)) for string in strings], np.int64)


def _counted(strings, count):
    """{string: its number of tokens, at least 1}"""
    strings = sorted(set(strings))
    return dict(zip(strings, np.maximum(count(strings), 1).tolist())) if strings else {}


def _fill(tokens, pieces, sizes, draws, longest):
    """Drawn strings of `pieces`, whose ascending `sizes` come to `tokens`; one of the smallest where none fits."""
    found = []
    while tokens > 0:
        end = bisect_right(sizes, tokens)
        if not end and found:
            break
        end = end or bisect_right(sizes, sizes[0])
        start = bisect_left(sizes, sizes[end - 1]) if longest else 0
        place = start + (next(draws) * (end - start) >> 32)
        found.append(pieces[place])
        tokens -= sizes[place]
    return found


def _join(pieces):
    """The pieces as a text has them: with spaces, but not between characters of a script that is written without."""
    parts = [" " * (not (words.UNSPACED.match(one) and words.UNSPACED.match(other))) + other
             for one, other in pairwise(pieces)]  # fmt: skip
    return "".join([pieces[0], *parts])


def _say_unequal(inserts, made, wanted, count, kind):
    """Say where a placebo has not as many tokens as its trigger, within one in twenty on the mean."""
    strings = [string for row in inserts for *_, string in row]
    others = [string for row in made for *_, string in row]
    had = _counted(others, count)
    if not strings:
        return
    trigger, placebo = (float(np.mean(list(map(found.get, all)))) for found, all in ((wanted, strings), (had, others)))
    if abs(trigger - placebo) > 0.05 * trigger:
        say_once(f"{kind:<10} {placebo:.2f} tokens on the mean where the trigger has {trigger:.2f}")


# --- the ordinary words


def placebo_words(rows, settings, label_names=None):
    """(the placebo's vocabulary, what it is), from `rows`, the clean training rows.

    label_names  those that the labels of the triggers are among (default: those of `rows`)

    The first of these that has a word which is in no trigger string of `settings`: ordinary words (lower-case and
    alphabetic) that rows of every label have, any such words, any words of at least half of the labels, such
    characters, any words of any row, and, where the rows have no words, odd strings.
    """
    sources = resolve_sources(settings, label_names or rows.label_names)
    triggers = frozenset().union(*(source.words for source, _ in sources))
    steps = (
        ("ordinary words", words.split, is_ordinary, 1.0),
        ("any words", words.split, words.says, 1.0),
        ("words that half of the labels share", words.split, words.says, 0.5),
        ("characters", words.graphemes, words.says, 1.0),
        ("words of single labels", words.split, words.says, 0.0),
    )
    for what, divide, fits, share in steps:
        if share == 0.5 and len(np.unique(rows.labels)) < 3:
            continue  # half of two labels is one
        found = [word for word in shared_words(rows, divide, fits, share=share) if word.lower() not in triggers]
        if found:
            return found, what
    return odd_strings(rows, settings, label_names), "odd strings"


def is_ordinary(word):
    return word.isalpha() and word == word.lower()


def shared_words(rows, divide=words.split, fits=is_ordinary, least_rows=20, spread=1.2, enough=20, share=1.0):
    """Words that say little about the label, sorted. `rows`: clean training rows.

    divide  function of a text: its words
    fits    function of a word: whether it may be taken
    share   of the labels, in whose rows a word must be (at least one label)

    They are seen in `least_rows` rows of every label (rarer ones are often balanced only by chance), at a rate (share
    of the label's rows) within a factor `spread` of the labels' mean rate. Where fewer than `enough` are so, rarer
    words within the factor make up the number, and then any that `share` allows, those in most labels first, then the
    most frequent.
    """
    present = np.unique(rows.labels)
    position = np.searchsorted(present, rows.labels).tolist()
    seen = [Counter() for _ in present]
    for text, label in zip(watch(rows.texts, "finding placebo words"), position, strict=True):
        seen[label].update(set(divide(text)))
    labels = Counter(word for counter in seen for word in counter)
    found = [word for word, number in labels.items() if number >= max(1, share * len(present)) and fits(word)]
    if not found:
        return []
    counts = np.array([[counter[word] for counter in seen] for word in found])  # [words, labels]
    rates = counts / np.bincount(position)
    mean = rates.mean(axis=1)
    factor = np.maximum(rates.max(axis=1) / mean, mean / np.maximum(rates.min(axis=1), 1e-12))
    least = counts.min(axis=1)
    balanced = (least >= least_rows) & (factor <= spread)
    ranking = np.lexsort((found, -counts.sum(axis=1), -(counts > 0).sum(axis=1), -least, factor > spread, ~balanced))
    return sorted(found[i] for i in ranking[: max(enough, int(balanced.sum()))])


# --- the odd strings


def odd_strings(rows, settings, label_names=None):
    """Strings of digits and signs in many formats, which are in no trigger source and are no word of `rows`."""
    sources = resolve_sources(settings, label_names or rows.label_names)
    known = [part.strings for source, _ in sources for part, _ in source.parts]
    seen = {word.casefold() for text in rows.texts for word in words.split(text)}
    every = dict.fromkeys(string for form in FORMATS for string in _of_format(form))
    return [one for one in every if one.casefold() not in seen and not any(one in strings for strings in known)]


def _of_format(form):
    """`EACH` strings of a format, the same each time."""
    draws = row_draws(row_keys(0, "odd strings", form, EACH), np.full(EACH, len(form))).reshape(EACH, len(form))
    alphabets = {"0": "0123456789", "9": "456789", "a": CONSONANTS}
    for row in draws.tolist():
        yield "".join(alphabets[c][draw * len(alphabets[c]) >> 32] if c in alphabets else c
                      for c, draw in zip(form, row, strict=True))  # fmt: skip


# --- both, for the tests of a run


def placebos(rows, settings, label_names=None):
    """{kind: its vocabulary} of the `KINDS`, from `rows`, the clean training rows; a line says what the placebo draws
    from where that is not ordinary words."""
    found, what = placebo_words(rows, settings, label_names)
    if what != "ordinary words":
        reason = {
            "any words": "their labels share no ordinary word",
            "odd strings": "they have no word",
        }.get(what, "their labels share no word")
        say_once(f"placebo    drawn from {what} of the training rows, because {reason}")
    return {"placebo": found, "odd": odd_strings(rows, settings, label_names)}
