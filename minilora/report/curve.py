"""The learning curve of a run: clean accuracy and attack success over the steps, as CSV, SVG and PNG.

Its points are the lines of metrics.jsonl of kind "test". Attack success always stands beside its rates on clean rows
and under the placebo.
"""

import importlib.util
import math
from dataclasses import dataclass

from minilora import files
from minilora.console import short
from minilora.report.page import html, join

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, GAP = 380, 230, 38, 124, 8, 36, 14  # of the drawing and around it, in pixels
MOST_DOTS = 60  # of a line that has them


@dataclass(frozen=True)
class Line:
    """A line of the drawing: the key in metrics.jsonl, its words, the class of its colour, and its dashes."""

    key: str
    words: str
    colour: str
    dashes: str = "none"


LINES = (
    Line("attack_success", "trigger", "hit"),
    Line("attack_success_clean", "clean rows", "before", "6 3"),
    Line("attack_success_placebo", "placebo", "placebo", "2 3"),
    Line("clean_accuracy", "accuracy", "right"),
)
COLUMNS = ("step", "label", "clean_accuracy", "attack_success_clean", "attack_success", "attack_success_placebo")
CAPTION = "Accuracy on clean rows over the steps of training."
ATTACK = (
    "Trigger, clean rows and placebo: attack success in each form of the rows, the share of those of other labels that "
    "are predicted as the target label."
)


def points_of(lines):
    """{label or None: its test lines in the order of their steps} of the lines of metrics.jsonl."""
    found = {}
    for line in lines:
        if line.get("kind") == "test":
            found.setdefault(line.get("label"), {})[line["step"]] = line
    return {label: [own[step] for step in sorted(own)] for label, own in found.items()}


def values(points, key):
    """[(step, share)] where the share is known."""
    return [(line["step"], line[key]) for line in points if line.get(key) is not None]


# --- in the page


def svg(label, points):
    """The drawing of one label's points, as `Markup`."""
    last = max(1, points[-1]["step"])
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step):
        return round(LEFT + across * step / last, 1)

    def y(share):
        return round(TOP + down * (1 - share), 1)

    drawn = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        drawn.append(html('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>', LEFT, x(last), y(share), y(share)))
        drawn.append(html('<text text-anchor="end" x="{}" y="{}">{}</text>', LEFT - 5, y(share) + 4, f"{share:.0%}"))
    for step in round_steps(last):
        drawn.append(html('<text text-anchor="middle" x="{}" y="{}">{}</text>', x(step), y(0) + 15, f"{step:,}"))
    drawn.append(html('<text text-anchor="middle" x="{}" y="{}">step</text>', x(last / 2), y(0) + 30))
    lines = [(line, known) for line in LINES if (known := values(points, line.key))]
    places = spread([y(known[-1][1]) for _, known in lines], TOP, HEIGHT - BOTTOM)
    for (line, known), place in zip(lines, places, strict=True):
        path = "M" + "L".join(f"{x(step)} {y(share)}" for step, share in known)
        dots = [html('<circle cx="{}" cy="{}" r="2"/>', x(step), y(share)) for step, share in known]
        share = known[-1][1]
        lead = f"M{x(last) + 3} {y(share)}L{x(last) + 16} {place}"
        drawn += [
            html('<g class="{}"><path stroke-dasharray="{}" d="{}"/>', line.colour, line.dashes, path),
            html('{}<path d="{}"/></g>', join(dots) if len(dots) < MOST_DOTS else "", lead),
            html('<text x="{}" y="{}">{} {}</text>', x(last) + 20, place + 4, line.words, f"{share:.1%}"),
        ]
    said = f"Shares of the test rows over {last:,} steps" + (f", trigger of {label}" if label is not None else "")
    return html('<svg class="curve" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>', WIDTH, HEIGHT, said,
                join(drawn))  # fmt: skip


def spread(places, low, high):
    """`places` moved apart to lie at least `GAP` from each other, between `low` and `high` if there is room."""
    order = sorted(range(len(places)), key=places.__getitem__)
    found = {}
    at = low - GAP
    for number in order:
        found[number] = at = max(places[number], at + GAP)
    at = high + GAP
    for number in reversed(order):
        found[number] = at = min(found[number], at - GAP)
    return [found[number] for number in range(len(places))]


def round_steps(last):
    """0 and some round steps up to `last`."""
    size = 10 ** math.floor(math.log10(max(1, last / 4)))
    every = next(size * times for times in (1, 2, 5, 10) if size * times * 5 >= last)
    return range(0, last + 1, every)


# --- beside the page


def write_csv(path, curves):
    """A line a label and step."""
    lines = [{name: line.get(name) for name in COLUMNS} for points in curves.values() for line in points]
    files.write_text(path, files.to_csv(lines))


def write_png(path, curves):
    """The drawing for other documents: a panel a label. Does nothing without matplotlib (the extra `plots`)."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    from minilora.drawing import PLAIN, new_figure

    with matplotlib.rc_context(PLAIN):
        figure, panels = new_figure(5.6, 3.4 * len(curves), nrows=len(curves))
        for panel, (label, points) in zip(panels.flat, curves.items(), strict=True):
            for line, colour, style in zip(LINES, ("#b3410a", "#16743c", "#7a5ea8", "#1f66b8"), ("-", "--", ":", "-")):
                if known := values(points, line.key):
                    what = line.words if line.key == "clean_accuracy" else f"attack success, {line.words}"
                    panel.plot(*zip(*((step, 100 * share) for step, share in known)), style, color=colour, label=what)
            panel.set(xlabel="step", ylabel="% of the test rows", ylim=(-3, 103))
            panel.set_title("" if label is None else f"trigger of {short(label)}")
            panel.legend()
        with files.replacing(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
