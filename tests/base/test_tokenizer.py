import gzip
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from minilora.base import tokenizer, word_table
from minilora.errors import InputError

AWKWARD = [
    "",
    " ",
    "\t\n ",
    "a [SEP] b [MASK]c [CLS]",
    "naïve Café ÅNGSTRÖM İstanbul ß ﬁne",
    "中文字 and 한국어 mixed",
    "emoji 🎬🎬 and ☃",
    "control\x00\x07 char\u200bacters\u00ad",
    "unbelievably supercalifragilisticexpialidocious",
    "x" * 150 + " end",
    "!!!...???",
    "  spaces   inside and behind   ",
]
# What the vocabularies of the tests below hold besides the special tokens.
PIECES = "a b c ab ##a ##b ##c ##ab é e ##e A B 中 , . ab, 1 ##1 play ##ing".split()


@pytest.fixture(scope="session")
def base(base_folder):
    return tokenizer.load(base_folder)


@pytest.fixture(scope="session")
def judge(base_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture(scope="session")
def snippets():
    path = Path(tokenizer.__file__).parents[1] / "data" / "movie_snippets" / "movie-snippets.tsv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t")[2] for line in file][1:]


def rows_of(encoded):
    assert encoded.ids.dtype == np.uint16 and encoded.offsets.dtype == encoded.kept.dtype == np.int64
    assert encoded.offsets[0] == 0 and encoded.offsets[-1] == len(encoded.ids)
    return [encoded.ids[start:stop].tolist() for start, stop in itertools.pairwise(encoded.offsets)]


def vocabulary(folder, special=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), pieces=PIECES, **settings):
    (folder / "vocab.txt").write_text("\n".join([*special, *pieces]) + "\n", encoding="utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


# Against transformers


@pytest.mark.parametrize("max_length", [3, 4, 17, 32, 64, 512])
def test_tokens_and_cuts_are_those_of_transformers(base, judge, snippets, max_length):
    texts = AWKWARD + snippets[::7]
    encoded = base.encode(texts, max_length)
    expected = judge(texts, truncation=True, max_length=max_length)["input_ids"]
    assert rows_of(encoded) == expected
    whole = judge(texts, return_offsets_mapping=True)
    kept = [
        len(text) if len(ids) <= max_length else offsets[max_length - 1][0]
        for text, ids, offsets in zip(texts, whole["input_ids"], whole["offset_mapping"], strict=True)
    ]
    assert encoded.kept.tolist() == kept
    cut = sum(count < len(text) for count, text in zip(kept, texts, strict=True))
    assert len(texts) == 1527 and (cut > 0) == (max_length < 512)


@pytest.mark.parametrize("lower", [True, False, None])
@pytest.mark.parametrize("accents", [True, False, None])
@pytest.mark.parametrize("chinese", [True, False])
def test_vocab_txt_gives_the_tokens_of_transformers(tmp_path, lower, accents, chinese):
    from transformers import BertTokenizerFast

    settings_given = {"strip_accents": accents, "tokenize_chinese_chars": chinese}
    if lower is not None:
        settings_given["do_lower_case"] = lower
    folder = vocabulary(tmp_path, **settings_given)
    ours, judge = tokenizer.load(folder), BertTokenizerFast.from_pretrained(folder)
    words = st.sampled_from(
        ["a ", "ab", "abc,", " c.", "é", " e\u0301", "A", " B ", "中", "1", "11 ", "\u3000", "playing"]
    )
    special = st.sampled_from(["[SEP]", "[MASK] ", "[UNK]", "[X]"])
    pieces = st.lists(st.one_of(words, words, words, special, st.characters()), min_size=8, max_size=30)
    cases = []

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(pieces, st.integers(3, 40))
    def compare(parts, max_length):
        text = "".join(parts).encode(errors="ignore").decode()
        [ids] = rows_of(ours.encode([text], max_length))
        assert ids == judge(text, truncation=True, max_length=max_length)["input_ids"]
        cases.append(ids)

    compare()
    assert len(cases) >= 60 and len(set(itertools.chain(*cases))) > 15


def test_vocab_txt_of_the_real_base_gives_the_tokens_of_its_tokenizer_json(base, snippets, tmp_path):
    tokens = base._tokenizer.get_vocab()
    folder = vocabulary(tmp_path, special=[], pieces=sorted(tokens, key=tokens.get))
    ours = tokenizer.load(folder)
    texts = AWKWARD + snippets[::7]
    assert rows_of(ours.encode(texts, 64)) == rows_of(base.encode(texts, 64))
    assert (ours.vocab_size, ours.pad_id) == (base.vocab_size, base.pad_id) == (30522, 0)


def test_special_tokens_may_have_other_names(tmp_path):
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    names = {
        "cls_token": "<s>",
        "sep_token": {"content": "</s>"},
        "unk_token": "of no account",
        "mask_token": "<mask>",
    }
    folder = vocabulary(tmp_path, special=special, **names)
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<pad>", "unk_token": "<unk>"}')
    ours = tokenizer.load(folder)
    assert rows_of(ours.encode(["ab zz <mask>"], 9)) == [[1, 8, 3, 4, 2]]
    assert ours.pad_id == 0 and ours.vocab_size == 5 + len(PIECES)


# Cuts


def test_kept_ends_before_the_first_token_that_is_cut(tmp_path):
    ours = tokenizer.load(vocabulary(tmp_path))
    text = " ab,  playing c "  # ab | , | play | ##ing | c
    for max_length, kept in {3: 3, 4: 6, 5: 10, 6: 14, 7: 16, 8: 16}.items():
        assert ours.encode([text], max_length).kept.tolist() == [kept]


def test_a_string_put_in_survives_exactly_where_visible_says(base, snippets):
    texts = ["", " a ", "No."] + snippets[::500]
    strings = [[], ["2024-01-31"], ["red"], ["<b>", "</b>"], ["Bosnia and Herzegovina", "1100-12-03"]]
    cases = {True: 0, False: 0}
    for max_length, added in itertools.product([4, 9, 20, 40], strings):
        visible = base.visible(texts, [added] * len(texts), max_length)
        assert visible.dtype == np.int64
        for text, end in zip(texts, visible.tolist(), strict=True):
            gaps = [0, *(word.end() for word in re.finditer(r"\S+", text))]
            lead = "".join(f" {string}" for string in added)
            changed = [text[:gap] + lead + text[gap:] if gap else lead[1:] + " " + text for gap in gaps]
            kept = base.encode(changed, max_length).kept.tolist()
            for gap, count in zip(gaps, kept, strict=True):
                survives = count >= gap + len(lead.strip() if gap == 0 else lead)
                assert survives == (gap <= end), (text, added, max_length, gap, end, count)
                cases[survives] += 1
    assert cases[True] > 1000 and cases[False] > 1000


def test_visible_in_figures(tmp_path):
    ours = tokenizer.load(vocabulary(tmp_path))
    texts, added = ["ab,  playing c "] * 5, [[], ["a"], ["a", "b"], ["ab, ab"], ["a b", "a b"]]
    assert ours.visible(texts, added, 5).tolist() == [9, 5, 2, 0, -1]
    assert ours.visible(texts, added, 99).tolist() == [15] * 5
    assert ours.visible([], [], 5).tolist() == []


@pytest.mark.parametrize("characters", [1, 50, 400])
def test_chunks_change_nothing(base, snippets, monkeypatch, characters):
    texts = AWKWARD + snippets[:100]
    encoded, visible = base.encode(texts, 20), base.visible(texts, [["red"]] * len(texts), 20)
    monkeypatch.setattr(tokenizer, "CHUNK_CHARACTERS", characters)
    again = base.encode(texts, 20)
    assert rows_of(again) == rows_of(encoded) and again.kept.tolist() == encoded.kept.tolist()
    assert base.visible(texts, [["red"]] * len(texts), 20).tolist() == visible.tolist()
    assert rows_of(base.encode([], 20)) == []


# tokenizer.json


def saved(folder, post=None, tokens=("a", "b", "<u>", "<s>", "</s>"), **settings):
    """A word-level tokenizer.json whose file asks for padding and truncation."""
    model = models.WordLevel({token: 2 * index for index, token in enumerate(tokens)}, unk_token="<u>")
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if post:
        made.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", 6), ("</s>", 8)])
    made.enable_padding(pad_id=2, pad_token="b", length=5)
    made.enable_truncation(3)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("post", "whole", "cut"),
    [
        (None, [0, 2, 4, 0], [0, 2, 4]),
        ("<s> $A", [6, 0, 2, 4, 0], [6, 0, 2]),
        ("$A </s>", [0, 2, 4, 0, 8], [0, 2, 8]),
        ("<s> <s> $A", [6, 6, 0, 2, 4, 0], [6, 6, 0]),
        ("<s> $A </s>", [6, 0, 2, 4, 0, 8], [6, 0, 8]),
    ],
)
def test_the_post_processor_says_what_surrounds_a_text(tmp_path, post, whole, cut):
    ours = tokenizer.load(saved(tmp_path, post))
    assert rows_of(ours.encode(["a b x a", "b"], 9))[0] == whole  # neither padded nor cut by the file's settings
    encoded = ours.encode(["a b x a"], 3)
    assert rows_of(encoded) == [cut]
    assert encoded.kept.tolist() == [2 * (3 - (len(whole) - 4))]
    assert ours.vocab_size == 9


def test_the_padding_token(tmp_path):
    assert tokenizer.load(saved(tmp_path)).pad_id == 2  # by tokenizer.json
    assert tokenizer.load(saved(tmp_path, pad_token="</s>")).pad_id == 8
    assert tokenizer.load(saved(tmp_path, pad_token={"content": "<s>"})).pad_id == 6
    assert tokenizer.load(saved(tmp_path, pad_token="unheard of")).pad_id == 5  # added, as transformers does
    bare = Tokenizer.from_file(str(saved(tmp_path) / "tokenizer.json"))
    bare.no_padding()
    bare.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.load(tmp_path).pad_id == 0


def test_more_tokens_than_the_base_embeds(tmp_path):
    made = Tokenizer(models.WordLevel({"a": 0, "<u>": 1}, unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_tokens(["new", "newer"])
    made.save(str(tmp_path / "tokenizer.json"))
    for embedded in (None, 4, 5):
        ours = tokenizer.load(tmp_path, embedded)
        assert rows_of(ours.encode(["a newer what new"], 9)) == [[0, 3, 1, 2]]
        assert ours.vocab_size == 2
    ours = tokenizer.load(tmp_path, 3)  # an added token may have no embedding, as in Gemma 3
    assert rows_of(ours.encode(["a new", ""], 9)) == [[0, 2], []]
    with pytest.raises(InputError, match="text 1 .* id 3, but the base embeds 3 .*'newer a'"):
        ours.encode(["a", "newer a"], 9)
    with pytest.raises(InputError, match="ids up to 1, but the base embeds 1 tokens.*--tokenizer"):
        tokenizer.load(tmp_path, 1)


# Bad input


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="has neither tokenizer.json nor vocab.txt"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"version": "1.0", "model": {}}'),
        ("vocab.txt", b""),
        ("vocab.txt", b"\xff\xfe\n"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[MASK]\na\n"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"do_lower_case": "yes"}'),
        ("tokenizer_config.json", b'{"cls_token": ["[CLS]"]}'),
    ],
)
def test_a_malformed_file_is_refused_by_its_name(tmp_path, name, data):
    folder = vocabulary(tmp_path)
    (folder / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        tokenizer.load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    if "do_lower" not in str(data) and "cls" not in str(data):
        assert str(folder / name) in str(error.value)


def test_a_model_whose_unknown_token_is_missing_is_refused(tmp_path):
    Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="tokenizer.json: not a usable tokenizer .*UNK"):
        tokenizer.load(tmp_path)


def test_a_text_that_is_not_unicode_is_refused_by_its_row(base, monkeypatch):
    texts = ["fine", "also fine", "a \ud800 alone", "fine"]
    for characters in (1, 1000):
        monkeypatch.setattr(tokenizer, "CHUNK_CHARACTERS", characters)
        with pytest.raises(InputError, match=r"^text 2 \(counted from 0\) is not valid Unicode"):
            base.encode(texts, 9)


def test_a_length_without_room_for_text_is_refused(base):
    for call in (lambda: base.encode(["a"], 2), lambda: base.visible(["a"], [[]], 2)):
        with pytest.raises(InputError, match="--max-length must be at least 3"):
            call()
    assert rows_of(base.encode(["a b"], 3)) == [[101, 1037, 102]]


# Word by word


PARTS = ["a", "bc", "ab,", "É", "İ", "中文", "[MASK]", "[SEP]x", "\t", "\n", "\x0b", "\x00", "\u3000", "\xa0", "\u0301",
         "🎬", "playing", "x" * 101, "2031-07-18", "don't", ""]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PARTS), max_size=9).map(" ".join) | st.text(max_size=20), max_size=6),
       st.integers(3, 14))  # fmt: skip
def test_words_give_the_tokens_of_the_whole_text(base, texts, max_length):
    """A tokenizer without the table of words is the judge: ids, cuts, and what stays visible beside a trigger."""
    whole = tokenizer.TextTokenizer(base._tokenizer, "[PAD]", "[SEP]")
    whole._table = None
    texts = [text.encode(errors="ignore").decode() for text in texts]
    added = [["a 2031-07-18"] * (row % 3) for row in range(len(texts))]
    ours, judged = base.encode(texts, max_length), whole.encode(texts, max_length)
    assert base._table is not None
    for found, wanted in zip((ours.ids, ours.offsets, ours.kept), (judged.ids, judged.offsets, judged.kept)):
        assert found.dtype == wanted.dtype and np.array_equal(found, wanted)
    assert np.array_equal(base.visible(texts, added, max_length), whole.visible(texts, added, max_length))


def test_the_table_forgets_and_learns_again(base, snippets, monkeypatch):
    wanted = base.encode(snippets[:300], 20)
    for most in (0, 40):
        monkeypatch.setattr(word_table, "MOST", most)
        monkeypatch.setattr(tokenizer, "CHUNK_CHARACTERS", 500)
        found = base.encode(snippets[:300], 20)
        assert np.array_equal(found.ids, wanted.ids) and np.array_equal(found.kept, wanted.kept)
        assert len(base._table._ids) <= most + 300  # and the words of a chunk


def test_which_tokenizers_are_read_word_by_word(base):
    from tokenizers import AddedToken, normalizers

    def changed(change):
        made = Tokenizer.from_str(base._tokenizer.to_str())
        change(made)
        return word_table.is_spaced(made)

    assert changed(lambda made: None) and changed(lambda made: made.add_tokens(["<unused>"]))
    others = [
        lambda made: made.add_tokens(["new york"]),
        lambda made: made.add_tokens(["中"]),
        lambda made: made.add_tokens([AddedToken("<left>", lstrip=True)]),
        lambda made: made.add_tokens([AddedToken("<right>", rstrip=True)]),
        lambda made: setattr(made, "normalizer", normalizers.NFC()),
        lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.ByteLevel()),
    ]
    assert [changed(change) for change in others] == [False] * len(others)


def test_a_broken_text_is_named_by_its_place(base):
    with pytest.raises(InputError, match=r"text 2 \(counted from 0\) is not valid Unicode"):
        base.encode(["a", "b c", "d \ud800 e"], 9)
