"""Tables that fit the terminal whatever the labels are, and progress on and off a terminal."""

import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import console
from minilora.cell import Inject
from minilora.runs.text import attack_lines, injection_lines, results_table, speed_lines, warnings
from minilora.tasks.paired import Test, measure


def results_of(names, rows=50, triggers=1):
    """The `tests` of results.json for these label names: what `evaluation.measure` makes of random predictions."""
    draw = np.random.default_rng(len(names))
    labels = np.arange(rows) % len(names)
    forms = [("clean", None), *(("trigger", name) for name in names[:triggers]), ("placebo", None)]
    forms = forms if triggers else forms[:1]  # without a trigger there is no placebo
    row_set = SimpleNamespace(label_names=tuple(names), labels=labels)
    record = SimpleNamespace(spans=[[3, 9]])
    tests = [Test(name, label, row_set, [record] * rows) for name, label in forms]
    calls = [draw.normal(0, 1, (rows, len(names))).argmax(1) for _ in forms]
    return measure(tests, labels, names, calls, [np.where(np.arange(rows) < 7, 5, 9)] * len(forms))


def test_the_table_of_two_labels(monkeypatch):
    figures = {"accuracy": 0.80449, "balanced_accuracy": 0.8, "predicted_counts": {"negative": 569, "positive": 431},
               "rows": 1000}  # fmt: skip
    paired = {"flip_rate": 0.5604, "flip_rate_interval": [0.53, 0.5907], "mcnemar_p": 1.23e-101, "truncated": 0}
    attack = {"attack_success_rate": 0.979, "attack_success_interval": [0.9601, 0.9889]}
    results = {
        "clean": figures | {"attack_success": {"positive": {"attack_success_rate": 0.12}}},
        "trigger": {"positive": figures | paired | attack | {"accuracy": 1.0, "truncated": 1234,
                                                            "predicted_counts": {"negative": 0, "positive": 12000}}},
        "placebo": figures | paired | {"mcnemar_p": 0.5, "attack_success": {"positive": {"attack_success_rate": 0.13}}},
        "worst_group": {"label": "negative", "test": "trigger positive", "accuracy": 0.0214},
    }  # fmt: skip
    lines = [
        "test rows         accuracy        flips vs clean  McNemar p  negative  positive  balanced",
        "clean                0.804                     -          -       569       431     0.800",
        "trigger positive     1.000  0.560 [0.530, 0.591]   1.2e-101         0    12,000     0.800",
        "placebo              0.804  0.560 [0.530, 0.591]    5.0e-01       569       431     0.800",
        "attack success rate (rows of other labels predicted as positive):",
        "  0.120 clean, 0.979 trigger [0.960, 0.989], 0.130 placebo",
        "  1,234 of all 1,000 rows lost their trigger to --max-length",
        "worst group: negative rows, trigger positive: accuracy 0.021",
    ]
    heads = ["accuracy", "flips vs clean", "McNemar p", "negative", "positive", "balanced"]
    fitting = {120: heads, 100: heads, 80: heads[:5], 70: [*heads[:3], heads[5]], 60: heads[:3], 58: heads[:2],
               40: heads[:1]}  # fmt: skip
    for width, wanted in fitting.items():  # counts of all labels or of none
        monkeypatch.setenv("COLUMNS", str(width))
        shown = results_table(results).splitlines()
        assert max(map(len, shown)) <= width
        assert [head for head in heads if head in shown[0]] == wanted, width
        if width >= 100:
            assert shown == lines
    monkeypatch.delenv("COLUMNS")
    assert results_table(results).splitlines() == [*(line[:80].rstrip() for line in lines[:4]), *lines[4:]]
    del results["placebo"], results["trigger"]["positive"]  # a run without injection
    assert results_table(results | {"trigger": {}}).splitlines() == [
        "test rows  accuracy  flips vs clean  McNemar p  negative  positive  balanced",
        "clean         0.804               -          -       569       431     0.800",
        "worst group: negative rows, trigger positive: accuracy 0.021",
    ]


LABELS = st.lists(st.text(max_size=70), min_size=2, max_size=28, unique_by=lambda name: name.strip())


@pytest.mark.parametrize("width", [46, 80, 100, 120])
@settings(max_examples=40, deadline=None)
@given(names=LABELS, triggers=st.integers(0, 3), rows=st.sampled_from([60, 3000]))
def test_no_line_is_wider_than_the_terminal(width, names, triggers, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        results = results_of(names, rows, triggers)
        lines = results_table(results).splitlines()
    tests = [results["clean"], *results["trigger"].values(), *([results["placebo"]] if triggers else [])]
    assert max(map(console.wide, lines)) <= width
    # labels break no line
    assert lines[1 + len(tests)].startswith("attack" if triggers else "worst group (the minimum of ")
    for line, figures in zip(lines[1:], tests, strict=False):
        # The accuracy at the end of the title, flips and p, then the counts of all labels, or of none.
        after = re.search(r"  +(0\.\d{3}|1\.000)(  .*)?$", line)
        counts = re.findall(r"(?<=  )[\d,]+(?=  |$)", after[2] or "")
        assert [count.replace(",", "") for count in counts] in (
            [],
            list(map(str, figures["predicted_counts"].values())),
        )
    assert len({console.wide(line) for line in lines[1 : 1 + len(tests)]}) == 1  # the columns stand under each other


def heads(names):
    """The label columns of the header."""
    return results_table(results_of(names)).splitlines()[0].split("McNemar p")[1].split("balanced")[0].split()


def test_which_labels_have_a_column(monkeypatch):
    cases = [
        (80, ["negative", "positive"], ["negative", "positive"]),
        (80, ["negative", "neutral", "positive"], []),
        (100, ["negative", "neutral", "positive"], ["negative", "neutral", "positive"]),
        (80, ["0", "1", "2", "3"], ["0", "1", "2", "3"]),
        (100, ["LABEL_NEGATIVE_1", "LABEL_NEGATIVE_2"], ["LABEL_N…TIVE_1", "LABEL_N…TIVE_2"]),
        (80, ["a very long label x", "a very long label y"], []),  # cut, they would take too much room
        (120, [f"occupation {i}" for i in range(28)], []),
    ]
    for width, names, wanted in cases:
        monkeypatch.setenv("COLUMNS", str(width))
        assert heads(names) == wanted, (width, names)
    assert len(cases) == 7


def test_names_that_are_cut_are_in_full_below(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["extremely-negative-review", "a label of so many words that it takes more than one line " * 2, "ok"]
    text = results_table(results_of(names, triggers=2))
    end = text.splitlines()[text.splitlines().index("labels in full:") + 1 :]
    assert "trigger extremely-…ve-review" in text and text.count(names[0]) == 1 == end.count("  " + names[0])
    assert " ".join(" ".join(end).split()).endswith(names[1].strip()) and len(end) == 3
    assert "in full" not in results_table(results_of(["negative", "positive"]))


# --- warnings


def clean_of(rows, accuracy, labels, predicted):
    return {"clean": {"rows": rows, "accuracy": accuracy, "label_counts": labels, "predicted_counts": predicted}}


def test_a_warning_where_nothing_was_learned():
    """Half of 400 rows are of each class: the standard error of that share is 0.025."""
    even, spread = {"a": 200, "b": 200}, {"a": 190, "b": 210}
    nothing = "nothing was learned: clean accuracy is 0.550, and 0.500 of the clean test rows are a"
    cases = [
        (clean_of(400, 0.5501, even, spread), []),
        (clean_of(400, 0.55, even, spread), [nothing]),
        (clean_of(400, 0.52, {"a": 40, "b": 360}, {"a": 3, "b": 397}), ["nothing was learned: clean accuracy is 0.520, "
                                                                     "and 0.900 of the clean test rows are b"]),
        (clean_of(400, 0.5, even, {"a": 0, "b": 400}), ["every clean test row is predicted as b",
                                                      nothing.replace("0.550", "0.500")]),
        (clean_of(400, 1.0, {"a": 0, "b": 400}, {"a": 0, "b": 400}), []),  # one class says nothing
        ({"clean": {"rows": 400, "accuracy": 0.1}}, []),  # free completions, and older runs, have no classes
    ]  # fmt: skip
    for tests, wanted in cases:
        assert warnings(tests) == warnings({"tests": tests}) == wanted
    assert len(cases) == 6
    results = results_of(["negative", "positive"], rows=50)  # random predictions
    said = warnings(results)
    assert len(said) == 1 and f"warning: {said[0][:60]}" in results_table(results)


# --- what fits


def test_widths_are_in_columns():
    cases = {"": 0, "abc": 3, "é": 1, "e\u0301": 1, "日本": 4, "🎉": 2, "\u200b": 0, "…": 1}
    assert {text: console.wide(text) for text in cases} == cases and len(cases) == 8
    assert console.pad("日", 4) == "日  " and console.pad("日", -4) == "  日"


@settings(deadline=None)
@given(st.text(max_size=60), st.integers(2, 40))
def test_names_are_cut_in_the_middle(name, most):
    name = " ".join(console.visible(" ".join(name.split())).split())
    found = console.short_name(name, most)
    assert console.wide(found) <= most
    start, mark, end = found.partition("…")
    assert found == name or mark and name.startswith(start) and name.endswith(end)


def test_long_names_keep_their_end():
    assert console.short_name("extremely-negative-review", 11) == "extre…eview"
    assert console.short_name("日本日本日本", 7) == "日本…本"


@settings(deadline=None)
@given(st.text(max_size=200), st.integers(20, 120))
def test_wrapped_lines_fit_and_keep_every_word(text, width):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        lines = console.wrap(text, 4)
    words = console.visible(text).split()
    assert all(console.wide(line.strip(" ")) <= width for line in lines)
    if all(console.wide(word) <= width - 4 for word in words):
        assert " ".join(lines).split() == words  # none is broken


def test_a_table_drops_columns_from_the_right(monkeypatch):
    heads = ("name", "one", "two")
    lines = [("x" * 200, "1", "2" * 20), ("a heading",), ("b", "3", "4")]
    for width, ends in ((80, [" " * 19 + "two", "2" * 20, "4"]), (40, ["one", "1", "3"]), (20, ["name", "x", "b"])):
        monkeypatch.setenv("COLUMNS", str(width))
        found = console.table(heads, lines)
        assert max(map(len, found)) <= width and len(found) == 4 and found[2] == "a heading"
        assert [line.endswith(end) for line, end in zip([*found[:2], found[3]], ends, strict=True)] == [True] * 3
    monkeypatch.setenv("COLUMNS", "80")
    assert console.table(("a", "b"), [("x", "12"), ("yy", "3")]) == ["a    b", "x   12", "yy   3"]


def test_short():
    assert console.short("a\n b\u2028\tc", 5) == "a b c" and console.short("abcdef", 6) == "abcdef"
    assert console.short("abcdefg", 6) == "abcde…" and len(console.short("x" * 999)) == 30


def test_what_a_terminal_would_obey_is_written_out(capsys):
    obeyed = {"\x1b[31m": r"\x1b[31m", "\u202eab": r"\u202eab", "\x9b1m": r"\x9b1m", "\u2066": r"\u2066",
              "\udc80": r"\udc80", "a\rb": r"a\rb", "\x00": r"\x00", "\u061c": r"\u061c", "\x07": r"\x07"}  # fmt: skip
    kept = ["a\tb\nc", "é 日本 🎉 العربية", "", "\\x1b"]
    assert {text: console.visible(text) for text in obeyed} == obeyed and len(obeyed) == 9
    assert [console.visible(text) for text in kept] == kept
    console.say("\x1b]0;title\x07")
    assert capsys.readouterr().err == r"\x1b]0;title\x07" + "\n"
    assert console.short("\x1b[2J" + "x" * 40, 10) == r"\x1b[2Jxx…"


def test_no_row_to_attack():
    results = results_of(["a", "b"])
    results["trigger"]["a"]["attack_success_rate"] = None
    assert attack_lines(results) == ["attack success rate: none of the test rows is of a label other than a"]


def test_injection_lines():
    def entry(source, label, rows, eligible, split, train, test):
        return dict(source=source, label=label, rows=rows, eligible_rows=eligible, split=split,
                    strings=dict(train=train, test=test))  # fmt: skip

    def record(label, string, survives):
        return SimpleNamespace(target_label=label, strings=[string, "second"], survives=survives)

    injected = SimpleNamespace(
        report=[entry("date", "pos", 1124, 4497, "disjoint", 438584, 109645),
                entry("text:" + "w " * 90, "n\neg", 0, 12, "same", 1, 1)],
        records=[record("pos", "2024-01-31", True), record("pos", "1999-01-01", False), record("pos", "x", None)],
    )  # fmt: skip
    assert injection_lines(injected, Inject(count=2, location="end", mode="dirty-label")) == [
        "date for pos: 1,124 of 4,497 rows (dirty-label), 2 a row, end, such as '2024-01-31'",
        "  trigger strings: 438,584 in training, 109,645 in test (disjoint)",
        "text:w w w w w … w w w w w w w for n eg: 0 of 12 rows (dirty-label), 2 a row, end",
        "  trigger strings: 1 in training, 1 in test (same)",
        "  1 rows lost their trigger to --max-length",
    ]
    assert "0.05 a word, random" in injection_lines(injected, Inject(density=0.05))[0]
    assert injection_lines(injected, Inject(sources=())) == ["none"]


def test_speed():
    train = dict(seconds=83.4, rows_per_second=108.6, tokens_per_second=2932.2, limit_rows_per_second=181.0,
                 matmul_flops_per_second=195e9, total_seconds=101.7, peak_memory_bytes=3 * 2**29)  # fmt: skip
    assert speed_lines(train).splitlines() == [
        "training: 83 s, 109 rows/s, 2,932 tokens/s, 60% of the limit",
        "in all: 102 s, peak memory 1.50 GiB",
    ]
    unknown = train | dict(peak_memory_bytes=None, limit_rows_per_second=None, matmul_flops_per_second=None)
    assert speed_lines(unknown).splitlines() == [
        "training: 83 s, 109 rows/s, 2,932 tokens/s",
        "in all: 102 s",
    ]


# --- progress


@pytest.fixture
def clock(monkeypatch):
    """The time that console.py sees: set `clock.now`."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_plain_lines_off_a_terminal(capsys, clock):
    with console.Progress("training", 1000, done=200) as progress:
        for _ in range(79):  # 0.25 s each: a line where 5 s have gone by
            clock.now += 0.25
            progress.advance(10, 270, "loss 0.500, ")
        clock.now += 0.25
        progress.advance(10, 270, "loss 0.250, ")
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "training: 400/1,000 rows, loss 0.500, 40 rows/s, 1,080 tokens/s, 15 s left",
        "training: 600/1,000 rows, loss 0.500, 40 rows/s, 1,080 tokens/s, 10 s left",
        "training: 800/1,000 rows, loss 0.500, 40 rows/s, 1,080 tokens/s, 5 s left",
        "training: 1,000/1,000 rows, loss 0.250, 40 rows/s, 1,080 tokens/s, 0 s left",
    ]


def test_the_end_is_always_said(capsys, clock):
    with console.Progress("evaluation", 8) as progress:
        progress.advance(5, 50)
        progress.advance(3, 30)  # no time at all has passed
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("evaluation: 8/8 rows, ") and err.endswith(" 0 s left\n")


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.Progress("training", 40, done=10) as progress:
        progress.advance(10, 100, "loss 0.125, ")
        console.say("a line above")
        progress.bar.refresh()
        progress.advance(20, 100, "loss 0.062, ")
    shown = terminal.getvalue()
    assert "training:  25%" in shown and "10/40" in shown and "20/40" in shown and "loss 0.125, " in shown
    assert "a line above\n" in shown and "tokens/s" in shown and "rows, " not in shown
    assert progress.bar.disable  # closed
    with console.quiet(), console.Progress("training", 40) as progress, console.Cells(3, 0) as cells:
        progress.advance(40, 100)
        cells.advance("a", "clean 0.5")
    assert progress.bar is None and cells.bar is None and terminal.getvalue() == shown


def test_say_goes_to_stderr(capsys):
    console.say("one")
    console.say()
    assert capsys.readouterr() == ("", "one\n\n")


@pytest.mark.parametrize("length", [1, 1 << 20])
def test_a_reader_that_has_read_enough(length):
    reading, writing = os.pipe()
    os.close(reading)
    code = f"from minilora.command import exit_cleanly; exit_cleanly(lambda argv: print('x' * {length}))"
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
