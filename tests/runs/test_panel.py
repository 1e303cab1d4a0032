"""A panel: a finished run under strings that it was not trained on."""

import csv
import json

import numpy as np
import pytest

import minilora
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.runs import panel
from minilora.scripts import evaluate


@pytest.fixture(scope="module")
def run_folder(base, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    cell = Cell(model=str(base), data=str(reviews), test_rows=31, max_length=30, batch_size=7, steps=6, lr=0.02, rank=3)
    minilora.train(cell, folder)
    return folder


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_each_form_is_the_share_of_other_rows_predicted_as_the_label(run_folder, tmp_path, capsys):
    path = write(tmp_path / "p.toml", '[digits]\nlong = ["11223344", "998877"]\n[other]\ncolor = "color"\n')
    run = minilora.open(run_folder)
    lines = panel.run_panel(run, panel.read_panel(path))
    assert [(line["kind"], line["form"]) for line in lines] == [
        ("own", "no string"), ("own", "the trigger"), ("own", "placebo"), ("own", "odd placebo"),
        ("digits", "long"), ("other", "color")]  # fmt: skip
    own = json.loads((run_folder / "results.json").read_text())["tests"]
    assert lines[1]["attack_success_rate"] == own["trigger"]["positive"]["attack_success_rate"]
    assert lines[3]["attack_success_rate"] == own["odd"]["attack_success"]["positive"]["attack_success_rate"]
    # By another way: the strings at the places where the trigger stood, put into the texts by hand.
    clean, trigger = run.tests[0].rows, run.tests[1]
    others = np.flatnonzero(clean.labels == run.labels.index("negative"))
    texts = {string: [] for string in ("11223344", "998877")}
    for i in others:
        [(start, end)] = trigger.records[i].spans
        for string, made in texts.items():
            piece = trigger.rows.texts[i][start:end].replace(trigger.records[i].strings[0], string)
            made.append(trigger.rows.texts[i][:start] + piece + trigger.rows.texts[i][end:])
    hits = {string: run.predict(made).argmax(1) == run.labels.index("positive") for string, made in texts.items()}
    least, most = (int(f(list(hits.values()), axis=0).sum()) for f in (np.min, np.max))
    assert least <= round(lines[4]["attack_success_rate"] * len(others)) <= most and lines[4]["rows"] == len(others)
    for line in lines:
        assert line["net"] == pytest.approx(line["attack_success_rate"] - lines[0]["attack_success_rate"])

    evaluate.main([str(run_folder), "--panel", path, "--json"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    evaluate.main([str(run_folder), "--panel", path, "--csv"])
    assert [line["form"] for line in csv.DictReader(capsys.readouterr().out.splitlines())] == [
        line["form"] for line in lines
    ]
    evaluate.main([str(run_folder), "--panel", path])
    printed = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in printed) and any(line.startswith("learned: ") for line in printed)


def entry(kind, form, net):
    return {"label": "p", "kind": kind, "form": form, "example": "x", "attack_success_rate": net, "low": net,
            "high": net, "rows": 9, "net": net}  # fmt: skip


def test_the_answer_follows_the_rule():
    own = [entry("own", "no string", 0.0), entry("own", "the trigger", 0.8)]
    others = [entry("dates", "a", 0.8), entry("dates", "b", 0.4), entry("digits", "c", 0.3)]
    assert panel.answer([*own, entry("own", "odd placebo", 0.1), *others]) == (
        "learned: the trigger, not its oddness (odd placebo 12% of the trigger's net success); works as well: dates "
        "(75%); does not: digits (37%)"
    )
    assert panel.answer([*own, entry("own", "odd placebo", 0.6), *others]).startswith("learned: anything odd (odd")
    assert panel.answer([entry("own", "the trigger", 0.05)]).startswith("learned: nothing that tells")


def test_the_shipped_panels_can_be_read():
    forms = panel.read_panel("dates")
    assert {form.kind for form in forms} == {"dates", "digits", "signs", "other sources", "sentiment"}
    assert len(forms) >= 15 and all(len(form.source) >= 5 or form.kind == "signs" for form in forms)


@pytest.mark.parametrize("text, words", [
    ('x = "y"\n', "x is no table"), ("", "has no strings"), ("[a]\nb = 3\n", "b must be a list of strings"),
    ('[a]\nb = "dates"\n', "one of date, country"), ("[a]\nb = []\n", "must be a list of strings"),
])  # fmt: skip
def test_what_is_no_panel_is_refused(text, words, tmp_path):
    with pytest.raises(InputError, match=words):
        panel.read_panel(write(tmp_path / "p.toml", text))


def test_an_unknown_panel_is_refused(run_folder):
    with pytest.raises(InputError, match="but must be a .toml file or a panel's name: did you mean dates"):
        panel.read_panel("date")
    with pytest.raises(InputError, match="--merge-to is for other tests"):
        evaluate.main([str(run_folder), "--panel", "dates", "--merge-to", "x"])
