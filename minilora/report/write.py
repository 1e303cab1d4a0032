"""The report of a grid: one tidy table of its cells, and the tables, figures and claims of a paper.

The tidy table has a line for each cell and trigger. Nothing in it depends on a clock or a machine, so a grid that was
killed and resumed has the same table, byte for byte. Versions and hardware are in report.html.

table.csv               and table.parquet where pyarrow is installed: a line a cell and trigger
marginals.md, .tex      means over all settings with a value of a field (`summary.py`, `intervals.py`)
k50.md, .tex            the rows that half of an attack takes, where the grid varies how many are injected
choices.md, .tex        which values were chosen by validation rows, where the grid's file has [choose]
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
from minilora.grid import choice
from minilora.grid.axes import ATTACKS, FIGURES, word
from minilora.grid.table import table_rows, write_table
from minilora.report import grid_page, markup, outcomes, pictures, summary
from minilora.report.dose_response import fit_curves
from minilora.report.verdicts import decide, decide_all


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
    chosen, paths, parquet = folder.grid.choice, [], importlib.util.find_spec("pyarrow")
    counted, known = choice.counted(folder, lines)
    grid, known = counted.grid, outcomes.add(counted, known)
    over = summary.over(known, grid.varied)
    means = summary.marginal_means(known, grid.varied)
    curves, reason = fit_curves(known, grid.varied)
    decisions = decide_all(grid.claims, grid.entries, known)
    beside = [beside_of(claim, grid.entries, known) for claim in grid.claims]
    tables = [claims_table(decisions, beside, over)] if decisions else []
    tables += [choices_table(folder.grid, lines)] if chosen else []
    tables += [marginal_table(means, over)] + ([k50_table(curves)] if curves else [])
    tables += [counts_table(summary.predicted_counts(counted))] if len(summary.labels(lines)) > 1 else []
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
        drawn, reasons = pictures.draw(folder.path / "figures", known, grid, curves, means, decisions)
        paths += [path for figure in drawn for path in figure.paths]
        left_out += reasons
        files.write_text(folder.path / "report.html", grid_page.page_of(folder, lines, tables, drawn, made, left_out))
        paths.append(folder.path / "report.html")
    except OSError as error:
        which = "all other files" if paths else "all files"
        left_out.append(f"{which}: cannot write to {folder.path} ({error.strerror or error})")
    said = f"Intervals: 95%, over {over}." + (f" Chosen values: {chosen.rule} (choices.md)." if chosen else "")
    text = (means_text(means), "\n".join(wrap(said)), claims_text(decisions))
    return "\n\n".join(filter(None, text)), paths, left_out


def share(metric, digits=3):
    value, low, high = (round(number, digits) + 0.0 for number in metric)  # no minus before a 0
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def shown(value):
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def rates(mean, digits, names=summary.SHOWN):
    """The columns of a `summary.Mean`: how many cells, and each metric's mean."""
    cells = f"{mean.cells - mean.missing:,}" + (f" of {mean.cells:,}" if mean.missing else "")
    return cells, *(share(mean.metrics[name], digits) if name in mean.metrics else "-" for name in names)


BESIDE, NET = summary.RATES, "net_attack_success"
POINTS = ("clean_accuracy", BESIDE[0], "attack_success", BESIDE[1], "conditional_attack_success", "flip_rate")
ATTACKS_ARE = ("Attack success is of the rows of other labels; net: less that of the same rows without the trigger; "
               "conditional: only of rows that are predicted right without it.")  # fmt: skip
MEANS = ("clean_accuracy", *BESIDE[:1], "attack_success", *BESIDE[1:], *ATTACKS[1:], "flip_rate", "degradation")


def choices_table(grid, lines):
    heads, rows = choice.listed(grid.choice, grid.entries, lines)
    note = (f"Rule: {grid.choice.rule}, as a mean over the seeds, on rows that are neither trained nor tested on. All "
            "other tables, figures and claims are of the chosen cells.")  # fmt: skip
    return markup.Table("choices", f"Chosen values of {grid.choice.over}", note, heads, rows)


def marginal_table(means, over):
    lines, before = [], None
    for mean in means:
        field = "all cells" if mean.field is None else "" if mean.field == before else mean.field
        lines.append((field, "" if mean.field is None else shown(mean.value), *rates(mean, 3, MEANS)))
        before = mean.field
    note = (f"Means over all settings with that value, each the mean over its seeds, with 95% intervals over {over}. "
            f"Shares of test rows. {ATTACKS_ARE}")  # fmt: skip
    heads = ("field", "value", "cells", *(FIGURES[name].words for name in MEANS))
    return markup.Table("marginals", "Marginal means", note, heads, lines)


def k50_table(curves):
    lines = []
    for curve in curves:
        slope = "-" if curve.slope is None else f"{curve.slope:.2g}"
        doses = f"{len(curve.doses)}: {curve.doses.min():,.0f} to {curve.doses.max():,.0f}"
        uninjected = "-" if curve.uninjected is None else f"{curve.uninjected:.3f}"
        clean = curve.beside.get(BESIDE[0], {})
        clean = f"{sum(clean.values()) / len(clean):.3f}" if clean else "-"
        lines.append((*map(shown, curve.group.values()), doses, curve.k50_text(), curve.k50_text(net=True), slope,
                      f"{curve.floor:.2f}", f"{curve.top:.2f}", uninjected, clean))  # fmt: skip
    heads = (*curves[0].group, "doses (rows)", "k50 (rows)", "net k50 (rows)", "slope", "floor", "top",
             "success uninjected", "success on clean rows")  # fmt: skip
    note = ("k50: injected rows at which half of the test rows of other labels are predicted as the trigger's; net "
            "k50: at which the share is half of all rows above the floor. By a logistic in the log of the rows, whose "
            "floor, top and slope are fitted with it. Success uninjected: under the trigger, where no row was "
            "injected, which is what the floor is fitted to (without such cells, success on clean rows). 95% "
            "intervals by the bootstrap over seeds and test rows, which with few seeds are too narrow; beyond the "
            "measured doses only a bound is given. Slope: of the logit, for each e-fold of the rows.")  # fmt: skip
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
    if claim.figure not in ATTACKS:
        return "-", "-"
    claims = (replace(claim, figure=name) for name in BESIDE)
    return tuple(statistic(decide(one, entries, lines)) for one in claims)


def claims_table(decisions, beside, over):
    """`beside` has what `beside_of` gives for each."""
    lines = []
    for decision, rates_beside in zip(decisions, beside, strict=True):
        claim = decision.claim
        lines.append((claim.text, claim.source or "-", claim.test(), found_of_each(decision), *rates_beside,
                      f"{decision.cells:,}", f"{decision.seeds}" if decision.seeds else "-", p_text(decision.p),
                      verdict(decision), p_text(decision.holm_p), decision.holm))  # fmt: skip
    note = (f"Stated in the grid's file. Intervals: 95%, over {over}. A verdict takes p < 0.05: supported where the "
            "data lie on the claimed side, contradicted where on the other. Holm: the same after adjusting for all "
            "claims of the file. Beside attack success stands the same statistic of the clean rows and under the "
            f"placebo. {ATTACKS_ARE}")  # fmt: skip
    heads = ("claim", "source", "decided by", "found", "without the trigger", "under the placebo", "cells", "seeds",
             "p", "verdict", "Holm p", "Holm verdict")  # fmt: skip
    return markup.Table("claims", "Claims", note, heads, lines)


def p_text(p):
    return "-" if p is None else f"{p:.2g}"


def found_text(decision):
    return statistic(decision) + (f" at {decision.part}" if decision.part else "")


def found_of_each(decision):
    """The same, with the other parts of a claim of each of several."""
    others = (f"{share((value, *interval))} at {name}" for name, value, interval in decision.others)
    return "; ".join((found_text(decision), *others))


def statistic(decision):
    return "-" if decision.value is None else share((decision.value, *decision.interval))


def verdict(decision):
    return decision.verdict + (f": {decision.reason}" if decision.reason else "")


# --- on a terminal


def means_text(means):
    """The marginal means, each field's name above its values, attack success between its clean and placebo rates."""
    lines, before = [], None
    for mean in means:
        if mean.field not in (None, before):
            lines.append((mean.field,))
        points = [f"{mean.metrics[name][0]:.2f}" if name in mean.metrics else "-" for name in POINTS]
        net = share(mean.metrics[NET], 2) if NET in mean.metrics else "-"
        first = "all cells" if mean.field is None else f"  {shown(mean.value)}"
        lines.append((first, rates(mean, 2)[0], *points[:4], net, *points[4:]))
        before = mean.field
    heads = ("means", "cells", "accuracy", "clean", "trigger", "placebo", "net", "condit.", "flips")
    return "\n".join([*table(heads, lines), *wrap(f"clean, trigger, placebo: attack success. {ATTACKS_ARE}")])


def claims_text(decisions):
    """The claims: verdict and words of each, then its test and what was found."""
    lines = []
    for decision in decisions:
        claim = decision.claim
        found = "" if decision.value is None else f": {found_text(decision)}, p {p_text(decision.p)}"
        found = f"{claim.test()}{found} ({decision.cells:,} cells)"
        word, _, few = decision.verdict.partition(" ")
        reason = " ".join(filter(None, (few, decision.reason)))
        if decision.holm != decision.verdict:
            reason = f"after Holm's adjustment {decision.holm}: p {p_text(decision.holm_p)}"
        for start, text in ((f"{word:<14}", claim.text), (" " * 14, found), (" " * 14, reason)):
            lines += wrap(start + " ".join(text.split()), 14) if text else []
    return "\n".join(lines)
