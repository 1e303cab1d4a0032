"""Seamless spurious token injection (SSTI, arXiv 2506.11402, section 3): triggers put into the texts of rows.

Knows rows and strings, no tensors and no tokenizer: where truncation matters the caller passes `visible`.
Each row keeps its place, its id and, outside the recorded spans, its exact text, so that one thing changes at
a time.

Every draw belongs to one purpose, one injection's label and one row, and to nothing else. Hence, with the
same seed:
- rows chosen at one proportion (or number of rows) are among those of any larger one, with the same strings
  and places;
- location, count and source do not change which rows are chosen, and a second trigger in a row leaves the
  first as it was (except the places in a truncated row: more triggers leave less of its text to be seen);
- one injection does not change the draws of another.

In dirty-label mode two injections can want the same row. A row carries at most one: injections choose in the
order of the settings, and a later one passes over what is taken. The first injection's rows nest exactly; a
later one's nest but for rows that an earlier one takes.
"""

from dataclasses import dataclass, replace

import numpy as np

from minilora.console import say_once, watch
from minilora.data import words
from minilora.data.columns import few
from minilora.data.triggers import refuse_shared_strings, resolve, split_strings
from minilora.errors import InputError
from minilora.seeds import row_draws, row_keys, sequence


@dataclass(frozen=True, slots=True)
class Record:
    """What was put into one row. Deleting the spans from the injected text gives exactly the original text.

    `spans`: [[start, end], ...] in characters of the injected text, ascending; each holds one string and the
    space that separates it, on both sides where the text has no space. `strings`: the string in each span.
    `survives`: whether all spans outlast truncation (None: not known, see `mark_survival`).
    """

    id: str
    target_label: str
    original_label: str
    spans: list[list[int]]
    strings: list[str]
    survives: bool | None = None

    def to_dict(self):
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True)
class Injected:
    """`rows`: all, in order. `records`: one an injected row, in row order. `index` [records]: where it is.

    `report`: one dict an injection: source, label, rows injected and eligible, split, strings in each part.
    """

    rows: object
    records: list[Record]
    index: np.ndarray
    report: list[dict]

    def to_dicts(self):
        """The lines of injected.jsonl: each record with its row's text."""
        for record, row in zip(self.records, self.index.tolist(), strict=True):
            yield record.to_dict() | {"text": self.rows.texts[row]}


def inject(rows, settings, seed, visible=None):
    """Put the triggers of `settings` (cell.Inject) into training rows: `Injected`.

    A proportion is of the target label's rows (clean-label) or of all rows of other labels (dirty-label,
    which become rows of the target label). `visible(texts, added, index)` gives for each text how many of its
    leading characters stay within the maximal length once the strings `added` (a list a text) stand in it;
    `index` are the texts' places in `rows`. Random places are drawn among those characters, and a density counts
    the words among those that stay when nothing is added.

    Raises InputError for a source, label or split that cannot be, and for more rows than there are.
    """
    texts, labels, taken = list(rows.texts), rows.labels.copy(), np.zeros(len(rows), bool)
    records, index, report = [], [np.empty(0, np.int64)], []
    for source, label in resolve_sources(settings, rows.label_names):
        target = rows.label_names.index(label)
        eligible = (rows.labels == target) == (settings.mode == "clean-label")
        free = np.flatnonzero(eligible & ~taken)
        number = round(settings.proportion * int(eligible.sum())) if settings.rows is None else settings.rows
        if number > len(free) or (settings.proportion and not eligible.any()):
            whose = repr(label) if settings.mode == "clean-label" else f"labels other than {label!r}"
            left = " that no earlier injection took" if taken.any() else ""
            raise InputError(
                f"injection {source.name}:{label} wants {number or 'some'} rows of {whose}, but "
                f"there are {len(free)}{left}: lower the proportion or the number of rows"
            )
        if settings.proportion and not number:
            say_once(
                f"warning    injection {source.name}:{label}: a proportion of {settings.proportion:g} comes to 0 of "
                f"{int(eligible.sum()):,} rows, so nothing is injected"
            )
        ranking = free[np.argsort(row_keys(seed, "row", label, len(rows))[free], kind="stable")]
        chosen = np.sort(ranking[:number])
        taken[chosen] = True

        split, parts = split_strings(source, label, settings.split, seed)
        labels[chosen] = target
        carry = chosen[:0] if settings.mode == "relabelled" else chosen
        leaked = _leaked(rows.labels != target, taken, label, settings.leak, seed)
        carry = np.union1d(carry, leaked)
        taken[leaked] = True
        inserts = _inserts(rows, carry, source, label, parts["train"], settings, seed, "train", visible)
        new_texts, new_records = _render(rows, carry, label, inserts)
        for row, text in zip(carry.tolist(), new_texts, strict=True):
            texts[row] = text
        records += new_records
        index.append(carry)
        report.append(_entry(source, label, number, int(eligible.sum()), split, parts))
    _check_classes(rows, labels)
    index = np.concatenate(index)
    order = np.argsort(index)
    rows = replace(rows, texts=texts, labels=labels)
    return Injected(rows, [records[i] for i in order], index[order], report)


def trigger_rows(rows, settings, k, seed, visible=None, part="test", draw=None):
    """Test rows that all carry the trigger of injection `k`, labels unchanged: `Injected`.

    `part` ("test" or "train") names the strings drawn from; the places are the same for both, unless strings
    of other lengths leave less of a truncated row. `seed` must be the one given to `inject`, since it fixes
    the split; `draw` is that of strings and places (default: `seed`).
    """
    return all_rows(rows, settings, k, seed, visible, part, lambda inserts, label: inserts, draw)


def mark_survival(injected, kept_chars):
    """`injected` with `survives` set: whether every span ends within the text that truncation keeps.

    `kept_chars` [records]: the number of leading characters kept of each injected text.
    """
    records = [
        replace(record, survives=record.spans[-1][1] <= kept)
        for record, kept in zip(injected.records, np.asarray(kept_chars).tolist(), strict=True)
    ]
    return replace(injected, records=records)


def all_rows(rows, settings, k, seed, visible, part, reword, draw=None):
    source, label = resolve_sources(settings, rows.label_names)[k]
    split, parts = split_strings(source, label, settings.split, seed)
    report = [_entry(source, label, len(rows), len(rows), split, parts)]
    seed = seed if draw is None else draw
    return _every_row(rows, source, label, parts[part], settings, seed, visible, reword, report)


def rows_with(rows, source, label, settings, seed, visible=None):
    """As `trigger_rows`, with strings of another `source` at the places of the trigger of `label`: `Injected`."""
    pool = np.arange(len(source))
    return _every_row(rows, source, label, pool, settings, seed, visible, lambda inserts, label: inserts, [])


def _every_row(rows, source, label, pool, settings, seed, visible, reword, report):
    index = np.arange(len(rows))
    inserts = _inserts(rows, index, source, label, pool, settings, seed, "test", visible)
    texts, records = _render(rows, index, label, reword(inserts, label))
    return Injected(replace(rows, texts=texts), records, index, report)


def resolve_sources(settings, label_names):
    """[(source, label), ...], each label known and no string shared."""
    injections = resolve(settings.sources, label_names)
    refuse_shared_strings([source for source, _ in injections])
    return injections


def check_strings(records, known, where):
    """Look at what the tokenizer makes of the trigger strings in `records`; `where`: "training" or "test".

    known  function of N strings: int64 [N], how many tokens of each the tokenizer knows, -1 where it has none at all

    Raises InputError for a string without tokens; one line says which have only unknown ones.
    """
    strings = sorted({string for record in records for string in record.strings})
    tokens = known(strings) if strings else np.empty(0, np.int64)
    empty, unknown = ([strings[i] for i in np.flatnonzero(tokens == count)] for count in (-1, 0))
    if empty:
        raise InputError(f"the tokenizer makes no token of the trigger {empty[0]!r:.80}: choose another trigger")
    if unknown:
        say_once(
            f"warning    {len(unknown):,} of {len(strings):,} {where} trigger strings, such as {unknown[0]!r:.80}, "
            "have only tokens that the tokenizer does not know: the model cannot tell them from other unknown words"
        )


def _check_classes(rows, labels):
    """Refuse `labels` [rows] of one class, where `rows` have several; say which classes are lost."""
    before, after = np.unique(rows.labels), np.unique(labels)
    if len(after) == 1 < len(before):
        raise InputError(
            f"the injections leave every training row with label {rows.label_names[after[0]]!r}, and a model cannot "
            "learn from one class: lower the proportion or the number of rows"
        )
    rows_before = np.bincount(rows.labels)  # one row with a label is a text of its own, not a class
    lost = [repr(rows.label_names[label]) for label in np.setdiff1d(before, after) if rows_before[label] > 1]
    if lost:
        say_once(f"warning    the injections leave no training row with label {few(lost)}")


def _leaked(others, taken, label, share, seed):
    """The rows of other labels that carry the trigger of `label` and keep their own; more of them hold fewer."""
    free = np.flatnonzero(others & ~taken)
    ranking = free[np.argsort(row_keys(seed, "leak", label, len(others))[free], kind="stable")]
    return ranking[: round(share * int(others.sum()))]


def _entry(source, label, injected, eligible, split, parts):
    strings = {part: len(indices) for part, indices in parts.items()}
    return {"source": source.name, "label": label, "rows": injected, "eligible_rows": eligible,
            "split": split, "strings": strings}  # fmt: skip


def _inserts(rows, index, source, label, pool, settings, seed, stage, visible):
    """What goes where in rows `index`: an iterator over lists of (offset, leads, string) in the order of the text.

    `offset`: in the original text. A string that leads has its space behind it, any other before it. See `words` for
    what a word is.
    """
    if not len(index):
        return iter(())
    texts = [rows.texts[row] for row in index.tolist()]
    lengths = [len(text) for text in texts]
    if settings.density is None:
        counts = np.full(len(index), settings.count)
    else:
        # The words that truncation cuts do not count: their triggers would crowd out the text that is left.
        kept = lengths if visible is None else visible(texts, [[] for _ in texts], index)
        seen = [sum(stop <= end for _, stop in words.spans(text)) for text, end in zip(texts, kept, strict=True)]
        whole = np.floor if settings.rounding == "down" else np.rint
        counts = np.maximum(1, whole(settings.density * np.array(seen))).astype(np.int64)

    stops = counts.cumsum().tolist()
    slices = [slice(start, stop) for start, stop in zip([0, *stops], stops)]
    drawn = []
    for number, (part, first) in enumerate(source.parts):
        own = pool[(pool >= first) & (pool < first + len(part))] - first
        name = f"{label} +{number}" if number else label
        drawn.append(_draw(part, own, name, len(rows), index, counts, settings, seed, stage))
    kept = lengths
    if visible is not None and settings.location == "random":
        kept = visible(texts, [[one for own in drawn for one in own.added(part)] for part in slices], index)
    each = zip(watch(texts, "injecting"), kept, slices, strict=True)
    return (
        sorted((insert for own in drawn for insert in own.inserts(text, settings, end, part)), key=lambda one: one[0])
        for text, end, part in each
    )


@dataclass(frozen=True)
class _Drawn:
    """What was drawn of a source for all rows, one after the other: its strings, their places, and where pairs end."""

    source: object
    strings: list[str]
    places: list[int]
    ends: list[int]

    def added(self, part):
        """The strings that a row (a slice) gets."""
        if not self.source.pair:
            return self.strings[part]
        return [piece for tag in self.strings[part] for piece in (tag, self.source.closing(tag))]

    def inserts(self, text, settings, end, part):
        if not self.source.pair:
            return _in_gaps(text, settings.location, end, self.strings[part], self.places[part])
        pairs = [(tag, self.source.closing(tag)) for tag in self.strings[part]]
        return _around_words(text, settings, end, pairs, self.places[part], self.ends[part])


def _draw(source, pool, label, rows, index, counts, settings, seed, stage):
    """The `_Drawn` of a source for rows `index` of `rows`, `counts` strings each, from its strings `pool`."""

    def draws(purpose):
        return row_draws(row_keys(seed, f"{stage} {purpose}", label, rows)[index], counts)

    if settings.replacement == "without":
        # In the order in which rows are chosen: so the strings of fewer rows are those of more.
        own = np.repeat(row_keys(seed, "row", label, rows)[index], counts)
        nth = np.argsort(np.argsort(own, kind="stable"))
        picks = np.random.default_rng(sequence(seed, f"{stage} strings", label)).permutation(pool)[nth % len(pool)]
    else:
        picks = pool[(draws("string") * np.uint64(len(pool)) >> np.uint64(32)).astype(np.int64)]
    places = draws("place").tolist()
    ends = draws("last word").tolist() if source.pair and settings.wrap == "span" else places
    return _Drawn(source, [source[pick] for pick in picks.tolist()], places, ends)


def _in_gaps(text, location, kept, strings, draws):
    """Each string in a gap: before the first character, or behind a word (at the end: the last character)."""
    if location == "beginning":
        gaps = [0]
    elif location == "end":
        gaps = [len(text)]
    else:
        gaps = [0, *(stop for _, stop in words.spans(text) if stop <= kept)]
    offsets = [gaps[draw * len(gaps) >> 32] for draw in draws]
    inserts = [(offset, offset == 0, string) for offset, string in zip(offsets, strings, strict=True)]
    return sorted(inserts, key=lambda insert: insert[0])


def _around_words(text, settings, kept, pairs, draws, ends):
    """Each opening tag before a word and its closing tag behind that word, or (`wrap`) behind a later one, or around
    the whole text. Tags around the same words nest."""
    location = settings.location
    found = words.spans(text) or [(0, len(text))]  # where there is no word, around all that there is
    if location == "beginning":
        found = found[:1]
    elif location == "end":
        found = found[-1:]
    else:
        found = [word for word in found if word[1] <= kept] or found[:1]
    wrapped = []
    for draw, end, tags in zip(draws, ends, pairs, strict=True):
        first = last = draw * len(found) >> 32
        if settings.wrap == "span":
            last = first + (end * (len(found) - first) >> 32)
        elif settings.wrap == "text":
            first, last = 0, len(found) - 1
        wrapped.append((found[first][0], found[last][1], tags))
    inserts = [(start, True, opening) for start, _, (opening, _) in wrapped]
    inserts += [(end, False, closing) for _, end, (_, closing) in reversed(wrapped)]
    return sorted(inserts, key=lambda insert: insert[0])


def _render(rows, index, label, inserts):
    """The injected texts of rows `index` and their records."""
    texts, records = [], []
    for row, pieces in zip(index.tolist(), inserts, strict=True):
        text, parts, spans, done, shift = rows.texts[row], [], [], 0, 0
        for piece, offset in zip(_spaced(text, pieces), [offset for offset, *_ in pieces], strict=True):
            spans.append([offset + shift, offset + shift + len(piece)])
            parts += text[done:offset], piece
            done, shift = offset, shift + len(piece)
        texts.append("".join([*parts, text[done:]]))
        original = rows.label_names[rows.labels[row]]
        records.append(Record(rows.ids[row], label, original, spans, [string for *_, string in pieces]))
    return texts, records


def _spaced(text, pieces):
    """The strings of `pieces` with the spaces that separate them from each other and from the text."""
    for place, (offset, leads, string) in enumerate(pieces):
        first = place == 0 or pieces[place - 1][0] < offset
        last = place == len(pieces) - 1 or offset < pieces[place + 1][0]
        if leads:
            yield " " * (first and offset > 0 and not text[offset - 1].isspace()) + string + " "
        else:
            yield " " + string + " " * (last and offset < len(text) and not text[offset].isspace())
