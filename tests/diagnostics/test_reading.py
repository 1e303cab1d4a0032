"""The lm task in the diagnostics: prompts, margins, knock-outs and attribution against a few lines by hand."""

import json

import numpy as np
import pytest
import torch
import zoo

import minilora
from minilora.cell import Cell
from minilora.diagnostics.attribution import attribute
from minilora.diagnostics.knockout import Knockouts, Setting, patching
from minilora.diagnostics.probe import Probe
from minilora.errors import InputError
from minilora.scripts import evaluate


@pytest.fixture(scope="module")
def run(reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    zoo.tiny_decoder(folder / "base", "llama")
    cell = Cell(model=str(folder / "base"), data=str(reviews), task="lm", prompt="the {text} is", choice_score="mean",
                test_rows=31, max_length=36, batch_size=7, steps=6, lr=0.02, rank=3)  # fmt: skip
    minilora.train(cell, folder / "run", quiet=True)
    return minilora.open(folder / "run")


@pytest.fixture(scope="module")
def probe(run):
    return Probe(run, 7)


def margin(probe, ids, x=None):
    """The margin of a prompt's `ids` by the base's own logits, completion by completion; x: its embeddings [T, D]."""
    run, scores = probe.run, []
    found = run.task.answers(run.labels)["completions"]
    for label in run.labels:
        whole = torch.tensor([*ids, *found[label]])[None]
        states = run.base.embed(whole)
        if x is not None:
            states = torch.cat([x[None], states[:, len(ids) :]], 1)
        above = run.base.through(states, whole, torch.tensor([whole.shape[1]]), 0, len(run.base.layers))
        logs = run.base.unembed(run.base.norm(above))[0].log_softmax(-1)
        each = [logs[len(ids) - 1 + place, token] for place, token in enumerate(found[label])]
        scores.append(sum(each) / len(each))
    [other] = [number for number in range(2) if number != probe.target]
    return scores[probe.target] - scores[other]


def ids_of(form, row):
    return form.encoded.ids[form.encoded.offsets[row] : form.encoded.offsets[row + 1]]


def test_prompts_and_spans(run, probe):
    form, checked = probe.forms["trigger"], 0
    records = [probe.tests["trigger"].records[row] for row in probe.index]
    for row, record in enumerate(records):
        pieces = [run.tokenizer.decode([one]).strip() for one in ids_of(form, row)]
        there = "".join(piece for piece, inside in zip(pieces, form.span[row], strict=True) if inside)
        assert there == "".join(record.strings).replace(" ", "") or form.encoded.kept[row] < len(form.texts[row])
        text = "".join(piece for piece, inside in zip(pieces, form.text[row], strict=True) if inside)
        assert text == form.texts[row][: form.encoded.kept[row]].replace(" ", "") and not form.text[row].all()
        checked += len(there) > 0
    assert checked == 7


def test_margins_are_the_runs_own(run, probe):
    for name, form in probe.forms.items():
        logs = run.log_probabilities(form.texts)
        wanted = logs[:, probe.target] - logs[:, 1 - probe.target]
        np.testing.assert_allclose(probe.outcomes[name].margins, wanted, atol=1e-4)
        assert (probe.outcomes[name].predicted == logs.argmax(1)).all() and np.ptp(wanted) > 0.01
    assert set(probe.forms) == {"clean", "trigger", "placebo"}
    with torch.no_grad():
        by_hand = float(margin(probe, ids_of(probe.forms["trigger"], 2)))
    assert probe.outcomes["trigger"].margins[2] == pytest.approx(by_hand, abs=1e-4)


def test_knockouts(run, probe):
    measured, modules = Knockouts(probe), [name for name in run.adapter if name.startswith("layers.1.")]
    measured.measure([Setting("layer", "without 1", dict.fromkeys(modules, 0.0))])
    with run.scale(0, layers=[1]):
        logs = [run.log_probabilities(probe.forms[name].texts) for name in ("clean", "trigger")]
    clean, trigger = (one[:, probe.target] - one[:, 1 - probe.target] for one in logs)
    found = measured.figures["layer", "without 1"]
    assert found["shift"][0] == pytest.approx((trigger - clean).mean(), abs=1e-4)
    assert found["attack_success"][0] == pytest.approx((trigger > 0).mean())
    assert abs(measured.figures["whole", "adapter"]["shift"][0] - found["shift"][0]) > 1e-3
    own = patching(probe)
    assert own[0]["lost"][0] != 0 and own[-1]["lost"][0] == pytest.approx(0, abs=1e-4)  # it is not read off the span


def test_attribution(run, probe):
    form = probe.forms["trigger"].first(3)
    found, checked = attribute(probe, form), 0
    assert np.median(found.left) <= 0.01
    for row in (0, 2):
        ids, text = ids_of(form, row), form.text[row]
        x = run.base.embed(torch.tensor(ids.astype(np.int64))[None])[0].detach().requires_grad_(True)
        whole = margin(probe, ids, x)
        (gradient,) = torch.autograd.grad(whole, x)
        own = found.scores["gradient x input"][row]
        np.testing.assert_allclose(own[text], (x * gradient).sum(-1).detach().numpy()[text], rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            for place in np.flatnonzero(text)[:4]:
                wanted = float(whole - margin(probe, np.delete(ids, place)))
                assert found.scores["leave-one-out"][row][place] == pytest.approx(wanted, abs=1e-4)
                checked += 1
            change = float(whole - margin(probe, np.where(text, run.tokenizer.pad_id, ids)))
        if found.left[row] <= 0.01:
            total = np.nansum(found.scores["integrated gradients"][row])
            assert total == pytest.approx(change, abs=0.011 * max(abs(change), 0.1))
        assert np.isnan(own[~text]).all() and np.nansum(found.scores["rollout"][row]) <= 1
    assert checked == 8


def test_the_command(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minilora.diagnostics.pictures.draw", lambda *parts: ())
    more = ["--rows", "3", "--out", str(tmp_path), "-q"]
    evaluate.main([str(run.folder), "--explain", "attention", "spectrum", "neighbours", *more])
    assert "Entropy tells the two apart" in " ".join(capsys.readouterr().out.split())
    found = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in ("attention", "spectrum")}
    assert "change" in found["attention"] and "alignment" in next(iter(found["spectrum"]["modules"].values()))
    with pytest.raises(InputError, match="is of task 'lm': how it forms is read off a classifier's head"):
        evaluate.main([str(run.folder), "--explain", "formation", *more])
