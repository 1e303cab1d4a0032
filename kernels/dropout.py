"""Dropout whose mask depends only on where a number stands.

    y = x m / (1 - p),    m = [h >= p 2^32]        Srivastava et al. 2014 (JMLR 15), section 4, scaled in training

h is a hash of (key, salt, row, token, feature): `key` changes from step to step and from adapter to adapter, `salt`
from module to module. So a mask depends neither on the padding, nor on the device, nor on who else is in the batch: an
adapter of a population drops what it would drop in a run of its own. The hash is the 32-bit finaliser "lowbias32"
(C. Wellons, "Prospecting for hash functions", 2018, nullprogram.com): its arithmetic is modulo 2^32 on int32, where a
shift must be stripped of the sign. The mask is formed again in the backward: saved are the hashes of the tokens, before
the features are mixed in. Modules that see the same x have their masks in one go, except on a CPU, whose cache they
would leave.
"""

import torch

MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
STRIDE = 0x9E3779B1 - (1 << 32)  # odd: rows, tokens and features are spread over all 32 bits


def mix(h):
    """The hash of int32 numbers, in place."""
    fold(h)
    h *= MULTIPLIERS[0]
    h ^= (h >> 15) & ((1 << 17) - 1)
    h *= MULTIPLIERS[1]
    return fold(h)


def fold(h):
    """h ^= h >> 16 without the sign, in place: on an accelerator as one operation, on the halves of the numbers."""
    if h.device.type == "cpu" or torch.compiler.is_compiling():
        h ^= (h >> 16) & 0xFFFF
    else:
        halves = h.view(torch.int16).unflatten(-1, (-1, 2))  # the lower one first
        halves[..., 0].bitwise_xor_(halves[..., 1])
    return h


def least_kept(p):
    """The least hash that stays, as int32, for a share `p` that is dropped."""
    return int(p * 2**32) - 2**31


def places(n, device):
    """What rows, tokens and features add to the hash, int32 [n]."""
    # Without ^ 0, Inductor takes the product for an index: its C++ counts with steps of STRIDE, whose overflow is
    # undefined there, and reads and writes beyond the end where n is no multiple of a vector's length.
    return (torch.arange(n, dtype=torch.int32, device=device) ^ 0) * STRIDE


def hash_tokens(keys, salts, rows, tokens):
    """The hashes of each token before those of its features, int32 [S, K, rows, T]; `keys` [K], `salts` [S], int32."""
    h = mix((keys + salts[:, None])[..., None] + places(rows, keys.device))  # [S, K, n]
    return mix(h[..., None] + places(tokens, keys.device))


def keep(hashes, spread, least):
    """Which numbers stay, bool [..., K, n, T, features], by the hashes [..., K, n, T] and what the features add,
    `spread` [features]; `least` as in `mask`."""
    h = mix(hashes[..., None] + spread)  # uniform over int32
    return h >= (least[:, None, None, None] if torch.is_tensor(least) else least)


def mask(shape, least, keys, salt):
    """Which numbers [K n, T, features] of K adapters stay, bool; `least` (`least_kept`) a number or int32 [K], `keys`
    int32 [K]."""
    rows, tokens, features = shape
    hashes = hash_tokens(keys, keys.new_full((1,), salt), rows // len(keys), tokens)
    return keep(hashes, places(features, keys.device), least).view(shape)


class Hashes:
    """`hash_tokens` of all modules of a model, made in one go for each content of `keys` and each shape.

    On a GPU each operation is a launch, however few numbers it has. `salts`: the modules' numbers.
    """

    def __init__(self, keys, salts):
        self.keys, self.made, self.version, self.spreads = keys, {}, None, {}
        self.places = {salt: place for place, salt in enumerate(salts)}
        self.salts = torch.tensor(salts, dtype=torch.int32, device=keys.device)

    def of(self, salts, rows, tokens, features):
        """Those of some of the modules, int32 [S, K, rows, T], and what features add, int32 [features]."""
        if torch.compiler.is_compiling():  # which joins operations by itself
            own = torch.stack([self.salts[self.places[salt]] for salt in salts])
            return hash_tokens(self.keys, own, rows, tokens), places(features, self.keys.device)
        if self.version != self.keys._version:
            self.made, self.version = {}, self.keys._version
        if (rows, tokens) not in self.made:
            self.made[rows, tokens] = hash_tokens(self.keys, self.salts, rows, tokens)
        if features not in self.spreads:
            self.spreads[features] = places(features, self.keys.device)
        own = torch.stack([self.made[rows, tokens][self.places[salt]] for salt in salts])
        return own, self.spreads[features]


def shifted(key, rows):
    """The key under which the rows from 0 on drop what under `key` those from `rows` on do; both int32."""
    return (key + rows * STRIDE + (1 << 31)) % (1 << 32) - (1 << 31)


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, least, hashes, spread):
        numbers = (p, least)
        ctx.save_for_backward(hashes, spread, *(one for one in numbers if torch.is_tensor(one)))
        ctx.numbers = [None if torch.is_tensor(one) else one for one in numbers]
        parts = hashes.split(1) if x.device.type == "cpu" else [hashes]
        return tuple(y for part in parts for y in drop(x[None], *numbers, part, spread).unbind())

    @staticmethod
    def backward(ctx, *dys):
        hashes, spread, *saved = ctx.saved_tensors
        saved = iter(saved)
        numbers = [next(saved) if one is None else one for one in ctx.numbers]
        if len(dys) > 1 and dys[0].device.type != "cpu":
            return drop(torch.stack(dys), *numbers, hashes, spread).sum(0), None, None, None, None
        dxs = [drop(dy[None], *numbers, part, spread)[0] for dy, part in zip(dys, hashes.split(1), strict=True)]
        dx = dxs[0]
        for other in dxs[1:]:
            dx += other
        return dx, None, None, None, None


def drop(x, p, least, hashes, spread):
    """x [1 or S, ...] as a mask leaves it, for each of `hashes` [S, K, n, T]: [S, ...]."""
    kept = keep(hashes, spread, least)
    if torch.is_tensor(p):
        p = p[:, None, None, None]
    whole = x.view(len(x), *kept.shape[1:])
    return (whole * kept / (1 - p)).to(x.dtype).view(len(hashes), *x.shape[1:])


def dropout(x, p, keys, salt, least=None):
    """x [K n, T, features], or without T, with a share `p` dropped and the rest divided by 1 - p.

    `p` a number; or for K adapters a tensor [K], with `least` int32 [K], the `least_kept` of each.
    """
    rows, tokens, features = size_of(x, keys)
    hashes = hash_tokens(keys, keys.new_full((1,), salt), rows, tokens)
    return dropouts(x, p, hashes, places(features, keys.device), least)[0]


def dropouts(x, p, hashes, spread, least=None):
    """As `dropout`, for modules that drop apart: a tuple, one for each of `hashes` [S, K, n, T] (`Hashes.of`)."""
    return Dropout.apply(x, p, least_kept(p) if least is None else least, hashes, spread)


def size_of(x, keys):
    """(n, T, features) of x [K n, T, features], or without T."""
    return len(x) // len(keys), x.shape[1] if x.dim() > 2 else 1, x.shape[-1]
