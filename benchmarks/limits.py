"""What the machine can do at most, measured: products of matrices and moves of memory, per second.

`python -m benchmarks.limits limits JOB OUT BEGAN` measures them for a job, as `benchmarks.peers` does a peer.
"""

import sys
import time

import torch

from minilora import files
from minilora.base import checkpoint, families
from minilora.lora.targets import plan_slots
from minilora.training.limit import matmul_rate, products

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
    return matmul_rate(shape.B * shape.T, {(shape.D, shape.I, "forward"): 1}, dtype, device, seconds)


def measure(tokens, times, device, seconds=0.5):
    """{"float32": FLOP/s, "bfloat16": FLOP/s, "memory": bytes/s}; the first two at the products of a step of `tokens`,
    each counted as often as the step does it (`times`: see `limit.products`)."""
    rates = {name: matmul_rate(tokens, times, getattr(torch, name), device, seconds)
             for name in ("float32", "bfloat16")}  # fmt: skip
    return rates | {"memory": stream_rate(device, seconds=seconds)}


def main(argv):
    _, folder, out, _ = argv
    job = Job.read(folder)
    encoded, _ = job.encode(job.train)
    tokens = job.cell.batch_size * len(encoded.ids) // len(job.train)
    spec = families.read_spec(checkpoint.read_config(job.base))
    times = products(spec, plan_slots(spec, job.cell), job.cell.method)
    files.write_json(out, measure(tokens, times, job.device))


if __name__ == "__main__":
    main(sys.argv[1:])
