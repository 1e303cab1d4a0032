"""report.html of a grid: claims, means, figures, cells, and what it takes to reproduce them."""

import base64
from collections import Counter

from minilora.errors import to_type
from minilora.fields import value_of
from minilora.grid.axes import ATTACKS, FIELDS, word
from minilora.report.page import Block, Markup, Section, html, link, links, render
from minilora.report.summary import RATES

MOST = 200  # lines of cells, and failed cells, that are listed
FILES = ("grid.toml", "table.csv", "table.parquet", "marginals.md", "marginals.tex", "k50.md", "k50.tex", "counts.md",
         "counts.tex", "claims.md", "claims.tex", "choices.md", "choices.tex", "figures")  # fmt: skip


def page_of(folder, lines, tables, drawn, made, left_out):
    """The page's text.

    `tables` are `markup.Table`s, `drawn` `drawing.Drawn`s, `made` as in `grid.table.table_rows`, `left_out` reasons.
    """
    grid, where = folder.grid, folder.path
    alike, differing = settings(grid)
    figures = {one.paths[0].stem: one for one in drawn}
    sections = []
    for one in tables:
        own = figures.pop(one.name, None)  # a figure that shows a table stands with it
        blocks = [Block("figure", ("", picture(own), own.caption))] if own else []
        sections.append(Section(one.title, [Block("table", (one.heads, one.lines), one.note), *blocks]))
    if figures:
        blocks = [Block("figure", (one.title, picture(one), one.caption)) for one in figures.values()]
        sections.append(Section("Figures", blocks))
    if left_out:
        sections.append(Section("Left out", [Block("list", left_out)]))
    sections.append(Section("Cells", cells(folder, lines)))
    failed = [(cell_link(folder, line["cell"]), line["error"] or "") for line in lines if line["state"] == "failed"]
    if failed:
        sections.append(Section("Failed cells", [Block("table", (("cell", "error"), failed[:MOST])), *rest(failed)]))
    varied = [(name, ", ".join(dict.fromkeys(str(word(entry.varied[name])) for entry in grid.entries)))
              for name in grid.varied]  # fmt: skip
    follow = [Block("text", f"Following from these: {', '.join(differing)}.")] if differing else []
    size = ["--size", grid.size] if grid.size else []
    again = f"{to_type('train', '--grid', 'grid.toml', *size, '--out', where)}\n{to_type('evaluate', where)}"
    sections += [
        Section("What the grid varies", [Block("table", (("field", "values"), varied)), *follow]),
        Section("What all cells share", [Block("table", (("field", "value"), alike))], folded=True),
        *(Section(kind.capitalize(), [Block("table", ((), [(name, ", ".join(own)) for name, own in values.items()]))],
                  folded=True) for kind, values in made.items()),
        Section("To reproduce it", [Block("code", again)]),
        Section("grid.toml", [Block("code", grid.text)], folded=True),
    ]  # fmt: skip
    return render(grid.title, lead(folder, lines), sections)


def lead(folder, lines):
    grid = folder.grid
    counts = Counter({line["cell"]: line["state"] for line in lines}.values())
    states = ", ".join(f"{count:,} {state}" for state, count in counts.items())
    found = [f"After: {grid.source}"] if grid.source else []
    found.append(f"{len(grid.entries):,} cells: {states}.")
    if counts.keys() - {"finished", "failed"}:
        found.append(html("<b>The grid is not finished: all that follows is of the cells that are.</b>"))
    return [*found, html("Files: {}.", links(folder.path, FILES))]


def picture(drawn):
    """The SVG itself, whose ids start with the figure's name and which has no title; else the PNG."""
    png = drawn.paths[0]
    svg = png.with_suffix(".svg")
    if svg.exists():
        return Markup(svg.read_text(encoding="utf-8"))
    data = base64.b64encode(png.read_bytes()).decode()
    return html('<img alt="{}" src="data:image/png;base64,{}">', drawn.title, data)


def cells(folder, lines):
    """A table with a line for each cell and trigger, the cells linked to their folders or pages."""
    names = ("clean_accuracy", RATES[0], "attack_success", RATES[1], *ATTACKS[1:])
    heads = ("cell", "target label", "clean accuracy", "attack success: clean rows", "under the trigger",
             "under the placebo", "net", "over the placebo", "conditional")  # fmt: skip
    found = [
        (cell_link(folder, line["cell"]), line["label"] or "",
         *("-" if line[name] is None else f"{line[name]:.3f}" for name in names))
        for line in lines if line["state"] == "finished"
    ]  # fmt: skip
    return [Block("table", (heads, found[:MOST])), *rest(found)]


def rest(found):
    more = len(found) - MOST
    return [Block("text", html("and {} more, in {}", f"{more:,}", link("table.csv", "table.csv")))] if more > 0 else []


def cell_link(folder, name):
    """A link to a cell's page, or where it has none to its folder."""
    path = ("cells", name, "report.html")
    return link(name, *(path if folder.path.joinpath(*path).exists() else path[:2]))


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
