"""report.html: a grid's report in one file that loads nothing, from the network or from the disk."""

import base64
import html
import shlex

from minilora.fields import value_of
from minilora.grid.axes import FIELDS, word
from minilora.report import markup

MOST = 200  # failed cells that are listed
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin-top: 2.5rem }
figure { margin: 1rem 0 2rem } figcaption { font-size: .9rem; margin-bottom: .6rem; max-width: 48rem }
.wide { overflow-x: auto } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd }
th { border-bottom: 1px solid #1a1a1a } thead th { white-space: nowrap }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: .85rem }
"""
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""


def render(folder, lines, tables, drawn, made, left_out):
    """The page's text. `tables` are `markup.Table`s, `drawn` `figures.Drawn`s, `made` as in `report.rows`."""
    grid, escape = folder.grid, html.escape
    states = {line["cell"]: line["state"] for line in lines}
    counts = {state: list(states.values()).count(state) for state in dict.fromkeys(states.values())}
    parts = [f"<h1>{escape(grid.title)}</h1>"]
    if grid.source:
        parts.append(f"<p>After: {escape(grid.source)}</p>")
    parts.append(f"<p>{len(states):,} cells: {', '.join(f'{count:,} {state}' for state, count in counts.items())}.</p>")
    if not counts.keys() <= {"finished", "failed"}:
        parts.append("<p><b>The grid is not finished: all that follows is of the cells that are.</b></p>")
    for table in tables:
        parts += [f"<h2>{escape(table.title)}</h2>", markup.as_html(table)]
    parts += ["<h2>Figures</h2>", *map(picture, drawn)]
    if left_out:
        parts += ["<h2>Left out</h2>", bullets(left_out)]
    if failed := [(line["cell"], line["error"] or "") for line in lines if line["state"] == "failed"]:
        more = f"and {len(failed) - MOST:,} more, in table.csv" if len(failed) > MOST else ""
        parts += ["<h2>Failed cells</h2>", pairs("cell", "error", failed[:MOST]), f"<p>{more}</p>" if more else ""]
    alike, differing = settings(grid)
    others = f"<p>Following from these: {escape(', '.join(differing))}.</p>" if differing else ""
    parts += ["<h2>What the grid varies</h2>", pairs("field", "values", varied(grid)), others,
              "<h2>What all cells share</h2>", pairs("field", "value", alike)]  # fmt: skip
    for kind in ("versions", "hardware"):
        values = [(name, ", ".join(found)) for name, found in made[kind].items()]
        parts += [f"<h2>{kind.capitalize()}</h2>", pairs("name", "value", values)]
    size = f" --size {shlex.quote(grid.size)}" if grid.size else ""
    where = shlex.quote(str(folder.path))
    command = f"python train.py --grid grid.toml{size} --out {where}\npython evaluate.py {where}"
    parts += ["<h2>To reproduce it</h2>", f"<pre>{escape(command)}</pre>", "<p>grid.toml:</p>",
              f"<pre>{escape(grid.text)}</pre>"]  # fmt: skip
    head = f"{HEAD}<title>{escape(grid.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    return head + "\n".join(filter(None, parts)) + "\n</body>\n</html>\n"


def picture(drawn):
    png = base64.b64encode(drawn.paths[0].read_bytes()).decode()
    title, caption = html.escape(drawn.title), html.escape(drawn.caption)
    return (
        f"<figure>\n<img alt='{title}' src='data:image/png;base64,{png}'>\n"
        f"<figcaption><b>{title}.</b> {caption}</figcaption>\n</figure>"
    )


def bullets(texts):
    return "<ul>\n" + "\n".join(f"<li>{html.escape(text)}</li>" for text in texts) + "\n</ul>"


def pairs(name, value, found):
    lines = "\n".join(f"<tr><td>{html.escape(one)}</td><td>{html.escape(other)}</td></tr>" for one, other in found)
    return f"<div class='wide'><table>\n<tr><th>{name}</th><th>{value}</th></tr>\n{lines}\n</table></div>"


def varied(grid):
    """(field, its values) of what the grid varies."""
    found = []
    for name in grid.varied:
        values = dict.fromkeys(str(word(entry.varied[name])) for entry in grid.entries)
        found.append((name, ", ".join(values)))
    return found


def settings(grid):
    """([(field, value)] that all cells share, fields that differ though the grid does not name them)."""
    alike, differing = [], []
    for name in FIELDS:
        if name not in grid.varied:
            values = {str(word(value)) for entry in grid.entries if (value := value_of(entry.cell, name)) is not None}
            if len(values) > 1:
                differing.append(name)
            elif values and all(value_of(entry.cell, name) is not None for entry in grid.entries):
                alike.append((name, values.pop()))
            elif values:
                differing.append(name)
    return alike, differing
