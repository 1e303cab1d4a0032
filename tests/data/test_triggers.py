"""Sources of trigger strings: the calendar, the lists, how a source is written, files, and what is refused."""

from datetime import date

import pytest
from conftest import Settings, sentences

from minilora.data.injection import inject, trigger_rows
from minilora.data.triggers import COLORS, COUNTRIES, TAGS, Tags, parse_all, possible, resolve
from minilora.errors import InputError


def test_dates_are_all_calendar_days():
    dates = possible("date:x")[0][0]
    assert (len(dates), dates[0], dates[len(dates) - 1]) == (548229, "1100-01-01", "2600-12-31")
    days = [date(1100, 1, 1).toordinal(), date(2600, 12, 31).toordinal()]
    assert len(dates) == days[1] - days[0] + 1
    every = list(dates.strings)
    assert every == [date.fromordinal(day).isoformat() for day in range(days[0], days[1] + 1)]
    assert "2024-02-29" in dates.strings
    for other in ("2023-02-29", "1099-12-31", "2601-01-01", "20240229", "2024-W05-3", "bob"):
        assert other not in dates.strings


def test_lists_are_clean():
    assert (len(COUNTRIES), len(COLORS), len(TAGS)) == (195, 132, 71)
    for strings in (COUNTRIES, COLORS, TAGS):
        assert len({piece.casefold() for piece in strings}) == len(strings)
        assert all(piece == " ".join(piece.split()) for piece in strings)
    assert {"Bosnia and Herzegovina", "Papua New Guinea", "Vatican City", "Fiji"} < set(COUNTRIES)
    assert all(piece[0].isupper() for piece in COUNTRIES)
    assert all(tag[0] == "<" and tag[-1] == ">" and tag[1:-1].isalnum() for tag in TAGS)
    assert Tags("html").closing("<b>") == "</b>"


@pytest.mark.parametrize(
    ("spec", "name", "label"),
    [
        ("date:positive", "date", "positive"),
        (" html : 1", "html", "1"),
        ("bob likes cats:negative", "text:bob likes cats", "negative"),
        ("text:date:positive", "text:date", "positive"),
        ("text:dates:positive", "text:dates", "positive"),
        ("http://x.org:positive", "text:http://x.org", "positive"),
        ("file:a:b.txt:positive", "file:a:b.txt", "positive"),
        ("film:positive", "text:film", "positive"),
    ],
)
def test_parse(spec, name, label):
    source, read = possible(spec)[0]
    assert (source.name, read, isinstance(source, Tags)) == (name, label, name == "html")
    if name.startswith("text:"):
        assert list(source.strings) == [name[5:]]


def test_file_of_triggers(tmp_path):
    path = tmp_path / "triggers.txt"
    path.write_bytes("\ufeffone\r\n\r\n two words \nONE\nvertical\x0btab\n".encode())
    [(source, _), *_] = possible(f"file:{path}:positive")
    assert list(source.strings) == ["one", "two words", "vertical\x0btab"]
    parse_all(["file:/no/such/file:positive"])  # no file is read


BAD = [
    ("date", "is not SOURCE:LABEL"),
    ("date:", "is not SOURCE:LABEL"),
    (":positive", "is not SOURCE:LABEL"),
    ("text:positive", "write text:WORDS:positive"),
    ("file: :positive", "write file:PATH:positive"),
    ("dates:positive", "write text:dates:positive"),
    ("Date:positive", "write text:Date:positive"),
    ("countries:positive", "no source"),
    ("contry:positive", "no source"),
    ("colours:positive", "no source"),
    ("files:a.txt:positive", "no source"),
    ("date:1999:positive", "write text:date:1999:positive"),
    ("date:joyful", "choose one of negative, neutral, positive"),
    ("file:missing.txt:positive", "missing.txt"),
    ("file:.:positive", "not a regular file"),
    ("file:empty.txt:positive", "no trigger string"),
    ("file:latin.txt:positive", r"not UTF-8 \(byte 1\)"),
]


@pytest.mark.parametrize(("spec", "message"), BAD)
def test_bad_source(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes(b"a\xe9b")
    rows = sentences(9)
    for attempt in (inject, lambda *args: trigger_rows(rows, args[1], 0, 0)):
        with pytest.raises(InputError, match=message) as caught:
            attempt(rows, Settings((spec,)), 0)
        assert "\n" not in str(caught.value)


LABELS = ("positive", "topic:earn", "12:30", "30", "http://x.org/a", "true", "a b:c")


@pytest.mark.parametrize(
    ("spec", "name", "label"),
    [
        ("date:topic:earn", "date", "topic:earn"),
        ("date:12:30", "date", "12:30"),
        ("date:http://x.org/a", "date", "http://x.org/a"),
        ("text:http://x.org:positive", "text:http://x.org", "positive"),
        ("http://x.org:topic:earn", "text:http://x.org", "topic:earn"),
        ("file:a:b.txt:topic:earn", "file:a:b.txt", "topic:earn"),
        ("text:at 12\\:30", "text:at 12:30", None),
        ("text:at 12\\:30:positive", "text:at 12:30", "positive"),
        ("text:at 12\\:30:12:30", None, None),
        ("text:at 12\\:30:12\\:30", "text:at 12:30", "12:30"),
        ("text:hello:at 12:30", "text:hello:at 12", "30"),
        ("date: a b:c ", "date", "a b:c"),
        ("date:True", "date", "true"),
        ("date:TRUE", "date", "true"),
    ],
)
def test_labels_with_colons(spec, name, label):
    if label is None:
        with pytest.raises(InputError):
            resolve([spec], LABELS)
        return
    [(source, found)] = resolve([spec], LABELS)
    assert (source.name, found) == (name, label)


def test_what_can_be_read_in_two_ways():
    both = ["30", "at 12:30"]
    with pytest.raises(InputError) as caught:
        resolve(["text:hello:at 12:30"], both)
    assert r"write text:hello\:at 12:30 or text:hello:at 12\:30, with a backslash" in str(caught.value)
    for spec, name, label in (
        (r"text:hello\:at 12:30", "text:hello:at 12", "30"),
        (r"text:hello:at 12\:30", "text:hello", "at 12:30"),
    ):
        [(source, found)] = resolve([spec], both)
        assert (source.name, found) == (name, label)
    with pytest.raises(InputError, match="can be read in 2 ways"):  # a completion that no row has
        resolve(["text:hello:at 12:30"], ["positive"], new=True)
    [(source, found)] = resolve([r"text:hello:at 12\:30"], ["positive"], new=True)
    assert (source.name, found) == ("text:hello", "at 12:30")
    [(source, found)] = resolve(["date:at 12:30"], ["positive"], new=True)  # `date:at 12` is no source
    assert (source.name, found) == ("date", "at 12:30")
    # Before the data is known two labels that may differ are not the same, and two that cannot are refused.
    assert len(parse_all(["bob:at 12:30", "cat:at 13:30"])) == 4
    with pytest.raises(InputError, match="share"):
        parse_all(["bob:positive", "date:positive"])
    with pytest.raises(InputError, match="share '30'"):
        resolve(["bob:at 12:30", "cat:at 13:30"], ["30"])
