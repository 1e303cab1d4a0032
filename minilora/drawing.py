"""The look of figures: one colour map, markers and line styles, readable in grey and by the colour-blind."""

import importlib.util
from dataclasses import dataclass

import numpy as np

from minilora.errors import InputError

MAP = "cividis"
LIGHTEST = 0.85  # of the map: lighter curves are lost on white
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
         "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8, "lines.markersize": 4.5,
         "pdf.fonttype": 42, "savefig.dpi": 200, "text.parse_math": False}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A figure: its title, what it shows, and the paths of its PNG and PDF."""

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


def log_ticks(axis):
    """Put ticks at round numbers, more of them on a short axis. Call it after the limits are set."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def shades(count):
    """`count` colours from dark to light."""
    import matplotlib

    return matplotlib.colormaps[MAP](np.linspace(0, LIGHTEST, count))
