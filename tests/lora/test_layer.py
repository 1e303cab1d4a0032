"""The layer and its verbs; gradients against PEFT's."""

import peft
import pytest
import torch
import transformers
from conftest import random_batch

from minilora.base import model
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.lora.layer import attach, detach, merge, named_layers, scale_by, unmerge
from minilora.lora.targets import Slot, plan_slots

SLOTS = {"layers.0.q": Slot(3, 6.0, 2.0), "layers.0.v": Slot(1, 5.0, 5.0), "layers.2.down": Slot(4, 2.0, 0.5)}


def fill(base, seed=5):
    """Non-zero B, so that the adapter does something."""
    draw = torch.Generator().manual_seed(seed)
    for _, layer in named_layers(base):
        with torch.no_grad():
            layer.B.copy_(0.3 * torch.randn(layer.B.shape, generator=draw))
    return base


def states(base, batch):
    with torch.inference_mode():
        return base(*batch)


def snapshot(base):
    return {name: p.detach().clone() for name, p in base.named_parameters()}


def test_attach_starts_at_the_base_and_detach_restores_it(tiny_folder):
    base, batch = model.load(tiny_folder), random_batch(90, [9, 4])
    before, start = snapshot(base), states(base, batch)
    attach(base, SLOTS, seed=1)
    assert [name for name, _ in named_layers(base)] == list(SLOTS)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {f"{s}.{f}" for s in SLOTS for f in "AB"}
    assert torch.equal(states(base, batch), start)  # B is 0
    for name, layer in named_layers(base):
        rank, bound = SLOTS[name].rank, layer.linear.in_features**-0.5
        assert layer.A.shape == (rank, layer.linear.in_features) and layer.B.shape == (layer.linear.out_features, rank)
        assert layer.A.dtype == layer.B.dtype == torch.float32
        assert 0.6 * bound < layer.A.abs().max() <= bound
    assert not torch.allclose(states(fill(base), batch), start, atol=1e-3)
    detach(base)
    after = snapshot(base)
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert torch.equal(states(base, batch), start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_never_drifts(tiny_folder, dtype):
    base, batch = model.load(tiny_folder, dtype), random_batch(90, [9, 4])
    before = snapshot(base)
    fill(attach(base, SLOTS, seed=1))
    free = states(base, batch)
    for _ in range(3):
        merge(merge(base))
        merged = states(base, batch)
        torch.testing.assert_close(merged, free, rtol=0, atol=2e-5 if dtype == torch.float32 else 0.15)
        assert not torch.equal(merged, states(unmerge(base), batch)) or dtype == torch.float32
        assert torch.equal(states(base, batch), free)
    detach(merge(base))  # while merged, too
    after = snapshot(base)
    assert all(torch.equal(after[n], before[n]) for n in before) and len(after) == len(before)


def test_merged_weight_is_the_sum(tiny_folder):
    base = fill(attach(model.load(tiny_folder), SLOTS))
    for name, layer in named_layers(base):
        weight, slot = layer.linear.weight.clone(), SLOTS[name]
        layer.merge()
        wanted = weight.double() + slot.scale * layer.B.double() @ layer.A.double()
        torch.testing.assert_close(layer.linear.weight.double(), wanted, rtol=1e-6, atol=1e-6)


def test_scale(tiny_folder):
    base, batch = model.load(tiny_folder), random_batch(90, [9, 4])
    start = states(base, batch)
    fill(attach(base, SLOTS))
    full = states(base, batch)
    torch.testing.assert_close(states(scale_by(base, 0), batch), start, rtol=0, atol=1e-5)
    assert torch.equal(states(scale_by(base, 1), batch), full)
    with torch.no_grad():
        for _, layer in named_layers(base):
            layer.B.mul_(2)
    twice = states(base, batch)
    with torch.no_grad():
        for _, layer in named_layers(base):
            layer.B.div_(2)
    torch.testing.assert_close(states(scale_by(base, 2), batch), twice, rtol=0, atol=1e-5)
    merge(base)
    with pytest.raises(InputError, match="unmerge"):
        scale_by(base, 1)


def test_attaching_twice_is_refused(tiny_folder):
    base = attach(model.load(tiny_folder), SLOTS)
    with pytest.raises(InputError, match="detach"):
        attach(base, SLOTS)


def test_each_start_is_a_stream_of_its_own(tiny_folder):
    def starts(slots, seed):
        base = attach(model.load(tiny_folder), slots, seed=seed)
        return {name: layer.A.detach() for name, layer in named_layers(base)}

    all_three, again, other = starts(SLOTS, 1), starts(SLOTS, 1), starts(SLOTS, 2)
    only_v = starts({"layers.0.v": Slot(1, 5.0, 5.0)}, 1)
    wide = starts({"layers.0.v": Slot(7, 5.0, 5.0)}, 1)["layers.0.v"]
    assert all(torch.equal(all_three[n], again[n]) and not torch.equal(all_three[n], other[n]) for n in SLOTS)
    assert torch.equal(only_v["layers.0.v"], all_three["layers.0.v"])  # other targets do not move it
    assert torch.equal(wide[:1], all_three["layers.0.v"])  # nor does a larger rank move its first rows
    assert not torch.equal(all_three["layers.0.q"][:1], all_three["layers.0.v"])


@pytest.mark.parametrize("real", [False, True])
def test_gradients_match_peft(tiny_folder, base_folder, real):
    folder = base_folder if real else tiny_folder
    cell = Cell(rank=5, alpha=7.0, targets=("q:2", "k", "v", "o:3:11", "mlp"), layers="0,2")
    base = model.load(folder)
    slots = plan_slots(base.spec, cell)
    fill(attach(base, slots, seed=3))
    reference = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    names = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
             "o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}  # fmt: skip
    theirs = {name: f"encoder.layer.{name.split('.')[1]}.{names[name.split('.')[2]]}" for name in slots}
    config = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=list(theirs.values()), lora_dropout=0.0,
        rank_pattern={theirs[n]: s.rank for n, s in slots.items()},
        alpha_pattern={theirs[n]: s.alpha for n, s in slots.items()},
    )  # fmt: skip
    reference = peft.get_peft_model(reference, config).eval()
    ours = dict(named_layers(base))
    modules = {n: reference.base_model.model.get_submodule(theirs[n]) for n in slots}
    with torch.no_grad():
        for name, layer in ours.items():
            modules[name].lora_A.default.weight.copy_(layer.A)
            modules[name].lora_B.default.weight.copy_(layer.B)

    ids, lengths = random_batch(90, [19, 8, 1, 30])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    cotangent = torch.randn(*ids.shape, base.spec.width, generator=torch.Generator().manual_seed(2))
    cotangent = cotangent * mask[..., None] / mask.sum()
    (base(ids, lengths) * cotangent).sum().backward()
    (reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state * cotangent).sum().backward()
    compared = 0
    for name, layer in ours.items():
        for found, wanted in ((layer.A, modules[name].lora_A), (layer.B, modules[name].lora_B)):
            wanted = wanted.default.weight.grad
            assert found.grad.shape == wanted.shape and wanted.abs().max() > 1e-4
            assert (found.grad - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
            compared += 1
    assert compared == 2 * 2 * 6


def test_dropout_only_in_training(tiny_folder):
    base, batch = fill(attach(model.load(tiny_folder), SLOTS, dropout=0.5)), random_batch(90, [9, 4])
    base.eval()
    still = states(base, batch)
    assert torch.equal(states(base, batch), still)
    base.train()
    torch.manual_seed(1)
    assert not torch.allclose(states(base, batch), still, atol=1e-3)


def test_repr(tiny_folder):
    base = attach(model.load(tiny_folder), SLOTS)
    assert repr(base.layers[2].down) == "LoRALinear(40 -> 24, rank=4, scale=0.5, lora)"
    base = attach(model.load(tiny_folder), {"layers.0.q": Slot(3, 8.0, 8 / 3)}, variant="lora-fa")
    assert repr(base.layers[0].q) == "LoRALinear(24 -> 24, rank=3, scale=2.6667, lora-fa)"
