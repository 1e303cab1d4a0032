"""How figures name fields, values and settings."""

from minilora.console import short, visible
from minilora.grid.axes import FIELDS, word

WIDEST = 48  # characters of a field and its value


def axis_label(name):
    return (name in FIELDS and FIELDS[name].metadata["axis"]) or name.removeprefix("inject.")


def tick(name, value):
    return f"{100 * value:g}" if name == "inject.proportion" else visible(str(word(value)))


def title_of(group):
    """The fields of `group` that have a value, in words."""
    return ", ".join(named(name, value) for name, value in group.items() if value is not None) or "all cells"


def named(name, value):
    if name == "inject.proportion":
        return f"{tick(name, value)}% injected"
    return short(f"{axis_label(name)} {tick(name, value)}", WIDEST)


def first_of(group):
    """The name of a curve in its panel: its first field."""
    return title_of(dict(list(group.items())[:1]))


def rest_of(group):
    """The title of a curve's panel: its other fields."""
    return title_of(dict(list(group.items())[1:]))


def numeric(values):
    """Whether these are numbers, and so have an order and distances; True and False are names."""
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def sentence(text):
    return text[:1].upper() + text[1:]
