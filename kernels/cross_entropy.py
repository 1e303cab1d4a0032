"""Cross-entropy of a linear map's outputs, which are formed some rows at a time and never kept.

    loss = sum over rows of (log sum_v exp(z_v) - z_w)      z = c(h W^T + b), c(l) = l, or cap tanh(l / cap)

for hidden states h [N, D], the unembedding W [V, D] and the wanted tokens w [N]; the soft-cap is Gemma 2's (arXiv
2408.00118, section 2). With p = softmax(z) and the one-hot rows e_w of the wanted

    dl = (p - e_w) c'(l)    dh = dl W    dW = dl^T h    db = sum over rows of dl    c'(l) = 1 - tanh(l / cap)^2

These depend on what comes after only by a factor: they are formed in the forward, where the logits are at hand
(Hsu et al. 2024, arXiv 2410.10989, section 3.2). So each logit is formed once, where checkpointing forms it twice.
Saved for the backward is dh, D numbers a row, and dW and db where these are trained.
"""

import torch
from torch.nn import functional as F

from .linear import product


def reference(hidden, weight, bias, wanted, cap=None):
    """The equation. hidden [N, D], weight [V, D], bias [V] or None, wanted int64 [N] -> a number."""
    logits = F.linear(hidden, weight, bias)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return (logits.logsumexp(-1) - logits[torch.arange(len(wanted)), wanted]).sum()


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, wanted, cap, size, members):
        needs = ctx.needs_input_grad[:3]
        dhidden, dweight, dbias = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((hidden, weight, bias), needs, strict=True)
        )
        losses = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, len(hidden), size):
            part, gold = hidden[start : start + size], wanted[start : start + size, None]
            real = gold >= 0
            gold = gold.clamp(min=0)
            logits = product(part, weight, bias).to(losses.dtype)
            bent = None
            if cap is not None:
                bent = logits.div_(cap).tanh_()
                logits = cap * bent
            likelihoods = torch.log_softmax(logits, -1)
            losses[start : start + size] -= (likelihoods.gather(1, gold) * real)[:, 0]
            if any(needs):
                d = likelihoods.exp_()
                d.scatter_add_(1, gold, d.new_full((len(d), 1), -1.0))
                if cap is not None:
                    d.mul_(1 - bent.square_())
                d = d.to(hidden.dtype)
                if dhidden is not None:
                    dhidden[start : start + size] = product(d, weight.T).mul_(real)
                if dweight is not None:
                    dweight.addmm_(d.mT, part * real)
                if dbias is not None:
                    dbias += (d * real).sum(0)
        ctx.save_for_backward(dhidden, dweight, dbias)
        return losses.view(members, -1).sum(1)

    @staticmethod
    def backward(ctx, dlosses):
        dhidden, dweight, dbias = ctx.saved_tensors
        if dhidden is not None:
            own = dlosses.to(dhidden.dtype)[:, None, None]  # each member's rows by its own
            dhidden = (dhidden.view(len(own), -1, dhidden.shape[-1]) * own).view(dhidden.shape)
        dweight, dbias = (None if d is None else d * dlosses.to(d.dtype) for d in (dweight, dbias))
        return dhidden, dweight, dbias, None, None, None, None


def linear_cross_entropy(hidden, weight, bias, wanted, cap=None, size=256, members=None):
    """The equation -> float32 or wider, a number; or [members], for as many parts of the rows, one after the other.

    Shapes are those of `reference`; a row whose `wanted` is below 0 has no part in the loss. The logits of `size` rows
    are formed at a time. The products are in the dtype that hidden, weight and bias share; softmax and sum are float32
    or wider. Raises ValueError for several members on weights that take a gradient.
    """
    if members is None:
        return LinearCrossEntropy.apply(hidden, weight, bias, wanted, cap, size, 1)[0]
    if members > 1 and (weight.requires_grad or bias is not None and bias.requires_grad):
        raise ValueError("weights that take a gradient can't be shared by several members")
    return LinearCrossEntropy.apply(hidden, weight, bias, wanted, cap, size, members)
