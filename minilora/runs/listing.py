"""A table of the runs in a folder: the fields in which they differ, and what came out."""

import os
from pathlib import Path

from minilora import console, files
from minilora.cell import Cell
from minilora.errors import InputError, shown
from minilora.fields import declared, near, run_options, value_of, word
from minilora.runs.folder import LOCK, Run
from minilora.runs.text import warnings

FIGURES = {  # the head of each in a table, its column in CSV
    "accuracy": "clean_accuracy",
    "attack": "attack_success",
    "clean": "attack_success_clean",
    "placebo": "attack_success_placebo",
    "net": "net_attack_success",
}
NOTE = (
    "attack: the share of rows of other labels that the trigger turns to its label; clean, placebo: without it; "
    "net: attack less clean"
)


def is_folder_of_runs(path):
    """Whether runs lie in the folder at `path`, and it is none itself."""
    path = Path(path)
    return path.is_dir() and not (path / "cell.toml").exists() and bool(runs_in(path))


def runs_in(path):
    """The paths of the run folders in a folder, oldest first: by when their cell.toml was written."""
    found = [(one.stat().st_mtime_ns, one.parent) for one in Path(path).glob("*/cell.toml")]
    return [run for _, run in sorted(found)]


def lines_of(paths):
    """{column: value} for each run and each label that a trigger of its aims at.

    Columns: the run's name, state and warning, the fields in which the runs differ, the label, and the `FIGURES`.
    All lines have them, with None for what is not there.
    """
    read = {Path(path): read_run(Run(path)) for path in paths}
    cells = [cell for cell, _, _ in read.values() if cell]
    names = [name for name in declared(Cell) if name not in run_options(Cell)]
    differ = [name for name in names if len({repr(value_of(cell, name)) for cell in cells}) > 1]
    lines = []
    for path, (cell, results, state) in read.items():
        own = {"run": path.name, "state": state, "warning": "; ".join(warnings(results)) or None if results else None}
        own |= {name: plain(value_of(cell, name)) if cell else None for name in differ}
        for label in list(results["tests"]["trigger"]) or [None] if results else [None]:
            lines.append(own | {"label": label} | figures_of(results, label))
    return lines


def read_run(run):
    """(Cell or None, results or None, state in words) of a run; a damaged one says what is wrong with it."""
    cell = None
    try:
        cell = run.read_cell()
        if run.finished:
            return cell, run.read_results(), "finished"
    except InputError as error:
        return cell, None, "damaged: " + str(error).replace(f"{run.path}{os.sep}", "")
    step = run.last_step()
    if who := files.holder(run.path / LOCK):
        return cell, None, f"running ({who}), after step {step or 0:,}"
    return cell, None, f"unfinished, after step {step:,}" if step else "unfinished, before its first step"


def plain(value):
    return word(value) if isinstance(value, list) else value


def figures_of(results, label):
    tests = results["tests"] if results else {}
    trigger = tests.get("trigger", {}).get(label, {})
    before, placebo = (tests.get(form, {}).get("attack_success", {}).get(label, {}) for form in ("clean", "placebo"))
    rates = [form.get("attack_success_rate") for form in (trigger, before, placebo)]
    rates.append(trigger.get("net_attack_success_rate"))
    return dict(zip(FIGURES.values(), [tests.get("clean", {}).get("accuracy"), *rates], strict=True))


def sort_lines(lines, name):
    """The lines by a field of the cell or a column, smallest first, those without a value before them.

    Raises InputError for any other name.
    """
    known = [*declared(Cell), *(lines[0] if lines else ())]
    if name not in known:
        raise InputError(f"--sort {shown(name)}: there is no such field or column{near(name, known)}")
    return sorted(lines, key=lambda line: order_of(line.get(name)))


def order_of(value):
    return value is not None, isinstance(value, str), value if value is not None else 0


def as_text(lines):
    """The table of the runs that are finished, what they warn of, and the others with their states, for a terminal."""
    columns = list(lines[0])
    done = [line for line in lines if line["state"] == "finished"]
    fields = columns[columns.index("warning") + 1 : columns.index("label")]
    if len({line["label"] for line in done}) > 1:
        fields = ["label", *fields]
    fields = [name for name in fields if any(line[name] is not None for line in done)]
    heads = ("run", *FIGURES, *(name.rpartition(".")[2] for name in fields))
    rows = [(line["run"], *(rate(line[name]) for name in FIGURES.values()),
             *("-" if line[name] is None else console.short_name(word(line[name])) for name in fields))
            for line in done]  # fmt: skip
    found = []
    if rows:
        found += [*console.table(heads, rows, distinct([line["run"] for line in lines])), *console.wrap(NOTE)]
    if idle := dict.fromkeys(line["run"] for line in done if line["warning"]):
        found += console.wrap(f"warning: nothing was learned, or one class predicted only: {', '.join(idle)}")
    for line in lines:
        if line["state"] != "finished":
            found += console.wrap(f"{line['run']}: {line['state']}")
    return "\n".join(found)


def distinct(names, least=console.NAME):
    """The fewest columns, `least` or more, to which different names can be cut and still differ."""
    names, most = set(names), max(map(len, names))
    return next((width for width in range(least, most)
                 if len({console.short_name(name, width) for name in names}) == len(names)), most)  # fmt: skip


def rate(value):
    return "-" if value is None else f"{value:.3f}"
