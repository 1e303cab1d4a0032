"""report.html of a finished run: what it came to, how it got there, and rows to look at. Read from its folder only."""

import itertools
import re
from types import NoneType

from minilora import files
from minilora.errors import InputError, to_type
from minilora.fields import check_shape
from minilora.report import curve
from minilora.report.page import Block, Section, html, join, links, marked, render
from minilora.runs.folder import Run
from minilora.runs.record import GAINS
from minilora.runs.text import minimum_of, natural_lines, warnings

ROWS = 10  # flipped and not flipped rows that are shown
FILES = ("cell.toml", "results.json", "metrics.jsonl", "predictions.jsonl", "injected.jsonl", "trainable.json",
         "adapter/README.md", "adapter", "curve.csv", "curve.png")  # fmt: skip


def write_page(folder):
    """Write report.html of the finished run in `folder`, with curve.csv and curve.png where there is a curve.

    Returns (its path, None), or where the folder cannot be written (None, why).
    """
    run = Run(folder)
    path = run.path / "report.html"
    try:
        files.write_text(path, page_of(run))
    except OSError as error:
        return None, f"cannot write to {run.path} ({error.strerror or error})"
    return path, None


def page_of(run):
    """The page's text. Raises OSError where the curve's files cannot be written."""
    cell, results = run.read_cell(), run.read_results()
    tests = results["tests"]
    again = f"{to_type('train', '--config', run.path / 'cell.toml')}\n{to_type('evaluate', run.path)}"
    sections = [
        Section("Tests", tests_of(results)),
        Section("Over the steps", attempt(lambda: curve_of(run))),
        *rows_of(run, list(tests["trigger"])),
        Section("Trained tensors", attempt(lambda: tensors_of(run))),
        Section("The cell", [Block("code", cell.to_toml())], folded=True),
        Section("Versions and hardware", [Block("table", ((), made_with(results)))], folded=True),
        Section("To reproduce it", [Block("code", again)]),
    ]  # fmt: skip
    lead = [about(cell), *injections(cell, results), html("Files: {}.", links(run.path, FILES))]
    return render(f"Run {run.path.resolve().name}", lead, sections)


def attempt(make):
    """The blocks that `make` gives, or why there are none: a file of the run that is lost costs no page."""
    try:
        return make()
    except InputError as error:
        return [Block("text", str(error))]


def about(cell):
    what = {"head": "The head only", "full": "The whole base"}.get(cell.method, f"A rank-{cell.rank} adapter")
    return f"{what} of {cell.model}, trained on {cell.data}. Seed {cell.seed}, cell {cell.id}."


def injections(cell, results):
    """A sentence for each trigger that was injected."""
    inject, found = cell.inject, []
    for entry in results["injection"]:
        eligible = f" of {entry['eligible_rows']:,}" if "eligible_rows" in entry else ""
        dose = f"{inject.count} in each" if inject.density is None else f"{inject.density:g} for each word"
        found.append(
            f"Injected: {entry.get('source', 'a trigger')} for {entry['label']} into {entry['rows']:,}{eligible} rows "
            f"({inject.mode}), {dose}, location {inject.location}."
        )
    return found or ["Nothing was injected."]


# --- tests


def interval(metrics, name, ends):
    if metrics.get(name) is None:
        return "-"
    return f"{metrics[name]:.3f}" + (" [{:.3f}, {:.3f}]".format(*metrics[ends]) if metrics.get(ends) else "")


def tests_of(results):
    """Two tables: each test of all rows, and attack success beside its clean and placebo rates."""
    tests = results["tests"]
    rows = [("clean", tests["clean"])] + [(f"trigger of {label}", one) for label, one in tests["trigger"].items()]
    rows += [("placebo", tests["placebo"])] if "placebo" in tests else []
    scores = [("exact", "exact_match"), ("log p", "log_likelihood")]
    if "exact_match" not in tests["clean"]:
        scores = [("balanced", "balanced_accuracy"), ("macro F1", "macro_f1"), ("weighted F1", "weighted_f1")]
    names = list(tests["clean"].get("predicted_counts", ()))
    heads = ["test rows", "accuracy", *(head for head, _ in scores), *(f"predicted {name}" for name in names),
             "flips vs clean", "McNemar p"]  # fmt: skip
    lines = [
        (title, interval(one, "accuracy", "accuracy_interval"), *(interval(one, key, None) for _, key in scores),
         *(f"{one['predicted_counts'][name]:,}" for name in names), interval(one, "flip_rate", "flip_rate_interval"),
         f"{one['mcnemar_p']:.1e}" if "mcnemar_p" in one else "-")
        for title, one in rows
    ]  # fmt: skip
    worst = tests["worst_group"]
    said = f"{minimum_of(worst)}: {worst['label']} rows, {worst['test']}: accuracy {worst['accuracy']:.3f}."
    blocks = [Block("table", (heads, lines), "95% intervals over the test rows."), Block("text", said)]
    if tests["trigger"]:
        blocks.append(Block("table", attacks_of(results), "Attack success: the share of the rows of other labels that "
                            "are predicted as the target label."))  # fmt: skip
        blocks.append(Block("table", effects_of(results), EFFECTS_ARE))
        blocks += [Block("text", f"Of {label}: {one}.") for label, found in tests["trigger"].items()
                   for one in natural_lines(found)]  # fmt: skip
    if "recall" in tests["clean"]:
        blocks.append(Block("table", classes_of(rows), "Recall: of the rows of a label, the share predicted right; "
                            "precision: of the rows predicted as it, the share that are."))  # fmt: skip
    blocks += [Block("text", one) for one in warnings(results)]
    return blocks


def attacks_of(results):
    """(heads, lines): attack success of each label, as clean, under its trigger and under the placebo."""
    tests, lines = results["tests"], []
    for label, metrics in tests["trigger"].items():
        beside = [tests.get(test, {}).get("attack_success", {}).get(label, {}) for test in ("clean", "placebo")]
        name, ends = "attack_success_rate", "attack_success_interval"
        rates = [interval(one, name, ends) for one in (beside[0], metrics, beside[1])]
        rows = f"{metrics.get('attack_success_rows') or 0:,}"
        lines.append((label, interval(tests["clean"], "accuracy", "accuracy_interval"), *rates, rows))
    heads = ("target label", "clean accuracy", "attack success: clean rows", "under the trigger", "under the placebo",
             "rows")  # fmt: skip
    return heads, lines


EFFECTS_ARE = ("Over the rows of other labels, paired: attack success less that of the same rows as clean (net), "
               "under the placebo and under the odd string, with McNemar's test of \"predicted as the target\"; "
               "conditional: of the rows that are predicted right as clean.")  # fmt: skip


def effects_of(results):
    """(heads, lines): what each trigger adds, see `metrics.attack_effects`."""
    lines = []
    for label, one in results["tests"]["trigger"].items():
        kinds = (*GAINS, "conditional_attack_success")
        rates = [interval(one, f"{kind}_rate", f"{kind}_interval") for kind in kinds]
        p = [f"{one[f'{kind}_p']:.1e}" if one.get(f"{kind}_p") is not None else "-" for kind in GAINS]
        rows = f"{one.get('conditional_attack_success_rows') or 0:,}"
        lines.append((label, *(cell for pair in zip(rates, p) for cell in pair), rates[-1], rows))
    heads = "net", "McNemar p", "over the placebo", "McNemar p", "over the odd string", "McNemar p"
    return ("target label", *heads, "conditional", "rows"), lines


def classes_of(forms):
    """(heads, lines): recall and precision of each label, and how its rows are predicted, in each form."""
    lines = []
    for title, one in forms:
        for label, recall in one.get("recall", {}).items():
            told = one.get("confusion", {}).get(label, {})
            most = sorted(told.items(), key=lambda item: -item[1])[:5]
            said = ", ".join(f"{other} {count:,}" for other, count in most)
            shares = ("-" if share is None else f"{share:.3f}" for share in (recall, one["precision"][label]))
            lines.append((title, label, f"{sum(told.values()):,}", *shares, said or "-"))
    return ("test rows", "label", "rows", "recall", "precision", "predicted as"), lines


# --- the curve


def curve_of(run):
    lines = files.read_jsonl(run.path / "metrics.jsonl")
    check(run.path / "metrics.jsonl", lines, {"step": int})
    curves = curve.points_of(lines)
    steps = {line["step"] for points in curves.values() for line in points}
    more = "--eval-every N runs the tests every N steps of training, which makes a curve."
    for name in ("curve.csv", "curve.png"):
        (run.path / name).unlink(missing_ok=True)  # of another training of the cell
    if len(steps) < 2:
        return [Block("text", f"The tests ran only after the last step. {more}")]
    curve.write_csv(run.path / "curve.csv", curves)
    curve.write_png(run.path / "curve.png", curves)
    panels = [
        html('<div>{}{}</div>', html("<h3>Trigger of {}</h3>", label) if len(curves) > 1 else "",
             curve.svg(label, points))
        for label, points in curves.items()
    ]  # fmt: skip
    note = more if len(steps) < 4 else ""
    caption = curve.CAPTION + (f" {curve.ATTACK}" if curves.keys() != {None} else "")
    return [Block("figure", ("", html('<div class="curves">{}</div>', join(panels)), caption), note)]


def check(path, lines, shape):
    """Raise InputError unless each of `lines` is an object of that `shape`."""
    try:
        for line in lines:
            check_shape(line, shape, "a line")
    except InputError as error:
        raise InputError(f"{path}: {error}; train the run again") from None


# --- rows


def rows_of(run, labels):
    """A section for each trigger: the first flipped and the first other rows, with what was predicted of them."""
    path = run.path / "predictions.jsonl"
    try:
        rows = files.read_jsonl(path)
        for label in labels:
            outcome = {"predicted": (str, NoneType)}
            check(path, rows, {"id": str, "clean": outcome, f"trigger {label}": outcome})
        if any("text" not in row[f"trigger {label}"] for row in rows for label in labels):
            raise InputError(f"{path} has no texts, because an earlier version wrote it: train the run again")
        for label in labels:
            check(path, rows, {f"trigger {label}": {"text": str, "spans": [[int]]}})
    except InputError as error:
        return [Section("Rows", [Block("text", str(error))])]
    return [Section(f"Rows under the trigger of {label}", flips(rows, f"trigger {label}")) for label in labels]


def flips(rows, test):
    blocks = []
    for words, wanted in (("flipped", True), ("did not flip", False)):
        found = [row for row in rows if (row["clean"]["predicted"] != row[test]["predicted"]) == wanted]
        shown = [(marked(row[test]["text"], row[test]["spans"]), said(row, test)) for row in found[:ROWS]]
        some = f" Here are the first {ROWS}, in the order of predictions.jsonl." if len(found) > ROWS else ""
        note = f"{len(found):,} of {len(rows):,} rows {words} from clean to trigger.{some}"
        blocks.append(Block("rows", shown, note))
    return blocks


def said(row, test):
    """What was predicted of a row in each of its forms."""
    forms = {"clean": row["clean"], "trigger": row[test], "placebo": row.get("placebo")}
    found = [f"{form} {one['predicted'] or 'another completion'}" for form, one in forms.items() if one]
    return f"Row {row['id']}, {row.get('label')}. Predicted: {', '.join(found)}."


# --- tensors


def tensors_of(run):
    """What was trained, a line for the tensors of several layers that are alike."""
    path = run.path / "trainable.json"
    found = files.read_json(path, "train the run again")
    check(path, [found], {"count": int, "tensors": [{"name": str, "shape": [int], "count": int}]})
    groups = {}
    for tensor in found["tensors"]:
        layer = re.search(r"\.(\d+)\.", tensor["name"])
        name = tensor["name"] if layer is None else tensor["name"].replace(layer[0], ".*.", 1)
        own = groups.setdefault((name, " × ".join(map(str, tensor["shape"]))), [])
        own.append((layer and int(layer[1]), tensor["count"]))
    lines = [
        (name, shape, ranges([layer for layer, _ in own if layer is not None]), f"{len(own):,}",
         f"{sum(count for _, count in own):,}")
        for (name, shape), own in groups.items()
    ]  # fmt: skip
    note = f"{len(found['tensors']):,} tensors, {found['count']:,} parameters; * is the layer's number."
    return [Block("table", (("tensor", "shape", "layers", "tensors", "parameters"), lines), note)]


def ranges(numbers):
    """Such as 0-5, 7 of sorted or unsorted whole numbers."""
    runs = []
    for _, group in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        own = [number for _, number in group]
        runs.append(f"{own[0]}-{own[-1]}" if len(own) > 1 else str(own[0]))
    return ", ".join(runs)


def made_with(results):
    return [(name, str(value)) for kind in ("versions", "hardware") for name, value in results[kind].items()]
