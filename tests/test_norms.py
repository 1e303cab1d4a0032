"""RMSNorm against the equation, in values and gradients."""

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
