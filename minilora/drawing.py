"""The look of figures: colours, markers and line styles, and the three files of each figure.

Everything is readable in grey, by the colour-blind, on a projector, and on a light or a dark ground: lines and markers
have colours of middle luminance, whose contrast is at least 3 to 1 on white and on near-black; all words and numbers
are in `INK`, at least 4.5 to 1. Contrast is that of WCAG 2.1.
"""

import importlib.util
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np

from minilora import files
from minilora.errors import InputError

INK = "#1b1b1b"  # words, numbers and axes; in an SVG the colour of the text around it
GREY = "#7d7d7d"  # what stands beside: references, placebo and clean rates
HUES = ("#2a78d6", "#c9570a", "#1a8a4a", "#a64ac9", "#c93a5b", "#0c8599", "#8a6d00", "#6f6fd0", "#a0603a", "#5c7f2a")
SCALE = ("#2a78d6", "#8a5fd0", "#c93a8b", "#c9570a")  # of ordered values, from the first to the last
MAP = "cividis"  # of rates (Nuñez, Anderton and Renslow 2018)
SIGNED = "RdBu_r"  # of figures with a sign: white at 0
MARKERS = "oDs^vP*X<>"
STYLES = (
    "-",
    "--",
    "-.",
    ":",
    (0, (6, 1)),
    (0, (3, 1, 1, 1)),
    (0, (1, 1)),
    (0, (8, 2, 2, 2)),
    (0, (4, 4)),
    (0, (2, 4)),
)
PLAIN = {"font.size": 9, "axes.titlesize": 9.5, "figure.titlesize": 11, "axes.spines.top": False,
         "axes.spines.right": False, "lines.markersize": 5, "pdf.fonttype": 42, "savefig.dpi": 200,
         "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "minilora",
         "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.color": INK,
         "ytick.color": INK, "legend.frameon": False, "legend.fontsize": 8, "legend.labelcolor": INK}  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"
LOOK = """\
.minilora-figure { color: #1b1b1b }
.minilora-figure * { stroke-linejoin: round; stroke-linecap: butt }
@media (prefers-color-scheme: dark) { .minilora-figure { color: #ececec } }
"""
# Of a page in HTML: its colours, light and dark, words, tables and marks.
PAPER = """\
:root { --ink: #1b1b1b; --soft: #5a5a5a; --ground: #fff; --rule: #d9d9d9; --box: #f5f5f5; --link: #1a5fb4;
  --mark: #ffe08a; --hit: #b3410a; --right: #1f66b8; --before: #16743c; --placebo: #7a5ea8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --soft: #b0b0b0; --ground: #151515; --rule: #3d3d3d; --box: #212121; --link: #8ab8ff;
    --mark: #6b5200; --hit: #ff9a5c; --right: #74b0ff; --before: #6fd095; --placebo: #c3a5f5 }
}
* { box-sizing: border-box }
html { color-scheme: light dark; -webkit-text-size-adjust: 100% }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--ground); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .8rem } h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem }
h3 { font-size: 1rem; margin: 0 0 .3rem } p, ul, figcaption { max-width: 48rem } p { margin: .5rem 0 }
a { color: var(--link) } ul { padding-left: 1.2rem }
.note, .said, figcaption { font-size: .9rem; color: var(--soft) }
figure { margin: 1.2rem 0 2rem } figcaption { margin-top: .4rem }
details { margin-top: 1.5rem } summary { cursor: pointer; font-size: 1.2rem; font-weight: bold }
.wide { overflow: auto; margin: .6rem 0 } .tall { max-height: 40rem }
.wide img { display: block; background: #fff; max-width: 64rem; width: 100%; min-width: 40rem }
.minilora-figure { color: var(--ink); display: block }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0;
  border-bottom: 1px solid var(--rule) }
th { border-bottom: 1px solid var(--ink); vertical-align: bottom } .n { text-align: right }
td.n, .short { white-space: nowrap } td.long { min-width: 16rem } th.long { min-width: 9rem }
thead th { position: sticky; top: 0; background: var(--ground) }
mark { background: var(--mark); color: inherit; border-radius: .2rem; padding: 0 .15rem;
  display: inline-block; max-width: 100% }
pre { background: var(--box); padding: .8rem; overflow-x: auto; font-size: .85rem; overflow-wrap: normal }
"""


@dataclass(frozen=True)
class Drawn:
    """A figure: its title, what it shows, and the paths of its PNG, PDF and SVG.

    PNG and PDF have a white ground and the title in the picture. The SVG has neither: its ground is transparent, its
    words are text, and the page around it has the title (`save`).
    """

    title: str
    caption: str
    paths: tuple


def check_installed():
    """Raise InputError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("figures need matplotlib, which is not installed: pip install 'minilora[plots]'")


def new_figure(width, height, **grid):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(squeeze=False, **grid)


# --- files


def paths_of(folder, name):
    return tuple(folder / f"{name}.{ending}" for ending in ("png", "pdf", "svg"))


def save(figure, paths, heading, label):
    """Write a figure to the `paths` of its PNG, PDF and SVG, the same bytes each time.

    `heading` is drawn over the PNG and the PDF. The SVG has `label` for those who cannot see it, and no heading. It is
    one element without a declaration or metadata, so that its text can stand in an HTML page as it is: its ids start
    with the figure's name, its style speaks only of itself, and `INK` became `currentColor`, which is dark, or light
    where the reader prefers a dark ground. A page with a ground of its own sets `color` on `.minilora-figure`.
    """
    png, pdf, svg = paths
    svg.parent.mkdir(exist_ok=True)
    with files.replacing(svg) as temporary:
        figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})
        text = for_page(temporary.read_text(encoding="utf-8"), svg.stem, label)
        temporary.write_text(text, encoding="utf-8")
    figure.suptitle(heading)
    for path, stamp in ((png, "Software"), (pdf, "CreationDate")):
        with files.replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], metadata={stamp: None})


def for_page(text, name, label):
    """matplotlib's SVG as `save` describes it."""
    root = ElementTree.fromstring(text)
    for parent in root.iter():
        for child in list(parent):
            if child.tag == SVG + "metadata":
                parent.remove(child)
            elif child.tag == SVG + "style":
                child.text = LOOK
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        for key, value in list(element.attrib.items()):
            if key == "id":
                value = f"{name}-{value}"
            elif key.endswith("href"):  # it was xlink:href, which needs a namespace
                del element.attrib[key]
                key, value = "href", value.replace("#", f"#{name}-", 1) if value.startswith("#") else value
            elif key in ("style", "clip-path"):
                value = value.replace(INK, "currentColor").replace("url(#", f"url(#{name}-")
            element.set(key, value)
    root.attrib.pop("version", None)
    root.attrib |= {"xmlns": SVG.strip("{}"), "class": "minilora-figure", "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode") + "\n"


# --- axes


def log_ticks(axis):
    """Put ticks at round numbers, more of them on a short axis. Call it after the limits are set."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def percent_axis(axis):
    """An axis of rates, from 0 to 100."""
    set_limits(axis, -3, 103)
    axis.set_ticks([0, 25, 50, 75, 100])


def signed_axis(axis, ends):
    """An axis of signed figures: 0 in its middle, and room for all of `ends`."""
    reach = 1.08 * max([1, *map(abs, ends)])
    set_limits(axis, -reach, reach)


def set_limits(axis, low, high):
    panel = axis.axes
    (panel.set_xlim if axis is panel.xaxis else panel.set_ylim)(low, high)


def spread(places, gap, top=np.inf):
    """`places`, moved apart as little as makes neighbours differ by `gap` or more, none above `top`; as ordered."""
    order = np.argsort(places, kind="stable")
    blocks = []  # [sum of wanted starts, how many]: neighbours that touch move as one
    for number, place in enumerate(np.asarray(places, dtype=float)[order]):
        blocks.append([min(place, top - gap * (len(order) - 1 - number)) - number * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    starts = np.concatenate([np.full(count, total / count) for total, count in blocks])
    found = np.empty(len(order))
    found[order] = starts + gap * np.arange(len(order))
    return found


def room(labels):
    """The inches that direct labels need."""
    return 0.3 + 0.066 * max(map(len, labels))


def apart(places, gap):
    """Which of the ordered `places` to name so that names are `gap` or more apart."""
    kept = []
    for number, place in enumerate(places):
        if not kept or place - places[kept[-1]] >= gap:
            kept.append(number)
    return kept


def direct_label(panel, place, from_, text, colour):
    """Write `text` at the height `place` right of a panel, with a thin line to the point `from_` (x, y) that it names.

    The line has the point's colour, and the words have `INK`. All coordinates are the data's.
    """
    panel.annotate(text, xy=from_, xytext=(1.03, place), textcoords=("axes fraction", "data"), va="center", fontsize=8,
                   arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.6, relpos=(0, 0.5), shrinkA=1,
                                   shrinkB=3),
                   annotation_clip=False)  # fmt: skip


# --- colours


def shades(count):
    """`count` colours of ordered values, from the first to the last."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("ordered", SCALE)
    return [tuple(map(float, scale(place))) for place in np.linspace(0, 1, count)]


def hues(count):
    """`count` colours of values without an order."""
    return [HUES[number % len(HUES)] for number in range(count)]


def luminance(colour):
    """The relative luminance of an sRGB colour (WCAG 2.1), from 0 to 1."""
    from matplotlib.colors import to_rgb

    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one, other):
    """The contrast ratio of two colours (WCAG 2.1), from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def readable_on(colour):
    """Black or white, whichever is easier to read on `colour`: at least 4.5 to 1."""
    return max(("black", "white"), key=lambda ink: contrast(ink, colour))
