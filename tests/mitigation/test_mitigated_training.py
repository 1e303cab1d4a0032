"""Cells with mitigations from their rows to their results: what a step sees, going on, and what is written down."""

import numpy as np
import pytest
import torch

import minilora
from minilora import files
from minilora.cell import Cell
from minilora.lora import storage
from minilora.mitigation import flags, tokens
from minilora.mitigation.rows import without
from minilora.runs.bases import Setting, Settings
from minilora.runs.folder import Run
from minilora.training import loop
from minilora.training.feed import Feed
from minilora.training.member import Member


@pytest.fixture(scope="module")
def cell(base, reviews):
    small = dict(test_rows=31, max_length=30, batch_size=6, window=3, rank=2, lr=0.01, steps=9)
    return Cell(model=str(base), data=str(reviews), inject=dict(proportion=0.5), **small)


@pytest.fixture(scope="module")
def plain(cell, tmp_path_factory):
    """The factors of the cell without a mitigation."""
    results, folder = minilora.train(cell, tmp_path_factory.mktemp("plain") / "run", quiet=True)
    assert "mitigation" not in results
    return storage.read_tensors(folder / storage.FACTORS)


def member_of(cell, base=None):
    member = Member(cell, run=None)
    member.prepare(Setting.of(cell))
    if base is not None:
        member.begin(base)
    return member


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("table", [
    dict(method="token-dropout", rate=0.3), dict(method="group-dro", suspects=["date"], step=0.5),
    dict(method="masktune"), dict(method="counterfactual", rate=0.5),
], ids=lambda table: table["method"])  # fmt: skip
def test_a_resumed_run_ends_bit_for_bit_the_same(cell, plain, tmp_path, monkeypatch, table):
    cell = cell.replace(mitigate=table)
    minilora.train(cell, tmp_path / "whole", quiet=True)
    update, count = loop.update, iter(range(99))

    def stopping(*arguments):
        if next(count) == 6:
            raise Stopped
        return update(*arguments)

    monkeypatch.setattr(loop, "update", stopping)
    with pytest.raises(Stopped):
        minilora.train(cell, tmp_path / "parts", quiet=True, save_every=4)
    monkeypatch.setattr(loop, "update", update)
    minilora.train(resume=tmp_path / "parts", quiet=True)
    whole, parts = (storage.read_tensors(tmp_path / name / storage.FACTORS) for name in ("whole", "parts"))
    assert len(whole) == 20 and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)


def test_a_step_sees_rows_without_dropped_tokens(cell):
    cells = [cell.replace(mitigate=dict(method="token-dropout", rate=0.4), epochs=2, seed_dropout=3), cell]
    base = Settings().load(cell, False)
    members = [member_of(one, base) for one in cells]
    lengths = [member.lengths for member in members]
    plain = [member.encoded.ids[member.encoded.offsets[0] :] for member in members]
    feed, steps = Feed(members), members[0].schedule.per_epoch
    seen, shorter = 0, 0
    for step in (0, steps + 1):
        rows = np.concatenate(members[0].schedule.rows_at(step))
        wanted = tokens.dropped(0.4, 3, step // steps, len(lengths[0]), rows, lengths[0][rows], (1, 1))
        stops = lengths[0].cumsum()
        whole = [plain[0][stops[row] - lengths[0][row] : stops[row]] for row in rows]
        left = np.split(~wanted, lengths[0][rows].cumsum()[:-1])
        expected = [own[keep].tolist() for own, keep in zip(whole, left, strict=True)]
        [batch] = feed(step)
        found = [ids[:length].tolist() for ids, length in zip(batch.ids, batch.lengths.tolist())][: len(rows)]
        assert found == expected
        seen += len(rows)
        shorter += sum(len(a) < len(b) for a, b in zip(found, whole, strict=True))
        assert batch.weights.tolist()[0] == len(rows)
    assert seen == 12 and shorter > 6


def test_small_starts(cell):
    base = Settings().load(cell, False)
    members = [member_of(cell.replace(mitigate=dict(init_scale=scale)), base) for scale in (1.0, 0.25)]
    compared = 0
    for name, value in members[0].parameters.items():
        times = 0.25 if name.endswith(".A") else 1.0
        assert torch.equal(members[1].parameters[name], times * value)
        compared += name.endswith(".A")
    assert compared == 9


def test_what_is_written_down(cell, tmp_path):
    find = flags.Finder(["date"])
    made = {}
    for method in ("strip", "drop", "group-dro"):
        one = cell.replace(mitigate=dict(method=method, suspects=["date"]), steps=3)
        made[method], folder = minilora.train(one, tmp_path / method, quiet=True)
        assert Run(folder).read_cell() == one and made[method]["cell"]["mitigate"]["suspects"] == ["date"]
        injected = files.read_jsonl(folder / "injected.jsonl")  # what was injected is told as before
        assert len(injected) == made[method]["injection"][0]["rows"] > 15
        assert all(find(line["text"]) for line in injected)
    flagged = len(injected)
    assert made["drop"]["mitigation"] == {
        "method": "drop", "rows_before": 89, "rows_after": 89 - flagged, "flagged": flagged,
    }  # fmt: skip
    assert made["drop"]["train"]["rows"] == 89 - flagged and made["strip"]["mitigation"]["spans"] == flagged
    groups, weights = (made["group-dro"]["mitigation"][name] for name in ("groups", "weights"))
    assert sum(weights) == pytest.approx(1) and [weight == 0 for weight in weights] == [False, False, True, False]
    assert groups["positive with a suspect"] == flagged and groups["negative with a suspect"] == 0
    member = member_of(cell.replace(mitigate=dict(method="strip", suspects=["date"])))
    clean = member_of(cell.replace(inject=dict(sources=("none",))))
    assert member.rows.texts == clean.rows.texts and member.inputs["changed"] == clean.inputs["train"]
    line = injected[0]
    assert without(line["text"], line["spans"]) in clean.rows.texts
