"""Choices between ways that differ only in speed, memory and rounding, made by measurement and kept.

There is one: whether products of float32 go through oneDNN or MKL on a CPU that has both (`kernels/linear.py`). Which
is faster depends on the CPU, so that the base's own products are run a few times each way, for some 50 ms.

A choice changes the last digits of an adapter. So it is made once for what it depends on: the CPU, torch, the number of
threads and the shapes of the products, which all cells of a grid on one base share. It is kept in minilora's cache, and
does not change from run to run. It is recorded in results.json (`choices`), and in the state of a run, which goes on as
it began.
"""

import time

import torch

from minilora import files, parallel
from minilora.errors import InputError
from minilora.kernels import linear
from minilora.runs.record import hardware
from minilora.training.limit import products

TOKENS = 512  # of the products that are measured: about those of a pass on a CPU
SECONDS = 0.05
GAIN = 1.03  # how many times as fast oneDNN must be: its code for each number of tokens takes memory


def of(members, first):
    """{"products": one of `linear.WAYS`} for members that share a base; {} where there is nothing to choose.

    A run that goes on after step `first` keeps the choices that it began with; one of an older version has none.
    """
    if first:
        return members[0].meters["choices"]
    return parallel.broadcast_object(lambda: choose(members[0].setting))


def choose(setting):
    """The choices for a `Setting`'s base on this machine: those in the cache, or else measured and put there."""
    if setting.device.type != "cpu" or setting.dtype != torch.float32 or not linear.HAS_ONEDNN:
        return {}
    times = products(setting.spec, {}, "head")
    path, key = files.cache() / "choices.json", circumstances(setting.device, times)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(f"{path}.lock"):  # of runs that start together all take what the first has measured
            kept = read(path)
            if kept.get(key) not in linear.WAYS:
                kept[key] = faster(measured(times))
                files.write_json(path, kept)
            return {"products": kept[key]}
    except OSError:  # what cannot be kept might be another choice in the next run
        return {"products": linear.WAYS[0]}


def circumstances(device, times):
    """What the choice depends on, as one line."""
    found, shapes = hardware(device), sorted({(in_features, out_features) for in_features, out_features, _ in times})
    return ", ".join([
        found["processor"], torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}",
        f"{found['threads']} threads", *(f"{in_features}x{out_features}" for in_features, out_features in shapes),
    ])  # fmt: skip


def read(path):
    """What the cache holds, {circumstances: choice}; {} for a file that is missing or damaged."""
    try:
        return files.read_json(path)
    except InputError:
        return {}


def measured(times):
    """Seconds that the forward products of a step take in each way, {way: seconds}; the ways in turn, the best of each.

    `times`: as `limit.products` gives it.
    """
    shapes = {(in_features, out_features) for in_features, out_features, _ in times}
    tensors = {(i, o): (torch.randn(TOKENS, i), torch.randn(o, i)) for i, o in shapes}
    best, stop = {way: dict.fromkeys(shapes, float("inf")) for way in linear.WAYS}, time.perf_counter() + SECONDS
    for number in range(1000):
        if number > 2 and time.perf_counter() > stop:
            break
        for way, shortest in best.items():
            with linear.using(way):
                for shape, (x, weight) in tensors.items():
                    start = time.perf_counter()
                    linear.product(x, weight)
                    shortest[shape] = min(shortest[shape], time.perf_counter() - start)
    return {way: sum(shortest[i, o] * count for (i, o, _), count in times.items()) for way, shortest in best.items()}


def faster(seconds):
    """The choice, from what `measured` gives."""
    return "onednn" if GAIN * seconds["onednn"] < seconds["mkl"] else "mkl"
