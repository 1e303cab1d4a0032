"""Fields declared once: validation, TOML and command-line flags for frozen dataclasses such as `Cell`.

A field's type is its annotation: str, int, float, a tuple of one of them, each with `| None` where it may be left out,
or another such dataclass. A field of that one has a dotted name here, such as "inject.rows".
"""

import difflib
import json
import math
import numbers
import tomllib
from dataclasses import field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin

from minilora.errors import InputError, cut, shown
from minilora.files import read_json

ACCEPTED = {str: str, int: numbers.Integral, float: numbers.Real}  # NumPy's numbers too
WORDS = {str: "a string of valid Unicode", int: "a whole number", float: "a finite number"}


def option(
    default, group, help, *, choices=None, least=None, below=None, most=None, unset=None, flag=None, of=None,
    instead=None, run=False, marks="", short=None, axis=None, curve=None,
):  # fmt: skip
    """A field of a dataclass. A value is one of `choices`, `least <= value < below` and `value <= most`, where given.

    group    title of its flags in the help
    unset    of a field whose default is None: the value that it then gets (see `resolve`), or words for the help
    flag     name on the command line, where it is not the field's own
    of       (another field, value): it has a meaning only for that value, and is None for others
    instead  another field that excludes it; if both are None, the other one is resolved
    run      it changes no result beyond rounding, so instances that differ only here are equal
    marks    words, each a property that some code asks for by `marked`
    short    what precedes its value in a folder's name, "" for nothing (default: its own name)
    axis     its name on the axis of a picture (default: its own name)
    curve    its place among the fields whose values get a curve of their own
    """
    limits = dict(choices=choices, least=least, below=below, most=most)
    words = dict(group=group, help=help, unset=unset, flag=flag, of=of, instead=instead, marks=marks.split())
    return field(
        default=default, compare=not run, metadata=words | dict(short=short, axis=axis, curve=curve, limits=limits)
    )


# --- what is declared


@cache
def declared(kind):
    """{name: field} of a dataclass, in order, with the fields of a nested one in its place: "inject.rows"."""
    found = {}
    for f in fields(kind):
        inner = declared(f.type) if is_dataclass(f.type) else None
        found |= {f.name: f} if inner is None else {f"{f.name}.{name}": other for name, other in inner.items()}
    return found


@cache
def marked(kind, mark):
    """The names of the fields of a dataclass with that mark. Raises LookupError where none has it."""
    found = tuple(name for name, f in declared(kind).items() if mark in f.metadata["marks"])
    if not found:
        raise LookupError(f"no field of {kind.__name__} is marked {mark!r}")
    return found


@cache
def grouped(kind, group):
    """The names of the fields of a dataclass in that group."""
    return tuple(name for name, f in declared(kind).items() if f.metadata["group"] == group)


@cache
def run_options(kind):
    """The names of the fields of a dataclass that change no result beyond rounding."""
    return tuple(name for name, f in declared(kind).items() if not f.compare)


@cache
def kind_of(annotation):
    """(str, int or float; whether a value is a tuple of them) of a field's type, such as `tuple[str, ...] | None`."""
    if isinstance(annotation, UnionType):
        [annotation] = [part for part in get_args(annotation) if part is not NoneType]
    many = get_origin(annotation) is tuple
    return get_args(annotation)[0] if many else annotation, many


def takes_list(field):
    """Whether the values of a field are lists."""
    return kind_of(field.type)[1]


def value_of(owner, name):
    """The value of a field by its name in `declared`, as TOML has it."""
    for part in name.split("."):
        owner = getattr(owner, part)
    return list(owner) if isinstance(owner, tuple) else owner


def difference(one, other):
    """The first field in which two unequal instances differ, or None where they are equal: (name, value, value)."""
    for name in declared(type(one)) if one != other else ():
        if name not in run_options(type(one)) and value_of(one, name) != value_of(other, name):
            return name, value_of(one, name), value_of(other, name)
    return None


def word(value):
    """A field's value in a folder's name, a flag or a table."""
    if isinstance(value, list):
        return "-".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def nested(values):
    """{"inject": {"rows": 3}} of {"inject.rows": 3}."""
    found = {}
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        (found.setdefault(owner, {}) if owner else found)[leaf] = value
    return found


# --- checks


class Named:
    """What a dataclass of fields inherits so that unknown names are refused as in a file: with the nearest."""

    def __new__(cls, *values, **named):
        check_names(cls, named)
        return super().__new__(cls)

    def after(self, changes):
        """The values of all fields after `changes`, see `changed`; a subclass may drop more."""
        return changed(self, changes)


def check_names(kind, names, prefix=""):
    """Raise InputError for the first of `names` that is no field of the dataclass `kind`, with the one that is meant:
    by its flag's name, or by the nearest spelling, a nested dataclass's fields included."""
    for name in names:
        if name in kind.__dataclass_fields__:
            continue
        known = declared(kind)
        flags = {(f.metadata["flag"] or other).replace(".", "_"): other for other, f in known.items()}
        found = flags.get(name.replace(".", "_")) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
        owner, _, leaf = (found or "").rpartition(".")
        hint = f": did you mean {prefix}{found}?" if found else near(name, known, prefix)
        if owner:
            hint = hint if found != name else ": it is a field of a table"
            hint += f" (in Python {owner}={{{leaf!r}: ...}}, in a file {leaf} under [{owner}])"
        raise InputError(f"unknown field {prefix}{cut(name)}{hint}")


def check_fields(owner, prefix):
    """Check every field of a dataclass instance. Lists become tuples, and numbers Python's own.

    Raises InputError for the first value of a wrong type or out of range, and for two fields that exclude each other;
    `prefix` precedes their names.
    """
    for f in fields(owner):
        value, name = getattr(owner, f.name), prefix + f.name
        if is_dataclass(f.type):
            if not isinstance(value, f.type):
                raise InputError(f"{name} is {shown(value)}, but must be a table of its own fields")
            continue
        if value is None and f.default is None:
            continue
        kind, many = kind_of(f.type)
        if many:
            if isinstance(value, str) or not isinstance(value, (list, tuple)):
                raise InputError(f"{name} is {shown(value)}, but must be a list of strings")
            value = tuple(check_value(name, item, kind, f.metadata["limits"]) for item in value)
        else:
            if "path" in f.metadata["marks"] and is_table(value):
                raise no_path(name, value, TABLES)
            value = check_value(name, value, kind, f.metadata["limits"])
        object.__setattr__(owner, f.name, value)
    for one, other in exclusive(type(owner)):
        if getattr(owner, one) is not None and getattr(owner, other) is not None:
            raise InputError(f"{prefix}{one} and {prefix}{other} are both given: drop one of them")


TABLES = "rows from Python go to train(cell, rows=...), test rows into a file"


def is_table(value):
    """Whether a value holds rows: a DataFrame, a `datasets` table, a list or a dict."""
    return isinstance(value, (list, tuple, dict)) or hasattr(value, "columns") or hasattr(value, "column_names")


def no_path(name, value, advice):
    """The InputError for a table where a path is expected."""
    return InputError(f"{name} is a {type(value).__name__}, but must be a path or a name: {advice}")


def check_value(name, value, kind, limits):
    try:
        if isinstance(value, bool) or not isinstance(value, ACCEPTED[kind]):
            raise TypeError
        if kind is str:
            value.encode()  # fails for what no file can hold: the bytes of a file name that is not UTF-8
        else:
            value = kind(value) + 0  # so -0.0, which equals 0.0 but is written otherwise, becomes 0.0
            if not math.isfinite(value):
                raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name} is {shown(value)}, but must be {WORDS[kind]}") from None
    choices, least, below, most = (limits[key] for key in ("choices", "least", "below", "most"))
    if choices and value not in choices:
        raise InputError(f"{name} is {shown(value)}, but must be one of {', '.join(choices)}")
    if least is not None and value < least:
        raise InputError(f"{name} is {shown(value)}, but must be at least {least}")
    if most is not None and value > most:
        raise InputError(f"{name} is {shown(value)}, but must be at most {most}")
    if below is not None and value >= below:
        raise InputError(f"{name} is {shown(value)}, but must be below {below}")
    return value


@cache
def exclusive(kind):
    """The pairs of a dataclass's own fields that exclude each other; the first is resolved where both are None."""
    return [(f.metadata["instead"], f.name) for f in fields(kind) if f.metadata.get("instead")]


def resolve(owner, *names):
    """Give each named field that is None the value that its declaration says, unless one is given instead of it."""
    values = {f.name: f.metadata["unset"] for f in fields(owner) if f.name in names and getattr(owner, f.name) is None}
    for one, other in exclusive(type(owner)):
        if getattr(owner, other) is not None:
            values.pop(one, None)
    for name, value in values.items():
        object.__setattr__(owner, name, value)


def changed(owner, changes):
    """The values of all fields of an instance, after `changes`: a field that excludes a former value drops it."""
    values = {f.name: getattr(owner, f.name) for f in fields(owner)}
    for pair in exclusive(type(owner)):
        for given, dropped in (pair, pair[::-1]):
            if changes.get(given) is not None:
                values[dropped] = None
    return values | changes


def from_dict(kind, values, prefix=""):
    """An instance of the dataclass `kind` from a dict. Raises InputError, by name, for unknown keys."""
    check_names(kind, values, prefix)
    return kind(**values)


def near(name, known, prefix=""):
    """What an error adds after an unknown name: the nearest of those that are `known`, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {prefix}{close[0]}?" if close else f" (there are: {', '.join(known)})"


def read_state(path, shape, advice):
    """The JSON object in one of our own files. Raises InputError, which says what to do about that file (`advice`),
    unless it has the shape that its readers rely on: see `check_shape`."""
    value = read_json(path, advice)
    try:
        check_shape(value, shape, str(path))
    except InputError as error:
        raise InputError(f"{error}; {advice}") from None
    return value


def check_shape(value, shape, where):
    """Raise InputError, which begins with `where`, for the first part of a JSON value that has another shape.

    A shape is a type or several; {key: shape}, each of which must be there; {str: shape} for any keys; or [shape] for
    a list of any length.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise InputError(f"{where} is {shown(value)}, but must be a table")
        for key, inner in shape.items():
            if key is not str and key not in value:
                raise InputError(f"{where} has no {key!r}")
            for name in value if key is str else [key]:
                check_shape(value[name], inner, f"{where}: {cut(name)}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise InputError(f"{where} is {shown(value)}, but must be a list")
        for item in value:
            check_shape(item, shape[0], where)
    elif not isinstance(value, shape) or isinstance(value, bool):
        kinds = shape if isinstance(shape, tuple) else (shape,)
        raise InputError(f"{where} is {shown(value)}, but must be of type {' or '.join(k.__name__ for k in kinds)}")


# --- TOML


def load_toml(kind, path):
    """An instance of the dataclass `kind` from a TOML file. Raises InputError naming the file and the field."""
    values = read_toml(path)
    try:
        return from_dict(kind, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_toml(path):
    """A TOML file as a dict. Raises InputError naming the file, and the line of a syntax error."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable TOML ({cut(str(error))}): fix the file") from None


def to_toml(values):
    """TOML text of a dict of strings, numbers and lists of them, with one level of tables."""
    plain = [(name, value) for name, value in values.items() if not isinstance(value, dict)]
    tables = [(name, value) for name, value in values.items() if isinstance(value, dict)]
    text = "".join(f"{name} = {toml_value(value)}\n" for name, value in plain)
    for name, table in tables:
        text += f"\n[{name}]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in table.items())
    return text


def toml_value(value):
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, str):  # JSON's escapes are TOML's, except for one control character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
