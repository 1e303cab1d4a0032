"""ablations/results.py: the claims of finished grids, between RESULTS.md's two marks, of the cells that count."""

import importlib.util
import json

import made_grid
import pytest
from conftest import ROOT

from minilora.errors import InputError

CLAIM = """
[[claim]]
name = "it works"
text = "Most rows follow | the token."
figure = "attack_success"
statistic = "mean"
above = 0.5
"""


@pytest.fixture
def results(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("ablations_results", ROOT / "ablations" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path / "ablations")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "RESULTS.md")
    (tmp_path / "ablations").mkdir()
    module.RESULTS.write_text(f"before\n{module.BEGIN}\nold\n{module.END}\nafter\n", encoding="utf-8")
    return module


def test_claims_stand_between_the_marks(results, tmp_path):
    text = '[cell]\n"inject.rows" = 400\n[grid]\nrank = [1, 4]\nseed = [0, 1, 2]\n' + CLAIM
    for name in ("b", "a"):
        folder = made_grid.make(tmp_path / name, text)
        results.main([str(folder.path), "--name", name, "--commit", "abc1234"])
    found = results.RESULTS.read_text(encoding="utf-8")
    assert found.startswith("before\n") and found.endswith("\nafter\n") and "old" not in found
    assert found.count("Most rows follow") == 2 and found.index("grids/a\n") < found.index("grids/b\n")
    assert "Commit abc1234" in found and found.count("6 cells") == 2
    record = json.loads((results.HERE / "a" / "claims.json").read_text())
    report = (results.HERE / "a" / "claims.md").read_text()  # the report's own table has the same figures
    assert all(word in report for word in record["claims"][0][6:])
    value = float(record["claims"][0][2].split()[0])
    lines = (results.HERE / "a" / "table.csv").read_text().splitlines()
    place = lines[0].split(",").index("attack_success")
    assert value == pytest.approx(sum(float(line.split(",")[place]) for line in lines[1:]) / 6, abs=6e-4)


def test_a_grid_that_is_not_whole_and_a_page_without_marks(results, tmp_path):
    folder = made_grid.make(tmp_path / "grid", "[grid]\nrank = [1, 4]\n" + CLAIM, waiting=[1])
    with pytest.raises(InputError, match="1 cells are not finished"):
        results.main([str(folder.path)])
    assert "old" in results.RESULTS.read_text() and not list(results.HERE.iterdir())
    results.RESULTS.write_text("nothing")
    with pytest.raises(InputError, match="must have each of these lines once"):
        results.main([str(folder.path)])
