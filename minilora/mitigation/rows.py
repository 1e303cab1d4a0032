"""Before training: other training rows. Each method is a function of rows after injection, and draws from one seed.

A method sees what a practitioner sees: texts, labels, and suspects or scores. Rows keep their order and their ids; a
copy of row 17 has the id 17+, 17++ and so on, and copies follow all rows. Where the suspects are `scan`, they are what
a scan of these rows flags (`detection/suspects.py`), and what is done is what `--scan-data --clean-to` does.
"""

from dataclasses import dataclass, replace

import numpy as np

from minilora.cell import Inject
from minilora.data import injection
from minilora.data.placebo import odd_strings
from minilora.data.triggers import Listed
from minilora.detection import cleaning, suspects
from minilora.errors import InputError
from minilora.mitigate import SCAN, source_of
from minilora.mitigation.flags import Finder, spans_of
from minilora.mitigation.rewritten import texts_of
from minilora.seeds import row_keys


@dataclass(frozen=True)
class Changed:
    """`rows`: those to train on. `report`: what was done, for results.json."""

    rows: object
    report: dict


def change(rows, settings, seed, visible=None):
    """`Changed` training rows by `settings` (`minilora.mitigate.Mitigate`), whose method is one of `mitigate.ROWS`.

    visible  see `injection.inject`, for `rows`

    Raises InputError where fewer than two labels would be left.
    """
    changed = METHODS[settings.method](rows, settings, seed, visible)
    if len(np.unique(changed.rows.labels)) < len(np.unique(rows.labels)):
        raise InputError(
            f"mitigate.method = {settings.method!r} leaves no training row of a label: flag fewer rows, or strip them"
        )
    sizes = {"rows_before": len(rows), "rows_after": len(changed.rows)}
    return Changed(changed.rows, {"method": settings.method} | sizes | changed.report)


def drop(rows, settings, seed, visible):
    """Leave the flagged rows out; by a scan those that have the label which a suspect speaks for."""
    if scans(settings):
        found = scan(rows)
        kept = cleaning.drop_suspicious_rows(rows, found)
        return Changed(kept, {"flagged": len(rows) - len(kept)} | listed(found))
    spans = spans_of(rows, settings)
    kept = [row for row, found in enumerate(spans) if found is None]
    return Changed(rows.take(kept), {"flagged": len(rows) - len(kept)})


def strip(rows, settings, seed, visible):
    """Take the suspected spans out of the flagged rows, each with the space that separated it. A row of which a scan
    leaves no text is left out."""
    if scans(settings):
        found = scan(rows)
        if rows.choices is not None and found.flagged:
            raise InputError("mitigate.method = 'strip' cannot strip questions with choices by a scan: use drop")
        places = [row for row, *_ in cleaning.places(found)]
        report = {"flagged": len(set(places)), "spans": len(places)} | listed(found)
        return Changed(cleaning.strip_by_statistics(rows, found), report)
    spans = spans_of(rows, settings)
    texts = [without(text, found or []) for text, found in zip(rows.texts, spans, strict=True)]
    flagged = sum(found is not None for found in spans)
    return Changed(replace(rows, texts=texts), {"flagged": flagged, "spans": sum(len(one or []) for one in spans)})


def without(text, spans):
    """The text without `spans` ([[start, end], ...], ascending): each goes with the space before it, or else behind."""
    parts, done = [], 0
    for start, end in spans:
        if start > done and text[start - 1].isspace():
            start -= 1
        elif end < len(text) and text[end].isspace():
            end += 1
        parts.append(text[done:start])
        done = end
    return "".join([*parts, text[done:]])


def rewrite(rows, settings, seed, visible):
    """Put in place of each text the one that another tool wrote; rows that it left out, or left no text of, go."""
    new = {id: text for id, text in texts_of(settings.rewritten, rows.ids).items() if text.strip()}
    kept = rows.take([row for row, id in enumerate(rows.ids) if id in new])
    texts = [new[id] for id in kept.ids]
    changed = sum(text != old for text, old in zip(texts, kept.texts, strict=True))
    return Changed(replace(kept, texts=texts), {"rewritten": changed, "left_out": len(rows) - len(kept)})


def scans(settings):
    return settings.suspects == (SCAN,)


def scan(rows):
    """The `suspects.Scan` of rows whose labels can be compared."""
    if (count := len(rows.label_names)) > suspects.MOST_LABELS:
        raise InputError(
            f"mitigate.suspects = {SCAN!r} compares labels, and these rows have {count:,}, more than "
            f"{suspects.MOST_LABELS}: name the suspects"
        )
    return suspects.scan(rows)


def listed(found):
    """What a scan flagged, for the report; nothing where there was none."""
    if found is None:
        return {}
    named = ("text", "kind", "label", "rows")
    return {"suspects": [{name: getattr(one, name) for name in named} for one in found.flagged]}


def carriers(rows, settings):
    """(Which rows hold a suspected string, bool [rows]; the scan that found them, or None)."""
    if not scans(settings):
        finder = Finder(settings.suspects)
        return np.array([bool(finder(text)) for text in rows.texts]), None
    carries, found = np.zeros(len(rows), bool), scan(rows)
    for suspect in found.flagged:
        carries[suspect.index] = True
    return carries, found


def groups_of(rows, settings):
    """(The group of each row, int64 [rows]: its label, plus the number of labels where it holds a suspected string; the
    scan, see `carriers`)."""
    carries, found = carriers(rows, settings)
    return rows.labels + len(rows.label_names) * carries, found


def reweight(rows, settings, seed, visible):
    """Balance the groups (label x "holds a suspected string"): each becomes the same share of as many rows as before.

    Idrissi, Arjovsky, Pezeshki and Lopez-Paz 2022 (arXiv 2110.14503), section 2: rows are sampled so that every group
    is equally likely. Here a group that is to have t of its n rows has each t // n times, and t % n drawn ones once
    more, so that no row is left out by chance. A group without a row stays empty: no weight can balance it.
    """
    groups, found = groups_of(rows, settings)
    present = np.unique(groups)
    keys = row_keys(seed, "reweight", "row", len(rows))
    wanted = np.full(len(present), len(rows) // len(present))
    wanted[: len(rows) % len(present)] += 1
    times = np.zeros(len(rows), np.int64)
    for group, most in zip(present, wanted.tolist(), strict=True):
        own = np.flatnonzero(groups == group)
        times[own] = most // len(own)
        times[own[np.argsort(keys[own], kind="stable")[: most % len(own)]]] += 1
    names = named_groups(rows.label_names)
    sizes = {names[group]: int((groups == group).sum()) for group in present}
    return Changed(with_copies(rows, times), {"groups": sizes} | listed(found))


def named_groups(label_names):
    """The names of the groups of `groups_of`, by number."""
    return [*label_names, *(f"{name} with a suspect" for name in label_names)]


def with_copies(rows, times):
    """The rows, each `times` [rows] times: those that are there at all in order, and then their copies."""
    places, ids = np.flatnonzero(times), [rows.ids[row] for row in np.flatnonzero(times).tolist()]
    index = [places]
    for nth in range(1, int(times.max(initial=1))):
        more = np.flatnonzero(times > nth)
        index.append(more)
        ids += [rows.ids[row] + "+" * nth for row in more.tolist()]
    return replace(rows.take(np.concatenate(index)), ids=ids)


def counterfactual(rows, settings, seed, visible):
    """Add copies of `rate` of each label's rows, with a span put in at a random place and the label unchanged.

    With suspects the span is one of their strings, and only rows without one are copied; the string then occurs with
    every label, as in counterfactually augmented data (Kaushik, Hovy and Lipton 2020, arXiv 1909.12434, section 3,
    where people edit the text so that the label changes). Without suspects it is an odd placebo span (digits and signs,
    `data/placebo.py`): any disturbance of a text then occurs with every label.
    """
    found = None
    if settings.suspects:
        carries, found = carriers(rows, settings)
        free = ~carries
        if found is None:
            strings = [string for name in settings.suspects for string in source_of(name).strings]
        else:
            strings = cleaning.strings(rows, found)
        if not strings:  # the scan flagged nothing
            return Changed(rows, {"copies": {}} | listed(found))
    else:
        free, strings = np.ones(len(rows), bool), odd_strings(rows, Inject(sources=()))
    keys, chosen = row_keys(seed, "counterfactual", "row", len(rows)), []
    for label in np.unique(rows.labels):
        own = np.flatnonzero((rows.labels == label) & free)
        count = min(len(own), round(settings.rate * int((rows.labels == label).sum())))
        chosen.append(own[np.argsort(keys[own], kind="stable")[:count]])
    chosen = np.sort(np.concatenate(chosen))
    copies, source = rows.take(chosen), Listed("counterfactual", tuple(strings))
    there = visible and (lambda texts, added, index: visible(texts, added, chosen[index]))
    made = injection.rows_with(copies, source, "counterfactual", Inject(sources=()), seed, there).rows
    counts = {rows.label_names[label]: int((copies.labels == label).sum()) for label in np.unique(copies.labels)}
    ids = [*rows.ids, *(f"{id}+" for id in copies.ids)]
    labels = np.concatenate([rows.labels, copies.labels])
    choices = None if rows.choices is None else [*rows.choices, *copies.choices]
    texts = [*rows.texts, *made.texts]
    made = replace(rows, ids=ids, texts=texts, labels=labels, choices=choices)
    return Changed(made, {"copies": counts} | listed(found))


METHODS = {"drop": drop, "strip": strip, "rewrite": rewrite, "reweight": reweight, "counterfactual": counterfactual}
