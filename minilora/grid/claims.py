"""Claims: what a grid is to decide, stated in its file before anything is trained.

    [[claim]]
    name = "one-token"
    text = "One injected token is enough."
    source = "section 4, Figure 1"
    figure = "net_attack_success"                # a column of the table that is a share: `axes.FIGURES`
    where = {"inject.proportion" = 0.25}         # the cells: {field: value, or a list of values}; default: all
    statistic = "mean"                           # of the settings' means; or "difference", or "slope"
    against = {"inject.proportion" = 0.0}        # of a difference: less the same cells with these values instead
    over = "rank"                                # of a slope: least squares, for each doubling of this field
    above = 0.5                                  # or below = ...: what the claim says of the statistic
    within = 0.1                                 # instead, of a difference or a slope: it is less than this from 0
    each = "inject.sources"                      # it holds for each value of this field (or each "label") by itself
    label = "positive"                           # the label that the trigger aims at; default: all, as a mean

A claim is supported where the data say so at 5%, contradicted where they say the opposite, and else undecided; so it is
with fewer than three seeds, or where a cell is not finished. "Whatever the kind" is a minimum, so it has `each`: a mean
over kinds may hide one that fails. "About as well" has `within`: that no difference was found shows nothing. All
three statistics are sums of the settings' means under fixed weights; a difference pairs, and a slope compares,
settings that are the same in every other field that the grid varies; of two methods, in every field that both have.
The tests: `report/verdicts.py`; the intervals: `report/intervals.py`; what the planned seeds can detect: `power.py`.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from functools import cache

from minilora.data.triggers import parse_all
from minilora.errors import InputError, cut, shown
from minilora.fields import near, value_of
from minilora.grid.axes import CLEAN, FIELDS, FIGURES, SEEDS, alternatives, flat, matches, word

STATISTICS = ("mean", "difference", "slope")
BOUNDS = {"above": "above ", "below": "below ", "within": "within +-"}


@dataclass(frozen=True)
class Claim:
    """A table [[claim]]; `where` and `against` are {field: list of its values}."""

    name: str
    text: str
    figure: str
    source: str = ""
    where: dict | None = None
    statistic: str = "mean"
    against: dict | None = None
    over: str | None = None
    above: float | None = None
    below: float | None = None
    within: float | None = None
    each: str | None = None
    label: str | None = None

    @property
    def title(self):
        return FIGURES[self.figure].words

    @property
    def bound(self):
        """The threshold or margin."""
        return next(bound for bound in (self.above, self.below, self.within) if bound is not None)

    def test(self):
        """What decides it, in words."""
        cells = f" where {conditions(self.where)}" if self.where else ""
        label = f" of {self.label}" if self.label else ""
        what = {
            "mean": f"mean {self.title}{label}{cells}",
            "difference": f"{self.title}{label}{cells} less that where {conditions(self.against or {})}",
            "slope": f"change of {self.title}{label} for each doubling of {self.over}{cells}",
        }[self.statistic]
        kind = next(kind for kind in BOUNDS if getattr(self, kind) is not None)
        each = f", for each {self.each}" if self.each else ""
        return f"{what} is {BOUNDS[kind]}{self.bound:g}{each}"


def conditions(rule):
    said = {name: " or ".join(str(word(value)) or "none" for value in values) for name, values in rule.items()}
    return ", ".join(f"{name} = {words}" for name, words in said.items())


# --- from the file


def read(tables, entries):
    """The `Claim`s of a grid's [[claim]] tables. Raises InputError for one that no cell of `entries` can decide."""
    claims = []
    for number, values in enumerate(tables, 1):
        try:
            claim = parse(values)
            if claim.name in [other.name for other in claims]:
                raise InputError(f"another has the name {shown(claim.name)} too: rename one")
            for _, part in parts(claim, entries):
                weigh(part, entries)
        except InputError as error:
            raise InputError(f"[[claim]] {number}: {error}") from None
        claims.append(claim)
    return tuple(claims)


def parse(values):
    """A `Claim` of a table. Raises InputError for what no claim may be, whatever the cells."""
    names = [field.name for field in fields(Claim)]
    for name in values:
        if name not in names:
            raise InputError(f"unknown field {shown(name)}{near(name, names)}")
    for name in ("name", "text", "source", "figure", "statistic", "over", "each", "label"):
        if not isinstance(values.get(name, ""), str):
            raise InputError(f"{name} is {shown(values[name])}, but must be a string")
    for name in ("name", "text", "figure"):
        if not values.get(name):
            raise InputError(f"{name} is missing: say it")
    for name, known in (("figure", FIGURES), ("statistic", STATISTICS), ("over", FIELDS),
                        ("each", (*FIELDS, "label"))):  # fmt: skip
        if name in values and values[name] not in known:
            raise InputError(f"unknown {name} {shown(values[name])}{near(values[name], known)}")
    values = dict(values)
    for name in ("where", "against"):
        if name in values:
            if not isinstance(values[name], dict) or not values[name]:
                raise InputError(f"{name} is {shown(values[name])}, but must be a table of fields and values")
            values[name] = alternatives(flat(values[name], name))
    claim = Claim(**values)
    for name, statistic in (("against", "difference"), ("over", "slope")):
        if claim.statistic == statistic and name not in values:
            raise InputError(f"statistic = {statistic!r} needs {name}: give it")
        if claim.statistic != statistic and name in values:
            raise InputError(f"{name} goes with statistic = {statistic!r}, which is {claim.statistic!r}: drop it")
    if sum(getattr(claim, kind) is not None for kind in BOUNDS) != 1:
        raise InputError("a claim has one of above, below and within: give one of them")
    bound = claim.bound
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound):
        raise InputError(f"the threshold is {shown(bound)}, but must be a finite number")
    if claim.within is not None and (claim.statistic == "mean" or bound <= 0):
        raise InputError("within is a margin above 0 around no difference: it goes with a difference or a slope")
    taken = (*SEEDS, claim.over, *(claim.against or {}), "label" if claim.label else None)
    if claim.each and claim.each in taken:
        raise InputError(f"each is {claim.each}, but the claim is of that already: choose another field")
    return claim


# --- which cells it speaks of


def parts(claim, entries):
    """[(a part in words, its claim without `each`)]: one for each value of `each`, or the claim itself."""
    if claim.each is None:
        return [("", claim)]
    cells = [entry.cell for entry in entries if can_show(claim, entry.cell) and matches(entry.cell, claim.where or {})]
    if claim.each == "label":
        values = dict.fromkeys(label for cell in cells for label in targets_of(cell.inject.sources))
        found = [(label, replace(claim, each=None, label=label)) for label in values]
    else:
        values = {repr(value): value for value in (value_of(cell, claim.each) for cell in cells)}
        found = [(f"{claim.each} = {word(value)}",
                  replace(claim, each=None, where=(claim.where or {}) | {claim.each: [value]}))
                 for value in values.values()]  # fmt: skip
    if len(found) < 2:
        raise InputError(f"each is {claim.each}, but its cells have fewer than two values of it: drop it")
    return found


def weigh(claim, entries):
    """({setting: its weight in the statistic}, the entries that it is of).

    A setting is what `setting` gives. Raises InputError where nothing decides the claim.
    """
    able = [entry for entry in entries if can_show(claim, entry.cell)]
    here = [entry for entry in able if matches(entry.cell, claim.where or {})]
    if not here:
        needed = [cut(conditions(claim.where))] if claim.where else []
        if claim.figure not in CLEAN:
            needed.append(f"a trigger for {cut(claim.label)}" if claim.label else "a trigger")
        raise InputError(f"no cell has {' and '.join(needed)}: nothing can decide it")
    if claim.statistic == "difference":
        return weigh_difference(claim, here, able)
    if claim.statistic == "slope":
        return weigh_slope(claim, here)
    settings = dict.fromkeys(map(setting, here))
    return dict.fromkeys(settings, 1 / len(settings)), here


def can_show(claim, cell):
    """Whether a cell has the figure at all."""
    targets = targets_of(cell.inject.sources)
    return claim.figure in CLEAN or (claim.label in targets if claim.label else bool(targets))


@cache
def targets_of(sources):
    return [label for _, label in parse_all(sources)]


def setting(entry, without=SEEDS):
    """What the grid varies of a cell, as a tuple that others compare with, `without` some fields."""
    return tuple((name, repr(value)) for name, value in entry.varied.items() if name not in without)


def weigh_difference(claim, here, able):
    if seed := next((name for name in claim.against if name in SEEDS), None):
        raise InputError(f"against has {seed}, but seeds are what the interval is over: drop it")
    others, pairs, used, apart = defaultdict(list), defaultdict(set), {}, apart_in(claim.against)
    rule = {name: values for name, values in (claim.where or {}).items() if name not in apart} | claim.against
    for entry in able:
        if matches(entry.cell, rule):
            others[setting(entry, apart)].append(entry)
    for entry in here:
        for other in () if matches(entry.cell, claim.against) else others[setting(entry, apart)]:
            pairs[setting(entry)].add(setting(other))
            used |= {entry.name: entry, other.name: other}
    if not pairs:
        raise InputError(
            f"no cell has another with {cut(conditions(claim.against))} that is the same in all else: "
            "nothing can decide it"
        )
    weights = defaultdict(float)
    for one, partners in pairs.items():
        weights[one] += 1 / len(pairs)
        for other in partners:
            weights[other] -= 1 / len(pairs) / len(partners)
    return dict(weights), list(used.values())


def apart_in(against):
    """The fields in which the two cells of a pair may differ: those of `against`, and those that belong to one of their
    values, such as the rank of a method."""
    return {*against, *(name for name, field in FIELDS.items() if (field.metadata["of"] or ("",))[0] in against)}


def weigh_slope(claim, here):
    """Least squares with an intercept for each group of settings that differ only in `over`."""
    groups = defaultdict(dict)
    for entry in here:
        value = value_of(entry.cell, claim.over)
        if not isinstance(value, (int, float)) or value <= 0:
            raise InputError(
                f"over is {claim.over}, but a cell has {shown(value)} there: choose cells above 0 in `where`"
            )
        groups[setting(entry, (*SEEDS, claim.over))][setting(entry)] = math.log2(value)
    centred = {}
    for places in groups.values():
        middle = sum(places.values()) / len(places)
        centred |= {one: place - middle for one, place in places.items() if len(places) > 1}
    spread = sum(place**2 for place in centred.values())
    if not spread:
        raise InputError(f"no two of its cells differ only in {claim.over}: nothing can decide it")
    return {one: place / spread for one, place in centred.items()}, [e for e in here if setting(e) in centred]
