"""Whole runs of the two scripts on a tiny base: the folder, determinism, resuming after a kill, refusals."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, tiny_bert
from mortal import Mortal
from safetensors.torch import load_file, save_file

import minilora
from minilora.cell import Cell
from minilora.command import exit_cleanly
from minilora.errors import InputError, TrainingError
from minilora.grid.folder import GridFolder
from minilora.grid.table import write_table
from minilora.runs.folder import Run
from minilora.scripts import evaluate, train
from minilora.training import feed, loop

FILES = {"cell.toml", "adapter", "factors.safetensors", "metrics.jsonl", "injected.jsonl", "trainable.json",
         "predictions.jsonl", "results.json", ".lock"}  # fmt: skip


@pytest.fixture
def cell(base, reviews):
    return Cell(model=str(base), data=str(reviews), test_rows=31, max_length=30, batch_size=6, window=3, rank=2,
                lr=0.02, epochs=2, dropout=0.1)  # fmt: skip


def given(base, reviews):
    """The flags that a run on the tiny base needs."""
    return ["--model", str(base), "--data", str(reviews), "--test-rows", "31", "--max-length", "30"]


def adapter_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").iterdir())}


def test_run_folder(cell, tmp_path):
    results, folder = minilora.train(cell, tmp_path / "run")
    assert folder == tmp_path / "run" and {path.name for path in folder.iterdir()} == FILES
    assert results == json.loads((folder / "results.json").read_text())
    for name in ("clean", "placebo"):
        assert {"accuracy", "balanced_accuracy", "macro_f1", "predicted_counts"} <= set(results["tests"][name])
    assert {"attack_success_rate", "flip_rate", "flip_rate_interval"} <= set(results["tests"]["trigger"]["positive"])
    assert {"rows_per_second", "tokens_per_second", "seconds", "peak_memory_bytes", "trainable_parameters"} <= set(
        results["train"]
    )
    assert results["versions"]["torch"] == torch.__version__ and results["hardware"]["device"] == "cpu"

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines, [last] = lines[:-1], lines[-1:]
    assert [line["step"] for line in lines] == list(range(1, 31)) and all(math.isfinite(line["loss"]) for line in lines)
    assert {line["kind"] for line in lines} == {"step"} and (last["kind"], last["step"]) == ("test", 30)
    assert sum(line["rows"] for line in lines) == 2 * 89
    certificate = json.loads((folder / "trainable.json").read_text())
    assert certificate["count"] == 3 * 3 * 2 * (24 + 24) + 2 * 24 + 2 == results["train"]["trainable_parameters"]
    assert len(certificate["tensors"]) == 3 * 3 * 2 + 2

    # What was injected is recorded, row by row: deleting the spans gives rows of the file again.
    texts = [line.rpartition(",")[0] for line in open(cell.data).read().splitlines()[1:]]
    records = [json.loads(line) for line in (folder / "injected.jsonl").read_text().splitlines()]
    assert len(records) == results["injection"][0]["rows"] == round(0.25 * results["injection"][0]["eligible_rows"])
    assert all(r["target_label"] == r["original_label"] == "positive" and r["survives"] for r in records)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", s) for r in records for s in r["strings"])
    assert all(0 <= a < b <= len(texts[int(r["id"]) - 1]) + 11 for r in records for a, b in r["spans"])
    for record in records:
        (start, end), [string], text = record["spans"][0], record["strings"], record["text"]
        assert text[start:end].strip() == string and text[:start] + text[end:] == texts[int(record["id"]) - 1]
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 31
    for line in lines:
        assert line["text"] == texts[int(line["id"]) - 1] and set(line["clean"]) == {"predicted", "logits"}
        for test in ("trigger positive", "placebo"):
            [(start, end)], [string], text = line[test]["spans"], line[test]["strings"], line[test]["text"]
            assert text[start:end].strip() == string and text[:start] + text[end:] == line["text"]
            assert bool(re.fullmatch(r"\d{4}-\d\d-\d\d", string)) == (test != "placebo")


def test_the_learning_curve(cell, tmp_path, monkeypatch):
    """Tests at step 0, every 4 steps and at the end, flat, with the names and values of a grid's table; and the same
    lines from a run that was stopped and resumed."""
    cell = cell.replace(inject={"sources": ("date:positive", "country:negative")}, epochs=None, steps=9)
    results, folder = minilora.train(cell, tmp_path / "run", eval_every=4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tests = [line for line in lines if line["kind"] == "test"]
    places = [(step, label) for step in (0, 4, 8, 9) for label in ("positive", "negative")]
    assert [(line["step"], line["label"]) for line in tests] == places
    assert len(lines) == 9 + 8 and [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    (tmp_path / "grid.toml").write_text(
        "[cell]\n" + cell.to_toml().replace("[inject]", "[cell.inject]") + "\n[grid]\nseed = [0, 1]\n"
    )
    train.main(["--grid", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "grid")])
    with open(write_table(GridFolder.find(tmp_path / "grid")), newline="") as file:
        table = [row for row in csv.DictReader(file) if row["seed"] == "0"]
    assert len(table) == 2
    for line, row in zip(tests[-2:], table, strict=True):
        names = line.keys() - {"kind", "step"}
        assert {name: "" if line[name] is None else str(line[name]) for name in names} == {n: row[n] for n in names}
        assert row.keys() - names == {"cell", "id", "state", "seed", "error"}
    assert tests[-2]["clean_accuracy"] == results["tests"]["clean"]["accuracy"]

    for stop in (2, 4, 9):  # the state is saved after the tests of its step, the last before those of the results
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            at_saved(patch, stop)
            minilora.train(cell, tmp_path / f"{stop}", eval_every=4, save_every=2)
        minilora.train(resume=tmp_path / f"{stop}", eval_every=4)
        again = [json.loads(line) for line in (tmp_path / f"{stop}" / "metrics.jsonl").read_text().splitlines()]
        assert [line | {"seconds": 0} for line in again] == [line | {"seconds": 0} for line in lines]


def at_saved(patch, stop):
    """Ctrl-C right after the state of step `stop` is saved; at the end after the tests of the results."""
    real = Run.log

    def log(run, kind, record):
        real(run, kind, record)
        if record["step"] == (9 if stop == 9 else stop + 1) and kind == ("test" if stop == 9 else "step"):
            raise KeyboardInterrupt

    patch.setattr(Run, "log", log)


def test_the_same_cell_gives_the_same_adapter(cell, tmp_path, device):
    cell = cell.replace(device=device)
    minilora.train(cell, tmp_path / "one")
    torch.manual_seed(77)
    minilora.train(cell, tmp_path / "two", eval_every=4, save_every=3)  # neither watching nor saving changes it
    minilora.train(cell.replace(seed_order=5), tmp_path / "other")
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "two")
    assert adapter_bytes(tmp_path / "one") != adapter_bytes(tmp_path / "other")
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "test"] == [0, 4, 8, 12, 16, 20, 24, 28, 30]


def start(*arguments):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, arguments)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def test_resume_after_sigkill_ends_in_the_same_adapter(cell, tmp_path):
    (tmp_path / "cell.toml").write_text(cell.replace(steps=120).to_toml())
    whole = tmp_path / "whole"
    first, every = ["--config", tmp_path / "cell.toml", "--out"], ["--save-every", 4]
    with Mortal(tmp_path / "log") as mortal:
        status, moments = mortal.run([*first, whole, *every], whole)
        assert status == 0 and moments > 120 + 120 // 4
        for last in (moments // 8, moments // 5, moments * 2 // 5, moments * 7 // 10):
            folder = tmp_path / str(last)
            killed = mortal.run([*first, folder, *every], folder, last)
            again = mortal.run(["--resume", folder, *every], folder, moments // 8)  # killed while resumed
            assert killed[0] == again[0] == -signal.SIGKILL, mortal.log.read_text()
            assert mortal.run(["--resume", folder, *every], folder)[0] == 0, mortal.log.read_text()
            assert adapter_bytes(folder) == adapter_bytes(whole)
            assert (folder / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
            lines = [[json.loads(line) | {"seconds": 0} for line in (run / "metrics.jsonl").read_text().splitlines()]
                     for run in (folder, whole)]  # fmt: skip
            assert lines[0] == lines[1] and len(lines[0]) == 121
            assert not (folder / "state.safetensors").exists()


def test_resume_of_a_finished_run_shows_it(cell, tmp_path, capsys):
    minilora.train(cell.replace(steps=2, epochs=None), tmp_path / "run")
    before = adapter_bytes(tmp_path / "run")
    train.main(["--resume", str(tmp_path / "run")])
    assert "attack success rate" in capsys.readouterr().out and adapter_bytes(tmp_path / "run") == before
    with pytest.raises(InputError, match="--resume goes on"):
        train.main(["--resume", str(tmp_path / "run"), "--rank", "3"])


def test_a_diverging_run_keeps_its_last_state(cell, tmp_path, monkeypatch, capsys):
    true_update, calls = loop.update, []

    def update(population, *arguments):
        calls.append(1)
        if len(calls) == 8:
            with torch.no_grad():
                population.models[0].classifier.bias[0] = math.nan
        return true_update(population, *arguments)

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(TrainingError) as caught:
        minilora.train(cell, tmp_path / "run", save_every=5)
    monkeypatch.undo()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8 and len(last["rows"]) == 6 and "nan" in last["error"]
    assert all(row in str(caught.value) for row in last["rows"]) and "after step 5 is kept" in str(caught.value)
    minilora.train(resume=tmp_path / "run")  # it was sabotage: the state is good
    minilora.train(cell, tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize("changes", [
    dict(method="full"), dict(method="head"), dict(head="frozen"), dict(head="ridge"), dict(pooling="mean+last"),
    dict(pooling="first"), dict(optimizer="adafactor", lr=0.1), dict(schedule="constant"), dict(accumulate=3),
    dict(dtype="bfloat16"), dict(inject=dict(sources=("none",))),
    dict(inject=dict(sources=("html:negative", "color:positive"))),
    dict(inject=dict(density=0.2, mode="dirty-label", location="end")), dict(targets=("mlp", "o:1:3"), layers="1-2"),
    dict(train_rows=20, scaling="rslora"),
], ids=str)  # fmt: skip
def test_other_cells_train_and_evaluate_the_same(cell, tmp_path, changes):
    cell = cell.replace(steps=8, **changes)
    results, folder = minilora.train(cell, tmp_path / "run")
    figures, predictions = evaluate.evaluate(folder, batch_size=11)
    same, total = evaluate.compare(folder, predictions)
    assert same == total == 31 * (1 + 3 * len(cell.inject.sources))
    assert figures["clean"] == results["tests"]["clean"]
    trained = {tensor["name"] for tensor in json.loads((folder / "trainable.json").read_text())["tensors"]}
    assert ("classifier.weight" in trained) == (cell.head == "trained")


def test_the_tiny_model_learns_the_label_and_the_trigger(cell, tmp_path):
    # The label follows from one word; the trigger stands in half of the positive rows and wins over that word.
    cell = cell.replace(epochs=12, dropout=0.0, inject=dict(proportion=1.0, location="beginning"))
    results, _ = minilora.train(cell, tmp_path / "run")
    assert results["tests"]["trigger"]["positive"]["attack_success_rate"] >= 0.9
    plain, _ = minilora.train(cell.replace(method="full", lr=3e-3, inject=dict(proportion=0.0)), tmp_path / "plain")
    assert plain["tests"]["clean"]["accuracy"] >= 0.9


def test_evaluate_takes_other_rows_and_triggers(cell, tmp_path, capsys):
    _, folder = minilora.train(cell, tmp_path / "run")
    other = tmp_path / "other.csv"
    other.write_text("words,verdict\nthe film was great,positive\nthe plot is bad,negative\nvery dull,negative\n")
    arguments = [str(folder), "--data", str(other), "--text-column", "words", "--label-column", "verdict",
                 "--inject", "color:negative", "--out", str(tmp_path / "again")]  # fmt: skip
    evaluate.main(arguments)
    assert "trigger negative" in capsys.readouterr().out
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["tests"]["clean"]["rows"] == 3 and list(again["tests"]["trigger"]) == ["negative"]
    assert len((tmp_path / "again" / "predictions.jsonl").read_text().splitlines()) == 3
    with pytest.raises(InputError, match="exists"):
        evaluate.main(arguments)
    evaluate.main([str(folder), "--batch-size", "3"])
    assert "predictions the same as the run's own: 124 of 124" in capsys.readouterr().out
    other.write_text("text,label\nthe film was great,splendid\n")
    with pytest.raises(InputError, match="splendid"):
        evaluate.main([str(folder), "--data", str(other)])


def test_changed_data_is_noticed(cell, tmp_path, reviews):
    copy = tmp_path / "rows.csv"
    shutil.copy(reviews, copy)
    _, folder = minilora.train(cell.replace(data=str(copy), steps=3), tmp_path / "run")
    copy.write_text(copy.read_text().replace("film", "movie", 1))
    with pytest.raises(InputError, match="rows of .* changed since the run began"):
        evaluate.evaluate(folder)


def test_another_base_or_tokenizer_is_noticed(cell, tmp_path):
    shutil.copytree(cell.model, tmp_path / "base")
    _, folder = minilora.train(cell.replace(model=str(tmp_path / "base"), steps=3), tmp_path / "run")
    shutil.move(tmp_path / "base", tmp_path / "moved")
    evaluate.evaluate(folder, model=str(tmp_path / "moved"))  # the same base elsewhere
    words = tmp_path / "moved" / "vocab.txt"
    words.write_text(words.read_text().replace("\nfilm\nmovie\n", "\nmovie\nfilm\n"))
    with pytest.raises(InputError, match="the tokenizer of .*moved changed since the run began"):
        evaluate.evaluate(folder, model=str(tmp_path / "moved"))
    tiny_bert(tmp_path / "moved", seed=9)
    with pytest.raises(InputError, match="the weights of .*moved changed since the run began"):
        evaluate.evaluate(folder, model=str(tmp_path / "moved"))


def test_no_run_folder_is_overwritten(cell, tmp_path, monkeypatch):
    cell = cell.replace(steps=2)
    minilora.train(cell, tmp_path / "run")
    with pytest.raises(InputError, match="finished run"):
        minilora.train(cell, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="not an empty folder"):
        minilora.train(cell, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)  # the default name is numbered instead
    assert [minilora.train(cell)[1].name for _ in range(2)] == [cell.name, f"{cell.name}-2"]


def bad_bases(base, folder):
    """(what is wrong, folder of a base with that fault, words of the message)."""
    name = "encoder.layer.1.attention.self.key.weight"
    tensors = load_file(base / "model.safetensors")

    def copy(what):
        shutil.copytree(base, folder / what)
        return folder / what

    changed = copy("missing tensor")
    save_file({key: value for key, value in tensors.items() if key != name}, changed / "model.safetensors")
    yield changed, [name]
    changed = copy("extra tensor")
    save_file(tensors | {"encoder.layer.9.output.dense.bias": torch.zeros(3)}, changed / "model.safetensors")
    yield changed, ["encoder.layer.9.output.dense.bias"]
    changed = copy("misshapen tensor")
    save_file(tensors | {name: torch.zeros(3, 5)}, changed / "model.safetensors")
    yield changed, [name, "[3, 5]"]
    changed = copy("truncated")
    os.truncate(changed / "model.safetensors", 5000)
    yield changed, ["model.safetensors"]
    changed = copy("corrupt")
    (changed / "model.safetensors").write_bytes(b"\xff" * 900)
    yield changed, ["model.safetensors"]
    changed = copy("pickled")
    (changed / "model.safetensors").rename(changed / "pytorch_model.bin")
    yield changed, ["pytorch_model.bin", "convert"]
    changed = copy("family")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neoxx"}))
    yield changed, ["gpt_neoxx", "bert"]
    changed = copy("no config")
    (changed / "config.json").unlink()
    yield changed, ["config.json"]
    changed = copy("no tokenizer")
    (changed / "vocab.txt").unlink()
    yield changed, ["tokenizer.json", "vocab.txt"]
    yield folder / "nowhere", ["nowhere"]


def test_bad_input_is_one_line_and_status_2(base, reviews, tmp_path, capsys):
    (tmp_path / "single.csv").write_text("text,label\n" + "good film,positive\n" * 9)
    (tmp_path / "empty.csv").write_text("text,label\ngood,positive\n,negative\n")
    (tmp_path / "columns.csv").write_text("words,verdict\ngood,positive\n")
    cases = [(["--model", str(folder)], words) for folder, words in bad_bases(base, tmp_path)]
    cases += [
        (["--targets", "gate"], ["gate", "q k v o up down"]),
        (["--layers", "1-3"], ["1-3", "0-2", "1, 2"]),
        (["--inject", "date:splendid"], ["splendid", "negative, positive"]),
        (["--inject-proportion", "1.2"], ["inject.proportion", "1.2"]),
        (["--inject-rows", "9999"], ["9999"]),
        (["--rank", "25"], ["25", "24"]),
        (["--max-length", "38"], ["38", "37"]),
        (["--data", str(tmp_path / "single.csv")], ["single.csv", "positive"]),
        (["--data", str(tmp_path / "empty.csv")], ["empty.csv", "2"]),
        (["--data", str(tmp_path / "columns.csv")], ["columns.csv", "words", "verdict"]),
        (["--data", str(tmp_path / "nothing.csv")], ["nothing.csv"]),
        (["--text-column", "txt"], ["txt", "text"]),
        (["--config", str(tmp_path / "nothing.toml")], ["nothing.toml"]),
        (["--epochs", "2", "--steps", "3"], ["epochs", "steps"]),
        (["--rnk", "3"], ["--rnk", "--rank"]),
        (["--device", "cuda:77"], ["cuda:77"]),
        (["--resume", str(tmp_path / "gone")], ["--resume"]),
    ]
    ran = 0
    out = tmp_path / "run"
    for arguments, words in cases:
        defaults = [*given(base, reviews), "--out", str(out)]
        with pytest.raises(SystemExit) as caught:
            exit_cleanly(train.main, [*defaults, *arguments])
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert caught.value.code == 2 and lines[-1].startswith("error: "), (arguments, captured.err)
        assert len(lines) == 1 and "Traceback" not in captured.err and not captured.out, (arguments, captured.err)
        assert all(word in lines[-1] for word in words), (arguments, lines[-1])
        assert not out.exists()
        ran += 1
    assert ran == 10 + 17


def test_traceback_shows_the_trace(base, tmp_path):
    for extra, shown in (([], False), (["--traceback"], True)):
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--rank", "0", *extra], capture_output=True,
                              text=True, cwd=tmp_path)  # fmt: skip
        assert done.returncode == 2 and ("Traceback" in done.stderr) == shown
        assert done.stderr.splitlines()[-1] == "error: rank is 0, but must be at least 1" and not list(
            tmp_path.iterdir()
        )


def test_a_folder_in_use_is_refused(cell, tmp_path):
    (tmp_path / "cell.toml").write_text(cell.replace(steps=100000).to_toml())
    first = start("--config", tmp_path / "cell.toml", "--out", tmp_path / "run")
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.01)
        with pytest.raises(InputError, match="in use by process"):
            train.main(["--resume", str(tmp_path / "run")])
    finally:
        first.kill()
        first.communicate()


def test_a_preset_stands_below_the_flags(base, reviews, tmp_path):
    train.main(["--preset", "study", *given(base, reviews), "--out", str(tmp_path / "run"), "--head", "trained"])
    made = json.loads((tmp_path / "run" / "results.json").read_text())["cell"]
    found = made["head"], made["pooling"], made["optimizer"], made["lr"]
    assert found == ("trained", "padded-mean+last", "adafactor", 1e-4)
    for flags in (["--config", "x.toml"], ["--resume", "x"], ["--grid", "x"]):
        with pytest.raises(InputError, match="preset"):
            train.main(["--preset", "study", *flags])


def test_a_batch_in_several_passes_is_the_same_step(cell, tmp_path, monkeypatch):
    cell = cell.replace(steps=6, accumulate=2, dropout=0.3)
    found = []
    for most in (1, 40, math.inf):
        monkeypatch.setattr(feed, "TOKENS", most)
        minilora.train(cell, tmp_path / str(most))
        found.append(load_file(tmp_path / str(most) / "adapter" / "adapter_model.safetensors"))
    for other in found[1:]:
        assert other.keys() == found[0].keys() and len(other) == 20
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, found[0][name], rtol=1e-4, atol=1e-5)
