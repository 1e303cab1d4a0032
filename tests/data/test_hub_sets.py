"""Data sets on a hub, laid out as real ones are: their splits, configurations and cards, and what cannot be read."""

import gzip
import re

import pytest
from conftest import FILMS, as_csv, named, parquet_bytes, refusal, whole

from minilora.data import formats, hub_sets
from minilora.data.rows import load_rows, train_test
from minilora.errors import InputError


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
    train, test = train_test("stanfordnlp/imdb")
    assert whole(train) == (
        ["1", "2", "3", "4", "5"],
        ["first 0", "first 1", "second 0", "second 1", "second 2"],
        [1, 0, 0, 0, 1],
        ("neg", "pos"),
    )
    assert whole(test) == (["1", "2", "3"], ["test 0", "test 1", "test 2"], [1, 1, 0], ("neg", "pos"))
    assert server.bodies() == ["README.md"] + sorted(name for name in files if "unsupervised" not in name)
    assert len(train_test("stanfordnlp/imdb", test_rows=2)[1]) == 2
    assert whole(load_rows("stanfordnlp/imdb", split="test")) == whole(test)
    assert refusal("stanfordnlp/imdb", split="unsupervised").startswith(
        "stanfordnlp/imdb/plain_text/unsupervised-00000-of-00001.parquet: no row has a label; "
    )
    assert refusal("stanfordnlp/imdb", split="dev") == (
        "stanfordnlp/imdb has no split 'dev'; there are: train, test, unsupervised"
    )
    server.status = 503  # everything is in the cache by now
    assert [whole(side) for side in train_test("stanfordnlp/imdb")] == [whole(train), whole(test)]


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
        train, test = train_test(repo_id)
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
    train, test = train_test("tau/commonsense_qa")
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
        train, test = train_test(repo_id, test_rows=6)
        assert (len(train), len(test)) == (14, 6)
        assert sorted(train.texts + test.texts) == sorted(text for text, _ in rows)
    with pytest.raises(InputError, match="^owner/a has no labelled test or validation split; give other "):
        train_test("movie-snippets", test_data="owner/a")
    server.put("owner/c", {"train.csv": b"x", "test.csv": b"text,label\ngood,positive\n"}, kind="dataset")
    test = train_test("movie-snippets", test_data="owner/c")[1]
    assert whole(test) == (["1"], ["good"], [1], ("negative", "positive"))


def test_a_row_that_is_bad_is_named_with_its_file(server):
    files = {"data/train-0.csv": as_csv(FILMS).encode(), "data/train-1.csv": b"text,label\na,x\n,y\n"}
    server.put("owner/set", files, kind="dataset")
    assert refusal("owner/set").startswith("owner/set/data/train-1.csv row 2: the text is empty")


def test_class_names_of_a_card(server):
    front = CLASSES.replace("plain_text", "default")
    content = {"train.csv": b"text,label\na,0\nb,1\nc,pos\n", "test.csv": b"text,label\na,1\nb,-1\n"}
    server.put("owner/set", content | {"README.md": card(front)}, kind="dataset")
    assert whole(load_rows("owner/set"))[2:] == ([0, 1, 1], ("neg", "pos"))
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
        for rows in [load_rows(f"owner/glue:{config}")]
    }
    assert found == {
        "sst2": (["m", "m too", "s", "s too"], ["good", "bad"] * 2),
        "cola": (["c", "c too"], ["1", "0"]),
        "flat": (["a", "a too", "b", "b too"], ["1", "0"] * 2),
        "mapped": (["x", "x too"], ["1", "0"]),
    }
    assert train_test("owner/glue:sst2")[1].texts == ["d", "d too"]
    advice = "give owner/glue:CONFIG, one of: sst2, cola, flat, mapped"
    assert refusal("owner/glue") == f"owner/glue has several configurations; {advice}"
    assert refusal("owner/glue:qnli") == f"owner/glue:qnli has no configuration 'qnli'; {advice}"

    del files["mapped/x.csv"]
    server.put("owner/glue", files, kind="dataset", revision="plain")  # the same without a card
    assert load_rows("owner/glue:cola", revision="plain").texts == ["c", "c too"]
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
    assert load_rows("owner/script", revision="refs/convert/parquet").texts == ["train 0", "train 1"]

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
    assert isinstance(table, formats.Table)
