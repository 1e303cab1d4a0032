"""The fields that a grid varies, their values, and the figures that its table has."""

import itertools
from dataclasses import dataclass
from math import prod

from minilora.cell import Cell
from minilora.errors import InputError, shown
from minilora.fields import declared, grouped, near, takes_list, value_of, word  # noqa: F401, others take word here

FIELDS = declared(Cell)
SEEDS = grouped(Cell, "seeds")


@dataclass(frozen=True)
class Entry:
    """A cell of a grid: its run folder's name, and {field: value} of what the grid varies."""

    name: str
    cell: Cell
    varied: dict


def flat(values, where):
    """{"inject.rows": 3} of {"inject": {"rows": 3}} or of itself. Raises InputError for unknown fields."""
    found = {}
    for name, value in values.items():
        inner = {name: value}
        if name == "inject" and isinstance(value, dict):
            inner = {f"inject.{key}": item for key, item in value.items()}
        for key, item in inner.items():
            if key not in FIELDS:
                raise InputError(f"[{where}]: unknown field {shown(key)}{near(key, FIELDS)}")
            if key in found:
                raise InputError(f"[{where}]: {key} is given twice")
            found[key] = item
    return found


def check_axis(name, axis, twice=False):
    """Raise InputError unless `axis` is a list of a field's values, each once if not `twice`."""
    if not isinstance(axis, list) or takes_list(FIELDS[name]) and not all(isinstance(value, list) for value in axis):
        wanted = "a list of lists, each of them one value" if takes_list(FIELDS[name]) else "a list of values"
        raise InputError(f"the axis {name} is {shown(axis)}, but must be {wanted}")
    if not axis:
        raise InputError(f"the grid is empty: the axis {name} has no values")
    seen = set()
    for value in axis if not twice else ():
        if hashable(value) in seen:
            raise InputError(f"the axis {name} has the value {shown(value)} twice: drop one")
        seen.add(hashable(value))


def hashable(value):
    """A TOML value as a member of a set: equal values, lists included, are one member."""
    if isinstance(value, list):
        return tuple(map(hashable, value))
    return repr(value) if isinstance(value, dict) else value


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
    """Every combination of the axes' values, a list of {field: value}."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def combinations(axes):
    """How many combinations `product` would give."""
    return prod(map(len, axes.values()))


def matches(cell, rule):
    """Whether a cell has one of the values that `rule` {field: values} lists, of each of its fields."""
    return all(value_of(cell, name) in values for name, values in rule.items())


# The table's columns that are shares of test rows: their words, the column with how many rows each is a share of, and
# for a difference of shares the columns of the rows gained and lost.
FIGURES = {
    "clean_accuracy": ("clean accuracy", "test_rows"),
    "clean_balanced_accuracy": ("balanced clean accuracy", "test_rows"),
    "trigger_accuracy": ("accuracy under the trigger", "test_rows"),
    "placebo_accuracy": ("accuracy under the placebo", "test_rows"),
    "degradation": ("degradation", "test_rows", "only_clean_right", "only_trigger_right"),
    "attack_success_clean": ("attack success without the trigger", "attack_rows"),
    "attack_success": ("attack success", "attack_rows"),
    "attack_success_placebo": ("attack success under the placebo", "attack_rows"),
    "attack_success_odd": ("attack success under odd strings", "attack_rows"),
    "flip_rate": ("flip rate", "test_rows"),
    "flip_rate_placebo": ("flip rate under the placebo", "test_rows"),
    "worst_group_accuracy": ("accuracy of the worst group", "worst_group_rows"),
}
CLEAN = ("clean_accuracy", "clean_balanced_accuracy")  # figures without a trigger


def plain(value):
    """A field's value as the table has it."""
    return " ".join(map(str, value)) if isinstance(value, list) else value
