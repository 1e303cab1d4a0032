"""Rows of text with a label, and their division into training and test rows.

A source is a name (see named.py), a file (see formats.py) or a hub id (`owner/name`, or `owner/name:CONFIG` where a
data set has several configurations; see hub_sets.py).
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minilora.data import columns, formats, given
from minilora.data.columns import NoLabels, few
from minilora.data.hub_sets import HubSet
from minilora.data.named import NAMED
from minilora.data.noise import with_noise
from minilora.data.splits import FEW, split_off, strata, stratified
from minilora.data.telling import telling_words, without
from minilora.data.triggers import resolve
from minilora.errors import InputError
from minilora.fields import is_table, no_path

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
TEST_STREAM, TRAIN_STREAM, VALIDATION_STREAM = 1, 2, 3  # keep the seeded choices of rows independent of each other


class Numbers(Sequence):
    """The numbers of rows, int64 [rows], as a list of strings that takes a ninth of the memory."""

    def __init__(self, values):
        self.values = np.asarray(values, dtype=np.int64)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, place):
        found = self.values[place]
        return Numbers(found) if isinstance(found, np.ndarray) else str(found)

    def __iter__(self):
        return map(str, self.values)

    def __eq__(self, other):
        return list(self) == list(other)

    def __add__(self, other):
        return [*self, *other]


@dataclass(frozen=True, eq=False)
class Rows:
    """Texts with their labels, in the order of their source.

    ids          stable and unique within the set: the 1-based number of the data row, or the set's own id
    labels       int64 [rows], each an index into `label_names`
    label_names  those that some row of the source has: in the order that the source declares, else by value
                 if they are whole numbers, else sorted as strings; where labels are `free`, of all choices
    """

    ids: Sequence[str]
    texts: list[str]
    labels: np.ndarray
    label_names: tuple[str, ...]
    choices: list[dict[str, str]] | None = None  # of a question set: {label: text} of each row
    skipped: tuple[str, ...] = ()  # ids of the rows of the source that cannot be used, and are left out
    stripped: dict[str, list[str]] | None = None  # {label: its words that were taken out of every text}

    def __len__(self):
        return len(self.ids)

    def take(self, index):
        """The rows at `index` (integers), in its order."""
        index = np.asarray(index, dtype=np.int64)
        ids = self.ids[index] if isinstance(self.ids, Numbers) else [self.ids[i] for i in index]
        texts = [self.texts[i] for i in index]
        choices = None if self.choices is None else [self.choices[i] for i in index]
        return replace(self, ids=ids, texts=texts, labels=self.labels[index], choices=choices)


def load_rows(source, *, text_column=None, label_column=None, split="train", revision=None, free=False, bad_rows=None):
    """Return all `Rows` of `source`; `split` and `revision` (branch, tag or commit) are for hub data sets.

    free      labels are text to be written rather than classes: where there are more than FEW they stay as they are
    bad_rows  of rows that cannot be used: "refuse" the source, or "skip" them (None: skip them in a hub data set)

    Columns that are not named are looked for in columns.TEXT_COLUMNS and LABEL_COLUMNS. Raises InputError that
    names the file and the row for anything that can't be read as it stands.
    """
    if is_table(source):
        raise no_path("data", source, "write the rows to a file, such as rows.csv, and name that")
    source = os.fspath(source)
    how = {"text_column": text_column, "label_column": label_column, "free": free}
    if _is_hub_id(source):
        return _hub_rows(HubSet(source, revision), split, **how, bad_rows=bad_rows)
    splits = NAMED[source].splits if source in NAMED else ("train",)
    if split not in splits or revision is not None:
        raise InputError(f"{source} has no splits or revisions; only hub data sets do")
    if source in NAMED:
        columns.pick_columns(["text", "label"], text_column, label_column, source)
        return Rows(*NAMED[source].read(source, split))
    if source.startswith(given.PREFIX):
        path = given.path_of(source)
        if not path.exists():
            raise InputError(f"the rows {source} were given in Python and are not in {path.parent}: give them again")
        return _assemble([formats.read(path, source, **how, skip=bad_rows == "skip")], source, free)
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a folder; {_advice(path)}")
    if not path.exists():
        raise InputError(
            f"there is no data {source!r}; give a name ({', '.join(NAMED)}), a file ({' '.join(formats.FORMATS)},"
            " text also with .gz) or a hub id (owner/name)"
        )
    return _assemble([formats.read(path, source, **how, skip=skips(source, bad_rows))], source, free)


def skips(source, bad_rows):
    """Whether rows of `source` that cannot be used are left out, as they are in a hub set, which nobody can correct."""
    return bad_rows == "skip" or (bad_rows is None and _is_hub_id(source))


def _advice(folder):
    """What to do with a folder."""
    part = "['train']" if (folder / "dataset_dict.json").exists() else ""
    if not part and not (folder / "state.json").exists():
        return "name a file in it"
    convert = f"from datasets import load_from_disk; load_from_disk({str(folder)!r}){part}.to_parquet('rows.parquet')"
    return f'it holds what save_to_disk writes: convert it with python -c "{convert}"'


def train_test(
    data,
    *,
    test_data=None,
    text_column=None,
    label_column=None,
    train_rows=None,
    test_rows=1000,
    validation_rows=None,
    seed=0,
    revision=None,
    free=False,
    bad_rows=None,
):
    """Return [training rows, test rows] with the same `label_names`, each in the order of its source; with
    `validation_rows` also so many validation rows, split off what is left of `data` without the test rows.

    Test rows come from `test_data` (a source as in `load_rows`; of one that has a test split that split), else from
    the test split of `data` (in a hub data set its validation split where the test split has no labels), at most
    `test_rows` of them; else exactly `test_rows` are split off `data`. At most `train_rows` train (None:
    all). `revision` is that of `data`; the columns are the same in both.

    Every choice of rows keeps the classes' proportions and depends only on `seed`: fewer rows are a subset
    of more, with one of each class at least, and the test rows do not depend on `train_rows`. A text that
    occurs several times in `data`, case and white space aside, is never split off, so that no test text is also
    trained on; a test set of its own is taken as it is, and may share texts with the training rows.

    `free` labels (see `load_rows`) may be without a row on one side, and where there are more than FEW of them rows
    are chosen whatever their label.

    Raises InputError as `load_rows` does, for fewer than two classes, for test labels that training lacks (with
    the row), and where a class would have no row on one side.
    """
    data = os.fspath(data)
    how = {"text_column": text_column, "label_column": label_column, "free": free, "bad_rows": bad_rows}
    for what, count in (("test", test_rows), ("training", train_rows), ("validation", validation_rows)):
        if count is not None and count < 1:
            raise InputError(f"{count} {what} rows were asked for; ask for at least 1")

    if test_data is not None:
        test_source = os.fspath(test_data)
        train = load_rows(data, **how, revision=revision)
        if _is_hub_id(test_source):
            test = _test_split(HubSet(test_source), **how)
        else:
            test = load_rows(test_source, **how, split=_last_split(test_source))
        if test is None:
            raise InputError(f"{test_source} has no labelled test or validation split; give other test data")
    elif _is_hub_id(data):
        test_source, hub_set = data, HubSet(data, revision)
        train, test = _hub_rows(hub_set, "train", **how), _test_split(hub_set, **how)
    else:
        train, test = load_rows(data, **how, revision=revision), None
        if (split := _last_split(data)) != "train":
            test_source, test = data, load_rows(data, **how, split=split)

    classes = len(train.label_names)
    if classes < 2:
        raise InputError(f"every row of {data} has label {train.label_names[0]!r}; two classes are needed")
    generator = np.random.default_rng([seed, TEST_STREAM])
    if test is None:
        train, test = split_off(train, test_rows, generator, data, free)
    else:
        test = align(test, train.label_names, test_source, free)
        train = replace(train, label_names=test.label_names)
        test = test.take(stratified(strata(test, free), test_rows, generator))
    validation = []
    if validation_rows is not None:
        generator = np.random.default_rng([seed, VALIDATION_STREAM])
        train, *validation = split_off(train, validation_rows, generator, data, free, "validation")
    if train_rows is not None:
        if train_rows < classes and not free:
            raise InputError(f"{train_rows} training rows cannot hold all {classes} labels of {data}")
        train = train.take(stratified(strata(train, free), train_rows, np.random.default_rng([seed, TRAIN_STREAM])))
    return [train, test, *validation]


def rows_of(cell):
    """[Training rows, test rows] of a `cell.Cell`, and its validation rows if it has any: `train_test` with its fields,
    without the words that it strips. Only training rows get wrong labels."""
    sides = train_test(
        cell.data, test_data=cell.test_data, text_column=cell.text_column, label_column=cell.label_column,
        train_rows=cell.train_rows, test_rows=cell.test_rows, validation_rows=cell.validation_rows,
        seed=cell.seed_split, revision=cell.data_revision, free=cell.task == "lm", bad_rows=cell.bad_rows,
    )  # fmt: skip
    if cell.strip_words:
        words = telling_words(sides[0], cell.strip_words)
        sides = [without(rows, words) for rows in sides]
    sides[0] = with_noise(sides[0], cell.label_noise, cell.seed_split)
    return [with_targets(rows, cell) for rows in sides]


def with_targets(rows, cell):
    """`rows`, with the cell's target labels among the label names where it may make up completions: in the lm task,
    where rows are relabelled."""
    if cell.task != "lm" or cell.inject.mode == "clean-label":
        return rows
    targets = [label for _, label in resolve(cell.inject.sources, rows.label_names, new=True)]
    return replace(rows, label_names=tuple(dict.fromkeys([*rows.label_names, *targets])))


def leave_out(sides, problems, cell):
    """`sides` (training, test and perhaps validation rows) without those in `problems(rows)`, {index: why}, and without
    labels that only these had.

    Raises InputError with the list of them where they are not to be skipped.
    """
    found = [{rows.ids[i]: why for i, why in problems(rows).items()} for rows in sides]
    own_test = cell.test_data is not None or _is_hub_id(cell.data)
    own = [place for place in range(len(sides)) if not (own_test and place == 1)]  # the sides that are of `data`
    for group, source in [(own, cell.data)] + ([([1], cell.test_data or cell.data)] if own_test else []):
        wrong = {id: why for place in group for id, why in found[place].items()}
        if wrong:
            listed = dict(sorted(wrong.items(), key=lambda item: (len(item[0]), item[0])))
            count = sum(len(sides[place]) for place in group)
            formats.refuse_or_say(listed, count, source, skips(source, cell.bad_rows))
    left = []
    for rows, wrong in zip(sides, found, strict=True):
        kept = rows.take([i for i, id in enumerate(rows.ids) if id not in wrong]) if wrong else rows
        left.append(replace(kept, skipped=(*rows.skipped, *wrong)))
    gone = {label for rows in sides for label in rows.labels} - {label for rows in left for label in rows.labels}
    names = [name for label, name in enumerate(sides[0].label_names) if label not in gone]
    place = np.array([names.index(name) if name in names else -1 for name in sides[0].label_names])
    return [replace(rows, labels=place[rows.labels], label_names=tuple(names)) for rows in left] if gone else left


def fingerprint_rows(rows):
    """sha256 (hexadecimal) over the ids, texts and label names of all rows, in their order."""
    digest, quoted = hashlib.sha256(), json.encoder.encode_basestring_ascii
    names = [quoted(name) for name in rows.label_names]
    for id, text, label in zip(rows.ids, rows.texts, rows.labels.tolist(), strict=True):
        digest.update(f"[{quoted(id)}, {quoted(text)}, {names[label]}]".encode())  # as json.dumps has it, but faster
    return digest.hexdigest()


def align(rows, label_names, source, free=False):
    """`rows` with labels that index `label_names`; InputError names the first row with any other label.

    Other `free` labels stand behind `label_names` instead.
    """
    if free:
        label_names = tuple(dict.fromkeys([*label_names, *rows.label_names]))
        if len(label_names) <= FEW:
            counts = np.bincount(rows.labels, minlength=len(rows.label_names)).tolist()
            columns.warn_of_labels(dict.fromkeys(label_names, 0) | dict(zip(rows.label_names, counts)), source)
    place = {name: index for index, name in enumerate(label_names)}
    labels = np.array([place.get(name, -1) for name in rows.label_names], dtype=np.int64)[rows.labels]
    if (labels < 0).any():
        row = int(np.argmax(labels < 0))
        raise InputError(
            f"{source} row {rows.ids[row]}: label {rows.label_names[rows.labels[row]]!r} is not among the"
            f" training labels ({few(label_names)}); remove the row or train with that label"
        )
    return replace(rows, labels=labels, label_names=tuple(label_names))


def _is_hub_id(source):
    return bool(HUB_ID.fullmatch(source)) and not formats.format_of(source) and not Path(source).exists()


def _last_split(source):
    """The split of a data set that tests are of, where it is no hub set: its train split where it has no other."""
    return NAMED[source].splits[-1] if source in NAMED else "train"


def _hub_rows(hub_set, split, *, free, bad_rows, **names):
    tables = hub_set.read(split, **names, free=free, skip=skips(hub_set.source, bad_rows))
    return _assemble(tables, hub_set.source, free)


def _test_split(hub_set, **how):
    for split in ("test", "validation"):
        try:
            return _hub_rows(hub_set, split, **how)
        except NoLabels:
            pass
    return None


def _assemble(parts, source, free=False):
    """The rows of a list of tables, one after the other."""
    texts = [text for part in parts for text in part.texts]
    labels = [label for part in parts for label in part.labels]
    if not texts:
        raise InputError(f"{source} has no rows; give at least two, with different labels")
    choices = [choice for part in parts for choice in part.choices] if all(part.choices for part in parts) else None
    classes = not free or len({label.strip() for label in labels}) <= FEW
    if classes:
        labels = columns.tidy(labels, source)
    present = set(labels)
    if free and choices:  # a choice that is never right may be written all the same
        present.update(*choices)
    if parts[0].class_names:
        declared = [columns.truth(name.strip()) for name in parts[0].class_names]
        order = list(dict.fromkeys([name for name in declared if name in present] + sorted(present)))
    else:
        whole = {} if free else columns.whole_numbers(labels, source)
        labels = [whole[label] for label in labels] if whole else labels
        order = sorted(set(whole.values()), key=int) if whole else sorted(present)
    if classes:
        columns.warn_of_labels(Counter(labels), source)
    place = {name: index for index, name in enumerate(order)}
    indices = np.array([place[label] for label in labels], dtype=np.int64)
    ids, skipped, before = [], [], 0
    for part in parts:  # a row's number in all tables, whether rows before it are left out or not
        ids.append(before + np.array(part.numbers, dtype=np.int64))
        skipped += [str(before + number) for number in part.skipped]
        before += len(part.numbers) + len(part.skipped)
    return Rows(Numbers(np.concatenate(ids)), texts, indices, tuple(order), choices, tuple(skipped))
