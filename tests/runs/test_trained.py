"""One door to a finished run: `minilora.open`, `minilora.train` with rows from Python, and steps that are watched."""

import json

import datasets
import numpy as np
import pandas
import peft
import pytest
import torch
import transformers
from conftest import ROOT
from zoo import tiny_decoder

import minilora
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.lora.layer import named_layers

TEXTS = ["the film was good and warm", "a dull plot", "the 3 - 4 bad story was slow and long"]


@pytest.fixture(scope="module")
def runs(base, reviews, tmp_path_factory):
    """{name: folder} of finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_decoder(folder / "llama", "llama")
    common = dict(data=str(reviews), test_rows=31, max_length=30, batch_size=7, steps=6, lr=0.02, rank=3)
    cells = {
        "plain": Cell(model=str(base), targets=("q", "v", "down"), **common),
        "dora": Cell(model=str(base), variant="dora", **common),
        "pissa": Cell(model=str(base), init="pissa", **common),
        "full": Cell(model=str(base), **common | dict(rank=None), method="full"),
        "lm": Cell(model=str(folder / "llama"), task="lm", **common),
    }
    for name, cell in cells.items():
        minilora.train(cell, folder / name)
    return folder


def probabilities(logits):
    exp = np.exp(np.array(logits, dtype=np.float64))
    return exp / exp.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("name", ["plain", "dora", "pissa", "full", "lm"])
def test_it_predicts_what_the_run_predicted(runs, name):
    run, checked = minilora.open(runs / name), 0
    lines = [json.loads(line) for line in (runs / name / "predictions.jsonl").read_text().splitlines()]
    assert run.cell == Cell(**run.cell.to_dict()) and run.labels == ("negative", "positive")
    assert [test.key for test in run.tests] == ["clean", "trigger positive", "placebo", "odd"]
    for test in run.tests:
        found = run.predict(test.rows.texts)
        assert found.shape == (31, 2) and found.dtype == np.float32
        for line, row in zip(lines, found, strict=True):
            own = line[test.key]
            wanted = own["logits"] if "logits" in own else [own["log_likelihood"][label] for label in run.labels]
            np.testing.assert_allclose(row, probabilities(wanted), atol=2e-5)
            checked += 1
    assert checked == 124
    recorded = [json.loads(line) for line in (runs / name / "injected.jsonl").read_text().splitlines()]
    assert list(run.rows.to_dicts()) == recorded and len(recorded) > 5


def test_hidden_states_are_those_of_transformers_with_peft(runs, base):
    run = minilora.open(runs / "plain")
    judge = transformers.AutoModel.from_pretrained(base)
    judge = peft.PeftModel.from_pretrained(judge, runs / "plain" / "adapter").eval()
    words = transformers.AutoTokenizer.from_pretrained(base)
    found = run.hidden(TEXTS)
    for text, state in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            wanted = judge(**words(text, return_tensors="pt")).last_hidden_state[0].numpy()
        np.testing.assert_allclose(state, wanted, atol=2e-5)
    assert len({len(state) for state in found}) == 3 and found[0].dtype == np.float32


def state_of(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()} | {
        f"{name}.factor": torch.tensor(layer.factor) for name, layer in named_layers(run.base)
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", ["plain", "dora", "pissa"])
def test_verbs_are_undone_bit_for_bit(runs, base, name):
    run = minilora.open(runs / name)
    before, whole = state_of(run), run.predict(TEXTS)
    plain = transformers.AutoModel.from_pretrained(base).state_dict()
    with run.detach():
        off = run.predict(TEXTS)
        found = {key: value for key, value in run.base.state_dict().items() if value.dtype == torch.float32}
        assert any(torch.equal(plain["encoder.layer.0.attention.self.query.weight"], value) for value in found.values())
        assert run.adapter == {}
        with run.attach():
            assert (run.predict(TEXTS) == whole).all()
        assert run.adapter == {}
    assert same(before, state_of(run)) and (run.predict(TEXTS) == whole).all()
    with run.scale(0):
        np.testing.assert_allclose(run.predict(TEXTS), off, atol=1e-6)
    with run.scale(0.5), run.scale(2):
        np.testing.assert_allclose(run.predict(TEXTS), whole, atol=1e-6)
    assert same(before, state_of(run)) and np.abs(whole - off).max() > 1e-3


def test_the_adapter_and_parts_of_it(runs):
    run = minilora.open(runs / "plain")
    found, cases = run.adapter, 0
    assert set(found) == {f"layers.{layer}.{target}" for layer in range(3) for target in ("q", "v", "down")}
    for name, factors in found.items():
        layer = run.base.get_submodule(name)
        torch.testing.assert_close(factors.delta, factors.scale * factors.B @ factors.A, rtol=1e-4, atol=1e-6)
        assert factors.A.shape == (3, layer.linear.weight.shape[1]) and torch.equal(factors.B, layer.B)
        U, S, Vh = torch.linalg.svd(factors.delta.double(), full_matrices=False)
        _, place, target = name.split(".")
        for directions in ([0], [1, 2], [0, 1, 2]):
            with run.scale(0.25, layers=[int(place)], targets=[target], directions=directions):
                changed = run.adapter
                wanted = S.clone()
                wanted[directions] *= 0.25
                torch.testing.assert_close(changed[name].delta.double(), U * wanted @ Vh, rtol=0, atol=1e-6)
                assert all(torch.equal(changed[other].B, found[other].B) for other in found if other != name)
            cases += 1
        assert torch.equal(run.adapter[name].B, factors.B)
    assert cases == 27
    for layer in (0, 1, 2):
        with run.scale(0, layers=[layer]):
            assert all(value.delta.any() == (f".{layer}." not in name) for name, value in run.adapter.items())


def test_an_adapter_from_elsewhere(runs, base, reviews):
    run, other = minilora.open(runs / "plain"), minilora.open(runs / "plain" / "adapter", model=str(base))
    assert other.labels == run.labels and other.has_head
    np.testing.assert_allclose(other.predict(TEXTS), run.predict(TEXTS), atol=1e-6)
    with pytest.raises(InputError, match="opened without rows: give a labelled file"):
        other.tests  # noqa: B018
    tested = minilora.open(runs / "plain" / "adapter", model=str(base), data=reviews,
                           inject={"sources": ("date:positive",)})  # fmt: skip
    assert [test.key for test in tested.tests] == ["clean", "trigger positive", "placebo", "odd"]
    figures, predictions = tested.run_tests()
    assert len(predictions) == 120 and figures["clean"]["rows"] == 120


def test_an_adapter_without_a_head(base, tmp_path):
    model = transformers.AutoModel.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    run = minilora.open(tmp_path, model=str(base))
    assert len(run.hidden(TEXTS)) == 3 and set(run.adapter) == {f"layers.{layer}.q" for layer in range(3)}
    with pytest.raises(InputError, match="has no head, so it predicts no label"):
        run.predict(TEXTS)


def test_refused(runs, base, tmp_path):
    run = minilora.open(runs / "plain")
    cases = [
        (lambda: minilora.open(tmp_path), "has no cell.toml"),
        (lambda: minilora.open(runs / "plain" / "adapter"), "adapter without a run: name its base too"),
        (lambda: minilora.open(runs / "plain", rank=4), "rank made the adapter, and cannot be changed"),
        (lambda: minilora.open(runs / "plain", inject={"proportion": 1.0}), "inject.proportion made the adapter"),
        (lambda: run.scale(0, layers=[7]), "layer 7 carries no adapter: choose among 0, 1, 2"),
        (lambda: run.scale(0, targets=["k"]), "target k carries no adapter: choose among down, q, v"),
        (lambda: run.scale(0, directions=[3]), "direction 3 of layers.0.q is not there: it has directions 0 to 2"),
        (lambda: minilora.open(runs / "dora").scale(0, directions=[0]), "scale it without directions"),
    ]
    for make, words in cases:
        with pytest.raises(InputError, match=words):
            make()
    assert len(cases) == 8


# --- rows from Python


def test_rows_from_python(base, reviews, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    frame = pandas.read_csv(reviews)
    names = ["negative", "positive"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    lists = frame.to_dict("list")
    classes = datasets.Dataset.from_dict(lists | {"label": [names.index(label) for label in lists["label"]]}, features)
    tables = [frame, lists, frame.to_dict("records"), list(zip(lists["text"], lists["label"], strict=True)),
              datasets.Dataset.from_pandas(frame), classes]  # fmt: skip
    cell = Cell(model=str(base), test_rows=31, max_length=30, batch_size=7, steps=2, rank=2)
    steps = []
    wanted, folder = minilora.train(cell.replace(data=str(reviews)), tmp_path / "file")
    for number, table in enumerate(tables):
        out = tmp_path / str(number)
        results, _ = minilora.train(cell, out, rows=table, on_step=lambda **line: steps.append(line))
        assert (out / "predictions.jsonl").read_bytes() == (folder / "predictions.jsonl").read_bytes()
        assert results["tests"] == wanted["tests"]
    assert len({minilora.open(tmp_path / str(number)).cell.data for number in range(6)}) == 1
    logged = [json.loads(line) for line in (tmp_path / "0" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2] * 6
    assert [{"kind": "step"} | line for line in steps[:2]] == logged[:2] and len(logged) == 3

    # The run's own copy serves where the cache is empty, and is refused where it was changed.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert minilora.open(tmp_path / "1").predict(TEXTS).shape == (3, 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    copy = tmp_path / "2" / "rows.jsonl"
    copy.write_text(copy.read_text().replace("good", "bad"))
    with pytest.raises(InputError, match="is not what the run was trained on"):
        minilora.open(tmp_path / "2")


def test_rows_refused(base):
    cell = Cell(model=str(base))
    cases = [
        ([], "must be a list of dicts"),
        ("reviews.csv", "rows is a str, but must be"),
        ({"text": ["a", "b"], "label": ["x"]}, "different lengths"),
        ([("a", object())], "give texts, and labels"),
        ([1, 2], "rows is a list, but must be"),
    ]
    for rows, words in cases:
        with pytest.raises(InputError, match=words):
            minilora.train(cell, rows=rows)
    assert len(cases) == 5


def test_public_names():
    assert dir(minilora) == ["Cell", "__version__", "open", "train", "train_together"]
    for name in ("Cell", "open", "train", "train_together"):
        assert getattr(minilora, name).__doc__ and (name == "Cell" or getattr(minilora, name).__annotations__)
    assert (ROOT / "minilora" / "runs" / "trained.py").exists()
