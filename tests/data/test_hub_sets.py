"""Data sets on a hub, laid out as real ones are: their Parquet copies, their own files, and what cannot be read."""

import gzip
import re

import pytest
from conftest import FILMS, as_csv, as_jsonl, named, parquet_bytes, refusal, whole

from minilora.data import formats, hub_sets
from minilora.data.rows import load_rows, train_test
from minilora.errors import InputError


def split_rows(split, labels, column="text", label="label"):
    return {column: [f"{split} {place}" for place in range(len(labels))], label: labels}


COPY = "refs/convert/parquet"
NEG_POS = {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}


def test_a_set_laid_out_as_imdb(server):
    """Its own files are Parquet, so that the copy links them: the same bytes under other names."""
    parts = {
        "train": [split_rows("first", [1, 0]), split_rows("second", [0, 0, 1])],
        "test": [split_rows("test", [1, 1, 0])],
        "unsupervised": [split_rows("none", [-1, -1])],
    }
    parts = {split: [parquet_bytes(rows, NEG_POS) for rows in files] for split, files in parts.items()}
    own = {
        f"plain_text/{split}-{place:05d}-of-{len(files):05d}.parquet": content
        for split, files in parts.items()
        for place, content in enumerate(files)
    }
    card = b"---\nconfigs: []\n---\n"
    commit = server.put("stanfordnlp/imdb", own | {"README.md": card, ".gitattributes": b""}, kind="dataset")
    server.convert("stanfordnlp/imdb", {f"plain_text/{split}": files for split, files in parts.items()})
    train, test = train_test("stanfordnlp/imdb")
    assert whole(train) == (
        ["1", "2", "3", "4", "5"],
        ["first 0", "first 1", "second 0", "second 1", "second 2"],
        [1, 0, 0, 0, 1],
        ("neg", "pos"),
    )
    assert whole(test) == (["1", "2", "3"], ["test 0", "test 1", "test 2"], [1, 1, 0], ("neg", "pos"))
    wanted = ["test/0000.parquet", "train/0000.parquet", "train/0001.parquet"]
    assert server.bodies() == [f"plain_text/{name}" for name in wanted]
    assert len(train_test("stanfordnlp/imdb", test_rows=2)[1]) == 2
    assert whole(load_rows("stanfordnlp/imdb:plain_text", split="test")) == whole(test)
    assert refusal("stanfordnlp/imdb", split="unsupervised").startswith(
        "stanfordnlp/imdb/plain_text/unsupervised/0000.parquet: no row has a label; "
    )
    assert refusal("stanfordnlp/imdb", split="dev") == (
        "stanfordnlp/imdb has no split 'dev'; there are: test, train, unsupervised"
    )
    assert server.bodies() == ["plain_text/unsupervised/0000.parquet"]
    pinned = train_test("stanfordnlp/imdb", revision=commit)  # a commit of main has no copy
    asked = {path.partition(f"/{commit}/")[2] for _, path in server.requests}
    assert asked - {""} == {name for name in own if "unsupervised" not in name}
    assert server.bodies() == []  # the cache has their content
    server.status = 503  # everything is in the cache by now
    for rows in (pinned, train_test("stanfordnlp/imdb"), train_test("stanfordnlp/imdb", revision=commit)):
        assert [whole(side) for side in rows] == [whole(train), whole(test)]


def test_layouts_without_a_copy(server):
    """As rotten_tomatoes, financial-classification (shard names with a hash), bias_in_bios, converted
    Parquet."""
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
            ".cache/train.csv": b"",
        },
        "owner/json": {
            "train-rows/a.json": as_jsonl([("train 0", "b"), ("train 1", "a")]).encode(),
            "test-rows/a.json": as_jsonl([("test 0", "a")]).encode(),
            "test-rows/dataset_info.json": b"{}",
        },
    }
    expected = {
        "cornell-movie-review-data/rotten_tomatoes": ([1, 0], ("0", "1"), [1, 0, 0]),
        "nickmuchi/financial-classification": ([2, 0, 1], ("down", "flat", "up"), [1, 2]),
        "LabHC/bias_in_bios": ([1, 0, 0], ("3", "27"), [1]),
        "owner/converted": ([1, 0], ("0", "1"), [0]),
        "owner/csv": ([1, 0], ("a", "b"), [0]),
        "owner/json": ([1, 0], ("a", "b"), [0]),
    }
    found = {}
    for repo_id, files in sets.items():
        server.put(repo_id, files, kind="dataset")
        train, test = train_test(repo_id)
        assert train.texts == [f"train {place}" for place in range(len(train))]
        assert test.texts == [f"test {place}" for place in range(len(test))]
        assert all(re.search("train|test|eval", name) for name in server.bodies())
        found[repo_id] = (train.labels.tolist(), train.label_names, test.labels.tolist())
    assert found == expected and len(found) == 6


def test_a_set_laid_out_as_commonsense_qa(server):
    def qa(letters):
        count = len(letters)
        choices = [{"label": list("ABCDE"), "text": [f"choice {n}" for n in range(5)]}] * count
        return parquet_bytes({
            "id": list(map(str, range(count))), "question": [f"Why {n}?" for n in range(count)],
            "question_concept": ["x"] * count, "choices": choices, "answerKey": letters,
        })  # fmt: skip

    parts = {"train": qa(["B", "E", "A"]), "validation": qa(["E", "B"]), "test": qa(["", ""])}
    own = {f"data/{split}-00000-of-00001.parquet": content for split, content in parts.items()}
    commit = server.put("tau/commonsense_qa", own, kind="dataset")
    server.convert("tau/commonsense_qa", {f"default/{split}": [content] for split, content in parts.items()})
    options = "\nA. choice 0\nB. choice 1\nC. choice 2\nD. choice 3\nE. choice 4"
    for revision, folder in ((None, "default"), (commit, "data")):
        server.requests.clear()
        train, test = train_test("tau/commonsense_qa", revision=revision)
        assert whole(train) == (
            ["1", "2", "3"],
            ["Why 0?" + options, "Why 1?" + options, "Why 2?" + options],
            [1, 2, 0],
            ("A", "B", "E"),
        )
        assert (named(test), test.label_names) == (["E", "B"], ("A", "B", "E"))  # the validation split
        asked = [path.split("/")[5] for _, path in server.requests if "/resolve/" in path]
        assert set(asked) == {folder} and len(asked) >= 3


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


def test_rows_that_cannot_be_used_are_left_out_and_said(server, capsys):
    """As in SNLI, where 785 rows have no label. Ids count all rows of all files."""
    files = {
        "data/train-0.csv": as_csv([*FILMS[:2], ("no label", ""), *FILMS[2:]]).encode(),
        "data/train-1.csv": b"text,label\na,pos\n,neg\nb,neg\n  ,pos\nc\n",
        "data/test.csv": b"text,label\na,pos\nb,\n",
    }
    server.put("owner/set", files, kind="dataset")
    train, test = train_test("owner/set")
    assert whole(train) == (
        ["1", "2", "4", "5", "6", "8"],
        [*(text for text, _ in FILMS), "a", "b"],
        [1, 0, 0, 1, 1, 0],
        ("neg", "pos"),
    )
    assert (train.skipped, test.ids, test.skipped) == (("3", "7", "9", "10"), ["1"], ("2",))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert said == [
        "warning    1 of 5 rows of owner/set/data/train-0.csv are left out: 1 with no label",
        "warning    3 of 5 rows of owner/set/data/train-1.csv are left out: 2 with no text, "
        "1 with cells unlike the header",
        "warning    1 of 2 rows of owner/set/data/test.csv are left out: 1 with no label",
    ]
    load_rows("owner/set")
    assert "warning" not in capsys.readouterr().err  # once is enough
    assert refusal("owner/set", bad_rows="refuse") == (
        "owner/set/data/train-0.csv: 1 of 5 rows cannot be used: row 3 (no label); correct them, or leave them out "
        "with --bad-rows skip"
    )
    server.put("owner/none", {"train.csv": b"text,label\n,x\n ,y\n"}, kind="dataset")
    assert refusal("owner/none").startswith("owner/none/train.csv: 2 of 2 rows cannot be used: row 1 (no text), row 2")


def one(text, label=1):
    return parquet_bytes({"text": [text, f"{text} too"], "label": [label, 0]}, NEG_POS)


def test_which_files_are_read(server):
    """The copy or the data set's own files, by what the hub has and which revision is asked for."""
    own = {"train.csv": b"text,label\nown,1\nown too,0\n", "test.csv": b"text,label\nown,1\nown too,0\n"}
    repos = ("both", "neither", "part", "other-part", "empty")
    old = {name: server.put(f"owner/{name}", {"train.csv": own["test.csv"]}, kind="dataset") for name in repos}
    for name in repos:
        server.put(f"owner/{name}", own, kind="dataset")
    server.put("owner/both", {"train.csv": b"text,label\nv1,1\nv1 too,0\n"}, kind="dataset", revision="v1")
    converted = server.convert("owner/both", {"default/train": [one("copy")], "default/test": [one("copy")]})
    server.convert("owner/part", {"default/partial-train": [one("copy")], "default/test": [one("copy")]})
    splits = {"default/train": [one("copy")], "default/test": [one("copy")], "other/partial-train": [one("copy")]}
    server.convert("owner/other-part", splits)
    server.convert("owner/empty", {})
    copy, files, v1 = (("copy", ("neg", "pos")), ("own", ("0", "1")), ("v1", ("0", "1")))
    cases = [
        ("both", None, copy), ("both", "main", copy), ("both", COPY, copy), ("both", converted, copy),
        ("both", old["both"], files), ("both", "v1", v1),
        ("neither", None, files), ("neither", old["neither"], files),
        ("part", None, files), ("part", old["part"], files),
        ("other-part", None, copy), ("other-part:default", None, copy),
        ("empty", None, files),
    ]  # fmt: skip
    found = {}
    for status in (None, 503):  # at last from the cache only
        server.status = status
        for name, revision, _ in cases:
            rows = load_rows(f"owner/{name}", revision=revision)
            found[status, name, revision] = (rows.texts[0], rows.label_names)
    assert found == {(status, name, revision): rows for status in (None, 503) for name, revision, rows in cases}
    assert len(found) == 26
    server.status = None
    for name in repos:  # both sides from the same place
        train, test = train_test(f"owner/{name}")
        assert train.texts == test.texts and len(test) == 2
    partial = "this revision holds only the first 5 GB of a split; leave it out"
    assert refusal("owner/part", revision=COPY) == f"owner/part: {partial}"
    assert refusal("owner/other-part:other", revision=COPY) == f"owner/other-part:other: {partial}"
    assert refusal("owner/both", revision="v9") == (
        "dataset 'owner/both' has no revision 'v9'; check the branch, tag or commit"
    )


def test_parts_of_a_copy_are_in_order_and_names_of_splits_are_exact(server):
    server.put("owner/set", {"a.bin": b""}, kind="dataset")
    splits = {"default/train-part1": [one("third")], "default/train-part0": [one("first"), one("second", 0)],
              "default/sft-part0": [one("no")], "default/dev": [one("dev")],
              "default/valid": [one("valid")]}  # fmt: skip
    server.convert("owner/set", splits)
    train = load_rows("owner/set")
    assert train.texts == [text for word in ("first", "second", "third") for text in (word, f"{word} too")]
    assert train.labels.tolist() == [1, 0, 0, 0, 1, 0]
    for split, text in (("sft", "no"), ("dev", "dev"), ("valid", "valid"), ("validation", "dev")):
        assert load_rows("owner/set", split=split).texts == [text, f"{text} too"]
    assert refusal("owner/set", split="test") == ("owner/set has no split 'test'; there are: dev, sft, train, valid")


def test_class_names_of_a_copy(server):
    server.put("owner/set", {"train.csv": b"text,label\na,0\nb,1\n"}, kind="dataset")
    rows = {"text": ["a", "b", "c"], "label": [0, 1, 1]}
    bad = {"test": [1, -1], "validation": [0, 2]}
    splits = {f"default/{split}": [parquet_bytes(split_rows(split, labels), NEG_POS)] for split, labels in bad.items()}
    server.convert("owner/set", splits | {"default/train": [parquet_bytes(rows, NEG_POS)]})
    assert whole(load_rows("owner/set"))[2:] == ([0, 1, 1], ("neg", "pos"))
    found = load_rows("owner/set", split="test")
    assert whole(found) == (["1"], ["test 0"], [0], ("pos",)) and found.skipped == ("2",)
    assert refusal("owner/set", split="validation", bad_rows="refuse").startswith(
        "owner/set/default/validation/0000.parquet: 1 of 2 rows cannot be used: "
        "row 2 (a label beyond the 2 classes that the file names: 2); "
    )


def test_configurations(server):
    own = {
        f"{config}/{split}.parquet": one(f"own {config}") for config in ("sst2", "cola") for split in ("train", "dev")
    }
    commit = server.put("owner/glue", own, kind="dataset")
    places = [f"{config}/{split}" for config in ("sst2", "cola", "train") for split in ("train", "validation")]
    server.convert("owner/glue", {place: [one(place)] for place in places})
    found = {config: load_rows(f"owner/glue:{config}").texts[0] for config in ("sst2", "cola", "train")}
    assert found == {config: f"{config}/train" for config in ("sst2", "cola", "train")}
    assert train_test("owner/glue:sst2")[1].texts == ["sst2/validation", "sst2/validation too"]
    advice = "what can be given as owner/glue:CONFIG: cola, sst2"
    assert refusal("owner/glue") == f"owner/glue has several configurations; {advice}, train"
    assert refusal("owner/glue:qnli") == f"owner/glue:qnli has no configuration 'qnli'; {advice}, train"
    assert load_rows("owner/glue:cola", revision=commit).texts[0] == "own cola"
    assert refusal("owner/glue", revision=commit) == f"owner/glue has several configurations; {advice}"
    server.convert("owner/glue", {"default/train": [one("default")], "cola/train": [one("cola")]})
    assert [load_rows(f"owner/glue{config}").texts[0] for config in ("", ":default", ":cola")] == [
        "default", "default", "cola",
    ]  # fmt: skip
    server.put("owner/flat", {"train.csv": as_csv(FILMS).encode()}, kind="dataset")
    assert refusal("owner/flat:x").endswith("no configuration 'x'; what can be given as owner/flat:CONFIG: none")


def test_sets_that_cannot_be_read_here(server):
    none = "has no files that are read here (.parquet .csv .tsv .jsonl .ndjson .json)"
    commit = server.put("owner/script", {"script.py": b"", "README.md": b"# A set"}, kind="dataset")
    assert refusal("owner/script") == f"owner/script {none}, and no whole copy at {COPY}"
    server.convert("owner/script", {"default/train": [one("made by the script")]})
    assert refusal("owner/script", revision=commit) == f"owner/script {none}; try revision {COPY}"
    assert load_rows("owner/script").texts[0] == "made by the script"

    server.put("owner/gated", {"train.csv": b""}, kind="dataset")
    server.convert("owner/gated", {"default/train": [one("secret")]})
    server.gated.add("owner/gated")
    assert refusal("owner/gated") == (
        "dataset 'owner/gated' is gated: ask for access on its hub page, then run `hf auth login`"
    )
    server.requests.clear()
    assert refusal("owner/missing").startswith("the hub has no dataset 'owner/missing' that you can read; ")
    assert server.requests == [("GET", f"api/datasets/owner/missing/revision/{COPY}")]
    server.status = 503
    assert refusal("owner/new").startswith("cannot reach the hub for dataset 'owner/new' (tried ")


def test_a_data_set_is_read_at_one_commit(server):
    server.put("owner/set", {"train.csv": as_csv(FILMS).encode()}, kind="dataset")
    for publish in (
        lambda text: server.put("owner/set", {"train.csv": f"text,label\n{text},x\n".encode()}, kind="dataset"),
        lambda text: server.convert("owner/set", {"default/train": [one(text)]}),
    ):
        commit = publish("old")
        hub_set = hub_sets.HubSet("owner/set")
        (first,) = hub_set.read("train")
        publish("new")
        (second,) = hub_set.read("train")
        assert (hub_set.revision, first.texts[0], second.texts[0]) == (commit, "old", "old")
        assert isinstance(first, formats.Table)
        assert hub_sets.HubSet("owner/set").read("train")[0].texts[0] == "new"
