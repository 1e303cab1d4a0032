"""LoRA by hand: the layer, and the verbs that put it on a base and take it off.

`attach`, `detach`, `merge`, `unmerge`, `scale`. The base's own tensors are never written to: merging swaps in a new
weight and keeps the old one aside, so that nothing drifts and `detach` gives the base back bit for bit. What this
module does not know: triggers, heads, files (`adapter.py`).
"""

import hashlib
import math

import torch
from torch import nn

from .errors import InputError
from .kernels.lora_linear import lora_linear


class LoRALinear(nn.Module):
    """A frozen linear map with a trained low-rank one beside it: see `kernels/lora_linear.py` for the equation.

    `A` [R, in] starts uniform in +-1/sqrt(in) and `B` [out, R] at zero, so that training starts at the base
    (Hu et al. 2021, section 4.1; the range is that of their published code). Both are float32.
    """

    def __init__(self, linear, slot, dropout=0.0, generator=None):
        super().__init__()
        self.linear = linear
        self.slot = slot
        self.scale = slot.scale
        self.dropout = dropout
        self.base_weight = None  # the frozen weight, kept aside while merged
        device = linear.weight.device
        bound = 1 / math.sqrt(linear.in_features)
        # Drawn on the CPU, so that every device starts from the same adapter.
        A = torch.empty(slot.rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, slot.rank, device=device))

    def forward(self, x):
        if self.merged:
            return self.linear(x)
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.linear.weight, self.linear.bias, self.A, self.B, self.scale, dropout)

    @property
    def merged(self):
        return self.base_weight is not None

    @torch.no_grad()
    def delta(self):
        """s B A [out, in], in float32."""
        return self.scale * (self.B @ self.A)

    @torch.no_grad()
    def merge(self):
        if not self.merged:
            self.base_weight = self.linear.weight
            merged = (self.base_weight.float() + self.delta()).to(self.base_weight.dtype)
            self.linear.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self):
        if self.merged:
            self.linear.weight, self.base_weight = self.base_weight, None


def named_layers(model):
    """The (name, LoRALinear) pairs on a model, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def attach(model, slots, dropout=0.0, seed=0):
    """Put an adapter on every module named in `slots` ({module name: coverage.Slot}); freeze everything else.

    Each A is drawn from a stream of its own, made of `seed` and the module's name: adding a target leaves the
    others as they were, and a smaller rank starts with the first rows of a larger one.
    Raises InputError if there is an adapter already.
    """
    if named_layers(model):
        raise InputError("the base carries an adapter already: detach it first")
    model.requires_grad_(False)
    for name, slot in slots.items():
        owner, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner)
        layer = LoRALinear(getattr(owner, leaf), slot, dropout, generator(seed, name))
        layer.train(model.training)
        setattr(owner, leaf, layer)
    return model


def detach(model):
    """Take the adapter off: the base is again what it was, bit for bit."""
    for name, layer in named_layers(model):
        layer.unmerge()
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer.linear)
    return model


def merge(model):
    """Fold the adapter into the weights that the forward uses (Hu et al. 2021, section 4.1); merging twice is once."""
    for _, layer in named_layers(model):
        layer.merge()
    return model


def unmerge(model):
    """Undo `merge`: the very tensors of before."""
    for _, layer in named_layers(model):
        layer.unmerge()
    return model


def scale(model, factor):
    """Multiply every layer's own scale (of its slot) by `factor`; 0 is the base, 1 the adapter as trained.

    Raises InputError while the adapter is merged.
    """
    for name, layer in named_layers(model):
        if layer.merged:
            raise InputError(f"the adapter of {name} is merged: unmerge it before scaling it")
        layer.scale = factor * layer.slot.scale
    return model


def generator(seed, purpose):
    """A CPU random generator of its own for each (seed, purpose)."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
