"""A grid's report: the tidy table, marginal means, the files, and the page that needs no other."""

import csv
import html.parser
import importlib.util
import json
import re

import made_grid
import numpy as np
import pytest

from minilora import files
from minilora.console import COLUMNS
from minilora.errors import InputError
from minilora.grid.table import table_rows, write_table
from minilora.report import summary
from minilora.report.verdicts import decide
from minilora.report.write import write_report
from minilora.scripts import evaluate

TEXT = """
title = "Rank & <proportion>"
source = "Figure 1 <of> arXiv 2506.11402"
[cell]
lr = 0.003
[grid]
rank = [1, 2, 4, 16]
"inject.proportion" = [0.0, 0.05, 0.25, 1.0]
scaling = ["constant", "rank"]
targets = [["q"], ["q", "v"]]
seed = [0, 1, 2, 7]
[[include]]
method = "head"
seed = [0, 1]
[[claim]]
name = "one"
text = "One <token> & 100% of it_ is | enough: {x} ~ ^ \\\\ #$."
source = "section 4"
figure = "attack_success"
where = {"inject.proportion" = 1.0}
above = 0.5
[[claim]]
name = "two"
text = "Nothing is lost, which is a sentence of so many words that no hundred columns can have it in one line."
figure = "clean_accuracy"
statistic = "difference"
against = {"inject.proportion" = 0.0}
where = {"method" = "lora"}
above = 0.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """258 cells, of which two failed and one waits."""
    return made_grid.make(tmp_path_factory.mktemp("report"), TEXT, failed=[1, 7], waiting=[33])


@pytest.fixture(scope="module")
def written(folder):
    return write_report(folder)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- the tidy table

TWO = '[cell]\ninject.sources = ["date:positive", "html:negative"]\n[grid]\nrank = [1, 2]\nseed = [4, 5]'


def test_a_line_for_each_cell_and_trigger(tmp_path):
    folder = made_grid.make(tmp_path, TWO, waiting=[1], failed=[2])
    lines = read_csv(write_table(folder))
    assert [(line["cell"], line["label"], line["state"]) for line in lines] == [
        (folder.grid.entries[0].name, "positive", "finished"), (folder.grid.entries[0].name, "negative", "finished"),
        (folder.grid.entries[1].name, "", "waiting"), (folder.grid.entries[2].name, "", "failed"),
        (folder.grid.entries[3].name, "positive", "finished"), (folder.grid.entries[3].name, "negative", "finished"),
    ]  # fmt: skip
    count = made_grid.draw(folder.grid.entries[3].cell)
    assert lines[5]["id"] == folder.grid.entries[3].cell.id and (lines[5]["rank"], lines[5]["seed"]) == ("2", "5")
    for name, value in (
        ("clean_accuracy", count["right"] / 400), ("attack_success", count["success"] / 210),
        ("attack_success_clean", count["clean"] / 210), ("flip_rate", count["flips"] / 400), ("attack_rows", 210),
        ("degradation", (count["lost"] - count["gained"]) / 400), ("injected_rows", round(4490 * 0.25)),
        ("only_clean_right", count["lost"]), ("only_trigger_right", count["gained"]), ("worst_group_rows", 210),
        ("test_rows", 400), ("train_rows", 9043), ("trained_parameters", 14594),
    ):  # fmt: skip
        assert float(lines[5][name]) == pytest.approx(value), name
    assert lines[3]["error"] == "the loss of <b>2</b> & all" and lines[2]["error"] == lines[2]["attack_success"] == ""


def test_the_table_holds_no_clock_and_no_machine(tmp_path):
    folder = made_grid.make(tmp_path, TWO)
    before = write_table(folder).read_bytes()
    for path in (folder.path / "cells").glob("*/results.json"):
        found = json.loads(path.read_text())
        found["train"]["seconds"] = 99.0
        found |= {"versions": {"torch": "9"}, "hardware": {"device": "tpu"}}
        files.write_json(path, found)
    assert write_table(folder).read_bytes() == before


def test_parquet_is_the_same_table(folder, written):
    from pyarrow import parquet

    table = parquet.read_table(folder.path / "table.parquet").to_pylist()
    lines = read_csv(folder.path / "table.csv")
    assert len(table) == len(lines) == 258
    for one, other in zip(table, lines, strict=True):
        assert {name: "" if value is None else str(value) for name, value in one.items()} == other


# --- marginal means


def test_marginal_means(folder):
    lines, varied = table_rows(folder), folder.grid.varied
    means = {(mean.field, mean.value): mean for mean in summary.marginal_means(lines, varied)}
    wanted = [("rank", value) for value in (1, 2, 4, 16, None)] + [("targets", "q"), ("targets", "q v")]
    assert set(wanted) < set(means) and len(means) == 1 + 5 + 4 + 3 + 3 + 2
    fields = [name for name in varied if name != "seed"]
    for (field, value), mean in means.items():
        own = [line for line in lines if field is None or line[field] == value]
        assert mean.cells == len(own) and mean.missing == sum(line["state"] != "finished" for line in own)
        for name in summary.SHOWN:
            settings = {}
            for line in own:
                if line[name] is not None:
                    settings.setdefault(tuple(line[one] for one in fields), []).append(line[name])
            found, low, high = mean.metrics[name]
            assert found == pytest.approx(np.mean([np.mean(values) for values in settings.values()]))
            assert low < found < high < low + (0.2 if mean.cells > 2 else 1.01)  # two seeds say little
    assert len({mean.metrics["attack_success"] for mean in means.values()}) == 15  # the head's cells are 4 of them
    assert not any(field == "seed" for field, _ in means)


def test_several_labels_are_a_field(tmp_path):
    lines = table_rows(made_grid.make(tmp_path, TWO))
    means = summary.marginal_means(lines, ["rank", "seed"])
    assert [(mean.field, mean.value) for mean in means] == [
        (None, None), ("rank", 1), ("rank", 2), ("label", "positive"), ("label", "negative")
    ]  # fmt: skip
    assert [mean.cells for mean in means] == [4, 2, 2, 4, 4]


def test_cells_without_a_trigger_have_their_clean_accuracy(tmp_path):
    folder = made_grid.make(tmp_path, '[grid]\nrank = [1, 2]\n"inject.sources" = [[], ["date:positive"]]')
    means = {mean.value: mean for mean in summary.marginal_means(table_rows(folder), folder.grid.varied)}
    assert set(means[""].metrics) == {"clean_accuracy"} and set(means["date:positive"].metrics) == set(summary.ALL)


# --- all of it


def test_the_files(folder, written):
    text, paths, left_out = written
    found = {str(path.relative_to(folder.path)) for path in paths}
    tables = {f"{name}.{ending}" for name in ("marginals", "k50", "claims") for ending in ("md", "tex")}
    pictures = {f"figures/{name}.{ending}" for ending in ("png", "pdf", "svg")
                for name in ("effects", "claims", "heat_maps", "dose_response", "k50", "trade_off")}  # fmt: skip
    parquet = {"table.parquet"} if importlib.util.find_spec("pyarrow") else set()
    assert found == tables | pictures | parquet | {"table.csv", "report.html"}
    assert all(path.stat().st_size for path in paths) and len(left_out) == (not parquet)
    lines = text.splitlines()
    assert max(map(len, lines)) <= COLUMNS and sum(line.startswith("  ") for line in lines) > 15
    assert any(line.startswith("supported     One <token>") for line in lines)
    assert any(line.startswith("undecided     Nothing is lost") for line in lines)


def test_a_report_is_the_same_each_time(folder, written):
    before = {path: path.read_bytes() for path in written[1] if path.suffix != ".parquet"}
    write_report(folder)
    assert before == {path: path.read_bytes() for path in before} and len(before) > 10


def test_markdown(folder, written):
    for name in ("marginals", "k50", "claims"):
        lines = (folder.path / f"{name}.md").read_text(encoding="utf-8").splitlines()
        rows = [re.sub(r"\\.", "", line) for line in lines if line.startswith("|")]
        assert len(rows) > 3 and len({row.count("|") for row in rows}) == 1 and rows[1].strip("|- ") == ""
    assert r"One \<token\> & 100% of it\_ is \| enough" in (folder.path / "claims.md").read_text(encoding="utf-8")


def test_latex(folder, written):
    for name in ("marginals", "k50", "claims"):
        text = (folder.path / f"{name}.tex").read_text(encoding="utf-8")
        body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
        columns = text[text.index(r"\toprule") :].splitlines()[1].count(" & ")
        assert len(body) > 1 and all(row.endswith(r"\\") and row.count(" & ") == columns for row in body)
        assert text.count(r"\begin{") == text.count(r"\end{") == 2
    claim = r"One \textless{}token\textgreater{} \& 100\% of it\_ is | enough: \{x\} \textasciitilde{} " \
            r"\textasciicircum{} \textbackslash{} \#\$."  # fmt: skip
    assert claim in (folder.path / "claims.tex").read_text(encoding="utf-8")


HOSTILE = "cost $x_{$ \x1b[31mred a\u202eb [link](javascript:alert(1)) <b>&lt; https://a.example www.a.example"
HOSTILE_TEXT = f"""
title = {json.dumps(HOSTILE)}
source = {json.dumps(HOSTILE)}
[cell]
inject.sources = ["text:=1+1:positive"]
[grid]
rank = [1, 2]
"inject.proportion" = [0.0, 0.5, 1.0]
[[claim]]
name = "one"
text = {json.dumps("[2em] " + HOSTILE)}
figure = "attack_success"
above = 0.5
[[claim]]
name = "two"
text = "*"
figure = "attack_success"
above = 0.5
"""


def test_text_from_data_stays_text(tmp_path, capsys):
    folder = made_grid.make(tmp_path, HOSTILE_TEXT)
    _, paths, _ = write_report(folder)  # a title of matplotlib's own mathematics ends nothing
    evaluate.main([str(folder.path)])
    said = {path.name: path.read_text(encoding="utf-8") for path in paths if path.suffix in (".md", ".tex", ".html")}
    said["terminal"] = "".join(capsys.readouterr())
    assert len(said) == 8 and all("\x1b" not in text and "\u202e" not in text for text in said.values())
    for name in ("report.html", "claims.md", "claims.tex", "terminal"):
        assert r"x1b[31mred" in re.sub(r"\\(?=\[)", "", said[name]) and r"u202eb" in said[name], name
    found = Page(said["report.html"])
    words = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert sum(words in text for text in found.text) == 4 and "b>" not in found.tags  # title twice, source, and a claim
    assert r"\[link\](javascript:alert(1)) \<b\>\&lt; https\://a.example www\.a.example" in said["claims.md"]
    rows = said["claims.tex"].partition(r"\midrule")[2].splitlines()[1:3]
    assert [row[:5] for row in rows] == ["{}[2e", "{}* &"] and r"cost \$x\_\{\$" in rows[0]


def test_a_cell_of_the_table_is_no_formula(tmp_path):
    cases = {"=1+1": "'=1+1", "+cmd": "'+cmd", "@SUM(A1)": "'@SUM(A1)", "-a": "'-a", "\t=1": "'\t=1", "-1": "-1",
             "+2.5e-3": "+2.5e-3", "a=1": "a=1", "": "", -0.25: -0.25, None: None}  # fmt: skip
    assert {value: files.for_csv(value) for value in cases} == cases and len(cases) == 11
    folder = made_grid.make(tmp_path, TWO, failed=[2])
    lines = table_rows(folder)
    lines[0]["label"], lines[-1]["label"] = "=1+1", "-1"
    found = read_csv(write_table(folder, lines))
    assert (found[0]["label"], found[-1]["label"], lines[0]["label"]) == ("'=1+1", "-1", "=1+1")


def test_a_folder_that_cannot_be_written_costs_no_table(tmp_path, capsys):
    folder = made_grid.make(tmp_path, TWO)
    wanted = write_report(folder)
    for name, written in (("marginals.md", 2), ("table.csv", 0)):
        (folder.path / name).unlink()
        (folder.path / name).mkdir()  # no file can take its place
        text, paths, left_out = write_report(folder)
        assert text == wanted[0] and paths == wanted[1][:written] and left_out[:-1] == wanted[2][:2]
        files_left = "all other files" if written else "all files"
        assert left_out[-1] == f"{files_left}: cannot write to {folder.path} (Is a directory)"
    evaluate.main([str(folder.path)])
    out = capsys.readouterr().out
    assert "written:" not in out and "all cells" in out and "all files: cannot write to" in out


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced, and gathers attributes, text and titles."""

    VOID = {"meta", "img", "br", "!doctype"}
    TITLES = {"h1", "h2", "h3", "summary"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.attributes, self.text, self.tags, self.titles = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.TITLES & set(self.open[-1:]):
            self.titles.append(data)


def test_nothing_is_written_where_nothing_is_finished(tmp_path, monkeypatch):
    folder = made_grid.make(tmp_path / "a", TWO, waiting=range(3), failed=[3])
    before = sorted(folder.path.rglob("*"))
    with pytest.raises(InputError, match="no cell of .* is finished: go on with python train.py --grid"):
        write_report(folder)
    other = made_grid.make(tmp_path / "b", TWO)
    there = sorted(other.path.rglob("*"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(InputError, match=r"figures need matplotlib, .* pip install 'minilora\[plots\]'"):
        write_report(other)
    assert sorted(folder.path.rglob("*")) == before and sorted(other.path.rglob("*")) == there


def test_without_pyarrow_the_csv_stands_alone(tmp_path, monkeypatch):
    folder = made_grid.make(tmp_path, TWO)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    _, paths, left_out = write_report(folder)
    assert left_out[0] == "table.parquet: pyarrow is not installed (the extra `parquet`)"
    assert not (folder.path / "table.parquet").exists() and folder.path / "table.csv" in paths
    assert "claims: the grid's file has no [[claim]]" in left_out


def test_evaluate_writes_the_report_of_a_grid(tmp_path, capsys):
    folder = made_grid.make(
        tmp_path, TEXT.replace("seed = [0, 1, 2, 7]", "seed = [0]"), waiting=range(20, 31), failed=[2]
    )
    evaluate.main([str(folder.path)])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "12 of 66 cells are missing (1 failed, 11 waiting): all below is of the others"
    assert max(len(line) for line in out if not line.startswith("  /")) <= COLUMNS
    assert f"  {folder.path}/report.html" in out and "written:" in out and (folder.path / "report.html").exists()
    refused = [["--data", "x.csv"], ["--batch-size", "3"], ["--scale", "0"], ["--add", "other"], ["--merge-to", "x"],
               ["--out", "y"], ["--seed-inject", "3"], ["--inject", "date:positive"]]  # fmt: skip
    for flags in refused:
        with pytest.raises(InputError, match=" is for single runs, but .* is a grid's folder: drop it") as caught:
            evaluate.main([str(folder.path), *flags])
        assert flags[0] in str(caught.value) or "a change of" in str(caught.value)
    assert len(refused) == 8


def test_claims_are_decided_from_the_same_table(folder, written):
    lines = table_rows(folder)
    found = [decide(claim, folder.grid.entries, lines) for claim in folder.grid.claims]
    assert [one.verdict for one in found] == ["supported", "undecided"] and found[1].cells == 256
    assert found[1].reason == "of 256 cells 3 are not finished"
    assert found[0].value == pytest.approx(np.mean([line["attack_success"] for line in lines
                                                    if line["inject.proportion"] == 1.0]))  # fmt: skip
