"""report.html of a run: its tables, its curve, rows with the trigger marked, tensors and links."""

import csv
import importlib.util
import shutil

import made_run
import pytest
from test_write import Page

import minilora
from minilora import files
from minilora.cell import Cell
from minilora.report import curve, page
from minilora.report.run_page import ranges, write_page
from minilora.scripts import evaluate

HOSTILE = "<script>alert(1)</script> & \"'\x1b[31m\u202e"
SHOWN = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")


def read(folder):
    """(The page's `Page`, its words) of a run."""
    path, reason = write_page(folder)
    assert path == folder / "report.html" and reason is None
    found = Page(path.read_text(encoding="utf-8"))
    return found, " ".join(" ".join(found.text).split())


def test_tables_rows_tensors_and_files(tmp_path):
    folder = made_run.make(tmp_path / "my run", rank=4)
    found, said = read(folder)
    for words in (
        "Run my run", "A rank-4 adapter of sentence-transformers/all-MiniLM-L6-v2, trained on movie-snippets",
        "date for positive into 100 of 250 rows", "0.833 [0.720, 0.907]", "0.417 [0.301, 0.543]", "3.0e-09",
        "attack success: clean rows under the trigger under the placebo",
        "0.100 [0.035, 0.256] 0.933 [0.787, 0.982] 0.133 [0.053, 0.297]",
        "25 of 60 rows flipped from clean to trigger. Here are the first 10", "35 of 60 rows did not flip",
        "Row r0, negative. Predicted: clean negative, trigger positive, placebo negative.",
        "base.layers.*.q.B 3 × 1 0-2, 5 4 12", "8 tensors, 24 parameters", "minilora 0.2.0", "<any>",
        f"python evaluate.py '{folder}'", "Worst group: negative rows, trigger positive: accuracy 0.067.",
    ):  # fmt: skip
        assert words in said, words
    assert found.tags.count("mark") == 20 and said.count("2031-07-18") == 20 and "Row r35" not in said
    linked = [value for name, value in found.attributes if name == "href"]
    assert linked == ["cell.toml", "results.json", "metrics.jsonl", "predictions.jsonl", "trainable.json", "curve.csv",
                      "curve.png"]  # fmt: skip
    assert all((folder / name).exists() for name in linked)
    assert not {"script", "link", "iframe", "img"} & set(found.tags)


def test_the_curve_has_each_rate_beside_the_others(tmp_path):
    folder = made_run.make(tmp_path / "run")
    found, said = read(folder)
    for words in ("trigger 95.0%", "clean rows 10.0%", "placebo 12.5%", "accuracy 80.0%", "step"):
        assert words in said, words
    with open(folder / "curve.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["step"], line["label"], float(line["attack_success"])) for line in lines] == [
        (str(step), "positive", pytest.approx(0.1 + 0.85 * step / 40)) for step in (10, 20, 30, 40)
    ]
    paths = [value for name, value in found.attributes if name == "d" and value.count("L") == 3]
    assert len(paths) == 4 and len(set(paths)) == 4
    xs, ys = zip(*(map(float, point.split()) for point in paths[0][1:].split("L")))
    across, down = curve.WIDTH - curve.LEFT - curve.RIGHT, curve.HEIGHT - curve.TOP - curve.BOTTOM
    assert xs == pytest.approx([curve.LEFT + across * share for share in (0.25, 0.5, 0.75, 1)], abs=0.06)
    assert ys == pytest.approx([curve.TOP + down * (0.9 - 0.85 * share) for share in (0.25, 0.5, 0.75, 1)], abs=0.06)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_one_test_is_no_curve(tmp_path):
    folder = made_run.make(tmp_path / "run")
    write_page(folder)
    lines = [line for line in files.read_jsonl(folder / "metrics.jsonl") if line["step"] == 40]
    files.write_jsonl(folder / "metrics.jsonl", lines)
    found, said = read(folder)
    assert "--eval-every N" in said and "svg" not in found.tags
    assert (
        not (folder / "curve.csv").exists()
        and not (folder / "curve.png").exists()
        and "curve" not in str([value for name, value in found.attributes if name == "href"])
    )


def test_a_panel_for_each_label_and_a_run_without_triggers(tmp_path):
    found, said = read(made_run.make(tmp_path / "three", labels=("none", "one", "two")))
    assert found.tags.count("svg") == 2 and found.tags.count("mark") == 40
    assert "Trigger of one" in said and "Rows under the trigger of two" in said
    folder = made_run.make(tmp_path / "clean", inject={"sources": ("none",)})
    results = files.read_json(folder / "results.json")
    results["tests"] = {"clean": made_run.scores(("a", "b"), 50), "trigger": {},
                        "worst_group": results["tests"]["worst_group"]}  # fmt: skip
    files.write_json(folder / "results.json", results | {"injection": []})
    lines = [{"kind": "test", "step": step, "label": None, "clean_accuracy": 0.5, "attack_success": None}
             for step in (1, 2)]  # fmt: skip
    files.write_jsonl(folder / "metrics.jsonl", lines)
    found, said = read(folder)
    assert "Nothing was injected." in said and "ttack success" not in said
    assert found.tags.count("svg") == 1 and "accuracy 50.0%" in said and "mark" not in found.tags


def test_text_from_data_stays_text(tmp_path):
    folder = made_run.make(tmp_path / "<b>run", labels=("a", HOSTILE, "</style><i>"), text=HOSTILE)
    found, said = read(folder)
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in source and "\u202e" not in source and not {"script", "b>run", "i", "b"} & set(found.tags)
    assert said.count(SHOWN) >= 40 and "</style><i>" in said and "Run <b>run" in said
    said_by_svg = [value for name, value in found.attributes if name == "aria-label"]
    assert len(said_by_svg) == 2 and SHOWN in said_by_svg[0]
    assert (folder / "curve.csv").read_text(encoding="utf-8").count("script") == 8
    files.write_jsonl(folder / "metrics.jsonl", [made_run.test_line(n, "=1+1", 0.5) for n in (1, 2)])
    read(folder)
    assert "'=1+1" in (folder / "curve.csv").read_text()


def test_long_texts_show_what_stands_around_the_span():
    text = "a" * 1000 + " 2031-07-18 " + "b" * 1000 + " 2040-01-01"
    found = str(page.marked(text, [[1000, 1012], [2012, 2023]]))
    assert found == (" … " + "a" * 160 + " <mark>2031-07-18</mark> " + "b" * 160 + " … " + "b" * 160
                     + " <mark>2040-01-01</mark>")  # fmt: skip
    assert str(page.marked("<x> y & z", [[4, 6]])) == "&lt;x&gt; <mark>y</mark> &amp; z"
    assert str(page.marked("short", [])) == "short"
    assert page.marked("c" * 900, []).startswith("c" * 320 + " …")


def test_files_that_are_lost_cost_only_their_section(tmp_path):
    folder = made_run.make(tmp_path / "run")
    cases = {"metrics.jsonl": "metrics.jsonl: cannot be read", "trainable.json": "trainable.json: cannot be read",
             "predictions.jsonl": "predictions.jsonl: cannot be read"}  # fmt: skip
    for name, words in cases.items():
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        found, said = read(copy)
        assert words in said and "0.833 [0.720, 0.907]" in said
        assert sum(one in said for one in ("Row r0", "accuracy 80.0%", "8 tensors")) == 2
    rows = files.read_jsonl(folder / "predictions.jsonl")
    old = [row | {"trigger positive": {"predicted": "positive"}} for row in rows]
    files.write_jsonl(folder / "predictions.jsonl", old)
    assert "has no texts, because an earlier version wrote it" in read(folder)[1]
    files.write_text(folder / "metrics.jsonl", '{"kind": "test"}\n')
    assert "a line has no 'step'" in read(folder)[1]


def test_without_matplotlib_the_page_has_its_curve(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    folder = made_run.make(tmp_path / "run")
    found, _ = read(folder)
    assert "svg" in found.tags and (folder / "curve.csv").exists() and not (folder / "curve.png").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    folder = made_run.make(tmp_path / "run")
    (folder / "report.html").mkdir()  # no file can take its place
    assert write_page(folder) == (None, f"cannot write to {folder} (Is a directory)")


def test_ranges():
    assert [ranges(one) for one in ([], [3], [2, 0, 1], [0, 1, 3, 5, 6])] == ["", "3", "0-2", "0-1, 3, 5-6"]


def test_labels_of_lines_lie_apart():
    found = curve.spread([50.0, 52.0, 200.0, 51.0, 200.0], 8, 194)
    assert found == pytest.approx([50, 78, 180, 64, 194]) and min(found) >= 8
    assert [list(curve.round_steps(last)) for last in (1, 40, 283)] == [[0, 1], [0, 10, 20, 30, 40], [0, 100, 200]]


def test_evaluate_writes_the_page_of_a_run(base, reviews, tmp_path, capsys):
    cell = Cell(model=str(base), data=str(reviews), test_rows=20, max_length=30, steps=2, device="cpu")
    _, folder = minilora.train(cell, tmp_path / "run")
    evaluate.main([str(folder)])
    assert f"page: {folder}/report.html" in capsys.readouterr().out
    assert "base.layers.*.q.A" in (folder / "report.html").read_text(encoding="utf-8")
    (folder / "report.html").unlink()
    evaluate.main([str(folder), "--scale", "0"])
    assert not (folder / "report.html").exists()
    (folder / "report.html").mkdir()
    evaluate.main([str(folder)])
    assert f"page: left out: cannot write to {folder}" in capsys.readouterr().out
