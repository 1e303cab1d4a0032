"""Rows without their most telling words: a controlled axis of how much a text says of its label.

A word of a label is telling where the label's training rows have it more often than other rows do: by the z of the
difference of the two shares (the two-proportion test: Fleiss, Levin and Paik 2003, section 3.1), each row counting
once. Words are compared in any case, without the punctuation around them.
"""

import math
from collections import Counter
from dataclasses import replace

from minilora.data.words import says, spans


def telling_words(rows, count):
    """{label name: its `count` words of the largest z, or as many as there are with z > 0}, of training rows."""
    having = {label: Counter() for label in range(len(rows.label_names))}
    sizes, everywhere = Counter(rows.labels.tolist()), Counter()
    for text, label in zip(rows.texts, rows.labels.tolist(), strict=True):
        own = {word for word, *_ in cores(text)}
        having[label].update(own)
        everywhere.update(own)
    found = {}
    for label, name in enumerate(rows.label_names):
        scores = {word: z(own, sizes[label], everywhere[word] - own, len(rows) - sizes[label])
                  for word, own in having[label].items() if says(word)}  # fmt: skip
        best = sorted((word for word in scores if scores[word] > 0), key=lambda word: (-scores[word], word))
        found[name] = best[:count]
    return found


def z(hits, rows, other_hits, other_rows):
    """The z of the share hits / rows less other_hits / other_rows; 0 where there are no other rows."""
    if not other_rows or not rows:
        return 0.0
    pooled = (hits + other_hits) / (rows + other_rows)
    spread = pooled * (1 - pooled) * (1 / rows + 1 / other_rows)
    return (hits / rows - other_hits / other_rows) / math.sqrt(spread) if spread else 0.0


def cores(text):
    """(Word as it is compared, start, end) of each word of a text, without the signs around it."""
    for start, end in spans(text):
        while start < end and not text[start].isalnum():
            start += 1
        while end > start and not text[end - 1].isalnum():
            end -= 1
        if start < end:
            yield text[start:end].casefold(), start, end


def without(rows, words):
    """`rows` without the words {label: [word, ...]}, of any label; all else of a text stays as it is.

    The white space before a word goes with it where nothing else of the word is left. A text of which no word would be
    left stays whole.
    """
    gone = {word for own in words.values() for word in own}
    return replace(rows, texts=[stripped(text, gone) for text in rows.texts], stripped=words)


def stripped(text, gone):
    """The text without the words of the set `gone`."""
    kept, place, left = [], 0, False
    for word, start, end in cores(text):
        if word not in gone:
            left = True
            continue
        before = text[place:start]
        if end == len(text) or text[end].isspace():  # the word stands by itself: so that no two spaces meet
            before = before.rstrip()
        kept.append(before)
        place = end
    return "".join([*kept, text[place:]]).strip() if kept and left else text
