"""A page in one HTML file that fetches nothing, from the network or from the disk: of a grid or of a run.

`grid_page.py` and `run_page.py` say what stands on a page, in `Section`s; here is how it looks. All text is escaped,
and control characters are written out. Only `Markup`, which the functions here make, is HTML already.
"""

from dataclasses import dataclass
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from minilora.console import visible
from minilora.drawing import PAPER

NUMBERS = frozenset("0123456789.,+-e%[]<>()× ")  # the characters of numbers, shapes and intervals
SHORT = 24  # characters: shorter cells of a table stay on one line
AROUND = 160  # characters shown on both sides of a span in a long text


@dataclass(frozen=True)
class Block:
    """What a section shows, with a note above it. `kind` says what `content` is:

    text    a paragraph
    code    lines of a file
    list    lines
    table   (heads, lines): a string or `Markup` a cell
    figure  (title, picture as `Markup`, caption)
    rows    [(text as `Markup`, what was predicted of it)]
    """

    kind: str
    content: object
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page: its title, and its `Block`s; where it is `folded` a click opens it."""

    title: str
    blocks: list
    folded: bool = False


PAGE = """\
{% macro table(heads, lines) %}
{% set numeric = numeric_columns(lines) %}
<div class="wide{{ ' tall' if lines | length > 40 }}" tabindex="0"><table>
{% if heads %}
<thead><tr>
{%- for head in heads %}
<th class="{{ 'n ' if loop.index0 in numeric }}{{ look(head) }}">{{ head }}</th>
{%- endfor -%}
</tr></thead>
{% endif %}
<tbody>
{% for cells in lines %}
<tr>
{%- for cell in cells %}
<td class="{{ 'n' if loop.index0 in numeric else look(cell) }}">{{ cell }}</td>
{%- endfor -%}
</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
{% macro show(block) %}
{% if block.note %}
<p class="note">{{ block.note }}</p>
{% endif %}
{% if block.kind == "table" %}
{{ table(*block.content) }}
{%- elif block.kind == "figure" %}
{% set title, picture, caption = block.content %}
<figure>
{% if title %}
<h3>{{ title }}</h3>
{% endif %}
<div class="wide" tabindex="0">{{ picture }}</div>
{% if caption %}
<figcaption>{{ caption }}</figcaption>
{% endif %}
</figure>
{% elif block.kind == "rows" %}
<ul class="rows">
{% for text, said in block.content %}
<li><p>{{ text }}</p><p class="said">{{ said }}</p></li>
{% endfor %}
</ul>
{% elif block.kind == "list" %}
<ul>
{% for line in block.content %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% elif block.kind == "code" %}
<pre tabindex="0">{{ block.content }}</pre>
{% else %}
<p>{{ block.content }}</p>
{% endif %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
{{ style }}.rows { list-style: none; padding: 0 } .rows li { padding: .5rem 0; border-bottom: 1px solid var(--rule) }
.rows p { margin: 0; white-space: pre-wrap }
.curves { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem } .curves div { flex: 1 1 20rem; max-width: 34rem }
.curve { display: block; width: 100% }
.curve text { font: 11px system-ui, sans-serif; fill: var(--ink) } .curve .rule { stroke: var(--rule) }
.curve path { fill: none; stroke: currentColor; stroke-width: 1.8 }
.curve circle { fill: currentColor }
.hit { color: var(--hit) } .right { color: var(--right) }
.before { color: var(--before) } .placebo { color: var(--placebo) }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for line in lead %}
<p>{{ line }}</p>
{% endfor %}
{% for section in sections %}
{% if section.folded %}
<details>
<summary>{{ section.title }}</summary>
{% else %}
<section>
<h2>{{ section.title }}</h2>
{% endif %}
{% for block in section.blocks %}
{{ show(block) }}
{%- endfor %}
</{{ "details" if section.folded else "section" }}>
{% endfor %}
</body>
</html>
"""


def render(title, lead, sections):
    """The page's text; `lead` are the paragraphs below its title."""
    made = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    ).from_string(PAGE)  # fmt: skip
    return made.render(
        title=title, lead=lead, sections=sections, style=Markup(PAPER), look=look, numeric_columns=numeric_columns
    )


def is_number(cell):
    """Whether a cell is a number, with or without its interval, or says that there is none."""
    return cell in ("", "-") or NUMBERS.issuperset(cell) and any(map(str.isdigit, cell))


def look(cell):
    """How a cell that is in no column of numbers is set: an interval in it never breaks over lines."""
    return "short" if len(cell) <= SHORT or is_number(cell) else "long"


def numeric_columns(lines):
    """The places of the columns in which every cell `is_number`."""
    return {place for place, column in enumerate(zip(*lines, strict=True)) if all(map(is_number, column))}


# --- HTML made of text


def html(form, *values):
    """`form` with escaped `values`, strings or `Markup`, in its braces."""
    return Markup(form).format(*(visible(value) if type(value) is str else value for value in values))


def join(parts, between=""):
    return Markup(between).join(parts)


def link(text, *path):
    """A link to the file or folder with these names below the page's own folder."""
    return html('<a href="{}">{}</a>', "/".join(quote(name, safe="") for name in path), text)


def links(folder, names):
    """Links to those of `names`, beside the page in `folder`, that exist."""
    return join((link(name, *name.split("/")) for name in names if (folder / name).exists()), ", ")


def marked(text, spans):
    """A text with its `spans` [(start, end)] marked; of a long one only what stands around them."""
    pieces, place = [], 0
    for start, end in sorted(spans):
        pieces.append(html("{}", shortened(text[place:start], bool(pieces), True)))
        inner = text[start:end]
        lead = inner[: len(inner) - len(inner.lstrip())]
        tail = inner[len(inner.rstrip()) :] if inner.strip() else ""
        pieces.append(html("{}<mark>{}</mark>{}", lead, inner.strip(), tail))
        place = end
    return join([*pieces, html("{}", shortened(text[place:], bool(pieces), False))])


def shortened(text, after, before):
    """A long piece of a text without what is far from the spans that it stands `after` and `before`."""
    ends = AROUND * after, AROUND * before
    if not any(ends):
        ends = 2 * AROUND, 0
    if len(text) <= sum(ends) + 20:
        return text
    return text[: ends[0]] + " … " + text[len(text) - ends[1] :]
