"""One file of texts and labels: CSV, TSV, JSON lines (each also gzipped), or Parquet.

A bad row is refused by its number, never dropped or repaired, because every later result is about particular
rows. Left out: streaming, and any cleaning of the text, which stays exactly as it is in the file.

Labels. A label's name is its text: 1, 1.0 and "1" are the same label; booleans are "true" and "false". Where
the file or its data set's card names the classes, an integer becomes that name. A number such as 0.5 is a
measurement, not a class, and is refused, unless labels are `free` text to be written. None, NaN, an empty
string, and -1 under named classes are missing.

Question sets. Where the text column is found to be `question` and there is a column `choices` (as in
tau/commonsense_qa), the text is the question with one line for each choice ("A. bank"), and the label is the
letter in `answerKey`; the choices are kept beside it. Asking for the column `question` by name gives the bare
question.
"""

import csv
import functools
import gzip
import io
import json
import math
import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass

from minilora.errors import InputError

# Taken in this order where no column is named.
TEXT_COLUMNS = (
    "text", "sentence", "review", "content", "comment", "tweet", "hard_text", "prompt", "instruction", "question",
)  # fmt: skip
LABEL_COLUMNS = (
    "label", "labels", "sentiment", "class", "category", "profession", "answerKey", "completion", "response", "answer",
)  # fmt: skip
FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")


class NoLabels(InputError):
    """There is no such split, or its rows have no labels."""


@dataclass(frozen=True)
class Table:
    """The rows of one file, in its order."""

    texts: list[str]
    labels: list[str]  # the name of each row's label
    class_names: list[str] | None  # all names in their order, where the file or the card declares them
    choices: list[dict[str, str]] | None = None  # {label: text} of each question's choices


def format_of(name):
    """The member of FORMATS that a file's name ends in, gzipped or not, else None."""
    stem = name.lower().removesuffix(".gz")
    form = next((form for form in FORMATS if stem.endswith(form)), None)
    return None if form == ".parquet" and stem != name.lower() else form


def read(path, where, text_column=None, label_column=None, class_names=None, free=False):
    """Read `path` into a `Table`; `where` is what messages call it.

    class_names  {column: names of its classes} as a card declares them, which come before the file's own
    free         labels are text to be written, so that any number is one

    Raises NoLabels if the label column isn't there or is empty in every row, InputError for anything else.
    """

    def pick(columns):
        return _pick(columns, text_column, label_column, where)

    form, declared = format_of(path.name), {}
    if form is None:
        raise InputError(f"{where} is not a kind of file that is read here ({' '.join(FORMATS)}); convert it")
    if form == ".parquet":
        columns, declared = _read_parquet(path, where, pick)
    else:
        with _decoded(path, where) as stream:
            if form in (".csv", ".tsv"):
                columns = _read_csv(stream, where, pick, "," if form == ".csv" else "\t")
            else:
                columns = _read_json(stream, where, pick, form == ".json")
    (_, texts), (label_column, labels), *choices = columns.items()
    texts, options = _checked_texts(texts, where), None
    if choices:
        options = [_choices(cell, where, row) for row, cell in enumerate(choices[0][1], 1)]
        listed = ([f"{letter}. {text}" for letter, text in choice.items()] for choice in options)
        texts = ["\n".join([text, *lines]) for text, lines in zip(texts, listed, strict=True)]
        texts = _checked_texts(texts, where)  # the choices may hold what no text may
    names = (declared | (class_names or {})).get(label_column)
    return Table(texts, _named_labels(labels, names, where, free), names, options)


def few(names):
    """Names for a message, the first 20 of them."""
    names = [str(name) for name in names]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def pick_columns(columns, text_column, label_column, where):
    """The names of the text and the label column among `columns`."""
    columns = list(columns)
    there = f"there are: {few(columns)}"

    def one_of(asked, known, what, error):
        found = asked if asked is not None else next((name for name in known if name in columns), None)
        if found is None:
            raise error(f"{where} has no {what} column with a usual name ({', '.join(known)}); {there}")
        if found not in columns:
            raise error(f"{where} has no column {found!r}; {there}")
        if columns.count(found) > 1:
            raise InputError(f"{where} has several columns {found!r}; {there}")
        return found

    if any("\0" in name for name in columns):
        raise InputError(f"{where} holds NUL characters in its first row; save it as UTF-8 text")
    text = one_of(text_column, TEXT_COLUMNS, "text", InputError)
    label = one_of(label_column, LABEL_COLUMNS, "label", NoLabels)
    if text == label:
        raise InputError(f"{where}: the text and the label are both column {text!r}; name two columns")
    return [text, label]


def _pick(columns, text_column, label_column, where):
    """As `pick_columns`, with the choices of a question set."""
    picked = pick_columns(columns, text_column, label_column, where)
    is_question = text_column is None and picked[0] == "question" and picked[1] != "choices"
    return picked + ["choices"] if is_question and "choices" in columns else picked


# --- formats: each gives {column: cells} for the columns that `pick` chooses among those there are ----------


@contextmanager
def _decoded(path, where):
    """The text of a file, gzipped or not; what can't be decoded is an InputError."""

    def binary():
        return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")

    try:
        with binary() as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as stream:
            yield stream
    except UnicodeDecodeError as error:
        with binary() as file:
            place = _undecodable(file.read())  # the error itself counts from the start of a buffer
        raise InputError(f"{where} is not UTF-8 at byte {place} ({error.reason}); convert it") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{where} is cut short or not gzip ({error}); fetch or pack it again") from error
    except OSError as error:
        raise InputError(f"cannot read {where}: {error.strerror}") from error


def _undecodable(content):
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return len(content)


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
            f"{where} row {row + 1} (line {reader.line_num}) is badly quoted ({error}); a cell that begins"
            " with a quote must end with one, quotes inside doubled"
        ) from error
    return columns


def _read_json(stream, where, pick, may_be_list):
    columns = None
    for place, record in _json_records(stream, where, may_be_list):
        if not isinstance(record, dict):
            raise InputError(f"{where} {place} is not a JSON object; write one with text and label a row")
        if columns is None:
            columns = {name: [] for name in pick(record)}
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
            for row, record in enumerate(_parsed(content, where), 1):
                yield f"row {row}", record
            return
        stream = io.StringIO(content)
    for line, content in enumerate(stream, 1):
        if not content.isspace():
            yield f"line {line}", _parsed(content.rstrip(), where, line)


def _parsed(content, where, first_line=1):
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{where} {place} is not JSON ({error.msg}); write one object a line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        raise InputError(f"{where} line {first_line} cannot be read as JSON ({error}); mend it") from error


def _read_parquet(path, where, pick):
    """Also returns {column: class names} from the features that the datasets library notes in its files."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f'{where} is Parquet and needs pyarrow: pip install "minilora[parquet]"') from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = pick(schema.names)
            table = file.read(columns=names)
            columns = {name: table.column(name).to_pylist() for name in names}
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where} is not readable Parquet ({reason}); fetch or write it again") from error
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {})
    return columns, {name: features[name]["names"] for name in names if "names" in features.get(name, {})}


# --- cells --------------------------------------------------------------------------------------------------


def _choices(cell, where, row):
    """{letter: text} of a question's choices."""
    try:
        letters, texts = cell["label"], cell["text"]
        choices = {str(letter): str(text) for letter, text in zip(letters, texts, strict=True)}
        if isinstance(letters, str) or isinstance(texts, str) or len(choices) < len(letters):
            raise ValueError
        return choices
    except (TypeError, KeyError, ValueError):
        raise InputError(
            f"{where} row {row}: the question's choices are not lists 'label' and 'text' of one length; name"
            " the text column to leave them out"
        ) from None


def _checked_texts(texts, where):
    for row, text in enumerate(texts, 1):
        if not isinstance(text, str) and text is not None:
            raise InputError(f"{where} row {row}: the text is {_shown(text)}, not a string")
        if not text or text.isspace():
            raise InputError(f"{where} row {row}: the text is empty; fill it in or remove the row")
        if "\0" in text:
            raise InputError(f"{where} row {row}: the text holds a NUL character; save it as UTF-8")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{where} row {row}: the text holds half of a surrogate pair; mend it") from None
    return texts


def _named_labels(values, class_names, where, free):
    names = [str(name) for name in class_names or ()]
    name = functools.lru_cache(maxsize=None, typed=True)(functools.partial(_label_name, class_names=names, free=free))
    labels = []
    for row, value in enumerate(values, 1):
        try:
            labels.append(name(value))
        except TypeError:  # a list or an object
            problem = "is not a string or an integer"
        except ValueError as error:
            problem = str(error)
        else:
            continue
        raise InputError(f"{where} row {row}: label {_shown(value)} {problem}")
    if None in labels:
        if not any(labels):
            raise NoLabels(f"{where}: no row has a label; name another label column or split")
        row = labels.index(None) + 1
        raise InputError(f"{where} row {row}: the label is missing; fill it in or remove the row")
    return labels


def _label_name(value, class_names, free):
    """The name of a label as it stands in a file, None for a missing one; ValueError says what is wrong."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if not (class_names and re.fullmatch(r"-?\d+", value)):
            return value if value.strip() else None
        value = int(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if free and value % 1 and not class_names:
        return str(value)
    if value % 1:
        raise ValueError("is a measurement, not a class; labels are strings or integers")
    if not class_names:
        return str(int(value))
    if not -1 <= value < len(class_names):
        raise ValueError(f"is not one of the {len(class_names)} classes that the data set names")
    return None if value == -1 else class_names[int(value)]


def _shown(value):
    return json.dumps(value, default=str)[:40]
