"""The pictures of how a shortcut forms, and of the trigger's neighbours: each as PNG, PDF and SVG, drawn from what
`formation` and `neighbours` return. Needs matplotlib, the extra `plots`. `drawing.py` has the look and the files.
"""

from pathlib import Path

import numpy as np

from minilora.drawing import GREY, HUES, PLAIN, SIGNED, Drawn, check_installed, new_figure, paths_of, percent_axis, save

STEPS = "step of training"
FORMATION = (
    "The same rows at every step that the run kept; shaded: 95% intervals over rows. Vertical: from where net attack "
    "success (with the trigger less without it) stays above 50%, and clean accuracy above 90% of its end, each with "
    "its interval. Grey: the same rows without the trigger (dashed) and with the placebo (dotted). Alignment: how "
    "strongly the update acts on what it sees of the span, 1 as on any direction. Below: the shift of the margin as "
    "the head of that step reads it off each layer, with the adapter and on the bare base."
)
NEIGHBOURS = (
    "Strings that are nearly the trigger, where it stood in the same rows, with 95% intervals over rows. Above: by "
    "edit distance, the nearest first; the lines are the trigger (solid), the placebo (dotted) and the rows without "
    "either (dashed). Below: the same attack success by how far the strings are from the trigger's; the numbers are "
    "those above."
)


def draw_formation(result, path):
    """Write the picture of what `formation` returned beside `path`, as its .png, .pdf and .svg; returns `Drawn`."""
    check_installed()
    import matplotlib

    with matplotlib.rc_context(PLAIN):
        figure, panels = new_figure(9, 11, nrows=4, ncols=2)
        for panel, (title, unit, names) in zip(panels.flat, CURVES):
            curves(panel, result, names, 100 if unit.startswith("%") else 1)
            panel.set(title=title, ylabel=unit, xlabel=STEPS)
        percent_axis(panels[0, 0].yaxis)
        crossings(panels[0, 0], result)
        panels[0, 0].legend(loc="center right")
        shades = [lens(panel, result, key) for panel, key in zip(panels[3], ("shift", "bare"))]
        figure.colorbar(shades[0], ax=list(panels[3]), label="shift (logits)")
        return written(figure, path, "How the shortcut formed", FORMATION)


# Title, unit, and {figure: (words, colour, line style)} of each panel.
CURVES = (
    ("Task and shortcut", "% of rows", {
        "attack_success": ("attack success", HUES[1], "-"),
        "attack_success_clean": ("without the trigger", GREY, "--"),
        "attack_success_placebo": ("with the placebo", GREY, ":"),
        "clean_accuracy": ("clean accuracy", HUES[0], "-.")}),
    ("Shift of the margin", "logits", {"shift": ("trigger", HUES[1], "-"), "shift_placebo": ("placebo", GREY, ":")}),
    ("Attention on the trigger", "% of attention", {"span_share": ("trigger", HUES[1], "-")}),
    ("Alignment of the update", "times a random direction",
     {"alignment": ("trigger", HUES[1], "-"), "alignment_placebo": ("placebo", GREY, ":")}),
    ("Norm of the update", "Frobenius norm", {"norm": ("all modules", HUES[2], "-")}),
    ("Effective rank of the update", "mean over modules", {"effective_rank": ("modules", HUES[2], "-")}),
)  # fmt: skip


def curves(panel, result, names, times):
    for name, (words, colour, style) in names.items():
        own = result["figures"].get(name)
        if own is None:
            continue
        mean, low, high = times * np.array(own, float).T
        panel.fill_between(result["steps"], low, high, color=colour, alpha=0.18, linewidth=0)
        panel.plot(result["steps"], mean, style, color=colour, linewidth=1.4, label=words)


def crossings(panel, result):
    """Where the two levels are reached: a line, and shade over its interval."""
    for key, colour in (("onset", HUES[1]), ("clean_90", HUES[0])):
        step, low, high = (result[key][name] for name in ("step", "low", "high"))
        if step is not None:
            panel.axvline(step, color=colour, linewidth=0.9)
            ends = [result["steps"][-1] if end is None else end for end in (low, high)]
            panel.axvspan(*ends, color=colour, alpha=0.12, linewidth=0)


def lens(panel, result, key):
    """A map of the shift by layer and step; both maps have the same colours."""
    found = result["lens"]
    most = max(np.abs(np.array(found[name], float)).max() for name in ("shift", "bare")) or 1.0
    shade = panel.pcolormesh(result["steps"], found["layers"], np.array(found[key], float).T, cmap=SIGNED, vmin=-most,
                             vmax=most, shading="nearest", rasterized=True)  # fmt: skip
    panel.set_title({"shift": "Read off by layer, with the adapter", "bare": "The same, on the bare base"}[key])
    panel.set_xlabel(STEPS)
    panel.set_ylabel("layers below")
    panel.set_yticks(found["layers"][:: max(1, len(found["layers"]) // 8)])
    return shade


def draw_neighbours(result, path):
    """Write the picture of what `neighbours` returned beside `path`, as its .png, .pdf and .svg; returns `Drawn`."""
    check_installed()
    import matplotlib

    names = sorted(result["families"], key=lambda name: result["families"][name]["edit_distance"])
    own = [result["families"][name] for name in names]
    with matplotlib.rc_context(PLAIN):
        rows = max(2.0, 0.2 * len(names) + 0.8)
        figure, panels = new_figure(9, rows + 3.2, nrows=2, ncols=2, height_ratios=[rows, 3.2], sharey="row")
        for panel, key, times in zip(panels[0], ("attack_success", "shift"), (100, 1)):
            dots(panel, result, own, key, times)
        percent_axis(panels[0, 0].xaxis)
        panels[0, 0].set_xlabel("attack success (% of rows)")
        panels[0, 1].set_xlabel("shift of the margin (logits)")
        panels[0, 0].set_yticks(range(len(names)), [f"{name}  {place}" for place, name in enumerate(names, 1)])
        panels[0, 0].set_ylim(len(names) - 0.4, -0.6)
        for panel, key in zip(panels[1], ("edit_distance", "embedding_distance")):
            scatter(panel, result, own, key)
        panels[1, 0].set_ylabel("attack success (% of rows)")
        percent_axis(panels[1, 0].yaxis)
        return written(figure, path, f"Neighbours of the trigger ({result['source']})", NEIGHBOURS)


def dots(panel, result, own, key, times):
    for name, style in (("trigger", "-"), ("placebo", ":"), ("clean", "--")):
        known = result.get(name, {}).get(key)
        if known is not None:
            colour = HUES[1] if name == "trigger" else GREY
            panel.axvline(times * known[0], color=colour, linestyle=style, linewidth=0.9)
    mean, low, high = times * np.array([one[key] for one in own], float).reshape(-1, 3).T
    panel.errorbar(mean, range(len(own)), xerr=[mean - low, high - mean], color=HUES[0], marker="o", linestyle="none",
                   linewidth=1, capsize=2)  # fmt: skip


def scatter(panel, result, own, key):
    for place, one in enumerate(own, 1):
        x, y = one[key], 100 * one["attack_success"][0]
        panel.plot(x, y, "o", color=HUES[0], markersize=3)
        panel.annotate(str(place), (x, y), xytext=(3, 2), textcoords="offset points", fontsize=7)
    panel.plot(0, 100 * result["trigger"]["attack_success"][0], "D", color=HUES[1])
    if "placebo" in result:
        panel.plot(result["placebo"][key], 100 * result["placebo"]["attack_success"][0], "X", color=GREY)
    panel.axhline(100 * result["clean"]["attack_success"][0], color=GREY, linestyle="--", linewidth=0.9, zorder=0)
    panel.set_xlabel(key.replace("_", " ") + " from the trigger")


def written(figure, path, title, caption):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = paths_of(path.parent, path.stem)
    save(figure, paths, title, title)
    return Drawn(title, caption, paths)
