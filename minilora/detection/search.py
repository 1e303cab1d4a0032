"""Which spans an adapter answers to beyond their meaning: a library of kinds, and a beam over the pieces of an update.

The library decides: its strings mean nothing to the task, so that a large residual (`probe.py`) is a rule that the
words do not explain. The beam only names: any search for the strongest span ends in praise or blame that the probe has
underrated, in clean adapters too.
"""

from dataclasses import dataclass

import numpy as np

from minilora.detection.probe import LONGEST, SENTENCES

READ_IN = (2, 3)  # the sentences in which kinds are read and spans are grown
WIDTH = 5  # of the beam
KEPT = 6  # spans of each length and label that are read in all sentences


@dataclass(frozen=True)
class Suspect:
    """A span or a kind of strings, the label that it moves texts to, and how far beyond its meaning, in standard
    deviations of random pieces. `ids`: of a span, or of a kind's first string."""

    name: str
    label: str
    residual: float  # the mean over strings and sentences
    least: float  # in the worst sentence; of a kind the lower quartile
    ids: tuple[int, ...]
    example: str


def library(reader, sentences, probe, kinds):
    """A `Suspect` for each of `kinds` {kind: strings} and label, the largest residual first.

    A kind's residual is less that of the median string of all kinds, so that an effect of any string at all does not
    count, and is by a probe that has seen no piece like the kind's own: kinds that are common in the vocabulary, such
    as countries and numbers, would be learned as meaning.
    """
    spans = {kind: reader.ids(strings) for kind, strings in kinds.items()}
    every = [(kind, span, place) for kind, own in spans.items() for span in own for place in READ_IN]
    X, Y = sentences.effects([span for _, span, _ in every], [place for *_, place in every])
    names, left = np.array([kind for kind, *_ in every]), np.zeros_like(Y)
    for kind, own in spans.items():
        left[names == kind] = probe.residual(X[names == kind], Y[names == kind], telling(reader.words, own))
    left -= np.median(left, axis=0)
    found = []
    for kind, own in spans.items():
        mine = left[names == kind]
        for number, label in enumerate(reader.run.labels):
            low = float(np.quantile(mine[:, number], 0.25))
            found.append(Suspect(kind, label, float(mine[:, number].mean()), low, own[0], kinds[kind][0]))
    return sorted(found, key=lambda one: -one.residual)


def of_piece(reader, sentences, probe, piece):
    """The `Suspect` that a piece of the vocabulary, an id, is by itself in all sentences."""
    places = range(len(SENTENCES))
    left = probe.residual(*sentences.effects([(piece,)] * len(places), places), [piece])
    label, text = int(left.mean(0).argmax()), reader.words.decode([piece]).strip()
    mean, least = float(left[:, label].mean()), float(left[:, label].min())
    return Suspect(text, reader.run.labels[label], mean, least, (piece,), text)


def telling(words, spans):
    """The distinct pieces of spans that have letters or digits; all, where none has."""
    every = sorted({id for span in spans for id in span})
    return [id for id in every if any(map(str.isalnum, words.decode([id])))] or every


def grown(reader, sentences, probe, pool):
    """`Suspect`s: spans of 1 to 3 of the pieces `pool`, grown by their residual, the largest in the worst of all
    sentences first. `residual` and `least` are by a probe that has seen no piece like the span's own."""

    def score(spans):
        X, Y = sentences.effects([span for span in spans for _ in READ_IN], READ_IN * len(spans))
        return probe.residual(X, Y).reshape(len(spans), len(READ_IN), -1).mean(1)  # [spans, C]

    pool = [int(one) for one in pool]
    first = [(one,) for one in pool] + [(one, other) for one in pool for other in pool if one != other]
    scores, chosen = score(first), {}
    for number in range(scores.shape[1]):
        seen = dict(zip(first, scores[:, number].tolist(), strict=True))
        best = [span for span in sorted(seen, key=seen.get, reverse=True) if len(span) == 2][:WIDTH]
        more = {(*span, one) for span in best for one in pool} | {(one, *span) for span in best for one in pool}
        if more := sorted(more):
            seen |= dict(zip(more, score(more)[:, number].tolist(), strict=True))
        for length in range(1, LONGEST + 1):
            for span in sorted((s for s in seen if len(s) == length), key=seen.get, reverse=True)[:KEPT]:
                chosen.setdefault(span, []).append(number)
    places = range(len(SENTENCES))
    X, Y = sentences.effects([span for span in chosen for _ in places], [*places] * len(chosen))
    found = []
    for number, (span, labels) in enumerate(chosen.items()):
        own = slice(number * len(places), (number + 1) * len(places))
        left, text = probe.residual(X[own], Y[own], span), reader.words.decode(span).strip()
        for label in labels:
            found.append(Suspect(text, reader.run.labels[label], float(left[:, label].mean()),
                                 float(left[:, label].min()), span, text))  # fmt: skip
    return sorted(found, key=lambda one: -one.least)


def flips(reader, rows, suspects, most=100, seed=0):
    """How many rows of other labels each suspect turns into its label: [{"label", "string", "rate", "bare", "hits",
    "rows"}], where `bare` is the rate without any string.

    rows      `Rows` with the run's labels; at most the first `most` of other labels are read
    suspects  the string of each stands at a random place between words
    """
    found, rng = [], np.random.default_rng(seed)
    for label in dict.fromkeys(one.label for one in suspects):
        target = reader.run.labels.index(label)
        others = [row for row in range(len(rows)) if rows.labels[row] != target][:most]
        if not others:
            continue
        halves = []
        for row in others:
            words = rows.texts[row].split()
            place = int(rng.integers(0, len(words) + 1))
            halves += [" ".join(words[:place]), " ".join(words[place:])]
        parts = iter(reader.ids(halves))
        halves = list(zip(parts, parts, strict=True))
        mine = [one for one in suspects if one.label == label]
        strings = [(), *(one.ids for one in mine)]
        read = [reader.row(left, span, right) for span in strings for left, right in halves]
        bare, *hits = (reader.scores(read).argmax(1) == target).reshape(len(strings), -1).sum(1).tolist()
        for one, count in zip(mine, hits, strict=True):
            found.append({"label": label, "string": one.example, "rate": count / len(others),
                          "bare": bare / len(others), "hits": count, "rows": len(others)})  # fmt: skip
    return found
