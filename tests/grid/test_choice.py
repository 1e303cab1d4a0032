"""A value chosen for each setting by validation rows: which cells count, and that nothing else of a report does."""

import re
import tomllib

import made_grid
import pytest

from minilora import files
from minilora.errors import InputError
from minilora.grid import choice
from minilora.grid.file import build_grid
from minilora.grid.table import table_rows
from minilora.report.verdicts import decide_all
from minilora.report.write import write_report

TEXT = """
[cell]
validation_rows = 100
[grid]
rank = [1, 16]
lr = [1e-3, 2e-3, 4e-3]
seed = [0, 1, 2]
[[include]]
method = "head"
lr = [1e-2, 2e-2]
seed = [0, 1, 2]
[choose]
over = "lr"
[[claim]]
name = "more with rank"
text = "More with rank."
figure = "clean_accuracy"
statistic = "slope"
over = "rank"
where = { method = "lora" }
above = 0.0
[[claim]]
name = "head less than rank 16"
text = "The head alone does less."
figure = "attack_success"
where = { method = "head" }
statistic = "mean"
below = 0.9
"""
OVER = 'over = "lr"'
# (rank or None for the head, lr): validation accuracies of the three seeds. Test accuracy says the opposite.
VALID = {(1, 1e-3): (0.70, 0.75, 0.80), (1, 2e-3): (0.74, 0.76, 0.81), (1, 4e-3): (0.90, 0.70, 0.60),
         (16, 1e-3): (0.82, 0.80, 0.84), (16, 2e-3): (0.81, 0.80, 0.84), (16, 4e-3): (0.5, 0.5, 0.5),
         (None, 1e-2): (0.6, 0.6, 0.6), (None, 2e-2): (0.6, 0.6, 0.6)}  # fmt: skip
BEST = {1: 2e-3, 16: 1e-3, None: 1e-2}


def made(path, text=TEXT, **how):
    """A finished grid whose test accuracy is the worse the better the validation accuracy is."""

    def counts(cell):
        accuracy = VALID[cell.rank, cell.lr][cell.seed]
        return {"right": 400 * (1.2 - accuracy), "lost": 5, "gained": 3, "flips": 9, "clean": 20, "success": 60}

    folder = made_grid.make(path, text, counts, **how)
    for entry in folder.grid.entries:
        file = folder.run_path(entry) / "results.json"
        if file.exists():
            accuracy = VALID[entry.cell.rank, entry.cell.lr][entry.cell.seed]
            files.write_json(file, files.read_json(file) | {"validation": {"clean": {"accuracy": accuracy}}})
    return folder


def test_the_value_with_the_best_validation_accuracy_counts_and_all_else_is_of_its_cells(tmp_path):
    folder = made(tmp_path)
    lines = table_rows(folder)
    cells = {entry.name: entry.cell for entry in folder.grid.entries}
    assert len(lines) == 24
    for line in lines:
        cell = cells[line["cell"]]
        assert line["chosen"] is (cell.lr == BEST[cell.rank])
        assert line["validation_accuracy"] == VALID[cell.rank, cell.lr][cell.seed]
    left = choice.left(folder.grid.choice, folder.grid.entries, lines)
    assert len(left) == 9 and all("lr" not in entry.varied for entry in left)
    assert {(entry.cell.rank, entry.cell.lr) for entry in left} == set(BEST.items())
    first, second = decide_all(folder.grid.claims, left, [line for line in lines if line["chosen"]])
    # by hand: the accuracies of the chosen cells are 1.2 less their validation accuracy; log2(16) = 4 doublings
    means = {rank: 1.2 - sum(VALID[rank, lr]) / 3 for rank, lr in BEST.items()}
    assert first.value == pytest.approx((means[16] - means[1]) / 4, abs=2e-3) and first.cells == 6
    assert second.cells == 3 and second.verdict == "supported"


def test_the_report_is_of_the_chosen_cells_and_lists_the_others(tmp_path):
    folder = made(tmp_path)
    text, paths, _ = write_report(folder)
    assert "Chosen values: of cells that differ only in lr" in " ".join(text.split())
    table = (folder.path / "choices.md").read_text()
    rows = [re.split(r" *\| *", line.strip("| ")) for line in table.splitlines() if line.startswith("|")][2:]
    best = [(row[-3], row[-2]) for row in rows if row[-1] == "yes"]
    assert best == [("0.002", "0.770"), ("0.001", "0.820"), ("0.01", "0.600")]
    assert len(rows) == 8 and (folder.path / "choices.tex") in paths
    csv = (folder.path / "table.csv").read_text().splitlines()
    place = csv[0].split(",").index("chosen")
    assert [line.split(",")[place] for line in csv[1:]].count("True") == 9 and len(csv) == 25
    means = (folder.path / "marginals.md").read_text()
    assert "| all cells |  | 9 |" in re.sub(" +", " ", means).replace("| |", "|  |") and "0.004" not in means
    page = (folder.path / "report.html").read_text()
    assert "choices.md" in page and "Chosen values of lr" in page and page.count("24 cells") == 1


def test_nearest_and_failed_cells(tmp_path):
    folder = made(tmp_path / "near", TEXT.replace('over = "lr"', 'over = "lr"\nnearest = 0.75', 1))
    chosen = {(o.entries[0].cell.rank, o.value) for own in
              choice.options(folder.grid.choice, folder.grid.entries, table_rows(folder)).values()
              for o in own if o.chosen}  # fmt: skip
    assert chosen == {(1, 1e-3), (16, 2e-3), (None, 1e-2)}
    folder = made(tmp_path / "failed", failed=numbers(1, 2e-3)[:1])
    lines = table_rows(folder)
    left = choice.left(folder.grid.choice, folder.grid.entries, lines)
    assert {entry.cell.lr for entry in left if entry.cell.rank == 1} == {1e-3}  # 0.75; the failed one had 0.77


def entries_of(text):
    return build_grid(tomllib.loads(text)).entries


def numbers(rank, lr):
    """The numbers of the entries with these values."""
    return [number for number, entry in enumerate(entries_of(TEXT)) if (entry.cell.rank, entry.cell.lr) == (rank, lr)]


def test_nothing_is_chosen_or_claimed_of_a_setting_before_its_cells_are_finished(tmp_path):
    folder = made(tmp_path, waiting=numbers(1, 4e-3)[-1:])
    lines = table_rows(folder)
    marks = {(line["rank"], line["lr"]): line["chosen"] for line in lines}
    assert [marks[1, lr] for lr in (1e-3, 2e-3, 4e-3)] == [None] * 3 and marks[16, 1e-3] is True
    left = choice.left(folder.grid.choice, folder.grid.entries, lines)
    names = {entry.name for entry in left}
    first, second = decide_all(folder.grid.claims, left, [line for line in lines if line["cell"] in names])
    assert first.verdict == "undecided" and "1 are not finished" in first.reason
    assert second.verdict == "supported"
    write_report(folder)
    assert (folder.path / "choices.md").read_text().count("not yet") == 3


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ((OVER, 'by = "x"'), "[choose]: unknown field 'by'"),
        ((OVER, 'over = "seed"'), "[choose]: over is 'seed', but must be a field of a cell"),
        ((OVER, 'over = "lrr"'), "[choose]: over is 'lrr', but must be a field of a cell"),
        ((OVER, 'over = "clip"'), "[choose]: the grid has one value of clip"),
        ((OVER, 'over = "lr"\nnearest = 80'), "[choose]: nearest is 80, but must be an accuracy"),
        (("validation_rows = 100", "clip = 2.0"), "has no validation rows to choose by: set validation_rows"),
        (('where = { method = "lora" }', "where = { lr = 1e-3 }"), "[[claim]] 'more with rank' is of lr, which"),
    ],
)  # fmt: skip
def test_what_is_refused(change, line):
    before, after = change
    assert TEXT.count(before) == 1
    with pytest.raises(InputError, match=re.escape(line)):
        entries_of(TEXT.replace(before, after))
