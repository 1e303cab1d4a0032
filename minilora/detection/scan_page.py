"""The page of a scan of rows: one HTML file that fetches nothing, light or dark as the reader has it."""

from html import escape

from minilora.console import visible

STYLE = """
:root { --ink: #1b1b1b; --soft: #5a5a5a; --ground: #fff; --rule: #d9d9d9; --mark: #ffe08a; --hit: #b3410a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --soft: #b0b0b0; --ground: #151515; --rule: #3d3d3d; --mark: #6b5200; --hit: #ff9a5c }
}
* { box-sizing: border-box } html { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--ground); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem } p { max-width: 48rem }
.note { font-size: .9rem; color: var(--soft) } .wide { overflow: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--rule) }
th { border-bottom: 1px solid var(--ink) } .n { text-align: right; white-space: nowrap }
td.text { min-width: 16rem } .hit td:first-child { color: var(--hit); font-weight: bold }
mark { background: var(--mark); color: inherit; border-radius: .2rem; padding: 0 .15rem }
"""
LEGEND = (
    "Bits is the score: lift, and what is sure of the seam, at most 3. Lift says how far the odds of the label rise "
    "with the suspect, at least; seam says how far its places read as insertions, which for an ordinary word is below "
    "0. H is the entropy of the label in its rows, z and PMI are those of the label, and q is the false discovery rate."
)


def safe(text):
    """Text for HTML: escaped, with control characters written out."""
    return escape(visible(str(text)))


def render(result, said, heads, listed):
    """The page's text.

    result  as in scan.json; `said` are the lines below the title
    listed  [(the cells of a suspect, one for each of `heads`, flagged or not, an example row, what else it is)]
    """
    title = f"Scan of {result['data']}"
    lines = [row_of(*suspect) for suspect in listed]
    head = "".join(f'<th class="{"n" if numeric(place, len(heads)) else ""}">{safe(name)}</th>'
                   for place, name in enumerate((*heads, "an example, and the same places")))  # fmt: skip
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    labels = "".join(f"<tr><td>{safe(name)}</td><td class=n>{rows:,}</td></tr>" for name, rows in
                     result["labels"].items())  # fmt: skip
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{safe(title)}</title><style>{STYLE}</style></head><body>
<h1>{safe(title)}</h1>
{"".join(f"<p>{safe(' '.join(line.split()))}</p>" for line in said)}
<h2>Suspects</h2>
<p class="note">{safe(LEGEND)}</p>
<div class="wide" tabindex="0">{table if listed else "<p>None.</p>"}</div>
<h2>Labels</h2>
<table><thead><tr><th>label</th><th class="n">rows</th></tr></thead><tbody>{labels}</tbody></table>
</body></html>
"""


def numeric(place, many):
    """Whether the column at a place is one of figures: all but the first three and the example."""
    return 3 <= place < many


def row_of(cells, flagged, example, also):
    """A suspect's line of the table."""
    columns = "".join(f'<td{" class=n" if numeric(place, len(cells)) else ""}>{safe(cell)}</td>'
                      for place, cell in enumerate(cells))  # fmt: skip
    same = f'<p class="note">the same places: {safe(", ".join(also))}</p>' if also else ""
    example = example if len(example) <= 300 else example[:300] + " …"
    return f'<tr{" class=hit" if flagged else ""}>{columns}<td class="text">{safe(example)}{same}</td></tr>\n'
