"""Which features of the rows look like triggers, ranked, with the few that are worth an alarm.

A trigger differs from an ordinary word in two ways: its rows have one label far more often than chance explains, and
it does not belong where it stands. Both are measured in bits, and only what is sure of them is added:

    score = lift (how far the odds of the label rise, the lower end of a 95% interval; `statistics.lift`)
          + seam (how far its places read as insertions: of the 95% interval of their mean the value nearest to 0, at
                  most MOST_SEAM; `seams`)

A word of praise has lift but a seam below 0; a conjunction has a seam but no lift. What has no place in the text (a
length, a line break) has no seam, so only its lift counts. ALARM was frozen on half of the settings of
`python -m benchmarks scan_data` before the other half was measured.
"""

import time
from dataclasses import dataclass, field

import numpy as np

from minilora.detection import seams
from minilora.detection.tokens import count, plain
from minilora.tasks.metrics import Z95

ALARM = 5.5  # bits
MOST_SEAM = 3.0  # bits that insertion adds at most, so that no seam without a label is an alarm
FALSE_DISCOVERIES = 0.05  # features with a larger q-value are not looked at
CANDIDATES = 1000  # features whose places are looked at, those with the largest lift
LEAST_PLACES = 5  # fewer say nothing of a seam
SAME = 0.9  # share of a feature's places that a listed suspect covers, where it is the same suspect
NAMED = 5  # features that a suspect names as the same
MOST_LABELS = 200  # more are no classes


@dataclass(eq=False)
class Suspect:
    """A feature that may be a trigger.

    counts  {label: rows that have the feature}; `label` is the one that it speaks for
    seam    mean over its places, in bits, and `sure` what is sure of it (None without places)
    score   in bits; at least the threshold where it is `flagged`
    also    other features that stand at the same places, in words
    index   int64 [rows], the rows that have it, ascending
    tokens  int64 [M], the words of the `Stream` where it begins, `length` words each (None without places)
    """

    kind: str
    text: str
    label: str
    rows: int
    counts: dict
    entropy: float
    z: float
    pmi: float
    lift: float
    p: float
    q: float
    seam: float | None
    sure: float | None
    score: float
    flagged: bool
    index: np.ndarray
    tokens: np.ndarray | None
    length: int
    also: list = field(default_factory=list)
    example: str = ""

    def to_dict(self):
        """As JSON has it: without the places."""
        return {name: value for name, value in vars(self).items() if name not in ("index", "tokens", "length")}


@dataclass(eq=False)
class Scan:
    """What a scan found: `suspects`, the highest score first. `left_out` says what the budget left out.

    tested  how many features were counted in enough rows
    stream  the `tokens.Stream` of the rows
    """

    suspects: list
    tested: int
    threshold: float
    left_out: list
    stream: object

    @property
    def flagged(self):
        return [suspect for suspect in self.suspects if suspect.flagged]


def scan(rows, tokenizer=None, until=float("inf"), threshold=ALARM, most=50):
    """The `Scan` of `data.rows.Rows`; for the arguments see `tokens.count`. At most `most` suspects are kept."""
    counts, stream = count(rows, tokenizer, until)
    found = Scan([], len(counts), threshold, counts.left_out, stream)
    likely = np.flatnonzero((counts.q <= FALSE_DISCOVERIES) & (counts.lift > 0))
    likely = likely[np.argsort(-counts.lift[likely], kind="stable")][:CANDIDATES]
    looked = Look(stream)
    candidates = []
    for done, number in enumerate(likely.tolist()):
        if time.monotonic() > until:
            found.left_out.append(f"the places of {len(likely) - done:,} of {len(likely):,} suspects")
            break
        candidates.append((number, *looked.at(counts, number)))
    # Of equal scores the kind that is counted first, and the shorter phrase: in any order of the rows.
    candidates.sort(
        key=lambda one: (-one[-1], counts.kind[one[0]], len(counts.letters_of(one[0])), counts.text(one[0]))
    )
    fold = Fold(stream)
    for number, index, tokens, seam, sure, score in candidates:
        length = len(counts.letters_of(number))
        label = int(counts.label[number])
        owner = fold.owner(index, tokens, length, label)
        if owner is not None:
            if len(owner.also) < NAMED:
                owner.also.append(counts.text(number))
        elif len(found.suspects) < most:
            own = np.bincount(rows.labels[index], minlength=len(rows.label_names)).tolist()
            figures = {name: float(getattr(counts, name)[number]) for name in ("entropy", "z", "pmi", "lift", "p", "q")}
            suspect = Suspect(
                kind=counts.kinds[counts.kind[number]].name, text=counts.text(number), label=rows.label_names[label],
                rows=len(index), counts=dict(zip(rows.label_names, own)), seam=seam, sure=sure, score=score,
                flagged=bool(score >= threshold), index=index, tokens=tokens, length=length, **figures,
            )  # fmt: skip
            suspect.example = rows.texts[index[rows.labels[index] == label][0]]
            fold.add(suspect, label)
            found.suspects.append(suspect)
    return found


class Look:
    """Looks at the places of features: their rows, words and seams."""

    def __init__(self, stream):
        self.stream, self.pairs = stream, {}

    def at(self, counts, number):
        """(rows int64 ascending, words or None, seam, what is sure of it, score) of a feature."""
        kind, letters = counts.kinds[counts.kind[number]], counts.letters_of(number)
        found = kind.at(letters)
        index, lift = np.unique(kind.row[found]).astype(np.int64), float(counts.lift[number])
        tokens = None if kind.token is None else kind.token[found].astype(np.int64)
        seam = sure = None
        if kind.neighbours and len(found) >= LEAST_PLACES:
            places = self.pairs_of(kind).seams(found if tokens is None else tokens, len(letters))
            seam = float(places.mean())
            half = Z95 * float(places.std(ddof=1)) / len(places) ** 0.5
            sure = max(seam - half, 0.0) + min(seam + half, 0.0)
        return index, tokens, seam, sure, lift + min(sure or 0.0, MOST_SEAM)

    def pairs_of(self, kind):
        own = kind.token is None  # the tokenizer's pieces are neighbours of each other; all else is one of words
        if own not in self.pairs:
            names, ids = (kind.names, kind.ids) if own else self.stream.alphabet(plain)
            row = kind.row if own else self.stream.row
            self.pairs[own] = seams.Pairs(ids, row, len(self.stream), len(names))
        return self.pairs[own]


class Fold:
    """Finds features that only say again what a listed suspect says: they stand at its places, for its label."""

    def __init__(self, stream):
        self.listed, self.of_token = [], np.full(len(stream.words), -1, np.int32)

    def add(self, suspect, label):
        if suspect.tokens is not None:
            for further in range(suspect.length):
                self.of_token[suspect.tokens + further] = len(self.listed)
        self.listed.append((suspect, label))

    def owner(self, index, tokens, length, label):
        """The listed suspect that covers at least `SAME` of the places, or None. Without places, of the rows."""
        if tokens is not None:
            covers = np.stack([self.of_token[tokens + further] for further in range(length)]).max(axis=0)
            many = np.bincount(covers[covers >= 0], minlength=len(self.listed))
        else:
            near = [len(other.index) * SAME <= len(index) for other, _ in self.listed]
            many = [np.isin(index, other.index, assume_unique=True).sum() if maybe else 0
                    for maybe, (other, _) in zip(near, self.listed)]  # fmt: skip
        whole = len(index) if tokens is None else len(tokens)
        place = int(np.argmax(many)) if len(many) else None
        if place is None or many[place] < SAME * whole or self.listed[place][1] != label:
            return None
        return self.listed[place][0]
