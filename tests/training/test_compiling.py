"""Compiled steps: the eager ones' results, one graph for all sizes, and one line where nothing can be compiled."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, VOCABULARY, tiny_bert
from torch._dynamo.backends.registry import lookup_backend

from minilora.base import model
from minilora.cell import Cell
from minilora.data.batches import Batch
from minilora.lora.layer import attach, detach, named_layers
from minilora.lora.targets import plan_slots
from minilora.seeds import generator
from minilora.tasks.classification import Classifier
from minilora.training import compiling, loop, optimizers
from minilora.training.member import trained_parameters
from minilora.training.population import Population
from minilora.training.state import Flat

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def counting():
    """A backend that does not generate code, and the graphs it was given."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    yield backend, graphs
    torch._dynamo.reset()


class Training:
    """K members, their optimiser and all that a step needs."""

    def __init__(self, folder, K, form, dropout):
        cells = [Cell(rank=2 + k, dropout=dropout, form=form, lr=0.01) for k in range(K)]
        base = model.load(folder)
        models, layers = [], []
        for k, cell in enumerate(cells):
            slots = plan_slots(base.spec, cell)
            attach(base, slots, dropout, k, form=form)
            models.append(Classifier(base, "mean", 2, k))
            layers.append(dict(named_layers(base)))
            with torch.no_grad():
                for layer in layers[-1].values():  # B = 0 would leave A without a gradient
                    layer.B.normal_(0, 0.1, generator=generator(k, "B"))
            trained_parameters(models[-1], cell)
            detach(base)
        trained = [
            {f"base.{name}.{factor}": getattr(layer, factor) for name, layer in own.items() for factor in "AB"}
            | {f"classifier.{name}": p for name, p in one.classifier.named_parameters()}
            for one, own in zip(models, layers, strict=True)
        ]
        self.flat = Flat(trained)
        self.optimizer = optimizers.AdamW(self.flat, cells)
        self.together = Population(models, layers, self.flat)
        self.going = torch.ones(K, dtype=torch.bool)
        self.clips = torch.linspace(0.3, 1.0, K)
        self.state = [*self.optimizer.tensors, self.together.keys, self.going]

    def step(self, micro_batches, rates):
        return loop.update(self.together, self.optimizer, self.clips, self.going, micro_batches, rates)


def micro_batches(K, rows, width, count, dropout, seed):
    draw = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randint(5, len(VOCABULARY), (K * rows, width), generator=draw),
            torch.randint(2, width + 1, (K * rows,), generator=draw),
            [np.arange(rows)] * K,
            torch.randint(2, (K * rows,), generator=draw),
            torch.full((K,), float(rows)),
            torch.randint(1 << 30, (K,), generator=draw, dtype=torch.int32) if dropout else None,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("K, form, count, dropout", [(1, "auto", 1, 0.0), (1, "side", 2, 0.3), (2, "auto", 1, 0.3)])
def test_a_whole_step_is_one_graph_for_all_sizes(tmp_path, counting, K, form, count, dropout):
    """Forward, backward, clipping and optimiser: compiled once, whatever the padded length and the number of rows."""
    tiny_bert(tmp_path, num_hidden_layers=1)
    eager, ours = (Training(tmp_path, K, form, dropout) for _ in range(2))
    before = eager.flat.values.detach().clone()
    backend, graphs = counting
    compiled = compiling.compiled(ours.step, "classification", CPU, ours.state, backend)
    sizes = [(8, 9), (8, 12), (8, 5), (3, 12), (8, 37), (2, 6), (8, 9)]
    for number, (rows, width) in enumerate(sizes):
        rates = torch.linspace(1e-2, 3e-2, K) * (number + 1) / len(sizes)
        given = micro_batches(K, rows, width, count, dropout, number)
        for found, wanted in zip(compiled(given, rates), eager.step(given, rates), strict=True):
            assert found.shape == (K,) and not found.requires_grad
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert len(graphs) == 1
    for mine, right in zip(ours.state, eager.state, strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-3, atol=1e-5)
    moved = (eager.flat.values - before).abs()
    assert moved.mean() > 0.005 and (ours.flat.values - before).abs().mean() > 0.005
    assert eager.going.all() and eager.optimizer.steps.tolist() == [7.0] * K

    with torch.no_grad():
        ours.flat.whole(ours.flat.values, "classifier.bias")[-1][-1] = torch.inf
    before = ours.flat.values.detach().clone()
    compiled(given, rates)  # the last member diverges, and stays as it is
    assert ours.going.tolist() == [True] * (K - 1) + [False] and len(graphs) == 1
    assert (ours.flat.values != before).any(1).tolist() == ours.going.tolist()


def test_settings_of_the_tracer_are_given_back(counting):
    import torch._functorch.config

    def current():
        dynamo, functorch = torch._dynamo.config, torch._functorch.config
        return [getattr(dynamo, name) for name in compiling.DYNAMO], [
            getattr(functorch, name) for name in compiling.FUNCTORCH
        ]

    before = current()
    compiling.compiled(lambda batches, x: x * 2.0, "classification", CPU, backend=counting[0])([], torch.ones(3))
    assert current() == before == ([False, False], [False]) and len(counting[1]) == 1


DROPPED = """
import torch
from minilora.kernels.dropout import dropout, least_kept

keys, chance = torch.tensor([5, -9], dtype=torch.int32), torch.tensor([0.3, 0.4])
both = torch.tensor([least_kept(0.3), least_kept(0.4)], dtype=torch.int32)

def step(x, p, least=None):
    y = dropout(x, p, keys, 77, least)
    (gradient,) = torch.autograd.grad((y * y).sum(), [x])
    return y.detach(), gradient

for width, chances, kept in ((24, (0.3,), 0.7), (33, (chance, both), 0.65)):
    x = (torch.rand(4, 7, width) + 1).requires_grad_()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = torch.compile(step, fullgraph=True)(x, *chances)
    share = (found[0] != 0).float().mean()
    print(all(map(torch.equal, found, step(x, *chances))), bool(abs(share - kept) < 0.04))
"""

STEPPED = """
import sys, tempfile
from pathlib import Path
import torch
from conftest import tiny_bert
from test_compiling import CPU, Training, compiling, micro_batches

folder = Path(tempfile.mkdtemp())
tiny_bert(folder, num_hidden_layers=1)
eager, ours = (Training(folder, 2, "auto", 0.3) for _ in range(2))
compiled = compiling.compiled(ours.step, "classification", CPU, ours.state)
for number, (rows, width) in enumerate([(8, 9), (3, 13)]):
    rates, given = torch.tensor([0.01, 0.02]), micro_batches(2, rows, width, 1, 0.3, number)
    for found, wanted in zip(compiled(given, rates), eager.step(given, rates), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
for mine, right in zip(ours.state, eager.state, strict=True):
    torch.testing.assert_close(mine, right, rtol=2e-3, atol=1e-5)
print(eager.optimizer.steps.tolist())
"""


def test_inductor_drops_what_eager_drops(tmp_path):
    """In processes of their own: what it generated wrote beyond the end of arrays whose width is no whole vector."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("no C++ compiler")
    settings = {"XDG_CACHE_HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": None, "OMP_NUM_THREADS": "1"}
    assert in_process(DROPPED, **settings) == ["True True"] * 2
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/training")))
    assert in_process(STEPPED, PYTHONPATH=path, **settings) == ["[2.0, 2.0]"]


# --- whether to compile


def test_how_steps_are_taken(monkeypatch):
    asked = []
    monkeypatch.setattr(compiling, "obstacle", asked.append)
    auto, on = Cell(compile="auto"), Cell(compile="on")
    for cell, device, steps, how, reason in (
        (Cell(compile="off"), CUDA, 10**9, "eager", "--compile off"),
        (auto, CPU, 10**9, "eager", "there are no graphs on cpu, and compiling repays itself nowhere"),
        (auto, torch.device("mps"), 10**9, "eager", "there are no graphs on mps, and compiling repays itself nowhere"),
        (auto, CUDA, 15, "eager", "15 steps do not repay recording one"),
        (auto.replace(optimizer="adafactor"), CUDA, 10**9, "eager", "torch's Adafactor waits for its rate"),
        (on.replace(optimizer="adafactor"), CUDA, 10**9, "eager", "torch's Adafactor waits for its rate"),
        (auto, CUDA, 16, "graphs", "one for each padded length"),
    ):
        assert compiling.choose(cell, device, steps) == (how, reason)
    assert asked == []
    assert compiling.choose(on, CPU, 1) == compiling.choose(on, CUDA, 1) == ("compiled", "--compile on")
    assert asked == [CPU, CUDA]
    monkeypatch.setattr(compiling.parallel, "count", lambda: 2)
    assert compiling.choose(auto, CUDA, 10**9) == ("eager", "several processes sum their gradients")


def test_one_line_says_why_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compiling, "obstacle", lambda device: "no compiler")
    assert compiling.choose(Cell(compile="on"), CPU, 5000) == ("eager", "nothing can be compiled here: no compiler")


def in_process(program, *arguments, **environment):
    """What a fresh process prints."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.check_output(command, env=environment, text=True).splitlines()


OBSTACLE = "import torch; from minilora.training import compiling; print(compiling.obstacle(torch.device('cpu')))"


def test_a_missing_compiler_is_seen_ahead(tmp_path):
    [line] = in_process(
        OBSTACLE, CXX=str(tmp_path / "none"), XDG_CACHE_HOME=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=None
    )
    assert "No working C++ compiler found" in line and str(tmp_path / "none") in line


CACHED = """
import sys, torch
from minilora.training import compiling
factor = float(sys.argv[1])

class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        [x] = ctx.saved_tensors
        return factor * x * dy

weight = torch.tensor([1.0, -3.0], requires_grad=True)

def step(batches):
    [gradient] = torch.autograd.grad(Square.apply(weight).sin().sum(), [weight])
    return gradient

reason = compiling.obstacle(torch.device("cpu"))
print(reason or "")
if reason is None:
    torch._dynamo.utils.counters.clear()
    gradient = compiling.compiled(step, "classification", torch.device("cpu"))([])
    print(torch.allclose(gradient, factor * weight * (weight * weight).cos()))
    print(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_artefacts_are_kept_between_processes_but_not_for_another_backward(tmp_path):
    outcomes = [in_process(CACHED, factor, XDG_CACHE_HOME=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=None)
                for factor in (2.0, 2.0, 3.0)]  # fmt: skip
    if outcomes[0][0] and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip(outcomes[0][0])
    assert outcomes == [["", "True", "0"], ["", "True", "1"], ["", "True", "0"]]
    assert any((tmp_path / "minilora/compiled").rglob("*.so"))


def test_where_artefacts_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    compiling.use_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine" and not any(tmp_path.iterdir())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "minilora").touch()  # a file where the folder should be
    compiling.use_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    (tmp_path / "minilora").unlink()
    compiling.use_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "minilora/compiled")
    assert (tmp_path / "minilora/compiled").stat().st_mode & 0o777 == 0o700
