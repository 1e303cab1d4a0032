"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, section 3.2.2) and its ways to longer rows.

A pair of features (x_j, x_{j + r/2}) of the r that are rotated turns by the angle t f_j at position t, with
f_j = theta^(-2j/r). The kinds change the frequencies f, and `longrope` and `yarn` also scale cosine and sine:

linear     f / factor                                   Chen et al. 2023 (arXiv 2306.15595)
llama3     f / factor for long wave lengths, f for short ones, a blend between    Llama 3.1's model card and code
yarn       a blend of f / factor and f along j          Peng et al. 2023 (arXiv 2309.00071), section 3.2
longrope   f / factor_j, other factors for rows longer than those trained on    Ding et al. 2024 (arXiv 2402.13753)
dynamic    f; rows longer than those trained on, where f would depend on the batch, are refused by spec.positions

Frequencies are computed in float32, step by step as transformers does, since a rounding in the first digits of f
becomes a visible angle at t = 10,000. `longrope` chooses by each row's own length, where transformers chooses by the
longest row of the batch: here a row does not depend on its mates.
"""

import math

import torch
from torch import nn


def default(rope):
    return 1.0 / rope.theta ** (torch.arange(0, rope.width, 2, dtype=torch.float32, device="cpu") / rope.width)


def linear(rope, factor):
    return default(rope) / factor, 1.0


def llama3(rope, factor, low_freq_factor, high_freq_factor, original):
    f = default(rope)
    wavelength = 2 * math.pi / f
    blend = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - blend) * f / factor + blend * f
    scaled = torch.where(wavelength > original / low_freq_factor, f / factor, blended)
    return torch.where(wavelength < original / high_freq_factor, f, scaled), 1.0


def yarn(rope, factor, original, attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate):
    def dimension(rotations):  # the pair that turns so often in `original` positions
        return rope.width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    def magnitude(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    ramp = (torch.arange(rope.width // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    turns = rope.theta ** (torch.arange(0, rope.width, 2, dtype=torch.float32, device="cpu") / rope.width)
    if attention_factor is None:
        own = mscale and mscale_all_dim
        attention_factor = magnitude(mscale) / magnitude(mscale_all_dim) if own else magnitude(1)
    return (1 / (factor * turns)) * (1 - keep) + (1 / turns) * keep, attention_factor


def longrope(rope, short_factor, long_factor, factor, original, attention_factor):
    exponent = torch.arange(0, rope.width, 2, dtype=torch.int64, device="cpu").float() / rope.width
    f = [1.0 / (torch.tensor(s, dtype=torch.float32, device="cpu") * rope.theta**exponent)
         for s in (short_factor, long_factor)]  # fmt: skip
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return torch.stack(f), attention_factor


KINDS = {"linear": linear, "llama3": llama3, "yarn": yarn, "longrope": longrope}


class Rotary(nn.Module):
    """The cosines and sines of one `spec.Rope`."""

    def __init__(self, rope):
        super().__init__()
        settings = dict(rope.settings)
        frequencies, self.magnitude = default(rope), 1.0
        if rope.kind in KINDS:
            frequencies, self.magnitude = KINDS[rope.kind](rope, **settings)
        self.original = settings.get("original")
        self.register_buffer("frequencies", frequencies, persistent=False)  # [r / 2], longrope: [2, r / 2]

    def forward(self, lengths, count, dtype):
        """(cosine, sine), each [1 or B, 1, `count`, r], for rows of `lengths` [B] tokens: see `kernels/rotary.py`."""
        frequencies = self.frequencies
        if frequencies.ndim == 2:
            frequencies = frequencies[(lengths > self.original).long()][:, None]  # [B, 1, r / 2]
        positions = torch.arange(count, device=frequencies.device, dtype=frequencies.dtype)
        angles = positions[:, None] * frequencies
        angles = angles[:, None] if angles.ndim == 3 else angles[None, None]
        cosine, sine = (angles.cos() * self.magnitude).to(dtype), (angles.sin() * self.magnitude).to(dtype)
        return torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)
