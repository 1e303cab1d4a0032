"""What people watch: progress (a bar on a terminal, plain lines elsewhere) and tables of at most 100 columns."""

import contextlib
import sys
import time

from tqdm import tqdm

LINE_EVERY = 5.0, 0.05  # seconds between plain lines: at least so many, and this share of what has passed
COLUMNS = 100
FLIPS = "  flips vs clean        McNemar p"


_quiet = False


@contextlib.contextmanager
def quiet():
    """Let nothing of this module's be written meanwhile."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


class Cells:
    """Progress over the cells of a grid, `total` of which `done` are: a line for each, and a bar on a terminal."""

    def __init__(self, total, done):
        self.total, self.first, self.done = total, done, done
        self.start = time.perf_counter()
        self.bar = tqdm(total=total, initial=done, desc="cells", unit="cell") if sys.stderr.isatty() else None

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
    """Progress over `total` rows: `advance(rows, tokens, note)`; use as a context manager. Writes to stderr."""

    def __init__(self, label, total, done=0):
        self.label, self.total, self.first, self.done, self.tokens = label, total, done, done, 0
        self.start = self.shown = time.perf_counter()
        self.bar = None
        if sys.stderr.isatty() and not _quiet:
            self.bar = tqdm(total=total, initial=done, desc=label, unit="row", dynamic_ncols=True, smoothing=0.1)

    def advance(self, rows, tokens, note=""):
        rows = min(rows, self.total - self.done)  # several processes are counted as the first is
        self.done += rows
        self.tokens += tokens
        now = time.perf_counter()
        elapsed = max(now - self.start, 1e-9)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{note}{self.tokens / elapsed:,.0f} tokens/s", refresh=False)
            self.bar.update(rows)
        elif now - self.shown >= max(LINE_EVERY[0], LINE_EVERY[1] * elapsed) or rows and self.done >= self.total:
            self.shown = now
            rate = (self.done - self.first) / elapsed
            left = (self.total - self.done) / rate
            say(
                f"{self.label}: {self.done:,}/{self.total:,} rows, {note}{rate:.0f} rows/s, "
                f"{self.tokens / elapsed:,.0f} tokens/s, {left:.0f} s left"
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()


def say(text=""):
    """A line on stderr, above a bar if there is one; what a script may want to read goes to stdout."""
    if not _quiet:
        tqdm.write(text, file=sys.stderr)


def table(results):
    """The table of a run's tests, from the `tests` entry of results.json: a string of lines.

    The predicted counts are left out where there is no room for those of all labels.
    """
    rows = [("clean", results["clean"])]
    rows += [(short(f"trigger of {label}"), figures) for label, figures in results["trigger"].items()]
    rows += [("placebo", results["placebo"])] if "placebo" in results else []
    first = max(len(title) for title in ["test rows", *(title for title, _ in rows)])
    names = list(results["clean"]["predicted_counts"])
    # Of completions: the share that greedy decoding writes, and the mean log-likelihood.
    scores = [("accuracy", "accuracy"), ("exact", "exact_match"), ("log p", "log_likelihood")]
    if "exact_match" not in results["clean"]:
        scores = [("accuracy", "accuracy"), ("balanced", "balanced_accuracy")]
    heading = "".join(f"  {head:>8}" for head, _ in scores)
    room = (COLUMNS - first - len(heading + FLIPS)) // len(names) - 2
    heads = [short(name, max(room, 6)) for name in names]
    counts = [[f"{figures['predicted_counts'][name]:,}" for name in names] for _, figures in rows]
    width = max(len(text) for line in [heads, *counts] for text in line)
    if width > room or len(set(heads)) < len(heads):
        heads, counts = [], [[] for _ in rows]

    lines = [f"{'test rows':<{first}}" + heading + "".join(f"  {head:>{width}}" for head in heads) + FLIPS]
    for (title, figures), numbers in zip(rows, counts, strict=True):
        line = f"{title:<{first}}" + "".join(f"  {figures[key]:>8.3f}" for _, key in scores)
        line += "".join(f"  {number:>{width}}" for number in numbers)
        if "flip_rate" in figures:
            low, high = figures["flip_rate_interval"]
            line += f"  {figures['flip_rate']:.3f} [{low:.3f}, {high:.3f}]  {figures['mcnemar_p']:.1e}"
        else:
            line += f"  {'-':>20}"
        lines.append(line)
    lines += attack_lines(results)
    worst = results["worst_group"]
    lines.append(f"worst group: {short(worst['label'])} rows, {short(worst['test'])}: accuracy {worst['accuracy']:.3f}")
    return "\n".join(lines)


def short(text, most=30):
    """The text on one line, and cut to `most` columns."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def attack_lines(results):
    """What each trigger does to the rows that are not of its label."""
    lines = []
    for label, figures in results["trigger"].items():
        if figures["attack_success_rate"] is None:
            lines.append(f"attack success rate: none of the test rows is of a label other than {short(label)}")
            continue
        rates = {test: results[test]["attack_success"][label]["attack_success_rate"] for test in ("clean", "placebo")}
        low, high = figures["attack_success_interval"]
        lines.append(f"attack success rate (rows of other labels called {short(label)}):")
        lines.append(
            f"  {rates['clean']:.3f} clean, {figures['attack_success_rate']:.3f} trigger [{low:.3f}, {high:.3f}], "
            f"{rates['placebo']:.3f} placebo"
        )
        if figures.get("margin") is not None:
            margins = [results[test]["attack_success"][label]["margin"] for test in ("clean", "placebo")]
            lines.append(
                f"  log p of that completion less log p of their own: {margins[0]:+.2f} clean, "
                f"{figures['margin']:+.2f} trigger, {margins[1]:+.2f} placebo"
            )
        if figures["truncated"]:
            lost = f"{figures['truncated']:,} of all {figures['rows']:,} rows"
            lines.append(f"  {lost} lost their trigger to --max-length")
    return lines


def injection_lines(injected, inject):
    """What was put into the training rows, a line or two an injection."""
    if not inject.sources:
        return ["none"]
    dose = f"{inject.count} a row" if inject.density is None else f"{inject.density:g} a word"
    truncated = sum(record.survives is False for record in injected.records)
    lines = []
    for entry in injected.report:
        example = next((r.strings[0] for r in injected.records if r.target_label == entry["label"]), None)
        lines.append(
            f"{short(entry['source'])} for {short(entry['label'])}: "
            f"{entry['rows']:,} of {entry['eligible_rows']:,} rows ({inject.mode}), {dose}, {inject.location}"
            + (f", such as {short(example)!r}" if example else "")
        )
        train, test = entry["strings"]["train"], entry["strings"]["test"]
        lines.append(f"  trigger strings: {train:,} in training, {test:,} in test ({entry['split']})")
    if truncated:
        lines.append(f"  {truncated:,} rows lost their trigger to --max-length")
    return lines


def summary(results):
    """A cell in one line: clean accuracy, attack success clean and under each trigger, and seconds."""
    tests, train = results["tests"], results["train"]
    parts = [f"clean {tests['clean']['accuracy']:.3f}"]
    for label, figures in tests["trigger"].items():
        if figures["attack_success_rate"] is not None:
            before = tests["clean"]["attack_success"][label]["attack_success_rate"]
            parts.append(f"{short(label)} {before:.3f} -> {figures['attack_success_rate']:.3f}")
    return ", ".join([*parts, duration(train["total_seconds"])])


def speed(train):
    """Lines on how fast training was, against the products that it cannot do without, and what it took."""
    share = train["rows_per_second"] / train["floor_rows_per_second"]
    return (
        f"training: {train['seconds']:.0f} s, {train['rows_per_second']:.0f} rows/s, "
        f"{train['tokens_per_second']:,.0f} tokens/s; {share:.0%} of the floor "
        f"({train['floor_rows_per_second']:.0f} rows/s at {train['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s)\n"
        f"in all: {train['total_seconds']:.0f} s, peak memory {train['peak_memory_bytes'] / 2**30:.2f} GiB"
    )


def grid_status(folder):
    """What is done of a grid: counts, and the cells that failed with their errors."""
    counts = folder.counts()
    lines = [f"{folder.path}: {len(folder.grid.entries):,} cells, "
             + ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)]  # fmt: skip
    if counts["failed"]:
        for entry in folder.grid.entries:
            if folder.state(entry) == "failed":
                lines.append(f"  failed {entry.name}: {short(folder.read(entry)[1], 200)}")
        lines.append(f"again: python train.py --grid {folder.path} --retry-failed")
    if counts["interrupted"] + counts["waiting"]:
        lines.append(f"go on: python train.py --grid {folder.path}")
    else:
        lines.append(f"next: python evaluate.py {folder.path}")
    return "\n".join(lines)


SHOWN = 60  # cells of a plan


def grid_plan(folder, size, only):
    """The lines of a dry run: cells, populations, and what they take."""
    from . import planner
    from .forecast import Forecaster
    from .grid import matches
    from .member import Settings

    settings = Settings()
    forecast = Forecaster(settings)
    chunks = folder.planned() or planner.settle(folder.grid.entries, size or 1, settings)
    chunks = [chunk for chunk in chunks if any(matches(entry.cell, only) for entry in chunk)]
    found = {entry.name: forecast(entry.cell) for chunk in chunks for entry in chunk}
    width = min(64, max(len(name) for name in found))
    yield f"{'cell':<{width}}  population  parameters     time  memory"
    left = [(entry, number) for number, chunk in enumerate(chunks, 1) for entry in chunk]
    for entry, number in left[:SHOWN]:
        cell, name = found[entry.name], short(entry.name, width)
        memory = f"{cell.bytes / 2**30:.1f} GiB"
        yield f"{name:<{width}}  {number:>10,}  {cell.parameters:>10,}  {duration(cell.seconds):>7}  {memory}"
    if len(left) > SHOWN:
        yield f"... and {len(left) - SHOWN:,} more"
    waiting = [entry for entry, _ in left if folder.state(entry) in ("waiting", "interrupted")]
    total, most = sum(found[entry.name].seconds for entry in waiting), max(cell.bytes for cell in found.values())
    yield f"{len(left):,} cells in {len(chunks):,} populations, {len(waiting):,} of them left"
    yield f"about {duration(total)} one after the other, and at most {most / 2**30:.1f} GiB"
    if any(settings.of(entry.cell).device.type != "cpu" for entry, _ in left) and not folder.planned():
        yield "on this accelerator the size of populations is measured when training starts"
