"""One file of texts and labels: CSV, TSV, JSON lines (each also gzipped), or Parquet.

A text stays exactly as it is in the file, and no row is dropped or repaired in silence, because every later result is
about particular rows: a file with rows that cannot be used is refused with the list of them, or read without them and
said so. In CSV a cell may be quoted, and the delimiter is a comma, or where the header has none a semicolon or a tab.
In TSV a quote is a character of the text. Left out: streaming.

Question sets. Where the text column is found to be `question` and there is a column `choices` (as in
tau/commonsense_qa), the text is the question with one line for each choice ("A. bank"), and the label is the letter in
`answerKey`; the choices are kept beside it. Asking for the column `question` by name gives the bare question.
"""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from minilora.console import Progress, say_once, watch
from minilora.data.columns import NO_LABEL, BadCell, NoLabels, check_text, choices_of, label_names, pick_all
from minilora.errors import InputError
from minilora.files import check_regular

FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
# A packed file may unpack to so many bytes, or to so many times its own size if that is more: text rarely packs better
# than 20 times, a file that is made to fill the memory up to 1,000 times.
UNPACKED, TIMES = 1 << 24, 100
AT_ONCE = 1 << 16  # rows of a Parquet file
MOST_RAGGED = 100_000  # rows with another number of cells than the header: with more the file is something else
LISTED = 10  # bad rows that a message names
SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Table:
    """The rows of one file that can be used, in its order."""

    texts: list[str]
    labels: list[str]  # the name of each row's label
    class_names: list[str] | None  # all names in their order, where the file declares them
    choices: list[dict[str, str]] | None  # {label: text} of each question's choices
    numbers: range | list[int]  # of each row in the file, from 1
    skipped: list[int]  # numbers of the rows that cannot be used


def format_of(name):
    """The member of FORMATS that a file's name ends in, gzipped or not, else None."""
    stem = name.lower().removesuffix(".gz")
    form = next((form for form in FORMATS if stem.endswith(form)), None)
    return None if form == ".parquet" and stem != name.lower() else form


def read(path, where, text_column=None, label_column=None, free=False, skip=False):
    """Read `path` into a `Table`; `where` is what messages call it.

    free  labels are text to be written, so that any number is one
    skip  leave out rows that cannot be used, and say how many, instead of refusing the file

    Raises NoLabels if the label column isn't there or is empty in every row, InputError for anything else.
    """

    def pick(columns):
        return pick_all(columns, text_column, label_column, where)

    form, names, ragged = format_of(path.name), {}, {}
    if form is None:
        raise InputError(f"{where} is not a kind of file that is read here ({' '.join(FORMATS)}); convert it")
    check_regular(path)
    if form == ".parquet":
        columns, names = _read_parquet(path, where, pick)
    else:
        with _decoded(path, where) as stream:
            if form in (".csv", ".tsv"):
                columns, ragged = _read_csv(stream, where, pick, form == ".tsv")
            else:
                columns = _read_json(stream, where, pick, form == ".json")
    (_, texts), (label_column, labels), *choices = columns.items()
    names = names.get(label_column)
    return _usable(texts, labels, choices[0][1] if choices else None, names, ragged, where, free, skip)


def _usable(texts, labels, choices, class_names, ragged, where, free, skip):
    """The `Table` of the rows that can be used. `ragged`: see `_read_csv`."""
    problems, labels = {}, label_names(labels, class_names, free, where)
    unlabelled = sum(isinstance(label, BadCell) and str(label) == NO_LABEL for label in labels)
    if len(ragged) < len(labels) == unlabelled:
        raise NoLabels(f"{where}: no row has a label; name another label column or split")
    for number, (text, label) in enumerate(zip(watch(texts, "checking"), labels, strict=True), 1):
        try:
            if number in ragged:
                raise BadCell("cells unlike the header: {} instead of {}, line {}".format(*ragged[number]))
            check_text(text)
            if choices:
                choices[number - 1] = these = choices_of(choices[number - 1])
                texts[number - 1] = text = "\n".join([text, *(f"{key}. {choice}" for key, choice in these.items())])
                check_text(text)  # the choices may hold what no text may
            if isinstance(label, BadCell):
                raise label
        except BadCell as problem:
            problems[number] = str(problem)
    if problems:
        refuse_or_say(problems, len(texts), where, skip)
    numbers = range(1, len(texts) + 1)
    if problems:
        numbers = [number for number in numbers if number not in problems]
        texts, labels, choices = (
            None if cells is None else [cells[number - 1] for number in numbers] for cells in (texts, labels, choices)
        )
    return Table(texts, labels, class_names, choices, numbers, list(problems))


def refuse_or_say(problems, rows, where, skip):
    """Refuse rows that cannot be used, {number: why}, of so many `rows`; where they are to be skipped, say so."""
    count = f"{len(problems):,} of {rows:,} rows"
    if skip and len(problems) < rows:
        counts = Counter(problem.partition(":")[0] for problem in problems.values())
        reasons = ", ".join(f"{number:,} with {reason}" for reason, number in counts.most_common())
        say_once(f"warning    {count} of {where} are left out: {reasons}")
        return
    listed = ", ".join(f"row {number} ({problem})" for number, problem in list(problems.items())[:LISTED])
    more = f" and {len(problems) - LISTED:,} more" if len(problems) > LISTED else ""
    advice = "" if skip or len(problems) == rows else ", or leave them out with --bad-rows skip"
    raise InputError(f"{where}: {count} cannot be used: {listed}{more}; correct them{advice}")


# --- formats: each gives {column: cells} for the columns that `pick` chooses among those there are ----------


class _Counted(io.BufferedIOBase):
    """A binary file that counts the bytes it gives, and ends with an InputError after `most` of them.

    `raw`: the file on disk, of which `progress` is shown.
    """

    def __init__(self, file, most, where, raw, progress):
        self.file, self.most, self.where, self.count = file, most, where, 0
        self.raw, self.progress = raw, progress

    def readable(self):
        return True

    def read1(self, size=-1):
        part = self.file.read1(size)
        self.count += len(part)
        self.progress.advance(self.raw.tell() - self.progress.done)
        if self.count > self.most:
            raise InputError(
                f"{self.where} unpacks to more than {self.most >> 20:,} MiB, {TIMES} times its size or more: if that "
                "is right, unpack it first (gunzip) and give the unpacked file"
            )
        return part

    def read(self, size=-1):
        return b"".join(iter(lambda: self.read1(1 << 20), b""))


def most_unpacked(path):
    """Bytes that a packed file may unpack to."""
    return max(UNPACKED, TIMES * os.stat(path).st_size)


@contextmanager
def _decoded(path, where):
    """The text of a file, gzipped or not; what can't be decoded is an InputError."""
    packed = path.suffix.lower() == ".gz"
    counted = None
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as raw, Progress("reading", size, unit="byte", short=True) as progress:
            file = gzip.open(raw) if packed else raw
            counted = _Counted(file, most_unpacked(path) if packed else float("inf"), where, raw, progress)
            with io.TextIOWrapper(counted, encoding="utf-8-sig", newline="") as stream:
                yield stream
    except UnicodeDecodeError as error:
        place = counted.count - len(error.object) + error.start  # the error's own place is in its last part only
        raise InputError(f"{where} is not UTF-8 at byte {place} ({error.reason}); convert it") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{where} is cut short or not gzip ({error}); fetch or pack it again") from error
    except OSError as error:
        raise InputError(f"cannot read {where}: {error.strerror}") from error


def _read_csv(stream, where, pick, is_tsv):
    """Also returns {row: (cells, cells of the header, line)} of the rows that have another number of cells than it."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long texts
    lines, blank = iter(stream), 0
    for first in lines:
        if first.strip():
            break
        blank += 1
    else:
        raise InputError(f"{where} is empty; its first line must name the columns")
    how = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else dict(delimiter=delimiter(first), strict=True)
    reader = csv.reader(chain([first], lines), **how)
    row, ragged = 0, {}
    try:
        header = next(reader)
        picked = pick(header)
        columns = {name: [] for name in picked}
        none = [None] * len(header)
        slots = [(columns[name].append, header.index(name)) for name in picked if name != picked[1]]
        add_label, label_place, labels = columns[picked[1]].append, header.index(picked[1]), {}
        for cells in reader:
            if not cells:  # a blank line
                continue
            row += 1
            if len(cells) != len(header):
                ragged[row] = len(cells), len(header), blank + reader.line_num
                cells = none
                if len(ragged) > MOST_RAGGED:
                    raise InputError(
                        f"{where}: over {MOST_RAGGED:,} rows have cells unlike the header, {len(header)} in line "
                        f"{blank + 1} and {ragged[row][0]} in line {ragged[row][2]}; correct the delimiter or the rows"
                    )
            for append, place in slots:
                append(cells[place])
            label = cells[label_place]
            add_label(labels.setdefault(label, label))  # equal labels are one object, or they take more than the texts
    except csv.Error as error:
        raise InputError(
            f"{where} row {row + 1} (line {blank + reader.line_num}) is badly quoted ({error}); a cell that begins"
            " with a quote must end with one, quotes inside doubled"
        ) from error
    return columns, ragged


def delimiter(header):
    """Of a CSV, by its first line: a comma, or where there is none outside quotes a semicolon or a tab."""
    bare = re.sub(r'"[^"]*"', "", header)
    return next((sign for sign in ",;\t" if sign in bare), ",")


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
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    if may_be_list:
        content = stream.read()
        start = SPACE.match(content).end()
        if content.startswith("[", start):
            with _json_errors(where, 1):
                for row, record in enumerate(_items(decoder, content, start + 1), 1):
                    yield f"row {row}", record
            return
        stream = io.StringIO(content, newline="")
    for line, content in enumerate(stream, 1):
        if not content.isspace():
            with _json_errors(where, line):
                record = decoder.decode(content.rstrip())
            yield f"line {line}", record


def _items(decoder, content, place):
    """The values of a JSON list one by one, so that only what is wanted of them stays in memory."""
    place = SPACE.match(content, place).end()
    more = not content.startswith("]", place)
    while more:
        value, place = decoder.raw_decode(content, place)
        yield value
        place = SPACE.match(content, place).end()
        more = content.startswith(",", place)
        if more:
            place = SPACE.match(content, place + 1).end()
    if not content.startswith("]", place):
        raise json.JSONDecodeError("Expecting ',' delimiter", content, place)
    place = SPACE.match(content, place + 1).end()
    if place < len(content):
        raise json.JSONDecodeError("Extra data", content, place)


def _unique(pairs):
    record = dict(pairs)
    if len(record) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r:.80} stands twice in one object")
    return record


@contextmanager
def _json_errors(where, first_line):
    try:
        yield
    except json.JSONDecodeError as error:
        place = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{where} {place} is not JSON ({error.msg}); write one object a line") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end; keys
        raise InputError(f"{where} line {first_line} cannot be read as JSON ({error}); correct it") from error


def _read_parquet(path, where, pick):
    """Also returns {column: class names} from the features that the datasets library notes in its files."""
    try:
        from pyarrow import parquet, types
    except ImportError as error:
        raise InputError(f'{where} is Parquet and needs pyarrow: pip install "minilora[parquet]"') from error
    most = most_unpacked(path)
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = pick(schema.names)
            if file.metadata.num_rows * 8 * len(names) > most or _unpacked(file.metadata, names, most) > most:
                raise InputError(
                    f"{where} unpacks to more than {most >> 20:,} MiB, {TIMES} times its size or more: if that is "
                    "right, write it as CSV or JSON lines"
                )
        kept = [
            n for n in names if types.is_string(schema.field(n).type) or types.is_large_string(schema.field(n).type)
        ]
        columns = {name: [] for name in names}
        with parquet.ParquetFile(path, read_dictionary=kept) as file:
            with Progress("reading", file.metadata.num_rows, short=True) as progress:
                for batch in file.iter_batches(AT_ONCE, columns=names):
                    for name, cells in columns.items():
                        cells += _cells(batch.column(name))
                    progress.advance(len(batch))
    except InputError:
        raise
    except Exception as error:  # of a damaged file pyarrow raises nearly any type
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where} is not readable Parquet ({reason}); fetch or write it again") from error
    return columns, _noted_names(schema.metadata, names)


def _unpacked(metadata, names, most):
    """Bytes of the columns `names`, as the file says; of all columns, if these are at most `most` bytes."""
    groups = range(metadata.num_row_groups)
    total = sum(metadata.row_group(group).total_byte_size for group in groups)
    if total <= most:  # the entries of single columns are not looked at: pyarrow ends the process at a damaged one
        return total
    total = 0
    for group in groups:
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in names):
                total += chunk.total_uncompressed_size
    return total


def _cells(column):
    """The values of an Arrow array; equal strings are one object. Raises pyarrow's errors for what is not valid."""
    column.validate(full=True)
    if not hasattr(column, "dictionary"):
        return column.to_pylist()
    values = column.dictionary.to_pylist()
    return [None if place is None else values[place] for place in column.indices.to_pylist()]


def _noted_names(metadata, columns):
    """{column: class names} of a file's note by the datasets library; a note that is broken says nothing."""
    found = {}
    for column in columns:
        try:
            names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
            "".join(names).encode()
            if isinstance(names, list) and names and len(set(names)) == len(names):
                found[column] = names
        except (KeyError, TypeError, ValueError, RecursionError):
            pass
    return found
