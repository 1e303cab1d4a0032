"""`python -m benchmarks device`: what the README's table says of a GPU, within `--budget` seconds (500).

Whoever has a GPU for the first time runs, in this order,

    python -m benchmarks device --phases smoke --budget 90     # does each path work at all?
    python -m benchmarks device                                # everything but what is compiled
    python -m benchmarks device --phases compiled
    python -m benchmarks device --phases grid --grid-rows 9043 # one part again, with all of the time

and reads results.json, which is written after every outcome. Each phase may use its share of the seconds and what
those before it left; each of its processes has a limit, so that one that hangs or dies takes only itself. Phases:

smoke     every path once on tiny bases: float32, bfloat16, population, dropout, lm, evaluation, graphs, compiled
small     one cell on the default base, or on one of its shape, beside its peers
llama     one cell of Llama-3.2-1B's shape in bfloat16, 8 rows of 512 tokens a batch, beside its peers
grid      64 cells, also in bfloat16, beside PEFT + Trainer one by one, of which a part is trained and scaled
profiles  the kernels of a step of each of the three: profile-NAME.txt
tests     the tests that have a CUDA variant: device-tests.txt
compiled  small and llama again with minilora and its peers compiled, which takes minutes

Nothing is downloaded: where the cache does not hold the default base, random weights of its shape take its place. What
is not installed is left out with a line. Model-FLOP use is the operations that the job cannot do without
(`minilora/training/limit.py`) over the measured rate of products.
"""

import os
import shutil
import sys
import tempfile
import traceback
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from minilora import console, files
from minilora.base import checkpoint
from minilora.base.source import DEFAULT_BASE
from minilora.cell import Cell
from minilora.command import Parser
from minilora.errors import InputError

from . import alone, grid, peers, report, smoke, standin
from . import cell as one

BUDGET = 500  # seconds
SHARES = {"smoke": 0.14, "small": 0.2, "llama": 0.18, "grid": 0.2, "profiles": 0.08, "tests": 0.08, "compiled": 0.12}
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
PROPORTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
SMALL_PEERS = ("minilora", peers.BASELINE, "minilora-eager", "minilora-bfloat16", peers.TUNED, "peft-loop",
               "peft-trainer-tuned-bf16")  # fmt: skip
LLAMA_PEERS = ("minilora", peers.BASELINE, "minilora-eager", "peft-loop", "unsloth")
COMPILED_PEERS = ("minilora-compiled", "peft-trainer-tuned-compiled")
PEERS_OF = {"small": SMALL_PEERS, "llama": LLAMA_PEERS, "compiled": COMPILED_PEERS}
EVERY_PEER = tuple(dict.fromkeys(name for names in PEERS_OF.values() for name in names))
GRID_SIDES = ("minilora-bfloat16", peers.BASELINE)
AT_LEAST = {"small": 2.0, "llama": 1.5, "model_flop_use": 0.6, "over_unsloth": 1.1, "grid": 20.0}  # the aims


def main(argv):
    parser = Parser(prog="python -m benchmarks device", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", default="device", metavar="DIR",
                        help="write results.json, table.md and more into this folder (default: device)")  # fmt: skip
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="S", help=f"seconds (default: {BUDGET})")
    parser.add_argument("--phases", nargs="+", choices=SHARES, default=tuple(SHARES)[:-1], metavar="PHASE",
                        help=f"only these of {', '.join(SHARES)} (default: all but compiled)")  # fmt: skip
    parser.add_argument("--grid-rows", type=int, default=2000, metavar="N",
                        help="training rows of each cell of the grid (default: 2000)")  # fmt: skip
    parser.add_argument("--peers", nargs="+", choices=EVERY_PEER, metavar="PEER",
                        help=f"of small, llama and compiled only these of {', '.join(EVERY_PEER)}")  # fmt: skip
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command itself (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny bases throughout, to try the command itself")
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    arguments = parser.parse_args(argv)
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA GPU here, and this measures one: run it on a machine that has one")
    if arguments.budget <= 0 or arguments.grid_rows < 2:
        raise InputError("--budget must be more than 0, and --grid-rows at least 2")
    for name in arguments.peers or ():
        if not any(name in PEERS_OF.get(phase, ()) for phase in arguments.phases):
            phases = ", ".join(arguments.phases)
            raise InputError(f"--peers {name} is in none of the phases {phases}: name another phase")
    Path(arguments.out).mkdir(parents=True, exist_ok=True)  # refused now rather than after the runs
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.out, folder, arguments.device, arguments.budget, arguments.grid_rows, arguments.tiny,
                      arguments.peers or EVERY_PEER)  # fmt: skip
        bench.run(arguments.phases)
    if any(phase["state"] == "failed" for phase in bench.results["phases"].values()):
        sys.exit(1)


def plan(phases, budget):
    """{phase: seconds from the beginning after which it ends}."""
    chosen = [name for name in SHARES if name in phases]
    whole, ends, so_far = sum(SHARES[name] for name in chosen), {}, 0.0
    for name in chosen:
        so_far += SHARES[name]
        ends[name] = budget * so_far / whole
    return ends


class Bench:
    """The phases, what they found so far, and the folder that keeps it."""

    def __init__(self, out, folder, device, budget, grid_rows=2000, tiny=False, chosen=EVERY_PEER):
        self.out, self.folder, self.device, self.budget = Path(out), Path(folder), device, budget
        self.grid_rows, self.tiny, self.bases, self.began = grid_rows, tiny, {}, alone.now()
        self.chosen = chosen
        self.threads = os.cpu_count() if device == "cuda" else None
        self.parts = {}
        self.results = {"device": device, "budget": budget, "seconds": 0.0, "phases": {}, "figures": {},
                        "at_least": AT_LEAST, "parts": self.parts}  # fmt: skip

    def run(self, phases):
        """Run the phases in the order of SHARES; whatever ends it, what was measured is kept and shown."""
        ends = plan(phases, self.budget)
        self.results["phases"] = {name: {"state": "left out", "why": "not begun"} for name in ends}
        try:
            self.describe()
            for name, end in ends.items():
                self.run_phase(name, self.began + end)
        finally:
            self.keep()
            print(report.page(*self.shown()), flush=True)

    def describe(self):
        import torch

        from minilora.runs.record import hardware, versions

        found = hardware(torch.device(self.device))
        self.results |= {"device": found.get("gpu", found["processor"]), "hardware": found, "versions": versions()}
        self.threads = self.threads or torch.get_num_threads()

    def run_phase(self, name, until):
        phase, began = self.results["phases"][name], alone.now()
        if until - began < one.LEAST_SECONDS:
            phase["why"] = "no time was left"
            return self.keep()
        phase.update(state="interrupted", why="")
        console.say(f"\n{name}: until {until - self.began:.0f} s of {self.budget:.0f}")
        self.keep()  # as interrupted, which it is if it kills this process
        try:
            getattr(self, name)(until)
            phase["state"] = "done" if alone.now() < until else "cut"
        except Exception as error:
            trace = traceback.format_exc().strip().splitlines()[-alone.LAST_LINES :]
            phase.update(state="failed", why=f"{type(error).__name__}: {error}".splitlines()[0], trace=trace)
            console.say(f"{name} failed: {phase['why']}")
        finally:
            phase["seconds"] = alone.now() - began
            self.keep()

    def keep(self, part=None, found=None):
        """Write everything so far, with what a part `found`."""
        if part is not None:
            self.parts[part] = found
        self.results |= {"seconds": alone.now() - self.began, "figures": figures(self.parts)}
        report.write(self.out, self.results, *self.shown())

    def shown(self):
        return report.DEVICE, report.device_lines(self.results), report.device_notes(self.results)

    # --- bases and cells

    def base(self, name, until):
        """The folder of a stand-in, or the default base's name; made once, in a process of its own."""
        if name == "bert" and not self.tiny and cached_default():
            return DEFAULT_BASE
        if name not in self.bases:
            shape = f"tiny-{name}" if self.tiny else name
            outcome = alone.run("benchmarks.standin", shape, self.folder, self.threads, until - alone.now())
            if "error" in outcome:
                raise RuntimeError(f"the stand-in {shape} was not written: {outcome['error']}")
            self.bases[name] = str(self.folder / shape)
        return self.bases[name]

    def small_cell(self, until):
        sizes = {"train_rows": 48, "test_rows": 20, "batch_size": 8} if self.tiny else {"test_rows": 500}
        return Cell(model=self.base("bert", until), device=self.device, **sizes)

    def llama_cell(self, until):
        batch, length, steps = (4, 16, 6) if self.tiny else (8, 512, 80)
        model, path = self.base("llama", until), self.folder / "rows.csv"
        if not path.exists():
            vocabulary = smoke.LLAMA["vocab_size"] if self.tiny else standin.LLAMA["vocab_size"]
            standin.write_rows(path, batch * steps + 16, length, vocabulary)
        return Cell(model=model, data=str(path), dtype="bfloat16", batch_size=batch, max_length=length, test_rows=16,
                    rank=8, inject={"sources": ("none",)}, device=self.device)  # fmt: skip

    def grid_cells(self, until):
        if self.tiny:
            return grid.product(self.small_cell(until), (1, 3), (0.0, 1.0))
        one_of_them = self.small_cell(until).replace(train_rows=self.grid_rows, test_rows=200)
        return grid.product(one_of_them, RANKS, PROPORTIONS)

    # --- phases

    def smoke(self, until):
        folder, found = self.folder / "smoke", {}
        smoke.write(folder, self.device, smoke.LIMIT * max(1.0, self.budget / BUDGET))

        def told(record):
            found[record.pop("path")] = record
            self.keep("smoke", found)

        while todo := [name for name in smoke.PATHS if name not in found]:
            left = until - alone.now()
            if left < one.LEAST_SECONDS:
                for name in todo:
                    told({"path": name, "failed": "no time was left"})
                break
            outcome = alone.run("benchmarks.smoke", ",".join(todo), folder, self.threads, left, told)
            if "error" in outcome or not any(name in found for name in todo):
                culprit = next((name for name in todo if name not in found), None)
                if culprit is not None:
                    trace = outcome.get("trace", [])
                    hangs = any(line.startswith("Timeout (") for line in trace)
                    why = "it hangs" if hangs else outcome.get("error", "it told nothing")
                    told({"path": culprit, "failed": why, "trace": trace})
            shutil.rmtree(folder / "runs", ignore_errors=True)

    def small(self, until):
        self.beside("small", self.small_cell(until), SMALL_PEERS, until, 2)

    def llama(self, until):
        self.beside("llama", self.llama_cell(until), LLAMA_PEERS, until, 2)

    def compiled(self, until):
        middle = (alone.now() + until) / 2
        self.beside("small compiled", self.small_cell(until), COMPILED_PEERS, middle)
        self.beside("llama compiled", self.llama_cell(until), COMPILED_PEERS, until)

    def beside(self, part, cell, names, until, repeats=1):
        """The first 20 steps are no part of a rate: on a GPU the clock is read every 20."""
        repeats, warm_up = (1, 2) if self.tiny else (repeats, 20)
        names = [name for name in names if name in self.chosen and (not self.tiny or name in (*names[:2], "unsloth"))]
        if not names:
            return console.say(f"{part}: none of --peers is measured here")
        one.measure(cell, names, repeats, warm_up, self.threads, until, partial(self.keep, part))

    def grid(self, until):
        grid.measure(self.grid_cells(until), GRID_SIDES, 2 if self.tiny else 8, threads=self.threads, until=until,
                     keep=partial(self.keep, "grid"))  # fmt: skip

    def profiles(self, until):
        found, steps = {}, 9 if self.tiny else 80
        for name in ("small", "llama", "grid"):
            cells = self.grid_cells(until) if name == "grid" else [getattr(self, f"{name}_cell")(until)]
            folder = self.folder / f"profile-{name}"
            folder.mkdir()
            cells = [cell.replace(epochs=None, steps=steps, test_rows=20) for cell in cells]
            files.write_json(folder / "cells.json", [cell.to_dict() for cell in cells])
            limit = one.PART * (until - alone.now())
            if limit < one.LEAST_SECONDS:
                found[name] = {"failed": "no time was left"}
            else:
                found[name] = alone.run("benchmarks.profiles", name, folder, self.threads, limit)
            if "error" in found[name]:
                found[name]["failed"] = found[name].pop("error")
            elif (folder / "profile.txt").exists():
                shutil.copyfile(folder / "profile.txt", self.out / f"profile-{name}.txt")
            self.keep("profiles", found)

    def tests(self, until):
        """What pytest prints of the tests that have a variant for the device goes into device-tests.txt."""
        if find_spec("pytest") is None:
            return self.keep("tests", {"line": "left out: pytest is not installed"})
        where = ["tests/kernels/test_rotary.py"] if self.tiny else ["tests/kernels", "tests/training", "tests/base"]
        clone = Path(__file__).parent.parent
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "-rf", "--tb=short",
                   "-p", "no:cacheprovider", "--continue-on-collection-errors", "-k", self.device,
                   *(str(clone / path) for path in where)]  # fmt: skip
        with open(self.out / "device-tests.txt", "wb") as written:
            status = alone.wait(command, {}, written, until - alone.now(), out=written)
        lines = (self.out / "device-tests.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        line = (lines or ["nothing was printed"])[-1].strip("= ")
        failed = [line.partition(" ")[2].partition(" - ")[0] for line in lines if line.startswith("FAILED")]
        self.keep("tests", {"line": line if status is not None else f"cut after: {line}", "failed": failed})


def cached_default():
    """Whether our cache holds the default base."""
    return (files.cache() / DEFAULT_BASE.replace("/", "--") / checkpoint.WEIGHTS).is_file()


def figures(parts):
    """The figures that have an aim, from what was measured so far: None where nothing was.

    What was compiled is compared with the peer of the phase that was not, as it has none in its own repeat.
    """
    small, llama, grid = ratios(parts, "small"), ratios(parts, "llama"), parts.get("grid", {}).get("sides", {})
    return {
        "small": small.get(peers.BASELINE),
        "llama": llama.get(peers.BASELINE),
        "model_flop_use": llama.get("limit_share"),
        "over_unsloth": llama.get("unsloth"),
        "grid": grid.get(peers.BASELINE, {}).get("ratio_without_start_up"),
    }


def ratios(parts, name):
    """Of the faster of minilora and minilora compiled: its rate over each peer's, and its share of the limit."""
    measured, compiled = (parts.get(part, {}).get("peers", {}) for part in (name, f"{name} compiled"))
    own = [measured.get("minilora", {}), compiled.get("minilora-compiled", {})]
    best = max((peer for peer in own if "accuracy" in peer), key=lambda peer: peer["rows_per_second"], default=None)
    if best is None:
        return {}
    found = {other: best["rows_per_second"] / peer["rows_per_second"]
             for other, peer in measured.items() if "accuracy" in peer}  # fmt: skip
    return found | {"limit_share": best["limit_share"]}
