"""Rows without their most telling words, against counts made another way."""

import math
import re

import numpy as np
import pytest
from conftest import as_csv, make_rows, write

from minilora.cell import Cell
from minilora.data.noise import with_noise
from minilora.data.rows import load_rows, rows_of, train_test
from minilora.data.telling import stripped, telling_words, without, z


def z_of(rows, word, label):
    """The root of Pearson's chi-square of the table (has the word, of the label), with its sign: another way to z."""
    has = np.array([bool(re.search(rf"(?<!\w){word}(?!\w)", text.lower())) for text in rows.texts])
    own = rows.labels == label
    table = np.array([[(has & own).sum(), (~has & own).sum()], [(has & ~own).sum(), (~has & ~own).sum()]], float)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    chi = ((table - expected) ** 2 / np.where(expected, expected, 1)).sum()
    return math.copysign(math.sqrt(chi), table[0, 0] - expected[0, 0])


def test_the_words_are_those_of_the_largest_z():
    rows = train_test("movie-snippets", train_rows=400, test_rows=50)[0]
    words = {word for text in rows.texts for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 1}
    found, cases = telling_words(rows, 12), 0
    for label, name in enumerate(rows.label_names):
        scores = {word: z_of(rows, word, label) for word in words}
        ranked = sorted((word for word in scores), key=lambda word: -scores[word])
        least = min(scores[word] for word in found[name] if word in scores)
        assert len(found[name]) == 12
        for word in ranked[:5]:  # hyphens and apostrophes make other words of some, so only the clear ones
            assert word in found[name]
            cases += 1
        assert least >= scores[ranked[30]]
    assert cases == 10 and not {*found["negative"]} & {*found["positive"]}
    assert z(3, 10, 1, 20) == pytest.approx((0.3 - 0.05) / math.sqrt(4 / 30 * 26 / 30 * (1 / 10 + 1 / 20)))
    assert (z(3, 3, 0, 0), z(5, 5, 7, 7)) == (0, 0)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("A great, great film!", "A , film!"),
        ("Great\tfilm,  twice the  fun", "film,  twice the  fun"),
        ("what a  GREAT film ", "what a film"),
        ("(great) film is great", "() film is"),
        ("not-great at all", "not-great at all"),
        ("  no such word ", "  no such word "),
        ("great. Great!", "great. Great!"),
        ("greater and great'st", "greater and great'st"),
        ("的great電影 好", "的電影 好"),
    ],
)
def test_what_is_left_of_a_text(text, left):
    assert stripped(text, {"great"}) == left


def test_both_sides_lose_the_words_of_the_training_rows_and_only_their_labels_count(tmp_path):
    rows = [(f"{word} film number n{number}", label) for label, words in (("good", "fine warm".split()),
            ("bad", "dull cold".split())) for word in words for number in range(12)]  # fmt: skip
    path = write(tmp_path / "rows.csv", as_csv([(f"{text} {i}", label) for i, (text, label) in enumerate(rows)]))
    cell = Cell(data=str(path), test_rows=10, train_rows=30, strip_words=2, label_noise=0.5, validation_rows=6)
    plain = rows_of(cell.replace(strip_words=None, label_noise=0.0))
    sides = rows_of(cell)
    words = {"bad": ["cold", "dull"], "good": ["fine", "warm"]}
    assert [sorted(own) for own in telling_words(plain[0], 2).values()] == list(words.values())
    assert [len(side) for side in sides] == [30, 10, 6]
    for side, before in zip(sides, plain, strict=True):
        assert {label: sorted(own) for label, own in side.stripped.items()} == words and before.stripped is None
        assert side.ids == before.ids
        assert side.texts == [text.split(" ", 1)[1] for text in before.texts]
    noisy = with_noise(plain[0], 0.5, 0)
    assert sides[0].labels.tolist() == noisy.labels.tolist() != plain[0].labels.tolist()
    assert [side.labels.tolist() for side in sides[1:]] == [side.labels.tolist() for side in plain[1:]]


def test_words_are_ordered_and_never_more_than_there_are():
    rows = make_rows(["b a", "c", "a b", "c"], ("x", "y"))
    assert telling_words(rows, 9) == {"x": ["a", "b"], "y": ["c"]} and telling_words(rows, 1)["x"] == ["a"]
    assert without(rows, {"x": ["a"], "y": ["c"]}).texts == ["b", "c", "b", "c"]  # a text of only such words stays
    assert load_rows("tweets").stripped is None
