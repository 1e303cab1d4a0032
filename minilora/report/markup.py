"""A table of words, as Markdown, LaTeX, HTML, or plain text."""

import html
import re
from dataclasses import dataclass

from minilora.console import COLUMNS

WIDE = 40  # characters, from which on a column of a LaTeX table has its lines broken
LATEX = {"\\": r"\textbackslash{}", "<": r"\textless{}", ">": r"\textgreater{}", "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}"} | {character: "\\" + character for character in "&%$#_{}"}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """`name` is its file's; `heads` and each of `lines` are strings, one a column."""

    name: str
    title: str
    note: str
    heads: tuple
    lines: list


def markdown(table):
    def line(cells):
        return "| " + " | ".join(" ".join(re.sub(r"([\\|<>*_`])", r"\\\1", cell).split()) for cell in cells) + " |"

    rule = "|" + " --- |" * len(table.heads)
    lines = [f"**{table.title}**", "", line(table.heads), rule, *map(line, table.lines), "", table.note]
    return "\n".join(lines).rstrip() + "\n"


def latex(table):
    """A table environment, for `\\usepackage{booktabs}`."""

    def escape(text):
        return "".join(LATEX.get(character, character) for character in " ".join(text.split()))

    def line(cells):
        return " & ".join(map(escape, cells)) + r" \\"

    wide = [max(map(len, column)) > WIDE for column in zip(table.heads, *table.lines)]
    share = 0.8 / max(1, sum(wide) + 1)
    columns = "".join(rf"p{{{share:.2f}\linewidth}}" if broken else "l" for broken in wide)
    return "\n".join([
        "% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small",
        rf"\caption{{{escape(f'{table.title}. {table.note}')}}}",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(table.heads), r"\midrule",
        *map(line, table.lines), r"\bottomrule", r"\end{tabular}", r"\end{table}",
    ]) + "\n"  # fmt: skip


def as_html(table):
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join([
        "<figure>", f"<figcaption><b>{html.escape(table.title)}.</b> {html.escape(table.note)}</figcaption>",
        "<div class='wide'><table>", "<thead>", line(table.heads, "th"), "</thead>", "<tbody>",
        *(line(cells, "td") for cells in table.lines), "</tbody>", "</table></div>", "</figure>",
    ])  # fmt: skip


def text(heads, lines):
    """Columns of words in lines of at most 100 columns: where they would be longer, the first column is cut. A line of
    one word alone is a heading."""
    rows = [heads, *(line for line in lines if len(line) > 1)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    widths[0] = max(8, min(widths[0], COLUMNS - sum(width + 2 for width in widths[1:])))
    found = []
    for first, *rest in (heads, *lines):
        if rest and len(first) > widths[0]:
            first = first[: widths[0] - 1] + "…"
        found.append("  ".join(f"{cell:<{width}}" for cell, width in zip((first, *rest), widths)).rstrip()[:COLUMNS])
    return "\n".join(found)
