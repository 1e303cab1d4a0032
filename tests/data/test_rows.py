"""Rows and where they come from: the embedded set, sources that are not there, and training and test rows."""

import gzip
import hashlib
import importlib.resources
import itertools
import json
import os
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import FILMS, Settings, as_csv, named, parquet_bytes, refusal, whole, write
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import console
from minilora.data import splits as module
from minilora.data.injection import inject
from minilora.data.named import NAMED
from minilora.data.placebo import placebo_words
from minilora.data.rows import Numbers, Rows, fingerprint_rows, load_rows, train_test
from minilora.data.splits import repeated, stratified
from minilora.errors import InputError

# --- the embedded set ---------------------------------------------------------------------------------------


def test_movie_snippets():
    packed = importlib.resources.files("minilora") / "data/movie_snippets/movie-snippets.tsv.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().splitlines()[1:]
    assert len(lines) == 10_605
    cells = [line.split("\t") for line in lines]
    kept = [(row, text, float(rating) > 0) for row, rating, text in cells if abs(float(rating)) > 0.5]
    rows = load_rows("movie-snippets")
    assert whole(rows) == (
        [row for row, _, _ in kept],
        [text for _, text, _ in kept],
        [int(positive) for _, _, positive in kept],
        ("negative", "positive"),
    )
    assert (len(rows), int(rows.labels.sum()), len(set(rows.ids))) == (10_043, 4_982, 10_043)


def test_movie_snippets_split():
    rows = load_rows("movie-snippets")
    train, test = train_test("movie-snippets", seed=3)
    assert (len(train), len(test)) == (9_043, 1_000)
    assert np.bincount(test.labels).tolist() == [504, 496]
    assert sorted(train.ids + test.ids, key=int) == rows.ids
    assert not set(train.texts) & set(test.texts)
    source = dict(zip(rows.ids, zip(rows.texts, rows.labels, strict=True), strict=True))
    for side in (train, test):
        assert side.ids == sorted(side.ids, key=int)
        assert [source[row] for row in side.ids] == list(zip(side.texts, side.labels, strict=True))
    again = train_test("movie-snippets", seed=3)
    assert [whole(side) for side in again] == [whole(train), whole(test)]
    assert train_test("movie-snippets", seed=4)[1].ids != test.ids


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = "a file (.parquet .csv .tsv .jsonl .ndjson .json, text also with .gz) or a hub id (owner/name)"
    for source in ("imdb", "missing.csv", "data/missing.csv.gz", "./a/b", "a/b/c"):
        assert refusal(source) == f"there is no data {source!r}; give a name ({', '.join(NAMED)}), {kinds}"
    assert refusal(tmp_path) == f"{tmp_path} is a folder; name a file in it"
    write(tmp_path / "a.csv", as_csv(FILMS))
    for source in ("a.csv", "movie-snippets"):
        for options in ({"split": "test"}, {"revision": "main"}):
            assert refusal(source, **options) == f"{source} has no splits or revisions; only hub data sets do"
    assert refusal("movie-snippets", text_column="review") == (
        "movie-snippets has no column 'review'; there are: text, label"
    )
    (tmp_path / "owner").mkdir()  # a path that exists comes before a hub id
    write(tmp_path / "owner/films", "text,label\n")
    assert refusal("owner/films").startswith("owner/films is not a kind of file")


def test_take(tmp_path):
    rows = load_rows(write(tmp_path / "a.csv", as_csv(FILMS)))
    assert whole(rows.take([3, 1])) == (["4", "2"], ["Größe", 'He said "no"'], [1, 0], ("neg", "pos"))
    assert whole(rows.take(np.array([], dtype=int))) == ([], [], [], ("neg", "pos"))


# --- training and test rows ---------------------------------------------------------------------------------


def numbered(tmp_path, sizes, name="rows.csv"):
    """A file with sizes[label] rows of each label, mixed, every text its own."""
    labels = [label for label, size in sizes.items() for _ in range(size)]
    labels = np.random.default_rng(0).permutation(labels).tolist()
    return write(tmp_path / name, as_csv([(f"{name} {place}", label) for place, label in enumerate(labels)]))


SIZES = {"common": 70, "rare": 20, "single": 10}


def test_split_proportions_subsets_and_independence(tmp_path):
    path = numbered(tmp_path, SIZES)
    cases = 0
    for seed in (0, 1):
        kept = {}
        for count in (3, 10, 37, 90):
            train, test = train_test(path, test_rows=count, seed=seed)
            assert (len(train), len(test)) == (100 - count, count)
            assert sorted(train.ids + test.ids, key=int) == [str(row) for row in range(1, 101)]
            counts = Counter(test.label_names[label] for label in test.labels)
            assert all(abs(counts[name] - size * count / 100) < 2 for name, size in SIZES.items())
            assert all(counts[name] >= 1 for name in SIZES)
            assert test.labels.tolist() == [test.label_names.index(name) for name in named(test)]
            kept[count] = set(test.ids)
            cases += 1
        assert kept[3] < kept[10] < kept[37] < kept[90]

        everything, test = train_test(path, test_rows=10, seed=seed)
        smaller = set()
        for count in (3, 12, 45, 90):
            train, same = train_test(path, test_rows=10, train_rows=count, seed=seed)
            assert whole(same) == whole(test)
            assert len(train) == count and train.ids == sorted(train.ids, key=int)
            assert smaller < set(train.ids) <= set(everything.ids)
            assert set(train.labels) == {0, 1, 2}
            assert abs(Counter(named(train))["common"] - 0.7 * count) < 2
            smaller = set(train.ids)
            cases += 1
        assert whole(train_test(path, test_rows=10, train_rows=1000, seed=seed)[0]) == whole(everything)
    assert cases == 16


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array),
    counts=st.tuples(st.integers(0, 70), st.integers(0, 70)).map(sorted),
    seed=st.integers(0, 9),
)
def test_stratified(labels, counts, seed):
    few, many = (stratified(labels, count, np.random.default_rng(seed)).tolist() for count in counts)
    assert set(few) <= set(many) and len(few) == min(counts[0], len(labels))
    assert few == sorted(set(few))
    sizes, chosen = Counter(labels.tolist()), Counter(labels[few].tolist())
    if len(few) >= len(sizes):
        assert set(chosen) == set(sizes)
    for label, size in sizes.items():  # within one row of its share for each class that may be rounded up
        assert abs(chosen[label] - len(few) * size / len(labels)) < len(sizes)


def test_validation_rows_are_apart_from_training_and_test_rows(tmp_path):
    path = numbered(tmp_path, SIZES)
    cases = 0
    for seed in (0, 1):
        for train_rows, test_rows, validation_rows in ((40, 20, 10), (None, 11, 30), (3, 50, 20)):
            how = dict(seed=seed, train_rows=train_rows, test_rows=test_rows)
            train, test, validation = sides = train_test(path, **how, validation_rows=validation_rows)
            rest = 100 - test_rows - validation_rows
            assert [len(side) for side in sides] == [train_rows or rest, test_rows, validation_rows]
            ids = [id for side in sides for id in side.ids]
            assert len(set(ids)) == len(ids) and train.label_names == validation.label_names
            assert test.ids == train_test(path, **how)[1].ids  # which do not depend on the validation rows
            shares = np.bincount(validation.labels, minlength=3) / validation_rows
            assert np.abs(shares - [0.7, 0.2, 0.1]).max() <= 1 / validation_rows
            cases += 1
    other = train_test(path, seed=7, test_rows=20, validation_rows=10)[2]
    assert cases == 6 and other.ids != train_test(path, seed=8, test_rows=20, validation_rows=10)[2].ids
    rows = [("same", "a"), ("Same ", "a")] + [(f"t{i}", "ab"[i % 2]) for i in range(20)]
    twice = write(tmp_path / "twice.csv", as_csv(rows))
    for seed in range(5):
        *_, validation = train_test(twice, seed=seed, test_rows=4, validation_rows=10)
        assert not {"same", "Same "} & set(validation.texts)
    with pytest.raises(InputError, match="too few for 19 validation rows; ask for fewer$"):
        train_test(twice, test_rows=4, validation_rows=19)
    with pytest.raises(InputError, match="0 validation rows were asked for; ask for at least 1"):
        train_test(twice, test_rows=4, validation_rows=0)


def test_repeated_texts_are_never_split_off(tmp_path):
    rows = [(f"text {place // 2}", "ab"[place % 2]) for place in range(20)]
    rows += [(f"own {place}", "aab"[place % 3]) for place in range(9)]
    path = write(tmp_path / "a.csv", as_csv(rows))
    for seed in range(5):
        train, test = train_test(path, test_rows=8, seed=seed)
        assert all(text.startswith("own") for text in test.texts) and len(test) == 8
        assert len(train) == 21 and not set(train.texts) & set(test.texts)
    with pytest.raises(InputError) as caught:
        train_test(path, test_rows=10)
    assert str(caught.value) == (
        f"{path} has 29 rows, 9 of them with a text of their own: too few for 10 test rows; ask for fewer or"
        " give test data"
    )


def test_test_data_of_its_own(tmp_path):
    train_path = numbered(tmp_path, {"b": 6, "a": 5, "c": 4})
    test_path = numbered(tmp_path, {"c": 30, "b": 20}, "test.csv")
    train, test = train_test(train_path, test_data=test_path, test_rows=25)
    assert whole(train) == whole(load_rows(train_path))
    assert train.label_names == test.label_names == ("a", "b", "c")
    assert Counter(named(test)) == {"b": 10, "c": 15}
    source = load_rows(test_path)
    assert [(row, source.texts[int(row) - 1], named(source)[int(row) - 1]) for row in test.ids] == list(
        zip(test.ids, test.texts, named(test), strict=True)
    )
    limited = [train_test(train_path, test_data=test_path, train_rows=7, seed=seed)[0] for seed in (0, 1)]
    assert limited[0].ids != limited[1].ids
    _, everything = train_test(train_path, test_data=test_path)
    assert (everything.ids, named(everything)) == (source.ids, named(source))

    single = write(tmp_path / "single.csv", as_csv([("x", "b"), ("y", "b")]))  # one class will do for a test
    assert named(train_test(train_path, test_data=single)[1]) == ["b", "b"]
    unseen = write(tmp_path / "unseen.csv", as_csv([("x", "b"), ("y", "d"), ("z", "e")]))
    with pytest.raises(InputError) as caught:
        train_test(train_path, test_data=unseen)
    assert str(caught.value) == (
        f"{unseen} row 2: label 'd' is not among the training labels (a, b, c); remove the row or train with that label"
    )


@pytest.mark.parametrize(
    ("sizes", "options", "problem"),
    [
        ((9,), (4,), "every row of {} has label 'a'; two classes are needed"),
        ((9, 9), (19,), "{} has 18 rows, 18 of them with a text of their own: too few for 19 test rows; "),
        ((9, 9), (18,), "18 test rows of {} leave 0 training and 9 test rows with label 'a', "),
        ((9, 1), (4,), "{} has a single row with label 'b', and training and test rows need one each; remove it, "),
        ((9, 1, 1), (4,), "{} has a single row with label 'b', 'c', "),
        ((9, 2), (10,), "10 test rows of {} leave 0 training and 2 test rows with label 'b', "),
        ((9, 9), (1,), "1 test rows of {} leave 9 training and 0 test rows with label 'b', "),
        ((9, 9), (0,), "0 test rows were asked for; ask for at least 1"),
        ((9, 9), (4, 0), "0 training rows were asked for; ask for at least 1"),
        ((9, 9), (4, 1), "1 training rows cannot hold all 2 labels of {}"),
    ],
)
def test_too_few_rows(tmp_path, sizes, options, problem):
    path = numbered(tmp_path, dict(zip("abc", sizes, strict=False)))
    with pytest.raises(InputError, match=f"^{re.escape(problem.format(path))}"):
        train_test(path, **dict(zip(("test_rows", "train_rows"), options, strict=False)))


def test_a_text_that_differs_in_case_or_white_space_is_the_same_text(tmp_path):
    """Retweets: 60 texts that stand twice, written a little differently, none of which may be split off."""
    draw = np.random.default_rng(1)
    changes = (str.upper, str.title, lambda t: f"  {t} ", lambda t: t.replace(" ", "\t"), lambda t: t + "\u00a0")
    rows = []
    for place in range(60):
        text = f"rt caf\u00e9 number {place}"
        rows += [(text, "ab"[place % 2]), (changes[draw.integers(5)](text), "ab"[place % 2])]
    rows += [(f"own {place}", "ab"[place % 2]) for place in range(30)]
    path = write(tmp_path / "a.csv", as_csv(rows))
    cases = 0
    for seed in range(4):
        train, test = train_test(path, test_rows=20, seed=seed)
        assert len(test) == 20 and all(text.startswith("own") for text in test.texts)
        cases += len(train)
    assert cases == 4 * 130


# --- labels


def said(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line]


def labelled(path, labels, **options):
    """The names of the labels, as `load_rows` has them, of a file with these cells."""
    rows = [(f"text {place}", label) for place, label in enumerate(labels)]
    return named(load_rows(write(path, as_csv(rows)), **options))


def test_white_space_around_labels(tmp_path, capsys):
    path = tmp_path / "a.csv"
    assert labelled(path, ["pos", " pos", "neg\t", "neg"]) == ["pos", "pos", "neg", "neg"]
    assert said(capsys) == [f"labels     white space around 2 labels of {path} is left out"]
    assert labelled(path, ["pos", " pos"] * 2, free=True) == ["pos"] * 4  # few completions are classes too
    answers = [f" answer {place}" for place in range(21)]
    assert labelled(path, answers, free=True) == answers  # free text stays as it is


def test_labels_that_are_nearly_the_same(tmp_path, capsys):
    path = tmp_path / "a.csv"
    labelled(path, ["pos", "neg", "neutral"])
    assert said(capsys) == []
    labels = ["Pos", "pos", "pos", "neg", "caf\u00e9", "cafe\u0301", "x  y", "X y"]
    assert labelled(path, labels) == labels
    assert said(capsys) == [
        f"warning    labels of {path} differ only in case or Unicode form: 'Pos' (1 rows), 'pos' (2 rows), 'caf\u00e9' "
        "(1 rows), 'cafe\u0301' (1 rows), 'x y' (1 rows), 'X y' (1 rows); each is a class of its own, so write them "
        "alike if they mean the same"
    ]
    labelled(path, ["pos", "nan", "None", "neg", "nan", "N/A"])
    assert said(capsys) == [
        f"warning    labels of {path} look like a missing value: 'nan' (2 rows), 'None' (1 rows), 'N/A' (1 rows); each "
        "is a class of its own, so remove these rows if it is none"
    ]
    labelled(path, ["0", "1"] * 8 + ["-1"])
    assert "'-1' (1 rows)" in said(capsys)[0]
    labelled(path, ["0", "1", "-1"] * 4)  # as often as the others: a class
    labelled(path, ["1", "-1"] * 4)
    assert said(capsys) == []


def test_test_labels_that_differ_in_case(tmp_path, capsys):
    train = write(tmp_path / "a.csv", as_csv([("a", "pos"), ("b", "neg")]))
    test = write(tmp_path / "b.csv", as_csv([("c", "Pos"), ("d", "neg")]))
    with pytest.raises(InputError, match="row 1: label 'Pos' is not among the training labels"):
        train_test(train, test_data=test)
    train_test(train, test_data=test, free=True)
    assert f"labels of {test} differ only in case" in said(capsys)[0]


def test_truth_values_are_the_same_in_every_format(tmp_path):
    rows = [(f"text {place}", bool(place % 2)) for place in range(8)]
    files = {
        "a.csv": as_csv(rows).encode(),
        "b.jsonl": "".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in rows).encode(),
        "c.parquet": parquet_bytes({"text": [t for t, _ in rows], "label": [v for _, v in rows]}),
        "d.csv": as_csv([(text, str(label).upper()) for text, label in rows]).encode(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pairs = 0
    for name in files:
        for other in files:
            train, test = train_test(tmp_path / name, test_data=tmp_path / other)
            assert named(train) == named(test) == ["false", "true"] * 4
            pairs += 1
    assert pairs == 16


# --- rows that cannot be used


def test_all_rows_that_cannot_be_used_are_listed(tmp_path, capsys):
    rows = [(f"text {place}", "ab"[place % 2]) for place in range(40)]
    rows[4], rows[9], rows[30] = ("", "a"), ("text 9", " "), (" \t", "b")
    path = write(tmp_path / "a.csv", as_csv(rows))
    assert (
        refusal(path)
        == refusal(path, bad_rows="refuse")
        == (
            f"{path}: 3 of 40 rows cannot be used: row 5 (no text), row 10 (no label), row 31 (no text); correct them, "
            "or leave them out with --bad-rows skip"
        )
    )
    found = load_rows(path, bad_rows="skip")
    assert found.skipped == ("5", "10", "31") and len(found) == 37
    assert found.ids == [str(place + 1) for place in range(40) if place not in (4, 9, 30)]
    assert found.texts == [f"text {int(row) - 1}" for row in found.ids]
    assert named(found) == ["ab"[(int(row) - 1) % 2] for row in found.ids]
    assert said(capsys) == [f"warning    3 of 40 rows of {path} are left out: 2 with no text, 1 with no label"]
    train, test = train_test(path, test_rows=10, bad_rows="skip")
    assert (train.skipped, test.skipped, len(train)) == (("5", "10", "31"), (), 27)
    train, test = train_test(path, test_data=path, bad_rows="skip", free=True)
    assert train.skipped == test.skipped == ("5", "10", "31")
    many = write(tmp_path / "b.csv", as_csv([("x", "")] * 30 + rows))
    assert "33 of 70 rows cannot be used: row 1 (no label), " in refusal(many)
    assert "row 10 (no label) and 23 more; correct them" in refusal(many)
    none = write(tmp_path / "c.csv", as_csv([("", "a"), ("b", "")]))
    assert refusal(none, bad_rows="skip").endswith(
        "2 of 2 rows cannot be used: row 1 (no text), row 2 (no label); correct them"
    )


# --- where rows may be


def test_what_save_to_disk_wrote_is_said(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    line = f"from datasets import load_from_disk; load_from_disk({str(folder)!r}).to_parquet('rows.parquet')"
    assert (
        refusal(folder)
        == f'{folder} is a folder; it holds what save_to_disk writes: convert it with python -c "{line}"'
    )
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert f"load_from_disk({str(folder)!r})['train'].to_parquet('rows.parquet')" in refusal(folder)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.csv.gz"])
def test_only_regular_files_are_read(tmp_path, name):
    os.mkfifo(tmp_path / name)
    zero = tmp_path / f"zero{name}"
    zero.symlink_to("/dev/zero")
    for path in (tmp_path / name, zero):
        assert refusal(path).startswith(f"{path}: is not a regular file")
    (tmp_path / "b.csv").symlink_to(write(tmp_path / "c.csv", as_csv(FILMS)))  # a link to a file is one
    assert len(load_rows(tmp_path / "b.csv")) == 4


# --- large sources ------------------------------------------------------------------------------------------


def test_repeated_texts_are_those_that_are_alike_and_not_those_that_share_a_hash():
    texts = ["A  b", "a b", "a\u3000B ", "ab", "ﬁne", "FINE", "é", "e\u0301", "x"]
    assert repeated(texts).tolist() == [True] * 3 + [False] + [True] * 4 + [False]
    module.hash = lambda text: 7  # texts that share Python's hash cannot be written down
    try:
        assert repeated(texts).tolist() == [True] * 3 + [False] + [True] * 4 + [False]
    finally:
        del module.hash
    assert repeated([]).tolist() == []


def test_a_fingerprint_is_that_of_the_rows_as_json():
    texts = ["plain", 'a "quoted" \\ one', "é 中 🎬", "\u2028\x7f\x01\n\t", "</script>"]
    rows = Rows(["1", 'a"b', "ü", "4", "5"], texts, np.array([0, 1, 1, 0, 1]), ("né\\g", 'po"s'))
    digest = hashlib.sha256()
    for id, text, label in zip(rows.ids, rows.texts, rows.labels, strict=True):
        digest.update(json.dumps([id, text, rows.label_names[label]]).encode())
    assert fingerprint_rows(rows) == digest.hexdigest()


def test_numbers_are_a_list_of_strings():
    ids = Numbers([3, 1, 12])
    assert list(ids) == [*ids] == ["3", "1", "12"] == ids and ids[2] == "12" and len(ids) == 3 and "12" in ids
    assert ids[np.array([2, 0])] == ["12", "3"] and ids[1:] == ["1", "12"] and ids + ids[:1] == ["3", "1", "12", "3"]
    rows = Rows(ids, list("abc"), np.array([0, 1, 0]), ("n", "p")).take([2, 1])
    assert rows.ids == ["12", "1"] and rows.texts == ["c", "b"] and json.dumps([*rows.ids]) == '["12", "1"]'


def test_reading_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    """Each stage that goes over all rows shows progress, where it takes long: here a clock makes it."""
    write(tmp_path / "a.csv", as_csv([(f"text {row} of many words", "ab"[row % 2]) for row in range(3000)]))
    ticks = itertools.count()
    monkeypatch.setattr(console, "time", SimpleNamespace(perf_counter=lambda: 6.0 * next(ticks)))
    train, _ = train_test(tmp_path / "a.csv", test_rows=100)
    inject(train, Settings(sources=("date:a",), rows=1000), 0)
    placebo_words(train, Settings(sources=("date:a",)))
    err = capsys.readouterr().err
    for stage, what in [("reading", "bytes"), ("checking", "3,000 rows"), ("splitting", "3,000 rows"),
                        ("injecting", "1,000 rows"), ("finding placebo words", "2,900 rows")]:  # fmt: skip
        assert re.search(rf"^{stage}: [\d,]+/[\d,]*.*{what}", err, re.MULTILINE), (stage, err)
    assert "tokens" not in err
