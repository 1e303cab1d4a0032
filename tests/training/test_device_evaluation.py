"""Evaluation on a GPU, watched without one (see `test_device.py`): whole test sets, batches and all."""

from types import SimpleNamespace

import numpy as np
import pytest
import test_device
import torch
from conftest import tiny_bert
from test_device import META, Watch, on_meta

from minilora.base import tokenizer
from minilora.cell import Cell
from minilora.tasks.find import find_task
from minilora.training import scoring
from minilora.training.scoring import scored

TEXTS = ["the film was good and warm", "a dull plot", "the story was slow and long"] * 7


@pytest.fixture
def folder(tmp_path):
    tiny_bert(tmp_path)
    return tmp_path


def members_of(folder, K):
    """(K members with tests of 21 texts each, their population), on the device."""
    cells = [Cell(model=str(folder), rank=2 * k + 2, batch_size=2) for k in range(K)]
    population, _ = on_meta(folder, cells)
    words = tokenizer.load(folder)
    members = []
    for k, cell in enumerate(cells):
        task = find_task(cell, population.base.spec, words)
        texts = [f"{text} {'good ' * (row // 3 + k)}" for row, text in enumerate(TEXTS)]
        read = task.read_tests([SimpleNamespace(rows=SimpleNamespace(texts=texts))])
        setting = SimpleNamespace(tokenizer=words, device=META)
        members.append((k, SimpleNamespace(task=task, read=read, cell=cell, setting=setting)))
    return members, population


@pytest.mark.parametrize("K", [1, 3])
def test_a_whole_test_set_is_read_from_the_device_once(folder, K):
    with Watch(0):
        members, population = members_of(folder, K)
    batches = []
    with Watch(0) as watch:
        found = list(scored(members, population, lambda rows, tokens: batches.append((rows, tokens))))
    kinds = {kind: sum(n for (one, *_), n in watch.found.items() if one == kind) for kind, *_ in watch.found}
    assert kinds.pop("to host") == 1 and set(kinds) <= {"to device", "host"}  # whatever K is
    assert len(batches) > 3 and sum(rows for rows, _ in batches) == K * len(TEXTS)
    assert [scores.shape for _, _, scores, _ in found] == [(len(TEXTS), 2)] * K


def test_together_they_predict_what_each_does_by_itself(folder, monkeypatch):
    monkeypatch.setattr(test_device, "META", torch.device("cpu"))
    members, population = members_of(folder, 3)
    draw = torch.Generator().manual_seed(3)
    for parameter in (p for own in population.flat.members for p in own.values()):
        parameter.data.normal_(0, 0.3, generator=draw)
    alone = [scores for *_, scores, _ in scored(members, population)]
    monkeypatch.setattr(scoring, "stacked", lambda population: True)
    some = [members[0], members[2]]  # one that diverged is left out
    for left, wanted in ((members, alone), (some, [alone[0], alone[2]])):
        found = [scores for *_, scores, _ in scored(left, population)]
        for scores, own in zip(found, wanted, strict=True):
            np.testing.assert_allclose(scores, own, rtol=0, atol=2e-5)
    assert not np.allclose(alone[0], alone[1], atol=1e-3) and not np.allclose(alone[1], alone[2], atol=1e-3)
