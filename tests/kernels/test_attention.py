"""Attention in batched products against the equation, in values and gradients."""

import math
from itertools import product

import pytest
import torch

from minilora.kernels import attention as op

SHAPES = [(1, 1, 1, 1, 3), (3, 7, 4, 4, 5), (2, 13, 6, 2, 8), (5, 5, 3, 1, 1), (2, 31, 8, 4, 16)]  # B, T, H, G, E


def masks(B, T, dtype):
    """Each kind that a model has: of padding, of earlier tokens, of a window with padding."""
    places = torch.arange(T)
    away = places[:, None] - places
    lengths = torch.arange(B) * 5 % T + 1
    padding = (places < lengths[:, None])[:, None, None]  # [B, 1, 1, T]
    for seen in (padding, (away >= 0)[None, None], padding & (away.abs() < 3) | (away == 0)):
        yield torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


def inputs(B, T, H, G, E, dtype):
    """q, k and v as views of one projection [B, T, (H + 2 G) E], as a layer has them."""
    draw = torch.Generator().manual_seed(B + T)
    fused = torch.randn(B, T, (H + 2 * G) * E, generator=draw, dtype=torch.float64).to(dtype)
    return [p.view(B, T, -1, E).transpose(1, 2) for p in fused.split([H * E, G * E, G * E], -1)]


def outputs(function, parts, mask, *settings, trained="qkv"):
    leaves = [p.detach().clone().requires_grad_(name in trained) for name, p in zip("qkv", parts, strict=True)]
    # Not leaves but views with tokens before heads go in, so that strides differ from those of contiguous tensors.
    views = [leaf.transpose(1, 2).contiguous().transpose(1, 2) for leaf in leaves]
    o = function(*views, mask, *settings)
    o.backward(torch.linspace(-1, 2, o.numel(), dtype=o.dtype, device=o.device).view_as(o))
    return [o.detach(), *(leaf.grad for leaf in leaves)]


def check(function, device, dtype, tolerance, compiled=lambda f: f):
    function, cases = compiled(function), 0
    for shape in SHAPES:
        B, T, H, G, E = shape
        for mask in masks(B, T, dtype):
            for cap in (None, 0.8):
                parts = [p.to(device) for p in inputs(*shape, dtype)]
                found = outputs(function, parts, mask.to(device), 0.7, cap)
                wanted = outputs(op.reference, [p.double() for p in parts], mask.to(device).double(), 0.7, cap)
                for one, other in zip(found, wanted, strict=True):
                    assert one.dtype == dtype
                    within = tolerance * max(1.0, other.abs().max().item())
                    torch.testing.assert_close(one.double(), other, rtol=0, atol=within)
                cases += 1
    assert cases == 30


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients(dtype, tolerance, device):
    check(op.batched, device, dtype, tolerance)
    check(op.attention, device, dtype, tolerance)


def test_gradcheck():
    for cap in (None, 0.8):
        parts = [p.detach().requires_grad_() for p in inputs(2, 4, 6, 2, 3, torch.float64)]
        for mask in masks(2, 4, torch.float64):
            assert torch.autograd.gradcheck(lambda *qkv, m=mask, c=cap: op.batched(*qkv, m, 0.7, c), parts)


def test_compiles_without_graph_breaks():
    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)

    parts = inputs(2, 13, 6, 2, 8, torch.float32)
    for cap in (None, 0.8):
        every = list(masks(2, 13, torch.float32))
        for function, mask in ((op.attention, None), *product((op.attention, op.batched), every)):
            found = outputs(compiled(function), parts, mask, 0.7, cap)
            for one, other in zip(found, outputs(function, parts, mask, 0.7, cap), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_scores_are_not_rounded_before_the_softmax():
    # Scores of about 64, where a bfloat16 has steps of 0.25: rounded, the two keys would count the same.
    q = torch.full((1, 1, 1, 64), 1.0, dtype=torch.bfloat16)
    k = torch.ones(1, 1, 2, 64, dtype=torch.bfloat16)
    k[0, 0, 1, 0] = 1.0 + 3 / 32
    v = torch.tensor([0.0, 1.0], dtype=torch.bfloat16).view(1, 1, 2, 1).expand(1, 1, 2, 64)
    q, mask = q.expand(1, 1, 2, 64), torch.zeros(1, 1, 1, 2)
    wanted = 1 / (1 + math.exp(-3 / 32))
    assert abs(op.batched(q, k, v, mask, 1.0)[0, 0, 0, 0].item() - wanted) < 2e-3
    assert wanted > 0.52


def test_no_product_for_what_takes_no_gradient(monkeypatch):
    products = []
    parts, mask = inputs(2, 5, 4, 2, 3, torch.float32), torch.zeros(1, 1, 1, 5)
    wanted = outputs(op.reference, parts, mask, 0.7)
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a: products.append(1) or real(*a))
    for trained, number in (("qkv", 4), ("q", 2), ("v", 1), ("kv", 3)):
        products.clear()
        found = outputs(op.batched, parts, mask, 0.7, trained=trained)
        assert len(products) == 2 + number
        for name, one, other in zip("oqkv", found, wanted, strict=True):
            assert (one is None) == (name not in "o" + trained)
            if one is not None:
                torch.testing.assert_close(one, other)


def test_the_way_that_is_chosen(monkeypatch):
    taken = []
    monkeypatch.setattr(op, "batched", lambda *a: taken.append("batched"))
    monkeypatch.setattr(op.F, "scaled_dot_product_attention", lambda *a, **b: taken.append("torch"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for T in (48, 49, 128, 129):
            q = torch.zeros(1, 2, T, 4, dtype=dtype)
            op.attention(q, q, q, None, 1.0)
    op.attention(q, q, q, None, 1.0, 30.0)
    op.attention(q.to("meta"), q, q, None, 1.0)
    assert taken == (
        ["batched", "torch", "torch", "torch"] + ["batched", "batched", "batched", "torch"] + 4 * ["torch"]
        + ["batched", "torch"]
    )  # fmt: skip
