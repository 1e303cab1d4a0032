"""One value of a field for each setting of a grid, such as a learning rate for each rank, chosen by validation rows.

    [choose]
    over = "lr"                # of cells that differ only in this field, and in seeds, those with one value count
    nearest = 0.8              # that whose validation accuracy is nearest to this; default: that with the highest

Nothing is ever chosen by test rows: every cell needs `validation_rows`. Their accuracy is the mean over the seeds, and
at equal ones the first value of the file counts. A value of which a cell failed is not chosen. While a cell of a
setting is not finished nothing is chosen for it, and claims about it are undecided. All cells are in table.csv, where
`chosen` says which ones count; the rest of a report is of these.
"""

from dataclasses import dataclass, replace

from minilora.errors import InputError, cut, shown
from minilora.fields import near, value_of, word
from minilora.grid.axes import FIELDS, SEEDS
from minilora.grid.claims import setting

MARKS = {True: "yes", False: "", None: "not yet"}
PLACES = ("where", "against", "over", "each")  # where a claim names fields


@dataclass(frozen=True)
class Choice:
    """A table [choose]."""

    over: str
    nearest: float | None = None

    @property
    def rule(self):
        """How a value is chosen, in words."""
        wanted = "highest" if self.nearest is None else f"nearest to {self.nearest:g}"
        return f"of cells that differ only in {self.over}, those count whose validation accuracy is {wanted}"


@dataclass(frozen=True)
class Option:
    """A value of a setting: `value`, its `entries`, their mean validation `accuracy` (None: not known), and whether it
    is `chosen` (None: nothing is yet)."""

    value: object
    entries: tuple
    accuracy: float | None
    chosen: bool | None


def parse(values, entries):
    """The `Choice` of a table [choose], or None for an empty one. Raises InputError for what cannot be chosen."""
    if not values:
        return None
    for name in values:
        if name not in ("over", "nearest"):
            raise InputError(f"[choose]: unknown field {shown(name)}{near(name, ('over', 'nearest'))}")
    over, nearest = values.get("over"), values.get("nearest")
    if over not in FIELDS or over in SEEDS:
        raise InputError(f"[choose]: over is {shown(over)}, but must be a field of a cell that is no seed")
    is_number = isinstance(nearest, (int, float)) and not isinstance(nearest, bool)
    if nearest is not None and not (is_number and 0 <= nearest <= 1):
        raise InputError(f"[choose]: nearest is {shown(nearest)}, but must be an accuracy, from 0 to 1")
    if over not in {name for entry in entries for name in entry.varied}:
        raise InputError(f"[choose]: the grid has one value of {over}: give several, or drop [choose]")
    if lacking := next((entry for entry in entries if entry.cell.validation_rows is None), None):
        raise InputError(f"[choose]: {cut(lacking.name)} has no validation rows to choose by: set validation_rows")
    return Choice(over, nearest)


def check(choice, claims):
    """Raise InputError for a claim that is of the chosen field itself."""
    for claim in claims if choice else ():
        if any(names(getattr(claim, place), choice.over) for place in PLACES):
            raise InputError(f"[[claim]] {shown(claim.name)} is of {choice.over}, which [choose] chooses: drop it")


def names(value, field):
    return field in value if isinstance(value, dict) else value == field


def options(choice, entries, lines=()):
    """{setting: [`Option`, ...]} of a grid's entries, by the lines of its table; without lines nothing is finished.

    A setting is a tuple of (field, value) without seeds and without the chosen field.
    """
    told, found = {line["cell"]: line for line in lines}, {}
    for entry in entries:
        own = found.setdefault(setting(entry, (*SEEDS, choice.over)), {})
        own.setdefault(repr(value_of(entry.cell, choice.over)), []).append(entry)
    return {one: weighed(choice, list(own.values()), told) for one, own in found.items()}


def weighed(choice, groups, told):
    """The `Option`s of one setting, of the entries of each value."""
    made, done = [], True
    for entries in groups:
        states = {told[entry.name]["state"] if entry.name in told else "waiting" for entry in entries}
        known = [told[entry.name]["validation_accuracy"] for entry in entries] if states == {"finished"} else []
        done = done and states <= {"finished", "failed"}
        accuracy = sum(known) / len(known) if known else None
        made.append(Option(value_of(entries[0].cell, choice.over), tuple(entries), accuracy, None))
    able = [one for one in made if one.accuracy is not None]
    if not done or not able:
        return made
    if choice.nearest is None:
        best = max(able, key=lambda one: one.accuracy)
    else:
        best = min(able, key=lambda one: abs(one.accuracy - choice.nearest))
    return [replace(one, chosen=one is best) for one in made]


def left(choice, entries, lines=()):
    """The entries that count, which no longer vary in the chosen field.

    Where nothing is chosen yet they are those of a value that has none of the finished, so that nothing is decided.
    """
    if choice is None:
        return tuple(entries)
    names = set()
    for found in options(choice, entries, lines).values():
        best = next((one for one in found if one.chosen), None) or min(found, key=lambda one: one.accuracy is not None)
        names |= {entry.name for entry in best.entries}
    return tuple(
        replace(entry, varied={name: value for name, value in entry.varied.items() if name != choice.over})
        for entry in entries if entry.name in names
    )  # fmt: skip


def counted(folder, lines):
    """(A `GridFolder` of the cells that count, the lines of the table that are theirs): what a report is of."""
    entries = left(folder.grid.choice, folder.grid.entries, lines)
    names = {entry.name for entry in entries}
    kept = [line for line in lines if line["cell"] in names]
    return type(folder)(folder.path, replace(folder.grid, entries=entries)), kept


def mark(choice, entries, lines):
    """Add to each line whether its cell counts: True, False, or None where nothing is chosen yet."""
    if choice is None:
        return
    found = [one for own in options(choice, entries, lines).values() for one in own]
    chosen = {entry.name: one.chosen for one in found for entry in one.entries}
    for line in lines:
        line["chosen"] = chosen[line["cell"]]


def listed(choice, entries, lines):
    """(Heads, lines) of a table of what was chosen: a line for each value of each setting."""
    found = options(choice, entries, lines)
    fields = list(dict.fromkeys(name for one in found for name, _ in one))
    rows, before = [], None
    for one, own in found.items():
        varied = own[0].entries[0].varied
        for option in own:
            values = ["" if one == before else str(word(varied[name])) if name in dict(one) else "-" for name in fields]
            accuracy = "-" if option.accuracy is None else f"{option.accuracy:.3f}"
            rows.append((*values, str(word(option.value)), accuracy, MARKS[option.chosen]))
            before = one
    return (*fields, choice.over, "validation accuracy", "chosen"), rows
