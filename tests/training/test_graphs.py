"""Steps by graphs, on a CPU: a stand-in for CUDA's graphs runs the recorded function again, and refuses what they would.

`Tape` writes down every operation: a replay must be the recording, operation by operation, on the same shapes and, of
what was there before, on the same memory. Nothing may be read by the host.
"""

import json

import numpy as np
import pytest
import torch
import zoo
from conftest import tiny_bert
from test_population import assert_alike, lines_of, trained
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.cell import Cell
from minilora.errors import TrainingError
from minilora.files import read_jsonl
from minilora.training import compiling, feed, graphs, loop, optimizers, step
from minilora.training.train import train, train_together


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


class Graphs:
    """In the place of `graphs.Cuda`: counts recordings and replays."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, device):
        assert device.type == "cpu"
        return self.record

    def record(self, function):
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
        monkeypatch.setattr(graphs, "Cuda", made)
        monkeypatch.setattr(compiling, "choose", lambda *_: ("graphs", "a test"))
        return made

    return begin


@pytest.fixture
def cell(base, reviews):
    return Cell(
        model=str(base), data=str(reviews), test_rows=31, max_length=30, batch_size=7, window=3, rank=2, lr=0.01
    )


# {name: (changes, those of each member)}; 89 training rows: the last batch of an epoch has 5.
CASES = {
    "one": (dict(epochs=2), [{}]),
    "dropout": (dict(dropout=0.3), [{}]),
    "micro-batches": (dict(accumulate=3, dropout=0.3), [{}]),
    "members that end apart": (
        dict(dropout=0.3),
        [{}, dict(rank=5, seed=3, batch_size=4, lr=0.004), dict(rank=1, steps=4, seed_init=4)],
    ),
    "the same rows": (dict(layers="1-2"), [{}, dict(rank=3, seed_init=3, clip=0.1)]),
    "dora": (dict(variant="dora"), [{}]),
    "full": (dict(method="full", lr=1e-3), [{}]),
    "one step": (dict(steps=1), [{}]),
}


@pytest.mark.parametrize("name", CASES)
def test_runs_by_graphs_are_the_eager_ones(name, cell, tmp_path, by_graphs):
    """The same losses and adapters but for rounding: rows are padded to other lengths, and their sums are others."""
    changes, members = CASES[name]
    cells = [cell.replace(**(changes | own)) for own in members]
    train_together(cells, [tmp_path / f"eager{k}" for k in range(len(cells))], size=len(cells), quiet=True)
    before = torch.get_rng_state()
    made = by_graphs()
    train_together(cells, [tmp_path / f"graphs{k}" for k in range(len(cells))], size=len(cells), quiet=True)
    assert torch.equal(torch.get_rng_state(), before)
    for k in range(len(cells)):
        assert_alike(tmp_path / f"graphs{k}", tmp_path / f"eager{k}")
    steps = max(len(lines_of(tmp_path / f"eager{k}")) for k in range(len(cells)))
    assert 2 <= made.recorded <= 2 * feed.MOST_GRAPHS + 1 and made.replayed >= 2 * steps
    if "accumulate" in changes:
        assert made.replayed > 3.5 * steps
