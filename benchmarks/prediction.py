"""`python -m benchmarks prediction`: the test rows of a cell predicted, by minilora and by transformers with PEFT.

Both have the same rows, start and head, adapters merged into the weights, no autograd, and rows of like length
together; PEFT's side takes the fastest of some batch sizes. Repeats are interleaved in one process, and the fastest of
each counts, as of the products that the limit is made of: the operations that the rows need, over the machine's rate
at products of a batch's size.
"""

import tempfile
import time

from minilora.cell import Cell
from minilora.command import Parser, add_flags, given_flags
from minilora.errors import InputError
from minilora.fields import marked

from . import job, peers

SIZES = (16, 32, 64)  # rows of a batch that PEFT's side may take


def main(argv):
    parser = Parser(prog="python -m benchmarks prediction", description=__doc__.partition("\n\n")[0])
    group = parser.add_argument_group("measurement")
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="interleaved runs of each (default: 3)")
    group.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    add_flags(parser, Cell, only=marked(Cell, "peers"))
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        raise InputError(f"--repeats is {arguments.repeats}, but must be at least 1")
    results = measure(Cell(train_rows=1000).replace(**given_flags(arguments, Cell)), arguments.repeats)
    for name, side in results["sides"].items():
        print(f"{name:<22} {side['rows_per_second']:8,.1f} rows/s {side['limit_share']:6.1%} of the limit")
    print(f"limit                  {results['limit_rows_per_second']:8,.1f} rows/s, "
          f"{results['rate'] / 1e9:,.0f} GFLOP/s; logits differ by at most {results['difference']:.1e}")  # fmt: skip


def measure(cell, repeats):
    """{"sides": {name: its rows a second, and their share of the limit}, the limit, and how far the logits differ}."""
    import numpy as np

    from minilora.training.limit import matmul_rate, products, training_flops

    with tempfile.TemporaryDirectory() as folder:
        shared = job.write(cell, folder, 0)
        encoded, _ = shared.encode(shared.tests["clean"])
        ours, spec = minilora_side(shared, encoded)
        sides = {"minilora": ours} | {f"peft merged, {n} rows": peft_side(shared, encoded, n) for n in SIZES}
        seconds, rates, logits = {name: [] for name in sides}, [], {}
        for _ in range(repeats):
            for name, run in sides.items():
                began = time.perf_counter()
                logits[name] = run()
                seconds[name].append(time.perf_counter() - began)
                tokens = int(cell.batch_size * np.diff(encoded.offsets).max())
                dtype = next(iter(ours.model.base.parameters())).dtype
                rates.append(matmul_rate(tokens, products(spec, {}, "head"), dtype, shared.device))
    lengths, rate = np.diff(encoded.offsets), max(rates)
    needed = sum(int(length) * training_flops(spec, {}, "head", int(length)) for length in lengths) / len(lengths)
    found = {name: len(lengths) / min(times) for name, times in seconds.items()}
    best = max(list(found)[1:], key=found.get)
    return {
        "sides": {name: {"rows_per_second": found[name], "limit_share": needed * found[name] / rate}
                  for name in ("minilora", best)},
        "rate": rate,
        "limit_rows_per_second": rate / needed,
        "difference": float(np.abs(logits["minilora"] - logits[best]).max()),
    }  # fmt: skip


def minilora_side(shared, encoded):
    """(A function that predicts the rows, with its `model`; the base's spec)."""
    import torch

    from minilora.base import model
    from minilora.lora import storage
    from minilora.lora.layer import merged_meanwhile
    from minilora.tasks.classification import Classifier, of_rows

    cell = shared.cell
    base = model.load(shared.base, getattr(torch, cell.dtype), shared.device)
    head = storage.load(shared.folder / "start", base)
    classifier = Classifier(base, cell.pooling, len(head["weight"]))
    classifier.set_head(head["weight"], head["bias"])

    def run():
        with merged_meanwhile(base):
            return of_rows(classifier, encoded, shared.pad_id, cell.batch_size)

    run.model = classifier
    return run, base.spec


def peft_side(shared, encoded, size):
    """A function that predicts the rows in batches of `size`."""
    import numpy as np
    import torch

    from minilora.data import batches

    model = peers.pooled(peers.peft_base(shared).merge_and_unload(), shared).eval()
    lengths = np.diff(encoded.offsets)
    order, sizes = np.argsort(-lengths, kind="stable"), np.unique(lengths)

    @torch.inference_mode()
    def run():
        logits = np.zeros((len(order), model.classifier.out_features), np.float32)
        for start in range(0, len(order), size):
            batch = batches.collate([(encoded, order[start : start + size], None)], sizes, shared.pad_id)
            inputs = {name: value.to(shared.device) for name, value in peers.as_keywords(batch).items()}
            logits[order[start : start + size]] = model(**inputs)["logits"].float().cpu().numpy()
        return logits

    return run
