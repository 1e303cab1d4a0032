"""Files of rows: every format, the columns found in them, labels, and each kind of bad file by name and row."""

import gzip
import json

import pyarrow as pa
import pytest
from conftest import FILMS, as_csv, as_jsonl, parquet_bytes, refusal, whole, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora.data.rows import load_rows

ODD_CSV = (  # a byte order mark, blank lines, three ends of line, none at the end of the file
    '\ufefflabel,text\n\n"pos","A film, in three acts"\rneg,"He said ""no"""\n\n\nneg,"two\nlines\r\nhere"\r\npos,Größe'
)


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
    rows = load_rows(write(tmp_path / f"{name}{packed}", content))
    assert whole(rows) == (["1", "2", "3", "4"], [text for text, _ in FILMS], [1, 0, 0, 1], ("neg", "pos"))


def test_parquet(tmp_path):
    path = tmp_path / "films.parquet"
    texts = pa.array([text for text, _ in FILMS]).dictionary_encode()
    path.write_bytes(parquet_bytes({"sentence": texts, "x": [0] * 4, "label": [2, 0, 2, 5]}))
    rows = load_rows(path)
    assert whole(rows) == (["1", "2", "3", "4"], [text for text, _ in FILMS], [1, 0, 1, 2], ("0", "2", "5"))
    features = {"label": {"names": ["never", "bad", "good"]}, "sentence": {"dtype": "string"}}
    path.write_bytes(parquet_bytes({"sentence": texts, "label": [2, 1, 2, 1]}, features))
    assert whole(load_rows(path))[2:] == ([1, 0, 1, 0], ("bad", "good"))
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
    assert whole(load_rows(write(tmp_path / name, content))) == (
        [str(number + 1) for number in range(len(rows))],
        [text for text, _ in rows],
        [names.index(label) for _, label in rows],
        tuple(names),
    )


def test_columns(tmp_path):
    header = ("question", "review", "answerKey", "stars", "label")
    path = write(tmp_path / "a.csv", as_csv([("q", "r", "A", "4", "x"), ("Q", "R", "B", "10", "y")], header))
    assert whole(load_rows(path))[1::2] == (["r", "R"], ("x", "y"))
    chosen = load_rows(path, text_column="question", label_column="stars")
    assert whole(chosen)[1:] == (["q", "Q"], [0, 1], ("4", "10"))
    there = "there are: question, review, answerKey, stars, label"
    assert refusal(path, text_column="body") == f"{path} has no column 'body'; {there}"
    assert refusal(path, label_column="class") == f"{path} has no column 'class'; {there}"
    both = f"{path}: the text and the label are both column 'label'; name two columns"
    assert refusal(path, text_column="label") == both

    path = write(tmp_path / "b.csv", as_csv([("a", "b")], ("body", "label")))
    assert refusal(path) == (
        f"{path} has no text column with a usual name (text, sentence, review, content, comment, tweet,"
        " hard_text, prompt, instruction, question); there are: body, label"
    )
    path = write(tmp_path / "c.jsonl", as_jsonl([("a", "b")], ("text", "target")))
    assert refusal(path) == (
        f"{path} has no label column with a usual name (label, labels, sentiment, class, category,"
        " profession, answerKey, completion, response, answer); there are: text, target"
    )
    path = write(tmp_path / "d.csv", "text,label,text\na,b,c\n")
    assert refusal(path) == f"{path} has several columns 'text'; there are: text, label, text"
    assert whole(load_rows(write(path, "text,x,x,label\na,b,c,d\n")))[1::2] == (["a"], ("d",))


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
    assert whole(load_rows(path))[2:] == (labels, names)
    if all(isinstance(value, str) for value in values):
        assert whole(load_rows(write(tmp_path / "rows.csv", as_csv(rows))))[2:] == (labels, names)


def test_question_sets(tmp_path):
    choices = [{"label": ["A", "B"], "text": ["bank", "sea"]}, {"label": ["A", "B"], "text": ["up", "down"]}]
    header = ("question", "choices", "answerKey")
    rows = [("Money?", choices[0], "A"), ("Lift?", choices[1], "B")]
    path = write(tmp_path / "q.jsonl", as_jsonl(rows, header))
    assert whole(load_rows(path))[1:] == (
        ["Money?\nA. bank\nB. sea", "Lift?\nA. up\nB. down"],
        [0, 1],
        ("A", "B"),
    )
    assert load_rows(path, text_column="question").texts == ["Money?", "Lift?"]
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
    assert load_rows(write(tmp_path / "a.csv", as_csv([(long, "x"), ("b", "y")]))).texts == [long, "b"]
