"""Steps by graphs. On a CPU a stand-in for CUDA's graphs runs the function again, and refuses what they would.

`Tape` writes down every operation: a replay must be the recording, operation by operation, on the same shapes and, of
what was there before, on the same memory. Nothing may be read by the host.
"""

import gc
from functools import partial

import numpy as np
import pytest
import torch
import zoo
from conftest import tiny_bert
from test_compiling import Training, micro_batches
from test_population import assert_alike, lines_of, trained
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.cell import Cell
from minilora.errors import TrainingError
from minilora.kernels import norms
from minilora.training import compiling, feed, graphs, optimizers
from minilora.training.train import train, train_together

CUDA = graphs.Cuda


class Tape(TorchDispatchMode):
    """`operations`: of each its name, and the shape and memory of its tensors; None for the memory of new ones."""

    def __init__(self):
        super().__init__()
        self.operations, self.new = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"):
            raise RuntimeError(f"{name} waits for the device")
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        self.operations.append((name, *(self.place(one) for one in given)))
        out = function(*args, **kwargs or {})
        there = {one.untyped_storage().data_ptr() for one in given}
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in there:
                self.new[one.untyped_storage().data_ptr()] = one  # kept, so that no other takes its memory
        return out

    def place(self, tensor):
        memory = tensor.untyped_storage().data_ptr()
        return *tensor.shape, tensor.dtype, None if memory in self.new else (memory, tensor.storage_offset())


def tied(tensor, values):
    """Whether a use of `values` that autograd remembers is alive, which ties the backward to that use's stream."""
    uses = [] if tensor.grad_fn is None else tensor.grad_fn.next_functions
    return any(getattr(node, "variable", None) is values for node, _ in uses)


class Graphs:
    """In the place of `graphs.Cuda`: counts recordings and replays."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, device):
        return self.record if device.type == "cpu" else partial(self.count, CUDA(device))

    def count(self, record, function):
        replay, outputs = record(function)
        self.recorded += 1

        def counted():
            replay()
            self.replayed += 1

        return counted, outputs

    def record(self, function):
        values = function.func.__self__.population.flat.values
        assert not [one for one in gc.get_objects() if type(one) is torch.Tensor and tied(one, values)]
        function()
        with Tape() as tape:
            outputs = function()
        operations = tape.operations
        assert len(operations) > 9
        self.recorded += 1

        def replay():
            with Tape() as again:
                found = function()
            assert again.operations == operations
            for static, new in zip(outputs or (), found or (), strict=True):
                static.copy_(new)
            self.replayed += 1

        return replay, outputs


@pytest.fixture
def by_graphs(monkeypatch):
    """A function that lets the cells after it be trained by graphs, and returns the stand-in."""

    def begin():
        made = Graphs()
        monkeypatch.setattr(norms, "invertible", lambda *_: True)  # asks a CPU's weights, and no other's
        monkeypatch.setattr(graphs, "Cuda", made)
        monkeypatch.setattr(compiling, "choose", lambda *_: ("graphs", "a test"))
        return made

    return begin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    tiny_bert(folder, num_hidden_layers=2)
    return folder


@pytest.fixture
def cell(folder, reviews, device):
    return Cell(
        model=str(folder), data=str(reviews), test_rows=9, max_length=30, batch_size=9, window=3, rank=2, lr=0.01,
        device=device,
    )  # fmt: skip


# {name: (changes, those of each member)}; 111 training rows: the last batch of an epoch has 3.
CASES = {
    "one": (dict(epochs=2), [{}]),
    "micro-batches": (dict(accumulate=3, dropout=0.3, steps=6), [{}]),
    "members that end apart": (
        dict(dropout=0.3),
        [dict(steps=7), dict(rank=5, seed=3, train_rows=31, lr=0.004, steps=9), dict(rank=1, steps=4, seed_init=4)],
    ),
    "the same rows": (dict(layers="1", steps=5), [{}, dict(rank=3, seed_init=3, clip=0.1)]),
    "full": (dict(method="full", lr=1e-3, steps=5), [{}]),
    "one step": (dict(steps=1), [{}]),
}


@pytest.mark.parametrize("name", CASES)
def test_runs_by_graphs_are_the_eager_ones(name, cell, tmp_path, by_graphs):
    """The same losses and adapters but for rounding: rows are padded to other lengths, and their sums are others."""
    changes, members = CASES[name]
    cells = [cell.replace(**(changes | own)) for own in members]
    train_together(cells, [tmp_path / f"eager{k}" for k in range(len(cells))], size=len(cells), quiet=True)
    made = by_graphs()
    train_together(cells, [tmp_path / f"graphs{k}" for k in range(len(cells))], size=len(cells), quiet=True)
    for k in range(len(cells)):
        if name == "full":  # writes a whole base
            ours, wanted = ([line["loss"] for line in lines_of(tmp_path / f"{how}0")] for how in ("graphs", "eager"))
            assert ours == pytest.approx(wanted, rel=1e-3) and len(ours) == 5
            continue
        assert_alike(tmp_path / f"graphs{k}", tmp_path / f"eager{k}")
    steps = max(len(lines_of(tmp_path / f"eager{k}")) for k in range(len(cells)))
    assert 2 <= made.recorded <= 2 * feed.MOST_GRAPHS + 1 and made.replayed >= 2 * steps
    if "accumulate" in changes:
        assert made.replayed > 3.5 * steps


def test_a_run_by_graphs_goes_on_as_if_it_had_not_stopped(cell, tmp_path, by_graphs):
    """Bit for bit: recording again, with moments that are not 0, changes nothing of what was saved."""
    by_graphs()
    cell = cell.replace(dropout=0.3, steps=8)
    train(cell, tmp_path / "whole", quiet=True)

    def stop(step, loss, **_):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cell, tmp_path / "stopped", quiet=True, save_every=2, on_step=stop)
    train(resume=tmp_path / "stopped", quiet=True)
    whole, stopped = trained(tmp_path / "whole"), trained(tmp_path / "stopped")
    assert whole and all(torch.equal(value, stopped[name]) for name, value in whole.items())
    assert [line["loss"] for line in lines_of(tmp_path / "whole")] == [
        line["loss"] for line in lines_of(tmp_path / "stopped")
    ]


def test_a_member_that_diverges_stops_and_the_others_go_on(cell, tmp_path, by_graphs):
    made = by_graphs()
    cells = [cell.replace(steps=6), cell.replace(steps=6, lr=1e30, seed=4)]
    found = train_together(cells, [tmp_path / "0", tmp_path / "1"], size=2, quiet=True)
    assert isinstance(found[1][0], TrainingError) and made.replayed == 12
    train(cells[0], tmp_path / "alone", quiet=True)
    assert_alike(tmp_path / "0", tmp_path / "alone")


def test_completions_by_graphs(tmp_path, by_graphs, device):
    """Task lm: each batch has places for as many completion tokens as a batch can have."""
    path = tmp_path / "rows.csv"
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(["a", "good", "film"], draw.integers(2, 7))) for _ in range(40)]
    lines = [f"{text} {i},{('good', 'a bad one')[i % 2]}" for i, text in enumerate(texts)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    zoo.tiny_decoder(tmp_path / "base")
    cell = Cell(model=str(tmp_path / "base"), data=str(path), test_rows=5, task="lm", steps=4, batch_size=6, rank=2,
                max_length=50, inject=dict(sources=("date:good",)), device=device)  # fmt: skip
    cells = [cell, cell.replace(rank=3, seed=1)]
    train_together(cells, [tmp_path / "eager0", tmp_path / "eager1"], size=2, quiet=True)
    made = by_graphs()
    train_together(cells, [tmp_path / "graphs0", tmp_path / "graphs1"], size=2, quiet=True)
    for k in range(2):
        ours, wanted = (lines_of(tmp_path / f"{how}{k}") for how in ("graphs", "eager"))
        assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in wanted], rel=1e-3)
    assert made.replayed == 8


def test_recording_changes_nothing_and_replays_are_updates(tmp_path, monkeypatch):
    """Rows that pad a batch change a step by rounding only; without them it is the eager step bit for bit."""
    monkeypatch.setattr(norms, "invertible", lambda *_: True)
    tiny_bert(tmp_path, num_hidden_layers=1)
    for K, dropout in ((1, 0.0), (1, 0.3), (3, 0.3)):
        eager, ours = (Training(tmp_path, K, "side", dropout) for _ in range(2))
        for one in (eager, ours):
            one.step(micro_batches(K, 8, 9, 1, dropout, 5), torch.full((K,), 0.01))
        before, addresses = [t.detach().clone() for t in ours.state], [t.data_ptr() for t in ours.state]
        random = torch.get_rng_state()
        blanks = [micro_batches(K, 8, width, 1, dropout, 1)[0] for width in (12, 9)]
        made = Graphs()
        run = graphs.Replayed(ours.together, ours.optimizer, ours.clips, ours.going, blanks, made.record)
        assert made.recorded == 3 and torch.equal(torch.get_rng_state(), random)
        assert all(map(torch.equal, ours.state, before))
        for number, width in enumerate((9, 12, 12, 9)):
            rates = torch.linspace(1e-2, 3e-2, K) / (1 + number)
            given = micro_batches(K, 8, width, 1 + number % 2, dropout, number)
            found, wanted = run(given, rates), eager.step(given, rates)
            assert all(map(torch.equal, found, wanted))
        assert all(map(torch.equal, ours.state, eager.state))
        assert [t.data_ptr() for t in ours.state] == addresses
        with pytest.raises(KeyError):
            run(micro_batches(K, 7, 9, 1, dropout, 0), rates)


def test_what_cannot_be_recorded_is_trained_eagerly_and_says_so(cell, tmp_path, by_graphs, monkeypatch, capsys):
    by_graphs()
    real = optimizers.AdamW.step

    def waits(self, grads, rates, going):
        assert rates.sum().item() >= 0
        real(self, grads, rates, going)

    monkeypatch.setattr(optimizers.AdamW, "step", waits)
    train(cell.replace(steps=3), tmp_path / "graphs")
    said = {"cpu": "_local_scalar_dense waits for the device", "cuda": "CUDA error: operation not permitted"}
    assert f"; eager (the step cannot be recorded: {said[cell.device]}" in capsys.readouterr().err
    monkeypatch.undo()
    train(cell.replace(steps=3), tmp_path / "eager", quiet=True)
    ours, wanted = trained(tmp_path / "graphs"), trained(tmp_path / "eager")
    assert ours and all(torch.equal(value, wanted[name]) for name, value in ours.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no graphs")
def test_a_failed_recording_leaves_a_cuda_device_as_it_was():
    """Its stream is not current, random numbers can be drawn, and the next recording succeeds."""
    device = "cuda"
    record, x, stream = CUDA(torch.device(device)), torch.ones(3, device=device), torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        record(lambda: x.sum().item())
    assert torch.cuda.current_stream() == stream and torch.randn(3, device=device).isfinite().all()
    replay, y = record(lambda: 2 * x)
    x.fill_(4.0)
    replay()
    assert y.tolist() == [8.0] * 3
