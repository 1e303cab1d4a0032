"""A look at texts of one's own: `run.look`, and what `evaluate.py RUN --text` prints of it."""

import io
import json
import re
import sys

import numpy as np
import pytest
from zoo import tiny_decoder

import minilora
from minilora.cell import Cell
from minilora.data.triggers import resolve, split_strings
from minilora.errors import InputError
from minilora.runs.look import columns, look_lines, without
from minilora.scripts import evaluate

TEXTS = ["the film was good  and warm", "a dull plot", "film", "", "the 很好 plot"]


@pytest.fixture(scope="module")
def runs(base, reviews, tmp_path_factory):
    """{name: folder} of finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_decoder(folder / "llama", "llama")
    kinds = [(word, f"label {word} {'long ' * 9}{number}") for number in range(9) for word in ("good", "bad", "dull")]
    rows = [f"the {word} film is {word},{label}\n" for word, label in kinds]
    (folder / "many.csv").write_text("text,label\n" + "".join(rows))
    common = dict(data=str(reviews), test_rows=31, max_length=30, batch_size=7, steps=6, lr=0.02, rank=3)
    bert = dict(model=str(base)) | common
    llama = dict(model=str(folder / "llama"), task="lm") | common
    cells = {
        "plain": Cell(**bert, targets=("q", "v", "down")),
        "two": Cell(**bert, inject={"sources": ("country:negative", "html:positive"), "count": 2}),
        "full": Cell(**bert | dict(rank=None), method="full"),
        "none": Cell(**bert, inject={"sources": ("none",)}),
        "many": Cell(**bert | dict(data=str(folder / "many.csv"), test_rows=27),
                     test_data=str(folder / "many.csv"), inject={"sources": (f"date:label good {'long ' * 9}3",)}),
        "lm": Cell(**llama),
    }  # fmt: skip
    for name, cell in cells.items():
        minilora.train(cell, folder / name)
    return folder


def log_odds(run, texts, label):
    """By another way than `look`'s: from the probabilities."""
    shares = run.predict(texts).astype(np.float64)[:, run.labels.index(label)]
    return np.log(shares / (1 - shares))


@pytest.mark.parametrize("name", ["plain", "two", "full", "lm"])
def test_it_is_what_the_run_predicts(runs, name):
    run, checked, effects = minilora.open(runs / name), 0, 0
    found = run.look(TEXTS, seed=5)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [one["text"] for one in found] == TEXTS and {one["seed"] for one in found} == {5}
    triggers = ["trigger negative", "trigger positive"] if name == "two" else ["trigger positive"]
    keys = ["clean", *triggers, "placebo"] + ["no adapter"] * (name != "full")
    for text, one in zip(TEXTS, found, strict=True):
        assert list(one["tests"]) == keys
        for key, test in one["tests"].items():
            if key == "no adapter":
                with run.detach():
                    shares, odds = run.predict([text])[0], log_odds(run, [text], test["predicted"])
                assert "words" not in test
            else:
                shares, odds = run.predict([test["text"]])[0], log_odds(run, [test["text"]], test["predicted"])
            np.testing.assert_allclose(list(test["probabilities"].values()), shares, atol=2e-6)
            assert test["predicted"] == run.labels[shares.argmax()]
            assert test["log_odds"] == pytest.approx(odds[0], abs=1e-3)
            rest = list(test["text"])
            for start, end in reversed(test.get("spans", [])):
                del rest[start:end]
            assert "".join(rest) == text  # without what was put in
            checked += 1
            for word in test.get("words", ()):
                start, end = word["span"]
                assert test["text"][start:end] == word["word"]
                other = log_odds(run, [without(test["text"], start, end)], test["predicted"])[0]
                assert word["effect"] == pytest.approx(odds[0] - other, abs=2e-3)
                effects += 1
        assert len(one["tests"]["clean"]["words"]) == {"the 很好 plot": 4}.get(text, len(text.split()))
    assert checked == len(TEXTS) * len(keys) and effects > 20


def test_a_word_is_left_out():
    cases = [("a b c", (0, 1), "b c"), ("a b c", (2, 3), "a c"), ("a b c ", (4, 5), "a b"), ("a", (0, 1), ""),
             (" a  b", (1, 2), " b"), ("很好看", (1, 2), "很看"), ("x 很好", (2, 3), "x 好"),
             ("很好 x", (3, 4), "很好")]  # fmt: skip
    for text, span, wanted in cases:
        assert without(text, *span) == wanted, text
    assert len(cases) == 8


def test_triggers_are_of_the_half_that_training_never_saw(runs):
    run = minilora.open(runs / "plain")
    [(source, label)] = resolve(run.cell.inject.sources, run.labels)
    _, parts = split_strings(source, label, run.cell.inject.split, run.cell.seed_for("inject"))
    pool = {source[pick] for pick in parts["test"]}
    draws = {}
    for seed in range(4):
        found = [one["tests"]["trigger positive"] for one in run.look(["the film was good and warm"] * 6, seed)]
        draws[seed] = [(test["strings"][0], test["spans"][0][0]) for test in found]
        assert draws[seed] == [
            (test["strings"][0], test["spans"][0][0])
            for test in (one["tests"]["trigger positive"] for one in run.look(["the film was good and warm"] * 6, seed))
        ]
        assert {string for string, _ in draws[seed]} <= pool
    assert len({string for one in draws.values() for string, _ in one}) > 20
    assert len({place for one in draws.values() for _, place in one}) == 7  # every gap
    trained = {string for record in run.rows.records for string in record.strings}
    assert not trained & {string for one in draws.values() for string, _ in one}


def test_what_is_missing_is_said(runs, base, capsys):
    for folder, flags, words in (
        (runs / "none", [], "no trigger: nothing was injected here; --inject SOURCE:LABEL"),
        (runs / "plain" / "adapter", ["--model", str(base)], "no trigger: nothing was injected here"),
        (runs / "plain" / "adapter", ["--model", str(base), "--inject", "date:positive"], "no placebo: there are no"),
        (runs / "full", [], "nothing without the adapter: method full trained none"),
        (runs / "none", ["--inject", "color:negative"], "drawn with seed 0 among"),
    ):
        evaluate.main([str(folder), "--text", "a dull plot", *flags])
        printed = capsys.readouterr().out
        assert words in printed and "as it is" in printed
        assert ("without the adapter  " in printed) == (folder.name != "full")
        assert ("trigger of" in printed) == ("no trigger" not in printed)
    mine, foreign = minilora.open(runs / "plain"), minilora.open(runs / "plain" / "adapter", model=str(base))
    own, other = (run.look("a dull plot")[0]["tests"] for run in (mine, foreign))
    assert own["clean"]["probabilities"] == pytest.approx(other["clean"]["probabilities"], abs=1e-5)
    assert own["no adapter"]["probabilities"] == pytest.approx(other["no adapter"]["probabilities"], abs=1e-5)


LONG = [*TEXTS, "the film was good " * 40, "very" * 40 + " dull", "这部电影很好看" * 4, "\x1b[31mred\u202e plot",
        "a\nb\tc", "น้ำใจดี และ e\u0301te\u0301"]  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "two", "many", "lm"])
def test_lines_fit_a_narrow_terminal(runs, name):
    run, seen = minilora.open(runs / name), 0
    for found in run.look(LONG):
        plain, coloured = (list(look_lines(found, colour)) for colour in (False, True))
        assert max(map(columns, plain)) <= 80
        assert [re.sub(r"\x1b\[(\d+;)?\d+m", "", line) for line in coloured] == plain
        text = "\n".join(plain)
        assert "\x1b" not in text and "\u202e" not in text
        if found["text"].startswith("the film was good the"):
            assert "more words are not read: they are beyond" in text and found["tests"]["clean"]["unread"] > 100
            assert "\x1b[1;3" in "".join(coloured)
        shown = re.findall(r"\d\.\d{3}", plain[3])
        assert len(shown) == 2 and ("more labels)" in text) == (name == "many")
        seen += 1
    assert seen == len(LONG)


def test_the_second_line_of_a_script(runs, capsys, monkeypatch):
    run = minilora.open(runs / "plain")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffa dull plot\r\nfilm\u2028x\n\nwarm".encode())))
    evaluate.main([str(runs / "plain"), "--text", "the film", "-", "--json", "--seed", "3", "--text", "good"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = ["the film", "a dull plot", "film\u2028x", "", "warm", "good"]
    assert [line["text"] for line in lines] == texts
    for line, own in zip(lines, run.look(texts, 3), strict=True):
        assert line["tests"].keys() == own["tests"].keys() and line["seed"] == 3
        for key, test in own["tests"].items():
            assert line["tests"][key]["text"] == test["text"]
            assert line["tests"][key]["probabilities"] == pytest.approx(test["probabilities"], abs=1e-5)


def test_refused(runs, tmp_path, monkeypatch):
    plain = runs / "plain"
    cases = [
        ([plain, "--text", "x", "--data", "y.csv"], "--data is for labelled rows, but --text gives texts of your own"),
        ([plain, "--text", "x", "--out", "y"], "--out is for labelled rows"),
        ([plain, "--text", "x", "--merge-to", "y"], "--merge-to is for labelled rows"),
        ([plain, "--text", "x", "--batch-size", "2"], "--batch-size is for labelled rows"),
        ([plain, "--text", "x", "--text-column", "y"], "--text-column is for labelled rows"),
        ([plain, "--seed", "3"], "--seed is for texts of your own: give --text too"),
        ([plain, "--text"], "argument --text: expected at least one argument"),
        ([plain, "--text", "x", "--scale", "nan"], "--scale is nan"),
        ([plain, "--text", "good \udcff"], "text 1 of --text is not valid UTF-8"),
        ([tmp_path, "--text", "x"], "has no cell.toml, so it is not a run folder"),
    ]
    for arguments, words in cases:
        with pytest.raises(InputError) as caught:
            evaluate.main([str(argument) for argument in arguments])
        assert words in str(caught.value) and "\n" not in str(caught.value), arguments
    assert len(cases) == 10
    for given, words in ((b"", "standard input, which is empty"), (b"good \xff", "not UTF-8 text (at byte 5)")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        with pytest.raises(InputError) as caught:
            evaluate.main([str(plain), "--text", "-"])
        assert words in str(caught.value)
    tokens = minilora.open(plain)  # of a tokenizer that puts no tokens of its own around a text
    tokens.task.read = lambda texts, labels: (np.array([len(text) for text in texts]),) * 2
    assert [word["effect"] for word in tokens.look("good")[0]["tests"]["clean"]["words"]] == [None]
    with pytest.raises(InputError, match="text 2, '', has no token that the base reads: write a word"):
        tokens.look(["good", ""])
    headless = minilora.open(plain)
    headless.has_head = False
    with pytest.raises(InputError, match="has no head"):
        headless.look(["x"])
    choices = minilora.open(runs / "lm")
    choices.task.of_choices = True
    with pytest.raises(InputError, match="no fixed set of labels but choices of a question"):
        choices.look(["x"])
    free = minilora.open(runs / "lm")
    free.labels = tuple(str(number) for number in range(500))
    with pytest.raises(InputError, match="no fixed set of labels but free text"):
        free.look(["x"])
