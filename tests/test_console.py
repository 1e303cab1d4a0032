"""Tables of at most 100 columns whatever the labels are, and progress on and off a terminal."""

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
from minilora.runs.text import attack_lines, injection_lines, results_table, speed_lines
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


def test_the_table_of_two_labels():
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
    assert results_table(results).splitlines() == [
        "test rows            accuracy  balanced  negative  positive  flips vs clean        McNemar p",
        "clean                   0.804     0.800       569       431                     -",
        "trigger of positive     1.000     0.800         0    12,000  0.560 [0.530, 0.591]  1.2e-101",
        "placebo                 0.804     0.800       569       431  0.560 [0.530, 0.591]  5.0e-01",
        "attack success rate (rows of other labels predicted as positive):",
        "  0.120 clean, 0.979 trigger [0.960, 0.989], 0.130 placebo",
        "  1,234 of all 1,000 rows lost their trigger to --max-length",
        "worst group: negative rows, trigger positive: accuracy 0.021",
    ]
    del results["placebo"], results["trigger"]["positive"]  # a run without injection
    assert results_table(results | {"trigger": {}}).splitlines() == [
        "test rows  accuracy  balanced  negative  positive  flips vs clean        McNemar p",
        "clean         0.804     0.800       569       431                     -",
        "worst group: negative rows, trigger positive: accuracy 0.021",
    ]


LABELS = st.lists(st.text(max_size=70), min_size=2, max_size=28, unique_by=lambda name: name.strip())


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(0, 3), st.sampled_from([60, 3000]))
def test_no_line_is_over_100_columns(names, triggers, rows):
    results = results_of(names, rows, triggers)
    lines = results_table(results).splitlines()
    tests = [results["clean"], *results["trigger"].values(), *([results["placebo"]] if triggers else [])]
    assert max(map(len, lines)) <= 100
    assert len(lines) == 1 + len(tests) + 3 * len(results["trigger"]) + 1  # labels break no line
    widths = set()
    for line, figures in zip(lines[1:], tests, strict=False):
        # Two accuracies at the end of the title, then the counts of all labels, or of none.
        after = re.search(r"  +(0\.\d{3}|1\.000)  +(0\.\d{3}|1\.000)((?:  +[\d,]+)*)  ", line)
        found = after[3].replace(",", "").split()
        assert found in ([], [str(count) for count in figures["predicted_counts"].values()])
        widths.add((after.end(2), after.end(3), len(found)))
    assert len(widths) == 1  # the columns stand under each other


def heads(names):
    """The label columns of the header."""
    return results_table(results_of(names)).splitlines()[0].split("balanced")[1].split("flips")[0].split()


def test_which_labels_have_a_column():
    cases = [
        (["negative", "positive"], ["negative", "positive"]),
        (["negative", "neutral", "positive"], ["negati…", "neutral", "positi…"]),
        (["0", "1", "2", "3", "4"], ["0", "1", "2", "3", "4"]),
        (["LABEL_NEGATIVE_1", "LABEL_NEGATIVE_2"], []),  # cut, they would be the same
        (["extremely-negative-review", "some-other-kind"], ["extre…", "some-…"]),
        ([f"occupation {i}" for i in range(28)], []),
        (["World", "Sports", "Business", "Sci/Tech"], []),
    ]
    for names, wanted in cases:
        assert heads(names) == wanted, names
    assert len(cases) == 7


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
        "text:w w w w w w w w w w w w … for n eg: 0 of 12 rows (dirty-label), 2 a row, end",
        "  trigger strings: 1 in training, 1 in test (same)",
        "  1 rows lost their trigger to --max-length",
    ]
    assert "0.05 a word, random" in injection_lines(injected, Inject(density=0.05))[0]
    assert injection_lines(injected, Inject(sources=())) == ["none"]


def test_speed():
    train = dict(seconds=83.4, rows_per_second=108.6, tokens_per_second=2932.2, limit_rows_per_second=181.0,
                 matmul_flops_per_second=195e9, total_seconds=101.7, peak_memory_bytes=3 * 2**29)  # fmt: skip
    assert speed_lines(train).splitlines() == [
        "training: 83 s, 109 rows/s, 2,932 tokens/s; 60% of the limit (181 rows/s at 195 GFLOP/s)",
        "in all: 102 s, peak memory 1.50 GiB",
    ]
    assert speed_lines(train | {"peak_memory_bytes": None}).splitlines()[1] == "in all: 102 s"


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
