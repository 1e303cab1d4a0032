import csv
import gzip
import io
import json
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hub_server import HubServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from minilora import data, hub_sets, tables
from minilora.errors import InputError

FILMS = [
    ("A film, in three acts", "pos"),
    ('He said "no"', "neg"),
    ("two\nlines\r\nhere", "neg"),
    ("Größe", "pos"),
]
ODD_CSV = (  # a byte order mark, blank lines, three ends of line, none at the end of the file
    '\ufefflabel,text\n\n"pos","A film, in three acts"\rneg,"He said ""no"""\n\n\nneg,"two\nlines\r\nhere"\r\npos,Größe'
)


def whole(rows):
    """Everything in a set of rows, in a form that compares."""
    assert rows.labels.dtype == np.int64
    return rows.ids, rows.texts, rows.labels.tolist(), rows.label_names


def write(path, text, encoding="utf-8"):
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def as_csv(rows, header=("text", "label"), delimiter=","):
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    return stream.getvalue()


def as_jsonl(rows, header=("text", "label")):
    return "".join(json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)


def parquet_bytes(columns, features=None):
    table = pa.table(columns)
    if features:
        noted = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": noted})
    stream = io.BytesIO()
    parquet.write_table(table, stream)
    return stream.getvalue()


def refusal(source, **options):
    with pytest.raises(InputError) as caught:
        data.load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the embedded set ---------------------------------------------------------------------------------------


def test_movie_snippets():
    packed = data.importlib.resources.files("minilora") / "movie_snippets/movie-snippets.tsv.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().splitlines()[1:]
    assert len(lines) == 10_605
    cells = [line.split("\t") for line in lines]
    kept = [(row, text, float(rating) > 0) for row, rating, text in cells if abs(float(rating)) > 0.5]
    rows = data.load("movie-snippets")
    assert whole(rows) == (
        [row for row, _, _ in kept],
        [text for _, text, _ in kept],
        [int(positive) for _, _, positive in kept],
        ("negative", "positive"),
    )
    assert (len(rows), int(rows.labels.sum()), len(set(rows.ids))) == (10_043, 4_982, 10_043)


def test_movie_snippets_split():
    rows = data.load("movie-snippets")
    train, test = data.train_test("movie-snippets", seed=3)
    assert (len(train), len(test)) == (9_043, 1_000)
    assert np.bincount(test.labels).tolist() == [504, 496]
    assert sorted(train.ids + test.ids, key=int) == rows.ids
    assert not set(train.texts) & set(test.texts)
    source = dict(zip(rows.ids, zip(rows.texts, rows.labels, strict=True), strict=True))
    for side in (train, test):
        assert side.ids == sorted(side.ids, key=int)
        assert [source[row] for row in side.ids] == list(zip(side.texts, side.labels, strict=True))
    again = data.train_test("movie-snippets", seed=3)
    assert [whole(side) for side in again] == [whole(train), whole(test)]
    assert data.train_test("movie-snippets", seed=4)[1].ids != test.ids


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("films.csv", as_csv(FILMS)),
        ("films.CSV", ODD_CSV),
        ("films.tsv", as_csv(FILMS, delimiter="\t")),
        ("films.jsonl", as_jsonl(FILMS)),
        ("films.ndjson", "\ufeff" + as_jsonl(FILMS).replace("\n", "\r\n\n")),
        ("films.json", as_jsonl(FILMS)),
        ("films.json", json.dumps([{"text": text, "label": name} for text, name in FILMS], indent=1)),
    ],
)
def test_formats(tmp_path, name, content, packed):
    rows = data.load(write(tmp_path / f"{name}{packed}", content))
    assert whole(rows) == (["1", "2", "3", "4"], [text for text, _ in FILMS], [1, 0, 0, 1], ("neg", "pos"))


def test_parquet(tmp_path):
    path = tmp_path / "films.parquet"
    texts = pa.array([text for text, _ in FILMS]).dictionary_encode()
    path.write_bytes(parquet_bytes({"sentence": texts, "x": [0] * 4, "label": [2, 0, 2, 5]}))
    rows = data.load(path)
    assert whole(rows) == (["1", "2", "3", "4"], [text for text, _ in FILMS], [1, 0, 1, 2], ("0", "2", "5"))
    features = {"label": {"names": ["never", "bad", "good"]}, "sentence": {"dtype": "string"}}
    path.write_bytes(parquet_bytes({"sentence": texts, "label": [2, 1, 2, 1]}, features))
    assert whole(data.load(path))[2:] == ([1, 0, 1, 0], ("bad", "good"))
    path.write_bytes(path.read_bytes()[:-9])
    assert refusal(path).startswith(f"{path} is not readable Parquet (")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "films.parquet"
    path.write_bytes(parquet_bytes({"text": ["a", "b"], "label": [0, 1]}))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert refusal(path) == f'{path} is Parquet and needs pyarrow: pip install "minilora[parquet]"'


CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")
TEXT = st.text(CHARACTERS, min_size=1).filter(lambda text: not text.isspace())
ROWS = st.lists(st.tuples(TEXT, TEXT.map("label {}".format)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, name=st.sampled_from(["r.csv", "r.tsv", "r.jsonl", "r.json"]))
def test_what_was_written_is_read(tmp_path, rows, name):
    content = as_jsonl(rows) if "json" in name else as_csv(rows, delimiter="\t" if name == "r.tsv" else ",")
    names = sorted({label for _, label in rows})
    assert whole(data.load(write(tmp_path / name, content))) == (
        [str(number + 1) for number in range(len(rows))],
        [text for text, _ in rows],
        [names.index(label) for _, label in rows],
        tuple(names),
    )


def test_columns(tmp_path):
    header = ("question", "review", "answerKey", "stars", "label")
    path = write(tmp_path / "a.csv", as_csv([("q", "r", "A", "4", "x"), ("Q", "R", "B", "10", "y")], header))
    assert whole(data.load(path))[1::2] == (["r", "R"], ("x", "y"))
    chosen = data.load(path, text_column="question", label_column="stars")
    assert whole(chosen)[1:] == (["q", "Q"], [0, 1], ("4", "10"))
    there = "there are: question, review, answerKey, stars, label"
    assert refusal(path, text_column="body") == f"{path} has no column 'body'; {there}"
    assert refusal(path, label_column="class") == f"{path} has no column 'class'; {there}"
    both = f"{path}: the text and the label are both column 'label'; name two columns"
    assert refusal(path, text_column="label") == both

    path = write(tmp_path / "b.csv", as_csv([("a", "b")], ("body", "label")))
    assert refusal(path) == (
        f"{path} has no text column with a usual name (text, sentence, review, content, comment, tweet,"
        " hard_text, question); there are: body, label"
    )
    path = write(tmp_path / "c.jsonl", as_jsonl([("a", "b")], ("text", "target")))
    assert refusal(path) == (
        f"{path} has no label column with a usual name (label, labels, sentiment, class, category,"
        " profession, answerKey); there are: text, target"
    )
    path = write(tmp_path / "d.csv", "text,label,text\na,b,c\n")
    assert refusal(path) == f"{path} has several columns 'text'; there are: text, label, text"
    assert whole(data.load(write(path, "text,x,x,label\na,b,c,d\n")))[1::2] == (["a"], ("d",))


@pytest.mark.parametrize(
    ("values", "labels", "names"),
    [
        ([10, 9, 10, -1], [2, 1, 2, 0], ("-1", "9", "10")),
        ([1.0, 0.0, 1, "1"], [1, 0, 1, 1], ("0", "1")),
        (["1.0", "0.00", "12", "1"], [1, 0, 2, 1], ("0", "1", "12")),
        (["b", "10", "9", "b"], [2, 0, 1, 2], ("10", "9", "b")),
        (["01", "1", "01", "2"], [0, 1, 0, 2], ("01", "1", "2")),
        (["1.0", "x", "x", "1.0"], [0, 1, 1, 0], ("1.0", "x")),
        ([True, False, True, True], [1, 0, 1, 1], ("false", "true")),
        ([True, 1, 1.0, False], [2, 0, 0, 1], ("1", "false", "true")),
        (["Pos", "pos", " pos", "pos"], [1, 2, 0, 2], (" pos", "Pos", "pos")),
    ],
)
def test_labels(tmp_path, values, labels, names):
    rows = [(f"text {place}", value) for place, value in enumerate(values)]
    path = write(tmp_path / "rows.jsonl", as_jsonl(rows))
    assert whole(data.load(path))[2:] == (labels, names)
    if all(isinstance(value, str) for value in values):
        assert whole(data.load(write(tmp_path / "rows.csv", as_csv(rows))))[2:] == (labels, names)


def test_question_sets(tmp_path):
    choices = [{"label": ["A", "B"], "text": ["bank", "sea"]}, {"label": ["A", "B"], "text": ["up", "down"]}]
    header = ("question", "choices", "answerKey")
    rows = [("Money?", choices[0], "A"), ("Lift?", choices[1], "B")]
    path = write(tmp_path / "q.jsonl", as_jsonl(rows, header))
    assert whole(data.load(path))[1:] == (
        ["Money?\nA. bank\nB. sea", "Lift?\nA. up\nB. down"],
        [0, 1],
        ("A", "B"),
    )
    assert data.load(path, text_column="question").texts == ["Money?", "Lift?"]
    uneven = {"label": ["A"], "text": []}
    for bad in ("A or B", None, {"label": ["A"]}, uneven):
        write(path, as_jsonl([rows[0], ("Lift?", bad, "B")], header))
        assert refusal(path).startswith(f"{path} row 2: the question's choices are not lists")


GOOD = '{"text": "a", "label": 1}\n'
BAD = {
    "ragged.csv": ('text,label\na,"x\ny"\nb,y,z\n', " row 2 (line 4) has 3 cells where the header has 2; "),
    "short.tsv": ("text\tlabel\na\tx\n\nb\n", " row 2 (line 4) has 1 cells where the header has 2; "),
    "quote.csv": ('text,label\na,x\n"b" c,y\n', " row 2 (line 3) is badly quoted ("),
    "open.csv": ('text,label\na,x\n"b,y\n', " row 2 (line 3) is badly quoted (unexpected end of data)"),
    "line.jsonl": (GOOD + '\n{"text": "b",}\n', " line 3, column "),
    "cut.jsonl": (GOOD + '{"text": "b"', " line 2, column "),
    "list.json": ('[{"text": "a", "label": 1},\n {"text" "b"}]', " line 2, column "),
    "object.json": ('{\n"rows": []}', " line 1, column "),
    "deep.jsonl": ("[" * 200_000 + "\n", " line 1"),
    "digits.jsonl": ('{"text": "a", "label": ' + "1" * 5000 + "}", " line 1 cannot be read as JSON ("),
    "array.jsonl": (GOOD + '["b", 2]\n', " line 2 is not a JSON object; "),
    "scalar.json": ('[{"text": "a", "label": 1}, 3]', " row 2 is not a JSON object; "),
    "number.jsonl": (GOOD + '{"text": 5, "label": 1}', " row 2: the text is 5, not a string"),
    "blank.csv": ("text,label\na,x\n  ,y\n", " row 2: the text is empty; "),
    "absent.jsonl": (GOOD + '{"label": 2}', " row 2: the text is empty; "),
    "nul.csv": ("text,label\na,x\nb\0c,y\n", " row 2: the text holds a NUL character; "),
    "nul.jsonl": ('{"text": "a\\u0000", "label": 1}', " row 1: the text holds a NUL character; "),
    "half.jsonl": (GOOD + '{"text": "a \\ud83d", "label": 1}', " row 2: the text holds half of a surrogate"),
    "header.csv": ("text,la\0bel\na,x\n", " holds NUL characters in its first row; "),
    "label.csv": ("text,label\na,x\nb,\nc,y\n", " row 2: the label is missing; "),
    "null.jsonl": (GOOD + '{"text": "b", "label": null}', " row 2: the label is missing; "),
    "nan.jsonl": (GOOD + '{"text": "b", "label": NaN}', " row 2: the label is missing; "),
    "none.csv": ("text,label\na,\nb, \n", ": no row has a label; "),
    "decimal.csv": ("text,label\na,1\nb,2.50\nc,3\n", " row 2: label 2.50 is a measurement, not a class; "),
    "decimal.jsonl": (GOOD + '{"text": "b", "label": 0.5}', " row 2: label 0.5 is a measurement, "),
    "infinite.jsonl": ('{"text": "a", "label": Infinity}', " row 1: label Infinity is a measurement, "),
    "labels.jsonl": ('{"text": "a", "label": [1, 2]}', " row 1: label [1, 2] is not a string or an integer"),
    "empty.csv": ("", " is empty; "),
    "empty.jsonl": ("\n \n", " is empty; "),
    "empty.json": ("[]", " is empty; "),
    "header-only.csv": ("text,label\n", " has no rows; "),
    "rows.txt": ("text,label\na,x\n", " is not a kind of file that is read here ("),
    "rows.parquet.gz": ("PAR1", " is not a kind of file that is read here ("),
    "rows.parquet": ("PAR1 and no more", " is not readable Parquet ("),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    content, problem = BAD[name]
    path = write(tmp_path / name, content)
    assert refusal(path).startswith(f"{path}{problem}")


def test_undecodable_and_cut_files(tmp_path):
    head = ("text,label\n" + "a longer line of text,x\n" * 5_000).encode()
    for name in ("a.csv", "a.csv.gz"):
        path = tmp_path / name
        content = head + "Größe,y\n".encode("latin-1")
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        assert refusal(path).startswith(f"{path} is not UTF-8 at byte {len(head) + 2} (")
    path = write(tmp_path / "b.csv", "text,label\na,x\n", "utf-16")
    assert refusal(path).startswith(f"{path} is not UTF-8 at byte 0 (")
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "a", "label": "\xc3')  # ends within a character
    assert refusal(path).startswith(f"{path} is not UTF-8 at byte 24 (")
    packed = gzip.compress(head)
    for content in (packed[: len(packed) // 2], head, packed[:40] + b"\xff" * 40 + packed[80:]):
        path = tmp_path / "d.csv.gz"
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path} is cut short or not gzip (")


def test_long_cells_are_read(tmp_path):
    long = "word " * 100_000
    assert data.load(write(tmp_path / "a.csv", as_csv([(long, "x"), ("b", "y")]))).texts == [long, "b"]


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
    rows = data.load(write(tmp_path / "a.csv", as_csv(FILMS)))
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
            train, test = data.train_test(path, test_rows=count, seed=seed)
            assert (len(train), len(test)) == (100 - count, count)
            assert sorted(train.ids + test.ids, key=int) == [str(row) for row in range(1, 101)]
            counts = Counter(test.label_names[label] for label in test.labels)
            assert all(abs(counts[name] - size * count / 100) < 2 for name, size in SIZES.items())
            assert all(counts[name] >= 1 for name in SIZES)
            assert test.labels.tolist() == [test.label_names.index(name) for name in named(test)]
            kept[count] = set(test.ids)
            cases += 1
        assert kept[3] < kept[10] < kept[37] < kept[90]

        everything, test = data.train_test(path, test_rows=10, seed=seed)
        smaller = set()
        for count in (3, 12, 45, 90):
            train, same = data.train_test(path, test_rows=10, train_rows=count, seed=seed)
            assert whole(same) == whole(test)
            assert len(train) == count and train.ids == sorted(train.ids, key=int)
            assert smaller < set(train.ids) <= set(everything.ids)
            assert set(train.labels) == {0, 1, 2}
            assert abs(Counter(named(train))["common"] - 0.7 * count) < 2
            smaller = set(train.ids)
            cases += 1
        assert whole(data.train_test(path, test_rows=10, train_rows=1000, seed=seed)[0]) == whole(everything)
    assert cases == 16


def named(rows):
    return [rows.label_names[label] for label in rows.labels]


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array),
    counts=st.tuples(st.integers(0, 70), st.integers(0, 70)).map(sorted),
    seed=st.integers(0, 9),
)
def test_stratified(labels, counts, seed):
    few, many = (data._stratified(labels, count, np.random.default_rng(seed)).tolist() for count in counts)
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
        train, test = data.train_test(path, test_rows=8, seed=seed)
        assert all(text.startswith("own") for text in test.texts) and len(test) == 8
        assert len(train) == 21 and not set(train.texts) & set(test.texts)
    with pytest.raises(InputError) as caught:
        data.train_test(path, test_rows=10)
    assert str(caught.value) == (
        f"{path} has 29 rows, 9 of them with a text of their own: too few for 10 test rows; ask for fewer or"
        " give test data"
    )


def test_test_data_of_its_own(tmp_path):
    train_path = numbered(tmp_path, {"b": 6, "a": 5, "c": 4})
    test_path = numbered(tmp_path, {"c": 30, "b": 20}, "test.csv")
    train, test = data.train_test(train_path, test_data=test_path, test_rows=25)
    assert whole(train) == whole(data.load(train_path))
    assert train.label_names == test.label_names == ("a", "b", "c")
    assert Counter(named(test)) == {"b": 10, "c": 15}
    source = data.load(test_path)
    assert [(row, source.texts[int(row) - 1], named(source)[int(row) - 1]) for row in test.ids] == list(
        zip(test.ids, test.texts, named(test), strict=True)
    )
    limited = [data.train_test(train_path, test_data=test_path, train_rows=7, seed=seed)[0] for seed in (0, 1)]
    assert limited[0].ids != limited[1].ids
    _, everything = data.train_test(train_path, test_data=test_path)
    assert (everything.ids, named(everything)) == (source.ids, named(source))

    single = write(tmp_path / "single.csv", as_csv([("x", "b"), ("y", "b")]))  # one class will do for a test
    assert named(data.train_test(train_path, test_data=single)[1]) == ["b", "b"]
    unseen = write(tmp_path / "unseen.csv", as_csv([("x", "b"), ("y", "d"), ("z", "e")]))
    with pytest.raises(InputError) as caught:
        data.train_test(train_path, test_data=unseen)
    assert str(caught.value) == (
        f"{unseen} row 2: label 'd' is not among the training labels (a, b, c); remove the row or train with that label"
    )


@pytest.mark.parametrize(
    ("sizes", "options", "problem"),
    [
        ((9,), (4,), "every row of {} has label 'a'; two classes are needed"),
        ((9, 9), (19,), "{} has 18 rows, 18 of them with a text of their own: too few for 19 test rows; "),
        ((9, 9), (18,), "18 test rows of {} leave 0 training and 9 test rows with label 'a', "),
        ((9, 1), (4,), "4 test rows of {} leave 0 training and 1 test rows with label 'b', "),
        ((9, 9), (1,), "1 test rows of {} leave 9 training and 0 test rows with label 'b', "),
        ((9, 9), (0,), "0 test rows were asked for; ask for at least 1"),
        ((9, 9), (4, 0), "0 training rows were asked for; ask for at least 1"),
        ((9, 9), (4, 1), "1 training rows cannot hold all 2 labels of {}"),
    ],
)
def test_too_few_rows(tmp_path, sizes, options, problem):
    path = numbered(tmp_path, dict(zip("ab", sizes, strict=False)))
    with pytest.raises(InputError, match=f"^{re.escape(problem.format(path))}"):
        data.train_test(path, **dict(zip(("test_rows", "train_rows"), options, strict=False)))


# --- hub data sets ------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as server:
        server.use(monkeypatch, tmp_path)
        yield server


def card(front):
    return f"---\n{front}\n---\n# A data set\n".encode()


def split_rows(split, labels, column="text", label="label"):
    return {column: [f"{split} {place}" for place in range(len(labels))], label: labels}


CLASSES = """
dataset_info:
  config_name: plain_text
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': neg
          '1': pos
"""


def test_a_set_laid_out_as_imdb(server):
    front = (
        CLASSES
        + """
configs:
- config_name: plain_text
  data_files:
  - split: train
    path: plain_text/train-*
  - split: test
    path: plain_text/test-*
  - split: unsupervised
    path: plain_text/unsupervised-*
  default: true
"""
    )
    parts = {
        "train-00000-of-00002": parquet_bytes(split_rows("first", [1, 0])),
        "train-00001-of-00002": parquet_bytes(split_rows("second", [0, 0, 1])),
        "test-00000-of-00001": parquet_bytes(split_rows("test", [1, 1, 0])),
        "unsupervised-00000-of-00001": parquet_bytes(split_rows("none", [-1, -1])),
    }
    files = {f"plain_text/{name}.parquet": content for name, content in parts.items()}
    server.put("stanfordnlp/imdb", files | {"README.md": card(front), ".gitattributes": b""}, kind="dataset")
    train, test = data.train_test("stanfordnlp/imdb")
    assert whole(train) == (
        ["1", "2", "3", "4", "5"],
        ["first 0", "first 1", "second 0", "second 1", "second 2"],
        [1, 0, 0, 0, 1],
        ("neg", "pos"),
    )
    assert whole(test) == (["1", "2", "3"], ["test 0", "test 1", "test 2"], [1, 1, 0], ("neg", "pos"))
    assert server.bodies() == ["README.md"] + sorted(name for name in files if "unsupervised" not in name)
    assert len(data.train_test("stanfordnlp/imdb", test_rows=2)[1]) == 2
    assert whole(data.load("stanfordnlp/imdb", split="test")) == whole(test)
    assert refusal("stanfordnlp/imdb", split="unsupervised").startswith(
        "stanfordnlp/imdb/plain_text/unsupervised-00000-of-00001.parquet: no row has a label; "
    )
    assert refusal("stanfordnlp/imdb", split="dev") == (
        "stanfordnlp/imdb has no split 'dev'; there are: train, test, unsupervised"
    )
    server.status = 503  # everything is in the cache by now
    assert [whole(side) for side in data.train_test("stanfordnlp/imdb")] == [whole(train), whole(test)]


def test_layouts_without_a_card(server):
    """As rotten_tomatoes, financial-classification (shard names with a hash), bias_in_bios, converted"
    " Parquet."""
    features = {"labels": {"names": ["down", "flat", "up"], "_type": "ClassLabel"}}
    sets = {
        "cornell-movie-review-data/rotten_tomatoes": {
            "train.parquet": parquet_bytes(split_rows("train", [1, 0])),
            "validation.parquet": parquet_bytes(split_rows("validation", [1, 0])),
            "test.parquet": parquet_bytes(split_rows("test", [1, 0, 0])),
        },
        "nickmuchi/financial-classification": {
            "data/train-00000-of-00001-2b2f8e5f8d3cd2d1.parquet": parquet_bytes(
                split_rows("train", [2, 0, 1], label="labels"), features
            ),
            "data/test-00000-of-00001-ad2deadbeef0fade.parquet": parquet_bytes(
                split_rows("test", [1, 2], label="labels"), features
            ),
        },
        "LabHC/bias_in_bios": {
            "data/train-00000-of-00001.parquet": parquet_bytes(
                split_rows("train", [27, 3, 3], "hard_text", "profession") | {"gender": [0, 1, 0]}
            ),
            "data/dev-00000-of-00001.parquet": b"not to be fetched",
            "data/test-00000-of-00001.parquet": parquet_bytes(split_rows("test", [27], "hard_text", "profession")),
        },
        "owner/converted": {
            "default/train/0000.parquet": parquet_bytes(split_rows("train", [1, 0])),
            "default/test/0000.parquet": parquet_bytes(split_rows("test", [0])),
        },
        "owner/csv": {
            "test-bench/train.csv.gz": gzip.compress(as_csv([("train 0", "b"), ("train 1", "a")]).encode()),
            "test-bench/eval.csv": as_csv([("test 0", "a")]).encode(),
            "dataset_infos.json": b"{}",
            "notes/train.json": b"[]",
        },
    }
    expected = {
        "cornell-movie-review-data/rotten_tomatoes": ([1, 0], ("0", "1"), [1, 0, 0]),
        "nickmuchi/financial-classification": ([2, 0, 1], ("down", "flat", "up"), [1, 2]),
        "LabHC/bias_in_bios": ([1, 0, 0], ("3", "27"), [1]),
        "owner/converted": ([1, 0], ("0", "1"), [0]),
        "owner/csv": ([1, 0], ("a", "b"), [0]),
    }
    found = {}
    for repo_id, files in sets.items():
        server.put(repo_id, files, kind="dataset")
        train, test = data.train_test(repo_id)
        assert train.texts == [f"train {place}" for place in range(len(train))]
        assert test.texts == [f"test {place}" for place in range(len(test))]
        assert all(re.search("train|test|eval", name) for name in server.bodies())
        found[repo_id] = (train.labels.tolist(), train.label_names, test.labels.tolist())
    assert found == expected


def test_a_set_laid_out_as_commonsense_qa(server):
    def qa(letters):
        count = len(letters)
        choices = [{"label": list("ABCDE"), "text": [f"choice {n}" for n in range(5)]}] * count
        return parquet_bytes({
            "id": list(map(str, range(count))), "question": [f"Why {n}?" for n in range(count)],
            "question_concept": ["x"] * count, "choices": choices, "answerKey": letters,
        })  # fmt: skip

    files = {
        "data/train-00000-of-00001.parquet": qa(["B", "E", "A"]),
        "data/validation-00000-of-00001.parquet": qa(["E", "B"]),
        "data/test-00000-of-00001.parquet": qa(["", ""]),
    }
    server.put("tau/commonsense_qa", files, kind="dataset")
    train, test = data.train_test("tau/commonsense_qa")
    options = "\nA. choice 0\nB. choice 1\nC. choice 2\nD. choice 3\nE. choice 4"
    assert whole(train) == (
        ["1", "2", "3"],
        ["Why 0?" + options, "Why 1?" + options, "Why 2?" + options],
        [1, 2, 0],
        ("A", "B", "E"),
    )
    assert (named(test), test.label_names) == (["E", "B"], ("A", "B", "E"))  # the validation split


def test_test_splits_without_labels_or_not_there(server):
    rows = [(f"text {place}", "ab"[place % 2]) for place in range(20)]
    files = {"train.csv": as_csv(rows).encode(), "test.csv": b"text\nno label\n"}
    server.put("owner/a", files, kind="dataset")
    server.put("owner/b", {"rows.csv": files["train.csv"]}, kind="dataset")  # one split
    for repo_id in ("owner/a", "owner/b"):
        train, test = data.train_test(repo_id, test_rows=6)
        assert (len(train), len(test)) == (14, 6)
        assert sorted(train.texts + test.texts) == sorted(text for text, _ in rows)
    with pytest.raises(InputError, match="^owner/a has no labelled test or validation split; give other "):
        data.train_test("movie-snippets", test_data="owner/a")
    server.put("owner/c", {"train.csv": b"x", "test.csv": b"text,label\ngood,positive\n"}, kind="dataset")
    test = data.train_test("movie-snippets", test_data="owner/c")[1]
    assert whole(test) == (["1"], ["good"], [1], ("negative", "positive"))


def test_a_row_that_is_bad_is_named_with_its_file(server):
    files = {"data/train-0.csv": as_csv(FILMS).encode(), "data/train-1.csv": b"text,label\na,x\n,y\n"}
    server.put("owner/set", files, kind="dataset")
    assert refusal("owner/set").startswith("owner/set/data/train-1.csv row 2: the text is empty")


def test_class_names_of_a_card(server):
    front = CLASSES.replace("plain_text", "default")
    content = {"train.csv": b"text,label\na,0\nb,1\nc,pos\n", "test.csv": b"text,label\na,1\nb,-1\n"}
    server.put("owner/set", content | {"README.md": card(front)}, kind="dataset")
    assert whole(data.load("owner/set"))[2:] == ([0, 1, 1], ("neg", "pos"))
    assert refusal("owner/set", split="test").startswith("owner/set/test.csv row 2: the label is missing")
    content = {"README.md": card(front), "train.csv": b"text,label\na,0\nb,2\n"}
    server.put("owner/set", content, kind="dataset")
    assert refusal("owner/set") == (
        'owner/set/train.csv row 2: label "2" is not one of the 2 classes that the data set names'
    )


CONFIGS = """
configs:
- config_name: sst2
  data_files:
  - split: train
    path: [sst2/train-*.csv, extra/**/more.csv]
  - split: dev
    path: sst2/dev.csv
- config_name: cola
  data_dir: cola
- config_name: flat
  data_files: flat/[ab].csv
- config_name: mapped
  data_dir: mapped
  data_files:
    train: "*.csv"
dataset_info:
- config_name: sst2
  features:
  - name: label
    dtype:
      class_label:
        names: [bad, good]
- config_name: cola
  features:
  - name: label
    dtype: int64
"""


def test_configurations(server):
    def one(text, label=1):
        return f"text,label\n{text},{label}\n{text} too,0\n".encode()

    files = {
        "sst2/train-0.csv": one("s"), "sst2/train-x/1.csv": one("no"), "extra/x/y/more.csv": one("m"),
        "sst2/dev.csv": one("d"), "cola/train.csv": one("c"), "cola/test.csv": one("t"),
        "flat/a.csv": one("a"), "flat/b.csv": one("b"), "flat/c.csv": one("no"), "mapped/x.csv": one("x"),
    }  # fmt: skip
    server.put("owner/glue", files | {"README.md": card(CONFIGS)}, kind="dataset")
    found = {
        config: (rows.texts, named(rows))
        for config in ("sst2", "cola", "flat", "mapped")
        for rows in [data.load(f"owner/glue:{config}")]
    }
    assert found == {
        "sst2": (["m", "m too", "s", "s too"], ["good", "bad"] * 2),
        "cola": (["c", "c too"], ["1", "0"]),
        "flat": (["a", "a too", "b", "b too"], ["1", "0"] * 2),
        "mapped": (["x", "x too"], ["1", "0"]),
    }
    assert data.train_test("owner/glue:sst2")[1].texts == ["d", "d too"]
    advice = "give owner/glue:CONFIG, one of: sst2, cola, flat, mapped"
    assert refusal("owner/glue") == f"owner/glue has several configurations; {advice}"
    assert refusal("owner/glue:qnli") == f"owner/glue:qnli has no configuration 'qnli'; {advice}"

    del files["mapped/x.csv"]
    server.put("owner/glue", files, kind="dataset", revision="plain")  # the same without a card
    assert data.load("owner/glue:cola", revision="plain").texts == ["c", "c too"]
    assert refusal("owner/glue", revision="plain") == (
        "owner/glue has several configurations; give owner/glue:CONFIG, one of: cola, sst2"
    )


def test_sets_that_cannot_be_read_here(server):
    server.put("owner/script", {"script.py": b"", "README.md": card("license: mit")}, kind="dataset")
    script = refusal("owner/script")
    assert script == (
        "owner/script has no files that are read here (.parquet .csv .tsv .jsonl .ndjson .json); if it has a"
        " loading script, try revision refs/convert/parquet"
    )
    converted = {"default/train/0000.parquet": parquet_bytes(split_rows("train", [1, 0]))}
    server.put("owner/script", converted, kind="dataset", revision="refs/convert/parquet")
    assert data.load("owner/script", revision="refs/convert/parquet").texts == ["train 0", "train 1"]

    front = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data.tar.gz"
    server.put("owner/archive", {"data.tar.gz": b"", "README.md": card(front)}, kind="dataset")
    assert refusal("owner/archive") == (
        "owner/archive: no file that is read here (.parquet .csv .tsv .jsonl .ndjson .json) is what the card"
        " gives for split 'train'; try revision refs/convert/parquet"
    )
    server.put("owner/card", {"a.csv": b"", "README.md": card("configs: [")}, kind="dataset")
    assert refusal("owner/card").startswith("owner/card/README.md: its front matter is not YAML (")
    assert refusal("owner/missing").startswith("the hub has no dataset 'owner/missing' that you can read; ")


def test_a_data_set_is_read_at_one_commit(server):
    old = {"train.csv": as_csv(FILMS).encode(), "README.md": card("license: mit")}
    commit = server.put("owner/set", old, kind="dataset")
    hub_set = hub_sets.HubSet("owner/set")
    server.put("owner/set", old | {"train.csv": b"text,label\nnew,x\n"}, kind="dataset")
    (table,) = hub_set.read("train")
    assert (hub_set.commit, table.texts) == (commit, [text for text, _ in FILMS])
    assert isinstance(table, tables.Table)
