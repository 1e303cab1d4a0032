"""The lesson: its notebook runs from the first cell to the last, on a tiny base, and asks what the page asks."""

import json
import re
import sys
import types

from conftest import ROOT

NOTEBOOK, PAGE = ROOT / "examples" / "lesson.ipynb", ROOT / "docs" / "lesson.md"


def test_the_notebook_runs(base, reviews, tmp_path, monkeypatch):
    shown = []
    stand_in = types.ModuleType("IPython.display")
    stand_in.Image = shown.append  # what a notebook's server would show
    shell = types.ModuleType("IPython")
    shell.get_ipython, shell.version_info = lambda: None, (9, 0)  # matplotlib asks
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", stand_in)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 8 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    space = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
        if number == 0:
            assert space["settings"] == {"rank": 8} and space["rows"] == 100
            space["settings"] = dict(model=str(base), data=str(reviews), test_rows=31, max_length=30, steps=12, rank=2,
                                     lr=0.02)  # fmt: skip
            space["rows"] = 8
    assert [name.rpartition("/")[2] for name in shown] == ["formation.png", "neighbours.png"]
    paths = [tmp_path / name for name in shown]
    assert all(path.with_suffix(kind).stat().st_size > 9000 for path in paths for kind in (".png", ".pdf"))
    drawn = [path.with_suffix(".svg").read_text() for path in paths]
    for word in ("clean accuracy", "attack success", "without the trigger", "on the bare base", "Alignment"):
        assert word in drawn[0]
    assert all(name in drawn[1] for name in space["near"]["families"]) and len(space["near"]["families"]) >= 20
    assert "edit distance from the trigger" in drawn[1] and "embedding distance from the trigger" in drawn[1]
    assert space["formed"]["steps"] == [0, 10, 12] and len(space["left"]) == 8


def test_page_and_notebook_are_one_lesson():
    page, cells = PAGE.read_text(), json.loads(NOTEBOOK.read_text())["cells"]
    notes = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "markdown")
    heads = [re.findall(r"^## (\d\. .*)$", text, re.MULTILINE) for text in (page, notes)]
    assert heads[0] == heads[1] and [head[0] for head in heads[0]] == list("123456")
    asked = re.findall(r"--explain (\w+)", page)
    assert len(set(asked)) == 6
