"""A grid: many cells from one TOML file.

    title = "..."              what it is for; `source` names the table or figure that it follows
    [cell]                     what all cells share: any field of a cell, and `preset`, a name of `presets.PRESETS`
    [grid]                     crossed: each field with a list of its values; a field of `inject` as "inject.FIELD"
    [zip]                      fields that move together: lists of one length, crossed with the rest
    [[include]]                more cells: what they change of [cell]; a list of a field's values is crossed
    [[exclude]]                cells to leave out: those that have all of these values (or one of each list)
    [size.NAME]                only for this size of the grid (`--size NAME`, by default `small`): `preset`, a field of
                               all cells, or a list of its values, which replaces [grid]'s axis or crosses all cells
    [choose]                   a field of which one value counts in each setting, by validation rows: see `choice.py`
    [[claim]]                  what the grid is to decide, stated beforehand: see `claims.py`

A field whose value is itself a list (`targets`, "inject.sources") takes lists of lists where others take lists. Cells
that differ only in a run option, such as `device`, are one experiment: a grid may not have both.
"""

from dataclasses import dataclass
from pathlib import Path

from minilora.cell import Cell
from minilora.errors import InputError, cut, shown
from minilora.fields import declared, marked, near, nested, read_toml, run_options, value_of, word
from minilora.grid.axes import (
    FIELDS,
    Entry,
    alternatives,
    check_axis,
    combinations,
    flat,
    is_axis,
    matches,
    product,
)
from minilora.lora.targets import parse_targets
from minilora.naming import LONGEST, word_of
from minilora.presets import PRESETS

SMALL = "small"  # the size that is taken where a file has it and no other is asked for
SECTIONS = ("title", "source", "cell", "grid", "zip", "include", "exclude", "size", "choose", "claim")
MOST = 100_000  # cells of a grid


@dataclass(frozen=True)
class Grid:
    """`entries` in the order of the file; `claims` the `claims.Claim`s; `text` the file's own; `size` the name of the
    size, or None."""

    title: str
    source: str
    entries: tuple
    claims: tuple
    text: str
    size: str | None = None
    choice: object = None  # a `choice.Choice`

    @property
    def varied(self):
        """The fields in which entries differ."""
        return list(dict.fromkeys(name for entry in self.entries for name in entry.varied))


def read_grid(path, size=None):
    """The `Grid` in a TOML file, at one of its sizes. Raises InputError, naming the file and field."""
    values = read_toml(path)
    try:
        return build_grid(values, Path(path).read_text(encoding="utf-8-sig"), Path(path).stem, size)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def build_grid(values, text="", title="grid", size=None):
    """The `Grid` of a dict, as TOML gives it. Raises InputError for unknown fields, values that no cell takes, an axis
    with one value twice, an empty grid or one of more than `MOST` cells, fields that contradict each other, two cells
    that are one experiment, and a claim that no cell can decide."""
    from minilora.grid import choice, claims  # which read cells with what is below

    for name in values:
        if name not in SECTIONS:
            raise InputError(f"unknown section {shown(name)}{near(name, SECTIONS)}")
    for name in ("title", "source"):
        if not isinstance(values.get(name, ""), str):
            raise InputError(f"{name} is {shown(values[name])}, but must be a string")
    size, preset, sized, axes = size_of(table(values, "size"), size)
    base = base_cell(table(values, "cell"), preset, sized)
    cells = made(base, changes_of(values, axes), rules_of(values))
    check_alike(cells)
    entries = named(cells)
    chosen = choice.parse(table(values, "choose"), entries)
    stated = claims.read(tables(values, "claim"), choice.left(chosen, entries))
    choice.check(chosen, stated)
    return Grid(values.get("title", title), values.get("source", ""), entries, stated, text, size, chosen)


def table(values, name):
    found = values.get(name, {})
    if not isinstance(found, dict):
        raise InputError(f"[{name}] is {shown(found)}, but must be a table")
    return found


def tables(values, name):
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise InputError(f"[[{name}]] is {shown(found)}, but must be tables")
    return found


def size_of(sizes, name):
    """(The name of the size that is taken or None, its preset or None, its {field: value}, its {field: axis})."""
    for title, values in sizes.items():
        if not isinstance(values, dict):
            raise InputError(f"[size] {cut(title)} is {shown(values)}, but must be a table: [size.{cut(title)}]")
        flat({key: value for key, value in values.items() if key != "preset"}, f"size.{cut(title)}")
    if name is None and SMALL in sizes:
        name = SMALL
    if name is None:
        return None, None, {}, {}
    if name not in sizes:
        there = f"there are: {', '.join(sizes)}" if sizes else "the file has none"
        raise InputError(f"there is no size {shown(name)} ({there})")
    values = dict(sizes[name])
    preset = values.pop("preset", None)
    values = flat(values, f"size.{name}")
    axes = {field: value for field, value in values.items() if is_axis(field, value)}
    return name, preset, {field: value for field, value in values.items() if field not in axes}, axes


def base_cell(values, preset, sized):
    """The cell that a preset, [cell] and the size's own fields make."""
    values = dict(values)
    own = values.pop("preset", None)
    for name in (own, preset):
        if name is not None and (not isinstance(name, str) or name not in PRESETS):
            raise InputError(f"preset is {shown(name)}, but must be one of {', '.join(PRESETS)}")
    try:
        cell = Cell().replace(**PRESETS.get(preset or own, {})).replace(**nested(flat(values, "cell")))
        return cell.replace(**nested(sized))
    except InputError as error:
        raise InputError(f"[cell]: {error}") from None


def changes_of(values, axes):
    """What each cell changes of [cell], a list of {field: value}; `axes` are the size's. They are counted first."""
    axes, zipped = dict(axes), flat(table(values, "zip"), "zip")
    crossed = {name: axes.pop(name, axis) for name, axis in flat(table(values, "grid"), "grid").items()}
    for name, axis in (crossed | zipped | axes).items():
        check_axis(name, axis, twice=name in zipped)
    if twice := crossed.keys() & zipped.keys():
        raise InputError(f"{min(twice)} is in [grid] and in [zip]: drop one of them")
    lengths = {len(axis) for axis in zipped.values()}
    if len(lengths) > 1:
        raise InputError(f"the lists of [zip] must have one length, but have {', '.join(map(str, sorted(lengths)))}")
    together = [dict(zip(zipped, row, strict=True)) for row in zip(*zipped.values(), strict=True)]
    if len({repr(row) for row in together}) < len(together):
        raise InputError("[zip] has one combination of values twice: drop one")
    extras = [
        alternatives(flat(extra, f"include {number}")) for number, extra in enumerate(tables(values, "include"), 1)
    ]
    own = combinations(crossed) * max(1, len(together)) if crossed or zipped else 0
    count = combinations(axes) * max(1, own + sum(map(combinations, extras)))
    if count > MOST:
        raise InputError(f"the grid would have {count:,} cells, but may have {MOST:,}: shorten its axes")
    found = [combined | row for combined in product(crossed) for row in together or [{}]] if own else []
    found += [change for extra in extras for change in product(extra)]
    return [extra | change for extra in product(axes) for change in found or [{}]]


def rules_of(values):
    """The rules of [[exclude]], each as {field: values}."""
    return [alternatives(flat(rule, f"exclude {number}")) for number, rule in enumerate(tables(values, "exclude"), 1)]


def made(base, changes, excluded):
    """[(cell, change)] of the cells that no rule excludes. Raises InputError for a rule that excludes none."""
    cells, hits = [], [0] * len(excluded)
    for change in changes:
        try:
            cell = base.replace(**nested(change))
        except InputError as error:
            raise InputError(f"{described(change)}: {error}") from None
        matched = [number for number, rule in enumerate(excluded) if matches(cell, rule)]
        for number in matched:
            hits[number] += 1
        if not matched:
            cells.append((cell, change))
    if 0 in hits:
        raise InputError(f"[[exclude]] {hits.index(0) + 1} matches no cell: fix or drop it")
    if not cells:
        raise InputError("the grid is empty: [[exclude]] drops every cell")
    return cells


def parse_only(texts, grid):
    """["rank=4", "rank=8", "seed=0"] as {"rank": [4, 8], "seed": [0]}. Raises InputError for values of no cell."""
    only = {}
    for text in texts:
        name, _, wanted = text.partition("=")
        if name not in FIELDS:
            raise InputError(f"--only {cut(text)}: unknown field {shown(name)}{near(name, FIELDS)}")
        known = {str(word(value)): value for value in (value_of(entry.cell, name) for entry in grid.entries)}
        if wanted not in known:
            there = cut(", ".join(known))
            raise InputError(f"--only {cut(text)}: no cell has that value ({name} is one of {there})")
        only.setdefault(name, []).append(known[wanted])
    return only


def described(change):
    return ", ".join(f"{name} = {shown(value)}" for name, value in change.items()) or "[cell]"


def check_alike(cells):
    """Raise InputError for two cells that are one experiment, however their fields are written."""
    seen = {}
    for cell, change in cells:
        key = experiment(cell)
        if key in seen:
            other, before = seen[key]
            raise InputError(f"two cells {alike(cell, other)} ({described(before)}; {described(change)}): drop one")
        seen[key] = cell, change


def alike(cell, other):
    """Why two cells are one experiment, in words."""
    if cell != other:
        return "differ only in name: they adapt the same with the same scales"
    options = [name for name in run_options(Cell) if value_of(cell, name) != value_of(other, name)]
    return f"differ only in {' '.join(options)}, which is no experiment" if options else "are the same"


def experiment(cell):
    """What a cell is, however it is written: groups of targets as their members, alpha and rank as each one's scale."""
    if cell.method != "lora":
        return cell
    slots = parse_targets(cell.targets, cell.rank, cell.alpha, cell.scaling)
    own = tuple((target, slot.rank, slot.scale) for target, slot in slots.items())
    return own, cell.layers, cell.variant, tuple(map(repr, (value_of(cell, name) for name in PLAIN)))


PLAIN = [name for name in declared(Cell) if name not in (*marked(Cell, "slots"), *run_options(Cell))]


def named(cells):
    """The `Entry`s of [(cell, change)], with what varies among them in their names, and the id, which tells a grid's
    folder from that of another [cell]."""
    names = dict.fromkeys(name for _, change in cells for name in change if name not in run_options(Cell))
    varied = [name for name in names if len({repr(value_of(cell, name)) for cell, _ in cells}) > 1]
    entries = []
    for cell, _ in cells:
        values = {name: value_of(cell, name) for name in varied}
        words = [word_of(Cell, name, value)[0] for name, value in values.items() if value is not None]
        slug = "_".join(words)[: LONGEST - 13].strip("-_.")
        entries.append(Entry(f"{slug}_{cell.id}" if slug else cell.id, cell, values))
    return tuple(entries)
