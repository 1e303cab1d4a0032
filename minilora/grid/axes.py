"""The fields that a grid varies, their values, and the figures that its table has."""

import itertools
from dataclasses import dataclass, fields

from minilora.cell import Cell, Inject
from minilora.errors import InputError
from minilora.fields import near, takes_list

FIELDS = {f.name: f for f in fields(Cell) if f.name != "inject"} | {f"inject.{f.name}": f for f in fields(Inject)}


@dataclass(frozen=True)
class Entry:
    """A cell of a grid: its run folder's name, and {field: value} of what the grid varies."""

    name: str
    cell: Cell
    varied: dict


def flat(values, where):
    """{"inject.proportion": ...} of {"inject": {"proportion": ...}} or of itself; unknown fields are refused."""
    found = {}
    for name, value in values.items():
        inner = {name: value}
        if name == "inject" and isinstance(value, dict):
            inner = {f"inject.{key}": item for key, item in value.items()}
        for key, item in inner.items():
            if key not in FIELDS:
                raise InputError(f"[{where}]: unknown field {key!r}{near(key, FIELDS)}")
            if key in found:
                raise InputError(f"[{where}]: {key} is given twice")
            found[key] = item
    return found


def nested(change):
    """The inverse of `flat`."""
    plain = {name: value for name, value in change.items() if not name.startswith("inject.")}
    inject = {name.removeprefix("inject."): value for name, value in change.items() if name.startswith("inject.")}
    return plain | ({"inject": inject} if inject else {})


def check_axis(name, axis, twice=False):
    if not isinstance(axis, list) or takes_list(FIELDS[name]) and not all(isinstance(value, list) for value in axis):
        wanted = "a list of lists, each of them one value" if takes_list(FIELDS[name]) else "a list of values"
        raise InputError(f"the axis {name} is {axis!r}, but must be {wanted}")
    if not axis:
        raise InputError(f"the grid is empty: the axis {name} has no values")
    for number, value in enumerate(axis):
        if not twice and value in axis[:number]:
            raise InputError(f"the axis {name} has the value {value!r} twice: drop one")


def alternatives(change):
    """{field: list of its values} of a table in which a field may have one value or a list of them."""
    axes = {name: value if is_axis(name, value) else [value] for name, value in change.items()}
    for name, axis in axes.items():
        check_axis(name, axis)
    return axes


def is_axis(name, value):
    """Whether it is a list of a field's values, and not one of them."""
    return isinstance(value, list) and (not takes_list(FIELDS[name]) or any(isinstance(item, list) for item in value))


def product(axes):
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def value_of(cell, name):
    """The value of a field of `FIELDS`, as TOML has it."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(cell.inject if owner else cell, leaf)
    return list(value) if isinstance(value, tuple) else value


def matches(cell, rule):
    return all(value_of(cell, name) in values for name, values in rule.items())


def word(value):
    """A field's value in a folder's name, a flag or a table."""
    if isinstance(value, list):
        return "-".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


SEEDS = tuple(name for name, field in FIELDS.items() if field.metadata["group"] == "seeds")
# The table's columns that are shares of test rows: what they are called, the column of how many rows they are of, and
# of a difference of shares the columns of the rows gained and lost.
FIGURES = {
    "clean_accuracy": ("clean accuracy", "test_rows"),
    "clean_balanced_accuracy": ("balanced clean accuracy", "test_rows"),
    "trigger_accuracy": ("accuracy under the trigger", "test_rows"),
    "placebo_accuracy": ("accuracy under the placebo", "test_rows"),
    "degradation": ("degradation", "test_rows", "only_clean_right", "only_trigger_right"),
    "attack_success_clean": ("attack success without the trigger", "attack_rows"),
    "attack_success": ("attack success", "attack_rows"),
    "attack_success_placebo": ("attack success under the placebo", "attack_rows"),
    "flip_rate": ("flip rate", "test_rows"),
    "flip_rate_placebo": ("flip rate under the placebo", "test_rows"),
    "worst_group_accuracy": ("accuracy of the worst group", "worst_group_rows"),
}
CLEAN = ("clean_accuracy", "clean_balanced_accuracy")  # the figures that need no trigger


def plain(value):
    """A field's value as the table has it."""
    return " ".join(map(str, value)) if isinstance(value, list) else value
