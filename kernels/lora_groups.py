"""The LoRA linear map of a population: K adapters beside one frozen map, grouped by rank.

    y = x W^T + b + (x_k A_k^T) B_k^T, x_k the rows of member k        the scale s is in A: see `training/state.py`

The rows of x [K n, in] are K equal parts, one after the other. Neighbours of about the same rank are a group, with
factors A [K_g, R, in] and B [K_g, out, R]: a lower rank is padded with zeros, which is exact and stays so, because a
row of A and the column of B that are both 0 have derivatives that are 0. One product with W serves all members; thin
products are one batch for each group. Let g = dy B [K_g, n, R]:

    dx = dy W + g A        dA = g^T x        dB = dy^T (x A^T)

Several projections of one x (q, k and v; gate and up) have their W under one another, and in each group their A: x A^T,
g, dA and the adapters' share of dx are one product for all of them. With P projections a group costs 2 + P launches
forward and 3 + 2 P backward. Saved are x, the A and the B; x A^T is formed again. With dropout A is given x~ instead of
x, and takes g A instead of it: `seen`. Thin products are taken in the factors' dtype.
"""

import torch
from torch.nn import functional as F

from .linear import product
from .lora_linear import add_product


def reference(x, weight, bias, A, B, seen=None):
    """The equation. x [K n, ..., in], `A` and `B` lists of K matrices [R_k, in] and [out, R_k] -> [K n, ..., out]."""
    parts = (x if seen is None else seen).chunk(len(A))
    return F.linear(x, weight, bias) + torch.cat([part @ a.T @ b.T for part, a, b in zip(parts, A, B, strict=True)])


def lora_groups(x, projections, counts, seen=None):
    """The equation for each (weight, bias, As, Bs) of `projections`, with `seen` instead of x before the A if given.

    x [K n, ..., in], weight [out, in], bias [out] or None -> [K n, ..., out] each. `counts`: the K_g of each group;
    As and Bs have a tensor for each group, or None where none of its members adapts this projection.
    """
    tensors = [tensor for weight, bias, As, Bs in projections for tensor in (weight, bias, *As, *Bs)]
    return Groups.apply(counts, x, seen, *tensors)


class Groups(torch.autograd.Function):
    """`lora_groups`; the tensors of the projections come one after the other, each with its weight and bias first."""

    @staticmethod
    def forward(ctx, counts, x, seen, *tensors):
        span = 2 + 2 * len(counts)
        weights, biases = tensors[::span], tensors[1::span]
        As = [tensors[2 + g :: span] for g in range(len(counts))]
        Bs = [tensors[2 + len(counts) + g :: span] for g in range(len(counts))]
        source = x if seen is None else seen
        outs = [len(weight) for weight in weights]
        whole, bias = torch.cat(weights) if len(weights) > 1 else weights[0], None
        if any(b is not None for b in biases):
            biases = [x.new_zeros(n) if b is None else b for b, n in zip(biases, outs, strict=True)]
            bias = torch.cat(biases) if len(biases) > 1 else biases[0]
        ys = product(x.reshape(-1, x.shape[-1]), whole, bias).split(outs, 1)
        wholes = []  # of each group the A under one another, [K_g, R, in], or None
        for members, own_A, own_B in zip(slices(counts), As, Bs, strict=True):
            there = [A for A in own_A if A is not None]
            wholes.append(None if not there else there[0] if len(there) == 1 else torch.cat(there, 1))
            if there:
                wide = by_member(source, counts)[members].to(there[0].dtype)
                low = wide @ wholes[-1].mT  # [K_g, n, R]
                for y, B, ranks in zip(ys, own_B, slices(map(rank_of, own_A)), strict=True):
                    if B is not None:
                        add_product(by_member(y, counts)[members], low[..., ranks], B.mT)
        ctx.counts, ctx.outs, ctx.apart = counts, outs, seen is not None
        ctx.ranks = [[rank_of(A) for A in own] for own in As]
        ctx.save_for_backward(source, *weights, *wholes, *(B for own in Bs for B in own))
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)

    @staticmethod
    def backward(ctx, *dys):
        counts, P = ctx.counts, len(dys)
        source, *saved = ctx.saved_tensors  # read once: what was packed is unpacked each time
        weights, wholes, Bs = saved[:P], saved[P : P + len(counts)], saved[P + len(counts) :]
        needs_x, needs_seen = ctx.needs_input_grad[1], ctx.apart and ctx.needs_input_grad[2]
        dy = torch.cat(dys, -1) if P > 1 else dys[0]
        dy = dy.reshape(-1, dy.shape[-1])  # [K n, all out]
        dx = dseen = None
        if needs_x:
            dx = product(dy, (torch.cat(weights) if P > 1 else weights[0]).T)
        if needs_seen:
            dseen = torch.zeros_like(source).view(-1, source.shape[-1])
        below = dseen if ctx.apart else dx
        dAs, dBs = [], []
        for number, (members, A) in enumerate(zip(slices(counts), wholes, strict=True)):
            ranks = ctx.ranks[number]
            if A is None:
                dAs.append([None] * P)
                dBs.append([None] * P)
                continue
            wide, own_dy = (by_member(tensor, counts)[members].to(A.dtype) for tensor in (source, dy))
            low = wide @ A.mT
            g = torch.empty_like(low)
            dBs.append([])
            for B, own, outs in zip(Bs[number * P :], slices(ranks), slices(ctx.outs)):
                if B is not None:
                    g[..., own].baddbmm_(own_dy[..., outs], B, beta=0)  # beside one another, without a copy
                dBs[-1].append(None if B is None else own_dy[..., outs].mT @ low[..., own])
            parts = iter((g.mT @ wide).split([rank for rank in ranks if rank], 1))
            dAs.append([next(parts) if rank else None for rank in ranks])
            if below is not None:
                add_product(by_member(below, counts)[members], g, A)
        gradients = [one for p in range(P) for one in (None, None, *(d[p] for d in dAs), *(d[p] for d in dBs))]
        shaped = (None if d is None else d.view(source.shape) for d in (dx, dseen))
        return None, *shaped, *gradients


def rank_of(A):
    return 0 if A is None else A.shape[1]


def by_member(tensor, counts):
    """The rows of a tensor [K n, ..., width] as [K, n ..., width]."""
    return tensor.reshape(sum(counts), -1, tensor.shape[-1])


def slices(sizes):
    """The slices of so many that follow one another."""
    stop = 0
    for size in sizes:
        yield slice(stop, stop + size)
        stop += size
