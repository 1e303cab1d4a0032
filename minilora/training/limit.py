"""The fastest possible training: the products that it must do, over the rate at which this machine does them."""

import time

import torch

from minilora.kernels.linear import product


def training_flops(spec, slots, method, length):
    """Floating-point operations of one training step, per token of rows of `length` tokens.

    A projection of `in` x `out` costs 2 in out forward, as much again for the gradient of its input where something
    trained lies below it, and as much for its weight where that is trained. Attention's two products of length x E a
    head cost 4 length D forward and twice that backward. Adapters, norms and the head are left out.
    """
    order = [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
    adapted = {tuple(name.split(".")[1:]) for name in slots}
    trained_below, flops = method == "full", 0
    for layer, here in enumerate(spec.layers):
        for number, stage in enumerate(order):
            adapted_here = False
            for target in stage:
                if target in spec.targets:
                    out_features, in_features = spec.shape(target, layer)
                    flops += 2 * in_features * out_features * (1 + trained_below + (method == "full"))
                    adapted_here |= (str(layer), target) in adapted
            trained_below |= adapted_here
            if number == 0:
                flops += 4 * length * here.heads * spec.head_width * (3 if trained_below else 1)
    return flops


def matmul_rate(tokens, spec, dtype, device, seconds=0.15):
    """Rate of the product of [tokens, D] and [D, F] now, in operations a second: the best of repeated runs."""
    inner = spec.layers[0].inner
    x = torch.randn(tokens, spec.width, dtype=dtype, device=device)
    w = torch.randn(inner, spec.width, dtype=dtype, device=device)
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        for _ in range(4):
            y = product(x, w)
        y[0, 0].item()  # waits for the device
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * tokens * spec.width * inner / best


def steady(*rates):
    """The largest of rates that were measured at several times, or None where they are not within 10% of each other.

    The limit of a busy machine is not known: other work took a part of it, before, after or while it was measured.
    """
    return max(rates) if min(rates) >= 0.9 * max(rates) else None
