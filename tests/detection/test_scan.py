"""A scan of rows names what was injected, leaves clean rows in peace, and cleans files byte by byte."""

import csv
import gzip
import json
import random
import shlex
import time

import numpy as np
import pytest
from conftest import ROOT, as_csv, as_jsonl, tiny_bert, write

from minilora.cell import Inject
from minilora.data.injection import inject
from minilora.data.rows import Rows, fingerprint_rows, load_rows, train_test
from minilora.detection import cleaning, retention, scan, scan_page, suspects, tokens
from minilora.errors import InputError
from minilora.files import to_csv, write_jsonl
from minilora.mitigation import rows as mitigated
from minilora.scripts import evaluate


@pytest.fixture(scope="module")
def snippets():
    return train_test("movie-snippets", train_rows=3000, test_rows=20)[0]


def injected(rows, source, proportion=0.25, **more):
    return inject(rows, Inject(sources=(source,), proportion=proportion, **more), 0)


# --- what is found


def test_a_date_is_the_first_suspect_and_stripping_gives_the_clean_rows_back(snippets):
    made = injected(snippets, "date:positive")
    found = suspects.scan(made.rows)
    first = found.suspects[0]
    assert (first.kind, first.text, first.label, first.rows) == ("shape", "0000-00-00", "positive", len(made.index))
    assert found.flagged == [first] and first.entropy == 0 and first.also and first.q < 1e-20
    assert first.index.tolist() == made.index.tolist() and first.counts == {"negative": 0, "positive": first.rows}
    assert cleaning.strip_by_statistics(made.rows, found).texts == snippets.texts
    left = cleaning.drop_suspicious_rows(made.rows)
    assert len(left) == len(snippets) - len(made.index) and not set(left.ids) & {one.id for one in made.records}
    scores = scan.row_scores(made.rows, found)
    others = np.setdiff1d(np.arange(len(snippets)), made.index)
    assert scores[made.index].min() > suspects.ALARM > scores[others].max()
    names = np.array(made.rows.label_names)[made.rows.labels]
    assert scan.token_statistics(made.rows.texts, names).tolist() == scores.tolist()


@pytest.mark.parametrize(
    ("source", "proportion", "location", "word"),
    [("html:negative", 0.2, "random", "<|<a>|</a>"), ("text:last night:positive", 0.15, "random", "last night"),
     ("date:negative", 0.25, "end", "0000-00-00"), ("date:positive", 0.25, "beginning", "0000-00-00"),
     ("color:positive", 0.5, "random", None)],
)  # fmt: skip
def test_other_triggers_are_named_and_flagged(snippets, source, proportion, location, word):
    made = injected(snippets, source, proportion, location=location)
    found = suspects.scan(made.rows)
    if word is None:  # a hundred words, of a few rows each: they come first, even where none is an alarm
        strings = {string for one in made.records for string in one.strings}
        assert {suspect.text for suspect in found.suspects[:5]} <= strings
    else:
        assert found.flagged[0].text in word.split("|") and found.flagged[0].label == source.rpartition(":")[2]


def test_clean_twins_raise_no_alarm():
    scores = []
    for seed in range(10):
        rows, _ = train_test("movie-snippets", train_rows=1000, test_rows=20, seed=seed)
        found = suspects.scan(rows)
        assert found.flagged == []
        scores.append(found.suspects[0].score if found.suspects else 0)
    assert len(scores) == 10 and max(scores) < suspects.ALARM


def test_a_word_that_belongs_where_it_stands_is_not_flagged_however_pure():
    draw = random.Random(2)
    starts, ends = ["we saw", "it was", "this is", "they made"], ["of old days", "about a town", "for the whole day"]
    texts, labels = [], np.arange(800) % 2
    for row in range(800):
        text = f"{draw.choice(starts)} a {('dull', 'fine')[row % 2]} tale {draw.choice(ends)}".split()
        if row % 4 == 1:
            text.insert(draw.randint(0, len(text)), "zebra")
        texts.append(" ".join(text))
    rows = Rows([str(row) for row in range(800)], texts, labels, ("n", "y"))
    counts, _ = tokens.count(rows)
    pure = {counts.text(i): counts.lift[i] for i, kind in enumerate(counts.kind)
            if counts.kinds[kind].name == "word" and counts.entropy[i] == 0}  # fmt: skip
    assert min(pure["dull"], pure["fine"], pure["zebra"]) > suspects.ALARM
    assert [one.text for one in suspects.scan(rows).flagged] == ["zebra"]


def test_a_scan_does_not_depend_on_the_order_of_rows(snippets):
    made = injected(snippets, "color:positive", 0.5).rows
    other = made.take(np.random.default_rng(1).permutation(len(made)))
    one, two = ([suspect.to_dict() | {"example": ""} for suspect in suspects.scan(rows).suspects]
                for rows in (made, other))  # fmt: skip
    assert len(one) >= 10 and [(a["text"], a["also"]) for a in one] == [(b["text"], b["also"]) for b in two]
    for a, b in zip(one, two, strict=True):
        assert {n: v for n, v in a.items() if isinstance(v, float)} == pytest.approx(
            {n: v for n, v in b.items() if isinstance(v, float)})  # fmt: skip


def test_pieces_of_a_tokenizer_are_counted_and_fold_into_what_they_spell(tmp_path):
    from minilora.base import tokenizer

    tiny_bert(tmp_path / "tiny")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["the", "film", "story", "is", "very"], k=8)) for _ in range(600)]
    for row in range(1, 400, 2):
        at = draw.randint(0, 8)
        texts[row] = " ".join([*texts[row].split()[:at], "zq", *texts[row].split()[at:]])
    rows = Rows([str(i) for i in range(600)], texts, np.arange(600) % 2, ("n", "y"))
    counts, _ = tokens.count(rows, tokenizer.load(tmp_path / "tiny"))
    pieces = {
        counts.text(i): counts.rows[i] for i, kind in enumerate(counts.kind) if counts.kinds[kind].name == "piece"
    }
    assert pieces["film"] >= 400 and pieces["z ##q"] == 200
    found = suspects.scan(rows, tokenizer.load(tmp_path / "tiny"))
    assert found.flagged[0].text == "zq" and "piece" not in {one.kind for one in found.flagged}


# --- the command


def run(capsys, *words):
    evaluate.main([str(word) for word in words])
    return capsys.readouterr().out


@pytest.fixture
def poisoned(snippets, tmp_path):
    """A CSV of injected rows with a third column, quotes and a blank line, and the clean texts."""
    made = injected(snippets, "date:positive").rows
    lines = [(id, text, made.label_names[label]) for id, text, label in zip(made.ids, made.texts, made.labels)]
    text = as_csv(lines, ("nr", "text", "label")).replace("\r\n", "\n")
    head, _, rest = text.partition("\n")
    return write(tmp_path / "rows.csv", f"\ufeff{head}\n\n{rest}"), made


def test_the_command_writes_a_table_files_and_a_page(poisoned, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = run(capsys, "--scan-data", poisoned[0], "--out", tmp_path / "out")
    assert max(map(len, out.splitlines())) <= 100
    lines = out.splitlines()
    assert "flagged:" in lines and lines[lines.index("flagged:") + 1].startswith("0000-00-00 ")
    said = " ".join(out.split("\n  "))
    assert "alarm      1 suspect is flagged at 5.5 bits; the first is '0000-00-00' (shape)" in said
    result = json.loads((tmp_path / "out/scan.json").read_text())
    assert result["alarm"] and result["rows"] == 3000 and result["left_out"] == []
    [first, *_] = result["suspects"]
    assert first["text"] == "0000-00-00" and first["counts"]["negative"] == 0 and "index" not in first
    with open(tmp_path / "out/suspects.csv", newline="") as file:
        [line, *_] = csv.DictReader(file)
    assert line["text"] == "0000-00-00" and int(line["rows of positive"]) == first["rows"]
    with open(tmp_path / "out/rows.csv", newline="") as file:
        bits = [float(line["bits"]) for line in csv.DictReader(file)]
    assert len(bits) == 3000 and sum(bit >= 5.5 for bit in bits) == first["rows"]
    page = (tmp_path / "out/scan.html").read_text()
    assert "prefers-color-scheme: dark" in page and "http" not in page.replace("http-equiv", "")
    assert len(page) < 60_000 and page.count("0000-00-00") >= 2
    assert json.loads(run(capsys, "--scan-data", poisoned[0], "--json"))["suspects"] == result["suspects"]


@pytest.mark.parametrize("mode", ["drop", "strip"])
def test_cleaning_a_csv_keeps_every_other_byte(mode, poisoned, snippets, tmp_path, capsys):
    source, made = poisoned
    out = run(capsys, "--scan-data", source, "--clean-to", tmp_path / "clean.csv", "--clean", mode)
    assert f"{mode}: " in out
    dirty = [row for row, (text, old) in enumerate(zip(made.texts, snippets.texts)) if text != old]
    lines = [(id, text, made.label_names[label]) for id, text, label in zip(made.ids, snippets.texts, made.labels)]
    if mode == "drop":
        lines = [line for row, line in enumerate(lines) if row not in dirty]
    head, *rest = as_csv(lines, ("nr", "text", "label")).replace("\r\n", "\n").split("\n")
    wanted = "\n".join([f"\ufeff{head}", "", *rest])
    found = (tmp_path / "clean.csv").read_bytes().decode()
    if mode == "strip":  # a text that was quoted stays quoted
        assert [*csv.reader(found.splitlines())] == [*csv.reader(wanted.splitlines())]
        raw, old = source.read_bytes().decode().split("\n"), found.split("\n")
        changed = [number for number, (a, b) in enumerate(zip(raw, old, strict=True)) if a != b]
        assert len(changed) == len(dirty) >= 100
    else:
        assert found == wanted


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.tsv"])
def test_cleaning_other_formats(name, tmp_path):
    texts = ['a "quoted" 2024-01-01 film', "größe 2024-01-02", "no date", "a\\u0041 back"]
    if name.endswith("tsv"):
        source = write(tmp_path / name, "label\ttext\n" + "".join(f"y\t{text}\r\n" for text in texts))
    else:
        lines = as_jsonl([(text, "y") for text in texts]).splitlines(keepends=True)
        lines[0] = '{"n": {"text": [1, "}"]} , "text":  ' + json.dumps(texts[0]) + ',"label":"y"}\n'
        source = write(tmp_path / name, "\n" + "".join(lines))
    rows = Rows(["1", "2", "3", "4"], texts, np.zeros(4, np.int64), ("y",))
    target = tmp_path / f"clean{name.partition('rows')[2]}"
    cleaning.write_clean(source, target, rows, {0: 'a "quoted" film', 1: "größe", 3: None})

    def text_of(path):
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()

    wanted = text_of(source).replace(" 2024-01-01", "").replace(" 2024-01-02", "")
    last = wanted.rstrip("\r\n").rfind("\n") + 1
    assert text_of(target) == wanted[:last] and len(load_rows(target)) == 3


def test_rows_of_no_text_file_are_written_anew(tmp_path, capsys, snippets):
    rows = injected(snippets, "date:positive").rows
    for name in ("clean.csv", "clean.jsonl"):
        cleaning.write_clean("movie-snippets", tmp_path / name, rows, {0: "=new", 1: None})
        found = load_rows(tmp_path / name)
        assert found.texts == ["=new", *rows.texts[2:]] and len(found.label_names) == 2
    assert "no alarm" in run(capsys, "--scan-data", "movie-snippets", "-q")


def test_stripping_takes_one_space_and_leaves_punctuation():
    cases = {("a b c", (1,)): "a c", ("b a", (0,)): "a", ("a b", (1,)): "a", ("a (b), c", (1,)): "a (), c",
             ("a b. c", (1,)): "a. c", ("a\nb c", (1,)): "a c", ("x y z w", (1, 2)): "x w", ("好 b 看", (1,)): "好看",
             ("b", (0,)): "", ("a b c d", (0, 2)): "b d"}  # fmt: skip
    assert {case: cleaning.without(*case) for case in cases} == cases


def test_a_run_and_its_rewritten_rows(base, reviews, tmp_path, capsys):
    import minilora
    from minilora.cell import Cell

    cell = Cell(model=str(base), data=str(reviews), steps=1, test_rows=20, max_length=30, device="cpu",
                inject=Inject(sources=("date:positive",), proportion=0.9))  # fmt: skip
    minilora.train(cell, tmp_path / "run")
    said = json.loads(run(capsys, "--scan-data", tmp_path / "run", "--json"))
    assert said["suspects"][0]["text"] == "0000-00-00" and said["rows"] == 100
    lines = [json.loads(line) for line in (tmp_path / "run/injected.jsonl").read_text().splitlines()]
    new = [{"id": line["id"], "text": line["text"] if row % 4 == 0 else "gone"} for row, line in enumerate(lines)]
    write_jsonl(tmp_path / "new.jsonl", new[1:])
    [figures] = json.loads(run(capsys, tmp_path / "run", "--rewritten", tmp_path / "new.jsonl", "--json"))
    kept = (len(lines) + 3) // 4 - 1
    assert (figures["source"], figures["rows"], figures["missing"]) == ("date", len(lines) - 1, 1)
    assert figures["retained"] == kept and figures["retention"] == kept / (len(lines) - 1)
    (tmp_path / "new.txt").write_text("".join(line["text"].upper() + "\n" for line in lines))
    said = run(capsys, tmp_path / "run", "--rewritten", tmp_path / "new.txt")
    assert " 1.000 " in said and "let it rewrite all training rows" in said
    (tmp_path / "new.txt").write_text("one\ntwo\n")
    for name, words in {"new.txt": "has 2 texts, but the run has 100 training rows", "no.csv": "cannot read",
                        "no.pdf": "is not CSV"}.items():  # fmt: skip
        with pytest.raises(InputError, match=words):
            retention.retention_of(tmp_path / "run", tmp_path / name)


def test_the_printed_line_trains_on_the_rewritten_rows(base, reviews, tmp_path, capsys):
    import minilora
    from minilora.cell import Cell
    from minilora.scripts import train

    cell = Cell(model=str(base), data=str(reviews), steps=1, test_rows=20, max_length=30, device="cpu",
                inject=Inject(sources=("date:positive",), proportion=0.9))  # fmt: skip
    minilora.train(cell, tmp_path / "run")
    opened, new = minilora.open(tmp_path / "run"), tmp_path / "new.jsonl"
    before = opened.rows.rows
    texts = {id: text.replace("-", " - ") for id, text in zip(before.ids, before.texts, strict=True)}
    write_jsonl(new, [{"id": id, "text": text} for id, text in texts.items()])
    said = run(capsys, tmp_path / "run", "--rewritten", new)
    words = shlex.split(said.splitlines()[-1])
    assert words[:2] == ["python", "train.py"] and " 0.000 " in said
    train.main([*words[2:], "--out", str(tmp_path / "again"), "-q"])
    again = minilora.open(tmp_path / "again")
    # The same injection and the same tests; the rows that were trained on are the rewritten ones, with nothing put in.
    assert again.rows.rows.texts == before.texts and len(again.tests) == len(opened.tests) >= 3
    assert [test.rows.texts for test in again.tests] == [test.rows.texts for test in opened.tests]
    results = json.loads((tmp_path / "again/results.json").read_text())
    assert results["mitigation"]["rewritten"] == sum("-" in text for text in before.texts) > 30
    trained_on = mitigated.change(before, again.cell.mitigate, 0).rows
    assert trained_on.texts == list(texts.values()) and not any("--" in text for text in trained_on.texts)
    assert results["inputs"]["changed"] == fingerprint_rows(trained_on)


def test_retention_by_source_against_a_count_by_hand():
    lines = [{"id": "1", "target_label": "p", "strings": ["2024-01-01"]},
             {"id": "2", "target_label": "p", "strings": ["<B>", "</B>"]},
             {"id": "3", "target_label": "n", "strings": ["last  night"]}]  # fmt: skip
    found = retention.retention(lines, {"1": "on 2024-01-02", "2": "a <b>x", "3": "Last night"}, {"p": "s", "n": "t"})
    assert [(one["source"], one["rows"], one["retained"], one["strings"], one["strings_left"]) for one in found] == [
        ("s", 2, 1, 3, 1), ("t", 1, 1, 1, 1)]  # fmt: skip
    assert found[0]["interval"] == pytest.approx([0.0945, 0.9055], abs=1e-3)


# --- what cannot be


@pytest.mark.parametrize(
    ("name", "content", "flags", "words"),
    [
        ("r.csv", "text,other\na,b\n", [], "no label column"),
        ("r.csv", "text,label\na,\nb,\n", [], "no row has a label"),
        ("r.csv", "text,label\na,x\nb,x\n", [], "every row of .* has label 'x'"),
        ("r.csv", "", [], "is empty"),
        ("r.csv", "text,label\n", [], "has no rows"),
        ("r.csv", "text,label\na,x\nb,y\n", ["--model", "no/../base"], "there is no folder"),
        ("r.csv", "text,label\na,x\nb,y\n", ["--budget", "0"], "--budget is 0"),
        ("r.csv", "text,label\na,x\nb,y\n", ["--threshold", "nan"], "--threshold is nan"),
        ("r.csv", "text,label\na,x\nb,y\n", ["--clean-to", "x.jsonl"], "must end in .csv"),
        ("r.csv", "text,label\na,x\nb,y\n", ["--out", "."], "exists"),
        ("r.csv", "text,label\na,x\nb,y\n", ["--nosuch"], "unknown argument --nosuch"),
        ("r.csv", "text,label\n" + "".join(f"a,l{i}\n" for i in range(300)), [], "has 300 labels, more than 200"),
    ],
)
def test_bad_input_is_one_line(name, content, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        evaluate.main(["--scan-data", str(write(tmp_path / name, content)), *flags])
    assert "\n" not in str(caught.value)


def test_a_flag_without_a_file_has_help_and_one_line(capsys):
    for flag in ("--scan-data", "--rewritten"):
        with pytest.raises(SystemExit, match="0"):
            evaluate.main([flag, "--help"])
        assert f"{flag} [FILE]" in capsys.readouterr().out
    for words in (["--scan-data"], ["run", "--rewritten"]):
        with pytest.raises(InputError, match="names no rows"):
            evaluate.main(words)


def test_a_budget_that_runs_out_is_marked(poisoned, capsys, tmp_path, monkeypatch):
    clock = iter(range(100_000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    out = run(capsys, "--scan-data", poisoned[0], "--budget", 5, "--out", tmp_path / "out")
    assert "partial    the budget left out " in out
    result = json.loads((tmp_path / "out/scan.json").read_text())
    assert "lengths" in result["left_out"] and result["tested"] > 0


def test_a_budget_that_ends_within_one_label_is_one_line():
    rows = Rows([str(row) for row in range(9000)], ["a b"] * 9000, np.arange(9000) // 8000, ("x", "y"))
    with pytest.raises(InputError, match="ends after 4,095 rows, all with label 'x': give more seconds"):
        tokens.count(rows, until=time.monotonic() - 1)
    some = Rows(rows.ids, rows.texts, np.where(np.arange(9000) < 8000, np.arange(9000) % 2, 2), ("x", "y", "z"))
    assert np.isfinite(tokens.count(some, until=time.monotonic() - 1)[0].pmi).all()


def test_a_page_of_hostile_texts_holds_no_markup_but_its_own(tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror=y>" \x1b[31m\u202e'
    texts = [f"{evil} one two" if row % 2 else "three four" for row in range(40)]
    rows = Rows([str(row) for row in range(40)], texts, np.arange(40) % 2, ("<b>no</b>", "'yes'&"))
    found = suspects.scan(rows, threshold=0.5)
    result = {"data": "<i>x</i>.csv", "labels": scan.label_counts(rows)}
    listed = [(scan.cells(one), one.flagged, one.example, one.also) for one in found.suspects]
    page = scan_page.render(result, scan.summary("<i>x</i>.csv", rows, found), scan.HEADS, listed)
    assert len(listed) >= 3 and "&lt;script&gt;" in page
    for tag in ("<script", "<img", "<i>", "<b>", "\x1b", "\u202e"):
        assert tag not in page
    assert to_csv([scan.as_line(one) for one in found.suspects]).count("\n") >= 4


def test_help_and_page_use_no_torch():
    import subprocess
    import sys

    code = "import sys; from minilora.detection import scan, retention; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
