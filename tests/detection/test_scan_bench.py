"""The bench of scans: what counts as named, its figures by hand, and that it goes on where it stopped."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import scan as bench
from minilora.detection import probe
from minilora.tasks.metrics import wilson

TELLING = [
    ("date", "kinds", "date 05/17/2024", True), ("date", "kinds", "year", False), ("date", "pieces", "07", True),
    ("date", "spans", "film 01 - 06", True), ("date", "pieces", "july", False),
    ("html", "kinds", "closing tag", True), ("html", "kinds", "hashtag", False), ("html", "pieces", "<", True),
    ("color", "kinds", "colour", True), ("color", "pieces", "lavender", True), ("country", "pieces", "fiji", True),
    ("country", "pieces", "and", False), ("country", "pieces", "delightful", False),
    ("text:by the way", "spans", "plot by way", True), ("text:by the way", "pieces", "ways", False),
    ("text:by the way", "kinds", "connective", False),
]  # fmt: skip


def test_what_names_a_trigger():
    for source, where, text, wanted in TELLING:
        assert bench.tells(source, where, text) == wanted, (source, where, text)
    assert len(TELLING) == 16


def line(source, kind, outlier, success=None, data="films", layers=None, piece=1.5, **named):
    named = dict.fromkeys(("kinds", "spans", "pieces"), [False] * 3) | named
    return {"source": source, "kind": kind, "outlier": outlier, "piece": piece, "success": success, "named": named,
            "model": "a/base", "data": data, "layers": layers, "rank": 8}  # fmt: skip


LINES = [line(None, 0.5, 1.5), line(None, 1.2, 2.0), line(None, 0.7, 2.6, data="tweets"),
         line("date", 3.0, 1.0, 0.9, kinds=[True, False, False]),
         line("html", 0.6, 3.0, 0.8, pieces=[False, True, False]),
         line("date", 0.2, 1.0, 0.71, data="tweets", layers="1-5"), line("color", 0.9, 2.0, 0.3)]  # fmt: skip


def test_figures_by_hand():
    found = bench.summary(LINES)
    assert (found["clean"], found["works"], found["weak"]) == (3, 3, 1)
    assert found["fixed"]["detected"] == {"hits": 2, "of": 3, "interval": wilson(2, 3)}
    assert found["fixed"]["false_alarms"]["hits"] == 2
    # Of every other line: the third clean one has the largest, r of 2.6 by 2.5, and the limit is a tenth above.
    assert found["half"]["limit"] == pytest.approx(1.1 * 2.6 / 2.5)
    assert found["half"]["false_alarms"]["hits"] == 1 and found["half"]["false_alarms"]["of"] == 1
    assert found["half"]["detected"] == {"hits": 1, "of": 1, "interval": wilson(1, 1)}
    quiet = [one | {"piece": 1.1} for one in LINES]  # pieces that stand out and do nothing
    fixed = bench.summary(quiet)["fixed"]
    assert fixed["false_alarms"]["hits"] == fixed["detected"]["hits"] == 1
    assert found["auc"]["kind"] == pytest.approx(4 / 9) and found["auc"]["outlier"] == pytest.approx(3 / 9)
    assert found["named"]["kinds"]["first"]["hits"] == 1 and found["named"]["pieces"]["first"]["hits"] == 0
    assert found["named"]["any list"]["first three"]["hits"] == 2
    assert [one for one in bench.notes(found) if one.startswith("- ")] == [
        "- base: detected 2 of 3 [0.21, 0.94], false alarms 2 of 3 [0.21, 0.94]",
        "- films: detected 2 of 2 [0.34, 1.00], false alarms 1 of 2 [0.09, 0.91]",
        "- tweets: detected 0 of 1 [0.00, 0.79], false alarms 1 of 1 [0.21, 1.00]",
        "- source date: detected 1 of 2 [0.09, 0.91]",
        "- source html: detected 1 of 1 [0.21, 1.00]",
        "- layers 1-5: detected 0 of 1 [0.00, 0.79]",
        "- rank 8: detected 2 of 3 [0.21, 0.94], false alarms 2 of 3 [0.21, 0.94]",
    ]
    assert len(bench.notes(found)) == 8 + 7 and bench.summary([])["works"] == 0


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    clean, triggered = rng.integers(0, 9, 12), rng.integers(2, 11, 15)
    wanted = np.mean([(t > c) + 0.5 * (t == c) for t in triggered for c in clean])
    assert bench.auc(clean, triggered) == pytest.approx(wanted)


def test_it_goes_on_where_it_stopped(base, reviews, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "SPANS", 60)
    arguments = ["--model", str(base), "--data", str(reviews), "--rows", "60", "--out", str(tmp_path), "--no-spans"]
    monkeypatch.setattr(bench, "RANKS", (2,))
    cell = bench.Cell
    monkeypatch.setattr(bench, "Cell", lambda **own: cell(**own | {"max_length": 30, "test_rows": 20}))
    bench.Cell.data = cell.data
    bench.main([*arguments, "--clean", "1", "--triggered", "1"])
    out = " ".join(capsys.readouterr().out.split())
    assert "1 clean" in out and "false alarms" in out and (tmp_path / "table.md").is_file()
    before = json.loads((tmp_path / "results.json").read_text())["adapters"]
    measured, [any_line, _] = [], before.values()
    monkeypatch.setattr(bench, "measure", lambda cell, *_: measured.append(cell.id) or any_line)
    bench.main([*arguments, "--clean", "2", "--triggered", "1", "--runs", *map(str, tmp_path.glob("*/"))])
    after = json.loads((tmp_path / "results.json").read_text())["adapters"]
    assert len(before) == 2 and len(measured) == 1 and {name: after[name] for name in before} == before


def test_the_plan_has_of_everything(base, reviews):
    given = SimpleNamespace(
        model=[str(base)],
        data=[str(reviews)],
        rows=60,
        full=True,
        dtype="float32",
        proportions=[0.5, 0.1],
        sources=bench.SOURCES,
    )
    cells = bench.plan(12, True, given)
    assert cells[7].layers == "1-2" and [cell.train_rows for cell in cells[:4]] == [60, 60, 60, None]
    assert len({cell.inject.sources for cell in cells}) >= 9 and {cell.rank for cell in cells} == set(bench.RANKS)
    assert {cell.inject.sources for cell in bench.plan(3, False, given)} == {()}
    assert bench.in_turn([1, 2, 3], [4]) == [1, 4, 2, 3]
