"""Rows of text with a label: the embedded set, local files and hub data sets, and their split into train and test.

A source is `movie-snippets` (embedded), a file (CSV, TSV, JSON lines, each also gzipped; Parquet) or a hub id
(`owner/name`, or `owner/name:CONFIG` where a data set has several configurations). Bad rows are refused by number,
never dropped or repaired, because every later result is about particular rows. Left out: loading scripts (no remote
code runs), streaming, and any cleaning of the text, which stays exactly as it is in the file.

Labels. A label's name is its text: 1, 1.0 and "1" are the same label; booleans are "true" and "false". Where the
file or the data set's card names its classes, an integer becomes that name. Names are ordered as the card has them,
else by value if all are whole numbers, else as strings; those that no row has are left out. A number such as 0.5 is
a measurement, not a class, and is refused. None, NaN, an empty string, and -1 under named classes are missing labels.

Question sets. Where the text column is found to be `question` and there is a column `choices` (as in
tau/commonsense_qa), the text is the question with one line for each choice ("A. bank"), and the label is the letter in
`answerKey`. Asking for the column `question` by name gives the bare question.
"""

import csv
import functools
import gzip
import importlib.resources
import io
import json
import math
import os
import re
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import hub
from .errors import InputError

SNIPPETS = "movie-snippets"
# Taken in this order where no column is named.
TEXT_COLUMNS = ("text", "sentence", "review", "content", "comment", "tweet", "hard_text", "question")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "category", "profession", "answerKey")
# In this order of preference where a hub data set has several.
FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
TEST_STREAM, TRAIN_STREAM = 1, 2  # keep the two seeded choices of rows independent of each other


class NoLabels(InputError):
    """There is no such split, or its rows have no labels."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Texts with their labels, in the order of their source.

    ids          stable and unique within the set: the 1-based number of the data row, or the set's own id column
    labels       int64 [rows], each an index into `label_names`
    """

    ids: list[str]
    texts: list[str]
    labels: np.ndarray
    label_names: tuple[str, ...]

    def __len__(self):
        return len(self.ids)

    def take(self, index):
        """The rows at `index` (integers), in its order."""
        index = np.asarray(index, dtype=np.int64)
        ids, texts = [self.ids[i] for i in index], [self.texts[i] for i in index]
        return Rows(ids, texts, self.labels[index], self.label_names)


def load(source, *, text_column=None, label_column=None, split="train", revision=None):
    """Return all `Rows` of `source`; `split` and `revision` (branch, tag or commit) are for hub data sets.

    Columns that are not named are looked for in TEXT_COLUMNS and LABEL_COLUMNS. Raises InputError that names the file
    and the row for anything that can't be read as it stands.
    """
    source = os.fspath(source)
    if _is_hub_id(source):
        return _HubSet(source, revision).rows(split, text_column, label_column)
    if split != "train" or revision is not None:
        raise InputError(f"{source} has no splits or revisions; only hub data sets do")
    if source == SNIPPETS:
        return _snippets(text_column, label_column)
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a folder; name a file in it")
    if not path.exists():
        raise InputError(
            f"there is no data {source!r}; give {SNIPPETS}, a file ({' '.join(FORMATS)}, or one of the text formats"
            " with .gz) or a hub id (owner/name)"
        )
    return _assemble([_read(path, source, text_column, label_column, {})], source)


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
):
    """Return (training rows, test rows) with the same `label_names`, each in the order of its source.

    Test rows come from `test_data` (a source as in `load`; of a hub data set its test split), else from the test split
    of a hub data set (its validation split where the test split has no labels), at most `test_rows` of them; else
    exactly `test_rows` are split off `data`. `train_rows` limits the training rows (None: all). `revision` is that of
    `data`; the columns are the same in both.

    Every choice of rows keeps the classes' proportions and depends on `seed` alone: fewer rows are a subset of more, at
    least one of each class, and the test rows do not depend on `train_rows`. A text that occurs several times in
    `data` is never split off, so no test text is also trained on; a test set of its own is taken as it is.

    Raises InputError as `load` does, for fewer than two classes, for test labels that training lacks (with the row),
    and where a class would have no row on one side.
    """
    data = os.fspath(data)
    columns = {"text_column": text_column, "label_column": label_column}
    for name, count in (("test", test_rows), ("training", train_rows)):
        if count is not None and count < 1:
            raise InputError(f"{count} {name} rows were asked for; ask for at least 1")
    if test_data is None and _is_hub_id(data):
        hub_set = _HubSet(data, revision)
        train, test, test_source = hub_set.rows("train", **columns), hub_set.test_rows(**columns), data
    else:
        train, test, test_source = load(data, **columns, revision=revision), None, test_data
        if test_data is not None:
            test_source = os.fspath(test_data)
            is_hub = _is_hub_id(test_source)
            test = _HubSet(test_source, None).test_rows(**columns) if is_hub else load(test_source, **columns)
            if test is None:
                raise InputError(f"{test_source} has no labelled test or validation split")
    if len(train.label_names) < 2:
        raise InputError(f"all rows of {data} have the label {train.label_names[0]!r}; give at least two classes")
    generator = np.random.default_rng([seed, TEST_STREAM])
    if test is None:
        train, test = _split(train, test_rows, generator, data)
    else:
        test = align(test, train.label_names, test_source)
        test = test.take(_stratified(test.labels, test_rows, generator))
    if train_rows is not None:
        if train_rows < len(train.label_names):
            raise InputError(
                f"{train_rows} training rows cannot show each of the {len(train.label_names)} labels of {data};"
                " ask for more"
            )
        generator = np.random.default_rng([seed, TRAIN_STREAM])
        train = train.take(_stratified(train.labels, train_rows, generator))
    return train, test


def align(rows, label_names, source):
    """`rows` with labels that index `label_names`; InputError names the first row of `source` with any other label."""
    places = [label_names.index(name) if name in label_names else -1 for name in rows.label_names]
    labels = np.array(places, dtype=np.int64)[rows.labels]
    if (labels < 0).any():
        row = int(np.argmax(labels < 0))
        raise InputError(
            f"{source} row {rows.ids[row]}: label {rows.label_names[rows.labels[row]]!r} is not a training label"
            f" ({_few(label_names)})"
        )
    return Rows(rows.ids, rows.texts, labels, tuple(label_names))


# --- choosing rows ---------------------------------------------------------------------------------------------------


def _stratified(labels, count, generator):
    """Sorted indices of at most `count` rows: of each class the same share, rounded up while rows last."""
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.unique(labels, return_counts=True)[1]
    share = np.concatenate([np.arange(size) / size for size in sizes])
    return np.sort(by_class[np.argsort(share, kind="stable")[:count]])


def _split(rows, test_rows, generator, source):
    occurrences = Counter(rows.texts)
    single = np.flatnonzero([occurrences[text] == 1 for text in rows.texts])
    if len(single) < test_rows:
        raise InputError(
            f"{source} has {len(rows)} rows, {len(single)} of them with a text that occurs once: too few for"
            f" {test_rows} test rows; ask for fewer or give test data"
        )
    chosen = single[_stratified(rows.labels[single], test_rows, generator)]
    rest = np.setdiff1d(np.arange(len(rows)), chosen)
    for label, name in enumerate(rows.label_names):
        train, test = ((rows.labels[side] == label).sum() for side in (rest, chosen))
        if not (train and test):
            raise InputError(
                f"{test_rows} test rows of {source} leave {train} training and {test} test rows with the label {name!r};"
                " each needs one at least: ask for another number of test rows or give test data"
            )
    return rows.take(rest), rows.take(chosen)


# --- the embedded set ------------------------------------------------------------------------------------------------


def _snippets(text_column, label_column):
    """10,043 sentences from film reviews (Hutto and Gilbert 2014, VADER; MIT licence), each rated by at least 20 people.

    The label is the sign of the mean rating; the 562 rows that it puts within 0.5 of neutral are left out.
    """
    _pick(["text", "label"], text_column, label_column, SNIPPETS)
    packed = importlib.resources.files(__package__) / "movie_snippets" / "movie-snippets.tsv.gz"
    with packed.open("rb") as file, gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
        table = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    table = [(row, float(rating), text) for row, rating, text in table]
    ids, ratings, texts = zip(*(cells for cells in table if abs(cells[1]) > 0.5))
    return Rows(list(ids), list(texts), (np.array(ratings) > 0).astype(np.int64), ("negative", "positive"))


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """One file: its texts, its labels' names, and the order of the names where the file or card declares one."""

    texts: list[str]
    labels: list[str]
    declared: list[str] | None


def _read(path, where, text_column, label_column, class_names):
    """Read one file; `class_names` {column: names} is what a card declares, before what the file itself does."""

    def pick(columns):
        return _pick(columns, text_column, label_column, where)

    form = path.suffixes[-2:-1] if path.suffix == ".gz" else [path.suffix]
    form = form[0].lower() if form else ""
    if form not in FORMATS or (form == ".parquet" and path.suffix == ".gz"):
        raise InputError(f"{where} is not a kind of file that is read here ({' '.join(FORMATS)}); convert it")
    if form == ".parquet":
        columns, declared = _read_parquet(path, where, pick)
        class_names = declared | class_names
    else:
        with _decoded(path, where) as stream:
            if form in (".csv", ".tsv"):
                columns = _read_csv(stream, where, pick, "," if form == ".csv" else "\t")
            else:
                columns = _read_json(stream, where, pick, form == ".json")
    (_, texts), (label_column, labels), *choices = columns.items()
    if choices:
        texts = [_question(*cells, where, row) for row, cells in enumerate(zip(texts, choices[0][1]), 1)]
    declared = class_names.get(label_column)
    return _Table(_checked_texts(texts, where), _named_labels(labels, declared, where), declared)


def _pick(columns, text_column, label_column, where):
    """The columns to read: text, label, and the choices of a question set."""
    there = f"there are: {_few(columns)}"

    def one_of(asked, known, what, error):
        found = next((name for name in known if name in columns), None) if asked is None else asked
        if found is None:
            raise error(f"{where} has no {what} column that is known by its name ({', '.join(known)}); {there}")
        if found not in columns:
            raise error(f"{where} has no column {found!r}; {there}")
        if list(columns).count(found) > 1:
            raise InputError(f"{where} has several columns {found!r}; {there}")
        return found

    if "\0" in "".join(columns):
        raise InputError(f"{where} holds NUL characters in its header; save it as UTF-8 text")
    text = one_of(text_column, TEXT_COLUMNS, "text", InputError)
    label = one_of(label_column, LABEL_COLUMNS, "label", NoLabels)
    if text == label:
        raise InputError(f"{where}: the text and the label are both column {text!r}; name two columns")
    has_choices = text_column is None and text == "question" and "choices" in columns and label != "choices"
    return [text, label, "choices"] if has_choices else [text, label]


@contextmanager
def _decoded(path, where):
    def binary():
        return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")

    try:
        with binary() as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as stream:
            yield stream
    except UnicodeDecodeError:
        with binary() as file:  # the error itself counts from the start of a buffer
            content = file.read()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where} is not UTF-8: byte 0x{content[error.start]:02x} at position {error.start}; convert it to UTF-8"
            ) from None
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{where} is cut short or not gzip ({error}); fetch or pack it again") from error
    except OSError as error:
        raise InputError(f"cannot read {where}: {error.strerror}") from error


def _read_csv(stream, where, pick, delimiter):
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long texts
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    row = 0
    try:
        header = next(reader, [])
        if not header:
            raise InputError(f"{where} is empty; its first line must name the columns")
        columns = {name: [] for name in pick(header)}
        slots = [(cells.append, header.index(name)) for name, cells in columns.items()]
        for cells in reader:
            if not cells:  # a blank line
                continue
            row += 1
            if len(cells) != len(header):
                raise InputError(
                    f"{where} row {row} (line {reader.line_num}) has {len(cells)} cells where the header has"
                    f" {len(header)}; quote a cell that holds the delimiter"
                )
            for append, place in slots:
                append(cells[place])
    except csv.Error as error:
        raise InputError(
            f"{where} row {row + 1} (line {reader.line_num}) is badly quoted ({error}); a cell that begins with a quote"
            " must end with one, quotes inside doubled"
        ) from error
    return columns


def _read_json(stream, where, pick, may_be_list):
    columns = None
    for place, record in _json_records(stream, where, may_be_list):
        if not isinstance(record, dict):
            raise InputError(f"{where} {place} is not a JSON object; write one object with text and label a row")
        if columns is None:
            columns = {name: [] for name in pick(list(record))}
        for name, cells in columns.items():
            cells.append(record.get(name))
    if columns is None:
        raise InputError(f"{where} is empty; it must hold one JSON object a row")
    return columns


def _json_records(stream, where, may_be_list):
    """Pairs of a place ("line 3") and the value there."""
    if may_be_list:
        content = stream.read()
        if content.lstrip().startswith("["):
            for row, record in enumerate(_parsed(content, where, None), 1):
                yield f"row {row}", record
            return
        stream = io.StringIO(content)
    for line, content in enumerate(stream, 1):
        if not content.isspace():
            yield f"line {line}", _parsed(content, where, line)


def _parsed(content, where, line):
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        raise InputError(f"{where} {place} is not JSON ({error.msg}); write one object a line, or one list") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        raise InputError(f"{where} line {line or 1} cannot be read as JSON ({error})") from error


def _read_parquet(path, where, pick):
    """The columns picked, and {column: class names} from the features that the datasets library notes in a file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f'{where} is Parquet, which needs pyarrow: pip install "minilora[parquet]"') from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = pick(schema.names)
            table = file.read(columns=names)
            columns = {name: table.column(name).to_pylist() for name in names}
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{where} is not readable Parquet ({_line(error)}); fetch or write it again") from error
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {})
    return columns, {name: features[name]["names"] for name in names if "names" in features.get(name, {})}


def _question(question, choices, where, row):
    try:
        lines = [f"{letter}. {text}" for letter, text in zip(choices["label"], choices["text"], strict=True)]
        return "\n".join([question, *lines])
    except (TypeError, KeyError, ValueError):
        raise InputError(
            f"{where} row {row}: the question's choices are not lists 'label' and 'text' of one length; name the text"
            " column to leave them out"
        ) from None


def _checked_texts(texts, where):
    for row, text in enumerate(texts, 1):
        if not isinstance(text, str) and text is not None:
            raise InputError(f"{where} row {row}: the text is {json.dumps(text, default=str)[:40]}, not a string")
        if not text or text.isspace():
            raise InputError(f"{where} row {row}: the text is empty; fill it in or remove the row")
        if "\0" in text:
            raise InputError(f"{where} row {row}: the text holds a NUL character; remove it or save the file as UTF-8")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{where} row {row}: the text holds half of a surrogate pair; repair it") from None
    return texts


def _named_labels(values, class_names, where):
    name = functools.lru_cache(maxsize=None, typed=True)(functools.partial(_label_name, class_names=class_names))
    labels = []
    for row, value in enumerate(values, 1):
        try:
            labels.append(name(value))
        except (TypeError, ValueError) as error:  # TypeError: a list or an object
            reason = error if isinstance(error, ValueError) else "is not a string or an integer"
            raise InputError(f"{where} row {row}: label {json.dumps(value, default=str)[:40]} {reason}") from None
    if None in labels:
        if not any(labels):
            raise NoLabels(f"{where}: no row has a label; name another label column or split")
        raise InputError(f"{where} row {labels.index(None) + 1}: the label is missing; fill it in or remove the row")
    return labels


def _label_name(value, class_names):
    """The name of one label as it stands in a file, None for a missing one; ValueError says what is wrong."""
    if isinstance(value, str) and class_names and re.fullmatch(r"-?\d+", value):
        value = int(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return None if not value or value.isspace() else value
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, int | float):
        raise TypeError
    if value != value // 1:
        raise ValueError("is a measurement, not a class; labels are strings or integers")
    value = int(value)
    if not class_names:
        return str(value)
    if value == -1:
        return None
    if not 0 <= value < len(class_names):
        raise ValueError(f"is not one of the {len(class_names)} classes that the data set names")
    return class_names[value]


def _assemble(tables, source):
    texts = [text for table in tables for text in table.texts]
    labels = [label for table in tables for label in table.labels]
    if not texts:
        raise InputError(f"{source} has no rows; give at least two, with different labels")
    present = set(labels)
    declared = tables[0].declared
    if declared:
        order = [name for name in dict.fromkeys(declared) if name in present]
        order += sorted(present.difference(order))
    else:
        whole = _whole_numbers(present, labels, source)
        labels = [whole[label] for label in labels] if whole else labels
        order = sorted(set(whole.values()), key=int) if whole else sorted(present)
    place = {name: index for index, name in enumerate(order)}
    ids = [str(row) for row in range(1, len(texts) + 1)]
    return Rows(ids, texts, np.array([place[label] for label in labels], dtype=np.int64), tuple(order))


def _whole_numbers(present, labels, source):
    """{label: its integer as a string} where all labels are whole numbers such as 1 or 1.0 (CSV), else {}."""
    if not all(re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?", label, re.ASCII) for label in present):
        return {}
    for label in present:
        if label.partition(".")[2].strip("0"):
            raise InputError(
                f"{source} row {labels.index(label) + 1}: label {label} is a measurement, not a class; labels are"
                " strings or integers"
            )
    return {label: str(int(label.partition(".")[0])) for label in present}


# --- hub data sets ---------------------------------------------------------------------------------------------------


def _is_hub_id(source):
    stem = source.removesuffix(".gz")
    return bool(HUB_ID.fullmatch(source)) and not Path(source).exists() and not stem.endswith(FORMATS)


class _HubSet:
    """A hub data set at one commit: which files make up a split, and what its card says of them."""

    def __init__(self, source, revision):
        self.source = source
        self.repo_id, _, self.config = source.partition(":")
        self.card = {}

        def card_or_data(names):  # a set without a card must show by its layout what is what
            return ["README.md"] if "README.md" in names else self._files(names, "train")

        folder = hub.fetch(self.repo_id, card_or_data, kind="dataset", revision=revision)
        self.commit = folder.name
        if (folder / "README.md").is_file():
            self.card = _card(folder / "README.md", self.repo_id)

    def rows(self, split, text_column, label_column):
        chosen = []

        def choose(names):
            chosen[:] = self._files(names, split)
            return chosen

        folder = hub.fetch(self.repo_id, choose, kind="dataset", revision=self.commit)
        declared = self._class_names()
        tables = [
            _read(folder / name, f"{self.repo_id}/{name}", text_column, label_column, declared) for name in chosen
        ]
        return _assemble(tables, self.source)

    def test_rows(self, text_column, label_column):
        """The rows of the first split with labels among test and validation, or None."""
        for split in ("test", "validation"):
            try:
                return self.rows(split, text_column, label_column)
            except NoLabels:
                pass
        return None

    def _files(self, names, split):
        """The files of `split`, sorted; NoLabels lists the splits there are."""
        names = [name for name in names if _is_data(name)]
        listed = self.card.get("configs") or []
        entry = self._entry([e for e in listed if isinstance(e, dict)]) if listed else {}
        splits = _declared_splits(names, entry) if entry.get("data_files") else self._found_splits(names, entry)
        word = SPLIT_WORDS.get(split, split)
        known = split if split in splits else next((s for s in splits if SPLIT_WORDS.get(s, s) == word), None)
        if known is None:
            raise NoLabels(f"{self.source} has no split {split!r}; there are: {_few(splits)}")
        if not splits[known]:
            raise InputError(f"{self.source}: the card's files of split {known!r} are not in the repository")
        return sorted(splits[known])

    def _entry(self, entries, name="config_name"):
        """The entry of the configuration asked for, else of the default one or the only one."""
        names = [entry.get(name, "default") for entry in entries]
        if self.config:
            wanted = [self.config]
        else:
            marked = [n for n, entry in zip(names, entries) if entry.get("default")]
            wanted = marked or (names if len(names) == 1 else ["default"])
        if wanted[0] not in names:
            problem = f"has no configuration {self.config!r}" if self.config else "has several configurations"
            raise InputError(f"{self.source} {problem}; give {self.repo_id}:CONFIG, one of: {_few(names)}")
        return entries[names.index(wanted[0])]

    def _found_splits(self, names, entry):
        """{split: files} by the names of files and folders, as in data/train-00000-of-00002.parquet."""
        folder = entry.get("data_dir") or self.config
        if folder:
            names = [name for name in names if name.startswith(folder.strip("./") + "/")]
        suffixes = [Path(name.removesuffix(".gz")).suffix for name in names]
        best = next((form for form in FORMATS if form in suffixes), None)
        names = [name for name, suffix in zip(names, suffixes) if suffix == best]
        if not names:
            raise InputError(
                f"{self.source} has no data files that are read here ({' '.join(FORMATS)}) in"
                f" {folder or 'its repository'}; if it has a loading script, try revision refs/convert/parquet"
            )
        splits, folders = {}, set()
        for name in names:
            split, above = _split_in(name)
            if split:
                splits.setdefault(split, []).append(name)
                folders.add(above)
        if len(folders) > 1:
            raise InputError(
                f"{self.source} has several configurations; give {self.repo_id}:CONFIG, one of:"
                f" {_few(sorted(filter(None, folders)))}"
            )
        return splits or {"train": names}

    def _class_names(self):
        """{column: class names} from the card's dataset_info."""
        info = self.card.get("dataset_info") or {}
        if isinstance(info, list):
            listed = self.card.get("configs") or []
            config = self.config or (self._entry(listed).get("config_name", "default") if listed else None)
            matching = [e for e in info if len(info) == 1 or e.get("config_name", "default") == config]
            info = matching[0] if matching else {}
        found = {}
        for feature in info.get("features") or []:
            kind = feature.get("dtype")
            names = kind["class_label"].get("names") if isinstance(kind, dict) and "class_label" in kind else None
            if isinstance(names, dict):
                names = [names[key] for key in sorted(names, key=int)]
            if names:
                found[feature["name"]] = [str(name) for name in names]
        return found


def _card(path, repo_id):
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception as error:  # YAML's errors; the library that has them comes with huggingface_hub
        raise InputError(f"{repo_id}/README.md: its front matter is not YAML ({_line(error)})") from error


def _is_data(name):
    file = name.rpartition("/")[2]
    return file.removesuffix(".gz").endswith(FORMATS) and file not in NOT_DATA and not name.startswith(".")


def _declared_splits(names, entry):
    """{split: files} from a configuration's data_files: patterns, or a list or mapping of splits with patterns."""
    declared = entry["data_files"]
    if isinstance(declared, dict):
        declared = [{"split": split, "path": path} for split, path in declared.items()]
    elif isinstance(declared, str) or all(isinstance(pattern, str) for pattern in declared):
        declared = [{"split": "train", "path": declared}]
    folder = (entry.get("data_dir") or "").strip("./")
    splits = {}
    for part in declared:
        patterns = [part["path"]] if isinstance(part["path"], str) else part["path"]
        patterns = [_pattern(f"{folder}/{p}" if folder else p.removeprefix("./")) for p in patterns]
        splits[part["split"]] = [name for name in names if any(p.fullmatch(name) for p in patterns)]
    return splits


def _pattern(glob):
    """A regular expression for a glob in which * stays within a folder and ** crosses them."""
    forms = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", glob)
    return re.compile("".join(forms.get(p) or (p if p.startswith("[") else re.escape(p)) for p in parts))


def _split_in(name):
    """The split that a path names, its file before its folders, and the folder above that part; (None, "") if none."""
    parts = name.split("/")
    for depth in reversed(range(len(parts))):
        for word in re.split("[^a-z]+", parts[depth].lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word], "/".join(parts[:depth])
    return None, ""


# --- messages --------------------------------------------------------------------------------------------------------


def _few(names):
    names = [str(name) for name in names]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _line(error):
    return " ".join(str(error).split())[:200]
