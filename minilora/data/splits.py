"""Which rows are tested: seeded choices that keep the classes' proportions, and texts that are never split off."""

from collections import Counter
from dataclasses import replace
from unicodedata import normalize

import numpy as np

from minilora.console import watch
from minilora.data.columns import few
from minilora.errors import InputError

FEW = 20  # labels: completions up to so many are classes, which rows are stratified by; more are free text


def strata(rows, free):
    """What rows are stratified by: their labels, unless these are free text."""
    return np.zeros_like(rows.labels) if free and len(rows.label_names) > FEW else rows.labels


def stratified(labels, count, generator):
    """Sorted indices of at most `count` rows: of each class the same share, rounded up while rows last."""
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.unique(labels, return_counts=True)[1]
    share = np.concatenate([np.arange(size) / size for size in sizes])
    return np.sort(by_class[np.argsort(share, kind="stable")[:count]])


def split_off(rows, count, generator, source, free, what="test"):
    """(The rest, `count` rows for tests), both with rows of every label. `what` the rows are for, in an error."""
    single = np.flatnonzero(~repeated(rows.texts))
    advice = " or give test data" if what == "test" else ""
    if len(single) < count:
        raise InputError(
            f"{source} has {len(rows)} rows, {len(single)} of them with a text of their own: too few for"
            f" {count} {what} rows; ask for fewer{advice}"
        )
    chosen = single[stratified(strata(rows, free)[single], count, generator)]
    rest = np.setdiff1d(np.arange(len(rows)), chosen)
    train, test = rows.take(rest), replace(rows.take(chosen), skipped=())
    if free:
        return train, test
    alone = [name for name, count in zip(rows.label_names, np.bincount(rows.labels), strict=True) if count == 1]
    if alone:
        raise InputError(
            f"{source} has a single row with label {few(map(repr, alone))}, and training and {what} rows need one"
            f" each; remove it, add rows of that label{advice}"
        )
    counts = (np.bincount(rows.labels[side], minlength=len(rows.label_names)) for side in (rest, chosen))
    for name, trained, tested in zip(rows.label_names, *counts, strict=True):
        if not (trained and tested):
            raise InputError(
                f"{count} {what} rows of {source} leave {trained} training and {tested} {what} rows with label"
                f" {name!r}, and each side needs one; ask for another number of {what} rows{advice}"
            )
    return train, test


def repeated(texts):
    """Which texts occur several times, case and white space aside: bool [rows]."""

    def plain(text):
        return " ".join((text if text.isascii() else normalize("NFKC", text)).casefold().split())

    hashes = np.fromiter((hash(plain(text)) for text in watch(texts, "splitting")), np.int64, len(texts))
    _, place, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    found = counts[place] > 1
    maybe = np.flatnonzero(found).tolist()  # few: only of these are the texts themselves kept, which are large
    occurrences = Counter(plain(texts[row]) for row in maybe)
    found[maybe] = [occurrences[plain(texts[row])] > 1 for row in maybe]
    return found
