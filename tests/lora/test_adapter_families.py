"""Adapters cross to PEFT and back with equal outputs in every family, slices of fused projections included."""

import copy
import json
import warnings
from collections import Counter

import peft
import pytest
import torch
import zoo
from conftest import random_batch
from safetensors.torch import load_file
from torch import nn

from minilora.base import families, model
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.lora import peft_config, storage
from minilora.lora.adapter import adapter_of
from minilora.lora.layer import attach, named_layers
from minilora.lora.peft import to_peft
from minilora.lora.targets import SCALES, Slot
from minilora.tasks.classification import Classifier
from minilora.tasks.language_model import LanguageModel

FUSED = ("modernbert", "nomic_bert", "phi3", "gpt2", "gpt_neox", "openelm")
RAN = Counter()
CASES = zoo.CASES
FIRST = [(family, next(iter(entry.cases))) for family, entry in zoo.FAMILIES.items()]
# Slices of a fused projection that differ in rank and in scale, and some without an adapter.
OURS = {"q": (2, 7.0), "v": (3, 5.0), "o": (2, 3.0), "up": (1, 4.0), "down": (4, 6.0)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(family, case) -> (folder, judge), built once."""
    known = {}

    def make(family, case):
        if (family, case) not in known:
            folder = tmp_path_factory.mktemp("base")
            known[family, case] = folder, zoo.build(family, case, folder, seed=3)
        folder, judge = known[family, case]
        return folder, copy.deepcopy(judge)

    return make


def load(folder, judge):
    return model.load(folder, unembedding=judge.decoder)


def wrapped(base, cell):
    """What train.py trains for this cell."""
    return LanguageModel(base) if cell.task == "lm" else Classifier(base, cell.pooling, 3)


def cell_of(judge, **values):
    return Cell(task="lm" if judge.decoder else "classification", **values)


def fill(base, seed=5):
    """Factors of the size of the weights, and other magnitudes: what no start gives."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in named_layers(base):
            layer.A.copy_(0.3 * torch.randn(layer.A.shape, generator=draw))
            layer.B.copy_(0.3 * torch.randn(layer.B.shape, generator=draw))
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.2 * torch.rand(layer.magnitude.shape, generator=draw))
    return base.eval()


def slots_of(spec, scaling="constant"):
    """An adapter on some targets of all layers but the first."""
    return {
        f"layers.{layer}.{target}": Slot(rank, alpha, SCALES[scaling](alpha, rank))
        for layer in range(min(1, len(spec.layers) - 1), len(spec.layers))
        for target, (rank, alpha) in OURS.items()
    }


class Skeleton(nn.Module):
    """OpenELM's linear maps for PEFT, without a forward: the reference computes with the weights that it merges."""

    prepare_inputs_for_generation = None  # PEFT looks for it

    def __init__(self, reference, bare):
        super().__init__()
        for name, value in reference.state_dict().items():
            if ".layers." in name and value.ndim == 2:
                *path, leaf = name.removeprefix("transformer." if bare else "").removesuffix(".weight").split(".")
                owner = self
                for part in path:
                    if part not in owner._modules:
                        owner.add_module(part, nn.Module())
                    owner = owner._modules[part]
                linear = nn.Linear(value.shape[1], value.shape[0], bias=False)
                linear.weight.data = value.clone()
                owner.add_module(leaf, linear)


def host(judge, bare=False):
    """The module that PEFT adapts in place: what AutoModelForCausalLM gives for a decoder, AutoModel for an encoder."""
    if judge.family == "openelm":
        return Skeleton(judge.model, bare)
    return judge.model if judge.decoder and not bare else judge.base


def outputs(judge, theirs, ids, lengths):
    """Hidden states of the judge that PEFT adapted, and logits where it has them."""
    replaced = None
    if judge.family == "openelm":
        merged = theirs.merge_and_unload().state_dict()
        replaced = {n if n.startswith("transformer.") else f"transformer.{n}": v for n, v in merged.items()}
    with torch.no_grad():
        found = judge(ids, lengths, replaced)
    return [found.hidden] + ([found.logits] if judge.decoder else [])


@torch.no_grad()
def ours(base, judge, ids, lengths):
    hidden = base(ids, lengths)
    real = (torch.arange(ids.shape[1]) < lengths[:, None])[..., None]
    return [hidden * real] + ([base.unembed(hidden) * real] if judge.decoder else [])


def compare(found, wanted, plain):
    assert len(found) == len(wanted) == len(plain)
    for mine, theirs, before in zip(found, wanted, plain, strict=True):
        assert (theirs - before).abs().max() > 0.05  # the adapter does something
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5 * max(1, theirs.abs().max().item()))


def quiet(make, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that fan_in_fan_out is mended, and of conversions not asked for
        return make(*arguments, **options)


def some_rows(judge):
    return random_batch(60, [min(11, judge.longest), 5, 8, 1])


def modules(folder, base, prefix=""):
    """{PEFT's module: (A, B)} in an adapter's file."""
    tensors = load_file(folder / peft_config.TENSORS)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")]
    return {
        n.removeprefix("base_model.model."): (tensors[n + ".lora_A.weight"], tensors[n + ".lora_B.weight"])
        for n in names
    }


@pytest.mark.parametrize("family, case", CASES)
def test_ours_loads_in_peft(made, tmp_path, family, case):
    folder, judge = made(family, case)
    base = load(folder, judge)
    ids, lengths = some_rows(judge)
    plain = ours(base, judge, ids, lengths)
    fill(attach(base, slots_of(base.spec, "rslora" if family == "phi3" else "constant")))
    cell = cell_of(judge)
    storage.save_run(tmp_path, wrapped(base, cell), cell, "abc")
    theirs = quiet(peft.PeftModel.from_pretrained, host(judge), tmp_path / "adapter").eval()
    compare(ours(base, judge, ids, lengths), outputs(judge, theirs, ids, lengths), plain)
    config = json.loads((tmp_path / "adapter" / peft_config.CONFIG).read_text())
    assert config["task_type"] == ("CAUSAL_LM" if judge.decoder else None)
    assert config["fan_in_fan_out"] == (family == "gpt2")
    if judge.decoder:
        assert all(
            name.startswith(families.FAMILIES[family].prefixes[-1]) for name in modules(tmp_path / "adapter", base)
        )

    # Back again: the run has the same slots and factors, bit for bit; its adapter/ has the same outputs.
    again = load(folder, judge)
    storage.restore(tmp_path, wrapped(again, cell), "lora")
    layers = dict(named_layers(again))
    assert list(layers) == [name for name, _ in named_layers(base)]
    for name, layer in named_layers(base):
        assert layers[name].slot == layer.slot and layers[name].A.equal(layer.A) and layers[name].B.equal(layer.B)
    foreign = load(folder, judge)
    storage.restore(tmp_path / "adapter", wrapped(foreign, cell), "lora")
    compare(ours(foreign.eval(), judge, ids, lengths), ours(base, judge, ids, lengths), plain)
    RAN["ours", family] += 1


@pytest.mark.parametrize("family, case", CASES)
def test_peft_loads_here(made, tmp_path, family, case):
    folder, judge = made(family, case)
    base = load(folder, judge)
    ids, lengths = some_rows(judge)
    plain = ours(base, judge, ids, lengths)
    spec, entry = base.spec, families.FAMILIES[family]
    places = [entry.place(f"layers.0.{target}", spec, entry.peft).module for target in spec.targets]
    names = sorted({".".join(place.split(".")[-2:]) for place in places})
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=names, rank_pattern={names[0].rpartition(".")[2]: 2},
        alpha_pattern={rf"\d+\.{names[-1]}": 9}, init_lora_weights=False, fan_in_fan_out=family == "gpt2",
        task_type=peft.TaskType.CAUSAL_LM if judge.decoder and family != "openelm" else None,
    )  # fmt: skip
    torch.manual_seed(7)
    theirs = quiet(peft.get_peft_model, host(judge), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    wanted = outputs(judge, theirs, ids, lengths)
    assert storage.load(tmp_path / "a", base) == {}
    compare(ours(base.eval(), judge, ids, lengths), wanted, plain)
    assert [n for n, _ in named_layers(base)] == [
        f"layers.{i}.{t}" for i in range(len(spec.layers)) for t in spec.targets]  # fmt: skip
    # Written again: the same tensors, so that no rank grows on the way.
    cell = cell_of(judge)
    storage.save(tmp_path / "b", wrapped(base, cell), cell, "abc")
    first, second = modules(tmp_path / "a", base), modules(tmp_path / "b", base)
    assert first.keys() == second.keys()
    for name, (A, B) in first.items():
        assert A.equal(second[name][0]) and B.equal(second[name][1])
    RAN["peft", family] += 1


PEFTS = [(True, False), (False, "pissa"), (True, "pissa"), (False, "olora")]
VARIED = [("dora", "kaiming"), ("lora", "pissa"), ("dora", "olora"), ("lora-fa", "gaussian")]


@pytest.mark.parametrize("family, case", FIRST)
@pytest.mark.parametrize("variant, init", VARIED)
def test_variants_load_in_peft(made, tmp_path, family, case, variant, init):
    folder, judge = made(family, case)
    base = load(folder, judge)
    ids, lengths = some_rows(judge)
    plain = ours(base, judge, ids, lengths)
    fill(attach(base, slots_of(base.spec), variant=variant, init=init))
    cell = cell_of(judge, variant=variant, init=init)
    storage.save_run(tmp_path, wrapped(base, cell), cell, "abc")
    theirs = quiet(peft.PeftModel.from_pretrained, host(judge), tmp_path / "adapter").eval()
    mine = ours(base, judge, ids, lengths)
    compare(mine, outputs(judge, theirs, ids, lengths), plain)
    again, foreign = load(folder, judge), load(folder, judge)
    storage.restore(tmp_path, wrapped(again, cell), "lora")
    storage.restore(tmp_path / "adapter", wrapped(foreign, cell), "lora")
    compare(ours(foreign.eval(), judge, ids, lengths), mine, plain)
    found, wanted = again.state_dict(), base.state_dict()
    assert list(found) == list(wanted) and all(found[name].equal(value) for name, value in wanted.items())
    assert [la.variant for _, la in named_layers(again)] == [la.variant for _, la in named_layers(base)]
    RAN[variant, init, family] += 1


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("dora, init", PEFTS)
def test_variants_of_peft_load_here(made, tmp_path, family, dora, init):
    folder, judge = made(family, next(iter(zoo.FAMILIES[family].cases)))
    base = load(folder, judge)
    ids, lengths = some_rows(judge)
    plain = ours(base, judge, ids, lengths)
    entry = families.FAMILIES[family]
    targets = sorted({entry.place(f"layers.0.{t}", base.spec, entry.peft).module.split(".", 2)[-1] for t in "qov"})
    if family == "gpt2" and init == "olora":
        targets = ["attn.c_proj"]  # square: PEFT forgets to transpose what it decomposes, and fails for the others
    config = peft.LoraConfig(r=4, lora_alpha=5, use_rslora=True, use_dora=dora, init_lora_weights=init,
                             target_modules=targets, fan_in_fan_out=family == "gpt2")  # fmt: skip
    torch.manual_seed(7)
    theirs = quiet(peft.get_peft_model, host(judge, bare=True), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "a")
    wanted = outputs(judge, theirs, ids, lengths)
    if family == "gpt2" and init == "olora":
        with pytest.raises(InputError, match="init_lora_weights = 'olora' on transposed weights"):
            storage.load(tmp_path / "a", base)
    else:
        storage.load(tmp_path / "a", base)
        compare(ours(base.eval(), judge, ids, lengths), wanted, plain)
    RAN["peft", dora, init, family] += 1


def test_bare_and_task_names_are_both_read(made, tmp_path):
    """A decoder's adapter of either task loads in either model of transformers, and here."""
    families_run = 0
    for family, case in FIRST:
        folder, judge = made(family, case)
        if not judge.decoder:
            continue
        base = fill(attach(load(folder, judge), slots_of(load(folder, judge).spec)))
        ids, lengths = some_rows(judge)
        mine = ours(base, judge, ids, lengths)
        cell = Cell()
        storage.save(tmp_path / family, wrapped(base, cell), cell, "abc")
        theirs = quiet(peft.PeftModel.from_pretrained, host(judge, bare=True), tmp_path / family).eval()
        for found, wanted in zip(outputs(judge, theirs, ids, lengths), mine, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * max(1, wanted.abs().max().item()))
        again = load(folder, judge)
        assert set(storage.load(tmp_path / family, again)) == {"weight", "bias"}
        for found, wanted in zip(ours(again.eval(), judge, ids, lengths), mine, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        families_run += 1
    assert families_run == 15


def test_slices_share_what_is_equal(made, tmp_path):
    """Ranks of slices add up, and do not where their A is the same; the whole has 0 where there is no adapter."""
    folder, judge = made("gpt_neox", "parallel, quarter")
    base = load(folder, judge)
    slots = {f"layers.0.{t}": Slot(r, a, a / r) for t, r, a in [("q", 2, 6.0), ("k", 3, 3.0), ("v", 2, 1.0)]}
    fill(attach(base, slots))
    layers = dict(named_layers(base))
    with torch.no_grad():
        layers["layers.0.v"].A.copy_(layers["layers.0.q"].A)
    whole = to_peft(adapter_of(base), base)
    assert list(whole) == ["layers.0.attention.query_key_value"]
    whole = whole["layers.0.attention.query_key_value"]
    H, E = 3, 16
    q, k, v = (layers[f"layers.0.{t}"] for t in "qkv")
    assert whole.A.equal(torch.cat([q.A, k.A])) and whole.scale == 3.0 and whole.alpha(False) == 15.0
    wanted = torch.zeros(3, H, E, 5)  # each head has its rows of q, then of k, then of v
    wanted[0, :, :, :2] = q.B.view(H, E, 2)
    wanted[1, :, :, 2:] = k.B.view(H, E, 3) * (1 / 3)
    wanted[2, :, :, :2] = v.B.view(H, E, 2) * (0.5 / 3)
    torch.testing.assert_close(whole.B, wanted.transpose(0, 1).reshape(3 * H * E, 5), rtol=1e-6, atol=0)


def test_a_row_of_zeros_beside_dora_is_refused(made, tmp_path):
    folder, judge = made("gpt2", "tied")
    base = load(folder, judge)
    fill(attach(base, {"layers.1.q": Slot(2, 3.0, 1.5)}, variant="dora"))
    base.layers[1].k.weight[4] = 0
    cell = cell_of(judge, variant="dora")
    with pytest.raises(InputError, match="row 4 of layers.1.k is 0, so that PEFT's format, where it is a part of h.1"):
        storage.save(tmp_path / "a", wrapped(base, cell), cell, "abc")


def test_how_many_ran():
    if not RAN["ours", "bert"]:
        pytest.skip("the tests before were not all run")
    assert len(FIRST) == 22 and len(CASES) == sum(RAN["ours", f] for f in zoo.FAMILIES) == sum(
        RAN["peft", f] for f in zoo.FAMILIES
    )
    assert all(RAN["ours", family] for family in zoo.FAMILIES) and len(CASES) >= 45
    assert sum(count for key, count in RAN.items() if len(key) == 3) == 22 * len(VARIED)
    assert sum(count for key, count in RAN.items() if len(key) == 4) == 22 * len(PEFTS)
    assert set(FUSED) == {f for f, e in families.FAMILIES.items()
                          if any(" " in key for key in (e.peft or e.layout).modules)} | {"nomic_bert"}  # fmt: skip
