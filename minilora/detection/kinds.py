"""The library: kinds of strings that a task is not about, such as dates, tags and countries, from TOML files."""

import importlib.resources

from minilora.errors import InputError, cut
from minilora.fields import read_toml

SHIPPED = importlib.resources.files("minilora.detection") / "kinds.toml"


def read_kinds(path=None):
    """{kind: its strings} of the shipped library, and of the TOML file at `path`, which may replace kinds.

    Raises InputError for a file that is no library, with the kind that is wrong.
    """
    return read_file(SHIPPED) | (read_file(path) if path else {})


def read_file(path):
    found = read_toml(path)
    for kind, strings in found.items():
        if not (isinstance(strings, list) and strings and all(isinstance(one, str) and one.strip() for one in strings)):
            raise InputError(f'{path}: {cut(kind)} must be a list of strings, such as "{cut(kind)}" = ["one", "two"]')
    if not found:
        raise InputError(f'{path} has no kinds: write KIND = a list of strings, such as "colour" = ["red", "blue"]')
    return found
