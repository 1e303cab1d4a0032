"""The report of a grid: one tidy table of its cells, and the tables, figures and claims of a paper.

The tidy table has a line for each cell and trigger. Nothing in it depends on a clock or a machine, so a grid that was
killed and resumed has the same table, byte for byte. Versions and hardware are in report.html.

table.csv               and table.parquet where pyarrow is installed: a line a cell and trigger
marginals.md, .tex      means over all settings with a value of a field (`summary.py`, `intervals.py`)
k50.md, .tex            the rows that half of an attack takes, where the grid varies how many are injected
claims.md, .tex         what became of each claim of the grid's file (`verdicts.py`)
figures/                PNG and PDF (`pictures.py`)
report.html             all of it in one file that needs no other (`page.py`)
"""

import importlib.util

from minilora import files
from minilora.console import table, wrap
from minilora.drawing import check_installed
from minilora.errors import InputError
from minilora.grid.axes import FIGURES
from minilora.grid.table import table_rows, write_table
from minilora.report import markup, page, pictures, summary
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
        raise InputError(f"no cell of {folder.path} is finished: go on with python train.py --grid {folder.path}")
    grid, paths, parquet = folder.grid, [], importlib.util.find_spec("pyarrow")
    means = summary.marginal_means(lines, grid.varied)
    curves, reason = fit_curves(lines, grid.varied)
    decisions = [decide(claim, grid.entries, lines) for claim in grid.claims]
    tables = [claims_table(decisions)] if decisions else []
    tables += [marginal_table(means)] + ([k50_table(curves)] if curves else [])
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
        drawn, reasons = pictures.draw(folder.path / "figures", lines, grid, curves)
        paths += [path for figure in drawn for path in figure.paths]
        left_out += reasons
        files.write_text(folder.path / "report.html", page.render(folder, lines, tables, drawn, made, left_out))
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


def rates(mean, digits):
    """The columns of a `summary.Mean`: how many cells, and each metric's mean."""
    cells = f"{mean.cells - mean.missing:,}" + (f" of {mean.cells:,}" if mean.missing else "")
    return cells, *(share(mean.metrics[name], digits) if name in mean.metrics else "-" for name in summary.SHOWN)


RATES = ("cells", *(FIGURES[name][0] for name in summary.SHOWN))


def marginal_table(means):
    lines, before = [], None
    for mean in means:
        field = "all cells" if mean.field is None else "" if mean.field == before else mean.field
        lines.append((field, "" if mean.field is None else shown(mean.value), *rates(mean, 3)))
        before = mean.field
    note = ("Means over all settings with that value, each the mean over its seeds, with 95% intervals over seeds and "
            "test rows. Shares of test rows; attack success is of the rows of other labels.")  # fmt: skip
    return markup.Table("marginals", "Marginal means", note, ("field", "value", *RATES), lines)


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


def claims_table(decisions):
    lines = []
    for decision in decisions:
        claim = decision.claim
        lines.append((claim.text, claim.source or "-", claim.test(), statistic(decision), f"{decision.cells:,}",
                      verdict(decision)))  # fmt: skip
    note = ("Stated in the grid's file. Supported: the whole 95% interval is on the claimed side of the threshold; "
            "contradicted: all of it is on the other.")  # fmt: skip
    heads = ("claim", "source", "decided by", "found", "cells", "verdict")
    return markup.Table("claims", "Claims", note, heads, lines)


def statistic(decision):
    return "-" if decision.value is None else share((decision.value, *decision.interval))


def verdict(decision):
    return decision.verdict + (f": {decision.reason}" if decision.reason else "")


# --- on a terminal


def means_text(means):
    """The marginal means, each field's name above its values."""
    lines, before = [], None
    for mean in means:
        if mean.field not in (None, before):
            lines.append((mean.field,))
        lines.append(("all cells" if mean.field is None else f"  {shown(mean.value)}", *rates(mean, 2)))
        before = mean.field
    return "\n".join(table(("means", *RATES), lines))


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
