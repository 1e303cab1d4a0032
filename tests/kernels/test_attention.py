"""Attention in batched products against the equation, in values and gradients."""

import math
from itertools import cycle, product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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

    parts, every = inputs(2, 13, 6, 2, 8, torch.float32), list(masks(2, 13, torch.float32))
    chosen = [(op.attention, None), *product((op.attention, op.batched), every)]
    # As a compilation takes seconds, the caps take turns: each function and each mask has both.
    for (function, mask), cap in zip(chosen, cycle((None, 0.8))):
        found = outputs(compiled(function), parts, mask, 0.7, cap)
        for one, other in zip(found, outputs(function, parts, mask, 0.7, cap), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert len(chosen) == 7


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


class Products(TorchDispatchMode):
    """Counts batched products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "bmm" in function.name()
        return function(*args, **(kwargs or {}))


def test_no_product_for_what_takes_no_gradient():
    parts, mask = inputs(2, 5, 4, 2, 3, torch.float32), torch.zeros(1, 1, 1, 5)
    wanted = outputs(op.reference, parts, mask, 0.7)
    for trained, number in (("qkv", 4), ("q", 2), ("v", 1), ("kv", 3)):
        with Products() as products:
            found = outputs(op.batched, parts, mask, 0.7, trained=trained)
        assert products.count == 2 + number
        for name, one, other in zip("oqkv", found, wanted, strict=True):
            assert (one is None) == (name not in "o" + trained)
            if one is not None:
                torch.testing.assert_close(one, other)


def test_the_mask_stays_as_it_is():
    """Scores are added to a copy: a mask that has the scores' own shape is shared by all layers."""
    for dtype in (torch.float32, torch.bfloat16):
        parts = inputs(2, 5, 1, 1, 3, dtype)
        for mask in masks(2, 5, dtype):
            mask = mask.expand(2, 1, 5, 5).contiguous()
            before = mask.clone()
            op.batched(*parts, mask, 0.7)
            assert torch.equal(mask, before)


WAYS = {  # of (device, dtype, grouped, masked, tokens, cap)
    ("cpu", "float32", False, True, 48): "batched",
    ("cpu", "float32", False, True, 49): "torch",
    ("cpu", "bfloat16", True, False, 128): "batched",
    ("cpu", "bfloat16", True, False, 129): "grouped",
    ("cpu", "float16", False, False, 8): "torch",
    ("cpu", "float16", True, True, 400): "grouped",
    ("cpu", "float16", True, True, 400, 30.0): "batched",
    ("cuda", "float32", False, False, 8): "torch",
    ("cuda", "float32", True, False, 8): "expanded",
    ("cuda", "float32", True, True, 512): "expanded",
    ("cuda", "bfloat16", True, False, 512): "grouped",
    ("cuda", "bfloat16", True, True, 512): "expanded",
    ("cuda", "float16", True, False, 8): "grouped",
    ("cuda", "bfloat16", False, True, 512): "torch",
    ("cuda", "bfloat16", True, False, 512, 30.0): "batched",
    ("mps", "bfloat16", True, False, 512): "expanded",
    ("meta", "float32", False, False, 8): "torch",
}


def test_the_way_that_is_chosen(monkeypatch):
    for (kind, dtype, *rest), wanted in WAYS.items():
        assert op.way(kind, getattr(torch, dtype), *rest) == wanted, (kind, dtype, *rest)
    assert len(WAYS) == 17
    taken = []
    monkeypatch.setattr(op, "batched", lambda *a: taken.append("batched"))
    monkeypatch.setattr(op.F, "scaled_dot_product_attention", lambda *a, **b: taken.append(b["enable_gqa"]))
    for dtype, T, groups, cap in ((torch.float32, 48, 2, None), (torch.float32, 49, 2, None),
                                  (torch.bfloat16, 129, 1, None), (torch.float32, 200, 2, 30.0)):  # fmt: skip
        q, k = torch.zeros(1, 2, T, 4, dtype=dtype), torch.zeros(1, groups, T, 4, dtype=dtype)
        op.attention(q, k, k, None, 1.0, cap)
    assert taken == ["batched", False, True, "batched"]


def test_repeated_heads_are_the_grouped_ones(monkeypatch):
    """What a GPU does where no kernel takes grouped heads, done here: values, gradients and which kernel is asked."""
    asked, cases, real = [], 0, op.F.scaled_dot_product_attention

    def sdpa(q, k, v, **settings):
        asked.append((k.shape == v.shape == q.shape, settings["enable_gqa"]))
        return real(q, k, v, **settings)

    monkeypatch.setattr(op, "way", lambda *a: "expanded")
    monkeypatch.setattr(op.F, "scaled_dot_product_attention", sdpa)
    for shape in SHAPES:
        B, T, H, G, E = shape
        for mask in masks(B, T, torch.float64):
            parts = inputs(*shape, torch.float64)
            found = outputs(op.attention, parts, mask, 0.7)
            for one, other in zip(found, outputs(op.reference, parts, mask, 0.7), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
            cases += 1
    assert cases == 15 and asked == 15 * [(True, False)]
