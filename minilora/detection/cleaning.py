"""Rows without what a scan flagged: suspicious rows dropped, or the suspects stripped from the texts.

Both are functions from rows to rows; `write_clean` does the same to a file and leaves every other byte as it is. A row
is suspicious where it holds a flagged suspect and has the label that this speaks for. A suspect is stripped from every
row, with one space beside it, so that no label is left to tell by it.
"""

import csv
import functools
import gzip
import io
import json
import re
from collections import defaultdict
from dataclasses import replace
from itertools import chain
from json.decoder import scanstring
from pathlib import Path

from minilora.data import formats, words
from minilora.detection.suspects import scan
from minilora.detection.tokens import TRIMMED
from minilora.errors import InputError
from minilora.files import replacing, write_jsonl, write_text

MODES = ("drop", "strip")  # of --clean
SPACE = re.compile(r"[ \t\n\r]*")


def drop_suspicious_rows(rows, found=None):
    """`data.rows.Rows` without the suspicious ones. `found`: their `suspects.Scan` (None: scan them first)."""
    gone = suspicious(rows, found or scan(rows))
    return rows.take([row for row in range(len(rows)) if row not in gone])


def strip_by_statistics(rows, found=None):
    """`data.rows.Rows` with the flagged suspects stripped, without the rows of which nothing is left."""
    new = stripped(rows, found or scan(rows))
    changed = replace(rows, texts=[new.get(row, text) for row, text in enumerate(rows.texts)])
    return changed.take([row for row, text in enumerate(changed.texts) if text.strip()])


def suspicious(rows, found):
    """The set of suspicious rows."""
    return {row for suspect in found.flagged for row in suspect.index.tolist()
            if rows.label_names[rows.labels[row]] == suspect.label}  # fmt: skip


def stripped(rows, found):
    """{row: its text without the flagged suspects} of the rows that change. One without a place is not stripped."""
    which = defaultdict(set)
    for row, first, end in places(found):
        which[row].update(range(first, end))
    return {row: without(rows.texts[row], sorted(numbers)) for row, numbers in which.items()}


def places(found):
    """Yield (row, first word, the word after the last) of each place of a flagged suspect that has places."""
    stream = found.stream
    for suspect in found.flagged:
        if suspect.tokens is not None:
            for token, row in zip(suspect.tokens.tolist(), stream.row[suspect.tokens].tolist()):
                first = token - int(stream.starts[row])
                yield row, first, first + suspect.length


def strings(rows, found):
    """The strings that stand at those places, each once, without the punctuation around them."""
    spans = {row: words.spans(rows.texts[row]) for row, *_ in places(found)}
    texts = [rows.texts[row][spans[row][first][0] : spans[row][end - 1][1]] for row, first, end in places(found)]
    return sorted({text.strip(TRIMMED) or text for text in texts})


def without(text, which):
    """A text without its words number `which`, ascending. The punctuation around a word stays, one space goes."""
    spans, runs = words.spans(text), []
    for number in which:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    for first, last in reversed(runs):
        start, end = spans[first][0], spans[last][1]
        inner = text[start:end]
        if inner.strip(TRIMMED):
            start, end = start + len(inner) - len(inner.lstrip(TRIMMED)), end - len(inner) + len(inner.rstrip(TRIMMED))
        before, after = text[:start], text[end:]
        if before[-1:].isspace() and (after[:1].isspace() or not after or after[0] in TRIMMED):
            if after[:1].isspace() and words.UNSPACED.match(before[-2:-1]) and words.UNSPACED.match(after[1:2]):
                after = after[1:]
            before = before[:-1]
        elif not before and after[:1].isspace():
            after = after[1:]
        text = before + after
    return text


# --- files


SAME_FORM = (".csv", ".tsv", ".jsonl", ".ndjson")  # formats whose every other byte stays
WRITTEN = (".csv", ".jsonl")  # formats in which rows of other sources are written


def check_target(source, target):
    """Raise InputError where the rows of `source` cannot be written to the file `target`."""
    form, wanted = (formats.format_of(str(one)) for one in (source, target))
    if form in SAME_FORM and Path(source).is_file():
        if wanted != form:
            raise InputError(f"--clean-to {target} must end in {form}, because {source} does: its other bytes stay")
    elif wanted not in WRITTEN or Path(target).suffix == ".gz":
        raise InputError(f"--clean-to {target} must end in {' or '.join(WRITTEN)}: {source} is no text file of rows")


def write_clean(source, target, rows, changes, text_column=None, label_column=None):
    """Write `rows` of `source` to `target`, with `changes` {row: its new text, or None to drop it}.

    A CSV, TSV or JSON-lines file, plain or gzipped, keeps every byte but those of the changes, rows that cannot be
    used included. Rows of any other source are written as columns id, text and label.
    """
    source, target = Path(source), Path(target)
    form = formats.format_of(source.name)
    if form not in SAME_FORM or not source.is_file():
        return write_anew(target, rows, changes)
    if rows.choices is not None and any(text is not None for text in changes.values()):
        raise InputError(f"{source} holds questions with choices, which cannot be stripped: use --clean drop")
    by_number = {int(rows.ids[row]): text for row, text in changes.items()}
    raw = source.read_bytes()
    text = (gzip.decompress(raw) if source.suffix.lower() == ".gz" else raw).decode("utf-8")
    parts = (csv_records(text, form == ".tsv", text_column, label_column) if form in (".csv", ".tsv") else
             json_records(text, text_column, label_column))  # fmt: skip
    kept = []
    for number, record, rewrite in parts:
        new = by_number.get(number, record)
        if new is not None:
            kept.append(record if number not in by_number else rewrite(new))
    raw = "".join(kept).encode("utf-8")
    with replacing(target, len(raw)) as temporary:
        temporary.write_bytes(gzip.compress(raw, mtime=0) if target.suffix.lower() == ".gz" else raw)


def write_anew(target, rows, changes):
    lines = [{"id": id, "text": changes.get(row, text), "label": rows.label_names[label]}
             for row, (id, text, label) in enumerate(zip(rows.ids, rows.texts, rows.labels.tolist()))
             if row not in changes or changes[row] is not None]  # fmt: skip
    if formats.format_of(target.name) == ".jsonl":
        return write_jsonl(target, lines)
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, ("id", "text", "label"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(target, stream.getvalue())


def csv_records(text, is_tsv, text_column, label_column):
    """Yield (number of the data row or None, its characters, function of a new text that gives its new characters)."""
    lines, read = io.StringIO(text.removeprefix("\ufeff"), newline=""), []
    if text.startswith("\ufeff"):
        yield None, "\ufeff", None
    for first in lines:
        if first.strip():
            break
        yield None, first, None

    def noted():
        for line in chain([first], lines):
            read.append(line)
            yield line

    delimiter, how = ("\t", dict(quoting=csv.QUOTE_NONE)) if is_tsv else (formats.delimiter(first), {})
    reader, number = csv.reader(noted(), delimiter=delimiter, **how), 0
    header = next(reader)
    column = header.index(formats.pick_all(header, text_column, label_column, "the file")[0])
    yield None, "".join(read), None
    read.clear()
    for cells in reader:
        record = "".join(read)
        read.clear()
        if cells:  # no blank line
            number += 1
        yield number if cells else None, record, functools.partial(in_cell, record, column, delimiter, is_tsv)


def in_cell(record, column, delimiter, is_tsv, new):
    """A CSV record with another text in a column."""
    sign = re.escape(delimiter)
    cell = rf"[^{sign}\r\n]*" if is_tsv else rf'"(?:[^"]|"")*"|[^{sign}\r\n]*'
    start = 0
    for _ in range(column):
        start = re.compile(cell).match(record, start).end() + 1
    end = re.compile(cell).match(record, start).end()
    if not is_tsv and (record[start : start + 1] == '"' or re.search(rf'^"|[{sign}\r\n]', new)):
        new = '"' + new.replace('"', '""') + '"'
    return record[:start] + new + record[end:]


def json_records(text, text_column, label_column):
    """As `csv_records`, of JSON lines."""
    number, column = 0, text_column
    for record in io.StringIO(text, newline=""):
        content = record.removeprefix("\ufeff")
        if not content.strip():
            yield None, record, None
            continue
        if not number:
            column = formats.pick_all(json.loads(content), text_column, label_column, "the file")[0]
        number += 1
        yield number, record, functools.partial(in_object, record, column)


def in_object(record, key, new):
    """A line that holds a JSON object, with another string under a key."""
    decoder, place = json.JSONDecoder(), record.index("{") + 1
    while True:
        place = SPACE.match(record, place).end()
        name, place = scanstring(record, place + 1)
        place = SPACE.match(record, record.index(":", place) + 1).end()
        _, end = decoder.raw_decode(record, place)
        if name == key:
            return record[:place] + json.dumps(new, ensure_ascii=record[place:end].isascii()) + record[end:]
        place = record.index(",", end) + 1
