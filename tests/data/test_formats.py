"""Files of rows: every format, the columns found in them, labels, and each kind of bad file by name and row."""

import gzip
import json
import re

import data_fuzz
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
        ("films.jsonl", as_jsonl(FILMS)),
        ("films.ndjson", "\ufeff" + as_jsonl(FILMS).replace("\n", "\r\n\n")),
        ("films.json", as_jsonl(FILMS)),
        ("films.json", json.dumps([{"text": text, "label": name} for text, name in FILMS], indent=1)),
    ],
)
def test_formats(tmp_path, name, content, packed):
    rows = load_rows(write(tmp_path / f"{name}{packed}", content))
    assert whole(rows) == (["1", "2", "3", "4"], [text for text, _ in FILMS], [1, 0, 0, 1], ("neg", "pos"))


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_in_tsv_a_quote_is_a_character(tmp_path, packed):
    texts = ['"good film', 'bad plot "', '"great" cast', '""', "'a', b;c", 'a "quoted" word', '"']
    lines = [f"{text}\t{'pn'[row % 2]}" for row, text in enumerate(texts)]
    path = write(tmp_path / f"q.tsv{packed}", "text\tlabel\n" + "\n".join([*lines[:3], "", *lines[3:]]))
    names = [str(row) for row in range(1, 8)]
    assert whole(load_rows(path)) == (names, texts, [1, 0, 1, 0, 1, 0, 1], ("n", "p"))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", [("text", "label"), ("label", "a;b,c\td", "text")])
def test_delimiters_of_csv(tmp_path, delimiter, header):
    """As a spreadsheet writes it where the comma is the decimal sign, and with quoted names of columns."""
    rows = [("a; b, and\tc", "pos"), ('He said "no"; and', "neg")]
    rows = [dict(zip(("text", "label"), row)) | {"a;b,c\td": "1,5"} for row in rows]
    content = as_csv([[row[name] for name in header] for row in rows], header, delimiter)
    assert whole(load_rows(write(tmp_path / "a.csv", "\n\n" + content))) == (
        ["1", "2"], ["a; b, and\tc", 'He said "no"; and'], [1, 0], ("neg", "pos"),
    )  # fmt: skip


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
    if name == "r.tsv":  # its cells hold neither tabs nor ends of lines, and quotes are characters
        rows = [(re.sub(r"[\t\r\n]", "_", text), re.sub(r"[\t\r\n]", "_", label)) for text, label in rows]
        content = "\n".join(map("\t".join, [("text", "label"), *rows]))
    else:
        content = as_jsonl(rows) if "json" in name else as_csv(rows)
    rows = [(text, label.strip()) for text, label in rows]
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
        " hard_text, prompt, instruction, question): name it with --text-column; there are: body, label"
    )
    path = write(tmp_path / "c.jsonl", as_jsonl([("a", "b")], ("text", "target")))
    assert refusal(path) == (
        f"{path} has no label column with a usual name (label, labels, sentiment, class, category,"
        " profession, answerKey, completion, response, answer): name it with --label-column; there are: text, target"
    )
    path = write(tmp_path / "d.csv", "text,label,text\na,b,c\n")
    assert refusal(path) == (
        f"{path} has several columns 'text': name one with --text-column; there are: text, label, text"
    )
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
        (["True", "false", "TRUE", "FALSE"], [1, 0, 1, 0], ("false", "true")),
        ([True, "False", "true", " True "], [1, 0, 1, 1], ("false", "true")),
        (["yes", "True", "no", "yes"], [2, 1, 0, 2], ("no", "true", "yes")),
        ([True, 1, 1.0, False], [2, 0, 0, 1], ("1", "false", "true")),
        (["Pos", "pos", " pos", "pos\t"], [0, 1, 1, 1], ("Pos", "pos")),
        (["1", " 1", "0 ", "1.0"], [1, 1, 0, 1], ("0", "1")),
        (["a", "1" * 5000, "0", "a"], [2, 1, 0, 2], ("0", "1" * 5000, "a")),
        (["-0", "0", "1", "0.0"], [0, 0, 1, 0], ("0", "1")),
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
        problem = "row 2 (choices that are not lists 'label' and 'text' of one length)"
        assert refusal(path).startswith(f"{path}: 1 of 2 rows cannot be used: {problem}; ")


GOOD = '{"text": "a", "label": 1}\n'
BAD = {
    "ragged.csv": (
        'text,label\na,"x\ny"\nb,y,z\n',
        ": 1 of 2 rows cannot be used: row 2 (cells unlike the header: 3 instead of 2, line 4); ",
    ),
    "short.tsv": (
        "text\tlabel\na\tx\n\nb\n",
        ": 1 of 2 rows cannot be used: row 2 (cells unlike the header: 1 instead of 2, line 4); ",
    ),
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
    "number.jsonl": (
        GOOD + '{"text": 5, "label": 1}',
        ": 1 of 2 rows cannot be used: row 2 (a text that is not a string: 5); ",
    ),
    "blank.csv": ("text,label\na,x\n  ,y\n", ": 1 of 2 rows cannot be used: row 2 (no text); "),
    "absent.jsonl": (GOOD + '{"label": 2}', ": 1 of 2 rows cannot be used: row 2 (no text); "),
    "nul.csv": ("text,label\na,x\nb\0c,y\n", ": 1 of 2 rows cannot be used: row 2 (a NUL character in the text); "),
    "nul.jsonl": (
        '{"text": "a\\u0000", "label": 1}',
        ": 1 of 1 rows cannot be used: row 1 (a NUL character in the text); ",
    ),
    "half.jsonl": (
        GOOD + '{"text": "a \\ud83d", "label": 1}',
        ": 1 of 2 rows cannot be used: row 2 (half of a surrogate pair in the text); ",
    ),
    "header.csv": ("text,la\0bel\na,x\n", " holds NUL characters in its first row; "),
    "label.csv": ("text,label\na,x\nb,\nc,y\n", ": 1 of 3 rows cannot be used: row 2 (no label); "),
    "null.jsonl": (GOOD + '{"text": "b", "label": null}', ": 1 of 2 rows cannot be used: row 2 (no label); "),
    "nan.jsonl": (GOOD + '{"text": "b", "label": NaN}', ": 1 of 2 rows cannot be used: row 2 (no label); "),
    "none.csv": ("text,label\na,\nb, \n", ": no row has a label; "),
    "decimal.csv": ("text,label\na,1\nb,2.50\nc,3\n", " row 2: label 2.50 is a measurement, not a class; "),
    "decimal.jsonl": (GOOD + '{"text": "b", "label": 0.5}', " row 2: label 0.5 is a measurement, "),
    "twice.jsonl": (GOOD + '{"text": "a", "label": 1, "text": "b"}', " line 2 cannot be read as JSON (the key 'text' "),
    "twice.json": ('[{"text": "a", "label": 1, "label": 0}]', " line 1 cannot be read as JSON (the key 'label' stands"),
    "comma.json": ('[{"text": "a", "label": 1},]', " line 1, column 28 is not JSON ("),
    "behind.json": ('[{"text": "a", "label": 1}] x', " line 1, column 29 is not JSON (Extra data)"),
    "half-label.jsonl": (
        GOOD + '{"text": "a", "label": "\\udc00"}',
        ": 1 of 2 rows cannot be used: row 2 (half of a surrogate pair in the label); ",
    ),
    "nul-label.csv": (
        "text,label\na,x\nb,y\0\n",
        ": 1 of 2 rows cannot be used: row 2 (a NUL character in the label); ",
    ),
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


def test_names_of_columns_whatever_their_case_and_spaces(tmp_path):
    rows = [("a", "x"), ("b", "y")]
    headers = [
        ("Text", "Label"),
        ("TEXT ", " LABEL"),
        ("Hard Text", "Answer_Key"),
        ("Review", "Category"),
        ("sentence", "Class"),
    ]
    for header in headers:
        assert load_rows(write(tmp_path / "a.csv", as_csv(rows, header))).texts == ["a", "b"]
        assert load_rows(write(tmp_path / "a.jsonl", as_jsonl(rows, header))).label_names == ("x", "y")
        (tmp_path / "a.parquet").write_bytes(parquet_bytes(dict(zip(header, zip(*rows), strict=True))))
        assert load_rows(tmp_path / "a.parquet").texts == ["a", "b"]
    path = write(tmp_path / "b.csv", as_csv([("a", "x", "1"), ("b", "y", "2")], ("Body Text", "The Label", "label")))
    found = load_rows(path, text_column="body_text", label_column="the label")
    assert (found.texts, found.label_names) == (["a", "b"], ("x", "y"))
    # An exact name comes first, whatever the order; two that are equally near are refused.
    path = write(tmp_path / "c.csv", as_csv([("a", "x", "1"), ("b", "y", "2")], ("text", "Label", "sentiment")))
    assert load_rows(path).label_names == ("1", "2")
    path = write(path, as_csv([("a", "x", "1")], ("text", "Label", "LABEL")))
    assert refusal(path).startswith(f"{path} has several columns 'Label': name one with --label-column; ")


NOTES = [
    b"null", b"[]", b"{", b'{"info": null}', b'{"info": {"features": null}}', b'{"info": {"features": []}}',
    b'{"info": {"features": {"label": null}}}', b'{"info": {"features": {"label": {"names": 3}}}}',
    b'{"info": {"features": {"label": {"names": "ab"}}}}', b'{"info": {"features": {"label": {"names": [1, 2]}}}}',
    b'{"info": {"features": {"label": {"names": ["a", "a"]}}}}', b'{"info": {"features": {"label": {"names": []}}}}',
    b'{"info": {"features": {"label": {"names": ["\\ud800", "b"]}}}}', b"[" * 100_000, b"\xff", b"",
]  # fmt: skip


@pytest.mark.parametrize("note", range(len(NOTES)))
def test_parquet_with_a_broken_note_is_read_without_it(tmp_path, note):
    from pyarrow import parquet

    table = pa.table({"text": ["p", "q"], "label": [1, 0]}).replace_schema_metadata({b"huggingface": NOTES[note]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert whole(load_rows(tmp_path / "a.parquet")) == (["1", "2"], ["p", "q"], [1, 0], ("0", "1"))


def test_types_of_parquet(tmp_path):
    """Each type of label has its names, or one line."""
    from decimal import Decimal

    path, texts = tmp_path / "a.parquet", ["p", "q"]
    good = {
        "large": (pa.array(["x", "y"], pa.large_string()), ("x", "y")),
        "dictionary": (pa.array(["x", "y"]).dictionary_encode(), ("x", "y")),
        "view": (pa.array(["x", "y"]).cast(pa.string_view()), ("x", "y")),
        "small": (pa.array([1, 0], pa.uint8()), ("0", "1")),
        "half": (pa.array([1.0, 0.0], pa.float32()), ("0", "1")),
        "decimal": (pa.array([Decimal("1"), Decimal("0")]), ("0", "1")),
        "bool": (pa.array([True, False]), ("false", "true")),
    }
    for labels, names in good.values():
        path.write_bytes(parquet_bytes({"text": texts, "label": labels}))
        found = load_rows(path)
        assert sorted(found.label_names) == list(names) and found.labels.tolist() in ([0, 1], [1, 0])
    bad = {
        "times": (pa.array([1, 2], pa.timestamp("ns")), str(path)),  # pyarrow reads it where pandas is installed
        "dates": (pa.array([1, 2], pa.date32()), " row 1: label"),
        "durations": (pa.array([1, 2], pa.duration("s")), " row 1: label"),
        "bytes": (pa.array([b"x", b"y"]), " row 1: label"),
        "lists": (pa.array([[1], [2]]), " row 1: label [1] is not a string or an integer"),
        "records": (pa.array([{"a": 1}, {"a": 2}]), " row 1: label"),
        "maps": (pa.array([[(b"k", 1)], []], pa.map_(pa.binary(), pa.int8())), " row 1: label"),
        "nulls": (pa.nulls(2), ": no row has a label"),
        "decimals": (pa.array([Decimal("1.5"), Decimal("0")]), " row 1: label"),
    }
    for labels, words in bad.values():
        path.write_bytes(parquet_bytes({"text": texts, "label": labels}))
        assert words in refusal(path)
    path.write_bytes(parquet_bytes({"text": pa.array([b"p", b"q"]), "label": ["x", "y"]}))
    assert "2 of 2 rows cannot be used: row 1 (a text that is not a string: " in refusal(path)
    path.write_bytes(parquet_bytes({"text": texts, "label": ["x", "y"]}, {"label": {"names": ["x"]}}))
    assert len(good) == 7 and len(bad) == 9 and load_rows(path).label_names == ("x", "y")


def test_parquet_in_parts_and_with_nulls(tmp_path, monkeypatch):
    from minilora.data import formats

    monkeypatch.setattr(formats, "AT_ONCE", 3)
    texts = [f"text {place % 4}" if place % 5 else None for place in range(23)]
    labels = ["ab"[place % 2] if place % 7 else None for place in range(23)]
    (tmp_path / "a.parquet").write_bytes(parquet_bytes({"text": texts, "label": labels}))
    found = load_rows(tmp_path / "a.parquet", bad_rows="skip")
    kept = [place for place in range(23) if place % 5 and place % 7]
    assert found.ids == [str(place + 1) for place in kept] and len(kept) == 15
    assert found.texts == [texts[place] for place in kept]
    assert [found.label_names[label] for label in found.labels] == [labels[place] for place in kept]


def test_damaged_and_undecodable_at_once(tmp_path):
    packed = gzip.compress(b"text,label\n" + b"\xff" * 200_000 + b"\n")
    for content in (packed[:-9], packed[:-8] + b"\0" * 8, packed + b"junk junk", packed):
        path = tmp_path / "a.csv.gz"
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path} is not UTF-8 at byte 11 (")


@pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv.gz", "a.jsonl.gz", "a.json.gz"])
def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, name):
    from minilora.data import formats

    monkeypatch.setattr(formats, "UNPACKED", 1 << 20)
    row = json.dumps([{"text": "a", "label": 1}, {"text": "b", "label": 2}])
    if "sv" in name:
        row = "label\ttext\nx\ty\n" if "tsv" in name else as_csv(FILMS)
    path = write(tmp_path / name, row + " " * (1 << 20))
    advice = "times its size or more: if that is right, unpack it first (gunzip) and give the unpacked file"
    assert refusal(path) == f"{path} unpacks to more than 1 MiB, 100 {advice}"


def test_parquet_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    from minilora.data import formats

    monkeypatch.setattr(formats, "UNPACKED", 1 << 20)
    path = tmp_path / "a.parquet"
    for texts in (["a"] * 100_000, ["a" * 1000 + str(place) for place in range(2000)]):
        path.write_bytes(parquet_bytes({"text": texts, "label": [1, 2] * (len(texts) // 2)}))
        monkeypatch.setattr(formats, "TIMES", 1)
        assert refusal(path).startswith(f"{path} unpacks to more than 1 MiB, 1 times its size or more")
        monkeypatch.setattr(formats, "TIMES", 1000)
        assert len(load_rows(path)) == len(texts)


def test_mutated_files_are_read_or_refused_in_one_line():
    """`python tests/data_fuzz.py 0 2000` reads more."""
    outcomes, faults = data_fuzz.campaign(7000, 60)
    assert faults == [] and outcomes["read"] >= 5 and outcomes["refused"] >= 20 and outcomes.total() == 60
