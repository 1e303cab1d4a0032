"""Token dropout, group DRO and MaskTune against values worked out by hand or in a few lines."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minilora.base import model as base_model
from minilora.base.tokenizer import Encoded
from minilora.data.batches import collate
from minilora.mitigation import masktune, robust, tokens
from minilora.mitigation.tune import tune
from minilora.tasks.classification import Classifier


def encode(rows):
    lengths = np.array([len(row) for row in rows])
    return Encoded(np.concatenate(rows).astype(np.int32), np.concatenate([[0], lengths.cumsum()]), 5 * lengths)


def test_tokens_are_left_out_and_the_rest_moves_up():
    encoded = encode([[2, 10, 11, 3], [2, 12, 3], [2, 13, 14, 15, 16, 3]])
    labels = torch.tensor([1, 0, 1])
    batch = collate([(encoded, np.array([0, 2]), labels), (encoded, np.array([1]), labels)], np.array([8]), pad_id=0)
    gone = np.array([0, 1, 0, 0, 0, 0, 1, 0, 1, 0], bool)
    left = tokens.without(batch, [gone, None], 0)
    assert left.ids.tolist() == [[2, 11, 3, 0, 0, 0, 0, 0], [2, 13, 15, 3, 0, 0, 0, 0],
                                 [2, 12, 3, 0, 0, 0, 0, 0], [0] * 8]  # fmt: skip
    assert left.lengths.tolist() == [3, 4, 3, 1] and torch.equal(left.answers, batch.answers) and not left.alike
    same = collate([(encoded, np.array([0]), labels)] * 2, np.array([4]), pad_id=0)
    assert same.alike and not tokens.without(same, [np.array([0, 1, 0, 0], bool), None], 0).alike


def test_what_is_dropped_follows_from_seed_epoch_and_row():
    lengths = np.random.default_rng(1).integers(3, 40, 300)
    rows = np.arange(300)

    def of(rows, seed=0, epoch=0, rate=0.2, after=1):
        return tokens.dropped(rate, seed, epoch, 300, rows, lengths[rows], (1, after))

    whole, ends = of(rows), lengths.cumsum()
    for part in (rows[::-1], rows[37:60], rows[[5]]):
        wanted = np.concatenate([whole[ends[row] - lengths[row] : ends[row]] for row in part])
        assert np.array_equal(of(part), wanted)
    free = np.concatenate([[False, *[True] * (length - 2), False] for length in lengths])
    assert not whole[~free].any() and abs(whole[free].mean() - 0.2) < 0.01
    assert not np.array_equal(whole, of(rows, epoch=1)) and not np.array_equal(whole, of(rows, seed=1))
    most = of(rows, rate=1.0)  # a token of each text stays
    assert [int((~most[end - length : end]).sum()) for length, end in zip(lengths, ends, strict=True)] == [3] * 300
    assert (of(rows, rate=0.1) <= whole).all() and not of(rows, rate=0.0).any()
    completions = np.minimum(lengths - 1, 2)  # of the lm task
    kept = of(rows, rate=0.9, after=completions)
    assert not any(kept[end - after : end].any() for after, end in zip(completions, ends, strict=True))


def test_group_dro_is_the_papers_algorithm():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 1.0]], requires_grad=True)
    answers = torch.tensor([0, 1, 1 + 2, 1 + 2])  # groups: neg, pos, pos with a suspect twice; neg with one is absent
    loss = robust.GroupDRO(torch.tensor([True, True, False, True]), step=0.5)
    nll = -logits.detach().log_softmax(1)
    means = np.array([nll[0, 0], nll[1, 1], 0.0, (nll[2, 1] + nll[3, 1]) / 2])
    q = np.array([1, 1, 0, 1]) / 3
    for _ in range(3):
        q = q * np.exp(0.5 * means)
        q = q / q.sum()
        found = loss(logits, answers)
        assert found.item() == pytest.approx(4 * (q @ means), rel=1e-6)
        np.testing.assert_allclose(loss.weights, q, rtol=1e-6)
    (gradient,) = torch.autograd.grad(loss(logits, answers), [logits])
    q = q * np.exp(0.5 * means) / (q * np.exp(0.5 * means)).sum()
    p = logits.detach().softmax(1)
    wanted = 4 * (p - torch.nn.functional.one_hot(answers % 2, 2)) * torch.tensor(q / [1, 1, 1, 2])[answers][:, None]
    torch.testing.assert_close(gradient, wanted.float(), rtol=1e-5, atol=1e-6)
    before = loss.weights.clone()
    loss.eval()(logits, answers)
    assert torch.equal(before, loss.weights)


def test_salient_tokens_are_far_above_the_others():
    # Above 0: 1, 1, 1, 1, 1, 1, 8: mean 2, deviation sqrt(6) = 2.449, so that only 8 is above 6.9.
    assert masktune.salient(np.array([1, 0, 1, 1, 8, 1, 1, 0, 1.0])).tolist() == [False] * 4 + [True] + [False] * 4
    assert not masktune.salient(np.array([1.0, 1, 8])).any() and not masktune.salient(np.zeros(4)).any()


@pytest.fixture(scope="module")
def classifier(base):
    torch.manual_seed(3)
    return Classifier(base_model.load(base), "mean", 3, seed=2)


def test_saliency_is_gradient_times_embedding(classifier):
    rows = [[2, 10, 11, 15, 3], [2, 12, 3], [2, 13, 14, 15, 16, 20, 3]]
    encoded, found = encode(rows), {}
    for index, scores in masktune.saliencies(classifier, encoded, 0, 2):
        found |= dict(zip(index.tolist(), scores, strict=True))
    assert sorted(found) == [0, 1, 2]
    for row, ids in enumerate(rows):
        states = classifier.base.embed(torch.tensor([ids])).detach().requires_grad_(True)
        hook = classifier.base.embed.register_forward_hook(lambda *_, states=states: states)
        logits = classifier(torch.tensor([ids]), torch.tensor([len(ids)]))
        hook.remove()
        (gradient,) = torch.autograd.grad(logits.max(), [states])
        wanted = (gradient * states).sum(-1)[0].clamp(min=0).detach().numpy()
        np.testing.assert_allclose(found[row][: len(ids)], wanted, rtol=1e-3, atol=1e-6)


def test_masked_tokens_leave_their_rows(classifier, monkeypatch):
    rows = [[2, 10, 11, 15, 3], [2, 12, 3], [2, 13, 14, 15, 16, 3]]
    scores = np.array([[9, 1, 0, 7, 1, 9, 0], [9, 0, 5, 0, 9, 0, 0]])  # special tokens are salient too, but stay
    monkeypatch.setattr(masktune, "saliencies", lambda *_: [(np.array([2, 0]), scores)])
    monkeypatch.setattr(masktune, "salient", lambda scores: scores > 2)
    words = SimpleNamespace(special=(1, 1), pad_id=0)
    found, hidden = masktune.mask(classifier, words, encode(rows), 8)
    parts = [found.ids[start:stop].tolist() for start, stop in zip(found.offsets, found.offsets[1:])]
    assert hidden == 2 and parts == [[2, 10, 15, 3], [2, 12, 3], [2, 13, 14, 16, 3]]
    shifted = replace(encode(rows), offsets=np.array([5, 5, 8, 8]))  # as a part of a population's ids
    own = masktune.at(shifted, np.array([1]))
    assert own.ids[own.offsets[0] : own.offsets[1]].tolist() == [2, 12, 3] and len(own.kept) == 1


def test_tuning_takes_adamws_steps(classifier):
    rows, labels = [[2, 10, 11, 15, 3], [2, 12, 3], [2, 13, 14, 15, 16, 3]], np.array([2, 0, 1])
    before = {name: value.clone() for name, value in classifier.classifier.state_dict().items()}
    encoded = encode(rows)
    loss = tune(classifier, encoded, labels, 0, lr=0.01, epochs=2, batch_size=2, seed=4, clip=0.5)
    found = {name: value.clone() for name, value in classifier.classifier.state_dict().items()}
    classifier.classifier.load_state_dict(before)
    optimizer = torch.optim.AdamW(classifier.classifier.parameters(), lr=0.01, weight_decay=0.0)
    for epoch in range(2):
        order, losses = np.random.default_rng([4, epoch]).permutation(3), []
        for batch in (order[:2], order[2:]):
            own = [rows[i] for i in sorted(batch)]
            logits = torch.cat([classifier(torch.tensor([row]), torch.tensor([len(row)])) for row in own])
            own = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[np.sort(batch)]))
            optimizer.zero_grad()
            own.backward()
            torch.nn.utils.clip_grad_norm_(classifier.classifier.parameters(), 0.5)
            optimizer.step()
            losses.append(own.item() * len(batch))
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-4)
    for name, value in classifier.classifier.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
        assert (found[name] - before[name]).abs().max() > 1e-3
