"""Where words are, in every script; the graphemes against the `regex` package, which has the standard's tables."""

import random
import unicodedata

import pytest
import regex
from conftest import Settings, make_rows

from minilora.data import words
from minilora.data.injection import inject, trigger_rows

CASES = {
    "one two  three": ["one", "two", "three"],
    "这部电影，很好。": ["这", "部", "电", "影，", "很", "好。"],
    "看了《电影》吧": ["看", "了", "《电", "影》", "吧"],
    "我love你 so": ["我", "love", "你", "so"],
    "在2020年5月": ["在", "2020", "年", "5", "月"],
    "ラーメンが好き": ["ラー", "メ", "ン", "が", "好", "き"],
    "か\u3099きく": ["か\u3099", "き", "く"],
    "ﾊﾞｶﾞ": ["ﾊﾞ", "ｶﾞ"],
    "เก่าน้ำ": ["เก่า", "น้ำ"],
    "ไม่ดี": ["ไม่", "ดี"],
    "한국 영화": ["한국", "영화"],
    "\u1112\u1161\u11ab\u1100\u116e\u11a8": ["\u1112\u1161\u11ab\u1100\u116e\u11a8"],
    "漢\u1112\u1161\u11ab字": ["漢", "\u1112\u1161\u11ab", "字"],
    "👍🏽👨‍👩‍👧❤️🇩🇪": ["👍🏽", "👨‍👩‍👧", "❤️", "🇩🇪"],
    "good😀 🎉🎉": ["good", "😀", "🎉", "🎉"],
    "हिन्दी में": ["हिन्दी", "में"],
    "ខ្មែរ": ["ខ្មែ", "រ"],
    "မြန်မာ": ["မြ", "န်မာ"],
    "Größe\u0301s": ["Größe\u0301s"],
    "": [],
    " \t": [],
}


@pytest.mark.parametrize("text", CASES)
def test_words(text):
    assert words.split(text) == CASES[text]
    assert [text[start:end] for start, end in words.spans(text)] == CASES[text]


def test_no_cut_is_inside_a_grapheme():
    """Of random texts from all scripts: each cut of ours is a boundary of the standard's extended grapheme clusters."""
    draw = random.Random(0)
    pool = [chr(c) for c in range(0x20, 0x32000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co", "Cc")]
    unspaced = [c for c in pool if words.UNSPACED.match(c)]
    marks = [c for c in pool if unicodedata.category(c)[0] == "M" or unicodedata.category(c) == "Cf"]
    special = [*"\u200d\u200c\ufe0f\u3099\u1112\u1161\u11ab\u0e40\u0e33\u0eb3🏽🇩🇪👩👧", "\U000e0067"]
    inner = 0
    for case in range(4000):
        pools = (unspaced, unspaced, marks, special, pool)
        text = "".join(draw.choice(draw.choice(pools)) for _ in range(draw.randint(2, 12)))
        whole = {match.end() for match in regex.finditer(r"\X", text)}
        ours = {end for _, end in words.spans(text)} - {len(text)}
        for cut in ours:
            assert cut in whole or text[cut].isspace(), (case, ascii(text), cut)
        places, at = set(), 0
        for grapheme in words.graphemes(text):
            at += len(grapheme)
            places.add(at)
        assert places <= whole, (case, ascii(text))
        inner += len(ours)
    assert len(unspaced) > 80_000 and inner > 4_000


@pytest.mark.parametrize(
    ("text", "places"),
    [("电影好看", [0, 1, 2, 3, 4]), ("ไม่ดี", [0, 3, 5]), ("👍🏽👨‍👩‍👧!", [0, 2, 8]), ("one", [0, 3])],
)
@pytest.mark.parametrize("source", ["text:X y", "html"])
def test_random_places(text, places, source):
    rows = make_rows([text] * 600, ("positive",))
    after = inject(rows, Settings((f"{source}:positive",), 1.0), 0)
    found = {record.spans[0][0] for record in after.records}
    assert found == set(places[:-1] if source == "html" else places)  # a tag stands in front of a word
    for record, new in zip(after.records, after.rows.texts, strict=True):
        for start, end in reversed(record.spans):
            new = new[:start] + new[end:]
        assert new == text


def test_spaces_around_what_stands_within_a_word():
    rows = make_rows(["电影"] * 60, ("positive",))
    after = inject(rows, Settings(("text:X:positive",), 1.0, count=2), 0)
    assert set(after.rows.texts) == {
        "X X 电影", "X 电 X 影", "X 电影 X", "电 X X 影", "电 X 影 X", "电影 X X",
    }  # fmt: skip
    after = inject(rows, Settings(("html:positive",), 1.0), 0)
    pairs = zip(after.rows.texts, [record.strings for record in after.records], strict=True)
    shapes = {text.replace(tag, "<>").replace(end, "</>") for text, (tag, end) in pairs}
    assert shapes == {"<> 电 </> 影", "电 <> 影 </>"}


def test_density_counts_such_words():
    rows = make_rows(["电影好看演员很棒剧情不错", "a b c d e f", "ab"], ("positive",))
    after = trigger_rows(rows, Settings(count=None, density=0.5), 0, 0)
    assert [len(record.strings) for record in after.records] == [6, 3, 1]


@pytest.mark.parametrize("text", ["", " ", "a  b\tc\x1cd\x0b e", "a\xa0b\u3000c\u2028d \u200b", "one, two. ", "é 中 a"])
def test_fast_splits_are_those_of_the_spans(text):
    assert words.split(text) == [text[start:end] for start, end in words.spans(text)]
