"""`python evaluate.py RUN --explain`: where a shortcut lives in the adapter, and what the predictions rest on."""

import os
from pathlib import Path

import minilora
from minilora import files, parallel
from minilora.cell import Cell
from minilora.command import Parser, add_flags, given_flags
from minilora.console import quiet
from minilora.errors import InputError, to_type
from minilora.fields import marked

NAMES = "attention, attribution, spectrum, knockout, formation, neighbours"


def parser():
    made = Parser(
        prog=to_type("evaluate"),
        description="Look into a finished run: attention, attribution, the update's spectrum, knock-outs. The results "
        "are written as JSON, CSV and figures.",
    )
    made.add_argument("run", metavar="RUN",
                      help="folder of a finished run, or of a PEFT adapter (with --model and --data)")  # fmt: skip
    made.add_argument(
        "--explain", nargs="*", metavar="PART",
        help=f"what to look at: {NAMES}, or all (default: all that the run has data for)",
    )  # fmt: skip
    made.add_argument("--rows", type=int, metavar="N", help="test rows of other labels than the trigger's, stratified "
                      "(default: 60)")  # fmt: skip
    made.add_argument("--seed-rows", type=int, default=0, metavar="N", help="of the sample of rows (default: 0)")
    made.add_argument("--label", metavar="LABEL", help="that of the trigger to look at (default: the first trigger's)")
    made.add_argument("--data", dest="file", metavar="FILE", help="other labelled rows (default: the run's test rows)")
    made.add_argument(
        "--neighbours", dest="families", metavar="FILE",
        help="TOML file of further near-triggers for the part neighbours; a family of a known name replaces that one",
    )  # fmt: skip
    made.add_argument("--out", metavar="DIR", help="write the results to this folder (default: RUN/explain)")
    made.add_argument("-q", "--quiet", action="store_true", help="print only the result: no progress")
    made.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    add_flags(made, Cell, only=marked(Cell, "test"), default="the run's")
    return made


def main(argv):
    arguments = parser().parse_args(argv)
    parallel.refuse("a look into a run", "start that with python")
    if arguments.seed_rows < 0:
        raise InputError(f"--seed-rows is {arguments.seed_rows}, but must be at least 0")
    with quiet(arguments.quiet):
        look(arguments)


def look(arguments):
    from minilora.diagnostics import explain, text

    parts = [part for part in arguments.explain if part != "all"]
    explain.check_parts(parts)
    if "all" in arguments.explain:
        parts = []
    explain.check_parts(parts, arguments.families)
    rows = explain.ROWS if arguments.rows is None else arguments.rows
    out = Path(arguments.out) if arguments.out else Path(arguments.run) / "explain"
    if os.path.isdir(arguments.run):  # what is no folder is refused below, in words of its own
        files.try_folder(out, "--out")
    run = minilora.open(arguments.run, data=arguments.file, **given_flags(arguments, Cell))
    found = explain.explain(run, parts, rows, out, arguments.seed_rows, arguments.label, arguments.families)
    for number, (part, data) in enumerate(found.items()):
        print(*[""] * (number > 0), *text.lines_of(part, data), sep="\n")
    print("", f"written to {out}", sep="\n")
    refused = {part: data["left_out"] for part, data in found.items() if "left_out" in data}
    asked = {*parts, *["neighbours"] * (arguments.families is not None)}
    if why := [refused[part] for part in refused if part in asked or len(refused) == len(found)]:
        raise InputError(why[0])
