"""`python -m benchmarks cell`: one real fine-tuning, done by minilora and by its peers, side by side.

Each peer runs in a process of its own with as many threads, so that memory peaks and start-up are its own. Repeats
are interleaved (a, b, c, a, b, c), so that a machine that slows down slows all; the median is reported with the
spread, and ratios are medians of the ratios within a repeat. Each of minilora's peers is there at its best setting,
in float32 and in bfloat16, and PEFT + Trainer also as its documentation has it (`peers.py` says what these are).
FLOP/s are those that the job cannot do without (`minilora/training/limit.py`), whatever a peer really does, over the
machine's rate at products of a batch's size, measured once a repeat.
"""

import importlib.util
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from minilora.cell import Cell
from minilora.command import Parser, add_flags, given_flags
from minilora.console import say
from minilora.errors import InputError
from minilora.fields import marked

from . import alone, job, peers, report
from .peers import BASELINE, NEEDS, PEERS, TITLES, TUNED

LIMITS = "limits"
WARM_UP = 5
PART, LAST = 0.5, 0.9  # of the time left, that one process may take, and the last
LEAST_SECONDS = 2.0  # a process with less is not begun


def main(argv):
    parser = Parser(prog="python -m benchmarks cell", description=__doc__.partition("\n\n")[0])
    group = parser.add_argument_group("measurement")
    group.add_argument("--peers", nargs="+", choices=PEERS, metavar="PEER",
                       help=f"{', '.join(PEERS)} (default: all that make sense but the compiled)")  # fmt: skip
    group.add_argument("--rows", type=int, default=2000, metavar="N", help="training rows (default: 2000)")
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="interleaved runs of each (default: 3)")
    group.add_argument("--warm-up", type=int, default=WARM_UP, metavar="N",
                       help=f"first steps that no rate counts (default: {WARM_UP})")  # fmt: skip
    group.add_argument("--threads", type=int, metavar="N", help="of each process (default: as many as torch takes)")
    group.add_argument("--out", metavar="DIR", help="write results.json, table.md and roofline.png into this folder")
    group.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    add_flags(parser, Cell, only=marked(Cell, "peers"))
    arguments = parser.parse_args(argv)
    for name in ("rows", "repeats", "warm_up", "threads"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")
    if arguments.out is not None:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)  # refused now rather than after the runs
    cell = Cell(train_rows=arguments.rows).replace(**given_flags(arguments, Cell))
    keep = None if arguments.out is None else report.keeper(arguments.out)
    results = measure(cell, arguments.peers, arguments.repeats, arguments.warm_up, arguments.threads, keep=keep)
    shown = report.CELL, report.cell_lines(results), report.cell_notes(results)
    print(report.page(*shown))
    if arguments.out is not None:
        report.write(Path(arguments.out), results, *shown, report.draw_cell)
    if results["limits_failed"] or any(peer.get("failed") for peer in results["peers"].values()):
        sys.exit(1)


def measure(cell, names=None, repeats=1, warm_up=WARM_UP, threads=None, until=None, keep=None):
    """Run all peers and return what results.json has; `keep` is called with it after every outcome.

    A peer that fails is left out of further repeats, and keeps what it did before. With `until` (by `alone.now()`) no
    repeat but the first begins after it, and no process but the last has more than half of the time left, so that one
    that hangs leaves some to the others.
    """
    from minilora import parallel

    device = parallel.pick_device(cell.device)
    runs = Runs(cell, default_peers(cell, device) if names is None else names, device, repeats, warm_up, threads)
    with tempfile.TemporaryDirectory() as folder:
        runs.prepare(job.write(cell, folder, warm_up))
        for repeat in range(repeats):
            if repeat and until is not None and alone.now() > until:
                say(f"time is up after {repeat} of {repeats} repeats")
                runs.repeats = repeat
                break
            for name in (LIMITS, *runs.names):
                if name in runs.missing or name in runs.failed:
                    continue
                part = LAST if repeat == repeats - 1 and name == runs.names[-1] else PART
                limit = None if until is None else part * (until - alone.now())
                if limit is not None and limit < LEAST_SECONDS:
                    runs.fails(name, repeat, {"error": "no time was left"})
                else:
                    runs.run(name, repeat, folder, limit)
                if keep is not None:
                    keep(runs.results())
    return runs.results()


def default_peers(cell, device):
    """All that make sense but the compiled, whose compiling may take longer than the rest together."""
    cuda, half = device.type == "cuda", peers.is_half(cell)
    left_out = {name: half for name in peers.HALF} | {name: True for name in peers.COMPILED}
    left_out |= {"minilora-compiled": not cuda, "minilora-eager": not cuda, "unsloth": not cuda}
    return [name for name in PEERS if not left_out.get(name)]


class Runs:
    """The runs of one job by its peers: `records` {name: {repeat: record}}, `failed` {name: why}."""

    def __init__(self, cell, names, device, repeats, warm_up, threads):
        import torch

        from minilora.runs.record import hardware, versions

        self.cell, self.names, self.repeats, self.warm_up = cell, names, repeats, warm_up
        self.load, self.threads = os.getloadavg()[0], threads or torch.get_num_threads()
        self.missing = {name: reason for name in names if (reason := lacks(name, device))}
        self.records, self.failed = {name: {} for name in (LIMITS, *names)}, {}
        self.hardware = hardware(device) | {"threads": self.threads}
        self.versions = versions() | report.versions("transformers", "peft", "accelerate", "unsloth")

    def prepare(self, shared):
        self.rows, (self.needed, self.lengths) = len(shared.train), necessary(shared)

    def run(self, name, repeat, folder, limit):
        began = time.time()
        module = "benchmarks.limits" if name == LIMITS else "benchmarks.peers"
        outcome = alone.run(module, name, folder, self.threads, limit)
        if name in PEERS and "error" not in outcome and outcome["threads"] != self.threads:
            outcome = {"error": f"it took {outcome['threads']} threads, not {self.threads}"}
        if "error" in outcome:
            return self.fails(name, repeat, outcome)
        self.records[name][repeat] = outcome
        rate = f"{outcome['rows_per_second']:.1f} rows/s, " if name in PEERS else ""
        say(f"repeat {repeat + 1}/{self.repeats}: {name}: {rate}{time.time() - began:.0f} s in all")

    def fails(self, name, repeat, outcome):
        self.failed[name] = {"failed": outcome["error"], "failed_repeat": repeat + 1, "trace": outcome.get("trace", [])}
        say(f"repeat {repeat + 1}/{self.repeats}: {name} failed: {outcome['error']}")

    def results(self):
        """What results.json has, of the runs so far."""
        measured = self.records[LIMITS].values()
        limits = {key: max(record[key] for record in measured) for key in next(iter(measured), ())}
        results = {
            "cell": self.cell.to_dict(),
            "rows": self.rows,
            "tokens_a_row": float(self.lengths.mean()),
            "operations_a_row": self.needed,
            "warm_up_steps": self.warm_up,
            "repeats": self.repeats,
            "load_before": self.load,
            "limits": limits,
            "limits_failed": self.failed.get(LIMITS, {}).get("failed"),
            "peers": {},
            "hardware": self.hardware,
            "versions": self.versions,
        }
        for name in self.names:
            peer = {"title": TITLES.get(name, name)} | self.failed.get(name, {})
            if self.records[name]:
                peer |= summary(name, self.records, self.needed, limits, self.dtype(name))
            elif not peer.get("failed"):
                peer["missing"] = self.missing.get(name, "not run yet")
            results["peers"][name] = peer
        add_agreement(results["peers"])
        return results

    def dtype(self, name):
        """That of a peer's products."""
        return "bfloat16" if name in peers.HALF or peers.is_half(self.cell) else "float32"


def lacks(name, device):
    """Why a peer cannot run here, or None."""
    if any(importlib.util.find_spec(package) is None for package in NEEDS.get(name, ())):
        return "not installed"
    return "needs CUDA" if name == "unsloth" and device.type != "cuda" else None


def necessary(shared):
    """(Operations that training on a row takes at least, a mean over the job's rows; the rows' lengths)."""
    import numpy as np

    from minilora.base import checkpoint, families
    from minilora.lora.targets import plan_slots
    from minilora.training.limit import training_flops

    spec = families.read_spec(checkpoint.read_config(shared.base))
    slots = plan_slots(spec, shared.cell)
    lengths = np.diff(shared.encode(shared.train)[0].offsets)
    values, counts = np.unique(lengths, return_counts=True)
    total = sum(int(count) * int(length) * training_flops(spec, slots, shared.cell.method, int(length))
                for length, count in zip(values, counts))  # fmt: skip
    return total / len(lengths), lengths


def summary(name, records, needed, limits, dtype):
    """Medians over the repeats, with the spread of the rates; `dtype` is that of the products.

    A ratio is the median of those within a repeat. `ratio_to_best` and `ratio_to_best_bfloat16` are over the fastest
    peer of each repeat, among those with and without bfloat16 products.
    """
    own = records[name]
    first = next(iter(own.values()))

    def median(key):
        return statistics.median(record[key] for record in own.values())

    def over(others, key="rows_per_second"):
        ratios = []
        for repeat, record in own.items():
            theirs = [records[other][repeat][key] for other in others if repeat in records.get(other, ())]
            if theirs:
                ratios.append(record[key] / max(theirs))
        return statistics.median(ratios) if ratios else None

    others = [other for other in PEERS if not other.startswith("minilora")]
    half = [other for other in others if other in peers.HALF]
    rates = [record["rows_per_second"] for record in own.values()]
    accuracy = statistics.fmean(record["accuracy"] for record in own.values())
    return {
        "rows_per_second": median("rows_per_second"),
        "spread": [min(rates), max(rates)],
        "tokens_per_second": median("tokens_per_second"),
        "ratio": over([BASELINE]),
        "ratio_to_tuned": over([TUNED]),
        "ratio_to_loop": over(["peft-loop"]),
        "ratio_to_best": over([other for other in others if other not in half]),
        "ratio_to_best_bfloat16": over(half),
        "memory_ratio": over([BASELINE], "peak_memory_bytes"),
        "flops_per_second": needed * median("rows_per_second"),
        "limit": dtype,
        "limit_share": needed * median("rows_per_second") / limits[dtype] if limits else None,
        "peak_memory_bytes": median("peak_memory_bytes"),
        "start_up_seconds": median("start_up_seconds"),
        "accuracy": accuracy,
        "standard_error": (accuracy * (1 - accuracy) / first["test_rows"]) ** 0.5,
        "rows": first["rows"],
        "tokens": first["tokens"],
        "repeats": list(own.values()),
    }


def add_agreement(peers):
    """Note for each measured peer whether it did the job of the first: PEFT and Trainer where measured.

    `same_rows`: it saw as many rows and tokens; `same_accuracy`: within one standard error.
    """
    measured = {name: peer for name, peer in peers.items() if "accuracy" in peer}
    if not measured:
        return
    first = measured.get(BASELINE) or next(iter(measured.values()))
    for peer in measured.values():
        peer["compared_with"] = first["title"]
        peer["same_rows"] = (peer["rows"], peer["tokens"]) == (first["rows"], first["tokens"])
        peer["same_accuracy"] = abs(peer["accuracy"] - first["accuracy"]) <= first["standard_error"]
