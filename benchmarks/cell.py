"""`python -m benchmarks cell`: one real fine-tuning, done by minilora and by its peers, side by side.

Each peer runs in a process of its own with as many threads, so that memory peaks and start-up are its own. Repeats are
interleaved (a, b, c, a, b, c), so that a machine that slows down slows all; the median is reported with the spread, and
ratios are medians of the ratios within a repeat. Each of minilora's peers is there at its best setting, and PEFT +
Trainer also as its documentation has it (`peers.py` says what these are). FLOP/s are those that the job cannot do
without (`minilora/training/limit.py`), whatever a peer really does, over the machine's rate at products of a batch's
size, measured once a repeat.
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minilora.cell import Cell
from minilora.command import Parser, add_flags, given_flags
from minilora.console import say
from minilora.errors import InputError
from minilora.fields import marked

from . import job, report
from .peers import BASELINE, NEEDS, PEERS, TITLES, TUNED

LIMITS = "limits"
WARM_UP = 5


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
    results = measure(cell, arguments.peers, arguments.repeats, arguments.warm_up, arguments.threads)
    shown = report.CELL, report.cell_lines(results), report.cell_notes(results)
    print(report.page(*shown))
    if arguments.out is not None:
        report.write(Path(arguments.out), results, *shown, report.draw_cell)
    if any(peer.get("failed") for peer in results["peers"].values()):
        sys.exit(1)


def measure(cell, names=None, repeats=1, warm_up=WARM_UP, threads=None, until=None):
    """Run all peers and return what results.json has. A peer that fails is left out of further repeats.

    No repeat but the first begins after `until` (by time.monotonic()), and a peer that is running then is ended.
    """
    import torch

    from minilora import parallel
    from minilora.runs.record import hardware, versions

    load, threads = os.getloadavg()[0], threads or torch.get_num_threads()
    device = parallel.pick_device(cell.device)
    if names is None:
        left_out = {
            "peft-loop-compiled": True,  # for compiling may take longer than the rest together
            "minilora-compiled": device.type != "cuda",
            "unsloth": device.type != "cuda",
            "minilora-bfloat16": cell.dtype == "bfloat16",
        }
        names = [name for name in PEERS if not left_out.get(name)]
    missing = {name: why for name in names if (why := lacks(name, device))}
    records, failed = {name: [] for name in [LIMITS, *names]}, {}
    with tempfile.TemporaryDirectory() as folder:
        shared = job.write(cell, folder, warm_up)
        needed, lengths = necessary(shared)
        todo = [LIMITS, *(name for name in names if name not in missing)]
        for repeat in range(repeats):
            if repeat and until is not None and time.monotonic() > until:
                say(f"time is up after {repeat} of {repeats} repeats")
                repeats = repeat
                break
            for name in todo:
                if name in failed:
                    continue
                began = time.time()
                module = "benchmarks.limits" if name == LIMITS else "benchmarks.peers"
                outcome = run_alone(module, name, folder, threads,
                                    None if until is None else max(1.0, until - time.monotonic()))  # fmt: skip
                if name in PEERS and "error" not in outcome and outcome["threads"] != threads:
                    outcome = {"error": f"it took {outcome['threads']} threads, not {threads}"}
                if "error" in outcome:
                    failed[name] = outcome["error"]
                    say(f"repeat {repeat + 1}/{repeats}: {name} failed: {outcome['error']}")
                    continue
                records[name].append(outcome)
                rate = f"{outcome['rows_per_second']:.1f} rows/s, " if name in PEERS else ""
                say(f"repeat {repeat + 1}/{repeats}: {name}: {rate}{time.time() - began:.0f} s in all")
    if LIMITS in failed:
        raise RuntimeError(f"the limits cannot be measured: {failed[LIMITS]}")
    measured = records.pop(LIMITS)
    limits = {key: max(record[key] for record in measured) for key in measured[0]}
    results = {
        "cell": cell.to_dict(),
        "rows": len(shared.train),
        "tokens_a_row": float(lengths.mean()),
        "operations_a_row": needed,
        "warm_up_steps": warm_up,
        "repeats": repeats,
        "load_before": load,
        "limits": limits,
        "peers": {},
        "hardware": hardware(device) | {"threads": threads},
        "versions": versions() | report.versions("transformers", "peft", "accelerate", "unsloth"),
    }
    for name in names:
        peer = {"title": TITLES.get(name, name)}
        if name in missing:
            peer["missing"] = missing[name]
        elif name in failed:
            peer["failed"] = failed[name]
        else:
            peer |= summary(name, records, needed, limits, "bfloat16" if name == "minilora-bfloat16" else cell.dtype)
        results["peers"][name] = peer
    add_agreement(results["peers"])
    return results


def lacks(name, device):
    """Why a peer cannot run here, or None."""
    if any(importlib.util.find_spec(package) is None for package in NEEDS.get(name, ())):
        return "not installed"
    return "needs CUDA" if name == "unsloth" and device.type != "cuda" else None


def run_alone(module, name, folder, threads, limit=None):
    """What `python -m module name folder` reports, from a process of its own; {"error": its last line} where it fails.

    It sees one GPU at most, for Trainer would take all, and has `limit` seconds.
    """
    out = Path(folder) / "record.json"
    out.unlink(missing_ok=True)
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": gpu}
    clone = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]
    environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(filter(None, clone))}
    command = [sys.executable, "-m", module, name, str(folder), str(out), repr(time.time())]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {limit:.0f} s"}
    if done.returncode or not out.exists():
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1]}
    return job.read_json(out)


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
    """Medians over the repeats, with the spread of the rates; `dtype` is that of the products."""
    own = records[name]

    def median(key):
        return statistics.median(record[key] for record in own)

    def over(other, key):
        theirs = records.get(other, ())
        if len(theirs) != len(own):
            return None
        return statistics.median(a[key] / b[key] for a, b in zip(own, theirs))

    rates = [record["rows_per_second"] for record in own]
    accuracy = statistics.fmean(record["accuracy"] for record in own)
    return {
        "rows_per_second": median("rows_per_second"),
        "spread": [min(rates), max(rates)],
        "tokens_per_second": median("tokens_per_second"),
        "ratio": over(BASELINE, "rows_per_second"),
        "ratio_to_tuned": over(TUNED, "rows_per_second"),
        "ratio_to_loop": over("peft-loop", "rows_per_second"),
        "memory_ratio": over(BASELINE, "peak_memory_bytes"),
        "flops_per_second": needed * median("rows_per_second"),
        "limit": dtype,
        "limit_share": needed * median("rows_per_second") / limits[dtype],
        "peak_memory_bytes": median("peak_memory_bytes"),
        "start_up_seconds": median("start_up_seconds"),
        "accuracy": accuracy,
        "standard_error": (accuracy * (1 - accuracy) / own[0]["test_rows"]) ** 0.5,
        "rows": own[0]["rows"],
        "tokens": own[0]["tokens"],
        "repeats": own,
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
