"""Heat maps of a grid's figures over two numeric fields, with the numbers in them.

Rates are on one scale, 0 to 100, and signed figures on one with 0 in its middle, so that maps can be compared with each
other. Matplotlib is imported where it is used.
"""

import math

import numpy as np

from minilora.drawing import GREY, INK, MAP, SIGNED, new_figure, readable_on
from minilora.grid.axes import ATTACKS, FIGURES
from minilora.report import summary
from minilora.report.words import axis_label, sentence, tick

SHOWN = ("attack_success", *summary.RATES, *ATTACKS[1:], "clean_accuracy", "flip_rate")
MOST_NUMBERS = 160  # a heat map with more fields has a colour bar instead of numbers
MOST_TICKS = 16


def heat_maps(lines, grid):
    """(The figure, its caption); (None, why there is none)."""
    pair, reason = summary.map_axes(lines, grid.varied)
    if pair is None:
        return None, reason
    down, across = pair
    maps = {name: summary.heat_map(lines, name, across, down, grid.varied) for name in SHOWN}
    maps = {name: found for name, found in maps.items() if np.isfinite(found[2]).any()}
    xs, ys, _ = next(iter(maps.values()))
    states = summary.grid_states(lines, across, down)
    columns = min(3, len(maps))
    rows = math.ceil(len(maps) / columns)
    wide, high = min(5, max(3, 0.9 + 0.4 * len(xs))), min(5.5, max(2.1, 1 + 0.28 * len(ys)))
    figure, panels = new_figure(columns * wide, rows * high + 0.4, nrows=rows, ncols=columns)
    figure.get_layout_engine().set(wspace=0.05, hspace=0.06)
    for panel in panels.flat[len(maps) :]:
        panel.set_visible(False)
    for panel, (name, (_, _, means)) in zip(panels.flat, maps.items()):
        signed = FIGURES[name].signed
        heat(figure, panel, 100 * means, states, signed)
        for axis, field, places in ((panel.xaxis, across, xs), (panel.yaxis, down, ys)):
            every = math.ceil(len(places) / MOST_TICKS)
            axis.set_ticks(range(0, len(places), every), [tick(field, value) for value in places[::every]])
        panel.set_title(f"{sentence(FIGURES[name].words)} ({'points' if signed else '%'})", fontsize=8.5)
        panel.set_xlabel(axis_label(across), fontsize=8.5)
        panel.set_ylabel(axis_label(down), fontsize=8.5)
    others = [name for name in summary.settings_of(grid.varied) if name not in pair]
    rest = f", {', '.join(others)}" if others else ""
    known = {summary.ABSENT: "Blank: not in the grid.", summary.UNFINISHED: "Hatched: in the grid, but not finished."}
    return figure, " ".join([
        f"Means over seeds{rest} for each {down} and {across}. Attack success: share of the test rows of other labels "
        "that are predicted as the trigger's label, with the trigger, without it and with a placebo; net: with the "
        "trigger less without it, over the placebo: less with the placebo, conditional: of the rows that are predicted "
        "right without it; flip rate: share "
        "of all test rows whose prediction the trigger changes; degradation: accuracy on clean rows less that under "
        "the trigger, in percentage points. Rates are coloured from 0 to 100, signed ones from white at 0.",
        *(words for state, words in known.items() if (states == state).any()),
    ])  # fmt: skip


def heat(figure, panel, values, states, signed):
    """Draw a map of `values` [Y, X] in percent, hatched where `states` is `summary.UNFINISHED`."""
    import matplotlib

    reach = max(5, np.nanmax(np.abs(values)))
    norm = matplotlib.colors.Normalize(*((-reach, reach) if signed else (0, 100)))
    colours = matplotlib.colormaps[SIGNED if signed else MAP]
    panel.set_xlim(-0.5, values.shape[1] - 0.5)
    panel.set_ylim(-0.5, values.shape[0] - 0.5)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    for y, x in np.argwhere(states == summary.UNFINISHED):
        panel.add_patch(matplotlib.patches.Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, hatch="////",
                                                     edgecolor=GREY, linewidth=0.5))  # fmt: skip
    if values.size > MOST_NUMBERS:
        image = panel.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, origin="lower", aspect="auto",
                             interpolation="nearest")  # fmt: skip
        figure.colorbar(image, ax=panel).outline.set_visible(False)
        return
    finite = values[np.isfinite(values)]
    digits = 0 if finite.max() - finite.min() >= 20 else 1
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = colours(norm(value))
            panel.add_patch(matplotlib.patches.Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, color=colour, linewidth=0))
            shown, ink = f"{round(float(value), digits) + 0:.{digits}f}", readable_on(colour)
        elif states[y, x] == summary.FINISHED:  # it has no such figure
            shown, ink = "-", INK
        else:
            continue
        panel.text(x, y, shown, ha="center", va="center", fontsize=7.5, color=ink)
