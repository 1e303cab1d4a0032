"""RMSNorm and LayerNorm against their equations, in values and gradients."""

import pytest
import torch

from minilora.kernels import norms as op

SHAPES = [(1, 1), (3, 5), (2, 7, 33), (2, 3, 5, 16), (4, 577)]


def inputs(shape, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(*shape, generator=draw, dtype=torch.float64) + 0.5
    return x.to(dtype), (0.5 + torch.rand(shape[-1], generator=draw, dtype=torch.float64)).to(dtype)


def outputs(function, x, weight, eps):
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf, weight, eps)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    return y.detach(), leaf.grad


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("wider", [False, True])
def test_values_and_gradients(dtype, tolerance, wider, device):
    cases = 0
    for number, shape in enumerate(SHAPES):
        for eps in (1e-6, 0.3):
            x, weight = (t.to(device) for t in inputs(shape, dtype, number))
            weight = weight.to(torch.promote_types(dtype, torch.float32)) if wider else weight
            found = outputs(op.rms_norm, x, weight, eps)
            for one, other in zip(found, outputs(op.reference, x.double(), weight.double(), eps), strict=True):
                assert one.dtype == dtype
                torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
            cases += 1
    assert cases == 10


def test_rounds_once_in_bfloat16():
    x, weight = inputs((40, 64), torch.bfloat16)
    wanted = op.reference(x.double(), weight.double(), 1e-6)
    assert (op.rms_norm(x, weight, 1e-6) == wanted.bfloat16()).double().mean() > 0.99


def test_strided_rows():
    x, weight = inputs((2, 5, 4, 6), torch.float64)
    views = x.transpose(1, 2)
    for one, other in zip(outputs(op.rms_norm, views, weight, 0.1), outputs(op.reference, views, weight, 0.1)):
        torch.testing.assert_close(one, other)


def test_gradcheck():
    for shape in SHAPES[:4]:
        x, weight = inputs(shape, torch.float64)
        assert torch.autograd.gradcheck(lambda x, w=weight: op.rms_norm(x, w, 0.2), x.requires_grad_())


def test_a_trained_weight_has_a_gradient():
    x, weight = inputs((3, 5), torch.float64)
    gradients = []
    for function in (op.rms_norm, op.reference):
        leaf = weight.clone().requires_grad_()
        function(x, leaf, 1e-6).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_compiles_without_graph_breaks():
    compiled = torch.compile(op.rms_norm, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in SHAPES[1:]:
        x, weight = inputs(shape, torch.float32)
        for one, other in zip(outputs(compiled, x, weight, 1e-6), outputs(op.rms_norm, x, weight, 1e-6), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def layer_inputs(shape, dtype, seed=0):
    x, weight = inputs(shape, dtype, seed)
    draw = torch.Generator().manual_seed(seed + 100)
    signs = 1 - 2 * torch.randint(0, 2, (shape[-1],), generator=draw)
    return x, weight * signs, torch.randn(shape[-1], generator=draw, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-11), (torch.float32, 3e-5), (torch.bfloat16, 3e-2)])
def test_layer_norm(dtype, tolerance, device):
    cases = 0
    for number, shape in enumerate(SHAPES[1:]):
        for eps in (1e-12, 0.3):
            for biased in (True, False):
                x, weight, bias = (t.to(device) for t in layer_inputs(shape, dtype, number))
                bias = bias if biased else None
                found = outputs(lambda x, w, e, b=bias: op.layer_norm(x, w, b, e), x, weight, eps)
                plain = 0 if bias is None else bias.double()
                wanted = outputs(
                    lambda x, w, e, b=plain: op.layer_reference(x, w, b, e), x.double(), weight.double(), eps
                )
                for one, other in zip(found, wanted, strict=True):
                    assert one.dtype == dtype
                    scale = max(1.0, other.abs().max().item())
                    torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * scale)
                cases += 1
    assert cases == 16


def test_layer_norm_keeps_its_result_and_not_its_input():
    x, weight, bias = layer_inputs((7, 33), torch.float32)
    y = op.layer_norm(x.requires_grad_(), weight, bias, 1e-5)
    saved = {t.data_ptr() for t in y.grad_fn.saved_tensors}
    assert y.data_ptr() in saved and x.data_ptr() not in saved


@pytest.mark.parametrize("weak", [0.0, 4.8e-33, 1e-3])
def test_layer_norm_with_a_weight_that_cannot_be_undone(weak):
    """A base's weight may be nothing in some place (all-MiniLM-L6-v2 has a 5e-33): torch's own takes it."""
    x, weight, bias = layer_inputs((7, 33), torch.float32)
    weight[5] = weak
    found = outputs(lambda x, w, e: op.layer_norm(x, w, bias, e), x, weight, 1e-5)
    wanted = outputs(lambda x, w, e: op.layer_reference(x, w, bias.double(), e), x.double(), weight.double(), 1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=3e-6 * max(1.0, other.abs().max().item()))


def test_layer_norm_of_a_row_without_variance():
    _, weight, bias = layer_inputs((7, 33), torch.float64)
    found = outputs(lambda x, w, e: op.layer_norm(x, w, bias, e), torch.ones(2, 33, dtype=torch.float64), weight, 0.1)
    wanted = outputs(
        lambda x, w, e: op.layer_reference(x, w, bias, e), torch.ones(2, 33, dtype=torch.float64), weight, 0.1
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_layer_norm_gradcheck():
    for shape in SHAPES[1:4]:
        x, weight, bias = layer_inputs(shape, torch.float64)
        assert torch.autograd.gradcheck(lambda x, w=weight, b=bias: op.layer_norm(x, w, b, 0.2), x.requires_grad_())


def test_layer_norm_trains_its_weights_where_asked():
    x, weight, bias = layer_inputs((3, 5), torch.float64)
    gradients = []
    for function in (op.layer_norm, op.layer_reference):
        leaves = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        function(x, *leaves, 1e-6).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
