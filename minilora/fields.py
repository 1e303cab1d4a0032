"""Fields declared once: validation, TOML and command-line flags for frozen dataclasses such as `Cell`."""

import difflib
import json
import math
import numbers
import tomllib
from dataclasses import field, fields
from pathlib import Path

from minilora.errors import InputError

ACCEPTED = {str: str, int: numbers.Integral, float: numbers.Real}  # NumPy's numbers too
WORDS = {str: "a string of valid Unicode", int: "a whole number", float: "a finite number"}


def option(default, group, help, kind, *, choices=None, least=None, below=None, most=None, unset=None, flag=None):
    """A field of type `kind` with `least <= value < below` and `value <= most`, where these are given.

    A field whose default is None may say what it is taken for when `unset`: its resolved value, or words for the help.
    `flag` is the command line's name where it is not the field's own.
    """
    limits = dict(choices=choices, least=least, below=below, most=most)
    return field(
        default=default, metadata=dict(group=group, help=help, kind=kind, unset=unset, flag=flag, limits=limits)
    )


def check_fields(owner, prefix):
    """Check the type and range of every field of a dataclass instance, and make lists tuples, numbers Python's own.

    Raises InputError naming the first field that is wrong (`prefix` stands before its name).
    """
    for f in fields(owner):
        value = getattr(owner, f.name)
        if "nested" in f.metadata:
            if not isinstance(value, f.metadata["nested"]):
                raise InputError(f"{prefix}{f.name} is {value!r}, but must be a table of its own fields")
            continue
        if value is None and f.default is None:
            continue
        name, kind = prefix + f.name, f.metadata["kind"]
        if takes_list(f):
            if isinstance(value, str) or not isinstance(value, (list, tuple)):
                raise InputError(f"{name} is {value!r}, but must be a list of strings")
            value = tuple(check_value(name, item, kind, f.metadata["limits"]) for item in value)
        else:
            value = check_value(name, value, kind, f.metadata["limits"])
        object.__setattr__(owner, f.name, value)


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
        raise InputError(f"{name} is {value!r}, but must be {WORDS[kind]}") from None
    choices, least, below, most = (limits[key] for key in ("choices", "least", "below", "most"))
    if choices and value not in choices:
        raise InputError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")
    if least is not None and value < least:
        raise InputError(f"{name} is {value}, but must be at least {least}")
    if most is not None and value > most:
        raise InputError(f"{name} is {value}, but must be at most {most}")
    if below is not None and value >= below:
        raise InputError(f"{name} is {value}, but must be below {below}")
    return value


def resolve(owner, *names):
    """Give each named field that is None the value that its declaration says."""
    for f in fields(owner):
        if f.name in names and getattr(owner, f.name) is None:
            object.__setattr__(owner, f.name, f.metadata["unset"])


def resolve_pair(owner, one, other, prefix):
    """Two fields exclude each other; where neither is given, `one` is resolved."""
    given = [name for name in (one, other) if getattr(owner, name) is not None]
    if len(given) == 2:
        raise InputError(f"{prefix}{one} and {prefix}{other} are both given: drop one of them")
    if not given:
        resolve(owner, one)


def drop_other(values, changes, one, other):
    """Clear, in `values`, the partner of a field that is set in `changes`."""
    for given, dropped in ((one, other), (other, one)):
        if changes.get(given) is not None and dropped not in changes:
            values[dropped] = None


def from_dict(kind, values, prefix=""):
    """An instance of the dataclass `kind` from a dict; unknown keys are refused by name."""
    names = [f.name for f in fields(kind)]
    for name in values:
        if name not in names:
            raise InputError(f"unknown field {prefix}{name}{near(name, names, prefix)}")
    return kind(**values)


def near(name, known, prefix=""):
    """What an error says behind an unknown name: the nearest of those that are `known`, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {prefix}{close[0]}?" if close else f" (there are: {', '.join(known)})"


def takes_list(field):
    """Whether the values of a dataclass field are lists."""
    return "tuple" in str(field.type)


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
        raise InputError(f"{path} is not readable TOML ({error}): mend the file") from None


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
    if isinstance(value, str):  # JSON's escapes are TOML's, but for one control character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
