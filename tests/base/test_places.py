"""Nothing of a checkpoint vanishes: every tensor counts, is refused by name, or is said not to be used.

And nothing of a published config.json is taken for something else: each key, left out or null, gives what transformers
makes of it, or is refused by its name.
"""

import json
import re
import shutil

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_families import EVERY, apart, beast, built, load, one_thread, rows, states  # noqa: F401  fixtures

from minilora import console
from minilora.base import checkpoint, model
from minilora.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture
def said(monkeypatch):
    """What was said, line by line."""
    lines = []
    monkeypatch.setattr(console, "say", lines.append)
    return lines


def first(family):
    return next(iter(zoo.FAMILIES[family].cases))


def copied(folder, target, config=None, tensors=None):
    """The checkpoint in `folder`, with another config.json or other tensors."""
    target.mkdir(exist_ok=True)
    if config is None:
        shutil.copyfile(folder / "config.json", target / "config.json")
    else:
        (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").unlink(missing_ok=True)  # an older one may still be mapped
    if tensors is None:
        (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    else:
        save_file({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors")
    return target


def output(base, judge):
    ids, lengths = rows(judge, (23, 4))
    _, hidden, logits = states(base, ids, lengths)
    return hidden if logits is None else torch.cat([hidden, logits], -1)


def parts_of(lines):
    """The parts that a line says are not used, as patterns of names."""
    [line] = [line for line in lines if line.startswith("base: tensors that are not used: ")] or [": "]
    found = re.findall(r"(\S+) \(\d+\)", line)
    return [re.escape(part).replace(r"\*", r"\d+") for part in found]


@pytest.mark.parametrize("family", sorted(EVERY))
def test_every_tensor_counts_or_is_said_not_to(family, beast, tmp_path, said):  # noqa: F811
    folder, judge = beast(family, first(family))
    tensors = load_file(folder / "model.safetensors")
    before = output(load(folder, judge), judge)
    unused = parts_of(said)
    counted, ignored = 0, 0
    for name, value in tensors.items():
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        changed = value + noise.to(value.dtype) if value.is_floating_point() else value ^ 1
        copied(folder, tmp_path, tensors=tensors | {name: changed})
        differs = not torch.equal(output(load(tmp_path, judge), judge), before)
        left_out = any(re.match(part, name) for part in unused)
        assert differs != left_out, (name, unused)
        counted, ignored = counted + differs, ignored + left_out
    assert counted + ignored == len(tensors) and counted > ignored


@pytest.mark.parametrize("family", sorted(name for name in EVERY if zoo.FAMILIES[name].decoder))
@pytest.mark.parametrize("tied", [True, False, None])
def test_an_output_matrix_that_differs_counts(family, tied, beast, tmp_path, said):  # noqa: F811
    """Whatever tie_word_embeddings says, or does not say."""
    import transformers

    entry = zoo.FAMILIES[family]
    case = next(case for case in entry.cases if not beast(family, case)[1].settings.get("tie_word_embeddings", False))
    folder, judge = beast(family, case)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    key = "share_input_output_layers" if family == "openelm" else "tie_word_embeddings"
    config = {k: v for k, v in config.items() if k != key} | ({} if tied is None else {key: tied})
    head = "embed_out.weight" if family == "gpt_neox" else "lm_head.weight"
    embedding = (
        judge.model.get_input_embeddings().weight
        if family != "openelm"
        else judge.model.transformer.token_embeddings.weight
    )
    tensors[head] = embedding.detach() + 0.5
    copied(folder, tmp_path, config, tensors)
    if family == "phi" and tied:
        with pytest.raises(InputError, match="tie_word_embeddings"):
            load(tmp_path, judge)
        return
    base = load(tmp_path, judge)
    ids, lengths = rows(judge, (23, 4))
    _, hidden, logits = states(base, ids, lengths)
    bias = tensors.get(head.replace("weight", "bias"), torch.zeros(zoo.V))
    real = (torch.arange(ids.shape[1]) < lengths[:, None])[..., None]
    expected = (hidden @ tensors[head].T + bias) * real
    cap = base.spec.final_cap
    expected = expected if cap is None else cap * torch.tanh(expected / cap)
    assert apart(logits, expected) <= 1e-4
    assert tied is not True or any(f"{head} differs" in line for line in said)
    if family != "openelm":
        again = getattr(transformers, entry.model).from_pretrained(tmp_path, attn_implementation="eager").eval()
        theirs = zoo.Judge(family, case, again, config, judge.settings)
        with torch.no_grad():
            assert apart(logits, theirs(ids, lengths).logits) <= 1e-4


PREFIXES = ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "_orig_mod.module.",
            "_fsdp_wrapped_module."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gemma3_text"])
def test_prefixes_are_taken_off_and_said(family, prefix, beast, tmp_path, said):  # noqa: F811
    folder, judge = beast(family, first(family))
    tensors = load_file(folder / "model.safetensors")
    copied(folder, tmp_path, tensors={prefix + name: value for name, value in tensors.items()})
    assert torch.equal(output(load(tmp_path, judge), judge), output(load(folder, judge), judge))
    line = next(line for line in said if "taken off" in line)
    assert all(part + "." in line for part in prefix.replace("base_model.model.", "model.").strip(".").split("."))


def test_wrappers_inside_names_are_taken_off(beast, tmp_path, said):  # noqa: F811
    folder, judge = beast("bert", first("bert"))
    tensors = load_file(folder / "model.safetensors")
    inside = {re.sub(r"layer\.(\d+)\.", r"layer.\1._checkpoint_wrapped_module.", n): v for n, v in tensors.items()}
    assert inside.keys() != tensors.keys()
    copied(folder, tmp_path, tensors=inside)
    assert torch.equal(output(load(tmp_path, judge), judge), output(load(folder, judge), judge))


def test_another_prefix_and_a_name_twice_are_named(beast, tmp_path):  # noqa: F811
    folder, judge = beast("bert", first("bert"))
    tensors = load_file(folder / "model.safetensors")
    copied(folder, tmp_path, tensors={"0.auto_model." + name: value for name, value in tensors.items()})
    with pytest.raises(InputError, match="there is 0.auto_model.bert.*prefix may be the fault"):
        load(tmp_path, judge)
    name = next(name for name in tensors if name.endswith("LayerNorm.gamma"))
    twice = tensors | {name.replace("gamma", "weight"): tensors[name] + 1}
    copied(folder, tmp_path, tensors=twice)
    with pytest.raises(InputError, match="twice"):
        load(tmp_path, judge)
    copied(folder, tmp_path, tensors=tensors | {"module." + name: tensors[name].clone()})
    with pytest.raises(InputError, match="module."):
        load(tmp_path, judge)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_that_is_not_finite_is_refused_by_its_tensor(bad, dtype, beast, tmp_path, monkeypatch):  # noqa: F811
    folder, judge = beast("llama", "tied, with the head all the same")
    tensors = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    name = "model.layers.1.mlp.down_proj.weight"
    value = tensors[name].clone()
    value[3, 7] = bad
    copied(folder, tmp_path, tensors=tensors | {name: value})
    for piece in (checkpoint.PIECE, 40):
        monkeypatch.setattr(checkpoint, "PIECE", piece)
        with pytest.raises(InputError, match=f"{name} holds a number that is not finite"):
            load(tmp_path, judge)
    copied(folder, tmp_path, tensors=tensors)
    assert load(tmp_path, judge).has_unembedding


def test_a_number_too_large_for_the_dtype_is_refused(beast, tmp_path):  # noqa: F811
    folder, judge = beast("bert", first("bert"))
    tensors = {
        name: value.double() for name, value in load_file(folder / "model.safetensors").items() if "ids" not in name
    }
    name = "bert.encoder.layer.0.output.dense.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = 1e300
    copied(folder, tmp_path, tensors=tensors)
    with pytest.raises(InputError, match=name):
        load(tmp_path, judge)
    assert load(tmp_path, judge, dtype=torch.float64).spec.width == 24


# --- lm_head.bias


def phi3_with_bias(beast, tmp_path, **config):  # noqa: F811
    folder, judge = beast("phi3", "4k: window")
    tensors = load_file(folder / "model.safetensors") | {"lm_head.bias": torch.arange(zoo.V) * 1.0}
    written = json.loads((folder / "config.json").read_text()) | config
    return copied(folder, tmp_path, written, tensors), folder, judge


def test_a_bias_of_the_output_is_read_where_the_configuration_has_it(beast, tmp_path):  # noqa: F811
    changed, folder, judge = phi3_with_bias(beast, tmp_path, lm_head_bias=True)
    ids, lengths = rows(judge, (9,))
    before, after = (states(load(f, judge), ids, lengths)[2] for f in (folder, changed))
    assert apart(after, before + torch.arange(zoo.V)) <= 1e-5


def test_a_bias_of_the_output_that_the_configuration_lacks_is_refused(beast, tmp_path, said):  # noqa: F811
    changed, _, judge = phi3_with_bias(beast, tmp_path)
    with pytest.raises(InputError, match="lm_head.bias"):
        load(changed, judge)
    model.load(changed)  # without logits
    assert "lm_head (2)" in said[-1]
    with pytest.raises(InputError, match="lm_head_bias"):
        load(phi3_with_bias(beast, tmp_path, lm_head_bias=True, tie_word_embeddings=True)[0], judge)


# --- config.json as published


@torch.no_grad()
def judged(folder, family, case, judge):
    """What transformers makes of a folder, or None where it fails on it."""
    import transformers

    entry = zoo.FAMILIES[family]
    try:
        again = getattr(transformers, entry.model).from_pretrained(folder, attn_implementation="eager").eval()
        out = zoo.Judge(family, case, again, judge.config, judge.settings)(*rows(judge, (23, 4)))
    except Exception:
        return None
    return out.hidden if out.logits is None else torch.cat([out.hidden, out.logits], -1)


JUDGED = sorted(EVERY - {"openelm", "nomic_bert"})  # those whose published file transformers reads


@pytest.mark.parametrize("family", JUDGED)
@pytest.mark.parametrize("how", ["left out", "null"])
def test_a_key_that_is_left_out_or_null(family, how, beast, tmp_path):  # noqa: F811
    """Ours are the judge's states and logits, or the key is refused. Judged by transformers, which fails on some."""
    ran = agreed = 0
    for case in list(zoo.FAMILIES[family].cases)[:2]:
        folder, judge = beast(family, case)
        config = json.loads((folder / "config.json").read_text())
        if config["model_type"] == "gemma3":
            continue
        whole = output(load(folder, judge), judge)
        for key in config.keys() - {"model_type"}:
            other = {k: v for k, v in config.items() if k != key} | ({key: None} if how == "null" else {})
            copied(folder, tmp_path, other)
            ran += 1
            try:
                ours = output(load(tmp_path, judge), judge)
            except InputError:
                continue
            # As before: the key means nothing here, or has that value by default, which only the judge can tell.
            same = torch.equal(ours, whole) and (how == "null" or key in zoo.INERT)
            expected = None if same else judged(tmp_path, family, case, judge)
            if expected is None:
                continue
            assert apart(ours, expected) <= 2e-4, key
            agreed += 1
    assert ran > 15 and (how == "null" or agreed > 3), (ran, agreed)
