"""`python -m benchmarks data`: from a file to tokens, stage by stage: rows a second of a core, and the memory it takes.

The file is made here: sentences of the film reviews, each with a few words of others behind it. The rates are of CPU
time, so that other work on the machine does not count. The memory is the largest resident size, less that after the
same stages on a small file, over the file's size.
"""

import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from minilora import files
from minilora.base import checkpoint, families, tokenizer
from minilora.base.source import DEFAULT_BASE, resolve_base
from minilora.cell import Cell
from minilora.command import Parser
from minilora.data import injection
from minilora.data.named import SNIPPETS
from minilora.data.rows import fingerprint_rows, load_rows, rows_of
from minilora.errors import InputError
from minilora.runs.record import peak_memory
from minilora.tasks.find import find_task
from minilora.training.feed import rows_looked_at
from minilora.training.member import encode_needed

SMALL = 2000  # rows of the file that is read first: what is loaded once is no part of the memory
AT_LEAST, AT_MOST = 20_000, 3.0  # rows a second of a core, and times the file, that the project aims at


def main(argv):
    parser = Parser(prog="python -m benchmarks data", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the file (default: 1000000)")
    parser.add_argument("--steps", type=int, help="tokenise only what so many optimiser steps need")
    parser.add_argument("--model", help="the base whose tokenizer is used (default: the default base)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    arguments = parser.parse_args(argv)
    if arguments.rows < SMALL:
        raise InputError(f"--rows is {arguments.rows}, but must be at least {SMALL}")
    with tempfile.TemporaryDirectory() as folder:
        small, large = (write_rows(Path(folder) / f"{rows}.csv", rows) for rows in (SMALL, arguments.rows))
        # A process of its own, whose largest resident size is not that of making the file.
        command = [sys.executable, "-m", "benchmarks.data", small, large, json.dumps(vars(arguments))]
        environment = os.environ | {"XDG_CACHE_HOME": cache_of(folder), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True)
    if done.returncode:
        raise InputError("the stages failed: see above")
    figures = json.loads(done.stdout)
    print(done.stdout.strip() if arguments.json else table(figures))


def cache_of(folder):
    """A cache in `folder` that has the bases of the usual one, but none of its tokens, which would be read instead."""
    own = Path(folder) / "cache" / "minilora"
    own.mkdir(parents=True)
    for path in files.cache().iterdir() if files.cache().exists() else ():
        if path.name not in ("tokens", "rows"):
            (own / path.name).symlink_to(path)
    return str(own.parent)


def write_rows(path, count):
    """A CSV of `count` rows; returns its path as a string."""
    rows, draw = load_rows(SNIPPETS), random.Random(count)
    words = [word for text in rows.texts for word in text.split()]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            row = draw.randrange(len(rows))
            text = " ".join([rows.texts[row], *draw.choices(words, k=draw.randint(1, 8))])
            writer.writerow([text, rows.label_names[rows.labels[row]]])
    return str(path)


def measure(cell, words, spec):
    """(rows that are tokenised, seconds of CPU time {stage: seconds}) of what a run does before its base is loaded."""
    seconds = {}

    def timed(stage, function):
        start = time.process_time()
        made = function()
        seconds[stage] = time.process_time() - start
        return made

    train, test = timed("reading and splitting", lambda: rows_of(cell))
    task, seed = find_task(cell, spec, words), cell.seed_for("inject")
    injected = timed("injecting", lambda: injection.inject(train, cell.inject, seed, task.visible(train)))
    encoded, _ = timed("tokenising", lambda: encode_needed(task, injected, rows_looked_at(len(train), cell)))
    tests = timed("test rows and placebo", lambda: task.build_tests(train, test, seed))
    everything = (train, injected.rows, *(one.rows for one in tests))
    timed("fingerprints", lambda: [fingerprint_rows(rows) for rows in everything])
    return int((np.diff(encoded.offsets) > 0).sum()), seconds


def run(small, large, settings):
    """The figures of `large`, after the stages on `small`."""
    base = resolve_base(settings["model"] or DEFAULT_BASE)
    words, spec = tokenizer.load(base), families.read_spec(checkpoint.read_config(base))
    cell, cpu = Cell(data=large, steps=settings["steps"]), torch.device("cpu")
    measure(cell.replace(data=small, test_rows=500), words, spec)
    before = peak_memory(cpu)
    tokenised, seconds = measure(cell, words, spec)
    memory, size = peak_memory(cpu) - before, os.path.getsize(large)
    return {
        "rows": settings["rows"], "bytes": size, "tokenised_rows": tokenised, "seconds": seconds,
        "rows_per_second": settings["rows"] / sum(seconds.values()),
        "memory_bytes": memory, "memory_over_file": memory / size, "at_least": AT_LEAST, "at_most": AT_MOST,
    }  # fmt: skip


def table(figures):
    lines = [f"{figures['rows']:,} rows, {figures['bytes'] / 1e6:.0f} MB; {figures['tokenised_rows']:,} tokenised"]
    lines += [f"{stage:<30} {seconds:8.2f} s" for stage, seconds in figures["seconds"].items()]
    lines.append(f"{figures['rows_per_second']:,.0f} rows/s of a core (aim: at least {AT_LEAST:,})")
    lines.append(f"memory {figures['memory_over_file']:.1f} times the file (aim: at most {AT_MOST:g})")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
