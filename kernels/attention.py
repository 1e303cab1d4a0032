"""Attention over short rows on a CPU, in batched products; else torch's own.

    o = p v,    p = softmax(c(s q k^T) + mask),    c(z) = z, or cap tanh(z / cap)

Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1, with scale s; the soft-cap is Gemma 2's (arXiv 2408.00118,
section 2); q [T, E], k and v [T, E] of one head. With dp = do v^T and z = s q k^T the derivatives are

    dv = p^T do    dz = p (dp - sum_j p_j dp_j) c'(z)    dq = s dz k    dk = s dz^T q    c'(z) = 1 - tanh(z / cap)^2

Grouped heads (Ainslie et al. 2023, arXiv 2305.13245) share a k and a v: the S queries of a group are stacked to one q
[S T, E], so that nothing is repeated and dk and dv are summed over the group by the product itself. Scores and softmax
are float32 or wider, and on a CPU scores are not rounded before it. Saved for the backward: q, k, v and p, which are
(H + 2 G) E + H T numbers a token for H heads in G groups. With a soft-cap z is formed again.

p takes T^2 numbers, and torch's own attention none: it is left for longer rows, and for accelerators.
"""

from contextlib import contextmanager

import torch
from torch.nn import functional as F

# The longest rows that take this way, unless a training has measured it on its machine (`training/choices.py`). Forward
# and backward, on 2 cores of an AMD EPYC with 12 heads of 32 or 9 of 64 in 3 groups, 1,024 tokens in all, it took of
# the time of torch's own: in float32 77% to 110% up to 48 tokens, least where T is no multiple of 16; in bfloat16 12%
# to 32% from 16 to 64, half at 128, 80% at 256. Beyond 128, p is what takes most memory.
LENGTHS = (16, 32, 48, 64, 96, 128)  # that it is measured at
LONGEST = {torch.float64: 48, torch.float32: 48, torch.bfloat16: 128}
LONG = LENGTHS[-1] + 1


@contextmanager
def using(dtype, longest):
    """Take rows of that dtype of up to `longest` tokens this way in this block; None changes nothing."""
    global LONGEST
    before = LONGEST
    if longest is not None:
        LONGEST = before | {dtype: longest}
    try:
        yield
    finally:
        LONGEST = before


def reference(q, k, v, mask, scale, cap=None):
    """The equation. q [B, H, T, E], k and v [B, G, T, E], additive mask that broadcasts to [B, H, T, T]."""
    k, v = (p.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for p in (k, v))
    scores = scale * (q @ k.mT)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    return torch.softmax(scores + mask, -1) @ v


def weights(q, k, mask, scale, cap=None):
    """p of the equation, float32 or wider [B, H, T, T]; the mask as in `attention`."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q.to(wide) @ k.to(wide).mT)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask is None:
        mask = scores.new_full(scores.shape[-2:], -torch.inf).triu_(1)
    return torch.softmax(scores + mask, -1)


def scores_of(q, k, scale, plus=None):
    """s q k^T + plus, float32 or wider [N, S T, T]; q [N, S T, E], k [N, T, E]. It takes the place of `plus`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.device.type == "cpu" or q.dtype == wide:
        q, k = q.to(wide), k.to(wide)
        return scaled(q, k.mT, scale) if plus is None else plus.baddbmm_(q, k.mT, alpha=scale)
    scores = torch.bmm(q, k.mT).to(wide).mul_(scale)  # here products of float32 are many times slower
    return scores if plus is None else scores.add_(plus)


def scaled(left, right, scale):
    """s left right for batches of matrices, without a pass for s."""
    nothing = left.new_empty(()).expand(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(nothing, left, right, beta=0, alpha=scale)


class Batched(torch.autograd.Function):
    """`attention` of all rows and groups in one batched product after the other."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale, cap):
        B, H, T, E = q.shape
        G = k.shape[1]
        q, k, v = (p.reshape(B * G, -1, E) for p in (q, k, v))  # [B G, S T, E] and [B G, T, E]
        # The product is added to the mask, which takes a pass less than the other way round.
        plus = q.new_empty(B * G, H // G * T, T, dtype=torch.promote_types(q.dtype, torch.float32))
        plus.view(B, G, -1, T, T).copy_(mask[:, :, None])
        if cap is None:
            scores = scores_of(q, k, scale, plus)
        else:
            scores = plus.add_(scores_of(q, k, scale / cap).tanh_(), alpha=cap)
        p = torch.softmax(scores, -1).to(v.dtype)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.cap, ctx.shape = scale, cap, (B, G, T, E)
        return torch.bmm(p, v).view(B, H, T, E)

    @staticmethod
    def backward(ctx, do):
        q, k, v, p = ctx.saved_tensors
        B, G, T, E = ctx.shape
        needs_q, needs_k, needs_v, *_ = ctx.needs_input_grad
        dq = dk = dv = None
        do = do.reshape(B * G, -1, E)
        if needs_v:
            dv = torch.bmm(p.mT, do).view(B, G, T, E)
        if needs_q or needs_k:
            wide = torch.promote_types(p.dtype, torch.float32)
            dp = torch.bmm(do, v.mT).to(wide)
            dz = torch.ops.aten._softmax_backward_data(dp, p.to(wide), -1, wide)
            if ctx.cap is not None:
                bent = scores_of(q, k, ctx.scale / ctx.cap).tanh_()
                dz.mul_(1 - bent.square_())
            dz = dz.to(p.dtype)
            dq = scaled(dz, k, ctx.scale).view(B, -1, T, E) if needs_q else None
            dk = scaled(dz.mT, q, ctx.scale).view(B, G, T, E) if needs_k else None
        return dq, dk, dv, None, None, None


def batched(q, k, v, mask, scale, cap=None):
    """The equation. q [B, H, T, E], k and v [B, G, T, E], mask [B or 1, 1, T or 1, T], all of any strides.

    The mask takes no gradient.
    """
    return Batched.apply(q, k, v, mask, scale, cap)


def way(kind, dtype, grouped, masked, T, cap=None):
    """How `attention` is computed on a device of that kind, by its name in torch:

    batched    by this module: soft-caps, which no kernel of torch's has, and short rows on a CPU
    torch      by torch's own attention
    grouped    the same, with fewer heads of k and v than of q
    expanded   the same, with k and v repeated for each head: on CUDA only flash attention takes grouped heads, which
               wants 16 bits and no mask; all else would fall back to plain products that keep the scores of all heads

    FlexAttention would take soft-caps and windows, but its derivatives exist for accelerators only, where it has to be
    compiled, so that no CPU can prove it right; windows are masks, as padding is.
    """
    if cap is not None or kind == "cpu" and T <= LONGEST.get(dtype, 0):
        return "batched"
    if not grouped:
        return "torch"
    flash = kind == "cuda" and dtype in (torch.bfloat16, torch.float16) and not masked
    return "grouped" if kind == "cpu" or flash else "expanded"


def attention(q, k, v, mask, scale, cap=None):
    """The equation in the way that is faster here. `mask` [B or 1, 1, T or 1, T], or None for a causal one."""
    T, groups = q.shape[2], k.shape[1]
    grouped = True if q.shape[1] != groups else False  # noqa: SIM210  of torch.compile's symbols sdpa takes none
    length = LONG if torch.compiler.is_compiling() else T  # compiled, a choice by size would be a graph each
    chosen = way(q.device.type, q.dtype, grouped, mask is not None, length, cap)
    if chosen == "batched":
        if mask is None:
            mask = torch.full((1, 1, T, T), -torch.inf, device=q.device).triu_(1)
        return batched(q, k, v, mask, scale, cap)
    if chosen == "expanded":
        k, v = (expanded(p, q.shape[1]) for p in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=chosen == "grouped"
    )


def expanded(part, heads):
    """k or v [B, G, T, E] with each group once for each of its heads, [B, H, T, E]."""
    B, G, T, E = part.shape
    return part[:, :, None].expand(B, G, heads // G, T, E).reshape(B, heads, T, E)
