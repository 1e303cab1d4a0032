"""The LoRA linear map and two ways to compute it.

    y = x W^T + b + s (x A^T) B^T          Hu et al. 2021 (arXiv 2106.09685), section 4.1, with scale s

with x [N, in], frozen W [out, in] and b [out], A [R, in], B [out, R]. Let g = s dy B [N, R]. The derivatives are

    dx = dy W + g A        dA = g^T x        dB = s dy^T (x A^T)

W takes none. *Side path* computes the equation as it stands. *Merged* forms W + s B A once and makes one product of
it: fewer passes over the activations. Its backward is the same as above: it needs only x, dy and the factors, so
W + s B A is not kept. The two agree to rounding in float32; in bfloat16 a small s B A vanishes in the sum, so there,
and with dropout on the side path's input, only the side path is right.
"""

import torch
from torch.nn import functional as F


def reference(x, weight, bias, A, B, scale):
    """The equation. x [..., in], weight [out, in], bias [out] or None, A [R, in], B [out, R] -> [..., out]."""
    return F.linear(x, weight, bias) + scale * (x @ A.T @ B.T)


def side_path(x, weight, bias, A, B, scale, dropout=0.0):
    """The equation with `dropout` on the input of A, and the factors' product in the factors' own dtype."""
    low = F.linear(F.dropout(x, dropout).to(A.dtype), A)  # [..., R]
    return F.linear(x, weight, bias) + F.linear(low * scale, B).to(x.dtype)


class Merged(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, A, B, scale):
        return F.linear(x, torch.addmm(weight, B, A, alpha=scale), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, A, B, ctx.scale = inputs
        ctx.save_for_backward(x, weight, A, B)

    @staticmethod
    def backward(ctx, dy):
        x, weight, A, B = ctx.saved_tensors
        flat_dy = dy.reshape(-1, dy.shape[-1])  # [N, out]
        flat_x = x.reshape(-1, x.shape[-1])  # [N, in]
        g = (flat_dy @ B).mul_(ctx.scale)  # [N, R]
        dx = torch.addmm(flat_dy @ weight, g, A).view_as(x) if ctx.needs_input_grad[0] else None
        dA = g.T @ flat_x if ctx.needs_input_grad[3] else None
        dB = (flat_dy.T @ (flat_x @ A.T)).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        return dx, None, None, dA, dB, None


def merged(x, weight, bias, A, B, scale):
    """The equation through W + s B A. All tensors share one dtype."""
    return Merged.apply(x, weight, bias, A, B, scale)


def lora_linear(x, weight, bias, A, B, scale, dropout=0.0):
    """The faster of the two ways that is exact here.

    Forming W + s B A takes R in out products and the side path N R (in + out), so merged wins with many rows N.
    """
    out_features, in_features = weight.shape
    rows = x.numel() // in_features
    exact = dropout == 0 and x.dtype == weight.dtype == A.dtype and x.dtype in (torch.float32, torch.float64)
    if exact and rows * (in_features + out_features) > in_features * out_features:
        return merged(x, weight, bias, A, B, scale)
    return side_path(x, weight, bias, A, B, scale, dropout)
