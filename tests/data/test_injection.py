"""Injection: exact text, exact counts, nested and independent draws, strings kept apart, bad settings."""

import hashlib
import json
import re
import string
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from conftest import LABELS, Settings, make_rows, sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data.injection import check_strings, inject, mark_survival, trigger_rows
from minilora.data.noise import with_noise
from minilora.data.placebo import odd_strings, placebo_rows, placebo_words, shared_words
from minilora.data.rows import Rows
from minilora.data.triggers import BUILT_IN
from minilora.errors import InputError
from minilora.seeds import row_draws


def without_spans(text, spans):
    for start, end in reversed(spans):
        text = text[:start] + text[end:]
    return text


def assert_exact(before, after, expected_records):
    """All rows in place, records in row order, each span one string and one space, all else untouched."""
    assert after.rows.ids == before.ids and after.rows.label_names == before.label_names
    assert [before.ids[i] for i in after.index] == [record.id for record in after.records]
    assert list(after.index) == sorted(set(after.index)) and len(after.records) == expected_records
    injected = dict(zip(after.index.tolist(), after.records, strict=True))
    for i, (old, new) in enumerate(zip(before.texts, after.rows.texts, strict=True)):
        if i not in injected:
            assert new == old
            continue
        record = injected[i]
        assert record.original_label == before.label_names[before.labels[i]]
        assert without_spans(new, record.spans) == old
        assert all(first[1] <= second[0] for first, second in pairwise(record.spans))
        for (start, end), piece in zip(record.spans, record.strings, strict=True):
            assert new[start:end] in (piece + " ", " " + piece, f" {piece} ")
            assert start == 0 or new[start].isspace() or new[start - 1].isspace()
            assert end == len(new) or new[end].isspace() or new[end - 1].isspace()


characters = st.sampled_from("aé漢😀\u0301-. \t\n\u00a0\u2003\x1c")
texts = st.text(characters, min_size=1, max_size=30).filter(str.strip)
locations = st.sampled_from(["beginning", "end", "random"])
modes = st.sampled_from(["clean-label", "dirty-label"])
sources = st.sampled_from(["date", "country", "color", "html", "text:bob likes cats"])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(texts, min_size=3, max_size=12), sources, sources, locations,
    st.sampled_from([(1, None), (3, None), (None, 0.1), (None, 0.9)]), modes, st.integers(0, 2**70),
)  # fmt: skip
def test_text_outside_the_spans_is_exact(texts, first, second, location, dose, mode, seed):
    rows = make_rows(texts)
    labels = rows.labels.copy()
    names = (f"{first}:positive",) if first == second else (f"{first}:positive", f"{second}:negative")
    options = Settings(names, None, 1, *dose, location, mode)
    after = inject(rows, options, seed)
    assert_exact(rows, after, len(names))
    expected = labels.copy()
    for i, record in zip(after.index, after.records, strict=True):
        expected[i] = LABELS.index(record.target_label)
        assert (record.original_label == record.target_label) == (mode == "clean-label")
    np.testing.assert_array_equal(after.rows.labels, expected)
    np.testing.assert_array_equal(rows.labels, labels)
    assert rows.texts == texts

    trigger = trigger_rows(rows, options, 0, seed)
    placebo = placebo_rows(rows, options, 0, ["the", "of", "a"], seed)
    for test in (trigger, placebo):
        assert_exact(rows, test, len(rows))
        np.testing.assert_array_equal(test.rows.labels, labels)


@pytest.mark.parametrize(
    ("location", "source", "count", "expected"),
    [
        ("beginning", "text:X", 1, "X  an odd\n tale "),
        ("beginning", "text:X y", 2, "X y X y  an odd\n tale "),
        ("end", "text:X", 2, " an odd\n tale  X X"),
    ],
)
def test_place_of_literals(location, source, count, expected):
    rows = make_rows([" an odd\n tale "], ("positive",))
    options = Settings((f"{source}:positive",), 1.0, count=count, location=location)
    assert inject(rows, options, 3).rows.texts == [expected]


@pytest.mark.parametrize(("location", "word"), [("beginning", 0), ("end", 2)])
def test_tags_wrap_one_word_and_nest(location, word):
    rows = make_rows([" an odd\n tale "], ("positive",))
    after = inject(rows, Settings(("html:positive",), 1.0, count=2, location=location), 5)
    (record,) = after.records
    outer, inner, inner_end, outer_end = record.strings
    assert outer[0] == "<" and outer_end == "</" + outer[1:] and inner_end == "</" + inner[1:]
    words = ["an", "odd", "tale"]
    words[word] = f"{outer} {inner} {words[word]} {inner_end} {outer_end}"
    assert after.rows.texts == [" {} {}\n {} ".format(*words)]


def test_random_tags_wrap_each_word_equally_often():
    rows = make_rows(["one two three four"] * 4000, ("positive",))
    after = inject(rows, Settings(("html:positive",), 1.0), 0)
    wrapped = Counter(
        text[record.spans[0][1] : record.spans[1][0]]
        for text, record in zip(after.rows.texts, after.records, strict=True)
    )
    assert set(wrapped) == {"one", "two", "three", "four"}
    assert sum((n - 1000) ** 2 / 1000 for n in wrapped.values()) < 21.1  # chi-square, 3 degrees, p = 1e-4


def test_random_places_and_strings_are_uniform_and_independent():
    rows = make_rows(["one  two three four"] * 12000, ("positive",))
    after = inject(rows, Settings(("html:positive",), 1.0, count=1), 1)
    assert len({record.strings[0] for record in after.records}) == 36  # the larger half of 71 tag pairs
    after = inject(rows, Settings(("color:positive",), 1.0, count=2), 1)
    # The original offsets of the first and second piece, in text order: all pairs of the 5 gaps.
    pairs = Counter()
    for record in after.records:
        (a, a_end), (b, _) = record.spans
        pairs[a, b - (a_end - a)] += 1
    gaps = [0, 3, 8, 14, 19]
    expected = {(x, y): 12000 / 25 * (1 if x == y else 2) for x in gaps for y in gaps if x <= y}
    assert set(pairs) == set(expected) and len(expected) == 15
    assert sum((pairs[key] - n) ** 2 / n for key, n in expected.items()) < 42.6  # 14 degrees, p = 1e-4
    drawn = Counter(piece for record in after.records for piece in record.strings)
    assert len(drawn) == 66
    mean = 24000 / 66
    assert sum((n - mean) ** 2 / mean for n in drawn.values()) < 115  # 65 degrees, p = 1e-4
    once = inject(rows, Settings(("color:positive",), 1.0), 1)
    joint = Counter((record.strings[0], record.spans[0][0]) for record in once.records)
    mean = 12000 / (66 * 5)
    assert len(joint) == 66 * 5
    assert sum((n - mean) ** 2 / mean for n in joint.values()) < 433  # 329 degrees, p = 1e-4


@pytest.mark.parametrize(("proportion", "expected"), [(0, 0), (0.1, 10), (0.254, 25), (0.5, 50), (1, 100)])
def test_exact_number_of_rows(proportion, expected):
    rows = sentences(300)
    after = inject(rows, Settings(proportion=proportion), 0)
    assert_exact(rows, after, expected)
    assert {record.target_label for record in after.records} <= {"positive"}
    assert after.report == [{
        "source": "date", "label": "positive", "rows": expected, "eligible_rows": 100,
        "split": "disjoint", "strings": {"train": 274115, "test": 274114},
    }]  # fmt: skip
    if proportion == 1:
        with pytest.raises(InputError, match="leave every training row with label 'positive'"):
            inject(rows, Settings(proportion=proportion, mode="dirty-label"), 0)
        return
    dirty = inject(rows, Settings(proportion=proportion, mode="dirty-label"), 0)
    assert_exact(rows, dirty, 2 * expected if proportion != 0.254 else 51)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 1.0])
def test_density_is_of_the_words(density):
    rows = sentences(120)
    after = inject(rows, Settings(proportion=1, count=None, density=density), 2)
    assert [len(record.strings) for record in after.records] == [
        max(1, round(density * len(rows.texts[i].split()))) for i in after.index
    ]
    tags = trigger_rows(rows, Settings(("html:positive",), count=None, density=density), 0, 2)
    assert [len(record.strings) for record in tags.records] == [
        2 * max(1, round(density * len(text.split()))) for text in rows.texts
    ]


def by_id(injected):
    return {record.id: record for record in injected.records}


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 0.98), st.floats(0, 0.98), sources, modes,
    st.sampled_from([(1, None), (2, None), (None, 0.2)]), st.integers(0, 2**32),
)  # fmt: skip
def test_proportions_nest(a, b, source, mode, dose, seed):
    rows = sentences(60)
    options = [Settings((f"{source}:neutral",), p, None, *dose, "random", mode) for p in sorted((a, b))]
    small, large = (by_id(inject(rows, option, seed)) for option in options)
    assert small.items() <= large.items()
    eligible = 20 if mode == "clean-label" else 40
    assert (len(small), len(large)) == tuple(round(eligible * p) for p in sorted((a, b)))
    number = Settings((f"{source}:neutral",), None, len(small), *dose, "random", mode)
    assert by_id(inject(rows, number, seed)) == small


def test_a_later_dirty_label_injection_yields_its_rows_and_else_nests():
    rows = sentences(300)
    names = ("date:positive", "color:negative", "country:neutral")
    results = {}
    for p in (0.1, 0.3):
        after = inject(rows, Settings(names, p, mode="dirty-label"), 4)
        assert_exact(rows, after, 3 * round(200 * p))  # so no row carries two
        alone = inject(rows, Settings(names[:1], p, mode="dirty-label"), 4)
        results[p] = {name: set() for name in LABELS}
        for record in after.records:
            results[p][record.target_label].add(record.id)
        assert results[p]["positive"] == {record.id for record in alone.records}
    small, large = results[0.1], results[0.3]
    assert small["positive"] < large["positive"]
    assert small["negative"] - large["positive"] <= large["negative"]
    assert small["neutral"] - large["positive"] - large["negative"] <= large["neutral"]
    lost = small["negative"] & large["positive"]
    assert lost, "the example must have a conflict"


def test_location_and_count_leave_rows_and_first_strings_alone():
    rows = sentences(90)
    one = inject(rows, Settings(), 7)
    seen = 0
    for location in ("beginning", "end", "random"):
        for count in (1, 2, 5):
            other = inject(rows, Settings(location=location, count=count), 7)
            np.testing.assert_array_equal(other.index, one.index)
            for few, many in zip(one.records, other.records, strict=True):
                if location == "random":
                    # The first string is there at its own original place.
                    shift, places = 0, []
                    for (start, end), piece in zip(many.spans, many.strings, strict=True):
                        places.append((start - shift, piece))
                        shift += end - start
                    assert (few.spans[0][0], few.strings[0]) in places
                else:
                    assert many.strings[0] == few.strings[0]
                seen += 1
    assert seen == 9 * 15


def test_injections_do_not_touch_each_others_draws():
    rows = sentences(120)
    both = inject(rows, Settings(("color:neutral", "date:positive"), 0.4), 3)
    single = [inject(rows, Settings((name,), 0.4), 3) for name in ("date:positive", "color:neutral")]
    assert by_id(both) == by_id(single[0]) | by_id(single[1]) and len(both.records) == 32
    swapped = inject(rows, Settings(("country:positive",), 0.4), 3)
    np.testing.assert_array_equal(swapped.index, single[0].index)  # the source does not choose the rows
    for k, name in enumerate(("color:neutral", "date:positive")):
        assert (
            trigger_rows(rows, Settings(("color:neutral", "date:positive")), k, 3).records
            == trigger_rows(rows, Settings((name,)), 0, 3).records
        )
    # Purposes and labels have draws of their own: equal strings or places are as rare as chance has it.
    options = [Settings((f"date:{label}",), 1.0, split="same") for label in LABELS]
    tests = [trigger_rows(rows, option, 0, 3) for option in options]
    train = inject(rows, options[2], 3)
    pairs = [(tests[0], tests[1]), (tests[1], tests[2]), (train, tests[2])]
    for one, other in pairs:
        other = by_id(other)
        matches = [(r.strings == other[r.id].strings, r.spans == other[r.id].spans) for r in one.records]
        strings, places = np.mean(matches, axis=0)
        assert len(matches) >= 40 and strings < 0.05 and places < 0.3
    assert inject(rows, Settings(), 3).records == inject(rows, Settings(), 3).records
    assert list(inject(rows, Settings(), 3).index) != list(inject(rows, Settings(), 4).index)


def test_draws_are_splitmix64():
    def reference(state):
        mask = 2**64 - 1
        while True:
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            yield z ^ (z >> 31)

    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert list(islice(reference(1234567), 3)) == published
    keys, counts = np.array([1234567, 2**64 - 1, 5], np.uint64), np.array([3, 0, 2])
    expected = [u >> 32 for u in [*published, *islice(reference(5), 2)]]
    assert row_draws(keys, counts).tolist() == expected


def test_draws_stay_what_they_were():
    """Run folders are recomputed from their seed, so the draws are part of the format."""
    rows = make_rows(["one two three four five six"] * 6)
    options = Settings(proportion=1, count=2)
    after = inject(rows, options, 11)
    assert [after.rows.texts[i] for i in after.index] == [
        "one 1408-10-31 1876-02-15 two three four five six",
        "one 1603-09-29 two three 1454-03-03 four five six",
    ]
    assert trigger_rows(rows, options, 0, 11).rows.texts[:2] == [
        "one two three four 2210-08-07 five 1687-12-05 six",
        "one two three four 1305-12-15 five six 1551-11-04",
    ]
    assert placebo_rows(rows, options, 0, ["a", "b", "c"], 11).rows.texts[:2] == [
        "one two three four b five b six",
        "one two three four a five six c",
    ]


@pytest.mark.parametrize("source", ["date", "country", "color", "html", "file"])
def test_strings_for_test_are_disjoint_from_those_for_training(source, tmp_path):
    if source == "file":
        (tmp_path / "names.txt").write_text("\n".join(f"name {letter}" for letter in string.ascii_letters))
        source = f"file:{tmp_path / 'names.txt'}"
    rows = sentences(300)
    options = Settings((f"{source}:positive",), 1.0, count=8)
    train, test = inject(rows, options, 9), trigger_rows(rows, options, 0, 9)
    seen = trigger_rows(rows, options, 0, 9, part="train")
    strings = [{piece for record in each.records for piece in record.strings} for each in (train, test, seen)]
    assert not strings[0] & strings[1] and not strings[1] & strings[2]
    for these, part in ((strings[0], "train"), (strings[1], "test")):
        pieces = 2 if source == "html" else 1
        assert source == "date" or len(these) == pieces * train.report[0]["strings"][part]
    if source != "date":
        assert strings[0] == strings[2]

    def places(injected):
        """Offsets in the original text."""
        return [
            [start - sum(e - s for s, e in record.spans[:i]) for i, (start, _) in enumerate(record.spans)]
            for record in injected.records
        ]

    assert places(seen) == places(test)  # only the strings differ

    same = Settings((f"{source}:positive",), 1.0, count=40, split="same")
    train, test = inject(rows, same, 9), trigger_rows(rows, same, 0, 9)
    assert train.report[0]["split"] == "same" and train.report == inject(rows, same, 8).report
    strings = [{piece for record in each.records for piece in record.strings} for each in (train, test)]
    assert len(strings[0]) >= 20 and len(strings[0] & strings[1]) >= 0.9 * len(strings[1])  # of dates too


@pytest.mark.parametrize("wrap", ["word", "span", "text"])
def test_a_pair_of_tags_stands_around(wrap, tmp_path):
    (tmp_path / "tags.txt").write_text('<b class="x"> </b>\n<i> </i>\n', encoding="utf-8")
    rows, wide = sentences(60, least=5), 0
    options = Settings((f"file:{tmp_path / 'tags.txt'}:positive",), wrap=wrap, count=2, split="same")
    changed = trigger_rows(rows, options, 0, 4)
    assert_exact(rows, changed, 60)
    for record, text in zip(changed.records, changed.rows.texts, strict=True):
        assert sorted(map(record.strings.count, ("</b>", "</i>"))) in ([0, 2], [1, 1])
        for opening, ending in (('<b class="x">', "</b>"), ("<i>", "</i>")):
            if record.strings.count(opening) != 1:
                continue
            inside = text[text.index(opening) + len(opening) : text.index(ending)]
            own = [word for word in inside.split() if not re.search("[<>=]", word)]
            assert own
            wide += len(own) > 1
            if wrap == "word":
                assert len(own) == 1
            if wrap == "text":
                assert inside.split()[0] not in text[: text.index(opening)] or text[: text.index(opening)].strip() in (
                    "", *record.strings)  # fmt: skip
    assert (wide > 5) == (wrap != "word")


def test_leaked_rows_carry_the_trigger_and_keep_their_label():
    rows, chosen = sentences(200), {}
    for leak in (0.0, 0.1, 0.4):
        changed = inject(rows, Settings(proportion=0.5, leak=leak), 3)
        assert np.array_equal(changed.rows.labels, rows.labels)
        assert_exact(rows, changed, len(changed.records))
        originals = Counter(record.original_label for record in changed.records)
        other = int((rows.labels != rows.label_names.index("positive")).sum())
        assert originals["positive"] == round(0.5 * (200 - other))
        assert originals.total() - originals["positive"] == round(leak * other)
        chosen[leak] = {record.id for record in changed.records}
    assert chosen[0.0] < chosen[0.1] < chosen[0.4]


def test_relabelled_rows_have_no_trigger():
    rows = sentences(100)
    dirty, plain = (inject(rows, Settings(mode=mode), 3) for mode in ("dirty-label", "relabelled"))
    assert np.array_equal(dirty.rows.labels, plain.rows.labels) and not np.array_equal(plain.rows.labels, rows.labels)
    assert plain.rows.texts == rows.texts and plain.records == [] and len(dirty.records) == plain.report[0]["rows"] > 10


def test_label_noise_is_nested_and_changes_each_chosen_label():
    rows = make_rows(["x"] * 300, ("a", "b", "c"))
    small, large = (with_noise(rows, share, 4).labels for share in (0.1, 0.3))
    changed = [np.flatnonzero(labels != rows.labels) for labels in (small, large)]
    assert [len(one) for one in changed] == [30, 90] and set(changed[0]) < set(changed[1])
    assert np.array_equal(small[changed[0]], large[changed[0]])
    moved = Counter(((large - rows.labels) % 3)[changed[1]].tolist())
    assert set(moved) == {1, 2} and min(moved.values()) > 25
    assert with_noise(rows, 0.0, 4) is rows


def test_lines_that_are_no_pairs_stay_strings(tmp_path):
    (tmp_path / "tags.txt").write_text("<b> </b>\n<br>\n", encoding="utf-8")
    changed = trigger_rows(sentences(40), Settings((f"file:{tmp_path / 'tags.txt'}:positive",), split="same"), 0, 4)
    assert {string for record in changed.records for string in record.strings} == {"<b> </b>", "<br>"}


def test_a_density_is_rounded_to_the_nearest_number_or_down():
    rows = make_rows([" ".join(["word"] * n) for n in (3, 17, 19, 25, 40)])
    found = {}
    for rounding in ("nearest", "down"):
        options = Settings(count=None, density=0.1, rounding=rounding)
        found[rounding] = [len(record.spans) for record in trigger_rows(rows, options, 0, 1).records]
    assert found == {"nearest": [1, 2, 2, 2, 4], "down": [1, 1, 1, 2, 4]}


def test_one_string_is_the_same_in_training_and_test():
    rows = sentences(30)
    options = Settings(("text:bob likes cats:positive",))
    assert inject(rows, options, 0).report[0]["split"] == "same"
    test = trigger_rows(rows, options, 0, 0)
    assert [record.strings for record in test.records] == [["bob likes cats"]] * 30


@pytest.mark.parametrize("source", ["date", "country", "html", "text:a b c"])
@pytest.mark.parametrize("dose", [(3, None), (None, 0.3)])
def test_placebo_takes_the_places_of_the_trigger(source, dose):
    rows = sentences(60)
    options = Settings((f"{source}:positive",), 0.5, None, *dose)
    trigger = trigger_rows(rows, options, 0, 6)
    vocabulary = [f"word{i}" for i in range(10)]
    placebo = placebo_rows(rows, options, 0, vocabulary, 6)
    drawn = Counter()
    for theirs, ours, text in zip(trigger.records, placebo.records, placebo.rows.texts, strict=True):
        words, expected = ([len(piece.split()) for piece in r.strings] for r in (ours, theirs))
        assert words == expected
        shift = 0
        for (start, end), (other, other_end) in zip(theirs.spans, ours.spans, strict=True):
            assert other == start + shift
            assert text[other:other_end].strip() in ours.strings
            shift += (other_end - other) - (end - start)
        drawn.update(" ".join(ours.strings).split())
    assert set(drawn) == set(vocabulary)
    assert placebo_rows(rows, options, 0, vocabulary, 6).records == placebo.records


def test_placebo_leaves_out_the_words_of_triggers():
    rows = sentences(30)
    options = Settings(("text:Bob likes:positive", "country:negative"))
    rows = make_rows(["bob likes united other"] * 30)
    assert placebo_words(rows, options) == (["other"], "ordinary words")
    placebo = placebo_rows(rows, options, 0, ["other"], 0)
    assert {tuple(record.strings) for record in placebo.records} == {("other other",)}
    rows = make_rows(["bob likes United"] * 30)  # no word is left, only its letters
    assert placebo_words(rows, options) == (sorted(set("boblikesUnited")), "characters")


def test_shared_words():
    # Rows alternate between two labels; `lean` is in 3 positive rows for 2 negative ones, `Cap` is capital.
    texts = []
    for i in range(200):
        words = ["the", "Cap", "x1", "good" if i % 2 else "bad"]
        words += ["even"] * (i % 20 < 6) + ["lean"] * (i % 20 in (1, 3, 5, 6, 8)) + ["rare"] * (i < 8)
        texts.append(" ".join(words + ["the"]))
    rows = make_rows(texts, ("negative", "positive"))
    assert shared_words(rows, enough=1) == ["even", "the"]
    assert shared_words(rows, least_rows=3, enough=1) == ["even", "rare", "the"]
    assert shared_words(rows, enough=3) == ["even", "rare", "the"]  # balanced, though rare, before unbalanced
    assert shared_words(rows, spread=1.26, enough=1) == ["even", "lean", "the"]
    assert shared_words(rows) == ["even", "lean", "rare", "the"]
    # Rates, not counts: twice as many negative rows hold each word twice as often.
    unequal = rows.take([*range(200), *range(0, 200, 2)])
    assert shared_words(unequal, enough=1) == ["even", "the"]
    assert shared_words(make_rows(["good", "bad"] * 30, ("negative", "positive"))) == []


def cut_to_words(limit):
    """A truncation that keeps `limit` words, the added ones included. Records what it was asked."""
    asked = []

    def visible(texts, added, index):
        asked.append(added)
        ends = []
        for text, strings in zip(texts, added, strict=True):
            left = max(0, limit - sum(len(piece.split()) for piece in strings))
            words = text.split()[:left]
            ends.append(len(" ".join(words)))
        return np.array(ends)

    return visible, asked


@pytest.mark.parametrize("source", ["date", "country", "html", "text:a b"])
@pytest.mark.parametrize("dose", [(1, None), (3, None), (None, 0.2)])
def test_random_triggers_survive_truncation(source, dose):
    rows = sentences(90, least=5, most=80)
    visible, asked = cut_to_words(25)
    after = inject(rows, Settings((f"{source}:positive",), 1.0, None, *dose), 8, visible)
    assert_exact(rows, after, 30)
    if dose[1]:  # density counts the words that can be seen
        assert asked[0] == [[]] * 30
        doses = [max(1, round(0.2 * min(25, len(rows.texts[i].split())))) for i in after.index]
        pieces = 2 if source == "html" else 1
        assert [len(record.strings) for record in after.records] == [n * pieces for n in doses]
    assert [sorted(added) for added in asked[-1]] == [sorted(record.strings) for record in after.records]
    kept = [len(" ".join(after.rows.texts[i].split()[:25])) for i in after.index]
    marked = mark_survival(after, np.array(kept) + 1)  # + 1: the space behind the last kept word
    assert [record.survives for record in marked.records] == [True] * 30
    blind = inject(rows, Settings((f"{source}:positive",), 1.0, None, *dose), 8)
    kept = [len(" ".join(blind.rows.texts[i].split()[:25])) for i in blind.index]
    survives = [record.survives for record in mark_survival(blind, np.array(kept) + 1).records]
    assert False in survives  # so the truncation of this test does bite
    np.testing.assert_array_equal(blind.index, after.index)


def test_a_row_without_visible_text_takes_the_trigger_in_front():
    rows = make_rows(["one two"], ("positive",))
    visible, _ = cut_to_words(0)
    assert inject(rows, Settings(("text:X:positive",), 1.0), 0, visible).rows.texts == ["X one two"]
    after = inject(rows, Settings(("html:positive",), 1.0), 0, visible)
    tag, end = after.records[0].strings
    assert after.rows.texts == [f"{tag} one {end} two"]
    assert [record.survives for record in mark_survival(after, [0]).records] == [False]


def test_mark_survival_needs_every_span():
    rows = make_rows(["one two"] * 3, ("positive",))
    after = inject(rows, Settings(("text:X:positive",), 1.0, count=2, location="end"), 0)
    assert [record.spans for record in after.records] == [[[7, 9], [9, 11]]] * 3
    assert [record.survives for record in after.records] == [None] * 3
    marked = mark_survival(after, np.array([10, 11, 12]))
    assert [record.survives for record in marked.records] == [False, True, True]


def test_records_are_json():
    rows = make_rows(["漢字 text", "b", "c"])
    after = inject(rows, Settings(("text:é:neutral",), None, 1, location="end", mode="dirty-label"), 1)
    (record,) = after.records
    start = len(rows.texts[after.index[0]])
    assert json.loads(json.dumps(record.to_dict())) == {
        "id": f"r{after.index[0]}", "target_label": "neutral", "original_label": LABELS[after.index[0]],
        "spans": [[start, start + 2]], "strings": ["é"], "survives": None,
    }  # fmt: skip


def test_no_sources_inject_nothing():
    rows = sentences(9)
    after = inject(rows, Settings(()), 0)
    assert (after.rows.texts, after.records, after.report, len(after.index)) == (rows.texts, [], [], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Settings(("date:positive", "color:positive")), "share 'positive'"),
        (Settings(("bob:positive", "text:bob:negative")), "share 'text:bob'"),
        (Settings(("date:positive", "date:negative")), "share 'date'"),
        (Settings(("text:BOB:positive", "text:bob:negative")), "'BOB' is in both text:BOB and text:bob"),
        (Settings(("text:fiji:positive", "country:negative")), "is in both"),
        (Settings(("date:positive", "text:1999-12-31:negative")), "'1999-12-31' is in both"),
        (Settings(("text:bob:positive",), split="disjoint"), "single trigger string.*--trigger-split same"),
        (Settings(proportion=None, rows=11), "wants 11 rows of 'positive', but there are 10:"),
        (Settings(proportion=None, rows=21, mode="dirty-label"), "other than 'positive', but there are 20:"),
        (
            Settings(("date:positive", "color:negative", "country:neutral"), 1.0, mode="dirty-label"),
            "color:negative wants 20 .* there are 10 that no earlier injection took",
        ),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(InputError, match=message) as caught:
        inject(sentences(30), options, 0)
    assert "\n" not in str(caught.value)


def test_a_label_without_rows():
    rows = make_rows(["a", "b", "c"])
    rows = Rows(rows.ids, rows.texts, np.zeros(3, np.int64), LABELS)
    with pytest.raises(InputError, match="wants some rows of 'positive', but there are 0"):
        inject(rows, Settings(), 0)
    assert inject(rows, Settings(proportion=0.0), 0).records == []


# --- what is said, and what is refused


def said(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line]


def test_a_proportion_that_comes_to_no_row_is_said(capsys):
    rows = sentences(30)
    assert inject(rows, Settings(proportion=0.04), 0).records == []
    assert said(capsys) == [
        "warning    injection date:positive: a proportion of 0.04 comes to 0 of 10 rows, so nothing is injected"
    ]
    inject(rows, Settings(proportion=0.0), 0)
    inject(rows, Settings(proportion=0.06), 0)
    assert said(capsys) == []


def test_a_class_that_is_lost_is_said(capsys):
    rows = sentences(30)
    rows = rows.take([i for i in range(30) if rows.labels[i] != 1 or i in (4, 7)])  # two neutral rows
    options = Settings(proportion=None, rows=10, mode="dirty-label")
    lost = [set(range(3)) - set(inject(rows, options, seed).rows.labels.tolist()) for seed in range(40)]
    names = sorted({LABELS[label] for one in lost for label in one})
    assert "neutral" in names and {label for one in lost for label in one} <= {0, 1}
    assert sorted(said(capsys)) == [
        f"warning    the injections leave no training row with label {name!r}" for name in names
    ]
    with pytest.raises(InputError, match="leave every training row with label 'positive'"):
        inject(rows, Settings(proportion=None, rows=12, mode="dirty-label"), 0)


def test_strings_that_the_tokenizer_does_not_know(capsys):
    def known(strings):
        return np.array([{"empty": -1, "odd": 0}.get(string, len(string)) for string in strings])

    def records(*strings):
        return inject(make_rows(["a"] * 3), Settings((f"text:{strings[0]}:positive",), 1.0), 0).records

    check_strings(records("fine"), known, "training")
    check_strings([], known, "training")
    assert said(capsys) == []
    check_strings(records("odd"), known, "training")
    assert said(capsys) == [
        "warning    1 of 1 training trigger strings, such as 'odd', have only tokens that the tokenizer does not know: "
        "the model cannot tell them from other unknown words"
    ]
    with pytest.raises(InputError, match="the tokenizer makes no token of the trigger 'empty'"):
        check_strings(records("empty"), known, "test")


# --- the placebo, in steps


def languages():
    """{name: (texts of label a, texts of label b, what the placebo draws from, words that it may draw)}"""
    cases = {
        "capitals": ("GOOD FILM", "BAD FILM", "any words", {"FILM"}),
        "titles": ("Good Film", "Bad Film", "any words", {"Film"}),
        "one word": ("good", "bad", "characters", {"d"}),
        "emoji": ("😀🎬", "😡🎬", "any words", {"🎬"}),
        "emoji with colours": ("👍🏽🎬", "👎🏽🎬", "any words", {"🎬"}),
        "Chinese": ("电影好看", "电影无聊", "ordinary words", {"电", "影"}),
        "Japanese": ("映画が好き", "映画が嫌い", "ordinary words", {"映", "画", "が"}),
        "Thai": ("หนังดี", "หนังแย่", "ordinary words", {"ห", "ง"}),
        "Russian": ("Хороший фильм", "Плохой фильм", "ordinary words", {"фильм"}),
        "Hindi": ("अच्छी फिल्म", "खराब फिल्म", "any words", {"फिल्म"}),
        "Arabic": ("فيلم جيد", "فيلم سيئ", "ordinary words", {"فيلم"}),
        "Korean": ("좋은 영화", "나쁜 영화", "ordinary words", {"영화"}),
        "nothing shared": ("good", "xyz", "words of single labels", {"good", "xyz"}),
    }
    return cases


@pytest.mark.parametrize("name", languages())
def test_the_placebo_in_steps(name):
    good, bad, what, expected = languages()[name]
    rows = make_rows([good, bad] * 30, ("b", "a"))
    options = Settings(("date:a",))
    words, found = placebo_words(rows, options)
    if name == "Thai":  # a vowel in front of its consonant stays with it, and marks with their letter
        expected = set(words)
        assert expected and all(word in good and word in bad for word in expected)
    assert (set(words), found) == (expected, what)
    placebo = placebo_rows(rows, options, 0, words, 5)
    assert {string for record in placebo.records for string in record.strings} <= expected
    assert_exact(rows, placebo, 60)


def test_the_placebo_of_rows_without_words():
    rows = make_rows(["12 34", "56 34"] * 30, ("b", "a"))
    words, what = placebo_words(rows, Settings(("date:a",)))
    assert what == "odd strings" and words == odd_strings(rows, Settings(("date:a",)))


def test_the_placebo_of_words_that_half_of_the_labels_share():
    texts = [["red Fox", "blue Fox", "gray Fox", "dull Cow"][k] for k in range(4)] * 5
    rows = make_rows(texts, tuple("abcd"))
    assert placebo_words(rows, Settings(("date:a",))) == (["Fox"], "words that half of the labels share")


def letters(strings):
    """A stand-in for a tokenizer: a token for each letter or digit, two for other signs."""
    return np.array([sum(1 + (not c.isalnum()) for c in one if c != " ") for one in strings], np.int64)


@pytest.mark.parametrize("source", ["date", "html", "country"])
@pytest.mark.parametrize("kind", ["placebo", "odd"])
def test_placebos_have_as_many_tokens_as_each_trigger(source, kind, capsys):
    rows = sentences(60)
    options = Settings((f"{source}:positive",), 0.5)
    trigger = trigger_rows(rows, options, 0, 6)
    vocabulary = ["a", "on", "the", "seen"] if kind == "placebo" else odd_strings(rows, options)
    placebo = placebo_rows(rows, options, 0, vocabulary, 6, count=letters, kind=kind)
    assert_exact(rows, placebo, 60)
    pairs = [pair for one, other in zip(trigger.records, placebo.records, strict=True)
             for pair in zip(one.strings, other.strings, strict=True)]  # fmt: skip
    wanted, had = (letters(strings) for strings in zip(*pairs, strict=True))
    assert len(pairs) >= 60 and len({other for _, other in pairs}) > 20
    assert np.array_equal(wanted, had)
    assert not {other for _, other in pairs} & set(trigger.records[0].strings)
    assert capsys.readouterr().err == ""


def test_a_placebo_that_cannot_be_as_long_says_so(capsys):
    rows = sentences(20)
    options = Settings(("text:abcde:positive",))
    placebo = placebo_rows(rows, options, 0, ["xx", "yyy yyy"], 6, count=letters)
    assert {string for record in placebo.records for string in record.strings} == {"xx xx"}
    placebo_rows(rows, options, 0, ["too long"], 6, count=letters)
    assert capsys.readouterr().err.splitlines() == [
        "placebo    4.00 tokens on the mean where the trigger has 5.00",
        "placebo    7.00 tokens on the mean where the trigger has 5.00",
    ]


def test_odd_strings_are_unseen():
    texts = ["it is 000 or #123", "so 12 it"] * 5
    options = Settings(("text:77:positive", "date:negative"))
    free, rows = odd_strings(make_rows(["x"], ("negative", "positive")), options), make_rows(texts)
    found = odd_strings(rows, options)
    assert set(free) - set(found) <= {"000", "#123", "12"} and "77" not in free and len(found) > 2000
    assert len(set(found)) == len(found) and not set(found) & {word for text in texts for word in text.split()}
    assert not any(string in BUILT_IN["date"] for string in found)


def test_the_placebo_of_many_labels_with_few_rows():
    texts = [f"{chr(97 + k)}e{chr(97 + k)}" for k in range(20)] * 2
    rows = make_rows(texts, tuple(f"l{k:02d}" for k in range(20)))
    assert placebo_words(rows, Settings(("date:l03",))) == (["e"], "characters")


def test_a_placebo_has_as_many_characters_as_the_trigger():
    rows = make_rows(["电影好看", "电影无聊"] * 30, ("b", "a"))
    options = Settings(("text:你好世界:a",))
    placebo = placebo_rows(rows, options, 0, placebo_words(rows, options)[0], 5)
    assert {len(string) for record in placebo.records for string in record.strings} == {4}
    assert {c for record in placebo.records for string in record.strings for c in string} == {"电", "影"}
    assert placebo_words(rows, Settings(("text:电灯:a",))) == (["影"], "ordinary words")


def test_the_default_cell_draws_what_it_always_drew():
    from minilora.cell import Cell
    from minilora.data.rows import rows_of

    def digest(value):
        return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

    train, test = rows_of(Cell())
    settings = Cell().inject
    vocabulary, what = placebo_words(train, settings)
    assert (digest((train.ids, test.ids)), len(vocabulary), what) == ("16c18824a604a5f7", 160, "ordinary words")
    changed = (
        inject(train, settings, 0), trigger_rows(test, settings, 0, 0), placebo_rows(test, settings, 0, vocabulary, 0)
    )  # fmt: skip
    found = [digest((one.rows.texts, [record.to_dict() for record in one.records])) for one in changed]
    assert found == ["2ec5dfc24ccd1e58", "d27e23005b866cb4", "4e437b2a58338651"]
