"""The frozen linear map against the equation in float64, in values and gradients."""

import pytest
import torch

from minilora.kernels import linear as op

SHAPES = [((1,), 1, 1), ((3,), 5, 2), ((2, 7), 33, 17), ((2, 3, 5), 16, 1), ((577,), 24, 100), ((0,), 4, 3)]


def inputs(shape, dtype, seed=0):
    rows, in_features, out_features = shape
    draw = torch.Generator().manual_seed(seed)
    sizes = (*rows, in_features), (out_features, in_features), (out_features,), (*rows, out_features)
    return [torch.randn(*size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes]


def tolerance(dtype):
    return {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, device):
    cases = 0
    for number, shape in enumerate(SHAPES):
        for biased in (False, True):
            x, weight, bias, dy = (t.to(device) for t in inputs(shape, dtype, number))
            bias = bias if biased else None
            found, wanted = x.clone().requires_grad_(), x.double().requires_grad_()
            y = op.linear(found, weight, bias)
            true = op.reference(wanted, weight.double(), None if bias is None else bias.double())
            y.backward(dy)
            true.backward(dy.double())
            assert y.dtype == found.grad.dtype == dtype
            for one, other in ((y, true), (found.grad, wanted.grad)):
                scale = max(1.0, other.abs().max().item() if other.numel() else 0.0)
                torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance(dtype) * scale)
            cases += 1
    assert cases == 12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_product_of_strided_parts_and_a_sum(dtype):
    cases = 0
    for number, shape in enumerate(SHAPES):
        x, weight, bias, dy = inputs(shape, dtype, number)
        sideways = weight.T.contiguous().T
        halves = torch.cat([weight, weight + 1])[: len(weight)]
        for each in (weight, sideways, halves):
            for plus in (None, dy):
                before = None if plus is None else plus.clone()
                found = op.product(x, each, bias, plus)
                wanted = op.reference(x.double(), weight.double(), bias.double()) + (0 if plus is None else dy.double())
                if dtype == torch.float32 and op.ONEDNN and plus is not None and plus.numel():
                    assert torch.equal(plus, before)
                torch.testing.assert_close(
                    found.double(), wanted, rtol=1e-6, atol=1e-4 if dtype.itemsize < 8 else 1e-11
                )
                cases += 1
    assert cases == 36


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_sum_without_a_bias(dtype):
    cases = 0
    for number, shape in enumerate(SHAPES):
        x, weight, _, dy = inputs(shape, dtype, number)
        wanted = op.reference(x.double(), weight.double()) + dy.double()
        found = op.product(x, weight, plus=dy)
        assert found.dtype == dtype and found.shape == wanted.shape
        within = tolerance(dtype) * max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=within)
        cases += 1
    assert cases == 6


def test_the_way_of_a_block():
    before = op.ONEDNN
    with pytest.raises(KeyError), op.using("mkl"):
        assert not op.ONEDNN
        with op.using("onednn"):
            assert op.ONEDNN == op.HAS_ONEDNN
            with op.using(None):
                assert op.ONEDNN == op.HAS_ONEDNN
        assert not op.ONEDNN
        raise KeyError
    assert op.ONEDNN == before == op.HAS_ONEDNN


def test_nothing_but_the_weight_is_saved():
    x, weight, bias, _ = inputs(SHAPES[2], torch.float32)
    y = op.linear(x.requires_grad_(), weight, bias)
    assert [t.data_ptr() for t in y.grad_fn.saved_tensors] == [weight.data_ptr()]


def test_gradcheck():
    for shape in SHAPES[:4]:
        x, weight, bias, _ = inputs(shape, torch.float64)
        assert torch.autograd.gradcheck(lambda x, w=weight, b=bias: op.linear(x, w, b), x.requires_grad_())


def test_trained_weights_have_gradients():
    x, weight, bias, dy = inputs(SHAPES[2], torch.float32)
    gradients = []
    for function in (op.linear, op.reference):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        function(*leaves).backward(dy)
        gradients.append([leaf.grad for leaf in leaves])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_works_without_onednn(monkeypatch):
    x, weight, bias, dy = inputs(SHAPES[2], torch.float32)
    own = op.product(x, weight, bias, dy.clone())
    monkeypatch.setattr(op, "ONEDNN", False)
    torch.testing.assert_close(op.product(x, weight, bias, dy.clone()), own, rtol=1e-5, atol=1e-5)


def test_compiles_without_graph_breaks():
    compiled = torch.compile(op.linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in SHAPES[1:5]:
        x, weight, bias, dy = inputs(shape, torch.float32)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        for function, leaf in zip((compiled, op.linear), leaves, strict=True):
            function(leaf, weight, bias).backward(dy)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-5)
