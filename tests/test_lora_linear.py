"""The operator against the equation, in values and in every gradient."""

import pytest
import torch
from minilora.kernels import lora_linear as op

SHAPES = [  # leading shape, in, out, rank
    ((1,), 5, 3, 1),
    ((7, 11), 13, 17, 3),
    ((2, 3, 5), 9, 9, 9),
    ((64,), 24, 40, 5),
    ((33, 1), 40, 24, 1),
]


def inputs(shape, in_features, out_features, rank, dtype, bias=True):
    draw = torch.Generator().manual_seed(rank + in_features)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64).to(dtype)

    x, A, B = normal(*shape, in_features), normal(rank, in_features), normal(out_features, rank)
    weight = normal(out_features, in_features)
    return x, weight, normal(out_features) if bias else None, A, B, 0.7


def outputs(function, arguments, trained=("x", "A", "B")):
    """y and the gradients of x, A and B for a fixed, non-uniform cotangent."""
    x, weight, bias, A, B, scale = arguments
    leaves = [t.clone().requires_grad_(name in trained) for name, t in (("x", x), ("A", A), ("B", B))]
    y = function(leaves[0], weight, bias, leaves[1], leaves[2], scale)
    cotangent = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    y.backward(cotangent)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def formulas(arguments):
    """The equation and its derivatives, written out with numpy-like sums in float64."""
    x, weight, bias, A, B, scale = [t.double() if torch.is_tensor(t) else t for t in arguments]
    y = torch.einsum("...i,oi->...o", x, weight) + scale * torch.einsum("...i,ri,or->...o", x, A, B)
    y = y if bias is None else y + bias
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64, device=y.device).view_as(y)
    dx = torch.einsum("...o,oi->...i", dy, weight) + scale * torch.einsum("...o,or,ri->...i", dy, B, A)
    dA = scale * torch.einsum("...o,or,...i->ri", dy, B, x)
    dB = scale * torch.einsum("...o,...i,ri->or", dy, x, A)
    return [y, dx, dA, dB]


@pytest.mark.parametrize("function", [op.reference, op.side_path, op.merged, op.lora_linear])
def test_values_and_gradients(function, device):
    cases = 0
    for shape in SHAPES:
        for bias in (True, False):
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
                arguments = inputs(*shape, dtype, bias)
                arguments = tuple(t.to(device) if torch.is_tensor(t) else t for t in arguments)
                for found, wanted in zip(outputs(function, arguments), formulas(arguments), strict=True):
                    torch.testing.assert_close(
                        found.double(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max()
                    )
                cases += 1
    assert cases == 20


def test_gradcheck():
    for shape in SHAPES[:3]:
        x, weight, bias, A, B, scale = inputs(*shape, torch.float64)
        leaves = tuple(t.requires_grad_() for t in (x, A, B))
        assert torch.autograd.gradcheck(lambda x, A, B, w=weight, b=bias, s=scale: op.merged(x, w, b, A, B, s), leaves)


def test_no_gradient_where_none_is_asked_for():
    arguments = inputs((4,), 6, 5, 2, torch.float32)
    for trained in (("A", "B"), ("x",), ("B",)):
        _, *gradients = outputs(op.merged, arguments, trained)
        assert [g is not None for g in gradients] == [name in trained for name in ("x", "A", "B")]


def test_bfloat16_base_keeps_small_updates():
    # The product of the factors is far below a bfloat16 step of the weight: merged it would vanish.
    x, weight, bias, A, B, _ = inputs((50,), 24, 40, 3, torch.float32)
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    scale = 1e-4
    zero = torch.zeros_like(weight), None
    found = op.lora_linear(x, *zero, A, B, scale)
    wanted = scale * (x.float() @ A.T @ B.T)
    assert found.dtype == torch.bfloat16 and wanted.abs().max() > 1e-4
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-7)
    full = op.lora_linear(x, weight, bias, A, B, 0.5).float()
    exact = torch.nn.functional.linear(x.float(), weight.float(), bias.float()) + 0.5 * (x.float() @ A.T @ B.T)
    torch.testing.assert_close(full, exact, rtol=2e-2, atol=0.1)


def test_choice_of_the_way(monkeypatch):
    taken = []
    monkeypatch.setattr(op, "merged", lambda *a: taken.append("merged"))
    monkeypatch.setattr(op, "side_path", lambda *a: taken.append("side"))
    many, few = inputs((100,), 24, 40, 3, torch.float32), inputs((15,), 24, 40, 3, torch.float32)
    op.lora_linear(*many)
    op.lora_linear(*many, 0.1)
    op.lora_linear(*few)
    op.lora_linear(many[0].bfloat16(), many[1].bfloat16(), *many[2:])
    assert taken == ["merged", "side", "side", "side"]


def test_dropout_is_on_the_input_of_A_alone():
    x, weight, bias, A, B, scale = inputs((400,), 8, 5, 2, torch.float64)
    torch.manual_seed(3)
    found = op.lora_linear(x, weight, bias, A, B, scale, 0.25)
    torch.manual_seed(3)
    kept = (torch.nn.functional.dropout(torch.ones_like(x), 0.25) > 0).double() / 0.75
    wanted = x @ weight.T + bias + scale * ((x * kept) @ A.T @ B.T)
    torch.testing.assert_close(found, wanted)
    assert 0.65 < (kept > 0).double().mean() < 0.85


def test_compiles_without_graph_breaks():
    arguments = inputs((100,), 24, 40, 3, torch.float32)
    compiled = torch.compile(op.lora_linear, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(outputs(compiled, arguments), formulas(arguments), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5 * wanted.abs().max())
