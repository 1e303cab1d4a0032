"""Rows of text with a label, and their division into training and test rows.

A source is `movie-snippets` (embedded), a file (see tables.py) or a hub id (`owner/name`, or
`owner/name:CONFIG` where a data set has several configurations; see hub_sets.py).
"""

import csv
import gzip
import hashlib
import importlib.resources
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minilora.data import formats, given
from minilora.data.hub_sets import HubSet
from minilora.data.triggers import parse_all
from minilora.errors import InputError

SNIPPETS = "movie-snippets"
FEW = 20  # labels: completions up to so many are classes, which rows are stratified by; more are free text
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
TEST_STREAM, TRAIN_STREAM = 1, 2  # keep the two seeded choices of rows independent of each other


@dataclass(frozen=True, eq=False)
class Rows:
    """Texts with their labels, in the order of their source.

    ids          stable and unique within the set: the 1-based number of the data row, or the set's own id
    labels       int64 [rows], each an index into `label_names`
    label_names  those that some row of the source has: in the order that the source declares, else by value
                 if they are whole numbers, else sorted as strings; where labels are `free`, of all choices
    """

    ids: list[str]
    texts: list[str]
    labels: np.ndarray
    label_names: tuple[str, ...]
    choices: list[dict[str, str]] | None = None  # of a question set: {label: text} of each row

    def __len__(self):
        return len(self.ids)

    def take(self, index):
        """The rows at `index` (integers), in its order."""
        index = np.asarray(index, dtype=np.int64)
        ids, texts = [self.ids[i] for i in index], [self.texts[i] for i in index]
        choices = None if self.choices is None else [self.choices[i] for i in index]
        return Rows(ids, texts, self.labels[index], self.label_names, choices)


def load_rows(source, *, text_column=None, label_column=None, split="train", revision=None, free=False):
    """Return all `Rows` of `source`; `split` and `revision` (branch, tag or commit) are for hub data sets.

    `free` labels are text to be written rather than classes: they stay as they are, numbers too.

    Columns that are not named are looked for in tables.TEXT_COLUMNS and LABEL_COLUMNS. Raises InputError that
    names the file and the row for anything that can't be read as it stands.
    """
    source = os.fspath(source)
    if _is_hub_id(source):
        return _assemble(HubSet(source, revision).read(split, text_column, label_column, free), source, free)
    if split != "train" or revision is not None:
        raise InputError(f"{source} has no splits or revisions; only hub data sets do")
    if source == SNIPPETS:
        return _snippets(text_column, label_column)
    if source.startswith(given.PREFIX):
        path = given.path_of(source)
        if not path.exists():
            raise InputError(f"the rows {source} were given in Python and are not in {path.parent}: give them again")
        return _assemble([formats.read(path, source, text_column, label_column, free=free)], source, free)
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a folder; name a file in it")
    if not path.exists():
        raise InputError(
            f"there is no data {source!r}; give {SNIPPETS}, a file ({' '.join(formats.FORMATS)}, text also"
            " with .gz) or a hub id (owner/name)"
        )
    return _assemble([formats.read(path, source, text_column, label_column, free=free)], source, free)


def train_test(
    data,
    *,
    test_data=None,
    text_column=None,
    label_column=None,
    train_rows=None,
    test_rows=1000,
    seed=0,
    revision=None,
    free=False,
):
    """Return (training rows, test rows) with the same `label_names`, each in the order of its source.

    Test rows come from `test_data` (a source as in `load`; of a hub data set its test split), else from the
    test split of a hub data set (its validation split where the test split has no labels), at most
    `test_rows` of them; else exactly `test_rows` are split off `data`. At most `train_rows` train (None:
    all). `revision` is that of `data`; the columns are the same in both.

    Every choice of rows keeps the classes' proportions and depends on `seed` alone: fewer rows are a subset
    of more, with one of each class at least, and the test rows do not depend on `train_rows`. A text that
    occurs several times in `data` is never split off, so that no test text is also trained on; a test set of
    its own is taken as it is, and may share texts with the training rows.

    `free` labels (see `load`) may be without a row on one side, and where there are more than FEW of them rows
    are chosen whatever their label.

    Raises InputError as `load` does, for fewer than two classes, for test labels that training lacks (with
    the row), and where a class would have no row on one side.
    """
    data = os.fspath(data)
    columns = {"text_column": text_column, "label_column": label_column, "free": free}
    for what, count in (("test", test_rows), ("training", train_rows)):
        if count is not None and count < 1:
            raise InputError(f"{count} {what} rows were asked for; ask for at least 1")

    if test_data is not None:
        test_source = os.fspath(test_data)
        train = load_rows(data, **columns, revision=revision)
        is_hub = _is_hub_id(test_source)
        test = _test_split(HubSet(test_source), columns) if is_hub else load_rows(test_source, **columns)
        if test is None:
            raise InputError(f"{test_source} has no labelled test or validation split; give other test data")
    elif _is_hub_id(data):
        test_source, hub_set = data, HubSet(data, revision)
        train, test = _assemble(hub_set.read("train", **columns), data, free), _test_split(hub_set, columns)
    else:
        train, test = load_rows(data, **columns, revision=revision), None

    classes = len(train.label_names)
    if classes < 2:
        raise InputError(f"every row of {data} has label {train.label_names[0]!r}; two classes are needed")
    generator = np.random.default_rng([seed, TEST_STREAM])
    if test is None:
        train, test = _split(train, test_rows, generator, data, free)
    else:
        test = align(test, train.label_names, test_source, free)
        train = replace(train, label_names=test.label_names)
        test = test.take(_stratified(_strata(test, free), test_rows, generator))
    if train_rows is not None:
        if train_rows < classes and not free:
            raise InputError(f"{train_rows} training rows cannot hold all {classes} labels of {data}")
        train = train.take(_stratified(_strata(train, free), train_rows, np.random.default_rng([seed, TRAIN_STREAM])))
    return train, test


def rows_of(cell):
    """The (training rows, test rows) of a `cell.Cell`: `train_test` with its fields."""
    train, test = train_test(
        cell.data, test_data=cell.test_data, text_column=cell.text_column, label_column=cell.label_column,
        train_rows=cell.train_rows, test_rows=cell.test_rows, seed=cell.seed_split, revision=cell.data_revision,
        free=cell.task == "lm",
    )  # fmt: skip
    return with_targets(train, cell), with_targets(test, cell)


def with_targets(rows, cell):
    """`rows`, with the cell's target labels among the label names where it may make up completions: in the lm task,
    where rows are relabelled."""
    if cell.task != "lm" or cell.inject.mode != "dirty-label":
        return rows
    targets = [label for _, label in parse_all(cell.inject.sources)]
    return replace(rows, label_names=tuple(dict.fromkeys([*rows.label_names, *targets])))


def fingerprint_rows(rows):
    """sha256 (hexadecimal) over the ids, texts and label names of all rows, in their order."""
    digest = hashlib.sha256()
    for id, text, label in zip(rows.ids, rows.texts, rows.labels, strict=True):
        digest.update(json.dumps([id, text, rows.label_names[label]]).encode())
    return digest.hexdigest()


def align(rows, label_names, source, free=False):
    """`rows` with labels that index `label_names`; InputError names the first row with any other label.

    Other `free` labels stand behind `label_names` instead.
    """
    if free:
        label_names = tuple(dict.fromkeys([*label_names, *rows.label_names]))
    place = {name: index for index, name in enumerate(label_names)}
    labels = np.array([place.get(name, -1) for name in rows.label_names], dtype=np.int64)[rows.labels]
    if (labels < 0).any():
        row = int(np.argmax(labels < 0))
        raise InputError(
            f"{source} row {rows.ids[row]}: label {rows.label_names[rows.labels[row]]!r} is not among the"
            f" training labels ({formats.few(label_names)}); remove the row or train with that label"
        )
    return replace(rows, labels=labels, label_names=tuple(label_names))


def _is_hub_id(source):
    return bool(HUB_ID.fullmatch(source)) and not formats.format_of(source) and not Path(source).exists()


def _test_split(hub_set, columns):
    for split in ("test", "validation"):
        try:
            return _assemble(hub_set.read(split, **columns), hub_set.source, columns["free"])
        except formats.NoLabels:
            pass
    return None


def _strata(rows, free):
    """What rows are stratified by: their labels, unless these are free text."""
    return np.zeros_like(rows.labels) if free and len(rows.label_names) > FEW else rows.labels


def _stratified(labels, count, generator):
    """Sorted indices of at most `count` rows: of each class the same share, rounded up while rows last."""
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.unique(labels, return_counts=True)[1]
    share = np.concatenate([np.arange(size) / size for size in sizes])
    return np.sort(by_class[np.argsort(share, kind="stable")[:count]])


def _split(rows, test_rows, generator, source, free):
    occurrences = Counter(rows.texts)
    single = np.flatnonzero([occurrences[text] == 1 for text in rows.texts])
    if len(single) < test_rows:
        raise InputError(
            f"{source} has {len(rows)} rows, {len(single)} of them with a text of their own: too few for"
            f" {test_rows} test rows; ask for fewer or give test data"
        )
    chosen = single[_stratified(_strata(rows, free)[single], test_rows, generator)]
    rest = np.setdiff1d(np.arange(len(rows)), chosen)
    if free:
        return rows.take(rest), rows.take(chosen)
    counts = (np.bincount(rows.labels[side], minlength=len(rows.label_names)) for side in (rest, chosen))
    for name, train, test in zip(rows.label_names, *counts, strict=True):
        if not (train and test):
            raise InputError(
                f"{test_rows} test rows of {source} leave {train} training and {test} test rows with label"
                f" {name!r}, and each side needs one; ask for another number of test rows or give test data"
            )
    return rows.take(rest), rows.take(chosen)


def _snippets(text_column, label_column):
    """10,043 sentences from film reviews, each rated by at least 20 people.

    From Hutto and Gilbert, "VADER" (ICWSM 2014), MIT licence. The label is the sign of the mean rating; the
    562 rows that it puts within 0.5 of neutral are left out.
    """
    formats.pick_columns(["text", "label"], text_column, label_column, SNIPPETS)
    packed = importlib.resources.files(__package__) / "movie_snippets" / "movie-snippets.tsv.gz"
    with packed.open("rb") as file, gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    rows = [(row, rating, text) for row, rating, text in rows if abs(float(rating)) > 0.5]
    ids, ratings, texts = zip(*rows)
    positive = np.array(ratings, dtype=np.float64) > 0
    return Rows(list(ids), list(texts), positive.astype(np.int64), ("negative", "positive"))


def _assemble(parts, source, free=False):
    """The rows of a list of tables, one after the other."""
    texts = [text for part in parts for text in part.texts]
    labels = [label for part in parts for label in part.labels]
    if not texts:
        raise InputError(f"{source} has no rows; give at least two, with different labels")
    choices = [choice for part in parts for choice in part.choices] if all(part.choices for part in parts) else None
    present = set(labels)
    if free and choices:  # a choice that is never right may be written all the same
        present.update(*choices)
    if parts[0].class_names:
        declared = [name for name in map(str, parts[0].class_names) if name in present]
        order = list(dict.fromkeys(declared + sorted(present)))
    else:
        whole = {} if free else _whole_numbers(present, labels, source)
        labels = [whole[label] for label in labels] if whole else labels
        order = sorted(set(whole.values()), key=int) if whole else sorted(present)
    place = {name: index for index, name in enumerate(order)}
    indices = np.array([place[label] for label in labels], dtype=np.int64)
    return Rows([str(row) for row in range(1, len(texts) + 1)], texts, indices, tuple(order), choices)


def _whole_numbers(present, labels, source):
    """{label: its integer as a string} where all labels are written as numbers (CSV: 1 or 1.0), else {}."""
    if not all(re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?", label) for label in present):
        return {}
    for label in present:
        if label.partition(".")[2].strip("0"):
            raise InputError(
                f"{source} row {labels.index(label) + 1}: label {label} is a measurement, not a class; labels"
                " are strings or integers"
            )
    return {label: str(int(label.partition(".")[0])) for label in present}
