"""The precision of a run: torch's settings are set for it, recorded and restored; and products in bfloat16."""

import dataclasses
import os

import pytest
import torch
from conftest import random_batch, tiny_bert
from torch import nn
from zoo import tiny_decoder

import minilora
from minilora import files, precision
from minilora.base import model
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.kernels import linear as op

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def cell(base, reviews):
    return Cell(model=str(base), data=str(reviews), test_rows=31, max_length=30, batch_size=6, rank=2, lr=0.01, steps=5)


def state():
    """torch's settings now."""
    return {name: now for name, (now, _) in precision.settings().items()}


# --- torch's settings


def test_settings_hold_for_a_block_and_no_longer():
    before = state()
    with precision.applied(Cell(products="tf32", deterministic="on")):
        inside = state()
        with precision.applied(Cell()):
            assert state() == before | {"float32_products": "ieee", "bfloat16_reduced_sums": False,
                                        "cudnn_attention": False}  # fmt: skip
        assert state() == inside
    assert inside == {"float32_products": "tf32", "bfloat16_reduced_sums": False, "cudnn_attention": False,
                      "cudnn_timing": False, "deterministic": (True, False)}  # fmt: skip
    assert state() == before


def test_the_users_own_settings_come_back_after_an_error():
    before = precision.settings()
    own = {"float32_products": "tf32", "cudnn_timing": True, "deterministic": (True, True)}
    try:
        for name, value in own.items():
            before[name][1](value)
        mine = state()
        with pytest.raises(KeyError), precision.applied(Cell()):
            assert state()["float32_products"] == "ieee" and not state()["cudnn_timing"]
            assert state()["deterministic"] == (False, False)
            raise KeyError
        assert state() == mine and own.items() <= mine.items()
    finally:
        for now, put in before.values():
            put(now)


def test_training_records_its_settings_and_restores_them(cell, tmp_path):
    before, seen = state(), []
    results, folder = minilora.train(
        cell.replace(deterministic="on"), tmp_path / "run", quiet=True, on_step=lambda *a, **b: seen.append(state())
    )
    assert len(seen) == 5 and all(one["deterministic"] == (True, False) for one in seen)
    assert not any(one["cudnn_attention"] or one["bfloat16_reduced_sums"] for one in seen)
    assert state() == before
    assert files.read_json(folder / "results.json")["hardware"]["deterministic"] == "on"
    card = (folder / "adapter" / "README.md").read_text()
    assert "base in float32, products in float32, deterministic algorithms on" in card

    def fails(*values, **named):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        minilora.train(cell.replace(deterministic="on"), tmp_path / "failed", quiet=True, on_step=fails)
    assert state() == before
    assert minilora.train(cell, tmp_path / "plain", quiet=True)[0]["hardware"]["deterministic"] == "off"


def test_what_a_gpus_record_says(monkeypatch):
    monkeypatch.delenv(precision.WORKSPACE, raising=False)
    with precision.applied(Cell(products="tf32")):
        assert precision.stated(CUDA) == {
            "float32_products": "tf32", "bfloat16_reduced_sums": "off", "cudnn_attention": "off", "cudnn_timing": "off",
            "deterministic": "off", "cublas_workspace": "torch's",
        }  # fmt: skip
        assert precision.stated(CPU) == {"deterministic": "off"}
    for cell, wanted in ((Cell(dtype="bfloat16"), "tf32"), (Cell(), "ieee"), (Cell(products="bfloat16"), "ieee")):
        with precision.applied(cell):
            assert precision.stated(CUDA)["float32_products"] == wanted


def test_tf32_is_refused_where_it_is_not(cell, tmp_path, monkeypatch):
    tf32 = Cell(products="tf32")
    with pytest.raises(InputError, match="products = 'tf32' needs an NVIDIA GPU of the Ampere.*but the device is cpu"):
        minilora.train(cell.replace(products="tf32", device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if capability < (8, 0):
            with pytest.raises(InputError, match="the device is cuda: use --products float32 or bfloat16"):
                precision.check(tf32, CUDA)
        else:
            precision.check(tf32, CUDA)
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD's
    with pytest.raises(InputError, match="NVIDIA"):
        precision.check(tf32, CUDA)


def test_cublas_is_told_before_cuda_starts(monkeypatch):
    monkeypatch.setenv(precision.WORKSPACE, ":0:0")
    exact = Cell(deterministic="on")
    precision.check(Cell(), CUDA)
    precision.check(exact, CPU)
    assert os.environ[precision.WORKSPACE] == ":0:0"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(InputError, match="needs CUBLAS_WORKSPACE_CONFIG=:4096:8 before CUDA starts"):
        precision.check(exact, CUDA)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    precision.check(exact, CUDA)
    assert os.environ[precision.WORKSPACE] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    precision.check(exact, CUDA)  # a second run in the same process


# --- products in bfloat16


def test_a_product_is_taken_in_the_weights_dtype():
    draw, cases = torch.Generator().manual_seed(3), 0
    for rows, inner, out in ((1, 5, 2), (7, 33, 17), (40, 64, 24)):
        x, weight, bias, plus = (torch.randn(*size, generator=draw) for size in
                                 ((rows, inner), (out, inner), (out,), (rows, out)))  # fmt: skip
        rounded = weight.bfloat16()
        for b in (None, bias):
            for p in (None, plus):
                y = op.product(x, rounded, b, p)
                wanted = x.bfloat16().double() @ rounded.double().T  # rounded once more, after the sum
                room = 2**-8 * wanted.abs() + 1e-5
                wanted = wanted + (0 if b is None else b) + (0 if p is None else p)
                assert y.dtype == torch.float32 and ((y - wanted).abs() <= room).all()
                cases += 1
        found = x.clone().requires_grad_()
        dy = torch.randn(rows, out, generator=draw)
        op.linear(found, rounded, bias).backward(dy)
        wanted = dy.bfloat16().double() @ rounded.double()
        assert found.grad.dtype == torch.float32
        assert ((found.grad - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5).all()
        assert torch.equal(op.product(0 * x, rounded, bias), bias.expand(rows, -1))  # the bias is not rounded
    assert cases == 12


def test_the_base_is_transformers_with_rounded_linear_maps(tmp_path):
    reference = tiny_bert(tmp_path)
    ids, lengths = random_batch(20, [9, 4, 7])
    mask = (torch.arange(9) < lengths[:, None]).long()
    with torch.no_grad():
        exact = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        for module in reference.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(module.weight.bfloat16())
                module.register_forward_pre_hook(lambda module, given: (given[0].bfloat16().float(),))
        wanted = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        base = model.load(tmp_path, products=torch.bfloat16)
        found = base(ids, lengths)
    rounded = {name for name, p in base.named_parameters() if p.dtype == torch.bfloat16}
    targets = ("q", "k", "v", "o", "up", "down")
    assert rounded == {f"layers.{layer}.{target}.weight" for layer in range(3) for target in targets}
    assert {p.dtype for p in base.parameters()} == {torch.float32, torch.bfloat16} and found.dtype == torch.float32
    real = mask.bool()
    error, rounding = ((one - wanted)[real].abs().mean() for one in (found, exact))
    assert 0 < error < rounding < 0.05  # nearer to the rounded base than that is to the exact one


def test_a_tied_unembedding_is_rounded_for_its_product_only(tmp_path):
    tiny_decoder(tmp_path)
    base = model.load(tmp_path, unembedding=True, products=torch.bfloat16)
    weight, bias = base.unembedding_weights()
    table = base.embed.tokens.weight
    assert bias is None and table.dtype == torch.float32 and torch.equal(weight, table.bfloat16())
    plain = model.load(tmp_path, unembedding=True)
    assert plain.unembedding_weights()[0] is plain.embed.tokens.weight


@pytest.mark.parametrize("changes", [{}, {"variant": "dora"}, {"init": "pissa"}, {"dropout": 0.2}], ids=str)
def test_a_run_with_bfloat16_products(cell, tmp_path, changes):
    """As the one in float32 but for rounding; its adapter is float32, and it opens as it was trained."""
    cell = cell.replace(**changes)
    pairs = {}
    for products in ("float32", "bfloat16"):
        results, folder = minilora.train(cell.replace(products=products), tmp_path / products, quiet=True)
        steps = [line["loss"] for line in files.read_jsonl(folder / "metrics.jsonl") if line["kind"] == "step"]
        pairs[products] = results, steps, minilora.open(folder)
    (_, exact, _), (results, rounded, opened) = pairs["float32"], pairs["bfloat16"]
    assert len(exact) == len(rounded) == 5 and exact != rounded
    assert rounded == pytest.approx(exact, rel=0.02)
    assert {p.dtype for p in opened.base.parameters() if p.requires_grad} <= {torch.float32}
    assert all(factors.A.dtype == factors.B.dtype == torch.float32 for factors in opened.adapter.values())
    assert opened.run_tests()[0]["clean"]["accuracy"] == results["tests"]["clean"]["accuracy"]


def test_a_population_with_bfloat16_products(cell, tmp_path):
    cells = [cell.replace(products="bfloat16", rank=rank, seed=rank) for rank in (1, 3)]
    together = minilora.train_together(cells, [tmp_path / "a", tmp_path / "b"], size=2, quiet=True)
    for one, (results, folder) in zip(cells, together, strict=True):
        assert results["train"]["population"] == 2
        _, alone = minilora.train(one, tmp_path / f"alone{one.rank}", quiet=True)
        losses = [[line["loss"] for line in files.read_jsonl(path / "metrics.jsonl") if line["kind"] == "step"]
                  for path in (folder, alone)]  # fmt: skip
        assert losses[0] == pytest.approx(losses[1], rel=0.01) and len(losses[0]) == 5
    assert dataclasses.replace(cells[0], rank=3, seed=3) == cells[1]
