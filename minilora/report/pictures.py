"""The figures of a grid's report, each as PNG and as PDF. Needs matplotlib, the extra `plots`.

They can be read in grey and by the colour-blind: one perceptually uniform map from dark to light (cividis, Nuñez,
Anderton and Renslow 2018), numbers in the fields of heat maps, and a marker and a line style for each curve. A caption
says what a figure shows. A figure that the grid's axes do not allow is left out, with the reason.
"""

import itertools
import math
import textwrap

import numpy as np

from minilora import files
from minilora.console import visible
from minilora.drawing import MAP, MARKERS, PLAIN, STYLES, Drawn, log_ticks, new_figure, shades
from minilora.grid.axes import FIELDS, FIGURES, word
from minilora.report import summary
from minilora.report.dose_response import logistic

MOST = len(MARKERS)  # curves in one figure
BENT = 2  # percentage points; beyond them a long axis of losses is logarithmic
MOST_NUMBERS = 160  # a heat map with more fields has no numbers in them


def draw(folder, lines, grid, curves):
    """Write every figure that the grid allows into `folder`: ([Drawn], why each other one was left out)."""
    import matplotlib

    drawn, left_out = [], []
    for name, title, make in (
        ("heat_maps", "Means over two axes", lambda: heat_maps(lines, grid)),
        ("dose_response", "Attack success against injected rows", lambda: dose_response(curves)),
        ("k50", "Injected rows at which half of an attack succeeds", lambda: k50(curves)),
        ("trade_off", "Attack success against clean accuracy", lambda: trade_off(lines, grid)),
    ):
        with matplotlib.rc_context(PLAIN):
            figure, text = make()
            paths = folder / f"{name}.png", folder / f"{name}.pdf"
            if figure is None:
                left_out.append(f"figures/{name}: {text}")
                for path in paths:
                    path.unlink(missing_ok=True)  # of an earlier report
                continue
            width = int(figure.get_figwidth() * 12)
            figure.suptitle("\n".join([*textwrap.wrap(title, width), *textwrap.wrap(visible(grid.title), width)]))
            folder.mkdir(exist_ok=True)
            for path, stamp in zip(paths, ("Software", "CreationDate")):
                with files.replacing(path) as temporary:
                    figure.savefig(temporary, format=path.suffix[1:], metadata={stamp: None})
        drawn.append(Drawn(title, text, paths))
    return drawn, left_out


def axis_label(name):
    return (name in FIELDS and FIELDS[name].metadata["axis"]) or name.removeprefix("inject.")


def tick(name, value):
    return f"{100 * value:g}" if name == "inject.proportion" else str(word(value))


# --- heat maps


def heat_maps(lines, grid):
    axes_of = summary.map_axes(lines, grid.varied)
    if axes_of is None:
        return None, "the grid varies fewer than two numeric fields that are no seeds"
    down, across = axes_of
    xs, ys, _ = summary.heat_map(lines, "clean_accuracy", across, down, grid.varied)
    wide, high = (min(6.5, max(3.4, 1.5 + 0.45 * len(xs))), min(5.5, max(2.4, 1.1 + 0.3 * len(ys))))
    figure, panels = new_figure(2 * wide + 0.4, 2 * high + 0.6, nrows=2, ncols=2)
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
    for panel, name in zip(panels.flat, summary.SHOWN):
        values = 100 * summary.heat_map(lines, name, across, down, grid.varied)[2]
        title = FIGURES[name][0]
        unit = "percentage points" if name == "degradation" else "%"
        heat(figure, panel, values, f"{title} ({unit})")
        for axis, field, places in ((panel.xaxis, across, xs), (panel.yaxis, down, ys)):
            every = math.ceil(len(places) / 16)
            axis.set_ticks(range(0, len(places), every), [tick(field, value) for value in places[::every]])
        panel.set_title(title[0].upper() + title[1:])
        panel.set_xlabel(axis_label(across))
        panel.set_ylabel(axis_label(down))
    others = [name for name in summary.settings_of(grid.varied) if name not in axes_of]
    rest = f", {', '.join(others)}" if others else ""
    return figure, (
        f"Means over seeds{rest} for each {down} and {across}. Attack success: share of the test rows of other labels "
        "that are predicted as the trigger's label under the trigger; flip rate: share of all test rows whose "
        "prediction the trigger changes; degradation: accuracy on clean rows less that under the trigger. Hatched: no "
        "cell is finished."
    )


def heat(figure, panel, values, unit):
    """Draw a map of `values` [Y, X] with its colour bar, and with numbers where there is room for them."""
    import matplotlib

    panel.set_facecolor("white")
    panel.patch.set(hatch="///", edgecolor="0.6")
    finite = values[np.isfinite(values)]
    if not len(finite):
        return
    low, high = finite.min(), finite.max()
    image = panel.pcolormesh(np.arange(values.shape[1] + 1) - 0.5, np.arange(values.shape[0] + 1) - 0.5, values,
                             cmap=MAP, vmin=low, vmax=high if high > low else low + 1, edgecolor="white",
                             linewidth=0.8 if values.size <= MOST_NUMBERS else 0)  # fmt: skip
    figure.colorbar(image, ax=panel, label=unit)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    if values.size > MOST_NUMBERS:
        return
    digits = 0 if high - low >= 20 else 1
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = matplotlib.colormaps[MAP](image.norm(value))
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
            shown = f"{round(float(value), digits) + 0:.{digits}f}"
            panel.text(x, y, shown, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")


# --- dose and response


def title_of(group):
    """The fields of `group` that have a value, in words."""
    named = {name: value for name, value in group.items() if value is not None}
    return ", ".join(f"{axis_label(name)} {word(value)}" for name, value in named.items()) or "all cells"


def first_of(group):
    """The name of a curve in its panel: its first field."""
    return title_of(dict(list(group.items())[:1]))


def rest_of(group):
    """The title of a curve's panel: its other fields."""
    return title_of(dict(list(group.items())[1:]))


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
    doses = np.unique(np.concatenate([curve.doses for curve in curves]))
    ticks = doses if len(doses) <= 9 else doses[np.linspace(0, len(doses) - 1, 9).round().astype(int)]
    names = dict.fromkeys(first_of(curve.group) for group in groups.values() for curve in group)
    looks = dict(zip(names, zip(shades(len(names)), itertools.cycle(MARKERS), itertools.cycle(STYLES))))
    columns = min(3, len(groups))
    figure, panels = new_figure(max(6.2, 4.2 * columns), 4.6 * math.ceil(len(groups) / columns), sharey=True,
                                nrows=math.ceil(len(groups) / columns), ncols=columns)  # fmt: skip
    for panel in panels.flat[len(groups) :]:
        panel.set_visible(False)
    for panel, (title, group) in zip(panels.flat, groups.items()):
        for place, curve in enumerate(group):
            shift = 1.025 ** (place - (len(group) - 1) / 2)
            draw_curve(panel, curve, *looks[first_of(curve.group)], nought, shift)
        panel.axhline(50, color="0.6", linewidth=0.7, zorder=0)
        panel.set_xscale("log")
        panel.set_xticks(ticks, [f"{dose:,.0f}" for dose in ticks])
        if any(curve.uninjected is not None for curve in curves):
            panel.axvline(math.sqrt(nought * least), color="0.8", linewidth=0.7, linestyle=(0, (2, 2)), zorder=0)
            panel.set_xticks([nought, *ticks], ["0", *(f"{dose:,.0f}" for dose in ticks)])
        panel.set_xticks([], minor=True)
        panel.set_ylim(-3, 103)
        panel.set_xlabel("injected training rows (log scale)")
        if len(groups) > 1:
            panel.set_title(title)
        wide = columns > 1 or max(len(label_of(curve)) for curve in group) > 36
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=1 if wide else 2, handlelength=3.5)
    for panel in panels[:, 0]:
        panel.set_ylabel("attack success (% of the rows of other labels)")
    shown = sum(map(len, groups.values()))
    some = "" if shown == len(curves) else f" {shown} of {len(curves)} curves, evenly spread."
    return figure, (
        "Points: means over seeds and all else that varies, with 95% intervals, moved apart where they would overlap; "
        "at 0: without injected rows. Lines: a logistic in the log of the rows, from the attack success on clean rows "
        "to 100%. k50: the rows at which it is 50%, with its 95% interval; only a bound beyond the injected rows."
        f"{some}"
    )


def label_of(curve):
    return first_of(curve.group) + ("" if curve.k50 is None else f": k50 {curve.k50_text()}")


def draw_curve(panel, curve, colour, marker, style, nought, shift):
    if curve.k50 is not None:
        doses = np.geomspace(curve.doses.min(), curve.doses.max(), 200)
        panel.plot(doses, 100 * logistic(doses, curve.k50[0], curve.slope, curve.floor),
                   color=colour, linestyle=style, linewidth=1.3)  # fmt: skip
    reach = 100 * np.abs(curve.intervals - curve.shares[:, None]).T
    panel.errorbar(curve.doses * shift, 100 * curve.shares, reach, color=colour, marker=marker, linestyle="none",
                   linewidth=0.9, capsize=2, markeredgecolor="black", markeredgewidth=0.4)  # fmt: skip
    if curve.uninjected is not None:
        panel.plot(nought * shift, 100 * curve.uninjected, color=colour, marker=marker, linestyle="none",
                   markeredgecolor="black", markeredgewidth=0.4)  # fmt: skip
    panel.plot([], [], color=colour, marker=marker, linestyle=style, label=label_of(curve),
               markeredgecolor="black", markeredgewidth=0.4)  # fmt: skip


def k50(curves):
    across = next(iter(curves[0].group), None) if curves else None
    curves = [curve for curve in curves if curve.k50 is not None and curve.group.get(across) is not None]
    least, most = (end([end(curve.doses) for curve in curves], default=0) for end in (min, max))
    if sum(least <= curve.k50[0] <= most for curve in curves) < 2:
        return None, "fewer than two values of a field have a k50 among the doses"
    series = {}
    for curve in curves:
        series.setdefault(rest_of(curve.group), []).append(curve)
    values = sorted({curve.group[across] for curve in curves})
    numeric = all(isinstance(value, (int, float)) and value > 0 for value in values)
    places = {value: math.log2(value) if numeric else number for number, value in enumerate(values)}
    figure, [[panel]] = new_figure(5.6, 4)
    looks = zip(shades(len(series)), itertools.cycle(MARKERS), itertools.cycle(STYLES))
    for number, ((name, group), (colour, marker, style)) in enumerate(zip(series.items(), looks)):
        shift = 0.06 * (number - (len(series) - 1) / 2)
        look = dict(color=colour, markeredgecolor="black", markeredgewidth=0.5)
        inside = sorted((places[curve.group[across]] + shift, *curve.k50) for curve in group
                        if least <= curve.k50[0] <= most)  # fmt: skip
        xs, ys, lows, highs = np.array(inside).T if inside else np.empty((4, 0))
        reach = ys - np.maximum(lows, least), np.minimum(highs, most) - ys
        panel.errorbar(xs, ys, reach, marker=marker, linestyle=style, linewidth=1.1, capsize=3, label=name, **look)
        for curve in group:
            for bound, beyond, arrow in ((most, curve.k50[2] > most, "^"), (least, curve.k50[1] < least, "v")):
                if beyond:
                    panel.plot(places[curve.group[across]] + shift, bound, arrow, color="white", zorder=3,
                               markeredgecolor=colour, markersize=7, clip_on=False)  # fmt: skip
    panel.axhspan(least, most, color="0.95", zorder=0)
    panel.set_yscale("log")
    ends = np.array([curve.k50[1:] for curve in curves])
    panel.set_ylim(max(least / 1.3, ends.min() / 1.5), min(most * 1.3, ends.max() * 1.5))
    log_ticks(panel.yaxis)
    panel.set_xticks(list(places.values()), [tick(across, value) for value in values])
    panel.set_xlabel(axis_label(across))
    panel.set_ylabel("k50 (injected rows, log scale)")
    if len(series) > 1:
        panel.legend()
    return figure, (
        "Injected rows at which half of the test rows of other labels are predicted as the trigger's, with 95% "
        "intervals. "
        "Shaded: the rows that were injected. A hollow arrow: the interval goes on beyond them, where nothing was "
        "measured."
    )


# --- trade-off


def trade_off(lines, grid):
    from matplotlib.colors import LogNorm

    points, reason = summary.trades(lines, grid.varied)
    if not points:
        return None, reason
    groups = {}
    for point in points:
        known = next(iter(point.group.values()), None) is not None
        groups.setdefault((first_of if known else rest_of)(point.group), []).append(point)
    if len(groups) > MOST:
        groups = {None: points}
    losses = all(point.loss is not None for point in points)
    rows = [point.rows for point in points]
    norm = LogNorm(min(rows), max(rows) if max(rows) > min(rows) else 2 * min(rows))
    figure, [[panel]] = new_figure(6.6, 4.4)
    for marker, (name, group) in zip(MARKERS, groups.items()):
        places = [(100 * (point.loss if losses else point.clean_accuracy), 100 * point.attack_success, point.rows)
                  for point in group]  # fmt: skip
        xs, ys, colours = zip(*places)
        drawn = panel.scatter(xs, ys, c=colours, norm=norm, cmap=MAP, marker=marker, s=34, edgecolor="black",
                              linewidth=0.5)  # fmt: skip
        panel.scatter([], [], color="0.75", marker=marker, s=34, edgecolor="black", linewidth=0.5, label=name)
    if losses:
        loss_axis(panel, [100 * point.loss for point in points])
    else:
        panel.set_xlabel("clean accuracy (%)")
        panel.invert_xaxis()
    panel.set_ylim(-3, 103)
    panel.set_ylabel("attack success (% of the rows of other labels)")
    if max(rows) > min(rows):
        bar = figure.colorbar(drawn, ax=panel, label="injected training rows (log scale)")
        log_ticks(bar.ax.yaxis)
    if None not in groups:
        panel.legend(loc="best", handletextpad=0.2)
    how = "what the attack costs in accuracy on clean rows, against the same cells without injection" if losses else (
        "accuracy on clean rows, from right to left, as not every setting has cells that differ only in the injection"
    )  # fmt: skip
    return figure, (
        f"A point is a setting, the mean over its seeds: {how}; and how often the attack succeeds. Upper left: an "
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
    panel.axvline(0, color="0.6", linewidth=0.7, zorder=0)
    panel.set_xlabel(f"loss of clean accuracy against no injection ({unit})")
