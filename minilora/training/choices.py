"""Choices between ways that differ only in speed, memory and rounding, made by measurement on a CPU and kept.

    products   "onednn" or "mkl": what float32 products go through on a CPU that has both (`kernels/linear.py`)
    attention  the longest rows, in tokens, whose attention is ours: torch's own takes the longer ones
               (`kernels/attention.py`)

Which is faster depends on the CPU. So the base's own products and heads are run a few times each way, for some 200 ms.

A choice changes the last digits of an adapter. So it is made once for what it depends on: the CPU, torch, the number of
threads and the shapes, which all cells of a grid on one base share. It is kept in minilora's cache, and does not change
from run to run. It is recorded in results.json (`choices`), and in the state of a run, which goes on as it began.
"""

import time

import torch

from minilora import files, parallel
from minilora.errors import InputError
from minilora.kernels import attention, linear
from minilora.runs.record import hardware
from minilora.training.limit import products

TOKENS = 512  # of what is measured: about those of a pass on a CPU
SECONDS = 0.05  # of a measurement
GAIN = 1.03  # how many times as fast oneDNN must be: its code for each number of tokens takes memory


def of(members, first):
    """{name: choice}, both text, for members that share a base; {} where there is nothing to choose.

    A run that goes on after step `first` keeps the choices that it began with; one of an older version has none.
    """
    if first:
        return members[0].meters["choices"]
    return parallel.broadcast_object(lambda: choose(members[0].setting))


def choose(setting):
    """The choices for a `Setting`'s base on this machine: those in the cache, or else measured and put there."""
    if setting.device.type != "cpu":
        return {}
    on = circumstances(setting.device)
    lengths = tuple(map(str, (attention.LONGEST.get(setting.dtype, 0), 0, *attention.LENGTHS)))
    found = {"attention": kept(f"{on}, {heads_line(setting)}", lengths, lambda: longest(attention_times(setting)))}
    if setting.dtype == torch.float32 and linear.HAS_ONEDNN:
        times = products(setting.spec, {}, "head")
        found["products"] = kept(f"{on}, {shapes_line(times)}", linear.WAYS, lambda: faster(measured(times)))
    return found


def kept(key, ways, pick):
    """The one of `ways` that the cache has under `key`, or else what `pick` finds, put there.

    Where nothing can be kept it is the first of them.
    """
    path = files.cache() / "choices.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(f"{path}.lock"):  # of runs that start together all take what the first has measured
            found = read(path)
            if found.get(key) not in ways:
                found[key] = pick()
                files.write_json(path, found)
            return found[key]
    except OSError:  # what cannot be kept might be another choice in the next run
        return ways[0]


def circumstances(device):
    """What any choice depends on, as one line."""
    found = hardware(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{found['processor']}, {capability}, torch {torch.__version__}, {found['threads']} threads"


def shapes_line(times):
    shapes = sorted({(in_features, out_features) for in_features, out_features, _ in times})
    return ", ".join(f"{in_features}x{out_features}" for in_features, out_features in shapes)


def heads_line(setting):
    here = setting.spec.layers[0]
    dtype = str(setting.dtype).removeprefix("torch.")
    return f"{here.heads} heads in {here.kv_heads} of {setting.spec.head_width}, {dtype}"


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

    def run(way, shape):
        with linear.using(way):
            linear.product(*tensors[shape])

    best = least([(way, shape) for way in linear.WAYS for shape in shapes], run)
    return {way: sum(best[way, (i, o)] * count for (i, o, _), count in times.items()) for way in linear.WAYS}


def attention_times(setting):
    """{(way, T): seconds} of attention forward and backward, over rows of T tokens, ours (`batched`) and torch's."""
    here, E = setting.spec.layers[0], setting.spec.head_width
    given = {}
    for T in attention.LENGTHS:
        rows = max(1, TOKENS // T)
        shapes = [(rows, heads, T, E) for heads in (here.heads, here.kv_heads, here.kv_heads)]
        states = [torch.randn(shape, dtype=setting.dtype, requires_grad=True) for shape in shapes]
        given[T] = states, torch.zeros(rows, 1, 1, T, dtype=setting.dtype), torch.randn(shapes[0], dtype=setting.dtype)

    def run(way, T):
        (q, k, v), mask, do = given[T]
        with attention.using(setting.dtype, T if way == "batched" else 0):
            torch.autograd.grad(attention.attention(q, k, v, mask, E**-0.5), (q, k, v), do)

    return least([(way, T) for way in ("batched", "torch") for T in attention.LENGTHS], run)


def least(cases, run):
    """{case: the least seconds of `run(*case)`}; the cases in turn."""
    best, stop = dict.fromkeys(cases, float("inf")), time.perf_counter() + SECONDS
    for number in range(1000):
        if number > 2 and time.perf_counter() > stop:
            break
        for case in cases:
            start = time.perf_counter()
            run(*case)
            best[case] = min(best[case], time.perf_counter() - start)
    return best


def faster(seconds):
    """The choice of products, from what `measured` gives."""
    return "onednn" if GAIN * seconds["onednn"] < seconds["mkl"] else "mkl"


def longest(seconds):
    """The choice of attention, from what `attention_times` gives: up to which length ours is the faster in total."""
    gains, total = {0: 0.0}, 0.0
    for T in attention.LENGTHS:
        total += seconds["torch", T] - seconds["batched", T]
        gains[T] = total
    return str(max(gains, key=gains.get))
