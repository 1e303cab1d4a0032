"""Adapters cross to PEFT and back with equal outputs; what does not fit is refused."""

import dataclasses
import json
from itertools import product

import peft
import pytest
import safetensors
import torch
import transformers
from conftest import random_batch, tiny_bert
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from test_layer import fill
from zoo import HeadJudge

from minilora import files
from minilora.base import model
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.lora import peft_config, storage
from minilora.lora.adapter import adapter_of, variant_of
from minilora.lora.layer import attach, named_layers, scale_by
from minilora.lora.targets import plan_slots
from minilora.tasks.classification import Classifier

CELLS = [
    Cell(rank=1),
    Cell(rank=3, alpha=5.0, targets=("q:2:7", "v", "o", "down"), layers="1-2"),
    Cell(rank=4, alpha=3.0, scaling="rslora", targets=("all",), dropout=0.1),
    Cell(rank=2, scaling="rank", targets=("k:5", "up"), layers="0"),
]


def trained(folder, cell, classes=3):
    """A classifier with a random adapter and head, as if trained."""
    base = model.load(folder)
    attach(base, plan_slots(base.spec, cell), cell.dropout, 2, cell.variant, cell.init or "kaiming")
    classifier = Classifier(fill(base), cell.pooling, classes, seed=4).eval()
    with torch.no_grad():
        classifier.classifier.bias.copy_(torch.tensor([0.3, -1.0, 2.0])[:classes])
    return classifier


@pytest.mark.parametrize("number", range(len(CELLS)))
def test_ours_loads_in_peft(tiny_folder, tmp_path, number):
    cell = CELLS[number]
    classifier = trained(tiny_folder, cell)
    storage.save(tmp_path / "adapter", classifier, cell, ["a", "b", "c"])
    ids, lengths = random_batch(90, [19, 8, 1, 30])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    with torch.inference_mode():
        states, logits = classifier.base(ids, lengths), classifier(ids, lengths)
        base = transformers.AutoModel.from_pretrained(tiny_folder)
        plain = base(ids, attention_mask=mask).last_hidden_state
        bare = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        hidden = bare(input_ids=ids, attention_mask=mask).last_hidden_state
        judge = peft.PeftModel.from_pretrained(HeadJudge.from_pretrained(tiny_folder), tmp_path / "adapter").eval()
        judged = judge(ids, mask)
    assert (hidden - plain)[mask.bool()].abs().max() > 0.1
    torch.testing.assert_close(hidden[mask.bool()], states[mask.bool()], rtol=0, atol=2e-5)
    torch.testing.assert_close(judged, logits, rtol=0, atol=2e-5)


def test_peft_loads_here(tiny_folder, tmp_path):
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["query", "attention.output.dense", "intermediate.dense"],
        rank_pattern={r"layer\.1\.attention\.self\.query": 2}, alpha_pattern={"query": 9}, use_rslora=True,
        init_lora_weights=False, modules_to_save=["classifier"],
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = peft.get_peft_model(HeadJudge.from_pretrained(tiny_folder), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    base = model.load(tiny_folder)
    weights = storage.load(tmp_path / "adapter", base)
    ours = Classifier(base, "mean", 3).eval()
    ours.set_head(**weights)
    assert [layer.slot.rank for name, layer in named_layers(base) if name.endswith("q")] == [3, 2, 3]
    assert {layer.slot.alpha for name, layer in named_layers(base) if name.endswith("q")} == {9.0}
    ids, lengths = random_batch(90, [19, 8, 1, 30])
    with torch.inference_mode():
        wanted = theirs(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long())
        torch.testing.assert_close(ours(ids, lengths), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cell", [*CELLS, Cell(method="full"), Cell(method="head", pooling="mean+last")])
def test_restore_is_the_inverse_of_save(tiny_folder, tmp_path, cell):
    from minilora.training.member import trained_parameters

    classifier = Classifier(model.load(tiny_folder), cell.pooling, 3, seed=9)
    if cell.method == "lora":
        classifier = trained(tiny_folder, cell)
    trained_parameters(classifier, cell)
    if cell.method == "full":
        with torch.no_grad():
            for parameter in classifier.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    storage.save_run(tmp_path, classifier, cell, ["a", "b", "c"])
    fresh = Classifier(model.load(tiny_folder), cell.pooling, 3, seed=10)
    storage.restore(tmp_path, fresh, cell.method)
    wanted, found = classifier.state_dict(), fresh.state_dict()
    assert list(found) == list(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)
    ids, lengths = random_batch(90, [19, 8])
    with torch.inference_mode():
        assert torch.equal(fresh.eval()(ids, lengths), classifier.eval()(ids, lengths))
    assert json.loads((tmp_path / "adapter" / "head.json").read_text()) == {
        "pooling": cell.pooling, "label_names": ["a", "b", "c"]}  # fmt: skip


def refusal(folder, base):
    base = model.load(base)
    with pytest.raises(InputError) as caught:
        storage.load(folder, base)
    assert "\n" not in str(caught.value) and not named_layers(base)
    return str(caught.value)


def test_what_does_not_fit_is_refused(tiny_folder, tmp_path):
    folder = tmp_path / "adapter"
    assert "adapter_config.json" in refusal(folder, tiny_folder)
    cell = CELLS[1]
    storage.save(folder, trained(tiny_folder, cell), cell, ["a", "b", "c"])
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.encoder.layer.1.attention.self.query"
    name = f"{stem}.lora_A.weight"
    assert name in tensors
    cases = 0
    for change, words in [
        (dict(use_dora=True), "encoder.layer.1.attention.self.query lacks its magnitude"),
        (dict(peft_type="LOHA"), "LOHA"),
        (dict(peft_type=None), "peft_type is None"),
        (dict(bias="all"), "bias = 'all' is not implemented (only 'none' is)"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(newest_idea={"x": 1}), "newest_idea = {'x': 1} is not implemented (minilora does not know it)"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(lora_dropout=1.5), "lora_dropout is 1.5"),
        (dict(rank_pattern={}), "rank 2"),
        (dict(rank_pattern={"(": 2}), "rank_pattern has '(', which is no regular expression"),
        (dict(alpha_pattern=[3]), "alpha_pattern does not map"),
        (dict(alpha_pattern={}, lora_alpha=None), "None"),
        (dict(r="3"), "adapter_config.json: r is '3', but must be a number from 0 to 1e+12"),
        (dict(rank_pattern={"query": "2"}), "rank_pattern of encoder.layer.1.attention.self.query is '2', but must be"),
        (dict(lora_alpha=1e300), "lora_alpha is 1e+300, but must be a number from 0 to 1e+12"),
        (dict(lora_alpha=10**400), "lora_alpha is 1000000"),
        (dict(lora_alpha=float("inf")), "Infinity is not a finite number"),
        (dict(alpha_pattern={"query": float("nan")}), "NaN is not a finite number"),
        (dict(init_lora_weights="pissa_niter_4"), "pissa_niter_4': it subtracted an approximate part from the base"),
        (dict(init_lora_weights="loftq"), "it was trained on a quantised base"),
        (dict(init_lora_weights="corda"), "depends on data"),
        (dict(init_lora_weights="lora_ga"), "depends on a gradient"),
        (dict(init_lora_weights="tomorrow's"), "minilora does not know it"),
        (dict(target_modules=None), "target_modules is not given"),
        (dict(target_modules=["query"]), "attention.self.value has factors, but is not one of target_modules"),
        (dict(target_modules=config["target_modules"] + ["key"]), "encoder.layer.0.attention.self.key lacks its A"),
        (dict(target_modules="all-linear"), "encoder.layer.0.attention.self.query lacks its A"),
        (dict(target_modules=".*("), "a pattern of modules is no regular expression"),
        (dict(target_modules=".*query", layers_to_transform=[1]), "need a list of target_modules"),
        (dict(layers_pattern="layer"), "layers_pattern needs layers_to_transform"),
        (dict(exclude_modules=["query"]), "query has factors, but is not one of target_modules"),
        (
            dict(modules_to_save=["classifier", "pooler"]),
            "modules_to_save names 'pooler', but there is no tensor of it",
        ),
        (dict(modules_to_save=["classifier", "LayerNorm"]), "'LayerNorm', but there is no tensor of it"),
        (dict(modules_to_save=None), "classifier.bias has no place in it; classifier.weight has no place in it"),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        message = refusal(folder, tiny_folder)
        assert words in message, message
        cases += 1
    (folder / "adapter_config.json").write_text(json.dumps(config))
    classifier = "base_model.model.classifier.weight"
    for changed, words in [
        (tensors | {name: torch.zeros(2, 23)}, "[2, 23]"),
        (tensors | {name: torch.zeros(2, 24, dtype=torch.int8)}, "lora_A.weight is of type int8"),
        (tensors | {name.replace("layer.1", "layer.7"): torch.zeros(2, 24)}, "layer.7"),
        (
            tensors | {name.replace("model.encoder", "model.bert.encoder"): tensors[name].clone()},
            "modules have several prefixes ('', 'bert.')",
        ),
        (tensors | {f"{stem}.lora_magnitude_vector": torch.ones(24)}, "query has a magnitude"),
        ({n: t for n, t in tensors.items() if n != name}, "query lacks its A"),
        ({n: t for n, t in tensors.items() if "lora" not in n}, "query lacks its A"),
        (tensors | {"base_model.model.embeddings.word_embeddings.weight": torch.zeros(3, 24)}, "word_embeddings"),
        (tensors | {classifier: torch.zeros(3, 25)}, "classifier has shapes {'bias': [3], 'weight': [3, 25]}"),
        (tensors | {name: torch.full((2, 24), torch.nan)}, "A of layers.1.q has NaN or infinity"),
        (tensors | {classifier: torch.full((3, 24), torch.inf)}, "the head's weight has NaN or infinity"),
        (
            tensors | {f"{stem}.lora_A.other.weight": tensors[name].clone()},
            "has several tensors encoder.layer.1.attention",
        ),
    ]:
        save_file(changed, folder / "adapter_model.safetensors")
        message = refusal(folder, tiny_folder)
        assert words in message, message
        cases += 1
    (folder / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0truncated")
    assert "adapter_model.safetensors" in refusal(folder, tiny_folder)
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal(folder, tiny_folder)
    assert cases == 34 + 12


def test_another_base_is_refused_with_the_first_differences(tmp_path):
    tiny_bert(tmp_path / "two", num_hidden_layers=2)
    tiny_bert(tmp_path / "six", num_hidden_layers=6)
    tiny_bert(tmp_path / "wide", hidden_size=30)
    cell = Cell(targets=("q", "v"))
    storage.save(tmp_path / "six/a", trained(tmp_path / "six", cell), cell, "abc")
    path = "encoder.layer.{}.attention.self.{}.lora_{}.weight has no place in it"
    assert refusal(tmp_path / "six/a", tmp_path / "two") == (
        f"{tmp_path}/six/a/adapter_model.safetensors is not an adapter for this bert base of 2 layers: "
        f"{path.format(2, 'query', 'A')}; {path.format(2, 'query', 'B')}; {path.format(2, 'value', 'A')}; and 13 more"
    )
    storage.save(tmp_path / "two/a", trained(tmp_path / "two", cell), cell, "abc")
    assert "6 layers: encoder.layer.2.attention.self.query lacks" not in refusal(tmp_path / "two/a", tmp_path / "wide")
    message = refusal(tmp_path / "two/a", tmp_path / "wide")
    assert "query has A [1, 24] and B [24, 1], where the base asks for A [R, 30] and B [30, R]; " in message


@pytest.mark.parametrize("cell", [Cell(rank=2, init="pissa"), Cell(rank=2, variant="dora", dropout=0.1)])
def test_a_run_keeps_its_factors(tiny_folder, tmp_path, cell):
    """The same bytes each time. A run whose adapter/ changed is refused; adapter/ itself is read as PEFT reads it."""
    classifier = trained(tiny_folder, cell)
    for name in ("one", "two"):
        storage.save_run(tmp_path / name, classifier, cell, "abc")
    one, two = (tmp_path / name for name in ("one", "two"))
    assert (one / storage.FACTORS).read_bytes() == (two / storage.FACTORS).read_bytes()
    found, wanted = storage.read(one, model.load(tiny_folder)), adapter_of(classifier.base)
    assert found.slots == wanted.slots and (found.variant, found.dropout) == (cell.variant, cell.dropout)
    for name, part in wanted.parts.items():
        assert list(part.tensors()) == list(found.parts[name].tensors())
        assert all(value.equal(found.parts[name].tensors()[key]) for key, value in part.tensors().items())
    assert found.head["weight"].equal(classifier.classifier.weight) and found.head["bias"][2] == 2.0

    def refused(words):
        message = refusal(two, tiny_folder)
        assert words in message and str(two / "adapter") in message, message

    tensors = load_file(two / "adapter" / peft_config.TENSORS)
    for change in (dict(lora_alpha=9), dict(note=[])):
        path = two / "adapter" / peft_config.CONFIG
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | change))
        refused("adapter_config.json is not what the run wrote: to use it as it is now, name")
        path.write_text(before)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] += 1
    files.write_tensors(two / "adapter" / peft_config.TENSORS, tensors)
    refused("adapter_model.safetensors is not what the run wrote")
    base = model.load(tiny_folder)
    storage.load(two / "adapter", base)
    assert {layer.slot.rank for _, layer in named_layers(base)} == {4 if cell.init == "pissa" else 2}
    (two / "adapter" / peft_config.TENSORS).unlink()
    refused("adapter_model.safetensors is not what the run wrote")

    with safetensors.safe_open(one / storage.FACTORS, "pt") as file:
        record = json.loads(file.metadata()[storage.RECORD])
    factors, slots = load_file(one / storage.FACTORS), record["slots"]
    cases = 0
    for changed in (
        {},
        record | {"variant": "best"},
        record | {"slots": {n: s for n, s in slots.items() if n != "layers.0.q"}},
        record | {"slots": slots | {"layers.0.q": {"rank": 2}}},
        record | {"slots": []},
        record | {"adapter": None},
    ):
        files.write_tensors(two / storage.FACTORS, factors, {storage.RECORD: json.dumps(changed)})
        refused("factors.safetensors is not as a run writes it: train the run again, or name")
        cases += 1
    assert cases == 6
    (two / storage.FACTORS).write_bytes(b"cut")
    assert "factors.safetensors is not a whole safetensors file" in refusal(two, tiny_folder)


def test_a_run_of_another_base_is_refused(tmp_path):
    tiny_bert(tmp_path / "two", num_hidden_layers=2)
    tiny_bert(tmp_path / "six", num_hidden_layers=6)
    tiny_bert(tmp_path / "wide", hidden_size=30)
    storage.save_run(tmp_path / "run", trained(tmp_path / "six", Cell(targets=("q",))), Cell(targets=("q",)), "abc")
    assert (
        "bert base of 2 layers: layers.2.q has A [1, 24] and B [24, 1], where the base asks for none there"
        in refusal(tmp_path / "run", tmp_path / "two")
    )
    assert "layers.0.q has A [1, 24] and B [24, 1], where the base asks for A [R, 30]" in refusal(
        tmp_path / "run", tmp_path / "wide"
    )


def test_every_field_of_peft_is_decided():
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    tables = [peft_config.FOLLOWED, peft_config.INERT, set(peft_config.REFUSED)]
    assert set().union(*tables) == set(fields) and sum(map(len, tables)) == len(fields) == 42
    for name, value in peft_config.REFUSED.items():
        default = fields[name].default
        assert value == ("LORA" if name == "peft_type" else default), name
    plain = json.loads(json.dumps(peft.LoraConfig(target_modules=["query"]).to_dict(), default=list))
    peft_config.check(plain | {"runtime_config": {}}, "here", False)
    refused = 0
    for name in peft_config.REFUSED:
        with pytest.raises(InputError, match=name):
            peft_config.check(plain | {name: {"x": 1}}, "here", False)
        refused += 1
    assert refused == 13


NAMES = ["encoder.layer.0.attention.self.query", "model.layers.1.mlp.up_proj", "model.layers.11.self_attn.q_proj",
         "layers.1.mlp.up_proj", "transformer.h.2.attn.c_attn", "h.0.attn.c_attn", "h.11.mlp.c_proj"]  # fmt: skip
TARGETS = [["query"], ["q_proj", "up_proj"], "all-linear", r".*\.(up_proj|c_attn)", [], ["attn.c_attn"],
           ["model.layers.1.mlp.up_proj", "c_proj"], r"h\.\d+\.mlp.*"]  # fmt: skip
EXCLUDED = [None, [], ["up_proj"], r".*\.1\..*", ["attn.c_attn", "h.11.mlp.c_proj"]]
LAYERS = [(None, None), (1, None), ([0, 11], None), ([], None), ([1, 2], "layers"), (11, ["h", "layers"]), (0, "layer")]


def test_targets_are_matched_as_in_peft():
    found = 0
    for name, targets, excluded, (layers, pattern) in product(NAMES, TARGETS, EXCLUDED, LAYERS):
        if isinstance(targets, str) and layers is not None:
            continue
        config = dict(
            target_modules=targets, exclude_modules=excluded, layers_to_transform=layers, layers_pattern=pattern
        )
        theirs = peft.LoraConfig(**{k: v for k, v in config.items() if v is not None})
        wanted = bool(check_target_module_exists(theirs, name))
        if targets == "all-linear":  # which PEFT resolves before
            wanted = not isinstance(check_target_module_exists(theirs, name), _ExcludedModule)
        assert peft_config.is_targeted(config, name, "here") == wanted, (name, config)
        found += wanted
    assert found > 100
    slots = dict(r=3, lora_alpha=6, rank_pattern={r"^model\.layers\.1\..*": 5, "up_proj": 2, "q_proj": 4},
                 alpha_pattern={"c_attn": 1.5})  # fmt: skip
    ranks = [peft_config.read_slot(slots, name, "here") for name in NAMES]
    keys = [get_pattern_key(slots["rank_pattern"], name) for name in NAMES]
    assert [slot.rank for slot in ranks] == [slots["rank_pattern"].get(key, 3) for key in keys] == [3, 5, 4, 2, 3, 3, 3]
    assert [slot.alpha for slot in ranks] == [6, 6, 6, 6, 1.5, 1.5, 6]


@pytest.mark.parametrize("changes", [
    dict(target_modules=r"encoder\.layer\.[02]\.attention\.self\.(query|key)"),
    dict(target_modules=["query", "dense"], exclude_modules=r"pooler.*|.*output\.dense", layers_to_transform=[0, 2],
         layers_pattern="layer"),
    dict(target_modules="all-linear", exclude_modules=["pooler.dense"]),
    dict(target_modules=["value"], layers_to_transform=1, lora_dropout=0.2),
    dict(target_modules=["value"], init_lora_weights="orthogonal"),
    dict(target_modules=["value"], init_lora_weights="mica"),
])  # fmt: skip
def test_peft_settings_load_here(tiny_folder, tmp_path, changes):
    torch.manual_seed(3)
    base = transformers.AutoModel.from_pretrained(tiny_folder)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(**dict(r=4, lora_alpha=5, init_lora_weights=False) | changes)
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = model.load(tiny_folder)
    assert storage.load(tmp_path / "adapter", ours) == {}
    assert {la.dropout for _, la in named_layers(ours)} == {changes.get("lora_dropout", 0.0)}
    compare(ours.eval(), theirs)


def compare(ours, theirs, atol=2e-5):
    """Hidden states of ours and of transformers' model; returns them."""
    ids, lengths = random_batch(90, [19, 8, 1, 30])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    with torch.inference_mode():
        found = ours(ids, lengths)[mask]
        wanted = theirs(ids, attention_mask=mask.long()).last_hidden_state[mask]
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)
    return found


SIZES = dict(vocab_size=90, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
             max_position_embeddings=48, num_labels=5, pad_token_id=0)  # fmt: skip
DISTILLED = dict(vocab_size=90, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_position_embeddings=48, num_labels=5)
# (family in transformers, its configuration, a target, modules to save besides PEFT's, what is said of the head)
CLASSIFIERS = [
    (
        "Bert",
        SIZES,
        "query",
        [],
        "(classifier.bias, classifier.weight): it is one of transformers' task models, with pooler before",
    ),
    (
        "Bert",
        SIZES,
        "query",
        ["pooler"],
        "(bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, classifier.weight): it",
    ),
    ("Roberta", SIZES, "query", [], "classifier.dense.weight, classifier.out_proj.bias"),
    (
        "DistilBert",
        DISTILLED,
        "q_lin",
        ["pre_classifier"],
        "with pre_classifier before the last map, which has no place here",
    ),
    (
        "ModernBert",
        SIZES | dict(cls_token_id=1, sep_token_id=2),
        "Wqkv",
        ["head"],
        "head.dense.weight, head.norm.weight",
    ),
]


@pytest.mark.parametrize("kind, sizes, target, modules, words", CLASSIFIERS)
def test_a_classifier_of_peft(tmp_path, capsys, kind, sizes, target, modules, words):
    """Its head reads what minilora has not, and is left out with a line; the factors are read."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    whole = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    whole.base_model.save_pretrained(tmp_path)
    settings = dict(r=2, target_modules=[target], modules_to_save=modules or None, init_lora_weights=False)
    theirs = peft.get_peft_model(whole, peft.LoraConfig(task_type="SEQ_CLS", **settings))
    theirs.save_pretrained(tmp_path / "a")
    base = model.load(tmp_path)
    assert storage.load(tmp_path / "a", base) == {}
    assert words in capsys.readouterr().err
    compare(base.eval(), theirs.eval().base_model.model.base_model)


def test_a_decoder_s_classifier_of_peft(tmp_path, capsys):
    """Its head reads the last token's hidden state, as pooling last does: the logits are transformers'."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SIZES | dict(num_key_value_heads=3))
    whole = transformers.LlamaForSequenceClassification(config)
    whole.model.save_pretrained(tmp_path)
    theirs = peft.get_peft_model(
        whole, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    ).eval()
    theirs.save_pretrained(tmp_path / "a")
    base = model.load(tmp_path)
    ours = Classifier(base, "last", 5)
    ours.set_head(**storage.load(tmp_path / "a", base))
    ids, lengths = random_batch(90, [19, 8, 1, 30])
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    ids = torch.where(real, ids.clamp(min=1), 0)  # transformers finds the last token by its padding
    with torch.inference_mode():
        wanted = theirs(ids, attention_mask=real.long()).logits
        torch.testing.assert_close(ours.eval()(ids, lengths), wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 1e-3 and "head" not in capsys.readouterr().err


# --- names and tensors that other tools write


def test_keys_of_a_state_dict(tiny_folder, tmp_path, capsys):
    """The adapter's name in a key, a doubled prefix, a saved head's first state, the base's own tensors beside it."""
    cell = Cell(rank=2, targets=("q", "down"))
    storage.save(tmp_path, trained(tiny_folder, cell), cell, "abc")
    base = model.load(tiny_folder)
    wanted, tensors, prefix = (
        storage.read(tmp_path, base),
        load_file(tmp_path / peft_config.TENSORS),
        "base_model.model.",
    )
    embeddings = f"{prefix}embeddings.word_embeddings.weight"
    head = f"{prefix}classifier.modules_to_save.default."
    named = {name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
             .replace(f"{prefix}classifier.", head): value for name, value in tensors.items()}  # fmt: skip
    assert not named.keys() & tensors.keys()
    cases = 0
    for changed in (
        named,
        named | {f"{prefix}classifier.original_module.weight": torch.zeros(3, 24)},
        {f"{prefix}{name}": value for name, value in tensors.items()},
        tensors | {embeddings: base.embed.tokens.weight.detach().clone()},
    ):
        files.write_tensors(tmp_path / peft_config.TENSORS, changed)
        found = storage.read(tmp_path, base)
        assert found.slots == wanted.slots and found.head["bias"].equal(wanted.head["bias"])
        for name, part in wanted.parts.items():
            assert part.A.equal(found.parts[name].A) and part.B.equal(found.parts[name].B)
        cases += 1
    assert cases == 4
    config = json.loads((tmp_path / peft_config.CONFIG).read_text())
    both = config | {"modules_to_save": ["classifier", "LayerNorm", "word_embeddings"]}
    (tmp_path / peft_config.CONFIG).write_text(json.dumps(both))
    norm = f"{prefix}embeddings.LayerNorm.weight"
    norms = {norm: base.embed.norm.weight.detach().clone(), embeddings: changed[embeddings]}
    for more, words in (
        ({}, None),
        ({norm: torch.ones(24) * 1.5}, "embeddings.LayerNorm.weight is not the base's, and minilora does not train it"),
        ({f"{prefix}encoder.layer.0.output.LayerNorm.weight": torch.ones(24)}, "LayerNorm.weight has no place in it"),
    ):
        files.write_tensors(tmp_path / peft_config.TENSORS, tensors | norms | more)
        if words:
            assert words in refusal(tmp_path, tiny_folder)
        else:
            storage.read(tmp_path, base)
    (tmp_path / peft_config.CONFIG).write_text(json.dumps(config))
    others = base.embed.tokens.weight.detach() + 1e-3
    for other in (others, torch.cat([others, others[:1]])):
        files.write_tensors(tmp_path / peft_config.TENSORS, tensors | {embeddings: other})
        assert "word_embeddings.weight is not the base's, and minilora does not train it" in refusal(
            tmp_path, tiny_folder
        )
    capsys.readouterr()
    files.write_tensors(tmp_path / peft_config.TENSORS, tensors)
    patterns = dict(rank_pattern={"q_proj": 7, r"encoder\.layer\.1\..*query": 2}, alpha_pattern={"layer.9.up": 3})
    (tmp_path / peft_config.CONFIG).write_text(json.dumps(config | patterns))
    storage.read(tmp_path, base)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in said] == [
        "rank_pattern has 'q_proj', which matches none of its modules",
        "alpha_pattern has 'layer.9.up', which matches none of its modules",
    ]


def test_what_float32_cannot_hold_is_refused(tiny_folder, tmp_path):
    """Weights and scales, of a plain adapter and of one with magnitudes; what is just below the limit is computed."""
    for variant in ("lora", "dora"):
        cell = Cell(rank=2, variant=variant)
        storage.save_run(tmp_path / variant, trained(tiny_folder, cell), cell, "abc")
    cases = 0
    for name, weight, added in [
        ("lora", 1e38, ()),
        ("lora", 1e300, ()),
        ("dora", -1e38, ()),
        ("lora", 1.0, [(tmp_path / "lora", 1e300)]),
        ("lora", 1.0, [(tmp_path / "lora" / "adapter", 1e30)]),
    ]:
        fresh = Classifier(model.load(tiny_folder), "mean", 3)
        culprit, factor = added[0] if added else (tmp_path / name, weight)
        with pytest.raises(InputError) as caught:
            storage.restore(tmp_path / name, fresh, "lora", weight, added)
        assert str(caught.value).startswith(
            f"{culprit}, {factor:g} times: it changes the weight of layers.0.q by up to"
        )
        assert not named_layers(fresh.base)
        cases += 1
    assert cases == 5
    storage.restore(tmp_path / "lora", fresh, "lora", 1e9)
    assert fresh.eval()(*random_batch(90, [9, 4])).isfinite().all()
    with pytest.raises(InputError, match="target 'q' has alpha 1e.300, too large for float32"):
        plan_slots(fresh.base.spec, Cell(alpha=1e300))


# --- several adapters

PARTS = [
    Cell(rank=1),
    Cell(rank=3, alpha=5.0, targets=("q:2:7", "v", "down"), layers="1-2"),
    Cell(rank=2, init="pissa"),
]


def test_stacking_matches_peft(tiny_folder, tmp_path):
    weights = [0.3, 0.7, -1.5]
    for number, cell in enumerate(PARTS):
        classifier = trained(tiny_folder, cell)
        fill(classifier.base, seed=number)
        storage.save(tmp_path / str(number), classifier, cell, "abc")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(tiny_folder), tmp_path / "0", "0")
    theirs.load_adapter(tmp_path / "1", "1")
    theirs.load_adapter(tmp_path / "2", "2")
    plain = compare(model.load(tiny_folder).eval(), transformers.AutoModel.from_pretrained(tiny_folder))
    theirs.add_weighted_adapter(["0", "1", "2"], weights, "sum", combination_type="cat")
    theirs.set_adapter("sum")
    ours = Classifier(model.load(tiny_folder), "mean", 3)
    storage.restore(tmp_path / "0", ours, "lora", 0.3, [(tmp_path / "1", 0.7), (tmp_path / "2", -1.5)])
    assert (compare(ours.base.eval(), theirs.eval(), 5e-5) - plain).abs().max() > 0.1
    ranks = {name: layer.slot.rank for name, layer in named_layers(ours.base)}
    assert ranks == {f"layers.{i}.{t}": {"q": 1 + 2 * (i > 0) + 4, "k": 5, "v": 1 + 3 * (i > 0) + 4, "down": 3}[t]
                     for i in range(3) for t in ("q", "k", "v", "down") if t != "down" or i}  # fmt: skip
    scale_by(ours.base, 0)
    theirs.base_model.disable_adapter_layers()
    assert torch.equal(compare(ours.base, theirs), plain)
    # One adapter alone: its own strength.
    ours = Classifier(model.load(tiny_folder), "mean", 3)
    storage.restore(tmp_path / "1", ours, "lora", 0.25)
    theirs.base_model.enable_adapter_layers()
    theirs.set_adapter("1")
    for module in theirs.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("1", 0.25)
    compare(ours.base.eval(), theirs)


def test_stacking_is_refused_where_there_is_no_sum(tiny_folder, tmp_path):
    cell = Cell(variant="dora")
    storage.save(tmp_path / "dora", trained(tiny_folder, cell), cell, "abc")
    storage.save(tmp_path / "plain", trained(tiny_folder, Cell()), Cell(), "abc")
    for first, second in (("dora", "plain"), ("plain", "dora")):
        fresh = Classifier(model.load(tiny_folder), "mean", 3)
        with pytest.raises(InputError, match="an adapter with magnitudes .DoRA. cannot be added to others"):
            storage.restore(tmp_path / first, fresh, "lora", 1.0, [(tmp_path / second, 1.0)])
        assert not named_layers(fresh.base)
    with pytest.raises(InputError, match="method = 'full' trained no adapter"):
        storage.restore(tmp_path, fresh, "full", 0.5)


# --- warm start


def test_begin(tiny_folder, tmp_path):
    cell = Cell(rank=3, alpha=5.0, targets=("q:2:7", "v", "down"), layers="1-2", scaling="rslora")
    classifier = trained(tiny_folder, cell)
    storage.save_run(tmp_path / "run", classifier, cell, "abc")
    again = cell.replace(start=str(tmp_path / "run"))
    assert again.init is None and again.replace(init="gaussian").start is None
    base = model.load(tiny_folder)
    slots = plan_slots(base.spec, again)
    found = storage.begin(base, again, slots)
    assert found == storage.fingerprint(tmp_path / "run") != storage.fingerprint(tmp_path / "run" / "adapter")
    wanted, state = classifier.base.state_dict(), base.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted) and list(state) == list(wanted)

    cases = 0
    for changes in (
        dict(rank=2),
        dict(layers="1"),
        dict(scaling="constant"),
        dict(variant="dora"),
        dict(targets=("q", "v")),
    ):
        other = again.replace(**changes)
        with pytest.raises(InputError) as caught:
            storage.begin(model.load(tiny_folder), other, plan_slots(base.spec, other))
        assert "it has --targets q:2:7 v:3:5 down:3:5 --layers 1-2 --scaling rslora; use these" in str(caught.value)
        cases += 1
    assert cases == 5
    with pytest.raises(InputError, match="holds no LoRA adapter"):
        storage.begin(base, again.replace(start=str(tmp_path)), slots)
    for folder in ("run/adapter", "bare"):  # an adapter's folder, and a run's folder whose factors are not there
        storage.save(tmp_path / "bare" / "adapter", classifier, cell, "abc")
        assert storage.begin(model.load(tiny_folder), again.replace(start=str(tmp_path / folder)), slots) != found


def test_begin_with_a_part_of_the_base(tiny_folder, tmp_path):
    cell = Cell(rank=2, init="olora")
    storage.save_run(tmp_path, trained(tiny_folder, cell), cell, "abc")
    again = cell.replace(start=str(tmp_path), dropout=0.1)
    base = model.load(tiny_folder)
    slots = plan_slots(base.spec, again)
    with pytest.raises(InputError, match="dropout is 0.1, but .* holds a part of the base"):
        storage.begin(base, again, slots)
    storage.begin(base, again.replace(dropout=0.0, variant="lora-fa"), slots)
    layers = named_layers(base)
    assert len(layers) == 9 and all(la.A0 is not None and variant_of(la) == "lora-fa" for _, la in layers)
