"""report.html: a grid's report in one file that loads nothing, from the network or from the disk."""

import base64
import shlex
from collections import Counter

from jinja2 import Environment, StrictUndefined

from minilora.console import visible
from minilora.fields import value_of
from minilora.grid.axes import FIELDS, word

MOST = 200  # failed cells that are listed
PAGE = """\
{% macro table(heads, lines) %}
<div class='wide'><table>
<thead><tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for cells in lines %}
<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ grid.title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin-top: 2.5rem }
figure { margin: 1rem 0 2rem } figcaption { font-size: .9rem; margin-bottom: .6rem; max-width: 48rem }
.wide { overflow-x: auto } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd }
th { border-bottom: 1px solid #1a1a1a } thead th { white-space: nowrap }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: .85rem }
</style>
</head>
<body>
<h1>{{ grid.title }}</h1>
{% if grid.source %}
<p>After: {{ grid.source }}</p>
{% endif %}
<p>{{ "{:,}".format(grid.entries | length) }} cells:
{% for state, count in counts.items() %}
{{ "{:,}".format(count) }} {{ state }}{{ "." if loop.last else "," }}
{% endfor %}
</p>
{% if counts.keys() - ["finished", "failed"] %}
<p><b>The grid is not finished: all that follows is of the cells that are.</b></p>
{% endif %}
{% for one in tables %}
<h2>{{ one.title }}</h2>
<figure>
<figcaption><b>{{ one.title }}.</b> {{ one.note }}</figcaption>
{{ table(one.heads, one.lines) }}</figure>
{% endfor %}
<h2>Figures</h2>
{% for one in drawn %}
<figure>
<img alt="{{ one.title }}" src="data:image/png;base64,{{ encode(one.paths[0]) }}">
<figcaption><b>{{ one.title }}.</b> {{ one.caption }}</figcaption>
</figure>
{% endfor %}
{% if left_out %}
<h2>Left out</h2>
<ul>
{% for reason in left_out %}
<li>{{ reason }}</li>
{% endfor %}
</ul>
{% endif %}
{% if failed %}
<h2>Failed cells</h2>
{{ table(["cell", "error"], failed[:most]) }}
{% if failed | length > most %}
<p>and {{ "{:,}".format(failed | length - most) }} more, in table.csv</p>
{% endif %}
{% endif %}
<h2>What the grid varies</h2>
{{ table(["field", "values"], varied) }}
{% if differing %}
<p>Following from these: {{ differing | join(", ") }}.</p>
{% endif %}
<h2>What all cells share</h2>
{{ table(["field", "value"], alike) }}
{% for kind in ["versions", "hardware"] %}
<h2>{{ kind | capitalize }}</h2>
<div class='wide'><table>
{% for name, found in made[kind].items() %}
<tr><td>{{ name }}</td><td>{{ found | join(", ") }}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
<h2>To reproduce it</h2>
<pre>python train.py --grid grid.toml{{ size }} --out {{ where }}
python evaluate.py {{ where }}</pre>
<p>grid.toml:</p>
<pre>{{ grid.text }}</pre>
</body>
</html>
"""


def render(folder, lines, tables, drawn, made, left_out):
    """The page's text, with all that it is given escaped for HTML.

    `tables` are `markup.Table`s, `drawn` `drawing.Drawn`s, `made` as in `grid.table.table_rows`, `left_out` reasons.
    """
    grid = folder.grid
    alike, differing = settings(grid)
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # what is HTML already stays as it is
    ).from_string(PAGE)  # fmt: skip
    return page.render(
        grid=grid, tables=tables, drawn=drawn, made=made, left_out=left_out, most=MOST, alike=alike,
        differing=differing,
        counts=Counter({line["cell"]: line["state"] for line in lines}.values()),
        failed=[(line["cell"], line["error"] or "") for line in lines if line["state"] == "failed"],
        varied=[(name, ", ".join(dict.fromkeys(str(word(entry.varied[name])) for entry in grid.entries)))
                for name in grid.varied],
        size=f" --size {shlex.quote(grid.size)}" if grid.size else "", where=shlex.quote(str(folder.path)),
        encode=lambda path: base64.b64encode(path.read_bytes()).decode(),
    )  # fmt: skip


def settings(grid):
    """([(field, value)] that all cells share, fields that differ though the grid does not name them)."""
    alike, differing = [], []
    for name in FIELDS:
        if name not in grid.varied:
            found = [value_of(entry.cell, name) for entry in grid.entries]
            values = {None if value is None else str(word(value)) for value in found}
            if len(values) > 1:
                differing.append(name)
            elif values != {None}:
                alike.append((name, *values))
    return alike, differing
