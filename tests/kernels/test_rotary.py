"""The rotation against the equation and against complex numbers."""

import pytest
import torch

from minilora.kernels import rotary as op

SHAPES = [(1, 1, 1, 2, 2), (3, 2, 5, 8, 8), (2, 3, 7, 10, 6), (2, 1, 33, 6, 2)]  # B, H, T, E, r


def inputs(B, H, T, E, r, dtype, by_row=False):
    draw = torch.Generator().manual_seed(T + E)
    angles = 4 * torch.rand(B if by_row else 1, 1, T, r // 2, generator=draw, dtype=torch.float64)
    cosine, sine = 1.3 * angles.cos(), 1.3 * angles.sin()
    tables = torch.cat([cosine, cosine], -1).to(dtype), torch.cat([-sine, sine], -1).to(dtype)
    x = torch.randn(B, T, 3 * H * E, generator=draw, dtype=torch.float64).to(dtype)
    return x[..., H * E : 2 * H * E].view(B, T, H, E).transpose(1, 2), *tables


def outputs(function, x, cosine, sine):
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf.transpose(1, 2).contiguous().transpose(1, 2), cosine, sine)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    return y.detach(), leaf.grad


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_values_and_gradients(dtype, tolerance, device):
    cases = 0
    for shape in SHAPES:
        for by_row in (False, True):
            arguments = [a.to(device) for a in inputs(*shape, dtype, by_row)]
            found = outputs(op.rotate, *arguments)
            assert found[0].is_contiguous()
            for one, other in zip(found, outputs(op.reference, *(a.double() for a in arguments)), strict=True):
                assert one.dtype == dtype
                torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=4 * tolerance)
            cases += 1
    assert cases == 8


def test_pairs_turn_as_complex_numbers():
    x, cosine, sine = inputs(2, 3, 7, 10, 6, torch.float64)
    turned = torch.complex(x[..., :3], x[..., 3:6]) * torch.complex(cosine[..., :3], sine[..., 3:])
    wanted = torch.cat([turned.real, turned.imag, x[..., 6:]], -1)
    torch.testing.assert_close(op.rotate(x, cosine, sine), wanted)


def test_gradcheck():
    for by_row in (False, True):
        x, cosine, sine = inputs(2, 3, 4, 6, 4, torch.float64, by_row)
        assert torch.autograd.gradcheck(lambda x, c=cosine, s=sine: op.rotate(x, c, s), x.detach().requires_grad_())


def test_compiles_without_graph_breaks():
    compiled = torch.compile(op.rotate, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in SHAPES[1:]:
        arguments = inputs(*shape, torch.float32)
        for one, other in zip(outputs(compiled, *arguments), outputs(op.rotate, *arguments), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
