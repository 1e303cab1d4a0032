"""The count of operations against what autograd really does on a bare model; the measured rate."""

from types import SimpleNamespace

import pytest
import torch
from conftest import bert_spec
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from minilora.cell import Cell
from minilora.lora.targets import plan_slots
from minilora.training import limit
from minilora.training.limit import matmul_rate, operations, products, steady, training_flops

SPEC = bert_spec(hidden_size=6, num_hidden_layers=3, num_attention_heads=2, intermediate_size=14)
ROWS, LENGTH = 5, 7


class Bare(nn.Module):
    """The products of a base and nothing else. Where an adapter is, a trained vector is added: no product."""

    def __init__(self, slots, method):
        super().__init__()
        self.x = nn.Parameter(torch.randn(ROWS, LENGTH, SPEC.width), requires_grad=method == "full")
        self.weights = nn.ParameterDict()
        self.adapters = nn.ParameterDict()
        for layer in range(len(SPEC.layers)):
            for target in SPEC.targets:
                weight = torch.randn(SPEC.shape(target, layer)) / 10
                self.weights[f"{layer}{target}"] = nn.Parameter(weight, requires_grad=method == "full")
                if f"layers.{layer}.{target}" in slots:
                    self.adapters[f"{layer}{target}"] = nn.Parameter(torch.randn(SPEC.shape(target, layer)[0]))

    def project(self, x, name):
        y = F.linear(x, self.weights[name])
        return y + self.adapters[name] if name in self.adapters else y

    def forward(self):
        x = self.x
        for layer in range(len(SPEC.layers)):
            q, k, v = (self.project(x, f"{layer}{target}") for target in "qkv")
            q, k, v = (y.view(ROWS, LENGTH, SPEC.layers[0].heads, -1).transpose(1, 2) for y in (q, k, v))
            attended = (q @ k.transpose(2, 3)).softmax(-1) @ v
            x = x + self.project(attended.transpose(1, 2).reshape(ROWS, LENGTH, -1), f"{layer}o")
            x = x + self.project(self.project(x, f"{layer}up").relu(), f"{layer}down")
        return x


CASES = [
    dict(targets=("q", "k", "v")),
    dict(targets=("all",)),
    dict(targets=("down",)),
    dict(targets=("o",), layers="1"),
    dict(targets=("up",), layers="2"),
    dict(targets=("mlp",), layers="0,2"),
    dict(targets=("attn",), layers="1-2"),
    dict(method="full"),
    dict(method="head"),
]


@pytest.mark.parametrize("values", CASES)
def test_operations_are_those_of_autograd(values):
    cell = Cell(**values)
    slots = plan_slots(SPEC, cell)
    model = Bare(slots, cell.method)
    with FlopCounterMode(display=False) as counter:
        y = model()
        if y.requires_grad:
            y.square().sum().backward()
    assert y.requires_grad == (cell.method != "head")
    assert training_flops(SPEC, slots, cell.method, LENGTH) * ROWS * LENGTH == counter.get_total_flops()


def test_full_training_is_three_times_the_forward():
    forward = training_flops(SPEC, {}, "head", LENGTH)
    weights = len(SPEC.layers) * sum(a * b for a, b in (SPEC.shape(target, 0) for target in SPEC.targets))
    assert forward == 2 * weights + len(SPEC.layers) * 4 * LENGTH * SPEC.width
    assert training_flops(SPEC, {}, "full", LENGTH) == 3 * forward


def test_the_products_of_a_step():
    """Two layers of width 6 and 14 inside: q, k and v are one product, and what is below all adapters has no
    gradient."""
    spec = bert_spec(hidden_size=6, num_hidden_layers=2, num_attention_heads=2, intermediate_size=14)
    forward = {(6, 18, "forward"): 2, (6, 6, "forward"): 2, (6, 14, "forward"): 2, (14, 6, "forward"): 2}
    assert products(spec, {}, "head") == forward
    slots = plan_slots(spec, Cell(targets=("q", "k", "v")))
    inputs = {(6, 18, "input"): 1, (6, 6, "input"): 2, (6, 14, "input"): 2, (14, 6, "input"): 2}
    assert products(spec, slots, "lora") == forward | inputs
    full = {(i, o, kind): 2 for i, o, _ in forward for kind in ("forward", "input", "weight")}
    assert products(spec, {}, "full") == full
    assert operations({(6, 18, "input"): 3, (14, 6, "weight"): 1}) == 2 * (3 * 6 * 18 + 14 * 6)


def test_each_product_is_what_its_kind_says():
    shapes = {}
    for kind in ("forward", "input", "weight"):
        shapes[kind] = tuple(limit.one_product(5, 6, 14, kind, torch.float32, "cpu")().shape)
    assert shapes == {"forward": (5, 14), "input": (5, 6), "weight": (14, 6)}


def test_the_rate_is_operations_over_the_best_times(monkeypatch):
    """Two products in turn, with a clock that goes on by these steps at each look. The first is done twice a step."""
    steps = iter([0.0] + [0.0, 0.04, 0.0, 0.05] + [0.0, 0.02, 0.0, 0.07] + [0.0])
    clock = SimpleNamespace(now=50.0)

    def look():
        clock.now += next(steps)
        return clock.now

    monkeypatch.setattr(limit, "time", SimpleNamespace(perf_counter=look))
    times = {(6, 14, "forward"): 2, (14, 6, "input"): 1}
    found = matmul_rate(12, times, torch.float32, "cpu", seconds=0.15)
    assert found == pytest.approx(3 * 2 * 12 * 6 * 14 / (2 * 0.02 + 0.05), rel=1e-9)
    assert next(steps, None) is None


def test_the_rate_of_this_machine():
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e3 < matmul_rate(64, products(SPEC, {}, "full"), dtype, torch.device("cpu"), seconds=0.02) < 1e15


def test_the_limit_is_known_where_it_did_not_change():
    assert steady(91.0, 100.0) == steady(100.0, 91.0) == 100.0 and steady(7.0) == 7.0
    assert steady(89.0, 100.0) is None and steady(95.0, 100.0, 80.0) is None
