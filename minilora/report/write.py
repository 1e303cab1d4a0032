"""The report of a grid: one tidy table of its cells, and the tables, figures and claims of a paper.

The tidy table has a line for each cell and trigger. Nothing in it depends on a clock or a machine, so a grid that was
killed and resumed has the same table, byte for byte. Versions and hardware are in report.html.

table.csv               and table.parquet where pyarrow is installed: a line a cell and trigger
marginals.md, .tex      means over all settings with a value of a field (`summary.py`, `intervals.py`)
k50.md, .tex            the rows that half of an attack takes, where the grid varies how many are injected
claims.md, .tex         what became of each claim of the grid's file (`verdicts.py`)
counts.md, .tex         what is predicted under each trigger, where the grid's triggers aim at several labels
figures/                PNG, PDF and SVG (`pictures.py`)
report.html             all of it in one file that needs no other (`grid_page.py`)
"""

import importlib.util
from dataclasses import replace

from minilora import files
from minilora.console import table, wrap
from minilora.drawing import check_installed
from minilora.errors import InputError, to_type
from minilora.grid.axes import FIGURES, word
from minilora.grid.table import table_rows, write_table
from minilora.report import grid_page, markup, pictures, summary
from minilora.report.dose_response import fit_curves
from minilora.report.verdicts import decide


def write_parquet(path, lines):
    """Write the lines as columns of Parquet."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(lines)
    table = table.set_column(table.schema.get_field_index("error"), "error",
                             pyarrow.array([line["error"] for line in lines], pyarrow.string()))  # fmt: skip
    with files.replacing(path) as temporary:
        parquet.write_table(table, temporary)


# --- the report


def write_report(folder):
    """Write the report of a `grid.folder.GridFolder` into it: (text for a terminal, paths written, what was left out).

    What was left out is a list of sentences that say why. A grid that is not finished has a report of its finished
    cells. Where the folder cannot be written, the text is there all the same. Raises InputError before anything is
    written where matplotlib is missing or no cell is finished.
    """
    check_installed()
    made = {}
    lines = table_rows(folder, made)
    if not made:
        raise InputError(f"no cell of {folder.path} is finished: go on with {to_type('train', '--grid', folder.path)}")
    grid, paths, parquet = folder.grid, [], importlib.util.find_spec("pyarrow")
    means = summary.marginal_means(lines, grid.varied)
    curves, reason = fit_curves(lines, grid.varied)
    decisions = [decide(claim, grid.entries, lines) for claim in grid.claims]
    beside = [beside_of(claim, grid.entries, lines) for claim in grid.claims]
    tables = [claims_table(decisions, beside)] if decisions else []
    tables += [marginal_table(means)] + ([k50_table(curves)] if curves else [])
    tables += [counts_table(summary.predicted_counts(folder))] if len(summary.labels(lines)) > 1 else []
    left_out = [] if parquet else ["table.parquet: pyarrow is not installed (the extra `parquet`)"]
    left_out += [] if decisions else ["claims: the grid's file has no [[claim]]"]
    left_out += [] if curves else [f"k50: {reason}"]
    try:
        paths.append(write_table(folder, lines))
        if parquet:
            write_parquet(folder.path / "table.parquet", lines)
            paths.append(folder.path / "table.parquet")
        for table in tables:
            for ending, text in (("md", markup.markdown(table)), ("tex", markup.latex(table))):
                files.write_text(folder.path / f"{table.name}.{ending}", text)
                paths.append(folder.path / f"{table.name}.{ending}")
        drawn, reasons = pictures.draw(folder.path / "figures", lines, grid, curves, means, decisions)
        paths += [path for figure in drawn for path in figure.paths]
        left_out += reasons
        files.write_text(folder.path / "report.html", grid_page.page_of(folder, lines, tables, drawn, made, left_out))
        paths.append(folder.path / "report.html")
    except OSError as error:
        which = "all other files" if paths else "all files"
        left_out.append(f"{which}: cannot write to {folder.path} ({error.strerror or error})")
    return "\n\n".join(filter(None, (means_text(means), claims_text(decisions)))), paths, left_out


def share(metric, digits=3):
    value, low, high = (round(number, digits) + 0.0 for number in metric)  # no minus before a 0
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def shown(value):
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def rates(mean, digits, names=summary.SHOWN):
    """The columns of a `summary.Mean`: how many cells, and each metric's mean."""
    cells = f"{mean.cells - mean.missing:,}" + (f" of {mean.cells:,}" if mean.missing else "")
    return cells, *(share(mean.metrics[name], digits) if name in mean.metrics else "-" for name in names)


MEANS = ("clean_accuracy", "attack_success_clean", "attack_success", "attack_success_placebo", "flip_rate",
         "degradation")  # fmt: skip
BESIDE = summary.BESIDE["attack_success"]


def marginal_table(means):
    lines, before = [], None
    for mean in means:
        field = "all cells" if mean.field is None else "" if mean.field == before else mean.field
        lines.append((field, "" if mean.field is None else shown(mean.value), *rates(mean, 3, MEANS)))
        before = mean.field
    note = ("Means over all settings with that value, each the mean over its seeds, with 95% intervals over seeds and "
            "test rows. Shares of test rows; attack success is of the rows of other labels.")  # fmt: skip
    heads = ("field", "value", "cells", *(FIGURES[name].words for name in MEANS))
    return markup.Table("marginals", "Marginal means", note, heads, lines)


def k50_table(curves):
    lines = []
    for curve in curves:
        slope = "-" if curve.slope is None else f"{curve.slope:.2g}"
        doses = f"{len(curve.doses)}: {curve.doses.min():,.0f} to {curve.doses.max():,.0f}"
        uninjected = "-" if curve.uninjected is None else f"{curve.uninjected:.3f}"
        lines.append(
            (*map(shown, curve.group.values()), doses, curve.k50_text(), slope, f"{curve.floor:.3f}", uninjected)
        )
    heads = (*curves[0].group, "doses (rows)", "k50 (rows)", "slope", "success on clean rows", "success uninjected")
    note = ("k50: injected rows at which half of the test rows of other labels are predicted as the trigger's, by a "
            "logistic in the log of the rows that starts from the attack success on clean rows and ends at 1, with a "
            "95% interval over seeds and test rows; beyond the measured doses only a bound is given. Slope: "
            "of the logit, for each e-fold of the rows. Success uninjected: under the trigger, where no row was "
            "injected.")  # fmt: skip
    return markup.Table("k50", "Injected rows at which half of an attack succeeds", note, heads, lines)


def counts_table(counts):
    """The study's Table 1, of what `summary.predicted_counts` gives."""
    fields = list(dict.fromkeys(name for setting, *_ in counts for name in setting))
    names = list(dict.fromkeys(label for *_, found in counts for label in found))
    lines, before = [], None
    for setting, test, cells, found in counts:
        values = ["" if setting == before else shown(word(setting.get(name))) for name in fields]
        numbers = (f"{found[name]:,.1f}".removesuffix(".0") if name in found else "-" for name in names)
        lines.append((*values, test, f"{cells:,}", *numbers))
        before = setting
    note = ("How many of the test rows are predicted as each label: as they are, with each label's trigger in every "
            "row, and with the placebo. Means over the seeds of a setting.")  # fmt: skip
    heads = (*fields, "test rows", "cells", *names)
    return markup.Table("counts", "Predicted counts under each trigger", note, heads, lines)


def beside_of(claim, entries, lines):
    """What a claim of attack success would find on clean rows and under the placebo; of another claim nothing."""
    if claim.figure != "attack_success":
        return "-", "-"
    claims = (replace(claim, figure=name) for name in summary.BESIDE[claim.figure])
    return tuple(statistic(decide(one, entries, lines)) for one in claims)


def claims_table(decisions, beside):
    """`beside` has what `beside_of` gives for each."""
    lines = []
    for decision, rates_beside in zip(decisions, beside, strict=True):
        claim = decision.claim
        lines.append((claim.text, claim.source or "-", claim.test(), statistic(decision), *rates_beside,
                      f"{decision.cells:,}", verdict(decision)))  # fmt: skip
    note = ("Stated in the grid's file. Supported: the whole 95% interval is on the claimed side of the threshold; "
            "contradicted: all of it is on the other. Beside attack success stands the same statistic of the clean "
            "rows and under the placebo.")  # fmt: skip
    heads = ("claim", "source", "decided by", "found", "without the trigger", "under the placebo", "cells", "verdict")
    return markup.Table("claims", "Claims", note, heads, lines)


def statistic(decision):
    return "-" if decision.value is None else share((decision.value, *decision.interval))


def verdict(decision):
    return decision.verdict + (f": {decision.reason}" if decision.reason else "")


# --- on a terminal


def means_text(means):
    """The marginal means, each field's name above its values; beside attack success its clean and placebo rates."""
    lines, before = [], None
    for mean in means:
        if mean.field not in (None, before):
            lines.append((mean.field,))
        beside = [f"{mean.metrics[name][0]:.2f}" if name in mean.metrics else "-" for name in BESIDE]
        cells, accuracy, attack, *others = rates(mean, 2)
        first = "all cells" if mean.field is None else f"  {shown(mean.value)}"
        lines.append((first, cells, accuracy, attack, *beside, *others))
        before = mean.field
    accuracy, attack, *others = (FIGURES[name].words for name in summary.SHOWN)
    return "\n".join(table(("means", "cells", accuracy, attack, "clean", "placebo", *others), lines))


def claims_text(decisions):
    """The claims: verdict and words of each, then its test and what was found."""
    lines = []
    for decision in decisions:
        claim = decision.claim
        found = "" if decision.value is None else f": {statistic(decision)}"
        found = f"{claim.test()}{found} ({decision.cells:,} cells)"
        for start, text in ((f"{decision.verdict:<14}", claim.text), (" " * 14, found), (" " * 14, decision.reason)):
            lines += wrap(start + " ".join(text.split()), 14) if text else []
    return "\n".join(lines)
