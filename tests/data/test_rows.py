"""Rows and where they come from: the embedded set, sources that are not there, and training and test rows."""

import gzip
import re
from collections import Counter

import numpy as np
import pytest
from conftest import FILMS, as_csv, named, refusal, whole, write
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data.rows import _stratified, importlib, load_rows, train_test
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
        assert refusal(source) == f"there is no data {source!r}; give movie-snippets, {kinds}"
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
    few, many = (_stratified(labels, count, np.random.default_rng(seed)).tolist() for count in counts)
    assert set(few) <= set(many) and len(few) == min(counts[0], len(labels))
    assert few == sorted(set(few))
    sizes, chosen = Counter(labels.tolist()), Counter(labels[few].tolist())
    if len(few) >= len(sizes):
        assert set(chosen) == set(sizes)
    for label, size in sizes.items():  # within one row of its share for each class that may be rounded up
        assert abs(chosen[label] - len(few) * size / len(labels)) < len(sizes)


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
