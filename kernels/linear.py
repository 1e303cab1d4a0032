"""The frozen linear map.

    y = x W^T + b        dx = dy W

with x [N, in], W [out, in] and b [out], which take no gradient: nothing is saved but W.

Where W is of another dtype than x (a base with `products = "bfloat16"`), x is rounded to W's, the product is taken in
that, summed in float32 and rounded once, and the rest is in x's: the result, the bias and what is added.

On a CPU where torch has MKL, products of float32 may go through oneDNN instead, which torch carries for its other
dtypes (`WAYS`, `using`). The sums are the same in another order. Which is faster depends on the CPU: a training
measures it (`training/choices.py`). On 2 cores of an AMD EPYC (AVX-512), with 448 to 1,664 rows, oneDNN takes 3% to 12%
less time at the widths of a small encoder (384, 1,152, 1,536), 5% to 30% at 576, 1,536, 2,048 and 8,192 (`python -m
benchmarks operators` has a line).
"""

from contextlib import contextmanager

import torch
from torch.nn import functional as F

WAYS = ("onednn", "mkl")
HAS_ONEDNN = (
    torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
ONEDNN = HAS_ONEDNN  # whether products of float32 go through it now


@contextmanager
def using(way):
    """Take one of `WAYS` for products of float32 in this block, where there are two; None changes nothing."""
    global ONEDNN
    before = ONEDNN
    if way is not None:
        ONEDNN = HAS_ONEDNN and way == "onednn"
    try:
        yield
    finally:
        ONEDNN = before


def reference(x, weight, bias=None):
    """The equation. x [..., in], weight [out, in], bias [out] or None -> [..., out]."""
    y = x @ weight.T
    return y if bias is None else y + bias


def compiles_code(device, dtype):
    """Whether products of this dtype go through oneDNN on this device now, which compiles code for each shape: that
    takes time, and the code stays in memory."""
    half = dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    return device.type == "cpu" and (half or dtype == torch.float32 and ONEDNN)


def by_name(x, weight):
    """Whether oneDNN is asked for this product by name; for bfloat16 torch takes it anyway."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not x.numel():
        return False
    return ONEDNN and x.dtype == weight.dtype == torch.float32


def product(x, weight, bias=None, plus=None):
    """The equation, + `plus` [..., out] if given, which may be written over; takes no gradient. Shapes as in
    `reference`, of any strides.

    In the dtype of the weight, from and to those of x, bias and plus.
    """
    if x.dtype != weight.dtype:
        y = F.linear(x.to(weight.dtype), weight)
        for added in (bias, plus):
            y = y if added is None else y + added
        return y.to(x.dtype)
    if not by_name(x, weight):
        if plus is not None and bias is None and x.ndim == 2:
            return plus.addmm_(x, weight.T)
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
