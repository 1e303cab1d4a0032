"""Members of different sizes side by side: how much is padded, and what a step of 64 costs."""

import pytest
import test_device
import torch
from conftest import tiny_bert
from torch.nn import functional as F

from minilora.cell import Cell
from minilora.training import loop
from minilora.training.state import Flat

RANKS = sorted([1, 2, 4, 8, 16, 32, 64, 128] * 8)


def fused(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """Attention as a GPU has it: on meta torch would take its parts one by one."""
    mask = attn_mask.expand(len(q), q.shape[1], q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=scale)[0]


def test_a_step_of_64_members_takes_few_launches_and_numbers(tmp_path, monkeypatch):
    """The default base's shape, but for its vocabulary, with ranks 1 to 128."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    monkeypatch.setitem(test_device.SEVERAL, "_scaled_dot_product_efficient_attention_backward", 3)
    monkeypatch.setattr("minilora.kernels.adamw.PIECE", 1 << 40)  # in one piece, as off the CPU
    tiny_bert(tmp_path, num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    cells = [Cell(model=str(tmp_path), rank=rank) for rank in RANKS]
    with test_device.Watch(0):
        population, optimizer = test_device.on_meta(tmp_path, cells)
        clips, rates = torch.ones(64, device="meta"), torch.ones(64, device="meta")
        going, batch = torch.ones(64, dtype=torch.bool, device="meta"), test_device.batch_of(64, False, 0.0)
    with test_device.Watch(4 * 3) as step:
        loop.update(population, optimizer, clips, going, [batch], rates)
    assert step.unknown() == [] and 300 < step.kernels <= 420
    own = sum(p.numel() for member in population.flat.members for p in member.values())
    assert [group.count for group in population.flat.groups] == [48, 16]
    assert own < population.flat.values.numel() < 1.8 * own  # padded to the largest: 4 times


def members(sizes):
    """Members with an A and a B of each rank, a head, and no B where the rank is 3."""
    return [{"base.layers.0.q.A": torch.full((rank, 24), 1.0 + k), "classifier.weight": torch.full((2 + k % 2, 5), 9.0)}
            | ({"base.layers.0.q.B": torch.full((40, rank), 2.0)} if rank != 3 else {})
            for k, rank in enumerate(sizes)]  # fmt: skip


@pytest.mark.parametrize("ranks, groups", [
    ((1, 1, 2), [2, 1]), ((5,), [1]), ((7, 7, 7), [3]), ((3, 1, 17, 64), [1, 1, 1, 1]), ((1, 64, 1), [1, 1, 1]),
    (tuple(range(1, 30)), None),
])  # fmt: skip
def test_every_number_has_its_place(ranks, groups):
    own = members(ranks)
    wanted = [{name: p.clone() for name, p in one.items()} for one in own]
    flat = Flat([{name: torch.nn.Parameter(p) for name, p in one.items()} for one in own])
    counts = [group.count for group in flat.groups]
    assert sum(counts) == len(ranks) and (counts == groups or groups is None and 2 < len(counts) <= 8)
    places = set()
    for k, one in enumerate(wanted):
        for name, value in one.items():
            part = flat.part(flat.values.data, k, name)
            assert torch.equal(part, value) and part.data_ptr() == flat.members[k][name].data_ptr()
            at = part - part + torch.arange(1, 1 + part.numel()).view_as(part)
            flat.part(flat.values.data, k, name).copy_(at)
            places.add((k, name))
    assert flat.values.count_nonzero() == sum(v.numel() for one in wanted for v in one.values())
    squares = [sum(p.detach().square().sum() for p in one.values()).sqrt() for one in flat.members]
    torch.testing.assert_close(flat.norms(flat.values.data), torch.stack(squares))
    lines = flat.by_line(torch.arange(1.0, 1 + len(ranks)))
    assert lines.shape == (len(flat.values),) and lines.unique().tolist() == list(range(1, 1 + len(ranks)))
    for k in range(len(ranks)):
        some = flat.part(torch.zeros_like(flat.values.data) + lines[:, None], k, "base.layers.0.q.A")
        assert (some == k + 1).all()
    assert len(places) == sum(map(len, wanted))
