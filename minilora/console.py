"""What people watch: progress (a bar on a terminal, plain lines elsewhere), text and tables that fit the terminal.

A character takes 0, 1 or 2 columns of a terminal: widths are counted in columns, not in characters.
"""

import contextlib
import re
import shutil
import sys
import time
import unicodedata

LINE_EVERY = 5.0, 0.05  # seconds between plain lines: the larger of 5 s and 5% of what has passed
PATIENCE = 1.0  # seconds before a stage that is mostly short shows a bar
WATCHED = 256  # items between two looks at the clock
COLUMNS = 80  # of what is printed where there is no terminal
NAME = 20  # columns that a table's first column keeps, before others are dropped
# Control characters but tab and newline, marks of direction, line separators, and halves of a character.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_quiet = False


@contextlib.contextmanager
def quiet(really=True):
    """Write nothing from this module during the block, if `really`."""
    global _quiet
    before, _quiet = _quiet, _quiet or really
    try:
        yield
    finally:
        _quiet = before


def bar(**settings):
    """A tqdm bar on a terminal, None elsewhere and while quiet."""
    if _quiet or not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(**settings)


class Cells:
    """Progress over a grid of `total` cells, `done` of which are done: a line for each, and a bar on a terminal."""

    def __init__(self, total, done):
        self.total, self.first, self.done = total, done, done
        self.start = time.perf_counter()
        self.bar = bar(total=total, initial=done, desc="cells", unit="cell")

    def advance(self, name, what):
        self.done += 1
        left = (time.perf_counter() - self.start) / (self.done - self.first) * (self.total - self.done)
        say(f"[{self.done:,}/{self.total:,}] {name}: {what}; {duration(left)} left")
        if self.bar is not None:
            self.bar.update(1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()


def duration(seconds):
    """Such as 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """Progress over `total` rows: `advance(rows, tokens, note)`; use as a context manager. Writes to stderr.

    unit   what is counted, if it is not rows
    short  the stage is mostly over at once: no bar in its first second, and no last line
    """

    def __init__(self, label, total, done=0, unit="row", short=False):
        self.label, self.total, self.first, self.done, self.tokens = label, total, done, done, 0
        self.unit, self.short = unit, short
        self.start = self.shown = time.perf_counter()
        self.bar = bar(
            total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True, smoothing=0.1,
            delay=PATIENCE if short else 0, leave=not short,
        )  # fmt: skip

    def advance(self, rows, tokens=0, note=""):
        rows = min(rows, self.total - self.done)  # of several processes, each is counted as the first
        self.done += rows
        self.tokens += tokens
        now = time.perf_counter()
        elapsed = max(now - self.start, 1e-9)
        if self.bar is not None:
            speed = f"{self.tokens / elapsed:,.0f} tokens/s" if self.tokens else ""
            self.bar.set_postfix_str(note + speed, refresh=False)
            self.bar.update(rows)
            return
        last = rows and self.done >= self.total and not self.short
        if last or now - self.shown >= max(LINE_EVERY[0], LINE_EVERY[1] * elapsed):
            self.shown = now
            rate = (self.done - self.first) / elapsed
            left = (self.total - self.done) / rate
            tokens = f"{self.tokens / elapsed:,.0f} tokens/s, " if self.tokens else ""
            say(
                f"{self.label}: {self.done:,}/{self.total:,} {self.unit}s, {note}{rate:,.0f} {self.unit}s/s, "
                f"{tokens}{left:.0f} s left"
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()


def watch(items, label, total=None):
    """Yield `items`, with `Progress` for who waits; there are `total` of them (default: `len(items)`)."""
    with Progress(label, len(items) if total is None else total, short=True) as progress:
        for number, item in enumerate(items, 1):
            yield item
            if number % WATCHED == 0:
                progress.advance(WATCHED)


def say(text=""):
    """A line on stderr, above a bar if there is one. What a script may want to read goes to stdout."""
    if not _quiet:
        from tqdm import tqdm

        tqdm.write(visible(text), file=sys.stderr)


def visible(text):
    """The text with control characters and marks of direction written out, such as \\x1b: terminals obey them."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_said = set()


def say_once(text):
    """`say` a line that this process has not said yet: rows may be read many times."""
    if not _quiet and text not in _said:
        _said.add(text)
        say(text)


def columns():
    """The columns of the terminal: $COLUMNS if it is set, and `COLUMNS` where standard output is no terminal."""
    return shutil.get_terminal_size((COLUMNS, 24)).columns


def wide(text):
    """How many columns a line of text takes: 2 for a wide character, 0 for one that joins the one before it."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.category(one) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(one) in "WF")
               for one in text)  # fmt: skip


def pad(text, width):
    """The text with spaces behind it, so that it takes `width` columns; with a negative width, before it."""
    spaces = " " * (abs(width) - wide(text))
    return spaces + text if width < 0 else text + spaces


def beginning(text, most):
    """The longest beginning of the text that takes at most `most` columns."""
    while wide(text) > most:
        text = text[: min(most, len(text) - 1)]
    return text


def middle(text, most):
    """The text, cut to `most` columns in its middle."""
    if wide(text) <= most:
        return text
    end = beginning(text[::-1], (most - 1) // 2)[::-1]
    return beginning(text, most - 1 - wide(end)) + "…"[:most] + end


def short(text, most=30):
    """The text on one line, and cut to `most` columns at its end."""
    text = visible(" ".join(text.split()))
    return text if wide(text) <= most else beginning(text, most - 1) + "…"


def short_name(name, most=20):
    """The name on one line, and cut to `most` columns in its middle: long names often begin alike."""
    return middle(visible(" ".join(name.split())), most)


def wrap(text, indent=2):
    """The text in lines that fit the terminal, broken between words; all but the first begin with `indent` spaces."""
    room, lines, line = columns(), [], ""
    for word in re.findall(r"\s*\S+", visible(text)):
        if wide(line + word) > room and line.strip():
            lines.append(line)
            line, word = " " * indent, word.lstrip()
        while wide(line + word) > room > indent + 1:  # a word that is longer than a line
            part = beginning(word, room - wide(line))
            lines.append(line + part)
            line, word = " " * indent, word[len(part) :]
        line += word
    return [*lines, line]


def table(heads, lines, least=NAME):
    """Aligned columns as lines that fit the terminal; `heads` and each of `lines` are strings, one a column.

    The first column is cut in its middle, down to `least` columns. Where that is not enough, columns are dropped from
    the right. A line of a single string is a heading of its own.
    """
    room = columns()
    rows = [tuple(visible(cell.replace("\n", " ")) for cell in line) for line in (heads, *lines)]
    widths = [max(map(wide, column)) for column in zip(*(row for row in rows if len(row) > 1), strict=True)]
    first = widths.pop(0)
    while widths and min(first, least) + sum(width + 2 for width in widths) > room:
        widths.pop()
    first = min(first, room - sum(width + 2 for width in widths))
    found = []
    for title, *cells in rows:
        title = pad(middle(title, first), first) if cells else middle(title, room)
        found.append((title + "".join("  " + pad(cell, -width) for cell, width in zip(cells, widths))).rstrip())
    return found
