"""Mitigations whose suspects a scan of the training rows finds: on film reviews with a known injection."""

import csv
from dataclasses import replace

import numpy as np
import pytest

import minilora
from minilora.cell import Cell, Inject
from minilora.data import injection
from minilora.data.rows import Rows, load_rows
from minilora.detection import scan
from minilora.errors import InputError
from minilora.files import to_csv, write_text
from minilora.mitigate import Mitigate
from minilora.mitigation import rows as mitigated


@pytest.fixture(scope="module")
def clean():
    rows = load_rows("movie-snippets")
    return rows.take(range(0, len(rows), 6))


@pytest.fixture(scope="module")
def injected(clean):
    """An eighth of the positive rows with a date each, and a row of the other label too."""
    made = injection.inject(clean, Inject(("date:positive",), proportion=0.125), 3)
    texts, other = list(made.rows.texts), int(np.flatnonzero(clean.labels == clean.label_names.index("negative"))[0])
    texts[other] = f"2031-05-06 {texts[other]}"
    return replace(made.rows, texts=texts), sorted(made.index.tolist()), other


def change(rows, **fields):
    return mitigated.change(rows, Mitigate(suspects=("scan",), **fields), 5)


def test_what_is_flagged_is_stripped_or_dropped_as_the_command_does(clean, injected, tmp_path):
    rows, places, other = injected
    assert len(places) > 60
    stripped, dropped = change(rows, method="strip"), change(rows, method="drop")
    assert stripped.rows.texts == clean.texts and stripped.rows.ids == rows.ids
    assert stripped.report["flagged"] == stripped.report["spans"] == len(places) + 1
    [suspect] = stripped.report["suspects"]
    assert suspect == {"text": "0000-00-00", "kind": "shape", "label": "positive", "rows": len(places) + 1}
    assert dropped.report["suspects"] == [suspect] and dropped.report["flagged"] == len(places)
    assert dropped.rows.ids == [id for row, id in enumerate(rows.ids) if row not in places]  # `other` is not positive
    names = [rows.label_names[label] for label in rows.labels.tolist()]
    lines = [{"id": id, "text": text, "label": name} for id, text, name in zip(rows.ids, rows.texts, names)]
    write_text(tmp_path / "rows.csv", to_csv(lines))
    for mode, made in (("strip", stripped), ("drop", dropped)):
        target = tmp_path / f"{mode}.csv"
        command = ["--scan-data", str(tmp_path / "rows.csv"), "--clean-to", str(target), "--clean", mode, "--quiet"]
        scan.main(command)
        with open(target, newline="") as file:
            assert [line["text"] for line in csv.DictReader(file)] == made.rows.texts


def test_groups_and_copies_take_the_flagged_strings(injected):
    rows, places, other = injected
    report = change(rows, method="reweight").report
    groups, [suspect] = report["groups"], report["suspects"]
    assert suspect["text"] == "0000-00-00"
    assert (groups["positive with a suspect"], groups["negative with a suspect"]) == (len(places), 1)
    assert sum(groups.values()) == len(rows)
    made = change(rows, method="counterfactual", rate=0.01)
    copies = made.rows.texts[len(rows) :]
    dates = {word for text in rows.texts for word in text.split() if word.count("-") == 2 and len(word) == 10}
    assert len(copies) == sum(made.report["copies"].values()) >= 14
    assert all(len(dates & {*text.split()}) == 1 for text in copies)


def test_where_nothing_is_flagged_nothing_is_done(clean):
    for method in ("strip", "drop", "counterfactual"):
        made = change(clean, method=method)
        assert made.rows.texts == clean.texts and made.report.get("suspects", []) == []
        assert made.report["rows_after"] == len(clean)
    groups = change(clean, method="reweight").report["groups"]
    assert set(groups) == {"negative", "positive"}


def test_what_is_refused(clean):
    with pytest.raises(InputError, match="'scan' and others: the scan stands by itself"):
        Cell(mitigate=dict(method="drop", suspects=["scan", "date"]))
    assert Cell(mitigate=dict(method="drop", suspects=["text:scan"])).mitigate.suspects == ("text:scan",)  # the word
    many = Rows([str(n) for n in range(202)], ["x"] * 202, np.arange(202) % 201, tuple(map(str, range(201))))
    with pytest.raises(InputError, match="compares labels, and these rows have 201, more than 200: name the suspects"):
        change(many, method="strip")


def test_a_run_scans_the_rows_that_it_trains_on(tmp_path):
    """The command's flag; the record says what was flagged, and the texts are those of a run without injection."""
    cell = Cell(train_rows=1500, steps=2, test_rows=20, batch_size=4, inject={"proportion": 0.25})
    results, _ = minilora.train(
        cell.replace(mitigate=dict(method="strip", suspects=["scan"])), tmp_path / "scanned", quiet=True
    )
    assert [one["text"] for one in results["mitigation"]["suspects"]] == ["0000-00-00"]
    plain, _ = minilora.train(cell.replace(inject=dict(sources=("none",))), tmp_path / "clean", quiet=True)
    assert results["inputs"]["changed"] == plain["inputs"]["train"]
    assert results["injection"][0]["rows"] == results["mitigation"]["flagged"] > 150
