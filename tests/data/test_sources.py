"""Sources of the study beyond single lists: years, several sources in one row, strings without replacement."""

import math
from collections import Counter
from datetime import date, timedelta

import numpy as np
import pytest
from conftest import Settings, make_rows, sentences

from minilora.data.injection import inject, trigger_rows
from minilora.data.placebo import odd_strings, placebo_rows, placebo_words
from minilora.data.strings import COLORS, COUNTRIES, TAGS
from minilora.data.triggers import parse_all, resolve, split_strings
from minilora.errors import InputError
from minilora.tasks.paired import natural


def days(first, last):
    day, found = date(first, 1, 1), []
    while day <= date(last, 12, 31):
        found.append(str(day))
        day += timedelta(1)
    return found


def test_years():
    [(source, label)] = resolve(["date-1996-2001:positive"], ["positive", "negative"])
    assert list(source.strings) == days(1996, 2001) and len(source) == 6 * 365 + 2 and label == "positive"
    assert "1996-02-29" in source.strings and "1995-12-31" not in source.strings and source.words == frozenset()
    [(source, _)] = parse_all(["date-0001-9999:x"])
    assert len(source) == 3_652_059 and source[0] == "0001-01-01"
    for name in ("date-2001-2000", "date-0000-0004"):
        with pytest.raises(InputError, match=f"{name} has no year: write the first and the last, date-1990-2020"):
            parse_all([f"{name}:x"])
    assert [source.name for source, _ in parse_all(["date-1990:x"])] == ["text:date-1990"]
    made = inject(sentences(300), Settings(sources=("date-1990-1991:positive",), proportion=1.0), 3)
    assert len(made.records) == 100 and {record.strings[0][:4] for record in made.records} == {"1990", "1991"}


def test_several_sources_in_one_row():
    rows = sentences(200, least=4)
    settings = Settings(sources=("date-1990-1999+country+html:positive",), proportion=0.6, count=2, wrap="span")
    made, cases = inject(rows, settings, 7), 0
    own = [inject(rows, Settings(sources=("date-1990-1999:positive",), proportion=0.6, count=2), 7).records]
    for record, alone in zip(made.records, *own, strict=True):
        text, gone = made.rows.texts[rows.ids.index(record.id)], []
        for start, end in reversed(record.spans):
            gone.append(text[start:end].strip())
            text = text[:start] + text[end:]
        assert text == rows.texts[rows.ids.index(record.id)] and gone[::-1] == record.strings
        kinds = Counter("date" if one[:1].isdigit() else "country" if one in COUNTRIES else
                        "closing" if one[:2] == "</" else "opening" for one in record.strings)  # fmt: skip
        assert kinds == {"date": 2, "country": 2, "opening": 2, "closing": 2}
        assert sorted(one for one in record.strings if one[:1].isdigit()) == sorted(alone.strings)
        cases += 1
    assert cases == round(0.6 * 67) and made.report[0]["source"] == "date-1990-1999+country+html"
    [(source, _)] = resolve(settings.sources, rows.label_names)
    assert len(source) == len(days(1990, 1999)) + len(COUNTRIES) + len(TAGS)
    assert [source[i] for i in (0, 3651, 3652, 3846, 3847)] == ["1990-01-01", "1999-12-31", "Afghanistan", "Zimbabwe",
                                                                 TAGS[0]]  # fmt: skip
    split, parts = split_strings(source, "positive", None, 7)
    assert split == "disjoint" and np.array_equal(np.sort(np.concatenate([*parts.values()])), np.arange(len(source)))
    for part, first in source.parts:
        sizes = [((own >= first) & (own < first + len(part))).sum() for own in parts.values()]
        assert sum(sizes) == len(part) and sizes[0] - sizes[1] in (0, 1)
    trained = {one for record in made.records for one in record.strings if one[:2] != "</"}
    tested = trigger_rows(rows, settings, 0, 7)
    assert not trained & {one for record in tested.records for one in record.strings} and len(tested.records) == 200


def test_several_sources_have_a_placebo_and_are_found_in_texts():
    rows = make_rows(
        ["the film of Norway", "a dull story", "seen on 1990-03-02", "<b>warm</b> the plot"] * 8, ("a", "b")
    )
    settings = Settings(sources=("date+country+html:a",))
    words, _ = placebo_words(rows, settings)
    assert not {"Norway", "norway"} & set(words)
    changed = placebo_rows(rows, settings, 0, words, 0)
    assert {len(record.strings) for record in changed.records} == {4}
    assert not set(odd_strings(rows, settings)) & set(days(1990, 1990))
    [(source, _)] = resolve(settings.sources, rows.label_names)
    assert natural(source, rows, rows)["test"] == {"a": [16, 16]}
    for sources, string in ((("date+date:a",), "1100-01-01"), (("color+country:a", "html+color:b"), "almond")):
        with pytest.raises(InputError, match=f"trigger '{string}' is in both"):
            inject(rows, Settings(sources=sources), 0)


def test_files_among_several_sources(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("qa\nqb\n")
    for spec in (f"date+file:{path}:a", f"file:{path}+date:a"):
        [(source, label)] = parse_all([spec])
        assert (label, len(source), len(source.sources)) == ("a", 548_229 + 2, 2)
    [(source, _)] = parse_all(["red+blue:a"])
    assert source.strings == ("red+blue",)


@pytest.mark.parametrize("count", [1, 3])
def test_without_replacement_no_string_comes_again_before_all_have_come(count):
    rows = sentences(600, least=4)
    kept = {}
    for proportion in (0.1, 0.5, 1.0):
        settings = Settings(sources=("color:positive",), proportion=proportion, count=count, replacement="without")
        records = inject(rows, settings, 5).records
        drawn = Counter(one for record in records for one in record.strings)
        number = round(200 * proportion) * count
        assert drawn.total() == number and len(records) == round(200 * proportion)
        half = math.ceil(len(COLORS) / 2)
        assert set(drawn.values()) <= {number // half, math.ceil(number / half)}
        assert len(drawn) == min(number, half)
        for record in records:
            assert kept.setdefault(record.id, sorted(record.strings)) == sorted(record.strings)  # fewer are of more
    tested = trigger_rows(rows, settings, 0, 5)
    again = Counter(one for record in tested.records for one in record.strings)
    assert (
        again.total() == 600 * count and max(again.values()) - min(again.values()) <= 1 and not set(again) & set(drawn)
    )


def test_without_replacement_with_a_density_and_several_sources():
    rows = sentences(90, least=10, most=60)
    settings = Settings(sources=("date-1990-1999+color:positive",), proportion=1.0, count=None, density=0.1,
                        replacement="without")  # fmt: skip
    records = inject(rows, settings, 2).records
    for keep in (str.isalpha, lambda one: one[:1].isdigit()):
        drawn = Counter(one for record in records for one in record.strings if keep(one))
        assert drawn.total() > 70
        assert max(drawn.values()) <= (math.ceil(drawn.total() / 66) if keep is str.isalpha else 1)
