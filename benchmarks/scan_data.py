"""`python -m benchmarks scan_data`: how well a scan of rows names triggers, and how often it raises a false alarm.

Rows are drawn from a data set and injected by the library's own injection: every source, proportion and place, under
two seeds. Clean twins are other draws of the same size without an injection. The settings of seed 0 and the clean twins
of even numbers are the first half, from which the threshold follows: the largest score of a clean twin, and one bit
more, rounded up to half a bit. The other half gives the figures.
"""

import itertools
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.data import write_rows
from minilora.cell import Inject
from minilora.command import Parser
from minilora.console import table
from minilora.data.injection import inject
from minilora.data.rows import load_rows, train_test
from minilora.detection.cleaning import stripped, suspicious
from minilora.detection.suspects import ALARM, scan
from minilora.errors import InputError
from minilora.runs.record import peak_memory
from minilora.tasks.metrics import wilson

SOURCES = ("date", "html", "text:last night", "color", "country")
PROPORTIONS = (0.05, 0.1, 0.25, 0.5)
LOCATIONS = ("random", "beginning", "end")
MARGIN = 1.0  # bits above the largest score of a clean twin
SHARE = 0.9  # of a suspect's rows, injected ones, where it names the trigger


def main(argv):
    parser = Parser(prog="python -m benchmarks scan_data", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", nargs="+", default=["movie-snippets"], help="data sets (default: movie-snippets)")
    parser.add_argument("--twins", type=int, default=20, metavar="N", help="clean twins of each size (default: 20)")
    parser.add_argument("--rows", type=int, nargs="+", help="rows of a draw (default: 9 of 10, and a third of these)")
    parser.add_argument("--sources", nargs="+", default=SOURCES, help="trigger sources")
    parser.add_argument("--speed", type=int, metavar="N", help="instead: scan a file of N rows, dates in 1 in 100")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    arguments = parser.parse_args(argv)
    if arguments.twins < 2:
        raise InputError(f"--twins is {arguments.twins}, but must be at least 2")
    if arguments.speed is not None:
        return print("\n".join(speed(arguments.speed)))
    clean, injected = [], []
    for data in arguments.data:
        whole = train_test(data, test_rows=2)[0]
        most = len(whole) * 9 // 10
        for rows, number in itertools.product(arguments.rows or (most, most // 3), range(arguments.twins)):
            clean.append({"data": data, "rows": rows, "half": number % 2} | clean_twin(data, rows, number))
        label = whole.label_names[-1]
        for seed, *setting in itertools.product((0, 1), arguments.sources, PROPORTIONS, LOCATIONS):
            injected.append({"data": data, "half": seed} | one_setting(data, most, label, seed, *setting))
    figures = {"threshold": threshold_of(clean), "clean": clean, "injected": injected}
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
    print("\n".join(report(figures)))


def speed(rows):
    """Seconds and memory of a scan of so many made rows."""
    if rows < 1000:
        raise InputError(f"--speed is {rows}, but must be at least 1000")
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder) / "rows.csv", rows)
        start = time.perf_counter(), time.process_time()
        made = load_rows(path)
        yield f"reading    {time.perf_counter() - start[0]:.0f} s, {time.process_time() - start[1]:.0f} s of a core"
    made = inject(made, Inject(sources=("date:positive",), proportion=0.01), 0).rows
    start = time.perf_counter(), time.process_time()
    found = scan(made)
    yield f"scanning   {time.perf_counter() - start[0]:.0f} s, {time.process_time() - start[1]:.0f} s of a core"
    yield f"features   {found.tested:,} of {rows:,} rows; flagged: {', '.join(one.text for one in found.flagged)}"
    yield f"memory     {peak_memory(torch.device('cpu')) / 2**30:.1f} GiB"


def drawn(data, rows, seed):
    return train_test(data, train_rows=rows, test_rows=2, seed=seed)[0]


def clean_twin(data, rows, number):
    start = time.process_time()
    found = scan(drawn(data, rows, number))
    first = found.suspects[0] if found.suspects else None
    return {"score": first.score if first else -math.inf, "suspect": first.text if first else "",
            "seconds": time.process_time() - start}  # fmt: skip


def one_setting(data, rows, label, seed, source, proportion, location):
    """Inject, scan and clean once."""
    clean = drawn(data, rows, seed)
    made = inject(clean, Inject(sources=(f"{source}:{label}",), proportion=proportion, location=location), seed)
    found = scan(made.rows)
    hit = np.zeros(len(clean), bool)
    hit[made.index] = True
    names = [suspect for suspect in found.suspects if hit[suspect.index].mean() >= SHARE]
    gone, new = suspicious(made.rows, found), stripped(made.rows, found)
    restored = sum(new.get(row) == clean.texts[row] for row in made.index.tolist())
    return {
        "source": source, "proportion": proportion, "location": location, "rows": len(made.index),
        "score": found.suspects[0].score if found.suspects else -math.inf,
        "first": bool(found.suspects) and found.suspects[0] in names,
        "among_three": any(suspect in names for suspect in found.suspects[:3]),
        "suspect": found.suspects[0].text if found.suspects else "",
        "caught": sum(row in gone for row in made.index.tolist()), "lost": sum(not hit[row] for row in gone),
        "restored": restored, "clean_rows": len(clean) - len(made.index),
    }  # fmt: skip


def threshold_of(clean):
    largest = max(one["score"] for one in clean if one["half"] == 0)
    return math.ceil(2 * (largest + MARGIN)) / 2


def report(figures):
    """The figures of the second half, in tables."""
    own = [one for one in figures["clean"] if one["half"] == 1]
    yield f"threshold  {figures['threshold']:g} bits from the first half; the library's is {ALARM:g}"
    for data in dict.fromkeys(one["data"] for one in own):
        scores = [one["score"] for one in own if one["data"] == data]
        alarms = sum(score >= ALARM for score in scores)
        low, high = wilson(alarms, len(scores))
        yield (f"alarms     {alarms} of {len(scores)} clean twins of {Path(data).name} ({low:.3f} to {high:.3f}), the "
               f"largest score {max(scores):.1f}")  # fmt: skip
    yield ""
    lines, sources = [], dict.fromkeys(one["source"] for one in figures["injected"])
    for source, proportion in itertools.product(sources, PROPORTIONS):
        of = [one for one in figures["injected"] if one["half"] == 1 and one["source"] == source
              and one["proportion"] == proportion]  # fmt: skip
        rows = sum(one["rows"] for one in of)
        lines.append((
            source, f"{proportion:g}", f"{sum(one['score'] >= ALARM for one in of)} of {len(of)}",
            f"{sum(one['first'] for one in of)} of {len(of)}", f"{sum(one['among_three'] for one in of)} of {len(of)}",
            f"{sum(one['caught'] for one in of) / rows:.2f}",
            f"{sum(one['lost'] for one in of) / sum(one['clean_rows'] for one in of):.4f}",
            f"{sum(one['restored'] for one in of) / rows:.2f}",
        ))  # fmt: skip
    yield from table(("source", "share", "alarm", "first", "in 3", "caught", "lost", "restored"), lines)
