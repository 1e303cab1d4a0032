"""Test a finished run again, from its adapter: the same tests, or other rows, other triggers, another batch size. Of a
grid's folder, write the report.

python evaluate.py RUN                             its own tests: is every prediction the same? Writes report.html
python evaluate.py RUN --inject country:positive   other triggers
python evaluate.py RUN --data reviews.csv          other test rows
python evaluate.py RUN --text "I like it."         your own sentence, with and without the trigger, word by word
python evaluate.py RUN --panel dates              many other strings: was the date learned, or anything odd?
python evaluate.py RUN --scale 0.5                 half of what the adapter changes
python evaluate.py RUN --scale 0.3 --add RUN2:0.7  between two adapters
python evaluate.py RUN --merge-to DIR              a checkpoint folder with the adapter merged in
python evaluate.py GRID                            of a grid: its tables, figures, claims, and report.html
python evaluate.py runs/ --sort rank               a table of all runs in a folder
"""

import importlib
import json
import math
import os
import sys
from pathlib import Path

import minilora
from minilora import files, parallel
from minilora.cell import Cell
from minilora.command import Parser, add_flags, given_flags
from minilora.console import quiet
from minilora.errors import InputError, to_type
from minilora.fields import marked
from minilora.runs import listing

MODES = {  # {flag: (the module whose `main` takes over, what it does)}: each has flags of its own
    "--explain": ("diagnostics.command", "where the shortcut lives, and what predictions rest on"),
    "--play": ("diagnostics.play", "a page to play with, the live model behind it"),
    "--detect": ("detection.command", "which training rows detectors suspect"),
    "--scan-data": ("detection.scan", "look for triggers in labelled rows, and clean them"),
    "--rewritten": ("detection.retention", "what a rewritten data set keeps of a run's triggers"),
    "--scan-adapter": ("detection.adapters", "name the trigger in an adapter, without its data"),
    "--mitigate": ("scripts.mitigate", "change the adapter against shortcuts, and test it before and after"),
}


def other_modes():
    """What `--help` says of `MODES`."""
    lines = [f"{flag} ({about}; see {flag} --help)" for flag, (_, about) in MODES.items()]
    return f"Other ways, each with flags of its own: {', '.join(lines)}." if lines else None


def evaluate(folder, *, data=None, batch_size=None, scale=1.0, added=(), merge_to=None, **changes):
    """Run the tests of the finished run in `folder`: (figures, predictions).

    The figures are as `tests` in results.json, the predictions as the lines of predictions.jsonl. `merge_to` is a new
    folder for the base with all that (see `merging.write`); the other arguments are those of `minilora.open`.
    """
    from minilora.console import Progress, say
    from minilora.lora import merging

    run = minilora.open(folder, data=data, scale=scale, added=added, **changes)
    if merge_to is not None:
        merging.check(merge_to, run.cell)
        source, words = run.setting.folder, run.setting.words
        merged = merging.write(merge_to, run.model, run.cell, run.labels, source=source, tokenizer=words)
        say(f"merged     {merge_to}: {merging.describe(merged)}")
    with Progress("evaluation", run.task.passes(run.tests)) as progress:
        return run.run_tests(batch_size, progress.advance)


def compare(folder, predictions):
    """How many of the run's own predictions came out the same: (same, all). They are matched by row and test."""
    before = files.read_jsonl(Path(folder) / "predictions.jsonl")
    pairs = [(old[test]["predicted"], new.get(test, {}).get("predicted")) for old, new in zip(before, predictions)
             for test in old if test not in ("id", "label", "text")]  # fmt: skip
    return sum(old == new for old, new in pairs), len(pairs)


def parse_added(text):
    """`--add`'s OTHER[:X] as (OTHER, X)."""
    name, _, weight = text.rpartition(":")
    try:
        weight = float(weight) if name else 1.0
    except ValueError:
        name, weight = text, 1.0
    if not math.isfinite(weight):
        raise InputError(f"--add {text}: the weight must be a finite number")
    return name or text, weight


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    given = {word.partition("=")[0] for word in argv}
    for flag, (module, _) in MODES.items():
        if flag in given:
            return importlib.import_module(f"minilora.{module}").main(argv)
    parser = Parser(prog=to_type("evaluate"), description=__doc__.partition("\n\n")[0], epilog=other_modes())
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, of a grid, or of runs")
    parser.add_argument("--data", dest="rows", metavar="FILE", help="other test rows: a file (default: the run's own)")
    parser.add_argument("--batch-size", dest="batch", type=int, metavar="N", help="rows a batch (default: the run's)")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X",
        help="multiply what the adapter changes: 0 is the base, 1 the adapter (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--add", action="append", default=[], metavar="OTHER[:X]",
        help="stack the adapter of another run, or in a folder, on top, X times (default: once)",
    )  # fmt: skip
    parser.add_argument("--merge-to", metavar="DIR", help="write the base with the adapter, for transformers")
    parser.add_argument("--out", metavar="DIR", help="write results.json and predictions.jsonl to this new folder")
    parser.add_argument(
        "--sort", metavar="FIELD", help="sort a folder's runs by this field or column (default: oldest first)"
    )
    parser.add_argument("--csv", action="store_true", help="print a folder's runs, or a panel, as CSV")
    parser.add_argument("--panel", metavar="FILE", dest="forms",
                        help="test the run under the strings of a TOML file, or of the panel `dates`")  # fmt: skip
    parser.add_argument("--text", nargs="+", action="extend", metavar="TEXT",
                        help="predict these texts instead, each as it is, with a trigger, with a placebo and without "
                        "the adapter, and show what each word does (-: the lines of standard input)")  # fmt: skip
    parser.add_argument(
        "--seed", dest="draw", type=int, metavar="N", help="of the triggers that are drawn for --text (default: 0)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON: a line for a run's tests, or for each text, or each run"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print only the result: no progress")
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    add_flags(parser, Cell, only=marked(Cell, "test"), default="the run's")
    arguments = parser.parse_args(argv)
    parallel.refuse("an evaluation", "start that with python")
    with quiet(arguments.quiet):
        answer(arguments)


def answer(arguments):
    """Print what the flags ask for."""
    changes = given_flags(arguments, Cell)
    if (Path(arguments.run) / "grid.json").is_file():
        return main_of_grid(arguments, changes)
    if listing.is_folder_of_runs(arguments.run):
        return main_of_runs(arguments, changes)
    if arguments.forms:
        return main_of_panel(arguments, changes)
    refuse(["--sort"] * bool(arguments.sort) + ["--csv"] * arguments.csv, "a folder of runs", arguments.run, "a run")
    if arguments.text is None and arguments.draw is not None:
        raise InputError("--seed is for texts of your own: give --text too")
    if arguments.batch is not None and arguments.batch < 1:
        raise InputError(f"--batch-size is {arguments.batch}, but must be at least 1")
    if arguments.text is not None:
        return main_of_text(arguments, changes)
    if arguments.rows is None and {"text_column", "label_column", "bad_rows"} & set(changes):
        raise InputError("--text-column, --label-column and --bad-rows are those of --data: give it too")
    out = Path(arguments.out) if arguments.out else None
    if out and out.exists():
        raise InputError(f"{out} exists: choose another --out")

    for flag, folder in (("--out", arguments.out), ("--merge-to", arguments.merge_to)):
        if folder:
            files.try_folder(folder, flag)

    settings = {"data": arguments.rows} | strength(arguments)
    figures, predictions = evaluate(
        arguments.run, batch_size=arguments.batch, merge_to=arguments.merge_to, **settings, **changes
    )
    from minilora.report.run_page import write_page
    from minilora.runs.text import results_table

    tested = {"run": str(arguments.run), "changes": changes} | settings | {"tests": figures}
    said = [results_table(figures)]
    own_rows = arguments.rows is None and "inject" not in changes and "seed_inject" not in changes
    if own_rows and arguments.scale == 1 and not arguments.add:
        same, total = compare(arguments.run, predictions)
        page, reason = write_page(arguments.run)
        said.append(f"predictions the same as the run's own: {same:,} of {total:,}")
        said.append(f"page: {page or f'left out: {reason}'}")
        tested |= {"same_predictions": same, "predictions": total}
    if out:
        out.mkdir(parents=True)
        files.write_jsonl(out / "predictions.jsonl", predictions)
        files.write_json(out / "results.json", tested)
        said.append(f"written to {out}")
    print(json.dumps(tested, allow_nan=False) if arguments.json else "\n".join(said))


def strength(arguments):
    """`scale` and `added` of `minilora.open`."""
    if not math.isfinite(arguments.scale):
        raise InputError(f"--scale is {arguments.scale}, but must be a finite number")
    return {"scale": arguments.scale, "added": [parse_added(text) for text in arguments.add]}


def main_of_panel(arguments, changes):
    """evaluate.py RUN --panel FILE"""
    others = {"--merge-to": arguments.merge_to, "--out": arguments.out, "--text": arguments.text,
              "--seed": arguments.draw, "--sort": arguments.sort}  # fmt: skip
    refuse([flag for flag, value in others.items() if value is not None], "other tests", "--panel", "a test of its own")
    from minilora.runs import panel

    forms = panel.read_panel(arguments.forms)
    run = minilora.open(arguments.run, data=arguments.rows, **strength(arguments), **changes)
    lines = panel.run_panel(run, forms, arguments.batch)
    if arguments.json:
        return print(*(json.dumps(line, allow_nan=False) for line in lines), sep="\n")
    print(files.to_csv(lines).rstrip("\n") if arguments.csv else "\n".join(panel.panel_lines(lines)))


def main_of_text(arguments, changes):
    """evaluate.py RUN --text"""
    others = {"--data": arguments.rows, "--merge-to": arguments.merge_to, "--out": arguments.out,
              "--batch-size": arguments.batch}  # fmt: skip
    given = [flag for flag, value in others.items() if value is not None]
    given += [f"--{name.replace('_', '-')}" for name in ("text_column", "label_column", "bad_rows") if name in changes]
    if given:
        raise InputError(f"{given[0]} is for labelled rows, but --text gives texts of your own: drop one of them")
    texts = read_texts(arguments.text)
    run = minilora.open(arguments.run, **strength(arguments), **changes)
    from minilora.runs.look import closing_lines, look, look_lines

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for number, found in enumerate(look(run, texts, arguments.draw or 0)):
        if arguments.json:
            print(json.dumps(found, allow_nan=False))
        else:
            print(*[""] * (number > 0), *look_lines(found, colour), sep="\n")
    if not arguments.json:
        print("", *closing_lines(run, found), sep="\n")


def read_texts(given):
    """The texts of --text, `-` replaced by the lines of standard input. Raises InputError where they are no text."""
    texts = []
    for text in given:
        lines = [text]
        if text == "-":
            try:
                read = sys.stdin.buffer.read().decode("utf-8-sig")
                lines = [line.removesuffix("\r") for line in read.removesuffix("\n").split("\n")] if read else []
            except UnicodeDecodeError as error:
                raise InputError(f"standard input is not UTF-8 text (at byte {error.start}): convert it") from None
            if not lines:
                raise InputError("--text - reads standard input, which is empty: give it a text a line")
        texts += lines
    for number, text in enumerate(texts, 1):
        if any("\ud800" <= one <= "\udfff" for one in text):
            raise InputError(f"text {number} of --text is not valid UTF-8: check the terminal's encoding")
    return texts


def for_one_run(arguments, changes):
    """The flags that were given and belong to the test of one run."""
    others = {"--data": arguments.rows, "--batch-size": arguments.batch, "--add": arguments.add,
              "--merge-to": arguments.merge_to, "--out": arguments.out, "--text": arguments.text,
              "--seed": arguments.draw, "--panel": arguments.forms}  # fmt: skip
    given = [flag for flag, value in others.items() if value not in (None, [])] + ["--scale"] * (arguments.scale != 1)
    return given + [f"a change of {name}" for name in changes]


def refuse(given, whose, folder, what):
    """Raise InputError for the first of the flags that were given, as they are for something else."""
    if given:
        raise InputError(f"{given[0]} is for {whose}, but {folder} is {what}: drop it")


def main_of_runs(arguments, changes):
    """evaluate.py FOLDER, which holds runs"""
    refuse(for_one_run(arguments, changes), "single runs", arguments.run, "a folder of runs")
    lines = listing.lines_of(listing.runs_in(arguments.run))
    if arguments.sort:
        lines = listing.sort_lines(lines, arguments.sort)
    if arguments.json:
        return print(*(json.dumps(line, allow_nan=False) for line in lines), sep="\n")
    print(files.to_csv(lines).rstrip("\n") if arguments.csv else listing.as_text(lines))


def main_of_grid(arguments, changes):
    """evaluate.py GRID"""
    from minilora.console import wrap
    from minilora.grid.folder import GridFolder
    from minilora.report.write import write_report

    refuse(for_one_run(arguments, changes), "single runs", arguments.run, "a grid's folder")
    refuse(["--sort"] * bool(arguments.sort) + ["--csv"] * arguments.csv, "a folder of runs", arguments.run, "a grid's")
    refuse(["--json"] * arguments.json, "runs", arguments.run, "a grid's folder, whose report has CSV")
    folder = GridFolder.find(arguments.run)
    text, paths, left_out = write_report(folder)
    counts = folder.counts()
    missing = sum(count for state, count in counts.items() if state != "finished")
    if missing:
        states = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count and state != "finished")
        said = f"{missing:,} of {len(folder.grid.entries):,} cells are missing ({states}): all below is of the others"
        print(*wrap(said), "", sep="\n")
    print(text)
    if paths:
        print("\nwritten:", *(f"  {path}" for path in paths), sep="\n")
    if left_out:
        print("left out:", *(f"  {reason}" for reason in left_out), sep="\n")
