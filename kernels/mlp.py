"""The inner features of a gated MLP, and the means to keep none of those that an activation gives.

    plain    h = f(u)            du = dh f'(u)
    gated    h = f(g) u          dg = dh u f'(g)    du = dh f(g)          Shazeer 2020 (arXiv 2002.05202), equation 5

for pre-activations g and u [N, inner]. Only these are saved for the backward: f(g) is formed again where it is needed,
a pass over [N, inner]. Where the projection that follows keeps its input h for an adapter of its own, `formed_again`
has autograd form that again too. The derivative of a plain h is written over dh, which nobody else needs: memory that
is new costs more than the arithmetic.
"""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

aten = torch.ops.aten


class Activation(NamedTuple):
    """f and, from d and the pre-activation, d f', which is written over d."""

    forward: object
    backward: object


def over(backward, **settings):
    """An activation's derivative in torch, (d, what it saves) -> d f', written over d."""
    return lambda d, saved: backward(d, saved, **settings, grad_input=d)


GELU = Activation(F.gelu, over(aten.gelu_backward.grad_input))
# Hendrycks and Gimpel 2016 (arXiv 1606.08415), section 2, with the tanh
GELU_TANH = Activation(partial(F.gelu, approximate="tanh"), over(aten.gelu_backward.grad_input, approximate="tanh"))
# By the names that Hugging Face's configurations have for them.
ACTIVATIONS = {
    "gelu": GELU,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "relu": Activation(F.relu, over(aten.threshold_backward.grad_input, threshold=0)),
    "sigmoid": Activation(torch.sigmoid, lambda d, x: over(aten.sigmoid_backward.grad_input)(d, torch.sigmoid(x))),
    "silu": Activation(F.silu, over(aten.silu_backward.grad_input)),
}


def reference(gate, up, activation):
    """The equation of a gated MLP; all [..., inner]."""
    return activation.forward(gate) * up


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation.forward(gate).mul_(up).view_as(up)  # see `norms.py`

    @staticmethod
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        needs_gate, needs_up, _ = ctx.needs_input_grad
        dup = ctx.activation.forward(gate).mul_(dh) if needs_up else None
        dgate = ctx.activation.backward(dh * up, gate) if needs_gate else None
        return dgate, dup, None


class Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, activation):
        ctx.save_for_backward(u)
        ctx.activation = activation
        return activation.forward(u)

    @staticmethod
    def backward(ctx, dh):
        [u] = ctx.saved_tensors
        return ctx.activation.backward(dh, u), None


def plain(u, activation):
    """f(u) [..., inner], for one reader such as a projection: its gradient, which that makes, is written over."""
    return activation.forward(u) if torch.compiler.is_compiling() else Plain.apply(u, activation)


def gated(gate, up, activation):
    """f(gate) up, all [..., inner]; `activation` is one of ACTIVATIONS."""
    return Gated.apply(gate, up, activation)


def formed_again(tensor, form):
    """A context in which autograd keeps nothing for `tensor`, and has `form()` give it again when it is needed.

    Under torch.compile, which chooses by itself what to keep, a context that does nothing.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()

    # Not the tensor itself: as long as anything that is saved here is kept, so is what these functions hold.
    known = tensor.data_ptr(), tensor.numel(), tensor.dtype

    def pack(saved):
        return saved.shape if (saved.data_ptr(), saved.numel(), saved.dtype) == known else saved

    def unpack(packed):
        return form().view(packed) if isinstance(packed, torch.Size) else packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
