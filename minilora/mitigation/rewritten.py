"""Rows as another tool rewrote them: a paraphraser, a grammar checker, a language model.

FILE is CSV, TSV, JSON lines or a text a line (.txt). Rows are matched by their id where it has a column `id`, and else
by order.
"""

import csv
import io
from pathlib import Path

from minilora import files
from minilora.data import formats
from minilora.data.columns import TEXT_COLUMNS
from minilora.errors import InputError, first_words


def texts_of(path, ids):
    """{id: its new text} of the training rows `ids`, by the file at `path`; rows that it leaves out are not there.

    Raises InputError for a file that is not of these rows.
    """
    found, texts = read_rewritten(Path(path).expanduser())
    if found is None and len(texts) != len(ids):
        raise InputError(f"{path} has {len(texts):,} texts without ids, but the run has {len(ids):,} training rows: "
                         "rewrite all of them, or add a column id")  # fmt: skip
    new = by_id(ids if found is None else found, texts, path)
    new = {id: new[id] for id in ids if id in new}
    if not new:
        raise InputError(f"{path} has none of the run's {len(ids):,} training rows: give their ids")
    return new


def by_id(ids, texts, path):
    """{id: text}. Raises InputError for an id that occurs twice."""
    found = dict(zip(ids, texts, strict=True))
    if len(found) < len(ids):
        raise InputError(f"{path} has an id twice: write each row once")
    return found


def read_rewritten(path, text_column=None):
    """(ids or None, texts) of a file. Raises InputError."""
    path = Path(path)
    form = ".txt" if path.suffix.lower() == ".txt" else formats.format_of(path.name)
    if form not in (".txt", ".csv", ".tsv", ".jsonl", ".ndjson") or path.suffix.lower() == ".gz":
        raise InputError(f"{path} is not CSV, TSV, JSON lines or .txt: convert it")
    files.check_regular(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
        if form == ".txt":
            return None, [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        if form in (".jsonl", ".ndjson"):
            records = [files.parse_json(line) for line in text.split("\n") if line.strip()]
        else:
            csv.field_size_limit(2**31 - 1)
            lines = io.StringIO(text.lstrip(), newline="")
            first = lines.readline()
            lines.seek(0)
            how = (dict(delimiter="\t", quoting=csv.QUOTE_NONE) if form == ".tsv" else
                   dict(delimiter=formats.delimiter(first), strict=True))  # fmt: skip
            records = list(csv.DictReader(lines, **how))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}: convert it") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({first_words(error)}): correct it") from None
    if not records or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path} has no rows with named columns: write a text a row")
    wanted = TEXT_COLUMNS if text_column is None else (text_column,)
    column = next((name for name in ("rewritten", *wanted) if name in records[0]), None)
    if column is None:
        raise InputError(f"{path} has no text column ({', '.join(wanted)}): name it with --text-column")
    texts = [record.get(column) for record in records]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InputError(f"{path} row {number}: the text is no string: correct it")
    return ([str(record["id"]) for record in records] if all("id" in record for record in records) else None), texts
