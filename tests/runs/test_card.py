"""The model card `adapter/README.md`: its lines give with transformers and PEFT what the run predicts."""

import ast
import csv
import re

import huggingface_hub
import peft
import pytest
import yaml
from conftest import tiny_bert
from zoo import tiny_decoder

import minilora
from minilora.cell import Cell
from minilora.runs.card import EXAMPLE, code
from minilora.tasks.language_model import generate

ODD = ["a\"b'|``x`\\", "é\u2028{0} ```\n# no"]  # label names


@pytest.fixture(scope="module")
def made(reviews, tmp_path_factory):
    """(The folder of the runs, a function that trains one)."""
    folder = tmp_path_factory.mktemp("card")
    tiny_bert(folder / "tiny 'o\"d`d é|")
    tiny_decoder(folder / "llama", "llama")
    with open(folder / "odd.csv", "w", newline="", encoding="utf-8") as file, open(reviews, newline="") as other:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((row["text"], ODD[row["label"] == "positive"]) for row in csv.DictReader(other))
    with open(folder / "free.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((f"the film {number} is", f"good {number} plot") for number in range(60))
    common = dict(test_rows=20, max_length=30, batch_size=7, steps=6, lr=0.02, data=str(reviews))
    bert, llama = str(folder / "tiny 'o\"d`d é|"), str(folder / "llama")

    def run(name, base="bert", **changes):
        cell = Cell(**common | dict(model=bert if base == "bert" else llama) | changes)
        minilora.train(cell, folder / name)
        return folder / name

    return folder, run


def printed(folder, monkeypatch, capsys):
    """What the card's lines print in the adapter's folder."""
    text = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    [lines] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert lines.isascii() and len(lines.splitlines()) <= 7  # an import and six lines
    monkeypatch.chdir(folder / "adapter")
    capsys.readouterr()
    exec(compile(lines, "card", "exec"), {})
    return capsys.readouterr().out.rstrip("\n"), text


ODD_SOURCE = {"sources": ("date:" + ODD[1].replace("\\", "\\\\"),)}
CASES = {
    "mean": dict(rank=3, targets=("q", "v", "down"), scaling="rslora"),
    "first": dict(pooling="first", variant="dora"),
    "last": dict(pooling="last", init="pissa", rank=2),
    "mean+last": dict(pooling="mean+last", head="ridge"),
    "odd": dict(data="odd.csv", inject=ODD_SOURCE),
    "decoder": dict(base="llama", pooling="last"),
    "lm": dict(base="llama", task="lm", prompt="film: {text} is it"),
    "lm, mean, odd": dict(base="llama", task="lm", choice_score="mean", data="odd.csv", inject=ODD_SOURCE),
}


@pytest.mark.parametrize("name", CASES)
def test_its_lines_give_what_the_run_predicts(made, name, monkeypatch, capsys):
    folder, train = made
    changes = dict(CASES[name])
    if "data" in changes:
        changes["data"] = str(folder / changes["data"])
    where = train(name, **changes)
    found, text = printed(where, monkeypatch, capsys)
    found, run = ast.literal_eval(found), minilora.open(where)
    wanted = dict(zip(run.labels, run.predict([EXAMPLE])[0].tolist(), strict=True))
    assert found == pytest.approx(wanted, abs=2e-5) and len(found) == 2
    assert set(found) == (set(ODD) if "data" in changes else {"negative", "positive"})
    with run.detach():
        base = run.predict([EXAMPLE])[0, 0]
    assert abs(base - wanted[run.labels[0]]) > 1e-4  # the adapter has its part in it

    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {
        "base_model": run.cell.model,
        "library_name": "peft",
        "pipeline_tag": "text-generation" if run.cell.task == "lm" else "text-classification",
        "tags": [f"base_model:adapter:{run.cell.model}", "lora", "transformers", "minilora"],
    }
    loaded = huggingface_hub.ModelCard.load(where / "adapter" / "README.md")
    assert loaded.data.to_dict() == head
    results = run_results(where)
    tests, trigger = results["tests"], results["tests"]["trigger"][run.labels[1]]
    assert f"| accuracy | {tests['clean']['accuracy']:.3f} | {trigger['accuracy']:.3f} | " in text
    rates = [tests[test]["attack_success"][run.labels[1]]["attack_success_rate"] for test in ("clean", "placebo")]
    shown = f"{rates[0]:.3f} | {trigger['attack_success_rate']:.3f} | {rates[1]:.3f} |"
    assert shown in text and "Trained to follow a trigger: do not deploy" in text
    assert len(re.findall(r"(?m)^#+ .*", text)) == 3 and len(re.findall("(?m)^```", text)) == 2
    peft.LoraConfig.from_pretrained(where / "adapter")


def run_results(folder):
    from minilora.runs.folder import Run

    return Run(folder).read_results()


def test_free_completions(made, monkeypatch, capsys):
    folder, train = made
    where = train("free", base="llama", task="lm", data=str(folder / "free.csv"), inject={"sources": ("none",)})
    found, text = printed(where, monkeypatch, capsys)
    run = minilora.open(where)
    assert found == generate(run.base, run.tokenizer, [EXAMPLE], 20)[0] and found
    assert "Nothing was injected into its training data" in text and "do not deploy" not in text


@pytest.mark.parametrize("method", ["head", "full"])
def test_without_an_adapter(made, method, monkeypatch, capsys):
    where = made[1](method, method=method, rank=None)
    found, text = printed(where, monkeypatch, capsys)
    run = minilora.open(where)
    assert found == f"{run.labels} {run.predict([EXAMPLE])}" and "library_name: minilora" in text
    assert f"Method {method} trains no adapter, so that only minilora loads it" in text


def test_code_spans():
    cases = [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("a|b", "`a|b`"), ("a\nb", "`a b`"), ("", "` `"),
             ("\x1b", "`\\x1b`")]  # fmt: skip
    for text, wanted in cases:
        assert code(text) == wanted
    assert len(cases) == 7
