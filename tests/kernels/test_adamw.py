"""The flat step against torch's AdamW, member by member, and against its equations."""

import pytest
import torch

from minilora.kernels import adamw as op


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("piece", [1 << 18, 20])  # the smaller: 7 numbers of each member at a time
def test_members_are_those_of_torch(monkeypatch, piece):
    monkeypatch.setattr(op, "PIECE", piece)
    start, rates, decays = numbers(3, 23), [0.1, 0.003, 0.02], [0.0, 0.1, 0.5]
    ratios = torch.ones(3, 23, dtype=torch.float64)
    ratios[1, 11:] = 4.0
    values, m, v = start.clone(), torch.zeros(3, 23).double(), torch.zeros(3, 23).double()
    parts = [[torch.nn.Parameter(row[:11].clone()), torch.nn.Parameter(row[11:].clone())] for row in start]
    judges = [
        torch.optim.AdamW([{"params": [low]}, {"params": [high], "lr": rate * ratio}], lr=rate, weight_decay=decay)
        for (low, high), rate, ratio, decay in zip(parts, rates, (1.0, 4.0, 1.0), decays, strict=True)
    ]
    for step in range(1, 8):
        grads = numbers(3, 23, seed=step)
        steps = torch.full((3,), float(step), dtype=torch.float64)
        op.adamw(values, grads, m, v, steps, torch.tensor(rates).double(), torch.tensor(decays).double(), ratios)
        for k, judge in enumerate(judges):
            parts[k][0].grad, parts[k][1].grad = grads[k, :11].clone(), grads[k, 11:].clone()
            judge.step()
    for k, (low, high) in enumerate(parts):
        torch.testing.assert_close(values[k], torch.cat([low, high]).detach(), rtol=1e-6, atol=1e-8)
    assert ((values - start).abs().amax(1) > 0.01).all()


def test_the_equations():
    p, g, m, v = (numbers(1, 9, seed=seed) for seed in range(4))
    v = v.square()
    wanted = op.reference(p, g, m, v, 5, 0.1, 0.3)
    op.adamw(p, g, m, v, *(torch.tensor([value], dtype=torch.float64) for value in (5.0, 0.1, 0.3)))
    for found, right in zip((p, m, v), wanted, strict=True):
        torch.testing.assert_close(found, right)


def test_a_rate_of_0_changes_nothing():
    values, m, v = numbers(2, 5), torch.zeros(2, 5).double(), torch.zeros(2, 5).double()
    start = values.clone()
    ones = torch.ones(2, dtype=torch.float64)
    op.adamw(values, numbers(2, 5, seed=1), m, v, ones, torch.tensor([0.0, 0.1]).double(), ones)
    assert torch.equal(values[0], start[0]) and (values[1] != start[1]).all()


def test_compiles_without_graph_breaks():
    def step(*tensors):
        op.adamw(*tensors)
        return tensors[0]

    def arguments():
        return [numbers(2, 9).float(), numbers(2, 9, seed=1).float(), torch.zeros(2, 9), torch.zeros(2, 9),
                torch.ones(2), torch.tensor([0.1, 0.2]), torch.tensor([0.0, 0.1])]  # fmt: skip

    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments())
    torch.testing.assert_close(found, step(*arguments()))
