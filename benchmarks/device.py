"""`python -m benchmarks device`: what the README's table says of a GPU, all of it in under 8 minutes.

One cell on a base of Llama-3.2-1B's shape with random weights, in bfloat16, 8 rows of 512 tokens a batch; and a grid of
64 cells on the default base, or one of its shape with random weights where the cache does not hold it. Nothing is
downloaded, and peers that are not installed are left out with a line. Model-FLOP use is the operations that the
job cannot do without (`minilora/training/limit.py`) over the measured rate of products. The peers of the grid train a
spread-out part of the cells, and their time is scaled to all.
"""

import tempfile
import time
from pathlib import Path

import torch

from minilora import console, files, parallel
from minilora.base import checkpoint
from minilora.base.source import DEFAULT_BASE
from minilora.cell import Cell
from minilora.command import Parser
from minilora.errors import InputError

from . import cell as one
from . import grid, peers, report, standin

LIMIT = 460  # seconds for everything
PART = 0.6  # of it for the one cell
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
PROPORTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
PEERS = ("minilora", "minilora-compiled", peers.BASELINE, "peft-loop", "unsloth")
AT_LEAST = {"one_cell": 2.0, "model_flop_use": 0.55, "over_unsloth": 1.1, "grid": 20.0}  # what the project aims at


def main(argv):
    parser = Parser(prog="python -m benchmarks device", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", default="device", metavar="DIR",
                        help="write results.json and table.md into this folder (default: device)")  # fmt: skip
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise InputError("torch finds no CUDA GPU here, and this measures one: run it on a machine that has one")
    Path(arguments.out).mkdir(parents=True, exist_ok=True)  # refused now rather than after the runs
    device = parallel.pick_device("cuda")
    with tempfile.TemporaryDirectory() as folder:
        llama = standin.write_base(Path(folder) / "llama", standin.LLAMA, torch.bfloat16, device)
        rows = standin.write_rows(Path(folder) / "rows.csv", 8 * 80 + 16, 512, standin.LLAMA["vocab_size"])
        cell = Cell(model=str(llama), data=str(rows), dtype="bfloat16", batch_size=8, max_length=512, test_rows=16,
                    rank=8, inject={"sources": ("none",)})  # fmt: skip
        cells = grid.product(
            Cell(model=default_base(folder, device), train_rows=1000, test_rows=200), RANKS, PROPORTIONS
        )
        results = measure(cell, cells)
    shown = report.DEVICE, report.device_lines(results), report.device_notes(results)
    print(report.page(*shown))
    report.write(Path(arguments.out), results, *shown)


def default_base(folder, device):
    """The default base where our cache holds it, else a stand-in."""
    cached = files.cache() / DEFAULT_BASE.replace("/", "--")
    if (cached / checkpoint.WEIGHTS).is_file():
        return DEFAULT_BASE
    console.say(f"{cached} does not hold the default base: random weights take its place")
    return str(standin.write_base(Path(folder) / "bert", standin.BERT, torch.float32, device))


def measure(cell, cells, names=PEERS, grid_names=grid.PEERS, part=16, repeats=3, warm_up=20, limit=LIMIT):
    """The one `cell` side by side with its peers, and the grid of `cells`: what results.json has.

    The first 20 steps are no part of a rate: on a GPU train.py reads its clock every 20.
    """
    began = time.monotonic()
    single = one.measure(cell, names, repeats, warm_up, until=began + PART * limit)
    together = grid.measure(cells, grid_names, part, until=began + limit)
    ours = [single["peers"][name] for name in ("minilora", "minilora-compiled") if name in single["peers"]]
    best = max((peer for peer in ours if "accuracy" in peer), key=lambda peer: peer["rows_per_second"], default={})
    unsloth = single["peers"].get("unsloth", {})
    ratios = {name: side["ratio"] for name, side in together["sides"].items() if side.get("ratio")}
    found = {
        "one_cell": best.get("ratio"),
        "model_flop_use": best.get("limit_share"),
        "over_unsloth": best and "accuracy" in unsloth and best["rows_per_second"] / unsloth["rows_per_second"] or None,
        "grid": ratios.get(peers.BASELINE),
    }
    return {"device": single["hardware"].get("gpu", single["hardware"]["processor"]), "figures": found,
            "at_least": AT_LEAST, "seconds": time.monotonic() - began, "cell": single, "grid": together}  # fmt: skip
