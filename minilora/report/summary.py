"""Summaries of a grid's table: means of values and of settings, heat maps, counts, and what an attack costs.

Lines are those of `grid.table.table_rows`. A setting is the values of all varied fields but the seeds. A setting's
metric is the mean over its seeds, and every setting counts once.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from minilora.cell import Cell
from minilora.fields import declared, marked
from minilora.grid.axes import ATTACKS, FIGURES, SEEDS
from minilora.report import intervals

PANELS = 6
SHOWN = ("clean_accuracy", *ATTACKS, "flip_rate", "degradation")  # in tables of means
RATES = ("attack_success_clean", "attack_success_placebo")
BESIDE = dict.fromkeys(ATTACKS, RATES) | {"flip_rate": ("flip_rate_placebo",)}
ALL = (*SHOWN, *RATES, "flip_rate_placebo")


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
    figure = FIGURES[metric]
    lines = [line for line in lines if line[metric] is not None and line[figure.rows]]
    if not lines:
        return None, []
    values, rows = (np.array([line[name] for line in lines], dtype=float) for name in (metric, figure.rows))
    factors = dict.fromkeys(tuple(numbered([line[name] for line in lines])[0]) for name in seeds)  # each kind once
    factors = np.array([one for one in factors if len(set(one)) > 1], dtype=int).reshape(-1, len(lines))
    numbers, found = numbered([key(line, names) for line in lines])
    errors = np.array([error_of(line, metric) for line in lines])
    split = len({line.get("seed_split") for line in lines}) > 1
    return intervals.Sample(values, rows, errors, numbers, factors, not split, hits_of(lines, metric)), found


def error_of(line, metric):
    """The standard error of a line's figure over its test rows."""
    figure = FIGURES[metric]
    rows, own = line[figure.rows], figure.error and line.get(figure.error)
    if own is not None:
        return own
    if not figure.signed:
        return math.sqrt(line[metric] * (1 - line[metric]) / rows)
    gained, lost = line[figure.gained] / rows, line[figure.lost] / rows
    return math.sqrt(max(0.0, gained + lost - (gained - lost) ** 2) / rows)


def hits_of(lines, metric):
    """What each test row adds to each line's figure, less its mean, [N, R]; None where that is not known of all."""
    own = [line["outcomes"].of(metric) if line.get("outcomes") else None for line in lines]
    if any(one is None or abs(one[1].mean() - line[metric]) > 1e-6 for one, line in zip(own, lines, strict=True)):
        return None
    numbers = np.unique(np.concatenate([rows for rows, _ in own]))
    hits = np.zeros((len(own), len(numbers)))
    for place, (rows, values) in enumerate(own):
        hits[place, np.searchsorted(numbers, rows)] = (values - values.mean()) / len(values)
    return hits


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
    axes = axes_of(lines, varied)
    groups = [(None, None)] + [(name, value) for name in axes for value in dict.fromkeys(line[name] for line in lines)
                               if (name, value) != ("label", None)]  # fmt: skip

    def has(name, value):
        return lambda setting: name is None or setting[axes.index(name)] == value

    means = []
    for (name, value), metrics in zip(groups, estimates(lines, varied, [has(*group) for group in groups]), strict=True):
        states = {line["cell"]: line["state"] for line in lines if name is None or line[name] == value}
        missing = sum(state != "finished" for state in states.values())
        means.append(Mean(name, value, len(states), missing, metrics))
    return means


def axes_of(lines, varied):
    """The fields of a setting, and `label` where triggers aim at several."""
    return settings_of(varied) + (("label",) if len(labels(lines)) > 1 else ())


def estimates(lines, varied, groups):
    """[{metric: (mean, low, high)}] of `groups`, functions that say of a setting of `axes_of` whether it is a member.

    A metric that no finished cell of a group has is left out.
    """
    estimated = [{} for _ in groups]
    for metric in ALL:
        found, settings = sample(lines, metric, axes_of(lines, varied), seeds_of(varied))
        weights = weights_of(groups, settings)
        [present] = np.nonzero(weights.sum(axis=1))
        if len(present):
            for place, one in zip(present, intervals.estimate(found, weights[present], FIGURES[metric].signed)):
                estimated[place][metric] = one.three()
    return estimated


def weights_of(groups, settings):
    """The weights [groups, settings] that give each group's mean; of a group without members all 0."""
    inside = np.array([[group(setting) for setting in settings] for group in groups], dtype=float)
    return inside / np.maximum(1, inside.sum(axis=1, keepdims=True))


def seeds_of(varied):
    """The fields that make a seed."""
    return tuple(name for name in varied if name in SEEDS)


def over(lines, varied):
    """What the intervals of a grid are over, in words."""
    own = {name: len({line[name] for line in lines}) for name in seeds_of(varied)}
    if not own:
        return "the test rows only, because the grid has one seed"
    kinds = " x ".join(f"{count} values of {name}" for name, count in own.items())
    if "seed_split" in own:
        return f"{kinds}: training and test rows are drawn anew with seed_split"
    return f"{kinds}, and test rows; all on one choice of training rows (seed_split does not vary)"


# --- settings against the first


@dataclass(frozen=True)
class Setting:
    """A setting's means over its seeds: `values` {field: its value}, those in which it differs from the grid's first
    setting; of the first, all of its values.

    `metrics` {column: (mean, low, high)}, and `changes` the same of its mean less that of the first.
    """

    values: dict
    metrics: dict
    changes: dict


def crossed(lines, varied):
    """Whether the grid has more than half of all combinations of its fields' values, and changes more than one field
    at a time. Fields that move together count as one.

    If it does not, a mean over a value's settings would compare unlike settings with each other.
    """
    settings = np.array(list(dict.fromkeys(key(line, settings_of(varied)) for line in lines)), dtype=object)
    fields = {tuple(numbered(column)[0]) for column in settings.T}  # the number of each setting's value, [settings]
    changed = sum(np.array(column) > 0 for column in fields)  # against the first setting
    one_at_a_time = len(fields) > 1 and max(changed) == 1
    return not one_at_a_time and 2 * len(settings) > math.prod(max(column) + 1 for column in fields)


def against_first(lines, varied, most):
    """(A `Setting` for each setting of the grid, in its order, or for `most` of them, evenly spread; how many it has).

    The first is always among them.
    """
    names, seeds = settings_of(varied), seeds_of(varied)
    settings = list(dict.fromkeys(key(line, names) for line in lines))
    count = len(settings)
    settings = [settings[i] for i in np.linspace(0, count - 1, min(count, most)).round().astype(int)]
    groups = [lambda setting, one=one: setting[: len(names)] == one for one in settings]
    changes = [{} for _ in settings]
    for metric in ("attack_success", "net_attack_success", "clean_accuracy"):
        found, there = sample(lines, metric, axes_of(lines, varied), seeds)
        weights = weights_of(groups, there)
        [present] = np.nonzero(weights.sum(axis=1))
        if 0 in present and len(present) > 1:
            less = weights[present[1:]] - weights[0]
            for place, one in zip(present[1:], intervals.estimate(found, less, FIGURES[metric].signed)):
                changes[place][metric] = one.three()
    found = []
    for one, metrics, change in zip(settings, estimates(lines, varied, groups), changes, strict=True):
        own = {name: value for name, value, first in zip(names, one, settings[0]) if value != first or not found}
        found.append(Setting(own, metrics, change))
    return found, count


# --- attack success against clean-accuracy loss


@dataclass(frozen=True)
class Trade:
    """An injected setting under one label's trigger: means over its seeds.

    `loss` is the clean accuracy of the uninjected cells that differ only in the injection, less the setting's own. It
    is over the seeds that have such cells, and None where no seed has. `clean` and `placebo` are the shares that are
    predicted as the label without the trigger, and under the placebo (None where there is none).
    """

    group: dict
    rows: float
    clean_accuracy: float
    attack_success: float
    loss: float | None
    clean: float
    placebo: float | None


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
        beside = ([line[name] for line in own if line[name] is not None] for name in RATES)
        beside = (float(np.mean(rates)) if rates else None for rates in beside)
        found.append(Trade({name: own[0][name] for name in shown}, rows, accuracy, success, loss, *beside))
    return found, None if found else "no finished cell has injected rows"


# --- heat maps


def map_axes(lines, varied):
    """(The two fields of a heat map, down and across, or None; why there are none).

    Rank and proportion, or else the first two numeric fields: two that more than half of the grid's cells have, and of
    which more than half of all combinations are in the grid.
    """

    def is_numeric(name):
        values = {line[name] for line in lines if line[name] is not None}
        return len(values) > 1 and all(isinstance(value, (int, float)) for value in values)

    names = [name for name in settings_of(varied) if is_numeric(name)]
    names.sort(key=lambda name: {"rank": 0, "inject.proportion": 1}.get(name, 2))
    pairs = list(itertools.combinations(names, 2))
    for down, across in pairs:
        shown = places_of(lines, across, down)[0]
        if 2 * len(shown) > len(lines) and (grid_states(lines, across, down) != ABSENT).mean() > 0.5:
            return (down, across), None
    return None, (
        "a map of any two numeric fields would be half empty, or without half of the cells"
        if pairs
        else "the grid varies fewer than two numeric fields that are no seeds"
    )


ABSENT, UNFINISHED, FINISHED = range(3)


def places_of(lines, across, down):
    """(The lines that have both fields, the values of `across` in order [X], those of `down` [Y])."""
    lines = [line for line in lines if line[across] is not None and line[down] is not None]
    return lines, *(sorted({line[name] for line in lines}) for name in (across, down))


def grid_states(lines, across, down):
    """Of each combination [Y, X] whether the grid has it not (`ABSENT`), has no finished cell of it, or has one."""
    lines, xs, ys = places_of(lines, across, down)
    states = np.full((len(ys), len(xs)), ABSENT)
    place_x, place_y = ({value: place for place, value in enumerate(values)} for values in (xs, ys))
    for line in lines:
        place = place_y[line[down]], place_x[line[across]]
        states[place] = max(states[place], FINISHED if line["state"] == "finished" else UNFINISHED)
    return states


def heat_map(lines, metric, across, down, varied):
    """(values of `across` [X], of `down` [Y], means over all other fields [Y, X], NaN where no cell is finished)."""
    lines, xs, ys = places_of(lines, across, down)
    means = np.full((len(ys), len(xs)), np.nan)
    found, settings = sample(lines, metric, (*settings_of(varied), "label"), ())
    if found is not None:
        names = settings_of(varied)
        pairs, distinct = numbered([(s[names.index(down)], s[names.index(across)]) for s in settings])
        values = np.bincount(pairs, found.means()) / np.bincount(pairs)
        for (y, x), value in zip(distinct, values, strict=True):
            means[ys.index(y), xs.index(x)] = value
    return xs, ys, means


# --- predicted counts


def predicted_counts(folder):
    """[(setting {field: value}, test, how many cells, {label: count})]: what each test's rows were predicted as.

    Tests are "clean", "trigger of LABEL" for each, and "placebo"; a count is the mean over the setting's finished
    cells. Reads every results.json of the `GridFolder`.
    """
    found = {}
    for entry in folder.grid.entries:
        results, _ = folder.read(entry)
        tests = {} if results is None else results["tests"]
        named = {f"trigger of {label}": test for label, test in tests.get("trigger", {}).items()}
        setting = {name: value for name, value in entry.varied.items() if name not in SEEDS}
        for name, test in {"clean": tests.get("clean"), **named, "placebo": tests.get("placebo")}.items():
            if test and "predicted_counts" in test:
                found.setdefault(repr(setting), {}).setdefault(name, []).append((setting, test["predicted_counts"]))
    lines = []
    for tests in found.values():
        for name, own in tests.items():
            counts = {label: float(np.mean([each[label] for _, each in own])) for label in own[0][1]}
            lines.append((own[0][0], name, len(own), counts))
    return lines
