"""What the machine can do at most, measured: products of matrices and moves of memory, per second.

`python -m benchmarks.limits limits JOB OUT BEGAN` measures them for a job, as `benchmarks.peers` does a peer.
"""

import sys
import time
from types import SimpleNamespace

import torch

from minilora import files
from minilora.base import checkpoint, families
from minilora.training.limit import matmul_rate

from .job import Job

STREAM_BYTES = 1 << 28  # more than any cache holds


def stream_rate(device, size=STREAM_BYTES, seconds=0.5):
    """Bytes a second that a copy reads and writes, taken together: the best of repeated runs."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        target.copy_(source)
        target[0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def product_rate(shape, dtype, device, seconds=0.15):
    """FLOP/s of the product of a batch's tokens by an MLP's up; `shape` has B, T, D and I."""
    spec = SimpleNamespace(width=shape.D, layers=[SimpleNamespace(inner=shape.I)])
    return matmul_rate(shape.B * shape.T, spec, dtype, device, seconds)


def measure(tokens, spec, device, seconds=0.5):
    """{"float32": FLOP/s, "bfloat16": FLOP/s, "memory": bytes/s}, the products of a batch's `tokens` by an MLP's up."""
    rates = {name: matmul_rate(tokens, spec, getattr(torch, name), device, seconds)
             for name in ("float32", "bfloat16")}  # fmt: skip
    return rates | {"memory": stream_rate(device, seconds=seconds)}


def main(argv):
    _, folder, out, _ = argv
    job = Job.read(folder)
    encoded, _ = job.encode(job.train)
    tokens = job.cell.batch_size * len(encoded.ids) // len(job.train)
    files.write_json(out, measure(tokens, families.read_spec(checkpoint.read_config(job.base)), job.device))


if __name__ == "__main__":
    main(sys.argv[1:])
