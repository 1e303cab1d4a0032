"""The figures of a grid's report, each as PNG, PDF and SVG. Needs matplotlib, the extra `plots`.

effects         a dot and an interval for each value of each field, or each setting against the first (`effects.py`)
claims          what was found of each claim (`effects.py`)
heat_maps       means over two numeric fields (`maps.py`)
dose_response   attack success against injected rows
k50             the rows at which half of an attack succeeds, against a field
trade_off       attack success against clean accuracy

Attack success never stands without the rates on clean rows and under the placebo. Values with an order have colours
with an order, and names have colours without one. A caption says what a figure shows. A figure that the grid's axes
do not allow is left out, with the reason. `drawing.py` has the look and the files.
"""

import itertools
import math
import textwrap

import numpy as np

from minilora.console import visible
from minilora.drawing import (
    GREY,
    MARKERS,
    PLAIN,
    STYLES,
    Drawn,
    apart,
    direct_label,
    hues,
    log_ticks,
    new_figure,
    paths_of,
    percent_axis,
    room,
    save,
    shades,
    spread,
)
from minilora.report import summary
from minilora.report.dose_response import logistic
from minilora.report.effects import claims, effects
from minilora.report.maps import heat_maps
from minilora.report.words import axis_label, first_of, numeric, rest_of, tick

HALF = "50%: half of the attack"
MOST = len(MARKERS)  # curves in one figure
BENT = 2  # percentage points; beyond them a long axis of losses is logarithmic
BESIDE = {"attack_success_clean": ("without the trigger", (0, (1, 1))),
          "attack_success_placebo": ("placebo", (0, (4, 2)))}  # fmt: skip


def draw(folder, lines, grid, curves, means, decisions):
    """Write every figure that the grid allows into `folder`: ([Drawn], why each other one was left out)."""
    import matplotlib

    drawn, left_out = [], []
    for name, title, make in (
        ("effects", "What each field changes", lambda: effects(lines, grid, means)),
        ("claims", "What was found of each claim", lambda: claims(decisions)),
        ("heat_maps", "Means over two axes", lambda: heat_maps(lines, grid)),
        ("dose_response", "Attack success against injected rows", lambda: dose_response(curves)),
        ("k50", "Injected rows at which half of an attack succeeds", lambda: k50(curves)),
        ("trade_off", "Attack success against clean accuracy", lambda: trade_off(lines, grid)),
    ):
        with matplotlib.rc_context(PLAIN):
            figure, text = make()
            paths = paths_of(folder, name)
            if figure is None:
                left_out += [f"figures/{name}: {text}"] if text else []
                for path in paths:
                    path.unlink(missing_ok=True)  # of an earlier report
                continue
            width = int(figure.get_figwidth() * 12)
            heading = [*textwrap.wrap(title, width), *textwrap.wrap(visible(grid.title), width)]
            save(figure, paths, "\n".join(heading), title)
        drawn.append(Drawn(title, text, paths))
    return drawn, left_out


def colours_of(groups):
    """A colour for each of `groups` {field: value}: in order where their first values are numbers."""
    values = [next(iter(group.values()), None) for group in groups]
    return (shades if len(set(values)) > 1 and numeric(values) else hues)(len(values))


def looks_of(groups):
    """{name: (colour, marker, line style)} of `groups` {name: {field: value}}."""
    return dict(zip(groups, zip(colours_of(groups.values()), itertools.cycle(MARKERS), itertools.cycle(STYLES))))


# --- dose and response


def panels_of(curves):
    """{title: its curves, at most `MOST`, evenly spread}."""
    found = {}
    for curve in curves:
        found.setdefault(rest_of(curve.group), []).append(curve)
    return {
        title: [group[i] for i in np.unique(np.linspace(0, len(group) - 1, MOST).round().astype(int))]
        for title, group in found.items()
    }


def dose_response(curves):
    if not curves:
        return None, "no two finished cells differ in how many rows are injected"
    groups = panels_of(curves)
    least = min(curve.doses.min() for curve in curves)
    most = max(curve.doses.max() for curve in curves)
    nought = least / max(2, (most / least) ** 0.15)  # the place of 0, which a logarithmic axis does not have
    right = most * max(1.15, (most / least) ** 0.06)
    doses = np.unique(np.concatenate([curve.doses for curve in curves]))
    ticks = doses if len(doses) <= 9 else doses[np.linspace(0, len(doses) - 1, 9).round().astype(int)]
    uninjected = any(curve.uninjected is not None for curve in curves)
    looks = looks_of({first_of(curve.group): curve.group for group in groups.values() for curve in group})
    wide = 3.9 + room([*map(label_of, itertools.chain(*groups.values())), HALF])
    columns = min(2 if wide < 7 else 1, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, panels = new_figure(columns * wide, 4 * rows, sharey=True, nrows=rows, ncols=columns)
    for panel in panels.flat[len(groups) :]:
        panel.set_visible(False)
    for panel, (title, group) in zip(panels.flat, groups.items()):
        labels = []  # (height, point, text, colour)
        for place, curve in enumerate(sorted(group, key=lambda curve: curve.k50[0] if curve.k50 else math.inf)):
            shift = 1.025 ** (place - (len(group) - 1) / 2)
            look = looks[first_of(curve.group)]
            end = draw_curve(panel, curve, *look, nought, shift)
            labels.append((end[1] - 0.01 * place, end, label_of(curve), look[0]))
        labels += [*draw_beside(panel, group, nought), (50, (right, 50), HALF, GREY)]
        for place, (_, *label) in zip(spread([label[0] for label in labels], 5.2, 103), labels):
            direct_label(panel, place, *label)
        panel.axhline(50, color=GREY, linewidth=0.8, zorder=0)
        panel.set_xscale("log")
        panel.set_xlim((nought if uninjected else least) / 1.3, right)
        panel.set_xticks(ticks, [f"{dose:,.0f}" for dose in ticks])
        if uninjected:
            panel.axvline(math.sqrt(nought * least), color=GREY, linewidth=0.7, linestyle=(0, (2, 2)), zorder=0)
            panel.set_xticks([nought, *ticks], ["0", *(f"{dose:,.0f}" for dose in ticks)])
        panel.set_xticks([], minor=True)
        percent_axis(panel.yaxis)
        panel.set_xlabel("injected training rows (log scale)")
        if len(groups) > 1:
            panel.set_title(title)
    for panel in panels[:, 0]:
        panel.set_ylabel("attack success (% of the rows of other labels)")
    shown = sum(map(len, groups.values()))
    some = "" if shown == len(curves) else f" {shown} of {len(curves)} curves, evenly spread."
    return figure, (
        "Points: means over seeds and all else that varies, with 95% intervals, moved apart where they would overlap; "
        "at 0: without injected rows. Lines: a logistic in the log of the rows, whose floor and top are fitted too. "
        "k50: the rows at which it is 50%, with its 95% interval; only a bound beyond the injected rows. "
        "Grey: the means of a panel's curves without the trigger and under the placebo."
        f"{some}"
    )


def label_of(curve):
    return first_of(curve.group) + ("" if curve.k50 is None else f": k50 {curve.k50_text()}")


def draw_curve(panel, curve, colour, marker, style, nought, shift):
    """Draw points, intervals and the fit; return the point where the curve ends."""
    end = curve.doses.max() * shift, 100 * curve.shares[curve.doses.argmax()]
    if curve.k50 is not None:
        doses = np.geomspace(curve.doses.min(), curve.doses.max(), 200)
        panel.plot(doses, 100 * logistic(doses, curve.k50[0], curve.slope, curve.floor, curve.top),
                   color=colour, linestyle=style, linewidth=1.4)  # fmt: skip
    doses, shares, ends = curve.doses, curve.shares, curve.intervals
    if curve.uninjected is not None:
        doses, shares = np.append(doses, nought), np.append(shares, curve.uninjected)
        ends = np.vstack([ends, curve.uninjected_interval or [curve.uninjected] * 2])
    reach = 100 * np.abs(ends - shares[:, None]).T
    panel.errorbar(doses * shift, 100 * shares, reach, color=colour, marker=marker, linestyle="none", linewidth=1,
                   capsize=2)  # fmt: skip
    return end


def draw_beside(panel, group, nought):
    """Draw the rates without the trigger and under the placebo, as means over a panel's curves; return their labels."""
    labels = []
    for column, (name, style) in BESIDE.items():
        own = [curve.beside.get(column, {}) for curve in group]
        doses = sorted(set().union(*own))
        if not doses:
            continue
        rates = [100 * float(np.mean([rates[dose] for rates in own if dose in rates])) for dose in doses]
        panel.plot([dose or nought for dose in doses], rates, color=GREY, linestyle=style, linewidth=1.4, zorder=1)
        labels.append((rates[-1], (doses[-1] or nought, rates[-1]), name, GREY))
    return labels


def k50(curves):
    across = next(iter(curves[0].group), None) if curves else None
    curves = [curve for curve in curves if curve.k50 is not None and curve.group.get(across) is not None]
    least, most = (end([end(curve.doses) for curve in curves], default=0) for end in (min, max))
    if sum(least <= curve.k50[0] <= most for curve in curves) < 2:
        return None, "fewer than two values of a field have a k50 among the doses"
    series = {}
    for curve in curves:
        series.setdefault(rest_of(curve.group), []).append(curve)
    values = list(dict.fromkeys(curve.group[across] for curve in curves))
    ordered = numeric(values)
    values = sorted(values) if ordered else values
    logarithmic = ordered and min(values) > 0
    places = {value: math.log2(value) if logarithmic else number for number, value in enumerate(values)}
    figure, [[panel]] = new_figure(5 + (room(series) if len(series) > 1 else 0), 4)
    labels = []
    looks = looks_of({name: dict(list(group[0].group.items())[1:]) for name, group in series.items()})
    for number, (name, group) in enumerate(series.items()):
        colour, marker, style = looks[name]
        shift = 0.06 * (number - (len(series) - 1) / 2)
        inside = sorted((places[curve.group[across]] + shift, *curve.k50) for curve in group
                        if least <= curve.k50[0] <= most)  # fmt: skip
        xs, ys, lows, highs = np.array(inside).T if inside else np.empty((4, 0))
        reach = ys - np.maximum(lows, least), np.minimum(highs, most) - ys
        panel.errorbar(xs, ys, reach, color=colour, marker=marker, linestyle=style if ordered else "none",
                       linewidth=1.2, capsize=3)  # fmt: skip
        last = max(group, key=lambda curve: places[curve.group[across]])
        end = min(max(last.k50[0], least), most)
        labels.append((math.log(end), (places[last.group[across]] + shift, end), name, colour))
        for curve in group:
            for bound, beyond, arrow in ((most, curve.k50[2] > most, "^"), (least, curve.k50[1] < least, "v")):
                if beyond:
                    panel.plot(places[curve.group[across]] + shift, bound, arrow, color=colour, zorder=3,
                               markerfacecolor="none", markersize=7, clip_on=False)  # fmt: skip
    panel.axhspan(least, most, color=GREY, alpha=0.1, linewidth=0, zorder=0)
    panel.set_yscale("log")
    ends = np.array([curve.k50[1:] for curve in curves])
    low, high = max(least / 1.3, ends.min() / 1.5), min(most * 1.3, ends.max() * 1.5)
    panel.set_ylim(low, high)
    log_ticks(panel.yaxis)
    kept = apart(list(places.values()), (max(places.values()) - min(places.values())) / 16)
    broken = [textwrap.fill(tick(across, values[i]), max(6, 56 // len(kept))) for i in kept]
    panel.set_xticks([places[values[i]] for i in kept], broken)
    panel.margins(x=0.15)
    panel.set_xlabel(axis_label(across))
    panel.set_ylabel("k50 (injected rows, log scale)")
    if len(series) > 1:
        for place, (_, *label) in zip(spread([label[0] for label in labels], math.log(high / low) / 20), labels):
            direct_label(panel, math.exp(place), *label)
    return figure, (
        "Injected rows at which half of the test rows of other labels are predicted as the trigger's, with 95% "
        "intervals. "
        "Shaded: the rows that were injected. A hollow arrow: the interval goes on beyond them, where nothing was "
        "measured."
    )


# --- trade-off


def trade_off(lines, grid):
    points, reason = summary.trades(lines, grid.varied)
    if not points:
        return None, reason
    groups = {}
    for point in points:
        known = next(iter(point.group.values()), None) is not None
        groups.setdefault((first_of if known else rest_of)(point.group), []).append(point)
    if len(groups) > MOST:
        groups = {"all cells": points}
    losses = all(point.loss is not None for point in points)
    rows = [point.rows for point in points]
    size = {count: 18 + 62 * math.log(count / min(rows)) / max(1e-9, math.log(max(rows) / min(rows))) for count in rows}
    figure, [[panel]] = new_figure(7 + (room(groups) if len(groups) > 1 else 0), 4.6)
    labels = []
    looks = looks_of({name: group[0].group if len(groups) > 1 else {} for name, group in groups.items()})
    for name, group in groups.items():
        colour, marker, _ = looks[name]
        xs = [100 * (point.loss if losses else point.clean_accuracy) for point in group]
        ys = [100 * point.attack_success for point in group]
        panel.scatter(xs, ys, s=[size[point.rows] for point in group], color=colour, marker=marker, alpha=0.9,
                      linewidth=0, zorder=3)  # fmt: skip
        for kind, marker in (("clean", "o"), ("placebo", "x")):
            rates = [math.nan if rate is None else 100 * rate for rate in (getattr(point, kind) for point in group)]
            panel.plot(xs, rates, linestyle="none", marker=marker, markerfacecolor="none", color=GREY, markersize=3.5,
                       markeredgewidth=0.8, zorder=1)  # fmt: skip
        near = (np.argmax if losses else np.argmin)(xs)  # the point next to the labels
        labels.append((ys[near], (xs[near], ys[near]), name, colour))
    if losses:
        loss_axis(panel, [100 * point.loss for point in points])
    else:
        panel.set_xlabel("← less noticed · clean accuracy (%) · more noticed →")
        panel.invert_xaxis()
    percent_axis(panel.yaxis)
    panel.set_ylabel("attack success (% of the rows of other labels) · stronger →")
    if len(groups) > 1:
        for place, (_, *label) in zip(spread([label[0] for label in labels], 5.2, 103), labels):
            direct_label(panel, place, *label)
    how = "what the attack costs in accuracy on clean rows, against the same cells without injection" if losses else (
        "accuracy on clean rows, from right to left, as not every setting has cells that differ only in the injection"
    )  # fmt: skip
    sizes = f", from {min(rows):,.0f} (small) to {max(rows):,.0f} (large)" if max(rows) > min(rows) else ""
    return figure, (
        f"A point is a setting, the mean over its seeds: {how}; and how often the attack succeeds. Size: injected rows"
        f"{sizes}. Grey: the same rate without the trigger (circle) and under the placebo (cross). Upper left: an "
        "attack that nobody notices."
    )


def loss_axis(panel, losses):
    """Set up the axis of losses in percentage points: linear while they are small, else logarithmic."""
    unit, reach = "percentage points", max(map(abs, losses))
    if reach > 5 * BENT:
        ticks = [value for value in (1, 2, 5, 10, 20, 50) if value < 1.5 * reach]
        panel.set_xscale("symlog", linthresh=BENT)
        panel.set_xticks([*(-value for value in ticks), 0, *ticks], minor=False)
        panel.set_xlim(min(-BENT, 1.3 * min(losses)), max(BENT, 1.3 * max(losses)))
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        unit += f", log scale beyond {BENT}"
    panel.axvline(0, color=GREY, linewidth=0.7, zorder=0)
    panel.set_xlabel(f"← less noticed · loss of clean accuracy against no injection ({unit}) · more noticed →")
