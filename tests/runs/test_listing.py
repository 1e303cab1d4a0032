"""The table of the runs in a folder, of folders that hold what runs leave there."""

import csv
import io
import os

import made_grid
import pytest
from conftest import ROOT

from minilora import console, files
from minilora.cell import PRESETS, Cell
from minilora.errors import InputError
from minilora.runs import listing
from minilora.scripts import evaluate

CELLS = [
    {},
    dict(rank=16),
    dict(variant="dora"),
    dict(init="pissa"),
    dict(seed=3),
    dict(inject=dict(proportion=0.05)),
    dict(rank=16, inject=dict(proportion=0.05)),
    dict(inject=dict(sources=["country:negative", "color:positive"])),
    dict(inject=dict(sources=())),
    PRESETS["study"] | dict(rank=64),
    dict(text_column="a very long name of a column " * 4),
]


@pytest.fixture
def folder(tmp_path):
    """Eleven finished runs, the first of which is the newest, an unfinished one, and things that are no runs."""
    path = tmp_path / "runs"
    for number, changes in enumerate([*CELLS, dict(rank=7)]):
        cell = Cell(**changes)
        own = path / cell.name
        own.mkdir(parents=True)
        files.write_text(own / "cell.toml", cell.to_toml())
        os.utime(own / "cell.toml", ns=(0, 10**15 - number))
        if number < len(CELLS):
            files.write_json(own / "results.json", made_grid.results(cell, made_grid.draw(cell)))
    files.write_text(path / "r7" / "metrics.jsonl", '{"step": 1}\n{"step": 12}\n{"st')
    (path / "no-run").mkdir()
    (path / "a file").write_text("x")
    return path


def table_of(out):
    """(heads, rows) of the table at the head of a text."""
    lines = out.splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith("attack: "))
    return lines[0].split(), [line.split() for line in lines[1:end]]


def test_runs_are_told_apart_at_80_columns(folder, capsys, monkeypatch):
    for width in (80, 100, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        evaluate.main([str(folder)])
        out = capsys.readouterr().out
        heads, rows = table_of(out)
        assert max(map(console.wide, out.splitlines())) <= width
        assert heads[:5] == ["run", "accuracy", "attack", "clean", "placebo"] and heads[5] == "net"
        assert len(rows) == 12 and len({row[0] for row in rows}) == 11  # one has two triggers
        assert rows[-1][0] == "default" and rows[0][0].startswith("text-col")  # newest last
        assert "\nr7: unfinished, after step 12\n" in out
        whole = [row for row in rows if "…" not in row[0]]
        assert len(whole) >= 9
        for row in whole:
            results = files.read_json(folder / row[0] / "results.json")
            assert row[1] == f"{results['tests']['clean']['accuracy']:.3f}"
            attacks = [f"{one['attack_success_rate']:.3f}" for one in results["tests"]["trigger"].values()]
            assert row[2] in (attacks or ["-"])
    assert heads[6:8] == ["label", "text_column"]  # more of them where there is room


def test_csv_has_all_columns(folder, capsys):
    evaluate.main([str(folder), "--csv", "--sort", "rank"])
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(lines) == 13 and [int(line["rank"]) for line in lines] == sorted(int(line["rank"]) for line in lines)
    by_name = {line["run"]: line for line in lines}
    assert by_name["r7"]["state"] == "unfinished, after step 12" and by_name["r7"]["clean_accuracy"] == ""
    assert by_name["r16"]["inject.proportion"] == "0.25" and "max_length" not in lines[0]  # all have that one
    for name in ("r16", "dora", "study_r64", "no-sources"):
        tests = files.read_json(folder / name / "results.json")["tests"]
        assert float(by_name[name]["clean_accuracy"]) == tests["clean"]["accuracy"]
        for label, trigger in tests["trigger"].items():
            assert float(by_name[name]["attack_success"]) == trigger["attack_success_rate"]
            for form in ("clean", "placebo"):
                rate = tests[form]["attack_success"][label]["attack_success_rate"]
                assert float(by_name[name][f"attack_success_{form}"]) == rate
    assert by_name["no-sources"]["attack_success"] == ""


def test_sorting(folder):
    lines = listing.lines_of(listing.runs_in(folder))
    for name in ("attack_success", "variant", "inject.proportion", "max_length", "run"):
        values = [line.get(name) for line in listing.sort_lines(lines, name)]
        told = [value for value in values if value is not None]
        assert told == sorted(told) and values == [None] * (len(values) - len(told)) + told
    with pytest.raises(InputError, match="--sort 'rnk': there is no such field or column: did you mean rank"):
        listing.sort_lines(lines, "rnk")


def test_warnings_and_damage_are_named(folder, capsys):
    path = folder / "r16" / "results.json"
    results = files.read_json(path)
    counts = {"negative": 210, "positive": 190}
    results["tests"]["clean"] |= {"accuracy": 0.5, "label_counts": counts, "predicted_counts": counts}
    files.write_json(path, results)
    (folder / "dora" / "results.json").write_text("{")
    (folder / "pissa" / "cell.toml").write_text("rank = 'x'")
    evaluate.main([str(folder)])
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: nothing was learned, or one class predicted only: r16 " in out
    assert "dora: damaged: results.json" in out and "pissa: damaged: cell.toml: rank is 'x', but must be" in out
    [line] = [line for line in listing.lines_of(listing.runs_in(folder)) if line["run"] == "r16"]
    assert line["warning"].startswith("nothing was learned: clean accuracy is 0.500, and 0.525 of")


def test_flags_of_other_folders_are_refused(folder):
    for flags, message in (
        (["--scale", "0.5"], "--scale is for single runs, but .* is a folder of runs"),
        (["--seed-inject", "3"], "a change of seed_inject is for single runs"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.main([str(folder), *flags])
    for flag in (["--csv"], ["--sort", "rank"]):
        with pytest.raises(InputError, match=f"{flag[0]} is for a folder of runs, but .*r16 is a run: drop it"):
            evaluate.main([str(folder / "r16"), *flag])
    with pytest.raises(InputError, match="there is no run folder"):
        evaluate.main([str(ROOT / "nowhere")])
