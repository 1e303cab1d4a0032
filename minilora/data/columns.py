"""Which columns of a file hold the text and the label, and what their cells say: a text, a label's name, or nothing.

Labels. A label's name is its text: 1, 1.0 and "1" are the same label, and so are true, True and "TRUE". Where the file
names its classes, an integer becomes that name. A number such as 0.5 is a measurement, not a class, and is refused,
unless labels are `free` text to be written. None, NaN, an empty string, and -1 under named classes are missing.
"""

import functools
import json
import math
import re
from collections import Counter
from decimal import Decimal
from unicodedata import normalize

from minilora.console import say_once, short
from minilora.errors import InputError

# Taken in this order where no column is named.
TEXT_COLUMNS = (
    "text", "sentence", "review", "content", "comment", "tweet", "hard_text", "prompt", "instruction", "question",
)  # fmt: skip
LABEL_COLUMNS = (
    "label", "labels", "sentiment", "class", "category", "profession", "answerKey", "completion", "response", "answer",
)  # fmt: skip
NO_TEXT, NO_LABEL = "no text", "no label"  # why a row cannot be used
TRUTH = ("true", "false")
MISSING = ("nan", "none", "null", "nil", "na", "n/a", "<na>", "nat", "missing", "-")  # names that look like no label
LONGEST_NUMBER = 18  # digits of a label that is a whole number


class NoLabels(InputError):
    """There is no such split, or its rows have no labels."""


class BadCell(Exception):
    """A cell that makes its row useless; the message says why, and after a colon what there is."""


def few(names):
    """Names for a message, the first 20 of them."""
    names = [short(str(name), 80) for name in names]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


# --- columns ------------------------------------------------------------------------------------------------


def pick_columns(columns, text_column, label_column, where):
    """The names of the text and the label column among `columns`, whatever their case, spaces and underscores.

    Raises NoLabels where there is no label column, InputError for anything else.
    """
    columns = list(columns)
    there = f"there are: {few(columns)}"

    def one_of(asked, known, what, error):
        wanted = known if asked is None else [asked]
        found = next((name for name in wanted if name in columns), None)
        same = [found] * columns.count(found)
        if found is None:
            same = next(filter(None, ([c for c in columns if _plain(c) == _plain(name)] for name in wanted)), [])
        if not same and asked is not None:
            raise error(f"{where} has no column {asked!r}; {there}")
        if not same:
            raise error(
                f"{where} has no {what} column with a usual name ({', '.join(known)}): name it with --{what}-column; "
                f"{there}"
            )
        if len(same) > 1:
            raise InputError(f"{where} has several columns {same[0]!r}: name one with --{what}-column; {there}")
        return same[0]

    if any("\0" in name for name in columns):
        raise InputError(f"{where} holds NUL characters in its first row; save it as UTF-8 text")
    text = one_of(text_column, TEXT_COLUMNS, "text", InputError)
    label = one_of(label_column, LABEL_COLUMNS, "label", NoLabels)
    if text == label:
        raise InputError(f"{where}: the text and the label are both column {text!r}; name two columns")
    return [text, label]


def pick_all(columns, text_column, label_column, where):
    """As `pick_columns`, with the choices of a question set."""
    picked = pick_columns(columns, text_column, label_column, where)
    is_question = text_column is None and _plain(picked[0]) == "question" and picked[1] != "choices"
    return picked + ["choices"] if is_question and "choices" in columns else picked


def _plain(name):
    return re.sub(r"[\s_-]+", "", name).casefold()


# --- cells --------------------------------------------------------------------------------------------------


def check_text(text):
    """Raise BadCell for a text that cannot be used."""
    if text is None or text == "" or (isinstance(text, float) and math.isnan(text)):
        raise BadCell(NO_TEXT)
    if not isinstance(text, str):
        raise BadCell(f"a text that is not a string: {shown(text)}")
    if text.isspace():
        raise BadCell(NO_TEXT)
    _check_characters(text, "text")


def choices_of(cell):
    """{label: text} of a question's choices. Raises BadCell."""
    try:
        letters, texts = cell["label"], cell["text"]
        choices = {str(letter): str(text) for letter, text in zip(letters, texts, strict=True)}
        if isinstance(letters, str) or isinstance(texts, str) or len(choices) < len(letters):
            raise ValueError
        return choices
    except (TypeError, KeyError, ValueError):
        raise BadCell("choices that are not lists 'label' and 'text' of one length") from None


def label_names(values, class_names, free, where):
    """The name of each label, or the BadCell that its row has. `class_names`: those that the file declares, or None.

    Raises InputError for a value that makes the whole column one of something else than classes.
    """
    names = [str(name) for name in class_names or ()]

    @functools.lru_cache(maxsize=None, typed=True)
    def name(value):
        try:
            return _label_name(value, names, free)
        except BadCell as problem:
            return problem

    found = []
    for row, value in enumerate(values, 1):
        try:
            found.append(name(value))
        except TypeError:  # a list or an object
            raise InputError(f"{where} row {row}: label {shown(value)} is not a string or an integer") from None
        except (ValueError, ArithmeticError):
            raise InputError(
                f"{where} row {row}: label {shown(value)} is a measurement, not a class; labels are strings or integers"
            ) from None
    return found


def _label_name(value, class_names, free):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if not (class_names and re.fullmatch(rf"-?\d{{1,{LONGEST_NUMBER}}}", value.strip())):
            if not value.strip():
                raise BadCell(NO_LABEL)
            _check_characters(value, "label")
            return value
        value = int(value)
    if value is None or (isinstance(value, (float, Decimal)) and math.isnan(value)):
        raise BadCell(NO_LABEL)
    if not isinstance(value, (int, float, Decimal)):
        raise TypeError
    if free and value % 1 and not class_names:
        return str(value)
    if value % 1:
        raise ValueError
    if not class_names:
        return str(int(value))
    if value == -1:
        raise BadCell(NO_LABEL)
    if not 0 <= value < len(class_names):
        raise BadCell(f"a label beyond the {len(class_names)} classes that the file names: {shown(value)}")
    return class_names[int(value)]


def _check_characters(text, what):
    if "\0" in text:
        raise BadCell(f"a NUL character in the {what}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadCell(f"half of a surrogate pair in the {what}") from None


def shown(value):
    """A value for a message."""
    try:
        return json.dumps(value, default=str)[:40]
    except (TypeError, ValueError, RecursionError):
        return repr(value)[:40]


# --- the labels of a whole source ---------------------------------------------------------------------------


def tidy(labels, source):
    """Labels without the white space around them, truth values in lower case; a line says how many had some."""
    stripped = [label.strip() for label in labels]
    changed = sum(old != new for old, new in zip(labels, stripped, strict=True))
    if changed:
        say_once(f"labels     white space around {changed:,} labels of {source} is left out")
    return [truth(label) for label in stripped]


def truth(label):
    lower = label.lower()
    return lower if lower in TRUTH else label


def warn_of_labels(counts, source):
    """One line for labels that differ only in case or Unicode form, one for those that look like a missing value.

    counts  {label: how many rows have it}
    """
    alike, missing = {}, []
    for label in counts:
        alike.setdefault(" ".join(normalize("NFKC", label).casefold().split()), []).append(label)
        rare = label == "-1" and {"0", "1"} <= counts.keys() and 10 * counts[label] < sum(counts.values())
        missing += [label] * (label.casefold() in MISSING or rare)

    def listed(labels):
        return few(f"{label!r} ({counts[label]:,} rows)" for label in labels)

    same = [label for labels in alike.values() if len(labels) > 1 for label in labels]
    if same:
        say_once(
            f"warning    labels of {source} differ only in case or Unicode form: {listed(same)}; each is a class of "
            "its own, so write them alike if they mean the same"
        )
    if missing:
        say_once(
            f"warning    labels of {source} look like a missing value: {listed(missing)}; each is a class of its own, "
            "so remove these rows if it is none"
        )


def whole_numbers(labels, source):
    """{label: its integer as a string} where all labels are written as numbers (CSV: 1 or 1.0), else {}.

    Raises InputError for a measurement.
    """
    present = Counter(labels)
    pattern = rf"-?(0|[1-9][0-9]{{0,{LONGEST_NUMBER - 1}}})(\.[0-9]+)?"
    if not all(re.fullmatch(pattern, label) for label in present):
        return {}
    for label in present:
        if label.partition(".")[2].strip("0"):
            raise InputError(
                f"{source} row {labels.index(label) + 1}: label {short(label, 40)} is a measurement, not a class; "
                "labels are strings or integers"
            )
    return {label: str(int(label.partition(".")[0])) for label in present}
