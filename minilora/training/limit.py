"""The fastest possible training: the products that it must do, over the rate at which this machine does them."""

import time
from collections import Counter

import torch

from minilora.kernels.linear import product

STAGES = [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]  # of a layer: each has one input


def stages(spec, slots, method):
    """The products of a layer's weights, one for each stage and layer, as (layer, targets, in, out, below, trained).

    A stage's projections are one product, `out` features in all. `below`: its input takes a gradient, because something
    is trained below it; `trained`: its weight takes one.
    """
    adapted = {tuple(name.split(".")[1:]) for name in slots}
    below = trained = method == "full"
    for layer in range(len(spec.layers)):
        for stage in STAGES:
            targets = [target for target in stage if target in spec.targets]
            shapes = [spec.shape(target, layer) for target in targets]
            yield layer, targets, shapes[0][1], sum(out_features for out_features, _ in shapes), below, trained
            below |= any((str(layer), target) in adapted for target in targets)


def products(spec, slots, method):
    """How often a step does each product of its tokens by weights: {(in, out, kind): times}.

    Kinds: `forward` [tokens, in] by [in, out], `input` [tokens, out] by [out, in] and `weight` [out, tokens] by
    [tokens, in], the gradients of input and weight. Each costs 2 in out operations a token.
    """
    found = Counter()
    for _, _, in_features, out_features, below, trained in stages(spec, slots, method):
        kinds = ["forward"] + ["input"] * below + ["weight"] * trained
        found.update((in_features, out_features, kind) for kind in kinds)
    return dict(found)


def operations(times):
    """Of all `products`, per token."""
    return sum(2 * in_features * out_features * count for (in_features, out_features, _), count in times.items())


def training_flops(spec, slots, method, length):
    """Floating-point operations of one training step, per token of rows of `length` tokens.

    Those of `products`, and attention's two products of length x E a head: 4 length D forward and twice that backward
    where something is trained at or below them. Adapters, norms and the head are left out.
    """
    flops = operations(products(spec, slots, method))
    for layer, targets, _, _, below, _ in stages(spec, slots, method):
        if "o" in targets:  # what reaches o has come through attention
            here = spec.layers[layer]
            flops += 4 * length * here.heads * spec.head_width * (3 if below else 1)
    return flops


def matmul_rate(tokens, times, dtype, device, seconds=0.15):
    """The rate of a step's `products` (`times`, as these give it) now, in operations a second.

    The products are done in turn for about `seconds` in all, twice at least, and the shortest time of each counts as
    often as the step does it. Attention's products are not among them: their operations count at the same rate.
    """
    at_once = 1 if torch.device(device).type == "cpu" else 8  # waiting for a GPU takes as long as a small product
    runs = {key: one_product(tokens, *key, dtype, device) for key in times}
    best, stop = dict.fromkeys(times, float("inf")), time.perf_counter() + seconds
    rounds = 0
    while rounds < 2 or time.perf_counter() < stop:
        rounds += 1
        for key, run in runs.items():
            start = time.perf_counter()
            for _ in range(at_once):
                y = run()
            y[0, 0].item()  # waits for the device
            best[key] = min(best[key], (time.perf_counter() - start) / at_once)
    return tokens * operations(times) / sum(best[key] * count for key, count in times.items())


def one_product(tokens, in_features, out_features, kind, dtype, device):
    """A function that does the product once, and returns it."""
    x = torch.randn(tokens, in_features, dtype=dtype, device=device)
    dy = torch.randn(tokens, out_features, dtype=dtype, device=device)
    weight = torch.randn(out_features, in_features, dtype=dtype, device=device)
    kinds = {"forward": lambda: product(x, weight), "input": lambda: product(dy, weight.T), "weight": lambda: dy.T @ x}
    return kinds[kind]


def steady(*rates):
    """The largest of rates that were measured at several times, or None where they are not within 10% of each other.

    The limit of a busy machine is not known: other work took a part of it, before, after or while it was measured.
    """
    return max(rates) if min(rates) >= 0.9 * max(rates) else None
