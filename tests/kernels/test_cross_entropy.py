"""The linear cross-entropy against the equation, in values and gradients, in parts of every size."""

import pytest
import torch

from minilora.kernels import cross_entropy as op

SHAPES = [(1, 1, 2), (7, 5, 11), (12, 8, 33), (5, 3, 3)]  # N, D, V


def inputs(N, D, V, dtype, bias=True):
    draw = torch.Generator().manual_seed(N + V)
    hidden, weight, shift = (
        torch.randn(*size, generator=draw, dtype=torch.float64).to(dtype) for size in ((N, D), (V, D), (V,))
    )
    return hidden, weight, shift if bias else None, torch.randint(V, (N,), generator=draw)


def outputs(function, hidden, weight, bias, wanted, *settings, trained=("hidden",)):
    named = (("hidden", hidden), ("weight", weight), ("bias", bias))
    leaves = [None if t is None else t.detach().clone().requires_grad_(name in trained) for name, t in named]
    loss = function(*leaves, wanted, *settings)
    (1.7 * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias"), ("weight",)])
def test_values_and_gradients(dtype, tolerance, trained, device):
    cases = 0
    for shape in SHAPES:
        for bias in (False, True):
            for cap in (None, 0.9):
                arguments = [t if t is None else t.to(device) for t in inputs(*shape, dtype, bias)]
                exact = [t if t is None or not t.is_floating_point() else t.double() for t in arguments]
                wanted = outputs(op.reference, *exact, cap, trained=trained)
                for size in (1, 3, 100):
                    found = outputs(op.linear_cross_entropy, *arguments, cap, size, trained=trained)
                    assert found[0].dtype == torch.promote_types(dtype, torch.float32)
                    for one, other in zip(found, wanted, strict=True):
                        assert (one is None) == (other is None)
                        if one is not None:
                            within = tolerance * max(1.0, other.abs().max().item())
                            torch.testing.assert_close(one.double(), other, rtol=0, atol=within)
                    cases += 1
    assert cases == 48


def test_gradcheck():
    for cap in (None, 0.9):
        hidden, weight, bias, wanted = inputs(5, 3, 7, torch.float64)
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        assert torch.autograd.gradcheck(
            lambda h, w, b, c=cap, y=wanted: op.linear_cross_entropy(h, w, b, y, c, 2), leaves
        )


def test_each_logit_is_formed_once_and_few_at_a_time(monkeypatch):
    formed = []
    real = op.product
    monkeypatch.setattr(op, "product", lambda h, w, *a: (len(w) == 33 and formed.append(len(h))) or real(h, w, *a))
    outputs(op.linear_cross_entropy, *inputs(12, 8, 33, torch.float32), None, 5)
    assert formed == [5, 5, 2]


def test_large_logits():
    hidden, weight, bias, wanted = inputs(7, 5, 11, torch.float32)
    found = outputs(op.linear_cross_entropy, 3e3 * hidden, weight, bias, wanted)
    for one, other in zip(found, outputs(op.reference, 3e3 * hidden, weight, bias, wanted), strict=True):
        torch.testing.assert_close(one, other)
    assert found[0].isfinite() and found[0] > 1e3


def test_compiles_without_graph_breaks():
    compiled = torch.compile(op.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for cap in (None, 0.9):
        arguments = inputs(12, 8, 33, torch.float32)
        found, wanted = (outputs(f, *arguments, cap, 5) for f in (compiled, op.linear_cross_entropy))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_members_and_rows_without_a_token():
    for cap in (None, 0.9):
        hidden, weight, bias, wanted = inputs(12, 8, 33, torch.float64)
        wanted[[1, 4, 11]] = -100
        factors = torch.tensor([1.3, 0.2, -0.7], dtype=torch.float64)
        leaf = hidden.clone().requires_grad_()
        losses = op.linear_cross_entropy(leaf, weight, bias, wanted, cap, 5, 3)
        [found] = torch.autograd.grad(losses @ factors, [leaf])
        judge = hidden.clone().requires_grad_()
        parts = zip(judge.chunk(3), wanted.chunk(3), strict=True)
        right = torch.stack([op.reference(h[y >= 0], weight, bias, y[y >= 0], cap) for h, y in parts])
        torch.testing.assert_close(losses, right)
        torch.testing.assert_close(found, *torch.autograd.grad(right @ factors, [judge]))
    with pytest.raises(ValueError, match="several members"):
        op.linear_cross_entropy(hidden, weight.requires_grad_(), bias, wanted, None, 5, 3)
