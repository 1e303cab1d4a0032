"""What a grid's table comes to: marginal means, dose and response, and what an attack costs in clean accuracy.

Lines are those of `report.rows`. The values of a grid's fields but the seeds make a setting; a setting's figure is the
mean over its seeds, and every setting counts once.
"""

import math
from dataclasses import dataclass

import numpy as np

from minilora.cell import Cell
from minilora.fields import declared, marked
from minilora.grid.axes import FIGURES, SEEDS
from minilora.report import intervals

PANELS = 6
SHOWN = ("clean_accuracy", "attack_success", "flip_rate", "degradation")  # in tables of means and in heat maps


def settings_of(varied):
    """The fields that make a setting."""
    return tuple(name for name in varied if name not in SEEDS)


def key(line, names):
    return tuple(line[name] for name in names)


def labels(lines):
    """The labels that triggers aim at."""
    return list(dict.fromkeys(line["label"] for line in lines if line["label"] is not None))


def sample(lines, figure, names, seeds):
    """The `inference.Sample` of a figure, and the settings [S], tuples of the values of `names`.

    Lines without that figure are left out; where there is none the sample is None. `seeds` are the fields whose values
    make a seed.
    """
    _, rows, *counts = FIGURES[figure]
    lines = [line for line in lines if line[figure] is not None and line[rows]]
    if not lines:
        return None, []
    totals = np.array([line[rows] for line in lines])
    if counts:
        up, down = (np.array([line[name] for line in lines]) for name in counts)
    else:
        up, down = np.rint(np.array([line[figure] for line in lines]) * totals).astype(int), None
    numbers, found = numbered([key(line, names) for line in lines])
    return intervals.Sample(up, down, totals, numbered([key(line, seeds) for line in lines])[0], numbers), found


def numbered(values):
    """(The number of each value, the distinct values in order of appearance)."""
    places = {}
    return np.array([places.setdefault(value, len(places)) for value in values]), list(places)


def curve_fields(lines, varied):
    """The fields whose values each have a curve: rank, scaling and method, then what else is no seed and no dose, but
    the first as long as the others come to at most `PANELS` combinations; over the rest a curve is a mean."""
    names = [name for name in settings_of(varied) if name not in marked(Cell, "dose")]
    names.sort(key=lambda name: declared(Cell)[name].metadata["curve"] or math.inf)
    chosen = names[:1]
    for name in names[1:]:
        if len({key(line, [*chosen[1:], name]) for line in lines}) <= PANELS:
            chosen.append(name)
    return chosen


# --- marginal means


@dataclass(frozen=True)
class Mean:
    """The means of all settings in which `field` has `value` (None, None: of all): `figures` {column: (mean, low,
    high)} as far as there are any, over `cells`, of which `missing` are not finished."""

    field: str | None
    value: object
    cells: int
    missing: int
    figures: dict


def marginal_means(lines, varied):
    """A `Mean` of all cells, and of those with each value of each field that varies and is no seed. Where triggers
    aim at several labels, `label` is such a field."""
    names = settings_of(varied)
    axes = names + (("label",) if len(labels(lines)) > 1 else ())
    groups = [(None, None)] + [(name, value) for name in axes for value in dict.fromkeys(line[name] for line in lines)
                               if (name, value) != ("label", None)]  # fmt: skip
    figures = [{} for _ in groups]
    for figure in SHOWN:
        found, settings = sample(lines, figure, axes, seeds_of(varied))
        member = np.array([[name is None or setting[axes.index(name)] == value for setting in settings]
                           for name, value in groups], dtype=float)  # fmt: skip
        [present] = np.nonzero(member.sum(axis=1))
        if len(present):
            weights = member[present] / member[present].sum(axis=1, keepdims=True)
            for place, mean, (low, high) in zip(present, *intervals.estimate(found, weights, together=True)):
                figures[place][figure] = float(mean), float(low), float(high)
    means = []
    for (name, value), shown in zip(groups, figures, strict=True):
        states = {line["cell"]: line["state"] for line in lines if name is None or line[name] == value}
        missing = sum(state != "finished" for state in states.values())
        means.append(Mean(name, value, len(states), missing, shown))
    return means


def seeds_of(varied):
    """The fields that make a seed."""
    return tuple(name for name in varied if name in SEEDS)


# --- attack success against clean-accuracy loss


@dataclass(frozen=True)
class Trade:
    """An injected setting under one label's trigger, means over its seeds: injected rows, clean accuracy, attack
    success, and `loss`: the clean accuracy of the uninjected cells which differ from its own in the injection alone,
    less its own, over the seeds of which there are such cells (None where there are none)."""

    group: dict
    rows: float
    clean_accuracy: float
    attack_success: float
    loss: float | None


def trades(lines, varied):
    """The `Trade`s of a grid, and a reason where there are none."""
    done = [line for line in lines if line["attack_success"] is not None]
    alike = [name for name in varied if not name.startswith("inject.")]
    names, shown = settings_of(varied), curve_fields(done, varied)
    clean, points, found = {}, {}, []
    for line in done:
        if line["injected_rows"]:
            points.setdefault((*key(line, names), line["label"]), []).append(line)
        else:
            clean.setdefault(key(line, alike), {})[line["cell"]] = line["clean_accuracy"]
    for own in points.values():
        columns = ("injected_rows", "clean_accuracy", "attack_success")
        rows, accuracy, success = (float(np.mean([line[name] for line in own])) for name in columns)
        pairs = [(list(clean[key(line, alike)].values()), line["clean_accuracy"]) for line in own
                 if key(line, alike) in clean]  # fmt: skip
        loss = float(np.mean([np.mean(before) - after for before, after in pairs])) if pairs else None
        found.append(Trade({name: own[0][name] for name in shown}, rows, accuracy, success, loss))
    return found, None if found else "no finished cell has injected rows"


# --- heat maps


def map_axes(lines, varied):
    """The fields of the two sides of a heat map: rank and proportion, else the first two numeric ones; None where there
    are fewer."""

    def numeric(name):
        values = {line[name] for line in lines if line[name] is not None}
        return len(values) > 1 and all(isinstance(value, (int, float)) for value in values)

    names = [name for name in settings_of(varied) if numeric(name)]
    if {"rank", "inject.proportion"} <= set(names):
        return "rank", "inject.proportion"
    return tuple(names[:2]) if len(names) > 1 else None


def heat_map(lines, figure, across, down, varied):
    """(values of `across` [X], of `down` [Y], means over all the rest [Y, X], NaN where no cell is finished)."""
    lines = [line for line in lines if line[across] is not None and line[down] is not None]
    xs, ys = (sorted({line[name] for line in lines}) for name in (across, down))
    means = np.full((len(ys), len(xs)), np.nan)
    found, settings = sample(lines, figure, (*settings_of(varied), "label"), ())
    if found is not None:
        names = settings_of(varied)
        pairs, distinct = numbered([(s[names.index(down)], s[names.index(across)]) for s in settings])
        values = np.bincount(pairs, found.means()) / np.bincount(pairs)
        for (y, x), value in zip(distinct, values, strict=True):
            means[ys.index(y), xs.index(x)] = value
    return xs, ys, means
