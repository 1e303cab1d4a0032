"""The DoRA linear map, without a W + s B A made for its norms.

    y = x W'^T + b,    W' = g V,    g = m / n,    V = W + s B A,    n = the norm of each row of V

Liu et al. 2024 (arXiv 2402.09353), section 4.1, with x [N, in], W and V [out, in], A [R, in], B [out, R] and m, n, g
[out]. n is a constant to the gradient (section 4.3), so that with z = x V^T and u = g dy, both [N, out],

    dm = sum over rows of dy z / n        dx, dA, dB = those of the LoRA linear map z at its derivative u

(see `lora_linear.py`). The norms follow from the factors, since the rows w of W and b of B give

    n^2 = |w + s b A|^2 = |w|^2 + 2 s (w A^T) . b + s^2 (b A A^T) . b

|w|^2 is known; the rest takes R out in products a call and R (in + out) numbers, where V would take out in. It costs
what R more rows of x would. The sum loses digits where it nearly cancels: where s B A takes away all but a small part
of a row of W, the relative error of n is that of float32 times (|w| / n)^2. A bfloat16 W is widened for the
call to W A^T, out in float32 numbers.

With dropout, `seen` x~ in place of x goes through the adapter and not through the base, as PEFT has it, and `factor` f
multiplies what the adapter changes; f = 1 and x~ = x is the equation above:

    y = x W^T + b + f (g x~ V^T - x~ W^T)
"""

import torch
from torch.nn import functional as F

from .linear import linear
from .lora_linear import lora_linear


def reference(x, weight, bias, A, B, magnitude, scale):
    """The equation. x [..., in], weight [out, in], bias [out] or None, A [R, in], B [out, R], magnitude [out]."""
    direction = weight + scale * B @ A
    norms = direction.norm(dim=1).detach()
    return F.linear(x, (magnitude / norms)[:, None] * direction, bias)


@torch.no_grad()
def row_norms(weight, squares, A, B, scale):
    """The norms n [out] of the rows of weight + scale B A; `squares` [out] are the squared norms of weight's."""
    cross = F.linear(weight.to(A.dtype), A)  # [out, R]
    return (squares + scale * (B * (2 * cross + scale * (B @ (A @ A.T)))).sum(1)).sqrt()


def dora_linear(x, weight, bias, A, B, magnitude, squares, scale, seen=None, factor=1.0, form="auto"):
    """The equation, -> [..., out]; x, `seen` and weight share one dtype, the factors, magnitude and squares another."""
    kept = x if seen is None else seen
    gain = magnitude / row_norms(weight, squares, A, B, scale)
    y = (gain * lora_linear(kept, weight, None, A, B, scale, form=form)).to(x.dtype)
    if seen is None and factor == 1:
        return y if bias is None else y + bias
    return linear(x - factor * kept, weight, bias) + factor * y
