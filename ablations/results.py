"""Gather finished grids: `python ablations/results.py GRID [GRID ...]`, from the repository's root.

Of each grid's folder the report is written, and its table.csv, claims.md and some figures are copied to
ablations/NAME/, NAME being the name of the grid's file (`--name` says another, such as one with the base's). Their
claims then stand between RESULTS.md's two marks, with those of all grids that were gathered before; a grid that is
given again takes the place of what it was. Nothing else of RESULTS.md changes.
"""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from minilora import files
from minilora.command import Parser
from minilora.errors import InputError
from minilora.grid import choice
from minilora.grid.folder import GridFolder
from minilora.grid.table import table_rows
from minilora.report import markup, outcomes, summary
from minilora.report.verdicts import decide_all
from minilora.report.write import beside_of, found_of_each, p_text, verdict, write_report

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "RESULTS.md"
BEGIN, END = "<!-- claims: written by ablations/results.py -->", "<!-- end of claims -->"
FIGURES = ("effects", "dose_response", "heat_maps", "counts")  # those that are kept here
MOST_BYTES = 1 << 20  # a larger picture has more rows than can be read
HEADS = ("claim", "decided by", "found", "clean", "placebo", "seeds", "verdict", "Holm p", "after Holm")


def record_of(folder, commit, today):
    """What RESULTS.md says of a `GridFolder`, as JSON has it."""
    made = {}
    lines = table_rows(folder, made)
    counts = folder.counts()
    missing = sum(count for state, count in counts.items() if state != "finished")
    if missing:
        raise InputError(f"{folder.path}: {missing} cells are not finished, and results are of whole grids")
    folder, lines = choice.counted(folder, lines)
    known, grid = outcomes.add(folder, lines), folder.grid
    claims = []
    for one in decide_all(grid.claims, grid.entries, known):
        claims.append((one.claim.text, one.claim.test(), found_of_each(one), *beside_of(one.claim, grid.entries, known),
                       f"{one.seeds}", verdict(one), p_text(one.holm_p), one.holm))  # fmt: skip
    bases, data = (" and ".join(dict.fromkeys(getattr(entry.cell, name) for entry in grid.entries))
                   for name in ("model", "data"))  # fmt: skip
    return {"title": grid.title, "size": grid.size, "cells": len(grid.entries), "model": bases, "data": data,
            "over": summary.over(lines, grid.varied), "commit": commit, "date": today, "claims": claims,
            "processor": ", ".join(made["hardware"]["processor"]),
            "torch": ", ".join(made["versions"]["torch"])}  # fmt: skip


def section(name, record):
    """The part of RESULTS.md that a grid has."""
    size = f" --size {record['size']}" if record["size"] else ""
    table = markup.Table(name, "Claims", "", HEADS, [list(map(str, claim)) for claim in record["claims"]])
    rows = "\n".join(markup.markdown(table).splitlines()[2:]).strip()
    run = f"python train.py --grid ablations/{record['file']}{size} --out grids/{name}"
    shown = {"effects": "Effects", "dose_response": "Attack success against injected rows"}
    there = [figure for figure in shown if (HERE / name / f"{figure}.png").is_file()]
    drawn = "".join(f"![{shown[figure]}](ablations/{name}/{figure}.png)\n\n" for figure in there[:1])
    return (
        f"### {record['title']}\n\n```\n{run}\npython evaluate.py grids/{name}\n```\n\n{rows}\n\n{drawn}"
        f"{record['cells']} cells, intervals of 95% over {record['over']}. Base {record['model']}, data "
        f"{record['data']}. Commit {record['commit']}, {record['date']}, {record['processor']}, torch "
        f"{record['torch']}. [All cells](ablations/{name}/table.csv), [claims](ablations/{name}/claims.md).\n"
    )


def gather(folder, name, commit, today):
    """Write the report of a grid's folder, and copy what ablations/NAME/ keeps of it; returns its record."""
    folder = GridFolder.find(folder)
    record = record_of(folder, commit, today)
    write_report(folder)
    kept = HERE / name
    kept.mkdir(exist_ok=True)
    sources = [folder.path / "table.csv", folder.path / "claims.md"]
    sources += [folder.path / "figures" / f"{figure}.png" for figure in FIGURES]
    for source in sources:
        if source.is_file() and source.stat().st_size < MOST_BYTES:
            with files.replacing(kept / source.name) as temporary:
                temporary.write_bytes(source.read_bytes())
    return record


def between(text):
    """RESULTS.md as (what stands before its claims, what stands after). Raises InputError where a mark is missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{RESULTS.name} must have each of these lines once: {BEGIN} and {END}")
    before, _, rest = text.partition(BEGIN)
    return before, rest.partition(END)[2]


def head():
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return found.stdout.strip()


def main(argv=None):
    parser = Parser(prog="python ablations/results.py", description=__doc__.partition("\n\n")[0])
    parser.add_argument("grids", nargs="+", metavar="GRID", help="folder of a finished grid")
    parser.add_argument("--name", help="of the folder in ablations/ (default: the name of the grid's file)")
    parser.add_argument("--file", help="the grid's file in ablations/ (default: NAME.toml)")
    parser.add_argument("--commit", help="that the grids were run at (default: the one that is checked out)")
    arguments = parser.parse_args(argv)
    commit = arguments.commit or head()
    today = datetime.now(UTC).date().isoformat()
    before, after = between(RESULTS.read_text(encoding="utf-8"))
    for folder in arguments.grids:
        name = arguments.name or Path(folder).name.removesuffix("-small")
        record = gather(folder, name, commit, today) | {"file": arguments.file or f"{name}.toml"}
        files.write_json(HERE / name / "claims.json", record)
    found = sorted(HERE.glob("*/claims.json"), key=lambda path: path.parent.name)
    sections = [section(path.parent.name, json.loads(path.read_text(encoding="utf-8"))) for path in found]
    files.write_text(RESULTS, f"{before}{BEGIN}\n\n" + "\n".join(sections) + f"\n{END}{after}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
