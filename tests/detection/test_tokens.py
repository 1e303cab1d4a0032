"""Statistics of what rows hold: each against a few-line reference, or a toy case worked out by hand."""

import math
import random
import time
from collections import Counter, defaultdict
from math import comb

import numpy as np
import pytest
from conftest import make_rows

from minilora.data.rows import Rows
from minilora.detection import seams, statistics, tokens

# --- statistics


def test_entropy_z_and_pmi_of_a_toy_case():
    """10 rows have it, 9 of them with the first label, which half of all rows have."""
    counts, prior = np.array([[9, 1], [5, 5], [0, 4]]), np.array([0.5, 0.5])
    assert statistics.entropy(counts) == pytest.approx([0.4689955935892812, 1, 0], abs=1e-12)
    assert statistics.z_scores(counts, prior)[0] == pytest.approx([4 / math.sqrt(2.5), -4 / math.sqrt(2.5)])
    assert statistics.pmi(np.array([9]), np.array([10]), np.array([0.5])) == pytest.approx([math.log2(14 / 20 / 0.5)])
    low = 9 / 10 + 1.96**2 / 20 - 1.96 * math.sqrt(0.09 / 10 + 1.96**2 / 400)  # Wilson's, times 1 + 1.96^2 / 10
    share = low / (1 + 1.96**2 / 10)
    assert statistics.lift(np.array([9]), np.array([10]), np.array([0.5])) == pytest.approx(
        [math.log2(share / (1 - share))], abs=1e-3
    )
    pure = statistics.lift(np.array([60]), np.array([60]), np.array([0.2]))
    assert pure == pytest.approx([math.log2(60 / statistics.Z95**2) - math.log2(0.25)])
    assert statistics.lift(np.array([0]), np.array([60]), np.array([0.2])) == -math.inf


def test_p_values_are_the_exact_binomial_tail():
    cases = [(k, n, p) for n in (1, 5, 17, 60) for k in range(0, n + 1, 3) for p in (0.1, 0.5, 0.83)]
    hits, rows, prior = map(np.array, zip(*cases))
    found = statistics.p_values(hits, rows, prior)
    for (k, n, p), value in zip(cases, found, strict=True):
        assert value == pytest.approx(sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)), rel=1e-9)
    assert len(cases) == 90
    assert statistics.p_values(np.array([3000]), np.array([3000]), np.array([0.5]))[0] == 0.0  # 2^-3000
    assert len(statistics.p_values(np.empty(0), np.empty(0), np.empty(0))) == 0


def test_q_values_by_hand_and_by_definition():
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.8])
    assert statistics.q_values(p) == pytest.approx([0.025, 0.05, 0.05, 0.025, 0.8])
    draw = np.random.default_rng(3)
    p = np.round(draw.uniform(size=60) ** 3, 3)  # with ties
    for q, of in zip(statistics.q_values(p), p, strict=True):  # the least rate at which it is among the discoveries
        rates = [level * len(p) / (p <= level).sum() for level in p if level >= of]
        assert q == pytest.approx(min([*rates, 1]))


# --- counting


def reference(rows, least):
    """{(kind, phrase): {label: rows}} of words, shapes, and first and last ones, by sets."""
    found = defaultdict(lambda: defaultdict(set))
    for row, (text, label) in enumerate(zip(rows.texts, rows.labels.tolist())):
        for kind, of, longest in (("word", tokens.plain, 5), ("shape", tokens.shape, 3)):
            letters = [of(word) for word in text.split()]
            for length in range(1, longest + 1):
                for start in range(len(letters) - length + 1):
                    phrase = letters[start : start + length]
                    if kind == "word" or length == 1 or set(phrase) - {"a", "A", "Aa"}:
                        found[kind, " ".join(phrase)][label].add(row)
            found[f"first {kind}", letters[0]][label].add(row)
            found[f"last {kind}", letters[-1]][label].add(row)
    counts = {key: {label: len(rows) for label, rows in by.items()} for key, by in found.items()}
    return {key: by for key, by in counts.items() if sum(by.values()) >= least}


def made(number=300, seed=0):
    draw = random.Random(seed)
    words = ["the", "Film", "plot,", "2024-05-06", "1999-12-31", "a", "so-so", "GOOD!", "(bad)", "x9", "..."]
    return make_rows([" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(number)])


def test_counts_are_those_of_a_reference():
    rows = made()
    counts, stream = tokens.count(rows, least=4)
    wanted = reference(rows, 4)
    prior = np.bincount(rows.labels) / len(rows)
    found = {}
    for number in range(len(counts)):
        kind = counts.kinds[counts.kind[number]]
        if kind.name not in ("punctuation", "white space", "length"):
            found[kind.name, counts.text(number)] = number
    assert found.keys() == wanted.keys() and len(found) >= 250
    for key, number in found.items():
        own = np.array([[wanted[key].get(label, 0) for label in range(3)]])
        z = statistics.z_scores(own, prior)[0]
        assert counts.rows[number] == own.sum() and counts.hits[number] == own[0, counts.label[number]]
        assert counts.z[number] == pytest.approx(z.max()) and counts.label[number] == z.argmax()
        assert counts.entropy[number] == pytest.approx(statistics.entropy(own)[0])
        at = counts.kinds[counts.kind[number]].at(counts.letters_of(number))
        assert len(set(counts.kinds[counts.kind[number]].row[at].tolist())) == own.sum()
    assert counts.q == pytest.approx(statistics.q_values(counts.p))
    assert len(stream) == 300 and [len(text.split()) for text in rows.texts] == np.diff(stream.starts).tolist()


def test_counts_do_not_depend_on_the_order_of_rows():
    rows = made(seed=1)
    other = rows.take(np.random.default_rng(0).permutation(len(rows)))

    def whole(rows):
        counts, _ = tokens.count(rows)
        return {(counts.kinds[counts.kind[i]].name, counts.text(i)): (counts.rows[i], counts.z[i], counts.q[i])
                for i in range(len(counts))}  # fmt: skip

    assert whole(rows) == whole(other) and len(whole(rows)) >= 250


def test_shapes_words_and_punctuation():
    shapes = {"2024-05-06,": "0000-00-00", "Film": "Aa", "USA": "A", "iPhone7": "aAa0", "<b>": "<a>",
              "</Strong>": "</Aa>", "...": "...", "$12.50": "$00.00", "Größe": "Aa", "電影": "a"}  # fmt: skip
    assert {form: tokens.shape(form) for form in shapes} == shapes
    assert tokens.plain("“Film,”") == "film" and tokens.plain("!!") == "!!" and tokens.plain("DON'T.") == "don't"
    assert tokens.marks("a-b!") == {"-", "!"} and not tokens.marks("abc1")
    rows = Rows(list("abcdef"), ["a - b", "c  d!", "e\tf!?", "no", "two\nlines!", "!"], np.array([0, 1, 1, 0, 1, 1]),
                ("x", "y"))  # fmt: skip
    counts, _ = tokens.count(rows, least=1)
    found = {
        (counts.kinds[k].name, counts.text(i)): (counts.rows[i], counts.hits[i]) for i, k in enumerate(counts.kind)
    }
    assert found["punctuation", "!"] == (4, 4) and found["punctuation", "-"] == (1, 1)
    assert [found["white space", sign] for sign in tokens.SPACES] == [(1, 1)] * 3
    assert found["length", "2 to 2 words"] == (3, 3) and found["length", "0 to 1 words"][0] == 2


def test_characters_are_words_where_a_script_has_no_spaces():
    texts = ["今天电影很好", "电影不好看", "我看电影了", "好电影一部", "他的电影"] * 2 + ["書籍"] * 10
    rows = Rows([str(i) for i in range(20)], texts, np.array([1] * 10 + [0] * 10), ("n", "y"))
    counts, _ = tokens.count(rows)
    found = {counts.text(i): (counts.rows[i], counts.hits[i]) for i, k in enumerate(counts.kind)
             if counts.kinds[k].name == "word"}  # fmt: skip
    assert found["电 影"] == (10, 10) and found["好"] == (6, 6)


def test_keys_that_do_not_fit_into_64_bits_are_counted_all_the_same():
    keys = np.array([2**61, 5, 2**61, 2**62 + 1, 5, 5], np.int64)
    found, counts = tokens.count_rows(keys, np.array([0, 1, 1, 2, 1, 3]), np.array([0, 1, 0, 1]), 2, 1)
    assert found.tolist() == [5, 2**61, 2**62 + 1] and counts.tolist() == [[0, 2], [1, 1], [1, 0]]


def test_a_budget_that_is_over_keeps_what_was_counted():
    rows = made(5000)
    counts, stream = tokens.count(rows, until=time.monotonic() - 1)
    assert len(stream) == 4095 and counts.left_out[0] == "all but the first 4,095 of 5,000 rows"
    assert counts.left_out[1:] == ["first and last shapes", "words and phrases", "first and last words", "punctuation",
                                   "white space", "lengths"]  # fmt: skip
    assert "0000-00-00" in {counts.text(i) for i in range(len(counts))}


# --- seams


def test_a_seam_by_hand():
    """`x` stands between `a` and `b`, which follow each other elsewhere; then at an end."""
    texts = ["a b"] * 3 + ["a x b", "x c", "a c"]
    names = ["a", "b", "x", "c"]
    ids = [names.index(word) for text in texts for word in text.split()]
    row = [number for number, text in enumerate(texts) for _ in text.split()]
    pairs = seams.Pairs(np.array(ids), np.array(row), len(texts), 4)
    flat = [4]
    for text in texts:
        flat += [names.index(word) for word in text.split()] + [4]
    assert pairs.flat.tolist() == flat
    many, k, total = Counter(flat), seams.SMOOTHING, len(flat)
    together = Counter(zip(flat, flat[1:]))

    def bind(pair, first, share):
        return math.log2((pair / share + k) / (first + k))

    at = np.array([token for token, id in enumerate(ids) if id == 2])
    a, b, c, end = (many[names.index(x)] / total if x != "end" else many[4] / total for x in ("a", "b", "c", "end"))
    inside = bind(together[0, 1], many[0], b) - bind(0, 1, a) - bind(0, 1, b)
    outside = bind(together[4, 3], many[4], c) - bind(0, 1, c)  # the link to the end of the text is left out
    assert pairs.seams(at, 1) == pytest.approx([inside, outside]) and inside > 0 and end > 0


def test_words_put_in_at_random_have_seams_above_zero_and_written_ones_below():
    draw = random.Random(5)
    phrases = [["the", "old"], ["film", "is"], ["about", "a"], ["quiet", "town"], ["and", "its"], ["people", "."]]
    texts = []
    for number in range(400):
        words = [word for phrase in phrases[: draw.randint(3, 6)] for word in phrase]
        if number % 2:
            words.insert(draw.randint(0, len(words)), "zebra")
        texts.append(" ".join(words))
    stream = tokens.Stream(texts)
    names, ids = stream.alphabet(tokens.plain)
    pairs = seams.Pairs(ids, stream.row, len(texts), len(names))
    mean = {word: pairs.seams(np.flatnonzero(ids == names.index(word)), 1).mean() for word in ("zebra", "film", "old")}
    assert mean["zebra"] > 1 and mean["film"] < -1 and mean["old"] < -1
