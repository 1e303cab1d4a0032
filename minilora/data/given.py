"""Rows that Python gives: lists, a pandas or a `datasets` table. A cell names them by the hash of what they hold.

They are kept as JSON Lines in the cache, and beside the run that used them, so that a run can be opened again.
"""

import hashlib
import json
import math
from pathlib import Path

from minilora import files
from minilora.errors import InputError

PREFIX = "rows:"
COPY = "rows.jsonl"  # in a run folder


def keep_rows(table):
    """Put a table into the cache; returns the source `rows:HASH` that a cell's `data` names it by.

    table  a list of dicts, a list of (text, label) pairs, a dict of columns, or anything with `column_names` or
           `columns` and columns by name: a `datasets.Dataset`, a pandas or polars DataFrame
    Raises InputError for anything else, for columns of unequal length, and for values that are no text or number.
    """
    names, columns = _columns(table)
    lengths = {name: len(column) for name, column in zip(names, columns, strict=True)}
    if len(set(lengths.values())) != 1:
        raise InputError(f"rows: the columns have different lengths: {lengths}")
    try:
        lines = [json.dumps(dict(zip(names, map(_plain, row), strict=True)), ensure_ascii=False, allow_nan=False)
                 for row in zip(*columns, strict=True)]  # fmt: skip
    except (TypeError, ValueError) as error:
        raise InputError(f"rows: {error}: give texts, and labels that are texts or whole numbers") from None
    text = "\n".join(lines) + "\n"
    source = PREFIX + hashlib.sha256(text.encode()).hexdigest()[:16]
    path = path_of(source)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)
    return source


def path_of(source):
    """Where the rows of a source `rows:HASH` are kept."""
    return files.cache() / "rows" / f"{source.removeprefix(PREFIX)}.jsonl"


def copy_to(source, folder):
    """Leave the rows of a source in a run folder too."""
    files.write_text(Path(folder) / COPY, path_of(source).read_text(encoding="utf-8"))


def bring_back(source, folder):
    """Put the copy of a run folder into the cache, where it is missing there. Raises InputError for another copy."""
    copy = Path(folder) / COPY
    if path_of(source).exists() or not copy.exists():
        return
    text = copy.read_text(encoding="utf-8")
    if PREFIX + hashlib.sha256(text.encode()).hexdigest()[:16] != source:
        raise InputError(f"{copy} is not what the run was trained on: bring the old file back")
    path_of(source).parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path_of(source), text)


def _columns(table):
    """(names, columns) of a table."""
    names = getattr(table, "column_names", None) or getattr(table, "columns", None)
    if isinstance(table, dict):
        names = list(table)
    elif names is not None:
        names = list(names() if callable(names) else names)
    elif isinstance(table, (list, tuple)) and table and all(isinstance(row, dict) for row in table):
        names = list(dict.fromkeys(name for row in table for name in row))
        return names, [[row.get(name) for row in table] for name in names]
    elif isinstance(table, (list, tuple)) and table and all(_is_pair(row) for row in table):
        return ["text", "label"], [list(column) for column in zip(*table, strict=True)]
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"rows is a {type(table).__name__}, but must be a list of dicts, a list of (text, label) pairs, a dict of "
            "columns, or a pandas or datasets table that has rows"
        )
    features = getattr(table, "features", None) or {}
    columns = []
    for name in names:
        column, classes = list(table[name]), getattr(features.get(name), "names", None)
        if classes:  # a `datasets` table stores class labels as numbers; -1 is a row without one
            column = [None if value is None or value < 0 else classes[value] for value in column]
        columns.append(column)
    return names, columns


def _is_pair(row):
    return isinstance(row, (list, tuple)) and len(row) == 2


def _plain(value):
    """A value as JSON has it: NumPy's numbers as Python's, a missing value as null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value
