"""Runs that begin with an adapter, adapters at another strength and on top of each other, and merged runs."""

import json
import os
import shutil

import pytest
import torch
import transformers
from conftest import random_batch, tiny_bert

import minilora
from minilora import files
from minilora.base import model
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.lora import peft_config, storage
from minilora.scripts import evaluate, train
from minilora.tasks.classification import Classifier


@pytest.fixture(scope="module")
def runs(tmp_path_factory, reviews):
    """(folder with the base `tiny` and the finished runs `one` and `two`, their cell)."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_bert(folder / "tiny")
    cell = Cell(model=str(folder / "tiny"), data=str(reviews), test_rows=31, max_length=30, batch_size=6, window=3,
                rank=2, lr=0.02, steps=12)  # fmt: skip
    minilora.train(cell, folder / "one", merge_to=folder / "merged")
    minilora.train(cell.replace(seed=1, targets=("q", "down")), folder / "two")
    return folder, cell


def logits(predictions):
    return torch.tensor([row["clean"]["logits"] for row in predictions])


def test_a_run_that_merges(runs):
    folder, _ = runs
    ids, lengths = random_batch(90, [19, 8, 1, 30])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    classifier = Classifier(model.load(folder / "tiny"), "mean", 2).eval()
    storage.restore(folder / "one", classifier, "lora")
    with torch.inference_mode():
        theirs = transformers.AutoModel.from_pretrained(folder / "merged")(ids, attention_mask=mask.long())
        torch.testing.assert_close(
            classifier.base(ids, lengths)[mask], theirs.last_hidden_state[mask], rtol=0, atol=2e-5
        )
    assert {"vocab.txt", "merge.json", "head.json", "classifier.safetensors"} < set(os.listdir(folder / "merged"))


def test_strength(runs, tmp_path, capsys):
    folder, _ = runs
    _, whole = evaluate.evaluate(folder / "one")
    _, none = evaluate.evaluate(folder / "one", scale=0.0)
    _, half = evaluate.evaluate(folder / "one", scale=0.5)
    _, same = evaluate.evaluate(folder / "one", scale=0.75, added=[(folder / "one", -0.25)])
    assert (logits(whole) - logits(none)).abs().max() > 0.05
    torch.testing.assert_close(logits(same), logits(half), rtol=0, atol=1e-5)
    _, sum_ = evaluate.evaluate(folder / "one", added=[(folder / "two", 0.7)], merge_to=tmp_path / "sum")

    # The sum, merged, is the base that evaluate.py computed with.
    classifier = Classifier(model.load(tmp_path / "sum"), "mean", 2).eval()
    classifier.set_head(**storage.read(folder / "one", model.load(folder / "tiny")).head)
    cell = Cell(model=str(tmp_path / "sum"), method="full")
    storage.save(tmp_path / "full", classifier.requires_grad_(True), cell, ["negative", "positive"])
    shutil.copytree(folder / "one", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "adapter")
    shutil.move(tmp_path / "full", tmp_path / "copy" / "adapter")
    text = (tmp_path / "copy" / "cell.toml").read_text()
    owned = ("rank", "alpha", "scaling", "dropout", "targets", "layers", "variant", "init", "lr_ratio", "form")
    lines = [line for line in text.splitlines() if not line.startswith(tuple(f"{name} =" for name in owned))]
    text = "\n".join(lines).replace('method = "lora"', 'method = "full"')
    (tmp_path / "copy" / "cell.toml").write_text(text)
    _, merged = evaluate.evaluate(tmp_path / "copy")
    torch.testing.assert_close(logits(merged), logits(sum_), rtol=0, atol=2e-5)

    out = tmp_path / "out"
    evaluate.main([str(folder / "one"), "--scale", "0.75", "--add", f"{folder}/one:-0.25", "--out", str(out)])
    assert "predictions the same" not in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["scale"] == 0.75 and results["added"] == [[f"{folder}/one", -0.25]]
    found = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    torch.testing.assert_close(logits(found), logits(half), rtol=0, atol=1e-5)


def test_added_is_parsed():
    parse = evaluate.parse_added
    assert parse("runs/x") == ("runs/x", 1.0) and parse("x:-0.5") == ("x", -0.5) and parse("a:b:2e-1") == ("a:b", 0.2)
    assert parse("a:b") == ("a:b", 1.0) and parse("0.5") == ("0.5", 1.0)
    with pytest.raises(InputError, match="--add x:nan: the weight must be a finite number"):
        parse("x:nan")


def test_refused(runs, tmp_path, reviews):
    folder, cell = runs
    tiny_bert(tmp_path / "other", seed=8)
    minilora.train(cell.replace(model=str(tmp_path / "other"), steps=1), tmp_path / "foreign")
    minilora.train(cell.replace(method="head", steps=1), tmp_path / "head")
    os.mkdir(tmp_path / "there")
    shutil.copytree(folder / "one", tmp_path / "changed")
    path = tmp_path / "changed" / "adapter" / peft_config.TENSORS
    tensors = storage.read_tensors(path)
    tensors["base_model.model.encoder.layer.0.attention.self.query.lora_B.weight"][3, 1] = float("nan")
    files.write_tensors(path, tensors)
    cases = [
        (evaluate, [folder / "one", "--add", tmp_path / "foreign"], "foreign: it was trained on another base than"),
        (evaluate, [folder / "one", "--add", tmp_path / "head"], "head holds no LoRA adapter"),
        (evaluate, [folder / "one", "--add", tmp_path / "nowhere"], "nowhere holds no LoRA adapter"),
        (evaluate, [folder / "one", "--scale", "inf"], "--scale is inf"),
        (evaluate, [folder / "one", "--scale", "1e38"], "one, 1e+38 times: it changes the weight of layers.0.q by"),
        (evaluate, [folder / "one", "--add", f"{folder}/two:1e300"], "two, 1e+300 times: it changes the weight of"),
        (evaluate, [tmp_path / "changed"], "is not what the run wrote: to use it as it is now, name"),
        (evaluate, [tmp_path / "changed", "--merge-to", tmp_path / "new"], "is not what the run wrote"),
        (evaluate, [folder / "one", "--add", tmp_path / "changed/adapter"], "B of layers.0.q has NaN or infinity"),
        (train, ["--start", tmp_path / "changed/adapter", "--rank", 2, "--model", folder / "tiny", "--data", reviews,
                 "--test-rows", 31, "--max-length", 30], "B of layers.0.q has NaN or infinity"),
        (evaluate, [folder / "one", "--merge-to", tmp_path / "there"], "there exists: choose another --merge-to"),
        (evaluate, [tmp_path / "head", "--merge-to", tmp_path / "new"], "there is nothing to merge"),
        (evaluate, [tmp_path / "head", "--scale", "0.5"], "method = 'head' trained no adapter"),
        (train, ["--merge-to", tmp_path / "there"], "there exists: choose another --merge-to"),
        (train, ["--resume", folder / "one", "--merge-to", tmp_path / "new"], "evaluate.py"),
        (train, ["--init", "pissa", "--start", "x"], "init and start are both given: drop one of them"),
        (train, ["--method", "full", "--start", "x"], "start belongs to method = 'lora'"),
        (train, ["--start", tmp_path / "there", "--model", folder / "tiny", "--data", reviews, "--test-rows", 31,
                 "--max-length", 30], "there holds no LoRA adapter"),
    ]  # fmt: skip
    for script, arguments, words in cases:
        with pytest.raises(InputError) as caught:
            script.main([str(argument) for argument in arguments])
        assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert len(cases) == 18 and not (tmp_path / "new").exists()


def test_a_run_begins_where_another_ended(runs, tmp_path, monkeypatch):
    folder, cell = runs
    shutil.copytree(folder / "one", tmp_path / "start")
    again = cell.replace(start=str(tmp_path / "start"), seed=4, lr=1e-9, steps=10)
    results, run = minilora.train(again, tmp_path / "whole")
    before, after = (storage.read(f, model.load(folder / "tiny")) for f in (folder / "one", run))
    assert before.slots == after.slots
    for name, part in before.parts.items():
        torch.testing.assert_close(after.parts[name].B, part.B, rtol=0, atol=1e-6)
    assert results["inputs"]["start"] == storage.fingerprint(folder / "one")
    assert json.loads((run / "results.json").read_text())["inputs"] == results["inputs"]

    # Interrupted, and the adapter that it began with is another one when it goes on.
    from minilora.training import loop

    true_update, calls = loop.update, []

    def update(*arguments):
        calls.append(arguments)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return true_update(*arguments)

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(KeyboardInterrupt):
        minilora.train(again, tmp_path / "part", save_every=3)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "start")
    shutil.copytree(folder / "one", tmp_path / "start")
    minilora.train(cell.replace(seed=9), tmp_path / "third")
    shutil.rmtree(tmp_path / "start")
    shutil.copytree(tmp_path / "third", tmp_path / "start")
    with pytest.raises(InputError, match="the adapter in .*start changed since the run began: bring the old"):
        minilora.train(resume=tmp_path / "part")
    shutil.rmtree(tmp_path / "start")
    shutil.copytree(folder / "one", tmp_path / "start")
    minilora.train(resume=tmp_path / "part")
    for name in (storage.FACTORS, f"adapter/{peft_config.TENSORS}", f"adapter/{peft_config.CONFIG}"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
