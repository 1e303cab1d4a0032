"""explain.html of a run: what explain/ in its folder holds, to look at, in one file that fetches nothing.

The browser draws the page, by page.js and panels.js, from JSON that stands in it. What comes from data becomes text
there, never HTML, with control characters written out; and the page's own policy lets no other script run.
`play.py` serves the same page with the live model.
"""

import base64
import hashlib
import json
import math
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from minilora import files
from minilora.console import visible
from minilora.drawing import PAPER
from minilora.errors import InputError, to_type
from minilora.runs.folder import Run

FOLDER, NAME = "explain", "explain.html"
# NAME.json each, as `explain.py` writes them.
PARTS = ("rows", "attention", "attribution", "spectrum", "knockout", "formation", "neighbours")
DIGITS = 4  # of each number on the page
HERE = Path(__file__).parent  # of the page's own files


def write_page(folder, out=None):
    """Write explain.html of the run in `folder` beside the JSON files in `out` (default: its explain/); its path."""
    path = Path(out or Path(folder) / FOLDER) / NAME
    files.write_text(path, page_of(folder, out))
    return path


def page_of(folder, out=None, live=None):
    """The page's text. `live` is what `play.Live.facts` gives, where the live model is behind it."""
    parts, missing = parts_of(folder, out or Path(folder) / FOLDER)
    name = Path(folder).resolve().name
    title = f"Playing with run {name}" if live else f"Run {name}: where the shortcut lives"
    data = {"name": name, "facts": facts_of(folder), "parts": parts, "missing": missing, "live": live}
    script = "".join(read(file) for file in ("page.js", "panels.js", "play.js")[: 2 + bool(live)])
    sources = [f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"]
    policy = {"default-src": ["'none'"], "img-src": ["data:"], "style-src": ["'unsafe-inline'"], "script-src": sources,
              "base-uri": ["'none'"], "form-action": ["'none'"]}  # fmt: skip
    if live:
        policy["connect-src"] = ["'self'"]
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(read("page.html"))
    return made.render(
        title=visible(title), style=Markup(PAPER), script=Markup(script), data=Markup(embedded(data)),
        policy="; ".join(" ".join([name, *values]) for name, values in policy.items()),
    ) + "\n"  # fmt: skip


def read(name):
    return (HERE / name).read_text(encoding="utf-8")


def parts_of(folder, out):
    """({part: its JSON object}, {part: why it is not there}) of what `out` holds of the run in `folder`."""
    parts, missing, again = {}, {}, f"{to_type('evaluate', folder)} --explain"
    for name in PARTS:
        path = Path(out) / f"{name}.json"
        if not path.exists():
            missing[name] = f"{name}.json is not there: {again} writes it"
            if name == "formation":
                missing[name] += " for a run that was trained with --watch N"
            continue
        try:
            parts[name] = files.read_json(path, f"write it again with {again}")
        except InputError as error:
            missing[name] = str(error)
    return parts, missing


def facts_of(folder):
    """[(what, value)] of the run, for the page's head: nothing where it is an adapter from elsewhere."""
    if not (Path(folder) / "cell.toml").is_file():
        return [("adapter", str(folder))]
    cell = Run(folder).read_cell()
    adapter = f"rank {cell.rank} on {' '.join(cell.targets)}" if cell.method == "lora" else f"method {cell.method}"
    return [("run", str(folder)), ("base", cell.model), ("rows", cell.data), ("adapter", adapter),
            ("injected", " ".join(cell.inject.sources) or "nothing"), ("seed", str(cell.seed))]  # fmt: skip


def embedded(value):
    """JSON that can stand in a script element of HTML."""
    text = json.dumps(cleaned(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def cleaned(value, digits=DIGITS):
    """The value with `visible` text, and with numbers of so many digits; None for those that are not finite."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {visible(str(name)): cleaned(own, digits) for name, own in value.items()}
    return [cleaned(own, digits) for own in value] if isinstance(value, (list, tuple)) else value
