"""Summaries of a grid's table: marginal means, heat maps, and what an attack costs in clean accuracy.

Lines are those of `grid.table.table_rows`. A setting is the values of all varied fields but the seeds. A setting's
metric is the mean over its seeds, and every setting counts once.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from minilora.cell import Cell
from minilora.fields import declared, marked
from minilora.grid.axes import FIGURES, SEEDS
from minilora.report import intervals

PANELS = 6
SHOWN = ("clean_accuracy", "attack_success", "flip_rate", "degradation")  # in tables of means
BESIDE = {"attack_success": ("attack_success_clean", "attack_success_placebo"), "flip_rate": ("flip_rate_placebo",)}
ALL = (*SHOWN, *itertools.chain.from_iterable(BESIDE.values()))


def settings_of(varied):
    """The fields that make a setting."""
    return tuple(name for name in varied if name not in SEEDS)


def key(line, names):
    return tuple(line[name] for name in names)


def labels(lines):
    """The labels that triggers aim at."""
    return list(dict.fromkeys(line["label"] for line in lines if line["label"] is not None))


def sample(lines, metric, names, seeds):
    """The `intervals.Sample` of a metric, and the settings [S], tuples of the values of `names`.

    Lines without that metric are left out; if none has it, the sample is None. `seeds` are the fields that make a seed.
    """
    _, rows, *counts = FIGURES[metric]
    lines = [line for line in lines if line[metric] is not None and line[rows]]
    if not lines:
        return None, []
    totals = np.array([line[rows] for line in lines])
    if counts:
        up, down = (np.array([line[name] for line in lines]) for name in counts)
    else:
        up, down = np.rint(np.array([line[metric] for line in lines]) * totals).astype(int), None
    numbers, found = numbered([key(line, names) for line in lines])
    return intervals.Sample(up, down, totals, numbered([key(line, seeds) for line in lines])[0], numbers), found


def numbered(values):
    """(The number of each value, the distinct values in order of appearance)."""
    places = {}
    return np.array([places.setdefault(value, len(places)) for value in values]), list(places)


def curve_fields(lines, varied):
    """The fields by which curves are told apart; a curve is a mean over the others.

    Rank, scaling and method come first, then all else but seeds and doses. After the first one, a field is taken only
    while they make at most `PANELS` combinations.
    """
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
    """The means of all settings in which `field` has `value` (None, None: of all settings).

    `metrics` {column: (mean, low, high)} has those that are known; `missing` of the `cells` are not finished.
    """

    field: str | None
    value: object
    cells: int
    missing: int
    metrics: dict


def marginal_means(lines, varied):
    """A `Mean` of all cells, and one for each value of each varied field but the seeds.

    Where triggers aim at several labels, `label` is such a field too.
    """
    names = settings_of(varied)
    axes = names + (("label",) if len(labels(lines)) > 1 else ())
    groups = [(None, None)] + [(name, value) for name in axes for value in dict.fromkeys(line[name] for line in lines)
                               if (name, value) != ("label", None)]  # fmt: skip
    metrics = [{} for _ in groups]
    for metric in ALL:
        found, settings = sample(lines, metric, axes, seeds_of(varied))
        member = np.array([[name is None or setting[axes.index(name)] == value for setting in settings]
                           for name, value in groups], dtype=float)  # fmt: skip
        [present] = np.nonzero(member.sum(axis=1))
        if len(present):
            weights = member[present] / member[present].sum(axis=1, keepdims=True)
            for place, mean, (low, high) in zip(present, *intervals.estimate(found, weights, together=True)):
                metrics[place][metric] = float(mean), float(low), float(high)
    means = []
    for (name, value), shown in zip(groups, metrics, strict=True):
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
    """An injected setting under one label's trigger: means over its seeds.

    `loss` is the clean accuracy of the uninjected cells that differ only in the injection, less the setting's own. It
    is over the seeds that have such cells, and None where no seed has.
    """

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
    """The two fields of a heat map: rank and proportion, or else the first two numeric ones; None if fewer."""

    def numeric(name):
        values = {line[name] for line in lines if line[name] is not None}
        return len(values) > 1 and all(isinstance(value, (int, float)) for value in values)

    names = [name for name in settings_of(varied) if numeric(name)]
    if {"rank", "inject.proportion"} <= set(names):
        return "rank", "inject.proportion"
    return tuple(names[:2]) if len(names) > 1 else None


def heat_map(lines, metric, across, down, varied):
    """(values of `across` [X], of `down` [Y], means over all other fields [Y, X], NaN where no cell is finished)."""
    lines = [line for line in lines if line[across] is not None and line[down] is not None]
    xs, ys = (sorted({line[name] for line in lines}) for name in (across, down))
    means = np.full((len(ys), len(xs)), np.nan)
    found, settings = sample(lines, metric, (*settings_of(varied), "label"), ())
    if found is not None:
        names = settings_of(varied)
        pairs, distinct = numbered([(s[names.index(down)], s[names.index(across)]) for s in settings])
        values = np.bincount(pairs, found.means()) / np.bincount(pairs)
        for (y, x), value in zip(distinct, values, strict=True):
            means[ys.index(y), xs.index(x)] = value
    return xs, ys, means
