"""The paired tests and their figures, on a tiny base; predictions against one row at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_bert

from minilora.base import model, tokenizer
from minilora.cell import Inject
from minilora.data.rows import Rows, train_test
from minilora.data.triggers import resolve
from minilora.runs.text import natural_lines, results_table
from minilora.tasks.classification import Classifier, features, predict, predictions
from minilora.tasks.paired import Test, build_tests, measure, natural


@pytest.fixture(scope="module")
def tools(tmp_path_factory, reviews):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_bert(folder)
    classifier = Classifier(model.load(folder), "mean+last", 2, seed=3).eval()
    train, test = train_test(reviews, test_rows=41)
    return SimpleNamespace(model=classifier, tokenizer=tokenizer.load(folder), train=train, test=test)


def test_predictions_do_not_depend_on_the_batch(tools):
    texts = [*tools.test.texts, "good " * 50]  # the last is cut
    one, kept = predict(tools.model, tools.tokenizer, texts, 30, 1)
    cases = 0
    for batch_size in (2, 5, 64):
        other, again = predict(tools.model, tools.tokenizer, texts, 30, batch_size)
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-6)
        assert np.array_equal(other.argmax(1), one.argmax(1)) and np.array_equal(again, kept)
        cases += 1
    assert cases == 3 and len(np.unique(one.argmax(1))) == 2
    assert kept.tolist() == [len(text) for text in tools.test.texts] + [28 * 5]
    for row in (0, 17, 41):  # a row by itself, without our batches
        encoded = tools.tokenizer.encode([texts[row]], 30)
        with torch.inference_mode():
            alone = tools.model(torch.from_numpy(encoded.ids)[None].long(), torch.tensor([len(encoded.ids)]))
        np.testing.assert_allclose(alone[0].numpy(), one[row], rtol=0, atol=2e-6)


def test_features_are_those_of_the_model(tools):
    encoded = tools.tokenizer.encode(tools.test.texts, 30)
    pooled = features(tools.model, encoded, tools.tokenizer.pad_id, 7)
    logits, _ = predict(tools.model, tools.tokenizer, tools.test.texts, 30, 7)
    weight, bias = tools.model.classifier.weight, tools.model.classifier.bias
    torch.testing.assert_close(pooled @ weight.T + bias, torch.from_numpy(logits), rtol=0, atol=1e-5)


def test_every_row_in_every_form(tools):
    inject = Inject(sources=("date:positive", "color:negative"), count=2)
    tests = build_tests(tools.train, tools.test, inject, 5, None, tools.tokenizer.known)
    assert [(t.name, t.label) for t in tests] == [
        ("clean", None), ("trigger", "positive"), ("trigger", "negative"), ("placebo", None), ("placebo", "negative"),
        ("odd", None), ("odd", "negative")]  # fmt: skip
    clean, date, color, placebo = tests[:4]
    for test in tests:
        assert test.rows.ids == clean.rows.ids and np.array_equal(test.rows.labels, clean.rows.labels)
    checked = 0
    for test in tests[1:]:
        for record, text, original in zip(test.records, test.rows.texts, clean.rows.texts, strict=True):
            for start, end in reversed(record.spans):
                text = text[:start] + text[end:]
            assert text == original and len(record.spans) == 2
            checked += 1
    assert checked == 6 * 41
    words = {word for text in tools.train.texts for word in text.split()}
    for one, other in zip(date.records, placebo.records, strict=True):  # same places and number of words
        gaps = [[a - sum(e - s for s, e in r.spans[:i]) for i, (a, _) in enumerate(r.spans)] for r in (one, other)]
        assert gaps[0] == gaps[1] and all(string in words for string in other.strings)
    alone = build_tests(tools.train, tools.test, Inject(sources=()), 5, None, None)
    assert [(t.name, t.rows) for t in alone] == [("clean", tools.test)]


def test_figures_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    rows = Rows(list("abcdef"), ["x"] * 6, labels, ("n", "p", "u"))
    record = SimpleNamespace(spans=[[3, 9]], strings=["so"])
    tests = [
        Test("clean", None, rows, []),
        Test("trigger", "p", rows, [record] * 6),
        Test("placebo", None, rows, [record] * 6),
    ]
    calls = np.array([[0, 0, 1, 1, 1, 2], [1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 2]])
    logits = [np.eye(3, dtype=np.float32)[row] for row in calls]
    kept = [np.full(6, 99), np.array([9, 8, 99, 99, 99, 3]), np.full(6, 9)]
    figures = measure(tests, labels, rows.label_names, list(calls), kept)
    clean, trigger, placebo = figures["clean"], figures["trigger"]["p"], figures["placebo"]
    assert [f["accuracy"] for f in (clean, trigger, placebo)] == [5 / 6, 2 / 6, 4 / 6]
    assert clean["attack_success"]["p"]["attack_success_rate"] == 1 / 4
    assert trigger["attack_success_rate"] == 3 / 4 and placebo["attack_success"]["p"]["attack_success_rate"] == 1 / 4
    assert trigger["flip_rate"] == 3 / 6 and placebo["flip_rate"] == 1 / 6
    assert trigger["truncated"] == 2 and placebo["truncated"] == 0 and placebo["matched_to"] == "p"
    assert trigger["predicted_counts"] == {"n": 1, "p": 5, "u": 0}
    assert figures["worst_group"] == {"label": "n", "test": "trigger p", "rows": 3, "accuracy": 0.0, "minimum_of": 6}
    assert trigger["net_attack_success_rate"] == 2 / 4 == trigger["over_placebo_attack_success_rate"]
    assert trigger["conditional_attack_success_rate"] == 2 / 3 and "net_attack_success_rate" not in placebo
    lines = list(predictions(tests, logits))
    assert [line["id"] for line in lines] == rows.ids and [line["label"] for line in lines] == list("nnnppu")
    assert [line["trigger p"]["predicted"] for line in lines] == list("pppppn")
    assert lines[0]["clean"] == {"predicted": "n", "logits": [1.0, 0.0, 0.0]} and lines[0]["text"] == "x"
    assert lines[0]["placebo"] == lines[0]["clean"] | {"text": "x", "spans": [[3, 9]], "strings": ["so"]}


def test_each_trigger_has_its_own_placebos(tools):
    inject = Inject(sources=("date:positive", "color:negative"))
    count = tools.tokenizer.count
    tests = build_tests(tools.train, tools.test, inject, 5, None, tools.tokenizer.known, count)
    assert [test.key for test in tests] == ["clean", "trigger positive", "trigger negative", "placebo",
                                            "placebo negative", "odd", "odd negative"]  # fmt: skip
    labels, rows = tools.test.labels, len(tools.test)
    calls = [np.full(rows, k % 2) for k in (0, 1, 0, 0, 1, 1, 0)]
    figures = measure(tests, labels, tools.test.label_names, calls, [np.full(rows, 999)] * 7)
    for kind, positive, negative in (("placebo", 0.0, 0.0), ("odd", 1.0, 1.0)):
        attacks = figures[kind]["attack_success"]
        assert attacks["positive"]["attack_success_rate"] == positive  # of the first one
        assert attacks["negative"]["attack_success_rate"] == negative  # of the second, 1 - its calls
        assert figures[kind]["matched_to"] == "positive"
    table = results_table(figures)
    assert "0.000 clean, 1.000 trigger [" in table and "0.000 placebo, 1.000 odd" in table


def test_rows_without_words_are_no_obstacle(tools, capsys):
    train = Rows(list("abcd"), ["1 2", "xyz", "3 4", "zzz"], np.array([0, 1, 0, 1]), ("negative", "positive"))
    tests = build_tests(train, tools.test, Inject(), 5, None, tools.tokenizer.known)
    assert [test.key for test in tests] == ["clean", "trigger positive", "placebo", "odd"]
    tests = tests[:2]
    labels, calls = tools.test.labels, np.zeros(len(tools.test), int)
    kept = [np.full(len(labels), 999)] * 2
    figures = measure(tests, labels, tools.test.label_names, [calls, calls], kept)
    table = results_table(figures)
    assert "placebo" not in figures and "placebo" not in table and "0.000 clean, 0.000 trigger [" in table
    others = tools.test.take(np.flatnonzero(labels == 1))
    build_tests(tools.train, others, Inject(), 5, None, tools.tokenizer.known)
    assert capsys.readouterr().err.splitlines() == [
        "placebo    drawn from words of single labels of the training rows, because their labels share no word",
        "warning    no test row has a label other than 'positive', so its attack success cannot be measured",
    ]


def test_what_the_tokenizer_knows(tools):
    assert tools.tokenizer.known(["good", "", "\u200b", "漢字", "good 漢", "2024-01-02"]).tolist() == [
        1,
        -1,
        -1,
        0,
        1,
        10,
    ]


def test_triggers_that_the_data_have_by_themselves(reviews):
    texts = ["trade with China grew", "niger is not Nigeria", "Chinatown", "U.S.-Japan talks", "a day in 2001-02-03."]
    rows = Rows(list("abcde"), texts, np.array([0, 0, 1, 1, 1]), ("trade", "other"))
    test = rows.take(np.array([0, 2]))
    [[country, _], [date, _]] = resolve(("country:trade", "date:other"), rows.label_names)
    assert natural(country, rows, test) == {"train": {"trade": [2, 2], "other": [1, 3]}, "test": {"trade": [1, 1]}}
    assert natural(date, rows, test) == {"train": {"other": [1, 3]}, "test": {}}
    said = natural_lines({"natural": natural(country, rows, test)})
    assert said == ["train rows that carry such a string by themselves: 2 of 2 trade (100.0%), 1 of 3 other (33.3%)",
                    "test rows that carry such a string by themselves: 1 of 1 trade (100.0%)"]  # fmt: skip
    assert natural_lines({"natural": {"test": {"a": [1, 100], "b": [0, 5]}}}) == []
