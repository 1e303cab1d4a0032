"""What the rows of a data set hold, counted by label without any model: words, phrases, shapes, places, lengths.

A trigger that occurs once (a date) has no statistics as a word, but its shape `0000-00-00` has. A shape masks digits
as 0 and runs of letters as a or A. In scripts without spaces a word is one character (`data.words`), so that their
phrases are character n-grams. A feature counts once in a row, and only features of at least `least` rows are tested.
A million rows take about a minute: rows are counted by sorting (feature, row) pairs, and a phrase is looked for only
where the phrases inside it are frequent (Agrawal and Srikant 1994).
"""

import functools
import re
import time
from array import array
from dataclasses import dataclass
from unicodedata import category

import numpy as np

from minilora.console import watch
from minilora.data import words
from minilora.detection import statistics
from minilora.errors import InputError

LONGEST = 5  # words of a phrase
SHAPES = 3  # words of a phrase of shapes
LEAST, MOST_TESTED = 5, 20_000  # a feature has so many rows, or of large sets this part of all
EDGES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)  # words, where classes of lengths begin
TRIMMED = ".,;:!?\"'()…“”‘’«»，。！？、；：（）「」"  # around a word, not part of it
SPACES = {"two spaces": "  ", "tab": "\t", "line break": "\n"}
MOST_PIECES = 1 << 20  # of a text: none is cut
PLAIN = re.compile("A?a?")  # shapes of ordinary words


class Stream:
    """The words of N texts, T in all.

    forms   distinct words, as they are written
    words   int32 [T], places in `forms`
    row     int32 [T], the text that each word is of
    starts  int64 [N + 1], where each text's words begin
    """

    def __init__(self, texts, until=float("inf")):
        """Reads texts until the clock `time.monotonic` says `until`; `len(self)` is how many were read."""
        known, flat, starts = {}, array("i"), [0]
        for number, text in enumerate(watch(texts, "reading words")):
            if number % 4096 == 4095 and time.monotonic() > until:
                break
            flat.extend([known.setdefault(word, len(known)) for word in words.split(text)])
            starts.append(len(flat))
        self.forms, self.starts = list(known), np.array(starts, np.int64)
        self.words = np.array(flat, np.int32)
        self.row = np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.starts))

    def __len__(self):
        return len(self.starts) - 1

    def alphabet(self, name):
        """(names, ids int32 [T]): each word as `name`, a function of a form, has it."""
        known = {}
        of_form = np.array([known.setdefault(name(form), len(known)) for form in self.forms], np.int32)
        return list(known), of_form[self.words] if len(of_form) else self.words


def plain(form):
    """A word in lower case, without the punctuation around it; of punctuation only, as it is."""
    return (form.strip(TRIMMED) or form).casefold()


def shape(form):
    """A word with digits as 0 and each run of letters as A or a; punctuation around it is left out."""
    form = form.strip(TRIMMED) or form
    if form.islower() and form.isalpha():
        return "a"
    return re.sub("A+", "A", re.sub("a+", "a", "".join(map(masked, form))))


@functools.cache
def masked(one):
    return "0" if one.isdecimal() else "A" if one.isupper() else "a" if one.isalpha() else one


def marks(form):
    """The characters of a word that are neither letters nor digits."""
    return () if form.isalnum() else {one for one in form if not (one.isalnum() or category(one)[0] == "M")}


@dataclass(eq=False)
class Kind:
    """A way to read features off the rows: M letters in the order of the text.

    names     what each letter means
    ids, row  int [M], places in `names`, and the row of each
    token     int [M], the word of the `Stream` where each stands; None where it has none
    neighbours   whether letters that follow each other stand side by side in the text
    """

    name: str
    names: list
    ids: np.ndarray
    row: np.ndarray
    token: np.ndarray | None = None
    neighbours: bool = True

    @functools.cached_property
    def sorted(self):
        """(the places of letters, ordered by letter; where each letter begins among them)."""
        order = np.argsort(self.ids, kind="stable")
        return order, np.searchsorted(self.ids[order], np.arange(len(self.names) + 1))

    def at(self, letters):
        """Where the phrase `letters` begins, int64, ascending."""
        order, begin = self.sorted
        found = order[begin[letters[0]] : begin[letters[0] + 1]]
        for further, letter in enumerate(letters[1:], 1):
            found = found[found < len(self.ids) - further]
            found = found[(self.ids[found + further] == letter) & (self.row[found + further] == self.row[found])]
        return found


class Counts:
    """F features with the statistics of each, in the label that it speaks for most (the largest z).

    kinds     the list of `Kind`s
    kind      int64 [F], places in `kinds`
    letters   int32 [F, LONGEST], -1 behind a feature's end
    rows, label, hits, entropy, z, pmi, lift, p, q   [F], see `statistics`; `hits` are the rows of that label
    left_out  what the budget left out, in words
    """

    def __init__(self, prior):
        self.prior, self.kinds, self.parts, self.left_out = prior, [], [], []

    def add(self, kind, letters, counts):
        z, padded = statistics.z_scores(counts, self.prior), np.full((len(counts), LONGEST), -1, np.int32)
        padded[:, : letters.shape[1]] = letters
        if kind not in self.kinds:
            self.kinds.append(kind)
        label = z.argmax(axis=1)
        self.parts.append(
            dict(
                kind=np.full(len(counts), self.kinds.index(kind)), letters=padded, rows=counts.sum(axis=1), label=label,
                hits=np.take_along_axis(counts, label[:, None], 1)[:, 0], entropy=statistics.entropy(counts),
                z=z.max(axis=1),
            )
        )  # fmt: skip

    def finish(self):
        """Work out what takes all features together."""
        for name in self.parts[0]:
            setattr(self, name, np.concatenate([part[name] for part in self.parts]))
        own = self.prior[self.label]
        self.pmi = statistics.pmi(self.hits, self.rows, own)
        self.lift = statistics.lift(self.hits, self.rows, own)
        best_of = len(self.prior)  # labels: the p-value is of the best one
        self.p = np.minimum(statistics.p_values(self.hits, self.rows, own) * best_of, 1)
        self.q = statistics.q_values(self.p)
        return self

    def __len__(self):
        return len(self.rows)

    def letters_of(self, number):
        return [one for one in self.letters[number].tolist() if one >= 0]

    def text(self, number):
        """A feature in words."""
        names = self.kinds[self.kind[number]].names
        return " ".join(names[one] for one in self.letters_of(number))


class Pieces:
    """The names of a tokenizer's pieces, each decoded when it is asked for."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __len__(self):
        return self.tokenizer.vocab_size

    def __getitem__(self, number):
        return self.tokenizer.decode([number]).strip() or f"[{number}]"


def count_rows(keys, row, labels, classes, least):
    """Features that are in at least so many rows: (keys int64 [F] ascending, counts int64 [F, classes]).

    keys, row  int [M], a feature and a row that has it; a pair counts once
    labels     int64 [N], below `classes`
    """
    rows, found = len(labels), None
    if len(keys) and int(keys.max()) >= 2**63 // rows - 1:  # the pairs would not fit into 64 bits
        found, keys = np.unique(keys, return_inverse=True)
    pairs = keys.astype(np.int64) * rows + row
    pairs.sort()
    pairs = pairs[np.diff(pairs, prepend=-1) != 0]
    feature = pairs // rows
    first = np.flatnonzero(np.diff(feature, prepend=-1) != 0)
    sizes = np.diff(np.append(first, len(feature)))
    frequent = sizes >= least
    pairs = pairs[np.repeat(frequent, sizes)]
    dense = np.repeat(np.arange(frequent.sum()), sizes[frequent])
    counts = np.bincount(dense * classes + labels[pairs % rows], minlength=frequent.sum() * classes)
    keys = feature[first][frequent]
    return keys if found is None else found[keys], counts.reshape(-1, classes)


def phrases(kind, labels, classes, least, longest):
    """Yield (letters int32 [F, n], counts int64 [F, classes]) of the frequent phrases of n = 1, 2, ... letters."""
    dense, row, alphabet, single, letters = kind.ids.astype(np.int64), kind.row, None, None, None
    for length in range(1, longest + 1):
        if length == 1:
            at, keys = np.arange(len(dense)), dense
        else:  # only where the phrases that begin here and at the next letter are frequent
            at = np.flatnonzero((dense[:-1] >= 0) & (dense[1:] >= 0))
            at = at[at < len(dense) - length + 1]
            at = at[row[at] == row[at + length - 1]]
            keys = dense[at] * len(alphabet) + single[at + length - 1]
        found, counts = count_rows(keys, row[at], labels, classes, least)
        place = np.searchsorted(found, keys)
        known = place < len(found)
        known[known] = found[place[known]] == keys[known]
        dense = np.full(len(row), -1, np.int64)
        dense[at[known]] = place[known]
        if length == 1:
            alphabet, single, letters = found.astype(np.int32), dense, found[:, None].astype(np.int32)
        else:
            first, last = np.divmod(found, len(alphabet) or 1)
            letters = np.concatenate([letters[first], alphabet[last][:, None]], axis=1)
        yield letters, counts


def count(rows, tokenizer=None, until=float("inf"), least=None):
    """(`Counts`, `Stream`) of `data.rows.Rows`.

    tokenizer  a `base.tokenizer.TextTokenizer`, whose pieces are counted too
    until      when to stop by `time.monotonic`: what has not begun by then is left out, and listed
    least      rows of a feature (default: LEAST, or of more than 100,000 rows a 20,000th part)

    Raises InputError where the rows that are read by then have one label.
    """
    stream = Stream(rows.texts, until)
    labels, classes = rows.labels[: len(stream)], len(rows.label_names)
    counts = Counts(np.bincount(labels, minlength=classes) / len(labels))
    if len(stream) < len(rows):
        if counts.prior.max() == 1:
            only = rows.label_names[counts.prior.argmax()]
            raise InputError(f"--budget ends after {len(stream):,} rows, all with label {only!r}: give more seconds")
        counts.left_out.append(f"all but the first {len(stream):,} of {len(rows):,} rows")
    for what, longest, stage in stages(stream, rows.texts[: len(stream)], tokenizer):
        if counts.parts and time.monotonic() > until:
            counts.left_out.append(what)
            continue
        for kind in stage():
            limit = least or max(LEAST, len(stream) // MOST_TESTED)
            for length, (letters, found) in enumerate(phrases(kind, labels, classes, limit, longest), 1):
                if kind.name == "shape" and length > 1:  # phrases of ordinary words only say how long a text is
                    odd = np.array([not PLAIN.fullmatch(name) for name in kind.names])[letters].any(axis=1)
                    letters, found = letters[odd], found[odd]
                counts.add(kind, letters, found)
    return counts.finish(), stream


def stages(stream, texts, tokenizer):
    """[(what, longest phrase, function that gives `Kind`s), ...], the most telling first."""
    tokens = np.arange(len(stream.words), dtype=np.int32)
    filled = np.flatnonzero(np.diff(stream.starts) > 0)
    ends = {"first": stream.starts[filled], "last": stream.starts[filled + 1] - 1}
    alphabet = functools.cache(stream.alphabet)

    def everywhere(name, of):
        return [Kind(name, *alphabet(of), stream.row, tokens)]

    def at_ends(name, of):
        names, ids = alphabet(of)
        return [Kind(f"{end} {name}", names, ids[at], stream.row[at], at) for end, at in ends.items()]

    def punctuation():
        known, each = {}, []
        for form in stream.forms:
            each.append([known.setdefault(mark, len(known)) for mark in sorted(marks(form))])
        sizes = np.array([len(one) for one in each], np.int64)
        flat, begin = np.array([mark for one in each for mark in one], np.int64), sizes.cumsum() - sizes
        many = sizes[stream.words]
        token = np.repeat(tokens, many)
        nth = np.arange(len(token)) - np.repeat(many.cumsum() - many, many)
        return [Kind("punctuation", list(known), flat[begin[stream.words[token]] + nth], stream.row[token], token)]

    def white_space():
        found = [(place, row) for place, sign in enumerate(SPACES.values())
                 for row, text in enumerate(texts) if sign in text]  # fmt: skip
        return [Kind("white space", list(SPACES), *np.array(found, np.int64).reshape(-1, 2).T, neighbours=False)]

    def lengths():
        ids = np.searchsorted(EDGES, np.diff(stream.starts), side="right")
        names = [f"{low} to {high - 1} words" for low, high in zip((0, *EDGES), EDGES)] + [f"{EDGES[-1]} words or more"]
        return [Kind("length", names, ids, np.arange(len(stream)), neighbours=False)]

    def pieces():
        encoded = tokenizer.encode(texts, MOST_PIECES)
        row = np.repeat(np.arange(len(stream)), np.diff(encoded.offsets))
        return [Kind("piece", Pieces(tokenizer), encoded.ids, row)]

    return [
        ("shapes", SHAPES, functools.partial(everywhere, "shape", shape)),
        ("first and last shapes", 1, functools.partial(at_ends, "shape", shape)),
        ("words and phrases", LONGEST, functools.partial(everywhere, "word", plain)),
        ("first and last words", 1, functools.partial(at_ends, "word", plain)),
        ("punctuation", 1, punctuation),
        ("white space", 1, white_space),
        ("lengths", 1, lengths),
        *([("pieces", LONGEST, pieces)] if tokenizer else []),
    ]
