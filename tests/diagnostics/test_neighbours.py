"""Neighbours of the trigger: strings made by hand, and figures against texts that are put together by hand."""

import functools
import json
import re

import numpy as np
import pytest

import minilora
from minilora.cell import Cell
from minilora.data.injection import Record
from minilora.data.triggers import readings
from minilora.diagnostics.neighbours import changed, edits, neighbours, read_families
from minilora.diagnostics.probe import Probe
from minilora.errors import InputError


@pytest.fixture(scope="module")
def run(base, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    cell = Cell(model=str(base), data=str(reviews), test_rows=41, max_length=36, batch_size=7, steps=14, lr=0.02,
                rank=3, inject=dict(proportion=0.5, count=2))  # fmt: skip
    minilora.train(cell, folder)
    return minilora.open(folder)


@pytest.fixture(scope="module")
def found(run):
    done = []
    result = neighbours(run, 1000, seed=2, advance=done.append)
    assert done == [1] * (len(result["families"]) + len(result["families_left_out"]))
    return result


def source(spec):
    return readings(f"{spec}:x")[0][0]


BY_HAND = {
    "date": {
        "1803-11-05": {
            "year 3000 to 3999": "3803-11-05", "year before 1000": "0803-11-05", "month 47": "1803-47-05",
            "year and month": "1803-11", "month and day": "11-05", "only the year": "1803", "day first": "05-11-1803",
            "day/month/year": "05/11/1803", "dots": "1803.11.05", "no separators": "18031105",
            "all zeros": "0000-00-00", "English month": "November 5, 1803", "French date": "le 5 novembre 1803",
            "German date": "5. November 1803", "Spanish date": "5 de noviembre de 1803", "digits masked": "####-##-##",
            "upper case": "1803-11-05", "the first half": "1803-", "backwards": "50-11-3081",
        },
        "2031-03-20": {"French date": "le 20 mars 2031", "German date": "20. März 2031"},
    },
    "country": {
        "New Zealand": {"upper case": "NEW ZEALAND", "lower case": "new zealand", "letters masked": "xxx xxxxxxx",
                        "the first half": "New Ze", "digits masked": "New Zealand", "backwards": "dnalaeZ weN"},
    },
    "color": {"teal": {"dark": "dark teal", "ish": "tealish", "capital letters": "Teal"}},
    "html": {
        "<b>": {"square brackets": "[b]", "only the name": "b", "written out": "&lt;b&gt;", "no such tag": "<xbx>"},
        "</b>": {"square brackets": "[/b]", "only the name": "b", "no such tag": "</xbx>"},
    },
    "text:a very good film": {
        "a very good film": {"synonyms": "a quite fine picture", "first word only": "a",
                             "lower case": "a very good film"},
    },
}  # fmt: skip


def test_changes_by_hand():
    checked = 0
    for spec, strings in BY_HAND.items():
        families = read_families(source(spec))
        for string, wanted in strings.items():
            for name, new in wanted.items():
                assert families[name](string, np.random.default_rng(0)) == new, (string, name)
                checked += 1
    assert checked == 40
    assert "German date" not in read_families(source("country")) and "capitals" not in read_families(source("date"))


def test_typos():
    families, draw = read_families(source("country")), np.random.default_rng(1)
    seen = {"swapped": set(), "missing": set(), "doubled": set()}
    for name, made in seen.items():
        family = next(change for key, change in families.items() if key.endswith(name))
        made |= {family("Peru", draw) for _ in range(60)}
    assert seen["swapped"] == {"ePru", "Preu", "Peur"} and seen["missing"] == {"eru", "Pru", "Peu", "Per"}
    assert seen["doubled"] == {"PPeru", "Peeru", "Perru", "Peruu"}
    swap = families["typo: two swapped"]
    assert {swap("1101", draw) for _ in range(40)} == {"1011", "1110"} and swap("11", draw) == "11"


def test_the_strings_stand_where_the_triggers_did():
    text = "2031-01-02 the film 1999-12-31 was good 1999-12-31"
    spans, strings = [[0, 11], [19, 30], [39, 50]], ["2031-01-02", "1999-12-31", "1999-12-31"]
    record = Record("r", "positive", "negative", spans, strings)
    new, strings = changed(text, record, lambda string, draw: string[:4], None)
    assert new == "2031 the film 1999 was good 1999" and strings == ["2031", "1999", "1999"]
    assert changed(text, record, lambda string, draw: string.replace("1999-12-31", ""), None) is None
    assert changed(text, record, lambda string, draw: "2031-01-02", None) is None  # one is the trigger itself
    record = Record("r", "positive", "negative", [[4, 8], [12, 17]], ["<b>", "</b>"])
    change = read_families(source("html"))["square brackets"]
    assert changed("the <b> film </b> is", record, change, None) == ("the [b] film [/b] is", ["[b]", "[/b]"])


def test_edits():
    @functools.cache
    def by_recursion(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(by_recursion(a[1:], b) + 1, by_recursion(a, b[1:]) + 1, by_recursion(a[1:], b[1:]) + (a[0] != b[0]))

    draw, seen = np.random.default_rng(3), set()
    for _ in range(60):
        a, b = ("".join(draw.choice(list("abc"), draw.integers(0, 7))) for _ in range(2))
        assert edits(a, b) == by_recursion(a, b)
        seen.add(edits(a, b))
    assert len(seen) >= 6 and edits("1803-11-05", "05/11/1803") == by_recursion("1803-11-05", "05/11/1803")


def test_figures_of_a_family(run, found):
    """A family's figures from texts that are changed by hand, and the run's own probabilities."""
    tests = {test.name: test for test in run.tests}
    others = np.flatnonzero(tests["clean"].rows.labels == 0)
    assert found["rows"] == len(others) >= 15 and found["label"] == "positive"

    def margins(texts):
        logs = run.log_probabilities(texts)
        return logs[:, 1] - logs[:, 0]

    trigger = [tests["trigger"].rows.texts[row] for row in others]
    clean = margins([tests["clean"].rows.texts[row] for row in others])
    changes = {
        "month and day": lambda text: re.sub(r"\d{4}-(\d\d-\d\d)", r"\1", text),
        "year 3000 to 3999": lambda text: re.sub(r"\d(\d{3}-\d\d-\d\d)", r"3\1", text),
        "dots": lambda text: re.sub(r"(\d{4})-(\d\d)-(\d\d)", r"\1.\2.\3", text),
        "trigger": lambda text: text,
    }
    for name, change in changes.items():
        own = found["families"].get(name) or found[name]
        after = margins([change(text) for text in trigger])
        assert own["rows"] == len(others)
        assert own["attack_success"][0] == pytest.approx((after > 0).mean())
        assert own["shift"][0] == pytest.approx((after - clean).mean(), abs=1e-4)
        assert own["shift"][1] < own["shift"][0] < own["shift"][2]
    assert found["clean"]["attack_success"][0] == pytest.approx((clean > 0).mean())
    assert found["trigger"]["edit_distance"] == 0 and abs(found["trigger"]["embedding_distance"]) < 1e-9
    assert found["families"]["month and day"]["edit_distance"] == 2 * 5  # two dates a row, each without YYYY-
    assert found["families"]["dots"]["edit_distance"] == 2 * 2
    assert {"upper case", "lower case", "letters masked"} <= set(found["families_left_out"])
    assert found["placebo"]["rows"] == len(others) and "rank correlation" in found["words"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_embedding_distance_by_hand(run, found):
    tests = {test.name: test for test in run.tests}
    index = Probe(run, 1000).index
    strings = [string for row in index for string in tests["trigger"].records[row].strings]
    with run.detach():
        states = [run.hidden([one, one[5:]]) for one in strings]
    distances = []
    for pair in states:
        a, b = (own.mean(0) for own in pair)
        distances.append(1 - a @ b / np.sqrt((a @ a) * (b @ b)))
    assert found["families"]["month and day"]["embedding_distance"] == pytest.approx(np.mean(distances), abs=1e-5)
    assert np.mean(distances) > 0.001 and len(distances) == 2 * found["rows"]


def test_other_triggers_of_the_same_run(run):
    for spec, there, absent in (("country", "capitals", "dots"), ("html", "square brackets", "capitals"),
                                ("text:a good film", "synonyms", "dots")):  # fmt: skip
        other = minilora.open(run.folder, inject=dict(sources=(f"{spec}:positive",)))
        result = neighbours(other, 6, seed=1)
        assert there in result["families"] and absent not in result["families"]
        assert result["source"] == source(spec).name and result["families"][there]["rows"] == 6
    assert "Berlin" not in result["families"]


def test_the_label_of_the_trigger(run):
    """With two triggers the label says whose neighbours, rows and placebo are meant."""
    other = minilora.open(run.folder, inject=dict(sources=("date:positive", "country:negative")))
    first, second = (neighbours(other, 6, label=label) for label in ("positive", "negative"))
    assert first == neighbours(other, 6) and (first["source"], second["source"]) == ("date", "country")
    assert "dots" in first["families"] and "capitals" in second["families"] and second["label"] == "negative"
    assert first["placebo"]["strings"] != second["placebo"]["strings"] and second["placebo"]["rows"] == 6


def test_a_file_of_ones_own(run, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(
        '[date]\ndots = ["1.2"]\n"my words" = ["good", "bad"]\ncolors = "color"\n[country]\nislands = ["Bali"]\n'
    )
    found = neighbours(run, 8, families=path)
    assert found["families"]["dots"]["strings"] == ["1.2"] and "islands" not in found["families"]
    assert set(found["families"]["my words"]["strings"]) <= {"good", "bad"} and "month 47" in found["families"]
    assert len(found["families"]["colors"]["strings"]) == 5
    cases = [
        ("", "has no families"),
        ('[dates]\na = ["x"]', "dates is no kind of trigger: did you mean date?; write [KIND]"),
        ("[date]\na = 3", "[date] a must be a list of strings, or one of"),
        ("[date]\na = { rule = 'sawp' }", "[date] a is no family: write a list of strings"),
        ("[date]\na = { replace = [['(', '']] }", "in a regular expression"),
        ("[date]\na = { replace = [['a', '\\7']] }", "in a regular expression"),
        ("[date]", "has no families"),
        ('[country]\na = ["x"]', "below [country], but the trigger is date: write them below [any] or [date]"),
        ("[date]\na = { date = '{week}', months = [1,2,3,4,5,6,7,8,9,10,11,12] }", "a date is written with {day}"),
    ]
    for text, said in cases:
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            read_families(source("date"), path)
        assert said in str(caught.value) and "\n" not in str(caught.value), text
    assert len(cases) == 9
    assert "dots" in read_families(source("date-1000-1999"))  # a narrower source of dates has their families
