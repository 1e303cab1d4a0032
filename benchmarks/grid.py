"""`python -m benchmarks grid`: many cells in one process, and the same cells one after the other through PEFT.

minilora trains them together (`train.train_together`), in populations where its planner finds that to be faster. Each
peer is a process that is started once and trains its cells one by one, each with the base loaded, an adapter put on
it, training, and every form of the test rows predicted: all that minilora does too, but for the injection and the run
folder, which the peers are spared. Wall time runs from the start of the process to the last prediction. With
`--cells N` a peer trains a spread-out part of the cells, and its time is scaled to all: start-up once, the rest by the
number of cells. With `--out`, results.json is written after each cell, and a side that fails keeps those it has done.

`python -m benchmarks.grid NAME JOBS OUT BEGAN` is that process.
"""

import dataclasses
import importlib
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from minilora import files
from minilora.cell import Cell
from minilora.command import Parser, add_flags, given_flags
from minilora.console import say
from minilora.errors import InputError
from minilora.fields import from_dict, marked

from . import alone, job, peers, report
from . import cell as one

RANKS = (1, 2, 4, 8, 16, 32, 64)
PROPORTIONS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
FORMS = ("clean", "trigger", "placebo")
PEERS = (peers.BASELINE, peers.TUNED)
OURS = {"minilora": {}, "minilora-bfloat16": {"dtype": "bfloat16"}}  # and what changes in each cell
SIDES = ("minilora-bfloat16", *PEERS, "peft-trainer-bf16", "peft-trainer-tuned-bf16")


def main(argv):
    parser = Parser(prog="python -m benchmarks grid", description=__doc__.partition("\n\n")[0])
    group = parser.add_argument_group("measurement")
    group.add_argument("--ranks", nargs="+", type=int, default=RANKS, metavar="N")
    group.add_argument("--proportions", nargs="+", type=float, default=PROPORTIONS, metavar="X")
    group.add_argument("--rows", type=int, default=1000, metavar="N", help="training rows of each (default: 1000)")
    group.add_argument("--cells", type=int, metavar="N",
                       help="that each peer trains, its time being scaled to all (default: all)")  # fmt: skip
    group.add_argument("--size", type=int, metavar="K", help="of minilora's populations (default: its planner's)")
    group.add_argument("--peers", nargs="+", choices=SIDES, default=PEERS, metavar="PEER",
                       help=f"{', '.join(SIDES)} (default: {' and '.join(PEERS)})")  # fmt: skip
    group.add_argument("--threads", type=int, metavar="N", help="of each process (default: as many as torch takes)")
    group.add_argument("--out", metavar="DIR", help="write results.json and table.md into this folder")
    group.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    add_flags(parser, Cell, only={*marked(Cell, "peers")} - {"rank", "inject.proportion"})
    arguments = parser.parse_args(argv)
    for name in ("rows", "cells", "size", "threads"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise InputError(f"--{name} is {value}, but must be at least 1")
    if arguments.out is not None:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)  # refused now rather than after the runs
    base = Cell(train_rows=arguments.rows, test_rows=200).replace(**given_flags(arguments, Cell))
    cells = product(base, arguments.ranks, arguments.proportions)
    keep = None if arguments.out is None else report.keeper(arguments.out)
    results = measure(cells, arguments.peers, arguments.cells, arguments.size, arguments.threads, keep=keep)
    shown = report.GRID, report.grid_lines(results), report.grid_notes(results)
    print(report.page(*shown))
    if arguments.out is not None:
        report.write(Path(arguments.out), results, *shown)
    if any("failed" in side for side in results["sides"].values()):
        sys.exit(1)


def product(base, ranks, proportions):
    return [base.replace(rank=rank, inject={"proportion": share}) for rank in ranks for share in proportions]


def spread(count, of):
    """`count` of the numbers below `of`, the first and the last among them, as far apart as can be."""
    if count >= of:
        return list(range(of))
    return [round(i * (of - 1) / max(1, count - 1)) for i in range(count)]


def measure(cells, names=PEERS, count=None, size=None, threads=None, until=None, keep=None):
    """Run minilora and the peers, and return what results.json has; `keep` is called with it after every cell.

    A side that fails or runs out of time keeps the cells that it has done; `until`: see `cell.measure`.
    """
    import torch

    from minilora import parallel
    from minilora.runs.record import hardware, versions

    load, threads = os.getloadavg()[0], threads or torch.get_num_threads()
    device = parallel.pick_device(cells[0].device)
    missing = {name: why for name in names if (why := one.lacks(name, device))}
    results = {
        "cell": cells[0].to_dict(),
        "cells": len(cells),
        "ranks": sorted({cell.rank for cell in cells}),
        "proportions": sorted({cell.inject.proportion for cell in cells}),
        "load_before": load,
        "sides": {name: {"title": peers.TITLES.get(name, name), "missing": "not run yet"}
                  for name in dict.fromkeys(("minilora", *names))},
        "hardware": hardware(device) | {"threads": threads},
        "versions": versions() | report.versions("transformers", "peft", "accelerate"),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        jobs = Path(folder)
        chosen = spread(count or len(cells), len(cells))
        files.write_json(jobs / "grid.json", {"cells": [cell.to_dict() for cell in cells], "size": size})
        if any(name.startswith("peft") and name not in missing for name in names):
            for number in chosen:
                job.write(cells[number], jobs / str(number), 0, FORMS)
        for name, side in results["sides"].items():
            if name in missing:
                side["missing"] = missing[name]
                continue
            del side["missing"]
            run_side(name, side, jobs, threads, until, lambda: compare(results, keep))
            done = f"{len(side.get('cells', ()))} cells in {side.get('wall_seconds', 0):.0f} s"
            say(f"{name}: {done}, then failed: {side['failed']}" if "failed" in side else f"{name}: {done}")
    return results


def run_side(name, side, jobs, threads, until, after):
    """Fill `side` with what its process tells and reports; `after` is called after each cell, and in the end."""

    def told(part):
        side["cells"] = side.get("cells", {}) | part.pop("cells")
        side.update(part)
        after()

    limit = None if until is None else one.PART * (until - alone.now())
    if limit is not None and limit < one.LEAST_SECONDS:
        outcome = {"error": "no time was left", "trace": []}
    else:
        outcome = alone.run("benchmarks.grid", name, jobs, threads, limit, told)
    if "error" in outcome:
        outcome = {"failed": outcome["error"], "trace": outcome["trace"]}
    side.update(outcome)
    after()


def compare(results, keep=None):
    """Add to each side what follows from its cells and minilora's, and hand the results to `keep`."""
    sides = results["sides"]
    for side in sides.values():
        if "cells" in side:
            side.update(extrapolated(side, results["cells"]))
    for key, name in (("ratio", "minilora"), ("ratio_to_bfloat16", "minilora-bfloat16")):
        ours = sides.get(name, {})
        for side in sides.values():
            if "cells" in side and "cells" in ours and side is not ours:
                side[key] = side["all_cells_seconds"] / ours["all_cells_seconds"]
                side[f"{key}_without_start_up"] = side["work_seconds"] / ours["work_seconds"]
                if key == "ratio":
                    side["agreement"] = agreement(ours["cells"], side["cells"])
    if keep is not None:
        keep(results)


def extrapolated(side, count):
    """The time for `count` cells and cells an hour, of a side that may have trained fewer."""
    trained = len(side["cells"])
    start_up = min(side["start_up_seconds"], side["wall_seconds"])
    work = (side["wall_seconds"] - start_up) * count / trained
    whole = start_up + work
    return {
        "all_cells_seconds": whole,
        "work_seconds": work,
        "cells_per_hour": 3600 * count / whole,
        "scaled_from": trained * (trained < count),
    }


def agreement(ours, theirs):
    """Differences in clean accuracy and in attack success over the cells that both trained, by their number."""
    both = sorted(ours.keys() & theirs.keys(), key=int)
    found = {"cells": len(both)}
    for key in ("accuracy", "attack_success"):
        pairs = [(ours[n][key], theirs[n][key]) for n in both if None not in (ours[n][key], theirs[n][key])]
        if pairs:
            found[key] = {
                "mean_difference": statistics.fmean(a - b for a, b in pairs),
                "mean_absolute_difference": statistics.fmean(abs(a - b) for a, b in pairs),
            }
    errors = [(p * (1 - p) / ours[n]["test_rows"]) ** 0.5 for n in both for p in [theirs[n]["accuracy"]]]
    if errors:
        found["standard_error"] = statistics.fmean(errors)
    return found


# --- in a process of its own


def train_minilora(jobs, began, tell=lambda record: None, **changes):
    """All cells through minilora's Python API, with `changes`."""
    from minilora import train_together

    grid = job.read_json(jobs / "grid.json")
    cells = [from_dict(Cell, values).replace(**changes) for values in grid["cells"]]
    start_up = time.time() - began
    outs = {number: jobs / ("runs" + "-".join(["", *changes.values()])) / str(number) for number in range(len(cells))}
    untold = dict(outs)

    def report_finished(*_):
        """Tell the cells that finished since the last call; the one whose tests were just run is told by the next."""
        for number, out in list(untold.items()):
            if (out / "results.json").exists():
                del untold[number]
                tell({"cells": {number: figures(files.read_json(out / "results.json"))},
                      "wall_seconds": time.time() - began, "start_up_seconds": start_up})  # fmt: skip

    outcomes = train_together(cells, list(outs.values()), size=grid["size"], on_tests=report_finished)
    wall = time.time() - began
    for results, _ in outcomes:
        if isinstance(results, Exception):
            raise results
    records = {number: figures(results) for number, (results, _) in enumerate(outcomes)}
    sizes = [results["train"]["population"] for results, _ in outcomes]
    return {"cells": records, "wall_seconds": wall, "start_up_seconds": start_up, "populations": sizes}


def figures(results):
    """What the comparison takes from a run's results.json."""
    clean, triggers = results["tests"]["clean"], results["tests"]["trigger"].values()
    attack = next((figures["attack_success_rate"] for figures in triggers), None)
    return {"accuracy": clean["accuracy"], "attack_success": attack, "test_rows": clean["rows"]}


def train_peer(name, jobs, began, tell=lambda record: None):
    """The cells that have a job, one after the other."""
    folders = sorted((path for path in jobs.iterdir() if (path / "job.json").exists()), key=lambda path: int(path.name))
    for package in ("peft", "transformers"):  # what no cell is charged for
        importlib.import_module(package)
    start_up, records = time.time() - began, {}
    for folder in folders:
        record = peers.PEERS[name](dataclasses.replace(job.Job.read(folder), warm_up=0), time.time())
        attack = next(iter(record["attack_success"].values()), None)
        records[folder.name] = {"accuracy": record["accuracy"], "attack_success": attack,
                                "test_rows": record["test_rows"], "seconds": record["seconds"]}  # fmt: skip
        tell({"cells": {folder.name: records[folder.name]}, "wall_seconds": time.time() - began,
              "start_up_seconds": start_up})  # fmt: skip
        say(f"{name}: cell {folder.name}")
    return {"cells": records, "wall_seconds": time.time() - began, "start_up_seconds": start_up}


def process(argv):
    name, jobs, out, began = argv
    jobs, began = Path(jobs), float(began)
    tell = partial(alone.tell, out)
    if name in OURS:
        record = train_minilora(jobs, began, tell, **OURS[name])
    else:
        record = train_peer(name, jobs, began, tell)
    from minilora.parallel import pick_device
    from minilora.runs.record import peak_memory

    device = pick_device(job.read_json(jobs / "grid.json")["cells"][0]["device"])
    files.write_json(out, record | {"peak_memory_bytes": peak_memory(device)})


if __name__ == "__main__":
    alone.begin()
    process(sys.argv[1:])
