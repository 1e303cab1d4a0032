"""Adapters cross to PEFT and back with equal outputs; what does not fit is refused."""

import json

import peft
import pytest
import torch
import transformers
from conftest import random_batch
from safetensors.torch import load_file, save_file
from test_lora import fill

from minilora import adapter, coverage, head, lora, model
from minilora.cell import Cell
from minilora.errors import InputError

CELLS = [
    Cell(rank=1),
    Cell(rank=3, alpha=5.0, targets=("q:2:7", "v", "o", "down"), layers="1-2"),
    Cell(rank=4, alpha=3.0, scaling="rslora", targets=("all",), dropout=0.1),
    Cell(rank=2, scaling="rank", targets=("k:5", "up"), layers="0"),
]


def trained(folder, cell, classes=3):
    """A classifier with a random adapter and head, as if trained."""
    base = model.load(folder)
    lora.attach(base, coverage.plan(base.spec, cell), cell.dropout, seed=2)
    classifier = head.Classifier(fill(base), cell.pooling, classes, seed=4).eval()
    with torch.no_grad():
        classifier.classifier.bias.copy_(torch.tensor([0.3, -1.0, 2.0])[:classes])
    return classifier


class Judge(transformers.BertModel):
    """transformers' base with mean pooling and a linear head under the name that PEFT's file has."""

    def __init__(self, config):
        super().__init__(config, add_pooling_layer=False)
        self.classifier = torch.nn.Linear(config.hidden_size, 3)

    def forward(self, input_ids, attention_mask):
        hidden = super().forward(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("number", range(len(CELLS)))
def test_ours_loads_in_peft(tiny_folder, tmp_path, number):
    cell = CELLS[number]
    classifier = trained(tiny_folder, cell)
    adapter.save(tmp_path / "adapter", classifier, cell, ["a", "b", "c"])
    ids, lengths = random_batch(90, [19, 8, 1, 30])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    with torch.inference_mode():
        states, logits = classifier.base(ids, lengths), classifier(ids, lengths)
        base = transformers.AutoModel.from_pretrained(tiny_folder)
        plain = base(ids, attention_mask=mask).last_hidden_state
        bare = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        hidden = bare(input_ids=ids, attention_mask=mask).last_hidden_state
        judge = peft.PeftModel.from_pretrained(Judge.from_pretrained(tiny_folder), tmp_path / "adapter").eval()
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
    theirs = peft.get_peft_model(Judge.from_pretrained(tiny_folder), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    base = model.load(tiny_folder)
    weights = adapter.load(tmp_path / "adapter", base)
    ours = head.Classifier(base, "mean", 3).eval()
    ours.set_head(**weights)
    assert [layer.slot.rank for name, layer in lora.named_layers(base) if name.endswith("q")] == [3, 2, 3]
    assert {layer.slot.alpha for name, layer in lora.named_layers(base) if name.endswith("q")} == {9.0}
    ids, lengths = random_batch(90, [19, 8, 1, 30])
    with torch.inference_mode():
        wanted = theirs(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long())
        torch.testing.assert_close(ours(ids, lengths), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cell", [*CELLS, Cell(method="full"), Cell(method="head", pooling="mean+last")])
def test_restore_is_the_inverse_of_save(tiny_folder, tmp_path, cell):
    from minilora import training

    classifier = head.Classifier(model.load(tiny_folder), cell.pooling, 3, seed=9)
    if cell.method == "lora":
        classifier = trained(tiny_folder, cell)
    training.trained_parameters(classifier, cell)
    if cell.method == "full":
        with torch.no_grad():
            for parameter in classifier.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    adapter.save(tmp_path / "adapter", classifier, cell, ["a", "b", "c"])
    fresh = head.Classifier(model.load(tiny_folder), cell.pooling, 3, seed=10)
    adapter.restore(tmp_path / "adapter", fresh, cell.method)
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
        adapter.load(folder, base)
    assert "\n" not in str(caught.value) and not lora.named_layers(base)
    return str(caught.value)


def test_what_does_not_fit_is_refused(tiny_folder, tmp_path):
    folder = tmp_path / "adapter"
    assert "adapter_config.json" in refusal(folder, tiny_folder)
    cell = CELLS[1]
    adapter.save(folder, trained(tiny_folder, cell), cell, ["a", "b", "c"])
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.encoder.layer.1.attention.self.query.lora_A.weight"
    assert name in tensors
    cases = 0
    for change, words in [
        (dict(use_dora=True), "use_dora"),
        (dict(peft_type="LOHA"), "LOHA"),
        (dict(bias="all"), "bias"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(rank_pattern={}), "rank 2"),
        (dict(rank_pattern={"(": 2}), "patterns"),
        (dict(alpha_pattern=[3]), "patterns"),
        (dict(alpha_pattern={}, lora_alpha=None), "None"),
        (dict(init_lora_weights="pissa"), "pissa"),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        message = refusal(folder, tiny_folder)
        assert words in message, message
        cases += 1
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for changed, words in [
        (tensors | {name: torch.zeros(2, 23)}, "[2, 23]"),
        (tensors | {name.replace("layer.1", "layer.7"): torch.zeros(2, 24)}, "layer.7"),
        ({n: t for n, t in tensors.items() if n != name}, "query"),
        ({n: t for n, t in tensors.items() if "lora" not in n}, "LoRA factor"),
    ]:
        save_file(changed, folder / "adapter_model.safetensors")
        message = refusal(folder, tiny_folder)
        assert words in message, message
        cases += 1
    (folder / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0truncated")
    assert "adapter_model.safetensors" in refusal(folder, tiny_folder)
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal(folder, tiny_folder)
    assert cases == 13
