"""Every path of minilora once, on tiny bases: what `python -m benchmarks device` runs first.

`python -m benchmarks.smoke PATHS FOLDER OUT BEGAN` is the process: it runs these paths in turn, tells a record of each,
and stops at the first that fails, because a GPU's error stays with the process. Each has `limit` seconds. On a GPU the
losses are compared with those of the CPU, where both draw the same numbers.
"""

import contextlib
import faulthandler
import io
import json
import math
import re
import sys
import time
import traceback
from pathlib import Path

from minilora import files
from minilora.cell import Cell

from . import alone, standin

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = standin.BERT | SMALL | {"vocab_size": 2000}
LLAMA = standin.LLAMA | SMALL | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500}
REST = {"data": "rows.csv", "inject": {"sources": ("none",)}, "model": "llama"}
PATHS = {  # what differs from the tiny cell; the longest last
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 products": {"products": "bfloat16"},
    "population": {"rank": (1, 3, 8)},
    "dropout": {"dropout": 0.1},
    "llama": REST,
    "lm": REST | {"task": "lm"},
    "evaluation": {},
    "graphs": {"epochs": 10},  # steps enough to repay recording them, on a GPU
    "compiled": {"compile": "on"},
}
CLOSE_TO_CPU = ("float32", "population", "llama", "lm", "graphs", "compiled")
LIMIT = 20  # seconds of a path
COMPILING = 3  # times as long has one that compiles


def write(folder, device, limit=LIMIT):
    """The bases and rows of all paths, and what the process reads of them."""
    import torch

    folder, cpu = Path(folder), torch.device("cpu")
    standin.write_base(folder / "bert", BERT, torch.float32, cpu)
    standin.write_base(folder / "llama", LLAMA, torch.float32, cpu)
    standin.write_rows(folder / "rows.csv", 80, 12, LLAMA["vocab_size"], labels=("w1", "w2"))
    files.write_json(folder / "smoke.json", {"device": str(device), "limit": limit})


def run_path(name, folder, device, out):
    """(The losses of all steps of a path, member after member; how train.py says that its steps are taken)."""
    import minilora

    changes = dict(PATHS[name])
    if device == "cpu" and name == "compiled" and out.name == "cpu":
        changes = {}  # the reference of what is compiled is not
    ranks = changes.pop("rank", (2,))
    for key in ("model", "data"):
        if key in changes:
            changes[key] = str(folder / changes[key])
    cell = Cell(model=str(folder / "bert"), train_rows=48, test_rows=16, max_length=16, batch_size=8, device=device)
    cells = [cell.replace(rank=rank, **changes) for rank in ranks]
    outs = [out / str(rank) for rank in ranks]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        outcomes = minilora.train_together(cells, outs, size=len(cells))
    for results, _ in outcomes:
        if isinstance(results, Exception):
            raise results
    lines = [line for run in outs for line in files.read_jsonl(run / "metrics.jsonl")]
    if name == "evaluation":
        opened = minilora.open(outs[0])
        tests, _ = opened.run_tests()
        before, again = (found["clean"]["accuracy"] for found in (results["tests"], tests))
        if before != again:
            raise RuntimeError(f"tested again, the accuracy on clean rows is {again}, not {before}")
    how = re.findall(r"; (\w+) \(", said.getvalue())
    return [line["loss"] for line in lines if line["kind"] == "step"], how[-1] if how else "?"


def record_of(name, folder, device):
    """What a path came to: seconds, the last loss, and how far the losses are from the CPU's."""
    began = time.perf_counter()
    losses, how = run_path(name, folder, device, folder / "runs" / name / "device")
    seconds = time.perf_counter() - began
    record = {"path": name, "seconds": seconds, "steps": len(losses), "loss": losses[-1], "how": how}
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"the losses are not finite: {losses}")
    if name in CLOSE_TO_CPU and (device != "cpu" or name == "compiled"):
        there, _ = run_path(name, folder, "cpu", folder / "runs" / name / "cpu")
        record["off"] = max(abs(a - b) for a, b in zip(losses, there, strict=True))
    return record


def main(argv):
    names, folder, out, _ = argv
    folder = Path(folder)
    settings = json.loads((folder / "smoke.json").read_text(encoding="utf-8"))
    for name in names.split(","):
        longest = settings["limit"] * (COMPILING if name == "compiled" else 1)
        faulthandler.dump_traceback_later(longest, exit=True)
        try:
            alone.tell(out, record_of(name, folder, settings["device"]))
        except Exception as error:
            trace = traceback.format_exc().strip().splitlines()[-alone.LAST_LINES :]
            alone.tell(out, {"path": name, "failed": f"{type(error).__name__}: {error}".splitlines()[0],
                             "trace": trace})  # fmt: skip
            break
        faulthandler.cancel_dump_traceback_later()
    files.write_json(out, {})


if __name__ == "__main__":
    alone.begin()
    main(sys.argv[1:])
