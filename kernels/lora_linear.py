"""The LoRA linear map: several projections of one input, each with an adapter or without.

    y = x W^T + b + s (x A^T) B^T          Hu et al. 2021 (arXiv 2106.09685), section 4.1, with scale s

with x [N, in], frozen W [out, in] and b [out], A [R, in], B [out, R]. Let g = s dy B [N, R]. The derivatives are

    dx = dy W + g A        dA = g^T x        dB = s dy^T (x A^T)

W and b take none. Projections of one x (q, k and v; gate and up) are the map with their W under one another: one
product forward, one sum of products for dx, and x is saved once. There are two ways (`FORMS`), which differ in the
forward only:

    side      the equation as it stands: the product, and two thin ones
    merged    x (W + s B A)^T, with the sum formed for this call only

The factors A under one another, and g side by side, make one product of several. Saved for the backward are x and the
factors, and no product: x A^T, [N, R], is formed again. Where A is frozen, x A^T
is saved instead of x. If nothing below takes a gradient, dx is left out.

A population has an operator of its own: `lora_groups.py`.

With dropout x~ goes to A instead of x, and takes g A instead of x: `seen`. Where x and the factors differ in
dtype, thin products are taken in the factors' own: in bfloat16 a small s B A would vanish in W + s B A. So there, and
with dropout, the side path is the only way.
"""

import torch
from torch.nn import functional as F

from .linear import product

FORMS = ("side", "merged")


def reference(x, weight, bias, A, B, scale):
    """The equation. x [..., in], weight [out, in], bias [out] or None, A [R, in], B [out, R] -> [..., out]."""
    return F.linear(x, weight, bias) + scale * (x @ A.T @ B.T)


def lora_linear(x, weight, bias, A, B, scale, seen=None, form="auto"):
    """The equation, with `seen` [..., in] instead of x before A if given. -> [..., out]. See `lora_linears`."""
    [y] = lora_linears(x, [(weight, bias, A, B, scale)], seen, form)
    return y


def lora_linears(x, projections, seen=None, form="auto"):
    """The equation for each (weight, bias, A, B, scale) of `projections`; A and B are None where there is no adapter.

    x [..., in], weight [out, in], bias [out] or None, A [R, in], B [out, R], scale a number -> [..., out] each. `form`:
    one of FORMS, or auto, which takes the one that moves less memory, if it is exact here. Raises ValueError for a
    form that is not exact here.
    """
    possible = exact_forms(x, projections, seen)
    if form == "auto":
        form = FORMS[1] if FORMS[1] in possible and merging_moves_less(x, projections) else FORMS[0]
    elif form not in possible:
        raise ValueError(f"the form {form!r} is not exact here, as these are: {', '.join(possible)}")
    tensors = [tensor for weight, bias, A, B, _ in projections for tensor in (weight, bias, A, B)]
    return Projections.apply(form, [scale for *_, scale in projections], x, seen, *tensors)


def exact_forms(x, projections, seen=None):
    """Those of FORMS that are exact for these tensors: both, or only the side path."""
    adapted = [(weight, A) for weight, _, A, _, _ in projections if A is not None]
    alike = all(x.dtype == weight.dtype == A.dtype for weight, A in adapted)
    return FORMS if alike and seen is None and x.dtype in (torch.float32, torch.float64) else FORMS[:1]


def merging_moves_less(x, projections):
    """Whether reading and writing each W moves no more than reading x, and reading and writing y, for each adapter."""
    if torch.compiler.is_compiling():  # a choice by size would be a graph each
        return True
    rows, in_features = x.numel() // x.shape[-1], x.shape[-1]
    merged = sum(2 * weight.numel() for weight, *_ in projections)
    side = sum(rows * (in_features + 2 * len(weight)) for weight, _, A, *_ in projections if A is not None)
    return merged <= side


def rows_of(x):
    """The rows of x [..., in], [N, in]."""
    return x.reshape(-1, x.shape[-1])


def together(parts, dim):
    """The matrices side by side (1) or under one another (0): a copy, where there are several."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def add_product(y, left, right):
    """y += left right, for matrices or batches of them; the product in its own dtype."""
    if left.dtype != y.dtype:
        return y.add_(left @ right)
    return y.addmm_(left, right) if y.ndim == 2 else y.baddbmm_(left, right)


def scaled_product(left, right, scale):
    """scale left right, in one pass."""
    return torch.addmm(left.new_empty(len(left), right.shape[1]), left, right, beta=0, alpha=scale)


class Projections(torch.autograd.Function):
    """`lora_linears` in the form asked for; the tensors of the projections come one after the other, four of each."""

    @staticmethod
    def forward(ctx, form, scales, x, seen, *tensors):
        weights, biases, As, Bs = (tensors[i::4] for i in range(4))
        source = x if seen is None else seen
        flat = x.reshape(-1, x.shape[-1])
        sizes = [len(weight) for weight in weights]
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = biases[0]
        if len(biases) > 1 and any(b is not None for b in biases):
            bias = torch.cat([x.new_zeros(n) if b is None else b for b, n in zip(biases, sizes, strict=True)])
        lows = [None] * len(weights)
        if form == "merged":
            whole = whole.clone() if len(weights) == 1 else whole
            for part, A, B, scale in zip(whole.split(sizes), As, Bs, scales, strict=True):
                if A is not None:
                    part.addmm_(B, A, alpha=scale)
            ys = product(flat, whole, bias).split(sizes, 1)
        else:
            ys = product(flat, whole, bias).split(sizes, 1)
            there = [number for number, A in enumerate(As) if A is not None]
            if there:
                A = together([As[number] for number in there], 0)
                found = (rows_of(source.to(A.dtype)) @ A.mT).split([len(As[number]) for number in there], 1)
                for number, low in zip(there, found, strict=True):
                    lows[number], y, B, scale = low, ys[number], Bs[number], scales[number]
                    if low.dtype == y.dtype:
                        y.addmm_(low, B.mT, alpha=scale)
                    else:
                        y.add_(low @ B.mT, alpha=scale)
        ctx.set_materialize_grads(False)
        ctx.scales, ctx.shape, ctx.dtype, ctx.apart = scales, x.shape, x.dtype, seen is not None
        ctx.saves_source = any(ctx.needs_input_grad[6::4])
        kept = [source] if ctx.saves_source else lows  # lows where A is frozen (LoRA-FA)
        if not ctx.saves_source and form == "merged":
            kept = [None if A is None else flat @ A.T for A in As]
        ctx.save_for_backward(*weights, *As, *Bs, *kept)
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)

    @staticmethod
    def backward(ctx, *dys):
        count, saved = len(dys), ctx.saved_tensors  # read once: what was packed is unpacked each time
        weights, As, Bs, kept = (saved[i * count : (i + 1) * count] for i in range(4))
        needs_x, needs_seen = ctx.needs_input_grad[2], ctx.apart and ctx.needs_input_grad[3]
        below = needs_seen if ctx.apart else needs_x
        dx = None
        gradients = [None] * (4 * count)
        for dy, weight in zip(dys, weights, strict=True):
            if needs_x and dy is not None:
                dy = dy.reshape(-1, dy.shape[-1])
                dx = product(dy, weight.T, plus=dx)
        dseen = torch.zeros(ctx.shape, dtype=ctx.dtype, device=weights[0].device) if needs_seen else None
        there = [number for number, A in enumerate(As) if A is not None and dys[number] is not None]
        if not there:
            return None, None, None if dx is None else dx.view(ctx.shape), dseen, *gradients
        needs = {number: ctx.needs_input_grad[6 + 4 * number : 8 + 4 * number] for number in there}
        own = [rows_of(dys[number].to(As[number].dtype)) for number in there]
        A, ranks = together([As[number] for number in there], 0), [len(As[number]) for number in there]
        wide = rows_of(kept[0].to(A.dtype)) if ctx.saves_source else None
        lows = (wide @ A.mT).split(ranks, 1) if ctx.saves_source else [kept[number] for number in there]
        for number, dy, low in zip(there, own, lows, strict=True):
            if needs[number][1]:
                gradients[4 * number + 3] = scaled_product(dy.mT, low, ctx.scales[number])
        needs_any_A = any(needs_A for needs_A, _ in needs.values())
        if below or needs_any_A:
            gs = []
            for number, dy in zip(there, own, strict=True):
                gs.append(scaled_product(dy, Bs[number], ctx.scales[number]))
            g = together(gs, 1)
        if needs_any_A:
            for number, dA in zip(there, (g.mT @ wide).split(ranks), strict=True):
                gradients[4 * number + 2] = dA if needs[number][0] else None
        if below:
            add_product(dseen.view(-1, ctx.shape[-1]) if ctx.apart else dx, g, A)
        return None, None, None if dx is None else dx.view(ctx.shape), dseen, *gradients
