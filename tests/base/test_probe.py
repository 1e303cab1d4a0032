"""tokenizer.json files on which the library panics, aborts, never ends or fills memory: one line, in little time."""

import base64
import copy
import json
import os
import threading
from types import SimpleNamespace

import pytest
from test_tokenizer import rows_of
from test_words import TOKENIZERS

from minilora.base import probe, tokenizer
from minilora.errors import InputError

WORDS = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "a", "b", "the", "film"])}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def document(**changes):
    model = {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"}
    plain = dict(version="1.0", truncation=None, padding=None, added_tokens=[], normalizer=None,
                 pre_tokenizer={"type": "Whitespace"}, post_processor=None, decoder=None, model=model)  # fmt: skip
    return plain | changes


def charsmap(content):
    return document(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()})


def template(single, **tokens):
    return document(
        post_processor={"type": "TemplateProcessing", "single": single, "pair": [TEXT], "special_tokens": tokens}
    )


def bpe(**changes):
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                 fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab={"a": 0, "b": 1, "aa": 2},
                 merges=["a a"])  # fmt: skip
    return document(model=model | changes)


def split(pattern):
    return document(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    )


def grows(pattern, content, times):
    rule = {"type": "Replace", "pattern": pattern, "content": content}
    return document(normalizer={"type": "Sequence", "normalizers": [rule] * times})


HARMFUL = {
    "charsmap that cannot be parsed": charsmap(b"\0\0\0"),
    "charsmap with a table that is too short": charsmap(b"\4\0\0\0\0\0\0\0"),
    "charsmap that says it has 4 GiB": charsmap(b"\xff\xff\xff\xff"),
    "template with a token that it lacks": template([{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, TEXT]),
    "template of the second text": template([{"Sequence": {"id": "B", "type_id": 0}}]),
    "BPE prefix longer than its tokens": bpe(continuing_subword_prefix="##"),
    "pieces of no length": document(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "backtracking": split("(a+)+$"),
    "backtracking on words": split(r"(\w+\s?)+$"),
    "backtracking on digits": split("([0-9]+)*x"),
    "backtracking in a sequence": document(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, split("(b*)*c")["pre_tokenizer"]]}
    ),
    "backtracking in a normalizer": grows({"Regex": "(a|aa)+$"}, "x", 1),
    "200-fold, six times": grows({"String": "a"}, "a" * 200, 6),
    "200-fold by a pattern": grows({"Regex": "[q-z]"}, "z" * 200, 6),
    "dropout": bpe(dropout=0.5),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder, content):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("what", HARMFUL)
def test_a_harmful_file_is_refused_in_one_line(tmp_path, capfd, what):
    """Or it is harmless in the end (some regular expressions are, by the library's own care)."""
    write(tmp_path, HARMFUL[what])
    try:
        ours = tokenizer.load(tmp_path)
    except InputError as error:
        assert str(tmp_path / "tokenizer.json") in str(error) and "\n" not in str(error)
    else:
        assert "backtracking" in what
        ours.encode(["a" * 60 + "b", "film " * 60, "1" * 60], 50)
    assert "panicked" not in capfd.readouterr().err


def test_a_plain_file_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "attempt", lambda *_: pytest.fail("tried"))
    assert rows_of(tokenizer.load(write(tmp_path, document())).encode(["the film a"], 9)) == [[6, 7, 4]]
    for made in TOKENIZERS.values():
        made.save(str(tmp_path / "tokenizer.json"))
        tokenizer.load(tmp_path)
    plain = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, TEXT]
    sound = template(plain, **{"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]}})
    assert rows_of(tokenizer.load(write(tmp_path, sound)).encode(["film"], 9)) == [[1, 7]]


def test_a_file_with_patterns_is_tried_once(tmp_path, monkeypatch):
    tried, attempt = [], probe.attempt
    monkeypatch.setattr(probe, "attempt", lambda *given: tried.append(given) or attempt(*given))
    words = split(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # as published
    for _ in range(2):
        ours = tokenizer.load(write(tmp_path, words))
    assert rows_of(ours.encode(["the film"], 9)) == [[6, 0, 7]] and len(tried) == 1
    other = copy.deepcopy(words)
    other["model"]["vocab"] = WORDS | {"more": 8}
    tokenizer.load(write(tmp_path, other))
    assert len(tried) == 2


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tokenizer.load(write(tmp_path, split(r"\s+"))).vocab_size == 8


def test_a_chunk_that_never_ends_is_refused(tmp_path, monkeypatch):
    ours, end = tokenizer.load(write(tmp_path, document())), threading.Event()
    monkeypatch.setattr(ours, "_tokenizer", SimpleNamespace(encode_batch=lambda *_, **__: end.wait()))
    monkeypatch.setattr(tokenizer, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(InputError, match="needs more than 0.0 s for 2 texts .first: 'a film'"):
        ours.encode(["a film", "the film"], 9)
    end.set()


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json",
                                  "added_tokens.json", "config.json"])  # fmt: skip
def test_only_regular_files_are_read(tmp_path, name):
    if name != "vocab.txt":
        write(tmp_path, document())
    (tmp_path / name).unlink(missing_ok=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir):
        make(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: is not a regular file"):
            tokenizer.load(tmp_path)
        (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
