"""Rotary position embedding in one pass.

    y = cos x + sin swap(x)      swap: the halves of the r turned features change places; sin is -sin on the first half

Su et al. 2021 (arXiv 2104.09864), equation 34. As the rotation by the angle t f, its derivative is that by -t f:

    dx = cos dy - sin swap(dy)

The rotation of [B, H, T, E] is written in that order whatever that of x is (a projection's has tokens before heads), as
the products of attention read it. Only the tables, which all layers share, are saved for the backward.
"""

import torch


def reference(x, cosine, sine):
    """The equation. x [B, H, T, E], cosine and sine [B or 1, 1, T, r], r <= E; the other features stay as they are."""
    turned, kept = x.split([cosine.shape[-1], x.shape[-1] - cosine.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    return torch.cat([cosine * turned + sine * torch.cat([second, first], -1), kept], -1)


def turn(x, cosine, sine, direction):
    """x turned forth (`direction` 1) or back (-1), contiguous."""
    y = x.clone(memory_format=torch.contiguous_format)
    width = cosine.shape[-1]
    half = width // 2
    y[..., :width].mul_(cosine)
    y[..., :half].addcmul_(x[..., half:width], sine[..., :half], value=direction)
    y[..., half:width].addcmul_(x[..., :half], sine[..., half:], value=direction)
    return y


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cosine, sine):
        ctx.save_for_backward(cosine, sine)
        return turn(x, cosine, sine, 1)

    @staticmethod
    def backward(ctx, dy):
        return turn(dy, *ctx.saved_tensors, -1), None, None


def rotate(x, cosine, sine):
    """The equation; x of any strides, y contiguous. See `reference` for the shapes."""
    return Rotate.apply(x, cosine, sine)
