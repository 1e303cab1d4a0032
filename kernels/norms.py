"""LayerNorm and RMSNorm with frozen weights, over the last of the features, D in number.

    RMSNorm      y = w x r          r = 1 / sqrt(mean(x^2) + eps)       Zhang and Sennrich 2019 (1910.07467), equation 4
    LayerNorm    y = w z + b        z = (x - mean(x)) r                 Ba et al. 2016 (1607.06450), equation 4,
                                    r = 1 / sqrt(var(x) + eps)          with eps

Weights take no gradient. With u = w dy

    RMSNorm      dx = r (u - x r mean(u x r))
    LayerNorm    dx = r (u - mean(u) - z mean(u z))

torch has a kernel for the second on the CPU. The first is the second for x of mean 0 and deviation 1 / r, without
r mean(u), which is added again.

Saved for the backward are r of each row and, of RMSNorm, x. LayerNorm saves its result y, which the projections after
it save as their input anyway, and not x, which nobody else needs: z = (y - b) / w (as the shared input of Yang et al.
2024, 2406.16282). That loses digits where w is small beside b: such weights are left to torch's own, which saves x.
Inside it is float32 or wider, and rounded once at the end. In bfloat16 y has too few digits to form z of: torch's own
again. On an accelerator torch's own are one pass each.
"""

import torch
from torch.nn import functional as F

INVERTIBLE = 0.01  # the least |w| / (1 + |b|) with which z is formed of y: at most some 200 roundings of float32


def reference(x, weight, eps):
    """The equation of RMSNorm. x [..., D], weight [D]."""
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def layer_reference(x, weight, bias, eps):
    """The equation of LayerNorm. x [..., D], weight and bias [D]."""
    z = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + eps)
    return weight * z + bias


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        # A view, because torch 2.11 compiles a wrong gradient where what an in-place operation gives is returned.
        return (wide * r).mul_(weight.to(r.dtype)).to(x.dtype).view_as(x)

    @staticmethod
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        dy, wide, weight = dy.to(r.dtype), x.to(r.dtype), weight.to(r.dtype)
        sums = (dy @ weight).unsqueeze(-1) * r / x.shape[-1]
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy, wide, weight.shape, torch.zeros_like(r), r, weight, None, [True, False, False]
        )
        return dx.add_(sums).to(x.dtype), None, None


def rms_norm(x, weight, eps):
    """The equation, in the way that is faster here; weight [D] may be wider than x [..., D] -> [..., D] as x.

    A weight that takes a gradient has one.
    """
    if x.device.type == "cpu" and not weight.requires_grad:
        return RMSNorm.apply(x, weight, eps)
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, _, r = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(y, weight, bias, r)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, weight, bias, r = ctx.saved_tensors
        shift = torch.zeros_like(weight) if bias is None else -bias / weight
        x = torch.addcmul(shift, y, 1 / weight).div_(r)  # less its mean
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, weight.shape, torch.zeros_like(r), r, weight, bias, [True, False, False]
        )
        return dx, None, None, None


def layer_norm(x, weight, bias, eps):
    """The equation, in the way that keeps less; weight [D] and bias [D] or None, x [..., D] -> [..., D].

    Weights that take a gradient have one.
    """
    trained = weight.requires_grad or bias is not None and bias.requires_grad
    if not trained and x.requires_grad and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        # Compiled, a choice by value would be a graph each.
        if not torch.compiler.is_compiling() and invertible(weight, bias):
            return LayerNorm.apply(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def invertible(weight, bias):
    return bool((weight.abs() >= INVERTIBLE * (1 if bias is None else 1 + bias.abs())).all())
