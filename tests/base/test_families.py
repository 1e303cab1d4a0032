"""Every family and case of the zoo against transformers, and OpenELM against its reference.

States after each layer, last states, logits, and gradients of attached adapters; in float32 and bfloat16, with and
without padding, beyond windows and at long positions. What a configuration says is read or refused, never ignored.
"""

import copy
import json
import subprocess
import sys
from functools import cache

import openelm_reference
import pytest
import torch
import zoo
from conftest import ROOT
from safetensors.torch import load_file, save_file

from minilora.base import families, model
from minilora.base.spec import TARGETS
from minilora.errors import InputError
from minilora.lora.layer import attach, named_layers, replace_module
from minilora.lora.targets import Slot

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and PEFT's own
FUSED = {"modernbert", "nomic_bert", "phi3", "gpt2", "gpt_neox", "openelm"}
EVERY = {
    "bert", "roberta", "xlm-roberta", "distilbert", "deberta-v2", "modernbert", "nomic_bert", "llama", "mistral",
    "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "olmo2", "olmo3", "smollm3",
    "openelm",
}  # fmt: skip
every_case = pytest.mark.parametrize(("family", "case"), zoo.CASES, ids=[" ".join(case) for case in zoo.CASES])
every_family = pytest.mark.parametrize("family", sorted(EVERY))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors so small, threads do little but wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def beast(tmp_path_factory):
    """`beast(family, case, hub=True)` is (folder, judge), built once."""
    return cache(lambda family, case, hub=True: built(tmp_path_factory.mktemp("beast"), family, case, hub))


def built(folder, family, case, hub):
    return folder, zoo.build(family, case, folder, hub=hub)


def load(folder, judge, **options):
    return model.load(folder, unembedding=judge.decoder, **options)


def rows(judge, lengths, seed=0):
    """(ids [B, T] with noise for padding, lengths [B]), the longest row first cut to the base's positions."""
    lengths = torch.tensor([min(length, judge.longest) for length in lengths])
    draw = torch.Generator().manual_seed(seed)
    # Ids below 5 are some family's padding, from which RoBERTa counts its positions.
    return torch.randint(5, zoo.V, (len(lengths), int(lengths.max())), generator=draw), lengths


@torch.no_grad()
def states(base, ids, lengths):
    """(each layer's output, the last states, the logits or None) of our base, on the CPU and 0 on padding."""
    outputs = []
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in base.layers]
    device = next(base.parameters()).device
    hidden = base(ids.to(device), lengths.to(device))
    for hook in hooks:
        hook.remove()
    logits = base.unembed(hidden) if base.has_unembedding else None
    real = (torch.arange(ids.shape[1]) < lengths[:, None])[..., None]
    clean = [None if x is None else x.cpu().masked_fill(~real, 0) for x in (*outputs, hidden, logits)]
    return clean[:-2], clean[-2], clean[-1]


def apart(ours, theirs):
    """The largest difference, not a number where there is one."""
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()


def largest(tensor):
    return tensor.abs().max().item()


def compare(base, judge, ids, lengths, within):
    with torch.no_grad():
        expected = judge(ids, lengths)
    layers, hidden, logits = states(base, ids, lengths)
    assert len(layers) == len(expected.states) - 1 == len(base.spec.layers)
    differences = {"hidden": apart(hidden, expected.hidden)}
    if judge.decoder:
        assert logits.dtype == torch.float32
        differences["logits"] = apart(logits, expected.logits)
    # transformers' last state is behind the final norm, ours before it.
    pairs = list(zip(layers, expected.states[1:]))[: None if not base.spec.final_norm else -1]
    for number, (own, other) in enumerate(pairs):
        differences[f"layer {number}"] = apart(own, other)
    # Outputs may be large (no norm follows a layer's sum): measured in parts of their largest entry, if above 1.
    given = {"hidden": expected.hidden, "logits": expected.logits}
    given |= {f"layer {number}": other for number, (_, other) in enumerate(pairs)}
    wrong = {name: value for name, value in differences.items() if not value <= within * max(1, largest(given[name]))}
    assert not wrong, wrong


def test_the_zoo_holds_every_family_and_case():
    assert set(zoo.FAMILIES) == set(families.FAMILIES) == EVERY
    assert len(EVERY) == 22
    assert len(zoo.CASES) == len(set(zoo.CASES)) == 58
    assert min(len(entry.cases) for entry in zoo.FAMILIES.values()) >= 2
    assert {name for name, entry in zoo.FAMILIES.items() if not entry.decoder} == {
        "bert", "roberta", "xlm-roberta", "distilbert", "deberta-v2", "modernbert", "nomic_bert"
    }  # fmt: skip


@every_case
def test_float32(family, case, beast, device):
    """Padded rows, rows of one length, all of them longer than the windows."""
    folder, judge = beast(family, case)
    base = load(folder, judge, device=device)
    for lengths in [(41, 1, 7, 23), (19, 19)]:
        ids, lengths = rows(judge, lengths)
        compare(base, judge, ids, lengths, within=2e-5)


def logits_size(judge, exact):
    """The largest logit; where these are soft-capped, before that, since it is there that the rounding happens."""
    if judge.settings.get("final_logit_softcapping"):
        return (exact.hidden @ judge.base.get_input_embeddings().weight.T).abs().max().item()
    return exact.logits.abs().max().item()


@every_case
def test_bfloat16(family, case, tmp_path):
    """Both in bfloat16: within 2e-2 of the largest entry (or transformers' own error, if larger), and ours as near to
    float32's states as transformers' are.

    Entries themselves differ by a bit or two of their 8, where one rounds what the other keeps in float32 (transformers
    rounds scores, and for some families the angles' cosines; attention here keeps scores in float32).
    """
    judge = zoo.build(family, case, tmp_path, calm=True)
    base = load(tmp_path, judge, dtype=torch.bfloat16)
    half = copy.deepcopy(judge).to(torch.bfloat16)
    for lengths in [(41, 1, 7, 23), (19, 19)]:
        ids, lengths = rows(judge, lengths)
        with torch.no_grad():
            theirs, exact = half(ids, lengths), judge(ids, lengths)
        _, hidden, logits = states(base, ids, lengths)
        size = exact.hidden.abs().max().item()
        # Or no more than transformers' own error: norms behind attention and MLP (OLMo) enlarge roundings.
        assert apart(hidden, theirs.hidden) <= max(2e-2 * size, apart(theirs.hidden, exact.hidden))
        assert (hidden - exact.hidden).norm() <= 1.25 * (theirs.hidden - exact.hidden).norm()
        if judge.decoder:
            size = logits_size(judge, exact)
            assert apart(logits, theirs.logits) <= max(2e-2 * size, apart(theirs.logits, exact.logits))
            assert (logits - exact.logits).norm() <= 1.25 * (theirs.logits - exact.logits).norm()


@every_family
def test_long_positions(family, beast, device):
    cases = list(zoo.FAMILIES[family].cases)
    for case in cases:
        folder, judge = beast(family, case)
        ids, lengths = rows(judge, (350, 12), seed=1)
        learned = judge.family in ("bert", "roberta", "xlm-roberta", "distilbert", "gpt2")
        assert lengths[0] == (judge.longest if learned or case in ("dynamic", "no distances") else 350)
        compare(load(folder, judge, device=device), judge, ids, lengths, within=2e-5)


@every_case
def test_a_row_does_not_depend_on_its_batch(family, case, beast):
    folder, judge = beast(family, case)
    base = load(folder, judge, dtype=torch.float64)
    ids, lengths = rows(judge, (29, 1, 7, 18), seed=2)
    _, together, logits = states(base, ids, lengths)
    assert together.dtype == torch.float64
    for row, length in enumerate(lengths):
        _, alone, own_logits = states(base, ids[row : row + 1, :length], lengths[row : row + 1])
        assert apart(together[row, :length], alone[0]) <= 1e-12
        if judge.decoder:
            assert apart(logits[row, :length], own_logits[0]) <= 1e-6  # logits are float32
    assert len(lengths) == 4


@every_case
def test_transformers_own_style_is_the_same_base(family, case, beast):
    """`rope_parameters`, `layer_types`, no task's prefix: the same numbers as from the published style."""
    (old, judge), (new, _) = beast(family, case), beast(family, case, hub=False)
    config = json.loads((new / "config.json").read_text())
    old_config = json.loads((old / "config.json").read_text())
    if family != "openelm":
        assert {"dtype", "transformers_version"} <= set(config) and "torch_dtype" not in config
        listed = {"layer_types"} if family in ("olmo3", "smollm3") else set()
        assert not {"rope_parameters", "layer_types", "dtype"} - listed & set(old_config)
    ids, lengths = rows(judge, (23, 4))
    one, other = (states(load(folder, judge), ids, lengths) for folder in (old, new))
    for own, same in zip(one[0] + list(one[1:]), other[0] + list(other[1:]), strict=True):
        assert own is same or torch.equal(own, same)


@every_case
def test_the_judge_reads_the_published_style_alike(family, case, beast):
    """transformers reads the file that the zoo wrote to the same model: the style is really that of the hub."""
    import transformers

    folder, judge = beast(family, case)
    entry = zoo.FAMILIES[family]
    if family in ("openelm", "nomic_bert") or entry.cases[case].get("hub") in ("su", "wrapper"):
        return  # unknown to transformers; a configuration for remote code; a name that transformers 5 forgot
    again = getattr(transformers, entry.model).from_pretrained(folder, attn_implementation="eager").eval()
    ids, lengths = rows(judge, (23, 4))
    with torch.no_grad():
        expected, found = (
            judge(ids, lengths),
            zoo.Judge(family, case, again, judge.config, judge.settings)(ids, lengths),
        )
    assert apart(found.hidden, expected.hidden) <= 2e-6


@pytest.mark.parametrize("family", sorted(name for name in EVERY if zoo.FAMILIES[name].decoder))
def test_a_decoder_saved_without_its_head(family, beast, tmp_path):
    """The base is all there; logits are there where the embedding serves as the head, and else refused."""
    ran = 0
    for number, case in enumerate(zoo.FAMILIES[family].cases):
        folder, judge = beast(family, case)
        if family == "openelm":
            tensors = load_file(folder / "model.safetensors")
            bare = {k.removeprefix("transformer."): v for k, v in tensors.items() if not k.startswith("lm_head.")}
            (tmp_path / str(number)).mkdir()
            save_file(bare, tmp_path / str(number) / "model.safetensors")
            (tmp_path / str(number) / "config.json").write_text(json.dumps(judge.config))
        else:
            judge.base.save_pretrained(tmp_path / str(number))
        ids, lengths = rows(judge, (20, 3))
        expected = states(load(folder, judge), ids, lengths)
        base = model.load(tmp_path / str(number))
        assert torch.equal(states(base, ids, lengths)[1], expected[1])
        if base.spec.tied:
            assert torch.equal(states(load(tmp_path / str(number), judge), ids, lengths)[2], expected[2])
        else:
            with pytest.raises(InputError):
                load(tmp_path / str(number), judge)
        ran += 1
    assert ran == len(zoo.FAMILIES[family].cases) >= 2


@pytest.mark.parametrize("family", ["deberta-v2", "gemma2", "phi3", "qwen3"])
def test_compiles_as_one_graph(family, beast):
    """Soft-caps, windows, norms of heads, rotations by row; few rows and more, short and long. (See test_compiling.py
    for BERT.)"""
    folder, judge = beast(family, next(iter(zoo.FAMILIES[family].cases)))
    base = load(folder, judge)
    adapted(base, judge)
    base.layers = base.layers[:2]  # later ones are as these, and take their time to compile
    layers = dict(named_layers(base))
    assert len(layers) == 2 * len(base.spec.targets)
    torch._dynamo.reset()
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 30, 60):
        ids, lengths = rows(judge, (length, 3, 5))
        over, _ = weights(judge, lengths)
        gradients = []
        for function in (base, compiled):
            (function(ids, lengths) * over).sum().backward()
            gradients.append([layer.A.grad for layer in layers.values()])
            base.zero_grad()
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# --- projections and adapters


@every_case
def test_places(family, case, beast):
    """Each target's tensor and rows, against a restatement that knows transformers' modules."""
    folder, judge = beast(family, case)
    spec = families.read_spec(judge.config)
    found = families.find(family)
    number, fused = 0, set()
    for layer in range(len(spec.layers)):
        for target in TARGETS:
            expected = zoo.slices(judge, target, layer)
            assert (expected is not None) == (target in spec.targets)
            if expected is None:
                continue
            number += 1
            module, chosen = expected
            layout = found.peft if family == "nomic_bert" else None  # transformers has other names than the hub
            place = found.place(f"layers.{layer}.{target}", spec, layout)
            assert module.removeprefix("transformer.") == place.module.removeprefix("transformer.")
            weight = judge.base.get_submodule(module).weight
            whole = torch.arange(weight.shape[1 if family == "gpt2" else 0])
            assert whole[place.rows].tolist() == (whole if chosen is None else chosen).tolist()
            assert len(whole[place.rows]) == spec.shape(target, layer)[0]
            fused |= {family} if chosen is not None else set()
    assert number == len(spec.layers) * len(spec.targets) > 0
    assert fused == {family} & (FUSED - {"nomic_bert"})


def adapted(base, judge, seed=3):
    """Attach rank 2 and 3 to every projection, neither factor at 0, and return {module: LoRALinear}."""
    spec = base.spec
    names = [f"layers.{layer}.{target}" for layer in range(len(spec.layers)) for target in spec.targets]
    slots = {name: Slot(2 + i % 2, 3.0, 3.0 / (2 + i % 2)) for i, name in enumerate(names)}
    attach(base, slots, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    layers = dict(named_layers(base))
    with torch.no_grad():
        for layer in layers.values():
            layer.A.copy_(0.3 * torch.randn(layer.A.shape, generator=draw))
            layer.B.copy_(0.3 * torch.randn(layer.B.shape, generator=draw))
    return layers


def weights(judge, lengths, seed=4):
    """What the states and logits are multiplied with before they are summed to a loss; 0 on padding."""
    draw = torch.Generator().manual_seed(seed)
    real = (torch.arange(int(lengths.max())) < lengths[:, None])[..., None]
    width = (
        judge.base.get_input_embeddings().weight.shape[1] if judge.family != "openelm" else judge.config["model_dim"]
    )
    shape = len(lengths), int(lengths.max())
    return (real * torch.randn(*shape, width, generator=draw), real * torch.randn(*shape, zoo.V, generator=draw))


def our_gradients(base, judge, layers, ids, lengths):
    hidden = base(ids, lengths)
    over_hidden, over_logits = weights(judge, lengths)
    loss = torch.where(over_hidden != 0, hidden * over_hidden, 0).sum()
    if judge.decoder:
        loss = loss + torch.where(over_logits != 0, base.unembed(hidden) * over_logits, 0).sum()
    loss.backward()
    return {name: (layer.A.grad, layer.B.grad) for name, layer in layers.items()}


def their_loss(out, judge, lengths):
    over_hidden, over_logits = weights(judge, lengths)
    loss = (out.hidden * over_hidden).sum()
    return loss + (out.logits * over_logits).sum() if judge.decoder else loss


def close(ours, theirs, within, what):
    difference = apart(ours, theirs) / theirs.abs().max().item()
    assert theirs.abs().max() > 1e-3, what  # a gradient of 0 would be equal to anything
    assert difference <= within, (what, difference)


@every_case
def test_gradients_are_those_of_the_merged_weight(family, case, beast):
    """Autograd through W[rows] + s B A in the judge's own model, in float64."""
    folder, judge = beast(family, case)
    base = load(folder, judge)
    layers = adapted(base, judge)
    ids, lengths = rows(judge, (21, 1, 9), seed=5)
    ours = our_gradients(base, judge, layers, ids, lengths)

    judge = copy.deepcopy(judge).to(torch.float64)
    called = judge.model if judge.decoder else judge.base
    prefix = {id(module): name for name, module in called.named_modules()}
    replaced, factors = {}, {}
    for name, layer in layers.items():
        _, number, target = name.split(".")
        module, chosen = zoo.slices(judge, target, int(number))
        A, B = (factor.detach().double().requires_grad_() for factor in (layer.A, layer.B))
        factors[name] = A, B
        owner = judge.base.get_submodule(module)
        weight = f"{prefix[id(owner)]}.weight"
        change = layer.slot.scale * (B @ A)
        before = replaced.get(weight, owner.weight.detach())
        before = before.T if family == "gpt2" else before
        chosen = torch.arange(len(before)) if chosen is None else chosen
        after = before.index_add(0, chosen, change)
        replaced[weight] = after.T if family == "gpt2" else after
    their_loss(judge(ids, lengths, replaced, by_row=True), judge, lengths).backward()
    for name, pair in factors.items():
        for factor, own, other in zip("AB", ours[name], pair, strict=True):
            close(own, other.grad, 1e-4, f"{name} {factor}")
    assert len(ours) == len(factors) == len(base.spec.layers) * len(base.spec.targets)


@every_family
def test_gradients_are_peft_s(family, beast):
    """The same adapter in PEFT, on every projection that is a module of its own in transformers."""
    import peft

    for case in zoo.FAMILIES[family].cases:
        folder, judge = beast(family, case)
        base = load(folder, judge)
        layers = adapted(base, judge)
        ids, lengths = rows(judge, (21, 1, 9), seed=6)
        whole = {}
        for name, layer in layers.items():
            _, number, target = name.split(".")
            module, chosen = zoo.slices(judge, target, int(number))
            if chosen is not None:  # without the adapters of fused projections: see the merged weight above
                replace_module(base, name, layer.linear)
            else:
                whole[name] = module
        judge = copy.deepcopy(judge)
        called = judge.model if judge.decoder else judge.base
        path = {id(module): name for name, module in called.named_modules()}
        path = {name: path[id(judge.base.get_submodule(module))] for name, module in whole.items()}
        slots = {name: layers[name].slot for name in whole}
        config = peft.LoraConfig(
            r=2, lora_alpha=3, target_modules=list(path.values()), lora_dropout=0.0,
            rank_pattern={path[name]: slot.rank for name, slot in slots.items()},
        )  # fmt: skip
        wrapped = peft.get_peft_model(called, config)
        modules = dict(wrapped.base_model.model.named_modules())
        for name in whole:
            with torch.no_grad():
                modules[path[name]].lora_A["default"].weight.copy_(layers[name].A)
                modules[path[name]].lora_B["default"].weight.copy_(layers[name].B)
        ours = our_gradients(base, judge, {name: layers[name] for name in whole}, ids, lengths)
        their_loss(judge(ids, lengths), judge, lengths).backward()
        for name in whole:
            for factor, own in zip("AB", ours[name], strict=True):
                other = getattr(modules[path[name]], f"lora_{factor}")["default"].weight.grad
                close(own, other, 1e-4, f"{case}: {name} {factor}")
        both = {"modernbert", "phi3", "openelm"}  # attention's and the MLP's first maps are fused
        parts = ("o", "down") if family in both else base.spec.targets
        parts = ("o", "up", "down") if family in ("gpt2", "gpt_neox") else parts
        assert {name.rpartition(".")[2] for name in whole} == set(parts)
        assert len(whole) == len(base.spec.layers) * len(parts)


# --- configurations

# (family, setting) that change what transformers computes, beyond the zoo's cases. Each must be read, and then to the
# same states, or refused by its name or by its value's; never ignored.
SETTINGS = [
    ("bert", {"hidden_act": "quick_gelu"}),
    ("bert", {"hidden_act": "mish"}),
    ("bert", {"is_decoder": True}),
    ("roberta", {"hidden_act": "gelu_fast"}),
    ("roberta", {"is_decoder": True}),
    ("distilbert", {"activation": "gelu_new"}),
    ("modernbert", {"hidden_activation": "gelu_pytorch_tanh"}),
    ("modernbert", {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}),
    ("modernbert", {"rope_parameters": {"full_attention": zoo.plain(90.0) | {"rope_type": "linear", "factor": 2.0},
                                        "sliding_attention": zoo.plain(90.0)}}),
    ("nomic_bert", {"rope_parameters": zoo.plain(90.0) | {"rope_type": "linear", "factor": 2.0}}),
    ("nomic_bert", {"head_dim": 10}),
    ("llama", {"hidden_act": "relu2"}),
    ("llama", {"rope_parameters": zoo.YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}}),
    ("llama", {"rope_parameters": zoo.YARN | {"attention_factor": 1.7}}),
    ("llama", {"rope_parameters": zoo.YARN | {"mscale": 1.2, "mscale_all_dim": 0.4}}),
    ("llama", {"rope_parameters": zoo.longrope(5) | {"original_max_position_embeddings": 9, "factor": 3.0}}),
    ("llama", {"rope_parameters": zoo.plain(90.0, partial_rotary_factor=0.34)}),
    ("mistral", {"rope_parameters": zoo.LLAMA3}),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "use_sliding_window": True,
               "sliding_window": 5}),
    ("qwen3", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True,
               "sliding_window": 5}),
    ("qwen3", {"rope_parameters": zoo.YARN}),
    ("gemma", {"use_bidirectional_attention": True}),
    ("gemma", {"hidden_act": "silu"}),
    ("gemma", {"attention_bias": True}),
    ("gemma", {"tie_word_embeddings": False}),
    ("gemma2", {"attention_bias": True}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ("gemma2", {"use_bidirectional_attention": True}),
    ("gemma3_text", {"attention_bias": True}),
    ("gemma3_text", {"attn_logit_softcapping": 0.7}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("phi", {"hidden_act": "gelu"}),
    ("phi", {"rope_parameters": zoo.plain(90.0, partial_rotary_factor=0.4) | {"rope_type": "linear", "factor": 3.0}}),
    ("phi", {"tie_word_embeddings": True}),
    ("phi3", {"hidden_act": "gelu"}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"reorder_and_upcast_attn": True}),
    ("gpt_neox", {"rope_parameters": zoo.plain(90.0, partial_rotary_factor=0.5) | {"rope_type": "linear",
                                                                                   "factor": 3.0}}),
    ("gpt_neox", {"hidden_act": "relu"}),
    ("olmo2", {"rope_parameters": zoo.YARN}),
    ("olmo2", {"hidden_act": "gelu"}),
]  # fmt: skip


NAMES = [f"{family} {' '.join(setting)} {i}" for i, (family, setting) in enumerate(SETTINGS)]


@pytest.mark.parametrize(("family", "setting"), SETTINGS, ids=NAMES)
def test_a_setting_is_read_or_refused(family, setting, tmp_path, monkeypatch):
    entry = zoo.FAMILIES[family]
    first = entry.cases[next(iter(entry.cases))]
    monkeypatch.setitem(entry.cases, "other", first | setting)
    judge = zoo.build(family, "other", tmp_path, hub=False)
    try:
        base = load(tmp_path, judge)
    except InputError as error:
        nested = [key for value in setting.values() if isinstance(value, dict) for key in value]
        assert "\n" not in str(error)
        assert any(name in str(error) for name in [*setting, *nested, *map(str, setting.values())]), str(error)
    else:
        compare(base, judge, *rows(judge, (30, 1, 9)), within=2e-5)


# The same for keys that only published files have, and no judge computes: refused by name.
UNJUDGED = [
    ("bert", "position_embedding_type", "relative_key"),
    ("nomic_bert", "prenorm", True),
    ("nomic_bert", "causal", True),
    ("nomic_bert", "use_rms_norm", True),
    ("nomic_bert", "parallel_block", True),
    ("nomic_bert", "rotary_emb_interleaved", True),
    ("nomic_bert", "rotary_emb_scale_base", 512),
    ("nomic_bert", "scale_attn_weights", False),
    ("nomic_bert", "num_experts", 8),
    ("openelm", "ffn_with_glu", False),
    ("openelm", "activation_fn_name", "gelu"),
    ("openelm", "normalization_layer_name", "layer_norm"),
    ("llama", "quantization_config", {"bits": 4}),
]


@pytest.mark.parametrize(("family", "key", "value"), UNJUDGED)
def test_a_published_setting_without_a_judge_is_refused(family, key, value, beast):
    _, judge = beast(family, next(iter(zoo.FAMILIES[family].cases)))
    families.read_spec(judge.config)
    with pytest.raises(InputError, match=key):
        families.read_spec(judge.config | {key: value})


# --- OpenELM's reference


@pytest.mark.parametrize("normed", [True, False])
def test_the_openelm_reference_is_qwen3_or_llama_where_they_coincide(normed):
    """Equal layers with norms of queries and keys are Qwen3's, and without them Llama's."""
    import transformers

    config = dict(
        num_transformer_layers=3, model_dim=24, head_dim=8, num_query_heads=[6] * 3, num_kv_heads=[2] * 3,
        ffn_multipliers=[2.0] * 3, ffn_dim_divisor=8, normalize_qk_projections=normed, share_input_output_layers=False,
        vocab_size=zoo.V, rope_freq_constant=500,
    )  # fmt: skip
    kind = "Qwen3" if normed else "Llama"
    twin = getattr(transformers, kind + "ForCausalLM")._from_config(
        getattr(transformers, kind + "Config")(
            vocab_size=zoo.V, hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
            head_dim=8, intermediate_size=48, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        ),
        attn_implementation="eager",
    ).eval()  # fmt: skip
    reference = openelm_reference.OpenELM(config)
    own = reference.state_dict()
    draw = torch.Generator().manual_seed(0)
    theirs = {}
    for name, value in own.items():
        value.copy_(value + 0.2 * torch.randn(value.shape, generator=draw))
        name = name.replace("transformer.", "model.").replace("token_embeddings", "embed_tokens")
        for ours, other in {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            ".attn.": ".self_attn.",
            "out_proj": "o_proj",
            "ffn.proj_2": "mlp.down_proj",
        }.items():
            name = name.replace(ours, other)
        if "qkv_proj" in name:
            parts = zip("qkv", value.split([48, 16, 16]))
            theirs |= {name.replace("qkv", part): piece for part, piece in parts}
        elif "proj_1" in name:
            theirs |= {name.replace("ffn.proj_1", f"mlp.{p}_proj"): v for p, v in zip(("gate", "up"), value.chunk(2))}
        else:
            theirs[name] = value
    twin.load_state_dict(theirs)
    ids = torch.randint(0, zoo.V, (2, 60), generator=draw)
    with torch.no_grad():
        found, expected = reference(ids), twin(ids, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    for ours, other in zip(found.hidden_states, expected.hidden_states):
        assert apart(ours, other) <= 2e-5
    assert apart(found.logits, expected.logits) <= 2e-5


@pytest.mark.parametrize(
    ("multiplier", "width", "divisor", "expected"),
    # Published sizes: OpenELM-270M's first, second and last layers; then one that would lose more than a tenth.
    [(0.5, 1280, 256, 768), (0.73, 1280, 256, 1024), (4.0, 1280, 256, 5120), (1.4, 24, 24, 48), (1.05, 24, 24, 24)],
)
def test_openelm_s_inner_widths(multiplier, width, divisor, expected):
    changes = {"ffn_multipliers": [multiplier] * 3, "model_dim": width, "ffn_dim_divisor": divisor}
    config = zoo.FAMILIES["openelm"].defaults | changes
    assert openelm_reference.inner_width(config, 1) == expected
    assert families.read_spec(config).layers[1].inner == expected


def test_the_nearest_family_of_one_that_is_not_here():
    wanted = {"camembert": "roberta", "xlm-roberta-xl": "xlm-roberta", "deberta": "deberta-v2", "qwen3_moe": "qwen3",
              "gpt_bigcode": "gpt2", "mixtral": "mistral", "llama4": "llama"}  # fmt: skip
    for name, nearest in wanted.items():
        with pytest.raises(InputError, match=f"the nearest is {nearest}\\)"):
            families.find(name)
    assert set(families.KIN.values()) <= set(families.FAMILIES) and not set(families.KIN) & set(families.FAMILIES)


@pytest.mark.parametrize("script", ["parity.py", "real_bases.py"])
def test_scripts_explain_themselves(script):
    done = subprocess.run([sys.executable, ROOT / "tests" / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python tests/{script}") and not done.stderr
