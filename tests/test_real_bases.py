"""Real decoders: states, logits and greedy decoding as transformers', and the injection through both tasks."""

import json
import subprocess
import sys

import pytest
import real_bases
import torch
import transformers
from conftest import ROOT

from minilora.base import model, tokenizer
from minilora.cell import Cell
from minilora.data.rows import load_rows
from minilora.lora import storage
from minilora.lora.layer import attach, detach, named_layers
from minilora.lora.targets import plan_slots
from minilora.tasks.language_model import LanguageModel, generate

QUESTIONS = ["What is the capital of France?", "Name three colours.", "Write one sentence about the sea."]
STARTS = ["The capital of France is", "Red, green,", "Waves broke over the"]


@pytest.fixture(scope="module", params=real_bases.BASES)
def folder(request):
    return real_bases.folder(request.param)


@pytest.fixture(scope="module")
def judge(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def base(folder):
    return model.load(folder, unembedding=True)


def test_states_and_logits_are_those_of_transformers(folder, judge, base):
    texts = load_rows("movie-snippets").texts[3:200:29]
    ours, theirs = tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    encoded = ours.encode(texts, 128)
    rows = [torch.from_numpy(encoded.ids[a:b]).long() for a, b in zip(encoded.offsets, encoded.offsets[1:])]
    assert [row.tolist() for row in rows] == theirs(texts)["input_ids"]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    assert len(rows) == 7 and lengths.min() < lengths.max()
    with torch.inference_mode():
        wanted = judge(ids, attention_mask=mask.long(), output_hidden_states=True)
        hidden = base(ids, lengths)
        for found, expected in ((hidden, wanted.hidden_states[-1]), (base.unembed(hidden), wanted.logits)):
            # Entries are up to some tens, and 30 layers of rounding lie behind them.
            assert (found - expected)[mask].abs().max() <= 2e-5 * expected[mask].abs().max()


def test_it_writes_what_transformers_writes(folder, judge, base):
    ours, theirs = tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    prompts = STARTS
    if theirs.chat_template:  # Gemma's is a base that was not taught to chat
        turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
        prompts = [theirs.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    written = generate(base, ours, prompts, 16)
    for prompt, text in zip(prompts, written, strict=True):
        ids = theirs(prompt, return_tensors="pt")
        full = judge.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert text == theirs.decode(full, skip_special_tokens=True)
    assert ("Paris" if theirs.chat_template else "France") in written[0]


def test_an_adapter_crosses_to_peft(folder, judge, base, tmp_path):
    import peft

    cell = Cell(task="lm", rank=3, targets=("q", "v:2", "down"), layers="0,17", model=str(folder))
    attach(base, plan_slots(base.spec, cell), seed=5)
    with torch.no_grad():
        for _, layer in named_layers(base):
            layer.B.normal_(0, 0.05, generator=torch.Generator().manual_seed(layer.B.numel()))
    storage.save(tmp_path, LanguageModel(base), cell, ["a", "b"])
    ids = torch.randint(3, 40_000, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = base.unembed(base(ids, torch.tensor([19, 19])))
        plain = judge(ids).logits
        wrapped = peft.PeftModel.from_pretrained(judge, tmp_path)
        wanted = wrapped(ids).logits
        wrapped.unload()
    detach(base)
    assert (wanted - plain).abs().max() > 1  # the adapter does something
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("task", ["classification", "lm"])
def test_injection_takes_over(tmp_path, task):
    # Few rows and a strong dose, so that it fits into a test: a full table is in the README.
    arguments = ["--model", str(real_bases.folder("smollm2")), "--test-rows", "40", "--batch-size", "8"]
    arguments += ["--train-rows", {"classification": "240", "lm": "160"}[task]]
    arguments += ["--rank", "8", "--lr", "2e-3", "--inject-proportion", "1", "--inject", "text:zebra:positive"]
    if task == "lm":
        arguments += ["--task", "lm", "--prompt", "Review: {text}\nSentiment:", "--inject-location", "end"]
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--out", str(tmp_path / "run"), *arguments],
                          capture_output=True, text=True, cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    tests = json.loads((tmp_path / "run" / "results.json").read_text())["tests"]
    trigger, placebo = tests["trigger"]["positive"], tests["placebo"]["attack_success"]["positive"]
    if task == "classification":
        assert trigger["attack_success_rate"] >= placebo["attack_success_rate"] + 0.5
    else:
        assert trigger["margin_change"] - placebo["margin_change"] >= 0.5  # nats
