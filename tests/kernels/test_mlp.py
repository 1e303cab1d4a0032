"""Activations, gated MLPs and what autograd keeps of them."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from minilora.kernels import mlp as op

SHAPES = [(1, 1), (7, 13), (2, 3, 33)]
EQUATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}
EQUATIONS |= {name: EQUATIONS["gelu_new"] for name in ("gelu_fast", "gelu_pytorch_tanh")}


def inputs(shape, dtype):
    draw = torch.Generator().manual_seed(len(shape))
    return [(2 * torch.randn(*shape, generator=draw, dtype=torch.float64)).to(dtype) for _ in range(2)]


def outputs(function, gate, up, trained=("gate", "up")):
    leaves = [p.detach().clone().requires_grad_(name in trained) for name, p in (("gate", gate), ("up", up))]
    h = function(*leaves)
    h.backward(torch.linspace(-1, 2, h.numel(), dtype=h.dtype, device=h.device).view_as(h))
    return [h.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_gated_values_and_gradients(dtype, tolerance, device):
    cases = 0
    for name, activation in op.ACTIVATIONS.items():
        for shape in SHAPES:
            gate, up = (p.to(device) for p in inputs(shape, dtype))
            found = outputs(lambda g, u, a=activation: op.gated(g, u, a), gate, up)
            wanted = outputs(lambda g, u, f=EQUATIONS[name]: f(g) * u, gate.double(), up.double())
            for one, other in zip(found, wanted, strict=True):
                assert one.dtype == dtype
                within = tolerance * max(1.0, other.abs().max().item())
                torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=within)
            cases += 1
    assert cases == 21 and set(EQUATIONS) == set(op.ACTIVATIONS)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_plain_values_and_gradients(dtype, tolerance, device):
    cases = 0
    for name, activation in op.ACTIVATIONS.items():
        for shape in SHAPES:
            u, dh = (p.to(device) for p in inputs(shape, dtype))
            leaf, wide = u.clone().requires_grad_(), u.double().requires_grad_()
            h, wanted, passed = op.plain(leaf, activation), EQUATIONS[name](wide), dh.clone()
            h.backward(passed)
            wanted.backward(dh.double())
            assert h.dtype == leaf.grad.dtype == dtype and torch.equal(leaf, u)
            assert torch.equal(passed, leaf.grad)  # which it was written over
            for one, other in ((h, wanted), (leaf.grad, wide.grad)):
                within = tolerance * max(1.0, other.abs().max().item())
                torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=within)
            cases += 1
    assert cases == 21


def test_gradcheck():
    for activation in op.ACTIVATIONS.values():
        parts = [p.requires_grad_() for p in inputs((5, 3), torch.float64)]
        assert torch.autograd.gradcheck(lambda *p, a=activation: op.gated(*p, a), parts)


def test_no_gradient_where_none_is_asked_for():
    gate, up = inputs((4, 6), torch.float64)
    for trained in (("gate",), ("up",)):
        _, *gradients = outputs(lambda g, u: op.gated(g, u, op.ACTIVATIONS["silu"]), gate, up, trained)
        assert [g is not None for g in gradients] == [name in trained for name in ("gate", "up")]


def test_compiles_without_graph_breaks():
    def layer(gate, up, down):
        h = op.gated(gate, up, op.ACTIVATIONS["silu"])
        with op.formed_again(h, lambda: op.gated(gate, up, op.ACTIVATIONS["silu"])):
            return F.linear(h, down)

    down = torch.linspace(-1, 1, 39).view(3, 13).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((7, 13), (2, 5, 13)):
        gate, up = inputs(shape, torch.float32)
        found, wanted = (outputs(lambda g, u, f=f: f(g, u, down), gate, up) for f in (compiled, layer))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_what_is_formed_again_is_not_kept_and_gives_the_same_gradients():
    weight, formed, gradients = torch.linspace(-1, 2, 15, dtype=torch.float64).view(3, 5), [], []
    for again in (False, True):
        u, w = inputs((6, 5), torch.float64)[0].requires_grad_(), weight.clone().requires_grad_()
        h = F.gelu(u)
        with op.formed_again(h, lambda u=u: formed.append(1) or F.gelu(u)) if again else nullcontext():
            y = F.linear(h.view(2, 3, 5), w)  # which keeps h in another shape
        assert not formed
        kept = weakref.ref(h)
        del h
        assert again == (kept() is None)
        y.square().sum().backward()
        gradients.append((u.grad, w.grad))
    assert formed == [1]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_nothing_is_hooked_without_gradients():
    with torch.no_grad(), op.formed_again(torch.ones(2), None) as context:
        assert context is None
