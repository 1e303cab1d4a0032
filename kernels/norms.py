"""RMSNorm with a frozen weight.

    y = w x r      r = 1 / sqrt(mean(x^2) + eps)          Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4

over the last of the features, D in number; the weight takes no gradient. With u = w dy

    dx = r (u - x r mean(u x r))

That of a LayerNorm whose mean is 0 and whose deviation is 1 / r is r (u - mean(u) - x r mean(u x r)), for which torch
has a kernel on the CPU: r mean(u) is added to it again. Inside it is float32 or wider, and rounded once at the end.
Saved for the backward are x, and r of each row.

LayerNorm has no operator here: torch's own saves x and two numbers a row, takes no gradient of a frozen weight, and is
one pass forward and one backward. torch's RMSNorm is made of several on the CPU; on an accelerator it is one pass.
"""

import torch
from torch.nn import functional as F


def reference(x, weight, eps):
    """The equation. x [..., D], weight [D]."""
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight.to(r.dtype)).to(x.dtype)

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
