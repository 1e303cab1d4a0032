"""The frozen linear map.

    y = x W^T + b        dx = dy W

with x [N, in], W [out, in] and b [out], which take no gradient: nothing is saved but W.

Where W is of another dtype than x (a base with `products = "bfloat16"`), x is rounded to W's, the product is taken in
that, summed in float32 and rounded once, and the rest is in x's: the result, the bias and what is added.

On a CPU where torch has MKL, products of float32 go through oneDNN, which torch carries for its other dtypes. The sums
are the same in another order. On 2 cores of an AMD EPYC (AVX-512), with 448 to 1,664 rows: 3% to 12% less time at the
widths of a small encoder (384, 1,152, 1,536), 5% to 30% at 576, 1,536, 2,048 and 8,192 (`python -m benchmarks
operators` has a line).
"""

import torch
from torch.nn import functional as F

ONEDNN = (
    torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def reference(x, weight, bias=None):
    """The equation. x [..., in], weight [out, in], bias [out] or None -> [..., out]."""
    y = x @ weight.T
    return y if bias is None else y + bias


def product(x, weight, bias=None, plus=None):
    """The equation, + `plus` [..., out] if given; takes no gradient. Shapes as in `reference`, of any strides.

    In the dtype of the weight, from and to those of x, bias and plus.
    """
    if x.dtype != weight.dtype:
        y = F.linear(x.to(weight.dtype), weight)
        for added in (bias, plus):
            y = y if added is None else y + added
        return y.to(x.dtype)
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel()
    if not (ONEDNN and plain) or torch.compiler.is_compiling():
        y = F.linear(x, weight, bias)
        return y if plus is None else y.add_(plus)
    if plus is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, plus, weight, bias, "add")


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        [weight] = ctx.saved_tensors
        return product(dy, weight.T), None, None


def linear(x, weight, bias=None):
    """The equation; weights that take a gradient have one."""
    if weight.requires_grad or bias is not None and bias.requires_grad:
        return F.linear(x, weight, bias)
    return Linear.apply(x, weight, bias)
