"""A grid: many cells from one TOML file.

    title = "..."              what it is for; `source` names the table or figure that it follows
    [cell]                     what all cells share: any field of a cell, and `preset`, a name of `presets.PRESETS`
    [grid]                     crossed: each field with a list of its values; a field of `inject` as "inject.FIELD"
    [zip]                      fields that move together: lists of one length, crossed with the rest
    [[include]]                more cells: what they change of [cell]; a list of a field's values is crossed
    [[exclude]]                cells to leave out: those that have all of these values (or one of each list)
    [scale.NAME]               what is so at one scale alone (`--scale NAME`, by default `small`): `preset`, a field of
                               all cells, or a list of its values: an axis in the place of [grid]'s, or of all cells
    [[claim]]                  what the grid is to decide, stated beforehand: see `claims.py`

A field whose value is itself a list (`targets`, "inject.sources") takes lists of lists where others take lists.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from minilora.cell import PRESETS, Cell
from minilora.errors import InputError
from minilora.fields import near, read_toml
from minilora.grid.axes import (
    FIELDS,
    Entry,
    alternatives,
    check_axis,
    flat,
    is_axis,
    matches,
    nested,
    product,
    value_of,
    word,
)
from minilora.lora.targets import parse_targets

SMALL = "small"  # the scale that is taken where a file has it and no other is asked for
SECTIONS = ("title", "source", "cell", "grid", "zip", "include", "exclude", "scale", "claim")
# Words for folder names, where the field's own is long.
SHORT = {"inject.sources": "", "inject.proportion": "p", "inject.rows": "rows", "targets": ""}


@dataclass(frozen=True)
class Grid:
    """`entries` in the order of the file; `claims` the `claims.Claim`s; `text` the file's own; `scale` the name of the
    scale, or None."""

    title: str
    source: str
    entries: tuple
    claims: tuple
    text: str
    scale: str | None = None

    @property
    def varied(self):
        """The fields in which entries differ."""
        return list(dict.fromkeys(name for entry in self.entries for name in entry.varied))


def read_grid(path, scale=None):
    """The `Grid` in a TOML file, at one of its scales or as it stands. Raises InputError, naming the file and field."""
    values = read_toml(path)
    try:
        return build_grid(values, Path(path).read_text(encoding="utf-8-sig"), Path(path).stem, scale)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def build_grid(values, text="", title="grid", scale=None):
    """The `Grid` of a dict, as TOML gives it. Raises InputError for unknown fields, values that no cell takes, an axis
    with one value twice, an empty grid, fields that contradict each other, two cells that are one experiment, and a
    claim that no cell can decide."""
    from minilora.grid import claims  # which reads cells with what is below

    for name in values:
        if name not in SECTIONS:
            raise InputError(f"unknown section {name!r}{near(name, SECTIONS)}")
    for name in ("title", "source"):
        if not isinstance(values.get(name, ""), str):
            raise InputError(f"{name} is {values[name]!r}, but must be a string")
    scale, preset, scaled, axes = scale_of(table(values, "scale"), scale)
    base = base_cell(table(values, "cell"), preset, scaled)
    crossed, zipped = flat(table(values, "grid"), "grid"), flat(table(values, "zip"), "zip")
    crossed |= {name: axes.pop(name) for name in list(axes) if name in crossed}
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
    changes = []
    if crossed or zipped:
        changes = [combined | row for combined in product(crossed) for row in together or [{}]]
    for number, extra in enumerate(tables(values, "include"), 1):
        changes += product(alternatives(flat(extra, f"include {number}")))
    changes = [extra | change for extra in product(axes) for change in changes or [{}]]
    excluded = [
        alternatives(flat(rule, f"exclude {number}")) for number, rule in enumerate(tables(values, "exclude"), 1)
    ]
    cells, hits = [], [0] * len(excluded)
    for change in changes:
        try:
            made = base.replace(**nested(change))
        except InputError as error:
            raise InputError(f"{described(change)}: {error}") from None
        matched = [number for number, rule in enumerate(excluded) if matches(made, rule)]
        for number in matched:
            hits[number] += 1
        if not matched:
            cells.append((made, change))
    if 0 in hits:
        raise InputError(f"[[exclude]] {hits.index(0) + 1} matches no cell: mend or drop it")
    if not cells:
        raise InputError("the grid is empty: [[exclude]] drops every cell")
    check_alike(cells)
    entries = named(cells)
    stated = claims.read(tables(values, "claim"), entries)
    return Grid(values.get("title", title), values.get("source", ""), entries, stated, text, scale)


def table(values, name):
    found = values.get(name, {})
    if not isinstance(found, dict):
        raise InputError(f"[{name}] is {found!r}, but must be a table")
    return found


def tables(values, name):
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise InputError(f"[[{name}]] is {found!r}, but must be tables")
    return found


def scale_of(scales, name):
    """(The name of the scale that is taken or None, its preset or None, its {field: value}, its {field: axis})."""
    for title, values in scales.items():
        if not isinstance(values, dict):
            raise InputError(f"[scale] {title} is {values!r}, but must be a table: [scale.{title}]")
        flat({key: value for key, value in values.items() if key != "preset"}, f"scale.{title}")
    if name is None and SMALL in scales:
        name = SMALL
    if name is None:
        return None, None, {}, {}
    if name not in scales:
        there = f"there are: {', '.join(scales)}" if scales else "the file has none"
        raise InputError(f"there is no scale {name!r} ({there})")
    values = dict(scales[name])
    preset = values.pop("preset", None)
    values = flat(values, f"scale.{name}")
    axes = {field: value for field, value in values.items() if is_axis(field, value)}
    return name, preset, {field: value for field, value in values.items() if field not in axes}, axes


def base_cell(values, preset, scaled):
    """The cell that a preset, [cell] and the scale's own fields make."""
    values = dict(values)
    own = values.pop("preset", None)
    for name in (own, preset):
        if name is not None and name not in PRESETS:
            raise InputError(f"preset is {name!r}, but must be one of {', '.join(PRESETS)}")
    try:
        cell = Cell().replace(**PRESETS.get(preset or own, {})).replace(**nested(flat(values, "cell")))
        return cell.replace(**nested(scaled))
    except InputError as error:
        raise InputError(f"[cell]: {error}") from None


def parse_only(texts, grid):
    """["rank=4", "rank=8", "seed=0"] as {"rank": [4, 8], "seed": [0]}. Raises InputError for values of no cell."""
    only = {}
    for text in texts:
        name, _, wanted = text.partition("=")
        if name not in FIELDS:
            raise InputError(f"--only {text}: unknown field {name!r}{near(name, FIELDS)}")
        known = {str(word(value)): value for value in (value_of(entry.cell, name) for entry in grid.entries)}
        if wanted not in known:
            raise InputError(f"--only {text}: no cell has that value ({name} is one of {', '.join(known)})")
        only.setdefault(name, []).append(known[wanted])
    return only


def described(change):
    return ", ".join(f"{name} = {value!r}" for name, value in change.items()) or "[cell]"


def check_alike(cells):
    """Refuse two cells that are one experiment, whatever their fields are called."""
    seen = {}
    for cell, change in cells:
        key = experiment(cell)
        if key in seen:
            other, before = seen[key]
            what = "are the same" if cell == other else "differ only in name: they adapt the same with the same scales"
            raise InputError(f"two cells {what} ({described(before)}; {described(change)}): drop one")
        seen[key] = cell, change


def experiment(cell):
    """What a cell is, under whatever names: groups of targets as their members, alpha and rank as each one's scale."""
    if cell.method != "lora":
        return cell
    slots = parse_targets(cell.targets, cell.rank, cell.alpha, cell.scaling)
    own = tuple((target, slot.rank, slot.scale) for target, slot in slots.items())
    plain = tuple(getattr(cell, f.name) for f in fields(cell) if f.name not in ("targets", "rank", "alpha", "scaling"))
    return own, plain


def named(cells):
    """The `Entry`s of [(cell, change)], with what varies among them in their names."""
    names = dict.fromkeys(name for _, change in cells for name in change)
    varied = [name for name in names if len({repr(value_of(cell, name)) for cell, _ in cells}) > 1]
    entries = []
    for cell, _ in cells:
        values = {name: value_of(cell, name) for name in varied}
        words = [f"{SHORT.get(name, name.rpartition('.')[2])}{'' if SHORT.get(name) == '' else '-'}{word(value)}"
                 for name, value in values.items() if value is not None]  # fmt: skip
        slug = re.sub(r"[^\w.+-]+", "-", "_".join(words), flags=re.ASCII)[:100].strip("-_.")
        entries.append(Entry(f"{slug}_{cell.id}" if slug else cell.id, cell, values))
    return tuple(entries)
