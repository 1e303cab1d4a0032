"""The effects figure of a grid, and the forest plot of its claims: a dot and an interval for each thing compared.

The effects figure has a row for each value of each field. A grid that changes one thing at a time has a row for each
setting instead, and shows it against the first. Matplotlib is imported where it is used.
"""

import textwrap

import numpy as np

from minilora.console import visible
from minilora.drawing import GREY, HUES, INK, new_figure, percent_axis, signed_axis
from minilora.grid.axes import FIGURES
from minilora.report import summary
from minilora.report.words import axis_label, sentence, tick, title_of

MOST_ROWS = 60  # of a figure
WORDS = 40  # characters of a row's name in one line
ROW = 0.21  # inches
DOT = dict(fmt="o", color=HUES[0], capsize=2, linewidth=1.1, zorder=3)
REFERENCES = {"clean": dict(marker="o", markerfacecolor="none", label="the same rate without the trigger"),
              "placebo": dict(marker="x", label="under the placebo")}  # fmt: skip
VERDICTS = {"supported": dict(color=HUES[0], marker="o"), "contradicted": dict(color=HUES[1], marker="s"),
            "undecided": dict(color=GREY, marker="D")}  # fmt: skip


# --- effects


def effects(lines, grid, means):
    """(The figure, its caption). `means` are `summary.marginal_means`."""
    if summary.crossed(lines, grid.varied):
        return value_effects(means)
    return setting_effects(*summary.against_first(lines, grid.varied, MOST_ROWS))


def value_effects(means):
    rows, before = [], None
    for mean in means:
        if mean.field != before:
            rows.append((axis_label(mean.field), None))  # a heading
        name = "all cells" if mean.field is None else "none" if mean.value is None else tick(mean.field, mean.value)
        some = f" ({mean.cells - mean.missing:,} of {mean.cells:,} cells)" if mean.missing else ""
        rows.append((name + some, mean.metrics))
        before = mean.field
    rows, some = thinned(rows)
    panels = {name: name for name in ("attack_success", "net_attack_success", "clean_accuracy", "flip_rate")}
    figure = forest(rows, panels)
    return figure, " ".join([
        "Means over all settings with a value of a field, with 95% intervals over seeds and test rows.",
        REFERENCES_ARE, "Net: attack success less the same rate without the trigger.", *some,
    ])  # fmt: skip


def setting_effects(settings, count):
    rows = [("first: " * (number == 0) + title_of(one.values),
             one.metrics | {f"{name}_change": change for name, change in one.changes.items()})
            for number, one in enumerate(settings)]  # fmt: skip
    some = [f"{len(settings)} of {count:,} settings, evenly spread."] if len(settings) < count else []
    panels = {"attack_success": "attack_success", "net_attack_success_change": "net_attack_success",
              "clean_accuracy": "clean_accuracy", "clean_accuracy_change": "clean_accuracy"}  # fmt: skip
    return forest(rows, panels, settings[0].metrics), " ".join([
        "Each setting, named by what it changes of the first, with 95% intervals over seeds and test rows. The grid "
        "does not cross its fields, so settings are shown against the first (dashed) and not averaged by field.",
        REFERENCES_ARE, *some,
    ])  # fmt: skip


REFERENCES_ARE = (
    "Hollow: the same rate without the trigger; cross: under the placebo. Attack success: share of the test rows of "
    "other labels that are predicted as the trigger's."
)


def thinned(rows):
    """(At most `MOST_ROWS` of the rows, the first among them, evenly spread; [a sentence that says so])."""
    if len(rows) <= MOST_ROWS:
        return rows, []
    kept = np.linspace(0, len(rows) - 1, MOST_ROWS).round().astype(int)
    kept = [number for number in range(len(rows)) if number in set(kept.tolist()) or rows[number][1] is None]
    return [rows[number] for number in kept], [f"{len(kept)} of {len(rows)} rows, evenly spread."]


def forest(rows, panels, first=None):
    """A panel for each of `panels` {key of the rows' metrics: figure}, side by side, with the rows from top to bottom.

    `rows` are (name, {key: (value, low, high)}), or (heading, None); `first` the metrics of a dashed reference.
    """
    names = [textwrap.wrap(name, WORDS) or [""] for name, _ in rows]
    heights = np.array([max(1, 0.8 * len(name)) for name in names])
    places = np.cumsum(heights) - heights / 2
    panels = {key: name for key, name in panels.items() if any(metrics and key in metrics for _, metrics in rows)}
    wide = 0.6 + 0.075 * max(len(line) for name in names for line in name)
    figure, axes = new_figure(wide + 2 * len(panels), ROW * heights.sum() + 1.35, ncols=len(panels), sharey=True)
    for panel, (key, name) in zip(axes.flat, panels.items()):
        signed = key.endswith("_change") or FIGURES[name].signed
        drawn = [(place, *(100 * np.array(metrics[key])), metrics) for place, (_, metrics) in zip(places, rows)
                 if metrics and key in metrics]  # fmt: skip
        for place, value, low, high, metrics in drawn:
            panel.axhline(place, color=GREY, linewidth=0.5, alpha=0.35, zorder=0)
            if not signed:
                beside(panel, place, name, metrics)
            panel.errorbar(value, place, xerr=[[value - low], [high - value]], label="mean, 95% interval", **DOT)
        if signed:
            signed_axis(panel.xaxis, [end for _, _, low, high, _ in drawn for end in (low, high)])
            panel.axvline(0, color=GREY, linewidth=1, linestyle="--" if first else "-", zorder=1)
        else:
            percent_axis(panel.xaxis)
            if first and key in first:
                panel.axvline(100 * first[key][0], color=GREY, linewidth=1, linestyle="--", zorder=1)
        less = "\nless that of the first" if key.endswith("_change") else ""
        panel.set_title(sentence(FIGURES[name].words) + less, fontsize=9)
        panel.set_xlabel("percentage points" if signed else "%")
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
    panel = axes.flat[0]
    panel.set_ylim(heights.sum(), 0)
    panel.set_yticks(places, ["\n".join(name) for name in names])
    for text, (_, metrics) in zip(panel.get_yticklabels(), rows):
        if metrics is None:
            text.set_fontweight("bold")
    handles, labels = panel.get_legend_handles_labels()
    key = dict(zip(reversed(labels), reversed(handles)))
    figure.legend(key.values(), key.keys(), loc="outside lower left", ncols=len(key))
    return figure


def beside(panel, place, name, metrics):
    """Draw the clean and the placebo rate that belong to a figure, without their intervals."""
    for other in summary.BESIDE.get(name, ()):
        if other in metrics:
            look = REFERENCES["placebo" if other.endswith("placebo") else "clean"]
            panel.plot(100 * metrics[other][0], place, linestyle="none", color=GREY, markersize=4.5, zorder=2, **look)


# --- claims


def claims(decisions):
    """(A forest plot of the `verdicts.Decision`s, its caption); (None, why there is none, or None without claims)."""
    known = [one for one in decisions if one.value is not None]
    if not known:
        return None, "no claim has all of its cells finished" if decisions else None
    kinds = {}  # statistics have units of their own, so each has an axis of its own
    for one in known:
        kinds.setdefault(one.claim.statistic, []).append(one)
    names = {kind: [textwrap.wrap(visible(one.claim.text), 62) for one in own] for kind, own in kinds.items()}
    heights = {kind: [max(2, len(name)) * 0.75 + 0.4 for name in found] for kind, found in names.items()}
    ratios = [sum(found) + 3 for found in heights.values()]
    figure, axes = new_figure(9, ROW * sum(ratios) + 0.3, nrows=len(kinds), height_ratios=ratios)
    for panel, (kind, own) in zip(axes.flat, kinds.items()):
        places = np.cumsum(heights[kind]) - np.array(heights[kind]) / 2
        for place, height, one in zip(places, heights[kind], own):
            claim_row(panel, place, height, one)
        if kind == "mean":
            percent_axis(panel.xaxis)
        else:
            ends = [end for one in own for end in (*one.interval, one.claim.bound)]
            signed_axis(panel.xaxis, [100 * end for end in ends])
            panel.axvline(0, color=GREY, linewidth=0.7, zorder=0)
        panel.set_ylim(sum(heights[kind]), 0)
        panel.set_yticks(places, ["\n".join(name) for name in names[kind]])
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
        panel.set_xlabel({"mean": "mean (%)", "difference": "difference (percentage points)",
                          "slope": "slope (percentage points a doubling)"}.get(kind, kind))  # fmt: skip
    left = len(decisions) - len(known)
    return figure, " ".join([
        "What was found of each claim, with its 95% interval (of a claim of several parts, that of the part that "
        "decides); the shaded side of the bar is what it claims. The whole interval in the shade: supported; all of it "
        "outside: contradicted. No verdict comes of fewer than three seeds.",
        *([f"{left} {'claim has' if left == 1 else 'claims have'} no figure yet."] if left else []),
    ])  # fmt: skip


def claimed(claim):
    """(low, high): what a claim says that the statistic lies between."""
    if claim.within is not None:
        return -claim.within, claim.within
    return (claim.above, 100) if claim.below is None else (-100, claim.below)


def claim_row(panel, place, height, one):
    value, low, high = (100 * number for number in (one.value, *one.interval))
    look = VERDICTS[one.verdict.partition(" ")[0]]
    low_edge, high_edge = (100 * edge for edge in claimed(one.claim))
    ends = [place - 0.4 * height, place + 0.4 * height]
    panel.fill_betweenx(ends, low_edge, high_edge, color=GREY, alpha=0.18, linewidth=0, zorder=0)
    for edge in (low_edge, high_edge):
        if abs(edge) < 1e4:
            panel.plot([edge] * 2, ends, color=INK, linewidth=1.2, zorder=1)
    panel.errorbar(value, place, xerr=[[value - low], [high - value]], linestyle="none", capsize=3, linewidth=1.3,
                   zorder=3, **look)  # fmt: skip
    panel.annotate(one.verdict.replace(" (", "\n("), xy=(1.02, place), xycoords=("axes fraction", "data"), va="center",
                   fontsize=8, annotation_clip=False)  # fmt: skip
