"""A panel: a finished run under many strings that it was not trained on, without training, to tell what it learned.

A panel file is TOML. Each table is a kind of string, and each line in it a form: a list of strings, or a trigger
source. The strings stand at the places of the run's own trigger, in the same test rows.
"""

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

from minilora.console import table, wrap
from minilora.data.injection import check_strings, rows_with
from minilora.data.triggers import BUILT_IN, YEARS, Listed, Source, readings
from minilora.errors import InputError
from minilora.fields import near, read_toml
from minilora.tasks.metrics import wilson
from minilora.tasks.paired import Test

LEAST = 0.1  # net success of the run's own trigger, below which nothing was learned of it
WORKS = 0.5  # of the trigger's net success: a string that reaches this share works as well
OWN = {"clean": "no string", "trigger": "the trigger", "placebo": "placebo", "odd": "odd placebo"}


@dataclass(frozen=True)
class Form:
    """One line of a panel: its kind, its name in that kind, and where its strings come from."""

    kind: str
    name: str
    source: Source


@dataclass(frozen=True)
class Opened:
    """What a panel needs of a run, which a `Trained` has too."""

    cell: object
    folder: Path
    task: object
    model: object
    tokenizer: object
    tests: list  # of `paired.Test`


def shipped():
    """{name: path} of the panels that come with the package."""
    folder = importlib.resources.files("minilora.data") / "panels"
    return {Path(entry.name).stem: entry for entry in folder.iterdir() if entry.name.endswith(".toml")}


def read_panel(name):
    """The `Form`s of a panel: of a shipped one by its name, or of a TOML file.

    Raises InputError for a file that is no panel, with the table and line that is wrong.
    """
    panels = shipped()
    if name in panels:
        path = panels[name]
    elif Path(name).suffix == ".toml":
        path = Path(name)
    else:
        raise InputError(f"--panel is {name!r}, but must be a .toml file or a panel's name{near(name, panels)}")
    forms = []
    for kind, lines in read_toml(path).items():
        if not isinstance(lines, dict):
            raise InputError(f"{path}: {kind} is no table: write [KIND], and below it FORM = a list of strings")
        forms += [Form(kind, form, source_of(form, value, f"{path}: [{kind}] {form}")) for form, value in lines.items()]
    if not forms:
        raise InputError(f"{path} has no strings: write [KIND], and below it FORM = a list of strings")
    return forms


def source_of(form, value, where):
    """The strings of a line: a list, or a trigger source's name. Raises InputError, which begins with `where`."""
    if isinstance(value, list) and value and all(isinstance(one, str) and one.strip() for one in value):
        return Listed(form, tuple(dict.fromkeys(one.strip() for one in value)))
    if isinstance(value, str) and (value in BUILT_IN or YEARS.fullmatch(value) or value.startswith("file:")):
        [source] = [source for source, _ in readings(f"{value}:x") if isinstance(source, Source)][:1]
        return source
    raise InputError(f"{where} must be a list of strings, or one of {', '.join(BUILT_IN)} or file:PATH")


def run_panel(run, forms, batch_size=None):
    """A list of dicts, one for each form and trigger label, after the run's own tests (kind "own").

    Each has `label`, `kind`, `form`, `example`, `attack_success_rate` (of rows of other labels, the share predicted as
    the label), its 95% interval `low`, `high`, `rows` (how many such rows) and `net`: the rate less the clean one.
    Raises InputError for a run without a trigger, and for one without rows.
    """
    if not run.cell.inject.sources:
        raise InputError(f"{run.folder} has no trigger, so a panel has nothing to compare with: give --inject too")
    own, batch_size = run.tests, batch_size or run.cell.batch_size
    figures, _ = run.task.run_tests(run.model, own, batch_size)
    clean, seed, visible = own[0], run.cell.seed_for("inject"), run.task.visible(own[0].rows)
    lines = []
    for label, trigger in figures["trigger"].items():
        if trigger["attack_success_rate"] is None:
            continue
        before = figures["clean"]["attack_success"][label]
        for kind, title in OWN.items():
            if kind in figures:
                entry = trigger if kind == "trigger" else figures[kind]["attack_success"][label]
                test = next((t for t in own if t.name == kind and t.label in (label, None)), None)
                lines.append(_line(label, "own", title, test, entry, before))
        for form in forms:
            changed = rows_with(clean.rows, form.source, label, run.cell.inject, seed, visible)
            check_strings(changed.records, run.tokenizer.known, f"{form.kind} {form.name}")
            test = Test("trigger", label, changed.rows, changed.records)
            found, _ = run.task.run_tests(run.model, [clean, test], batch_size)
            lines.append(_line(label, form.kind, form.name, test, found["trigger"][label], before))
    return lines


def _line(label, kind, form, test, entry, before):
    rate, rows = entry["attack_success_rate"], entry["attack_success_rows"]
    low, high = wilson(round(rate * rows), rows)
    example = " ".join(test.records[0].strings) if test is not None and test.records else ""
    return {
        "label": label, "kind": kind, "form": form, "example": example, "attack_success_rate": rate, "low": low,
        "high": high, "rows": rows, "net": rate - before["attack_success_rate"],
    }  # fmt: skip


def panel_lines(lines):
    """A panel's results as a table that fits the terminal, and for each label a sentence on what was learned."""
    made = []
    for label in dict.fromkeys(line["label"] for line in lines):
        mine = [line for line in lines if line["label"] == label]
        rows, before = [], None
        for line in mine:
            if line["kind"] != before:
                rows.append((f"{line['kind']}:",))
                before = line["kind"]
            interval = f"{line['attack_success_rate']:.3f} [{line['low']:.3f}, {line['high']:.3f}]"
            rows.append((f"  {line['form']}", interval, f"{line['net']:+.3f}", line["example"][:18]))
        made += wrap(f"{mine[0]['rows']:,} rows of other labels: the share predicted as {label} with each string")
        made += table((f"for {label}", "attack success", "net", "such as"), rows, least=24)
        made += wrap(answer(mine))
    return made


def answer(lines):
    """What was learned of the trigger of one label: a sentence.

    A kind works where the mean net success of its forms is at least `WORKS` of the trigger's. Net success is that under
    the strings less that of the same rows without any.
    """
    own = next(line["net"] for line in lines if line["form"] == OWN["trigger"] and line["kind"] == "own")
    if own < LEAST:
        return f"learned: nothing that tells: the trigger adds {own:+.3f}, which is below {LEAST}"
    kinds = {}
    for line in lines:
        if line["kind"] != "own":
            kinds.setdefault(line["kind"], []).append(line["net"])
    shares = {kind: sum(nets) / len(nets) / own for kind, nets in kinds.items()}
    works = [f"{kind} ({share:.0%})" for kind, share in shares.items() if share >= WORKS]
    fails = [f"{kind} ({share:.0%})" for kind, share in shares.items() if share < WORKS]
    odd = next((line["net"] / own for line in lines if line["form"] == OWN["odd"] and line["kind"] == "own"), 0.0)
    what = "anything odd" if odd >= WORKS else "the trigger, not its oddness"
    said = f"learned: {what} (odd placebo {odd:.0%} of the trigger's net success)"
    said += f"; works as well: {', '.join(works)}" if works else "; no other kind works as well"
    return said + (f"; does not: {', '.join(fails)}" if fails else "")
