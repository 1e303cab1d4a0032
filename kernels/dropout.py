"""Dropout whose mask depends only on where a number stands.

    y = x m / (1 - p),    m = [h >= p 2^32]        Srivastava et al. 2014 (JMLR 15), section 4, scaled in training

h is a hash of (key, salt, row, token, feature): `key` changes from step to step and from adapter to adapter, `salt`
from module to module. So a mask depends neither on the padding, nor on the device, nor on who else is in the batch: an
adapter of a population drops what it would drop in a run of its own. The hash is the 32-bit finaliser "lowbias32"
(C. Wellons, "Prospecting for hash functions", 2018, nullprogram.com): its arithmetic is modulo 2^32 on int32, where a
shift must be stripped of the sign. The mask is formed again in the backward; only the keys are saved.
"""

import torch

MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
STRIDE = 0x9E3779B1 - (1 << 32)  # odd: rows, tokens and features are spread over all 32 bits


def mix(h):
    """The hash of int32 numbers, in place."""
    for shift, multiplier in zip((16, 15), MULTIPLIERS, strict=True):
        h ^= (h >> shift) & ((1 << (32 - shift)) - 1)
        h *= multiplier
    h ^= (h >> 16) & 0xFFFF
    return h


def least_kept(p):
    """The least hash that stays, as int32, for a share `p` that is dropped."""
    return int(p * 2**32) - 2**31


def mask(shape, least, keys, salt):
    """Which numbers [K n, T, features] of K adapters stay, bool; `least` (`least_kept`) a number or int32 [K], `keys`
    int32 [K]."""
    rows, tokens, features = shape
    members = len(keys)

    def places(n):
        # Without ^ 0, Inductor takes the product for an index: its C++ counts with steps of STRIDE, whose overflow is
        # undefined there, and reads and writes beyond the end where n is no multiple of a vector's length.
        return (torch.arange(n, dtype=torch.int32, device=keys.device) ^ 0) * STRIDE

    h = mix((keys + salt)[:, None] + places(rows // members))  # [K, n]
    h = mix(h[..., None] + places(tokens))  # [K, n, T]
    h = mix(h[..., None] + places(features))  # [K, n, T, features], uniform over int32
    return (h >= (least[:, None, None, None] if torch.is_tensor(least) else least)).view(shape)


def shifted(key, rows):
    """The key under which the rows from 0 on drop what under `key` those from `rows` on do; both int32."""
    return (key + rows * STRIDE + (1 << 31)) % (1 << 32) - (1 << 31)


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, least, keys, salt):
        numbers = (p, least, keys)
        # A copy, because keys move on before a later step's backward.
        ctx.save_for_backward(*(one.clone() for one in numbers if torch.is_tensor(one)))
        ctx.numbers, ctx.salt = [None if torch.is_tensor(one) else one for one in numbers], salt
        return apply(x, *numbers, salt)

    @staticmethod
    def backward(ctx, dy):
        saved = iter(ctx.saved_tensors)
        numbers = [next(saved) if one is None else one for one in ctx.numbers]
        return apply(dy, *numbers, ctx.salt), None, None, None, None


def apply(x, p, least, keys, salt):
    whole = x.view(len(x), -1, x.shape[-1])
    kept = mask(whole.shape, least, keys, salt)
    if torch.is_tensor(p):
        p = p.repeat_interleave(len(x) // len(p), output_size=len(x))[:, None, None]
    return (whole * kept / (1 - p)).to(x.dtype).view(x.shape)


def dropout(x, p, keys, salt, least=None):
    """x [K n, T, features], or without T, with a share `p` dropped and the rest divided by 1 - p.

    `p` a number; or for K adapters a tensor [K], with `least` int32 [K], the `least_kept` of each.
    """
    return Dropout.apply(x, p, least_kept(p) if least is None else least, keys, salt)
