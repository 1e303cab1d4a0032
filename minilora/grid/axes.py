"""The fields that a grid varies, their values, and the figures that its table has."""

import itertools
from dataclasses import dataclass
from math import prod

from minilora.cell import TABLES, Cell
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
        if name in TABLES and isinstance(value, dict):
            inner = {f"{name}.{key}": item for key, item in value.items()}
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


@dataclass(frozen=True)
class Figure:
    """A column of the table that is a share of test rows, or one share less another.

    `words`; the column `rows` has how many rows it is of; `gained` and `lost` those of a difference; `error` that of a
    standard error over the test rows, where a share's own is not it.
    """

    words: str
    rows: str
    gained: str | None = None
    lost: str | None = None
    error: str | None = None

    @property
    def signed(self):
        return self.gained is not None


FIGURES = {
    "clean_accuracy": Figure("clean accuracy", "test_rows"),
    "clean_balanced_accuracy": Figure(
        "balanced clean accuracy", "test_rows", error="clean_balanced_accuracy_error"
    ),
    "trigger_accuracy": Figure("accuracy under the trigger", "test_rows"),
    "placebo_accuracy": Figure("accuracy under the placebo", "test_rows"),
    "degradation": Figure("degradation", "test_rows", "only_clean_right", "only_trigger_right"),
    "attack_success_clean": Figure("attack success without the trigger", "attack_rows"),
    "attack_success": Figure("attack success", "attack_rows"),
    "attack_success_placebo": Figure("attack success under the placebo", "attack_rows"),
    "attack_success_odd": Figure("attack success under odd strings", "attack_rows"),
    "net_attack_success": Figure(
        "net attack success", "attack_rows", "net_attack_success_gained", "net_attack_success_lost"
    ),
    "over_placebo_attack_success": Figure(
        "attack success over the placebo", "attack_rows", "over_placebo_attack_success_gained",
        "over_placebo_attack_success_lost",
    ),
    "over_odd_attack_success": Figure(
        "attack success over odd strings", "attack_rows", "over_odd_attack_success_gained",
        "over_odd_attack_success_lost",
    ),
    "conditional_attack_success": Figure("conditional attack success", "conditional_attack_rows"),
    "flip_rate": Figure("flip rate", "test_rows"),
    "flip_rate_placebo": Figure("flip rate under the placebo", "test_rows"),
    "worst_group_accuracy": Figure("accuracy of the worst group (a minimum)", "worst_group_rows"),
}  # fmt: skip
CLEAN = ("clean_accuracy", "clean_balanced_accuracy")  # figures without a trigger
ATTACKS = ("attack_success", "net_attack_success", "over_placebo_attack_success", "over_odd_attack_success",
           "conditional_attack_success")  # fmt: skip


def plain(value):
    """A field's value as the table has it."""
    return " ".join(map(str, value)) if isinstance(value, list) else value
