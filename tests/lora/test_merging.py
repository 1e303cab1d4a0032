"""A merged checkpoint: transformers computes what the adapted base does, and nothing else of the source changes."""

import json
import os
from collections import Counter

import pytest
import torch
import transformers
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapter_families import OURS, fill, ours, slots_of, some_rows, wrapped

from minilora.base import checkpoint, families, model, places
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.lora import merging
from minilora.lora.layer import attach, detach, named_layers, scale_by
from minilora.lora.variants import plain_factors

RAN = Counter()


def built(family, folder, dtype=None, shards=1, **changes):
    """A checkpoint that transformers loads as well, and its base with an adapter."""
    case = next(iter(zoo.FAMILIES[family].cases))
    judge = zoo.build(
        family, case, folder, hub=family != "nomic_bert"
    )  # of which transformers reads its own form alone
    if dtype is not None or shards > 1:
        tensors = load_file(folder / "model.safetensors")
        if dtype is not None:
            tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        write_shards(folder, tensors, shards)
    base = model.load(folder, unembedding=judge.decoder)
    if changes.pop("adapted", True):
        fill(attach(base, slots_of(base.spec), **changes))
    return base, judge


def write_shards(folder, tensors, count):
    (folder / "model.safetensors").unlink()
    if count == 1:
        return save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "by": "us"})
    weight_map = {}
    for number in range(count):
        shard = f"model-{number + 1:05}-of-{count:05}.safetensors"
        names = sorted(tensors)[number::count]
        save_file({n: tensors[n] for n in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write(folder, base, source, method="lora", **more):
    cell = Cell(task="lm" if base.spec.causal else "classification", method=method, model="somebody/base")
    return merging.write(folder, wrapped(base, cell), cell, "abc", source=source, **more)


def theirs_of(folder, judge, ids, lengths):
    """What transformers' own loading of `folder` computes (the reference, for OpenELM)."""
    if judge.family == "openelm":
        judge.model.load_state_dict(load_file(folder / "model.safetensors"))
        found = judge
    else:
        kind = transformers.AutoModelForCausalLM if judge.decoder else transformers.AutoModel
        loaded, report = kind.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
        assert not [name for name in report["missing_keys"] if "pooler" not in name] and not report["mismatched_keys"]
        found = zoo.Judge(judge.family, judge.case, loaded.eval(), judge.config, judge.settings)
    with torch.no_grad():
        out = found(ids, lengths)
    return [out.hidden] + ([out.logits] if judge.decoder else [])


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_transformers_loads_what_is_merged(tmp_path, family):
    base, judge = built(family, tmp_path / "base")
    ids, lengths = some_rows(judge)
    record = write(tmp_path / "merged", base, tmp_path / "base")
    wanted = ours(base, judge, ids, lengths)
    plain = ours(detach(base), judge, ids, lengths)
    for found, mine, before in zip(theirs_of(tmp_path / "merged", judge, ids, lengths), wanted, plain, strict=True):
        assert (mine - before).abs().max() > 0.05
        torch.testing.assert_close(found, mine, rtol=0, atol=2e-5 * max(1, mine.abs().max().item()))
    # It is a base for us as well, and but for what was adapted it is the source.
    again = model.load(tmp_path / "merged", unembedding=judge.decoder)
    for found, mine in zip(ours(again, judge, ids, lengths), wanted, strict=True):
        torch.testing.assert_close(found, mine, rtol=0, atol=2e-5 * max(1, mine.abs().max().item()))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    entry = families.FAMILIES[family]
    parts = {entry.place(name, base.spec).module + ".weight" for name in slots_of(base.spec)}
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert list(before) == list(after) and len(changed) == len(parts)
    assert all(name.endswith(tuple(parts)) for name in changed)
    assert record["dtypes"] == ["float32"] and record["rounding"]["worst"] < 1e-5
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == record
    assert (tmp_path / "merged" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["base", "merged"]
    RAN[family] += 1


def same_bits(one, other):
    return (
        one.dtype == other.dtype and one.view(torch.uint8).equal(other.view(torch.uint8)) if one.ndim else one == other
    )


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "modernbert", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_reported(tmp_path, family, dtype):
    """Shards in half precision; the error that merging makes, restated on the whole (fused) tensor's rows."""
    variant = "dora" if family == "llama" else "lora"
    base, judge = built(family, tmp_path / "base", dtype, shards=3, variant=variant)
    record = write(tmp_path / "merged", base, tmp_path / "base")
    assert sorted(os.listdir(tmp_path / "merged")) == sorted(
        [*(f for f in os.listdir(tmp_path / "base")), "merge.json"]
        + ["head.json", "classifier.safetensors"] * (not judge.decoder)
    )
    before, after = (checkpoint.Tensors(tmp_path / name) for name in ("base", "merged"))
    found = places.tensor_places(detach(base), before.keys())
    again = model.load(tmp_path / "base", unembedding=judge.decoder)
    fill(attach(again, slots_of(again.spec), variant=variant))
    errors = {}
    for name, layer in named_layers(again):
        tensor, rows, transposed = found[f"{name}.weight"]
        W, M = ((t[tensor].T if transposed else t[tensor]).double()[rows] for t in (before, after))
        exact = W + layer.slot.scale * layer.B.double() @ layer.A.double()
        if variant == "dora":
            exact = layer.magnitude.double()[:, None] * exact / exact.norm(dim=1, keepdim=True)
        assert M.to(dtype).double().equal(M) and (M - exact).abs().max() < exact.abs().max() * 2.0**-8
        errors[name] = ((M - exact).norm() / (exact - W).norm()).item()
    rounding = record["rounding"]
    assert record["dtypes"] == [str(dtype).removeprefix("torch.")] and rounding["modules"] == len(errors) > 5
    torch.testing.assert_close(rounding["worst"], max(errors.values()), rtol=1e-5, atol=0)
    torch.testing.assert_close(rounding["mean"], sum(errors.values()) / len(errors), rtol=1e-5, atol=0)
    assert rounding["worst_module"] == max(errors, key=errors.get)
    assert (1e-4 if dtype == torch.float16 else 1e-3) < rounding["mean"] < 0.1
    RAN["rounding", family] += 1


def test_the_rest_is_copied_bit_for_bit(tmp_path):
    """Headers, metadata, dtypes and order of shards; tensors that no base needs; links as in the hub's cache."""
    base, judge = built("bert", tmp_path / "blobs", torch.bfloat16)
    zoo.write_tokenizer(tmp_path / "blobs")
    os.mkdir(tmp_path / "base")
    for name in os.listdir(tmp_path / "blobs"):
        os.symlink(f"../blobs/{name}", tmp_path / "base" / name)
    (tmp_path / "base" / "README.md").write_text("no")
    os.mkdir(tmp_path / "words")
    (tmp_path / "words" / "vocab.txt").write_text("other\n")
    write(tmp_path / "merged", base, tmp_path / "base", tokenizer=tmp_path / "words")
    found = {name: (tmp_path / "merged" / name).read_bytes() for name in os.listdir(tmp_path / "merged")}
    assert not any((tmp_path / "merged" / name).is_symlink() for name in found) and "README.md" not in found
    assert found["vocab.txt"] == b"other\n" and "tokenizer.json" in found and "tokenizer_config.json" in found
    source = (tmp_path / "blobs" / "model.safetensors").read_bytes()
    assert len(found["model.safetensors"]) == len(source)
    first = 8 + int.from_bytes(source[:8], "little")
    assert found["model.safetensors"][:first] == source[:first]
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "by": "us"}
    head = load_file(tmp_path / "merged" / "classifier.safetensors")
    assert {name: list(value.shape) for name, value in head.items()} == {"weight": [3, 24], "bias": [3]}
    assert json.loads(found["head.json"]) == {
        "pooling": "mean", "label_names": ["a", "b", "c"], "tensors": "classifier.safetensors"}  # fmt: skip


@pytest.mark.parametrize(
    "family, case", [("bert", "gelu"), ("gpt2", "tied"), ("llama", "tied, with the head all the same")]
)
def test_a_whole_trained_base(tmp_path, family, case):
    judge = zoo.build(family, case, tmp_path / "base")
    base = model.load(tmp_path / "base", unembedding=judge.decoder)
    draw = torch.Generator().manual_seed(3)
    for parameter in base.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    record = write(tmp_path / "merged", base, tmp_path / "base", method="full")
    ids, lengths = some_rows(judge)
    wanted = ours(base, judge, ids, lengths)
    for found, mine in zip(theirs_of(tmp_path / "merged", judge, ids, lengths), wanted, strict=True):
        torch.testing.assert_close(found, mine, rtol=0, atol=2e-5 * max(1, mine.abs().max().item()))
    assert record["rounding"]["worst"] == 0.0 and record["rounding"]["modules"] == len(list(base.parameters()))


def test_a_scaled_adapter_from_a_bfloat16_run(tmp_path):
    """What is merged is the source's weight, not the one that the run rounded, and the strength that is set."""
    _, judge = built("llama", tmp_path / "base")
    base = model.load(tmp_path / "base", torch.bfloat16, unembedding=True)
    scale_by(fill(attach(base, slots_of(base.spec), init="pissa")), 0.25)
    write(tmp_path / "merged", base, tmp_path / "base")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    name, layer = named_layers(base)[0]
    tensor = "model." + families.FAMILIES["llama"].place(name, base.spec).module + ".weight"
    A, B = plain_factors(layer)
    torch.testing.assert_close(after[tensor], before[tensor] + 0.25 * layer.slot.scale * B @ A, rtol=0, atol=1e-5)


def test_refused_with_nothing_written(tmp_path):
    base, _ = built("bert", tmp_path / "base", torch.float16)
    os.mkdir(tmp_path / "there")
    with pytest.raises(InputError, match="there exists: choose another --merge-to"):
        write(tmp_path / "there", base, tmp_path / "base")
    with pytest.raises(InputError, match="method = 'head' leaves the base as it is"):
        merging.check(tmp_path / "new", Cell(method="head"))
    with torch.no_grad():
        named_layers(base)[4][1].B.fill_(1e6)
    with pytest.raises(InputError, match="the new weight overflows torch.float16"):
        write(tmp_path / "new", base, tmp_path / "base")
    assert sorted(os.listdir(tmp_path)) == ["base", "there"] and os.listdir(tmp_path / "there") == []


def test_how_many_ran():
    if not RAN["bert"]:
        pytest.skip("the tests before were not all run")
    assert len(zoo.FAMILIES) == sum(RAN[family] for family in zoo.FAMILIES) == 22
    assert sum(count for key, count in RAN.items() if key[0] == "rounding") == 10 and len(OURS) == 5
