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
    dtype = arguments[0].dtype
    x, weight, bias, A, B, scale = [t.double() if torch.is_tensor(t) else t for t in arguments]
    y = torch.einsum("...i,oi->...o", x, weight) + scale * torch.einsum("...i,ri,or->...o", x, A, B)
    y = y if bias is None else y + bias
    dy = torch.linspace(-1, 2, y.numel(), dtype=dtype, device=y.device).view_as(y).double()
    dx = torch.einsum("...o,oi->...i", dy, weight) + scale * torch.einsum("...o,or,ri->...i", dy, B, A)
    dA = scale * torch.einsum("...o,or,...i->ri", dy, B, x)
    dB = scale * torch.einsum("...o,...i,ri->or", dy, x, A)
    return [y, dx, dA, dB]


def in_form(form):
    return lambda *arguments: op.lora_linear(*arguments, form=form)


@pytest.mark.parametrize("function", [op.reference, op.lora_linear, *map(in_form, op.FORMS)])
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


def made(rank, in_features=7):
    """A random input [6, 2, in], and three projections of it: with an adapter, without one or a bias, with another."""
    draw = torch.Generator().manual_seed(rank)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    def adapter(out, rank):
        return [normal(rank, in_features).requires_grad_(), normal(out, rank).requires_grad_()]

    scales = [0.7, 1.0, -1.3]
    weights, biases = [normal(n, in_features) for n in (5, 4, 3)], [normal(5), None, normal(3)]
    factors = [adapter(5, rank), [None, None], adapter(3, rank + 1)]
    x = normal(6, 2, in_features).requires_grad_()
    return x, [(w, b, *ab, s) for w, b, ab, s in zip(weights, biases, factors, scales, strict=True)]


@pytest.mark.parametrize("form", op.FORMS)
def test_projections_of_one_input(form):
    x, projections = made(2)
    found = op.lora_linears(x, projections, form=form)
    wanted = [torch.nn.functional.linear(x, w, b) if A is None else op.reference(x, w, b, A, B, s)
              for w, b, A, B, s in projections]  # fmt: skip
    torch.testing.assert_close(list(found), wanted)

    def run(x, A, B, A3, B3):
        (w, b, _, _, s), plain, (w3, b3, _, _, s3) = projections
        return op.lora_linears(x, [(w, b, A, B, s), plain, (w3, b3, A3, B3, s3)], form=form)

    assert torch.autograd.gradcheck(run, (x, *projections[0][2:4], *projections[2][2:4]))


def test_auto_takes_the_form_that_moves_less():
    draw, taken = torch.Generator().manual_seed(0), []
    weight, A, B = (torch.randn(size, generator=draw) for size in ((384, 384), (2, 384), (384, 2)))
    for rows in (32, 224, 255, 256, 864):
        x = torch.randn(rows, 384, generator=draw)
        side, merged, auto = (op.lora_linear(x, weight, None, A, B, 0.7, form=f) for f in ("side", "merged", "auto"))
        assert not side.equal(merged)  # they round differently
        taken.append("merged" if auto.equal(merged) else "side" if auto.equal(side) else None)
    assert (
        taken == ["side"] * 3 + ["merged"] * 2
    )  # reading and writing W: 2 384^2 numbers; x once, y twice: 3 384 a row


@pytest.mark.parametrize("form", op.FORMS)
def test_no_gradient_where_none_is_asked_for(form):
    arguments = inputs((4,), 6, 5, 2, torch.float32)
    for trained in (("A", "B"), ("x",), ("B",), ("x", "B")):
        found, wanted = outputs(in_form(form), arguments, trained), formulas(arguments)
        for name, gradient, right in zip(("x", "A", "B"), found[1:], wanted[1:], strict=True):
            assert (gradient is not None) == (name in trained)
            if gradient is not None:
                torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", op.FORMS)
def test_what_is_saved(form):
    # x and the factors (and the frozen weights, which lie in memory anyway); x A^T in the place of x where A is frozen.
    x, weight, bias, A, B, scale = inputs((50,), 24, 40, 3, torch.float32)
    for trains_A in (True, False):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            op.lora_linear(x, weight, bias, A.clone().requires_grad_(trains_A), B.requires_grad_(), scale, form=form)
        rows = [t for t in saved if t is not None and len(t) == 50]
        assert [list(t.shape) for t in rows] == [[50, 24] if trains_A else [50, 3]]
        assert sum(t.untyped_storage().nbytes() for t in rows) == (50 * 24 if trains_A else 50 * 3) * 4


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


def test_bfloat16_gradients():
    arguments = [t.bfloat16() if number < 3 else t for number, t in enumerate(inputs((50,), 24, 40, 3, torch.float32))]
    for found, wanted in zip(outputs(op.lora_linear, arguments), formulas(arguments), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=1e-2 * wanted.abs().max())


def test_choice_of_the_form(monkeypatch):
    taken = []
    monkeypatch.setattr(op.Projections, "apply", lambda form, *a: taken.append(form) or (None,))
    many, few = inputs((3000,), 24, 40, 3, torch.float32), inputs((3,), 24, 40, 3, torch.float32)
    op.lora_linear(*many)
    op.lora_linear(*many, seen=many[0])
    op.lora_linear(*few)
    op.lora_linear(many[0].bfloat16(), many[1].bfloat16(), *many[2:])
    assert taken == ["merged", "side", "side", "side"]
    with pytest.raises(ValueError, match="'merged' is not exact here, as these are: side"):
        op.lora_linear(*many, seen=many[0], form="merged")


@pytest.mark.parametrize("form", op.FORMS)
def test_compiles_without_graph_breaks(form):
    arguments = inputs((100,), 24, 40, 3, torch.float32)
    compiled = torch.compile(in_form(form), fullgraph=True, backend="aot_eager")
    for found, wanted in zip(outputs(compiled, arguments), formulas(arguments), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5 * wanted.abs().max())
