"""The figures of the diagnostics, each as PNG, PDF and SVG, drawn from what the parts' JSON files hold.

attention     maps over layers and heads: the share on the trigger, what the adapter added, how well it tells
attribution   how each method ranks the span
spectrum      singular values of each module, and the update's relative norm by layer and target
knockout      the shift that is left without each part, and the shortcut spectrum

Needs matplotlib, the extra `plots`; without it nothing is drawn.
"""

import importlib
import importlib.util

import numpy as np

from minilora.diagnostics.formation_pictures import draw_formation, draw_neighbours
from minilora.drawing import (
    GREY,
    HUES,
    MAP,
    MARKERS,
    PLAIN,
    SIGNED,
    STYLES,
    log_ticks,
    new_figure,
    paths_of,
    readable_on,
    save,
)

WRITTEN = 16  # columns of a map whose cells have their number written in


def draw(folder, part, data):
    """Draw the figure of a part into `folder`, where there is one: the paths of its files."""
    if {"left_out", "unfinished"} & set(data) or not importlib.util.find_spec("matplotlib"):
        return ()
    if part in OTHERS:
        return OTHERS[part](data, folder / part).paths
    import matplotlib

    title, make = FIGURES[part]
    with matplotlib.rc_context(PLAIN):
        figure = make(data)
        if figure is None:
            return ()
        paths = paths_of(folder, part)
        save(figure, paths, f"{title}: {data['run']}, {data['count']} rows", title)
    return paths


def numbers(nested):
    """An array of what JSON holds, NaN for None."""
    return np.array(nested, dtype=float)


def heat(figure, panel, values, columns, title, signed=False, top=None):
    """A map of `values` [layers, columns] with its colour bar."""
    reach = top or np.nanmax(np.abs(values), initial=1e-9)
    low = -reach if signed else 0
    drawn = panel.imshow(values, cmap=SIGNED if signed else MAP, vmin=low, vmax=reach, aspect="auto", origin="lower")
    figure.colorbar(drawn, ax=panel, shrink=0.8)
    if len(columns) <= WRITTEN and len(values) <= WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                shade = drawn.cmap(drawn.norm(value))
                panel.text(column, row, f"{value:.2f}".replace("0.", "."), ha="center", va="center", fontsize=6,
                           color=readable_on(shade))  # fmt: skip
    panel.set_title(title)
    panel.set_ylabel("layer")
    panel.set_yticks(range(len(values)) if len(values) <= WRITTEN else range(0, len(values), 4))
    step = 1 if len(columns) <= WRITTEN else 4
    panel.set_xticks(range(0, len(columns), step), columns[::step])


def attention(data):
    if "span_share" not in data:
        return None
    heads = [str(head) for head in range(data["heads"])]
    maps = [("share on the trigger", numbers(data["span_share"]["trigger"])[..., 0], False, None),
            ("what the adapter added to it", numbers(data["change"])[..., 0], True, None)]  # fmt: skip
    if "auc" in data:
        maps += [(f"{words}: AUC less 1/2, trigger against placebo", numbers(data["auc"][what])[..., 0] - 0.5, True,
                  0.5) for what, words in (("span_share", "share"), ("entropy", "entropy"))]  # fmt: skip
    figure, panels = new_figure(11, 3.2 * (len(maps) // 2), nrows=len(maps) // 2, ncols=2)
    for panel, (title, values, signed, top) in zip(panels.flat, maps, strict=True):
        heat(figure, panel, values, heads, title, signed, top)
        panel.set_xlabel("head")
    return figure


def attribution(data):
    if not data.get("scores"):
        return None
    figure, [[panel]] = new_figure(7.5, 2.8)
    shown = (("first", "a span token ranks first"), ("precision", "precision"), ("auc", "AUC over tokens"))
    for number, (name, words) in enumerate(shown):
        threes = numbers([own[name] for own in data["scores"].values()])
        places = np.arange(len(threes)) + 0.2 * (number - 1)
        panel.errorbar(threes[:, 0], places, xerr=np.abs(threes[:, 1:].T - threes[:, 0]), linestyle="none",
                       marker=MARKERS[number], color=HUES[number], capsize=2, label=words)  # fmt: skip
    panel.set_yticks(range(len(data["scores"])), data["scores"])
    panel.invert_yaxis()
    panel.set_xlim(-0.03, 1.03)
    panel.set_xlabel("share, mean over rows with 95% interval")
    figure.legend(loc="outside right center")
    return figure


def spectrum(data):
    modules = data.get("modules")
    if not modules:
        return None
    layers = sorted({int(name.split(".")[1]) for name in modules})
    targets = list(dict.fromkeys(name.split(".")[2] for name in modules))
    figure, [[left, right]] = new_figure(10, 4, ncols=2)
    for name, own in modules.items():
        _, layer, target = name.split(".")
        number, values = targets.index(target), numbers(own["singular_values"])
        first = layer == str(layers[0])
        left.plot(np.arange(1, len(values) + 1), values, color=HUES[number % len(HUES)], linewidth=1,
                  linestyle=STYLES[number % len(STYLES)], marker=MARKERS[number % len(MARKERS)], markersize=3,
                  label=target if first else None)  # fmt: skip
    left.set_xlabel("direction")
    left.set_ylabel("singular value of the update")
    left.set_title("a line for each layer")
    left.legend()
    relative = np.full((len(layers), len(targets)), np.nan)
    for name, own in modules.items():
        _, layer, target = name.split(".")
        relative[layers.index(int(layer)), targets.index(target)] = own["relative_norm"]
    heat(figure, right, relative, targets, "norm of the update over the weight's")
    right.set_yticks(range(len(layers)), layers)
    return figure


def knockout(data):
    settings = {(own["kind"], own["name"]): own for own in data.get("settings", [])}
    parts = [key for key in settings if key[0] in ("whole", "layer", "target")]
    if not parts:
        return None
    curves = {}
    for (kind, name), own in settings.items():
        if kind == "directions":
            words, _, count = name.rpartition(" ")
            curves.setdefault(words, []).append((int(count), *own["shift"]))
    figure, panels = new_figure(11, max(3.5, 0.22 * len(parts)), ncols=2 if curves else 1)
    left = panels[0][0]
    threes = numbers([settings[key]["shift"] for key in parts])
    left.errorbar(threes[:, 0], range(len(parts)), xerr=np.abs(threes[:, 1:].T - threes[:, 0]), linestyle="none",
                  marker="o", color=HUES[0], capsize=2)  # fmt: skip
    left.set_yticks(range(len(parts)), [" ".join(key) for key in parts])
    left.invert_yaxis()
    left.set_xlabel("shift of the margin by the trigger (logits)")
    if curves:
        right = panels[0][1]
        for number, (words, points) in enumerate(curves.items()):
            count, mean, low, high = numbers(points).T
            right.errorbar(count, mean, np.abs([mean - low, high - mean]), color=HUES[number], marker=MARKERS[number],
                           linestyle=STYLES[number], capsize=2, label=f"{words} n")  # fmt: skip
        for name, style in (("adapter", "-"), ("head only", ":")):
            right.axhline(settings["whole", name]["shift"][0], color=GREY, linestyle=style, linewidth=1, label=name)
        right.set_xscale("log")
        log_ticks(right.xaxis)
        right.set_xlabel("n, singular directions")
        right.set_title("the shortcut spectrum")
        figure.legend(*right.get_legend_handles_labels(), loc="outside right center")
    return figure


FIGURES = {
    "attention": ("Attention", attention),
    "attribution": ("Attribution", attribution),
    "spectrum": ("The update's spectrum", spectrum),
    "knockout": ("Knock-outs", knockout),
}
OTHERS = {"formation": draw_formation, "neighbours": draw_neighbours}
