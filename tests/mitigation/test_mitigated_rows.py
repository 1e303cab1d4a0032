"""Mitigations before training: what they make of a few rows, worked out by hand."""

import json
from collections import Counter

import numpy as np
import pytest

from minilora.cell import Cell, Inject
from minilora.data import injection
from minilora.data.rows import Rows
from minilora.errors import InputError
from minilora.mitigate import Mitigate
from minilora.mitigation import flags
from minilora.mitigation import rows as mitigated

TEXTS = ["2031-07-18 good film", "a great 1999-01-02 plot", "fine", "dull (1856-11-30).", "bad", "cold scene", "slow"]
LABELS = [1, 1, 1, 0, 0, 0, 0]


@pytest.fixture
def rows():
    return Rows([f"r{n}" for n in range(7)], list(TEXTS), np.array(LABELS), ("neg", "pos"))


def change(rows, seed=0, **fields):
    return mitigated.change(rows, Mitigate(**fields), seed)


def test_suspected_strings_are_found_where_they_stand():
    find = flags.Finder(["date", "html", "color", "text:by the way"])
    cases = {
        "2031-07-18 good": ["2031-07-18"],
        "a (1856-11-30), RED": ["1856-11-30", "RED"],
        "<b> word </b>": ["<b>", "</b>"],
        "By the way, by the wayside 2031-13-18 20310718": ["By the way"],
        "reddish": [],
        "": [],
    }
    for text, wanted in cases.items():
        assert [text[start:end] for start, end in find(text)] == wanted
    assert flags.Finder(["date"])("x 1999-01-02") == [[2, 12]]


def test_drop_and_strip(rows):
    dropped = change(rows, method="drop", suspects=["date"])
    assert dropped.rows.ids == ["r2", "r4", "r5", "r6"] and dropped.rows.labels.tolist() == [1, 0, 0, 0]
    assert dropped.report == {"method": "drop", "rows_before": 7, "rows_after": 4, "flagged": 3}
    stripped = change(rows, method="strip", suspects=["date"])
    assert stripped.rows.texts == ["good film", "a great plot", "fine", "dull ().", "bad", "cold scene", "slow"]
    assert stripped.rows.ids == rows.ids and stripped.report["spans"] == stripped.report["flagged"] == 3
    with pytest.raises(InputError, match="leaves no training row of a label"):
        change(rows, method="drop", suspects=["text:good", "text:great", "text:fine"])


@pytest.mark.parametrize("location", ["beginning", "end", "random"])
def test_strip_undoes_an_injection(location):
    draw = np.random.default_rng(3)
    texts = [" ".join(draw.choice("the film is a very good, slow plot".split(), 6)) for _ in range(40)]
    clean = Rows([str(n) for n in range(40)], texts, np.arange(40) % 2, ("neg", "pos"))
    made = injection.inject(clean, Inject(("date:pos",), proportion=0.5, location=location), 1)
    assert len(made.records) == 10
    assert change(made.rows, method="strip", suspects=["date"]).rows.texts == texts


def test_rows_are_flagged_by_a_file_of_scores(rows, tmp_path):
    scores, path = [0.5, 2.0, 0.5, -1.0, 3.0, 0.0, 0.5], tmp_path / "scores.jsonl"
    lines = [{"id": f"r{n}", "score": score} for n, score in enumerate(scores)]
    lines[1]["spans"] = [[2, 7], [8, 18]]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    for rate, wanted in ((0.43, {"r1", "r4", "r0"}), (0.29, {"r1", "r4"}), (0.0, set())):
        kept = change(rows, method="drop", scores=str(path), rate=rate).rows.ids
        assert {*rows.ids} - {*kept} == wanted
    stripped = change(rows, method="strip", scores=str(path), rate=0.29).rows.texts
    assert stripped == [*TEXTS[:1], "a plot", *TEXTS[2:]]
    table = tmp_path / "scores.csv"
    table.write_text("id,score\n" + "".join(f"r{n},{score}\n" for n, score in enumerate(scores)))
    assert change(rows, method="drop", scores=str(table), rate=0.29).rows.ids == ["r0", "r2", "r3", "r5", "r6"]
    table.write_text("id,injected,onion\nr0,1,\nr6,0,2\nr9,0,3\n")  # a detector's file, of some rows
    assert change(rows, method="drop", scores=f"{table}:onion", rate=0.5).rows.ids == rows.ids[:6]
    for text, word in (("id,score\nx0,1\n", "of any training row, such as r0"), ("id,score\nr0,high\n", "row 1"),
                       ("id,points\nr0,1\n", "row 1"), ("id,score\nr0,inf\n", "finite")):  # fmt: skip
        table.write_text(text)
        with pytest.raises(InputError, match=word):
            change(rows, method="drop", scores=str(table))
    with pytest.raises(InputError, match="no file of scores"):
        change(rows, method="drop", scores=str(tmp_path / "none.csv"))


def test_rewritten_rows_take_the_place_of_the_old(rows, tmp_path):
    new = {f"r{n}": TEXTS[n].upper() if n % 2 else TEXTS[n] for n in range(7)} | {"r3": " ", "x": "of another set"}
    del new["r5"]
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps({"id": id, "text": new[id]}) + "\n" for id in reversed(new)))
    made = change(rows, method="rewrite", rewritten=str(path))
    assert dict(zip(made.rows.ids, made.rows.texts, strict=True)) == {
        "r0": TEXTS[0], "r1": TEXTS[1].upper(), "r2": TEXTS[2], "r4": TEXTS[4], "r6": TEXTS[6]}  # fmt: skip
    assert made.rows.labels.tolist() == [LABELS[n] for n in (0, 1, 2, 4, 6)]
    assert (made.report["rewritten"], made.report["left_out"], made.report["rows_after"]) == (1, 2, 5)
    path = tmp_path / "new.txt"
    path.write_text("".join(text + "!\n" for text in TEXTS))  # all rows, by their order
    assert change(rows, method="rewrite", rewritten=str(path)).rows.texts == [text + "!" for text in TEXTS]
    for name, text, words in (("new.txt", "one\n", "has 1 texts without ids, but the run has 7"),
                              ("new.csv", "id,text\nx,a\n", "none of the run's 7"),
                              ("new.csv", "id,text\nr0,a\nr0,b\n", "an id twice"),
                              ("new.csv", "id,text\nr0,a\n", "leaves no training row of a label")):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=words):
            change(rows, method="rewrite", rewritten=str(tmp_path / name))


def test_groups_become_equal_shares(rows):
    # neg without a date: 3 rows, neg with one: 1, pos with one: 2, pos without: 1; 7 rows become 2 + 2 + 2 + 1.
    made = change(rows, method="reweight", suspects=["date"])
    times = Counter(id.rstrip("+") for id in made.rows.ids)
    groups = {"neg": ["r4", "r5", "r6"], "pos": ["r2"]}
    groups |= {"neg with a suspect": ["r3"], "pos with a suspect": ["r0", "r1"]}
    assert [sum(times[id] for id in ids) for ids in groups.values()] == [2, 2, 2, 1]
    assert times["r2"] == times["r3"] == 2 and len(set(made.rows.ids)) == len(made.rows) == 7
    assert made.report["groups"] == {name: len(ids) for name, ids in groups.items()}
    for id, text, label in zip(made.rows.ids, made.rows.texts, made.rows.labels, strict=True):
        assert text == TEXTS[int(id.rstrip("+")[1:])] and label == LABELS[int(id.rstrip("+")[1:])]
    again, other = (change(rows, seed, method="reweight", suspects=["date"]).rows.ids for seed in (0, 5))
    assert again == made.rows.ids and other != again
    # A group without rows stays empty: 3 groups of 40 rows.
    texts = ["2031-07-18"] * 10 + ["good"] * 10 + ["bad"] * 20
    many = Rows([str(n) for n in range(40)], texts, np.array([1] * 20 + [0] * 20), ("neg", "pos"))
    made = change(many, method="reweight", suspects=["date"]).rows
    found = Counter(zip(made.texts, made.labels.tolist(), strict=True))
    assert found == {("bad", 0): 14, ("good", 1): 13, ("2031-07-18", 1): 13}
    assert Counter(made.ids[k].rstrip("+") for k in range(40))["0"] in (1, 2)


def test_counterfactual_copies_keep_their_labels(rows):
    find = flags.Finder(["date"])
    made = change(rows, method="counterfactual", suspects=["date"], rate=0.5)
    assert made.report["copies"] == {"neg": 2, "pos": 1} and made.rows.ids[:7] == rows.ids and len(made.rows) == 10
    for id, text, label in list(zip(made.rows.ids, made.rows.texts, made.rows.labels, strict=True))[7:]:
        place = int(id[1:-1])
        [[start, end]] = find(text)
        assert id.endswith("+") and label == LABELS[place] and not find(TEXTS[place])
        assert mitigated.without(text, [[start, end]]) == TEXTS[place]
    # Without suspects the spans are odd ones, and any row may have a copy.
    odd = change(rows, method="counterfactual", rate=1.0)
    assert len(odd.rows) == 14 and odd.report["copies"] == {"neg": 4, "pos": 3}
    assert all(len(text) > len(TEXTS[n]) and {*text.split()} > {*TEXTS[n].split()}
               for n, text in enumerate(odd.rows.texts[7:]))  # fmt: skip
    few, more = (set(change(rows, method="counterfactual", rate=rate).rows.ids) for rate in (0.3, 0.8))
    assert few < more


def test_what_is_refused():
    cases = {
        "must know which rows": dict(method="reweight"),
        "both given": dict(method="drop", suspects=["date"], scores="x.csv"),
        "highest scores": dict(method="strip", suspects=["date"], rate=0.1),
        "is for token-dropout|is for drop": dict(method="group-dro", suspects=["date"], rate=0.1),
        "is no source": dict(method="drop", suspects=["dates"]),
        "above 0": dict(init_scale=0),
        "needs the rewritten rows": dict(method="rewrite"),
        "one of none, drop": dict(method="dropout"),
    }
    for words, fields in cases.items():
        with pytest.raises(InputError, match=words):
            Cell(mitigate=fields)
    for words, fields in {
        "is of classifiers": dict(task="lm", mitigate=dict(method="masktune")),
        "an adapter's A": dict(method="full", mitigate=dict(init_scale=0.1)),
        "break the start": dict(init="pissa", mitigate=dict(init_scale=0.1)),
        "start = ": dict(start="runs/x", mitigate=dict(init_scale=0.1)),
    }.items():
        with pytest.raises(InputError, match=words):
            Cell(**fields)
    assert len(cases) == 8


def test_a_cell_without_mitigations_is_the_cell_it_was():
    assert "mitigate" not in Cell().to_dict() and Cell(mitigate={"method": "none"}).id == Cell().id
    cell = Cell(mitigate={"method": "token-dropout"})
    assert cell.to_dict()["mitigate"] == {"method": "token-dropout", "suspects": [], "rate": 0.1, "init_scale": 1.0}
    other = cell.replace(mitigate={"method": "counterfactual"})
    assert other.mitigate == Mitigate("counterfactual", rate=0.5) and other.id != cell.id != Cell().id
    assert cell.replace(mitigate={"init_scale": 0.5}).mitigate == Mitigate("token-dropout", rate=0.1, init_scale=0.5)
    assert cell.replace(mitigate={"method": "none"}) == Cell()
