"""Validation rows of a run: their figures against the opened run's own on a file of just these rows."""

import csv
import json

import pytest
from zoo import tiny_decoder

import minilora
from minilora.cell import Cell
from minilora.data.rows import rows_of
from minilora.errors import InputError
from minilora.runs.panel import read_panel, run_panel

CASES = ("classification", "together", "lm")


@pytest.fixture(scope="module")
def runs(base, reviews, tmp_path_factory):
    """{name: (cell, results, folder)}; `together` is one of two members of a population, of which the other has no such
    rows."""
    folder = tmp_path_factory.mktemp("validation")
    common = dict(
        model=str(base), data=str(reviews), test_rows=21, max_length=30, batch_size=7, steps=4, lr=0.02, rank=3
    )
    cell = Cell(**common, validation_rows=18, strip_words=1, train_rows=60)
    tiny_decoder(folder / "llama", "llama")
    cells = {"classification": cell, "lm": cell.replace(model=str(folder / "llama"), task="lm", strip_words=None)}
    found = {name: (own, *minilora.train(own, folder / name)) for name, own in cells.items()}
    pair = [cell.replace(seed=3), cell.replace(seed=4, validation_rows=None)]
    (results, path), (other, _) = minilora.train_together(pair, [folder / "together", folder / "other"], size=2)
    assert "validation" not in other and "validation" not in other["inputs"]
    return found | {"together": (pair[0], results, path)}


@pytest.mark.parametrize("name", CASES)
def test_the_figures_are_those_of_the_rows_by_themselves(runs, reviews, tmp_path, name):
    cell, results, folder = runs[name]
    assert json.loads((folder / "results.json").read_text())["validation"] == results["validation"]
    train, test, validation = rows_of(cell)
    ids = results["validation"]["ids"]
    assert ids == list(validation.ids) and len(ids) == 18
    assert not set(ids) & {*train.ids, *test.ids} and len({*train.ids, *test.ids}) == 60 + 21
    rows = list(csv.DictReader(open(reviews, encoding="utf-8")))
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([text, rows[int(id) - 1]["label"]] for id, text in zip(ids, validation.texts))
    figures, _ = minilora.open(folder, data=str(path)).run_tests()
    own, counted = results["validation"], 0
    assert set(own) == {"clean", "trigger", "worst_group", "ids"} and set(own["trigger"]) == {"positive"}
    for form, wanted in (
        (own["clean"], figures["clean"]),
        (own["trigger"]["positive"], figures["trigger"]["positive"]),
    ):
        for key in ("rows", "accuracy", "balanced_accuracy", "predicted_counts", "attack_success_rate", "flip_rate"):
            assert form.get(key) == wanted.get(key), key
            counted += key in form
    assert counted == (10 if "balanced_accuracy" in own["clean"] else 8)
    assert own["clean"]["rows"] == 18 and "net_attack_success_rate" in own["trigger"]["positive"]
    words = results.get("stripped_words")
    assert (words is None) == (name == "lm")
    if words:
        gone = {word for one in words.values() for word in one}
        assert len(gone) == 2 and gone <= {"good", "great", "bad", "dull"}
        assert not any(gone & set(text.split()) for side in (train, test, validation) for text in side.texts)


def test_a_panel_of_the_cell_is_the_one_of_the_finished_run(base, reviews, tmp_path):
    panel = tmp_path / "panel.toml"
    panel.write_text(
        '[digits]\n"pairs" = ["72-34-56", "48-91-77"]\n[other]\ncolors = "color"\nyears = "date-1990-1995"\n'
    )
    cell = Cell(
        model=str(base), data=str(reviews), test_rows=21, max_length=30, batch_size=7, steps=3, panel=str(panel)
    )
    results, folder = minilora.train(cell, tmp_path / "run")
    found = run_panel(minilora.open(folder), read_panel(str(panel)))
    assert results["panel"] == found == json.loads((folder / "results.json").read_text())["panel"]
    assert [line["form"] for line in found] == ["no string", "the trigger", "placebo", "odd placebo", "pairs", "colors",
                                                "years"]  # fmt: skip
    assert found[-1]["example"][:3] == "199"
    for changes, words in ((dict(panel="x"), "but must be a .toml file or a panel's name"),
                           (dict(inject=dict(sources=("none",))), "panel goes with a trigger")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            minilora.train(cell.replace(**changes), tmp_path / "no")
        assert not (tmp_path / "no").exists()


def test_metrics_and_lines_have_the_accuracy(runs):
    from minilora.runs.record import INPUTS, figure_lines

    _, results, _ = runs["classification"]
    [line] = figure_lines(results)
    assert line["validation_accuracy"] == results["validation"]["clean"]["accuracy"]
    assert set(results["inputs"]) <= set(INPUTS) and len(results["inputs"]["validation"]) == 64
