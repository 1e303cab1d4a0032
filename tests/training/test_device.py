"""What a step and an evaluation would ask of a GPU, counted without one: all that would lie there is on `meta`.

`Watch` sees each operation, and notes with the innermost line of this project

    mixed      a tensor of the host with dimensions beside one of the device, which a GPU refuses
    scalar     a number of the host beside one of the device: read at each launch, and no CUDA graph has it
    read       the host waits for a number of the device
    to host    a copy from the device, which waits
    to device  a copy to the device
    shape      a result whose shape follows from values, for which the host waits
    host       an operation on tensors of the host only
    float64    a tensor of the device that is of float64

Nothing is allowed but what `KNOWN` has, each with its reason; `kernels`, the operations that launch something, have
limits, because a small model's step on a GPU is as long as its launches.
"""

import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import ROOT, tiny_bert
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.base import model
from minilora.cell import Cell
from minilora.data.batches import Batch, place_completions
from minilora.lora.layer import attach, detach, named_layers
from minilora.lora.targets import plan_slots
from minilora.tasks.classification import Classifier
from minilora.tasks.language_model import LanguageModel
from minilora.training import loop, optimizers
from minilora.training.member import trained_parameters
from minilora.training.population import Population
from minilora.training.state import Flat

META, CPU = torch.device("meta"), torch.device("cpu")
# What launches nothing: views, and what only allocates.
FREE = set("""
view _unsafe_view reshape t transpose permute expand as_strided slice select split split_with_sizes unsqueeze squeeze
detach alias unbind diagonal unfold narrow chunk empty empty_like empty_strided new_empty new_empty_strided lift_fresh
_reshape_alias mT expand_as view_as unsafe_split
""".split())
SEVERAL = {"embedding_dense_backward": 5, "nonzero": 4, "index_put_": 4, "index_put": 4, "_index_put_impl_": 4,
           "sort": 3, "cumsum": 2}  # fmt: skip
ROWS, WIDTH, ANSWERS = 4, 9, 3

# (kind, a part of the line): why it may stay.
KNOWN = {
    ("read", "going.item()"): "torch's Adafactor takes its rate as a number",
    ("read", "rates.item()"): "the same",
    ("read", "self.torch.step()"): "and counts steps in one",
}


class Watch(TorchDispatchMode):
    """See the module's docstring. `size`: how many are found by a mask whose content is unknown."""

    def __init__(self, size):
        super().__init__()
        self.size, self.last, self.found, self.launches = size, None, Counter(), Counter()

    @property
    def kernels(self):
        return sum(self.launches.values())

    def unknown(self):
        return [f"{kind} {name} at {line}" for kind, name, line in self.found
                if not any(kind == one and part in line for one, part in KNOWN)]  # fmt: skip

    def note(self, kind, name):
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and "tests" not in path.parts:
                break
        self.found[kind, name, f"{path.name}:{frame.lineno} {frame.line}"] += 1

    def places(self, index):
        if index is None or index.dtype != torch.bool:
            return [index]
        return [torch.empty(self.size, dtype=torch.int64, device=META) for _ in range(index.ndim)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # there composite operations come whole
            with self:
                if (whole := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return whole
        name = func.overloadpacket.__name__
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        here, host = [one for one in given if one.is_meta], [one for one in given if not one.is_meta]
        target = kwargs.get("device")
        if name in ("_local_scalar_dense", "is_nonzero", "equal") and here:
            self.note("read", name)
            return self.last == "all" if here[0].dtype == torch.bool else 1  # all is well, and nothing is any
        if name == "_to_copy" and target is not None and here and torch.device(target) == CPU:
            self.note("to host", name)
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "_to_copy" and target is not None and host and torch.device(target) == META:
            self.note("to device", name)
        elif name == "copy_" and here and host:
            self.note("to device" if args[0].is_meta else "to host", name)
            return args[0]
        elif here and host:
            self.note("mixed" if any(one.ndim for one in host) else "scalar", name)
        elif any(one.ndim for one in host):
            self.note("host", name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and here:
            if any(one is not None and one.dtype == torch.bool for one in args[1]):
                self.note("shape", name)
                self.launches["nonzero"] += SEVERAL["nonzero"]
                args = (args[0], [part for one in args[1] for part in self.places(one)], *args[2:])
        if name == "nonzero" and here:
            self.note("shape", name)
            return torch.empty(self.size, args[0].ndim, dtype=torch.int64, device=META)
        if name == "repeat_interleave" and here and len(args) == 1 and kwargs.get("output_size") is None:
            self.note("shape", name)
            return torch.empty(self.size, dtype=torch.int64, device=META)
        if name in ("masked_select", "_unique2", "bincount") and here:
            self.note("shape", name)
        out, self.last = func(*args, **kwargs), name
        made = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        if (here or any(one.is_meta for one in made)) and name not in FREE:
            self.launches[name] += SEVERAL.get(name, 1)
        for one in made:
            if one.is_meta and one.dtype == torch.float64:
                self.note("float64", name)
            if not given and not one.is_meta and one.ndim:
                self.note("host", name)
        return out


def on_meta(folder, cells):
    """(A population of these cells, its optimiser), as `loop.put_together` has them, on the device."""
    lm = cells[0].task == "lm"
    base, models, layers, parameters = model.load(folder, getattr(torch, cells[0].dtype), META, lm), [], [], []
    for k, cell in enumerate(cells):
        if cell.method == "lora":
            attach(base, plan_slots(base.spec, cell), cell.dropout, k, cell.variant, cell.init, cell.form)
        models.append(LanguageModel(base) if lm else Classifier(base, cell.pooling, 2, k))
        layers.append(dict(named_layers(base)))
        parameters.append(trained_parameters(models[-1], cell))
        detach(base)
    flat = Flat(parameters)
    optimizer = optimizers.OPTIMIZERS[cells[0].optimizer](flat, cells)
    return Population(models, layers, flat), optimizer


def batch_of(K, lm, drops):
    ids = torch.ones(K * ROWS, WIDTH, dtype=torch.int64)
    answers = torch.full((K * ROWS,), ANSWERS if lm else 1)
    keys = torch.ones(K, dtype=torch.int32) if drops else None
    lengths, index = torch.full((K * ROWS,), WIDTH), [np.arange(ROWS)] * K
    batch = Batch(ids, lengths, index, answers, torch.full((K,), float(ROWS)), keys)
    return (place_completions(batch, K) if lm else batch).to(META)


def fused(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention in one kernel, as a GPU has it; on meta torch takes it through its parts."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def watched(folder, changes, K):
    """The `Watch` of a step and of an evaluation of each of K members."""
    ranks = [{"rank": 2 * k + 2} if changes.get("method", "lora") == "lora" else {} for k in range(K)]
    cells = [Cell(model=str(folder), **changes, **rank) for rank in ranks]
    lm = cells[0].task == "lm"
    with Watch(0):  # what is built once may wait
        population, optimizer = on_meta(folder, cells)
        clips, going, rates = (torch.ones(K, device=META), torch.ones(K, dtype=torch.bool, device=META),
                               torch.ones(K, device=META))  # fmt: skip
        batch, one = batch_of(K, lm, cells[0].dropout), batch_of(1, lm, False)
    step, evaluation = Watch(ROWS * ANSWERS), Watch(ROWS * ANSWERS)
    with step:
        loop.update(population, optimizer, clips, going, [batch], rates)
    for k in range(K):
        with population.only(k) as alone, torch.inference_mode(), evaluation:
            alone.eval()
            alone.score(one.ids, one.lengths, one.answers) if lm else alone(one.ids, one.lengths)
    return step, evaluation


# {name: (changes of the default cell, the most kernels of a step of one member, and of three)}; None: never together.
CASES = {
    "lora": ({}, 252, 260),
    "dropout": (dict(dropout=0.1), 372, 721),
    "all projections": (dict(targets=("all",)), 336, 344),
    "bfloat16": (dict(dtype="bfloat16", targets=("all",)), 442, 438),
    "mean+last": (dict(pooling="mean+last"), 259, 267),
    "head frozen": (dict(head="frozen"), 248, 255),
    "lora+": (dict(lr_ratio=4.0), 252, 260),
    "lora-fa": (dict(variant="lora-fa"), 242, None),
    "dora": (dict(variant="dora"), 446, None),
    "dora, dropout": (dict(variant="dora", dropout=0.1), 606, None),
    "pissa": (dict(init="pissa"), 288, None),
    "merged": (dict(form="merged"), 252, None),
    "side": (dict(form="side"), 258, 260),
    "full": (dict(method="full"), 284, None),
    "head": (dict(method="head"), 125, None),
    "adafactor": (dict(optimizer="adafactor"), 231, None),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_the_device(name, tmp_path):
    changes, *limits = CASES[name]
    tiny_bert(tmp_path)  # two layers
    for K, limit in zip((1, 3), limits, strict=True):
        if limit is not None:
            step, evaluation = watched(tmp_path, changes, K)
            assert step.unknown() == [] == evaluation.unknown()
            assert 100 < step.kernels <= limit


# {name: (changes, members, the most kernels of a step)} at the default base's shape and 864 tokens a member.
FULL = {"default": ({}, 1, 300), "dropout": (dict(dropout=0.1), 1, 600)}


@pytest.mark.parametrize("name", FULL)
def test_kernels_of_a_step_of_the_default_base(name, tmp_path, monkeypatch):
    changes, K, limit = FULL[name]
    tiny_bert(tmp_path, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
              max_position_embeddings=512)  # fmt: skip
    monkeypatch.setattr("test_device.ROWS", 32)
    monkeypatch.setattr("test_device.WIDTH", 27)
    monkeypatch.setitem(SEVERAL, "_scaled_dot_product_efficient_attention_backward", 3)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    step, evaluation = watched(tmp_path, changes, K)
    assert step.unknown() == [] == evaluation.unknown()
    assert 250 < step.kernels <= limit and 50 < evaluation.kernels <= 110


@pytest.mark.parametrize("family, case", zoo.CASES, ids=str)
def test_nothing_waits_in_any_family(family, case, tmp_path):
    judge = zoo.build(family, case, tmp_path)
    tasks = ["classification"] + ["lm"] * judge.decoder
    seen = 0
    for task in tasks:
        for K, changes in ((1, dict(targets=("all",))), (3, dict(targets=("q", "v"), dropout=0.1))):
            for watch in watched(tmp_path, changes | dict(task=task), K):
                assert watch.kernels > 20 and watch.unknown() == []
                seen += 1
    assert seen == 4 * len(tasks)


def test_the_watch_sees_each_kind():
    x, host = torch.ones(3, device=META), torch.ones(3)
    with Watch(2) as seen:
        x.sum().item(), x.tolist(), x.cpu(), x[x > 0], host.to(META), x * torch.tensor(2.0), x.double(), host + 1
        with pytest.raises(RuntimeError):
            x + host
    kinds = {kind for kind, *_ in seen.found}
    assert kinds == {"mixed", "scalar", "read", "to host", "to device", "shape", "host", "float64"}
