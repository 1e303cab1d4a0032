"""Pooling against a loop over rows, the ridge head against its normal equations, the head's start."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from minilora.errors import InputError
from minilora.tasks.classification import POOLED, Classifier, pool, ridge

LENGTHS = torch.tensor([5, 1, 9, 4, 9, 2])


def hidden_states(dtype=torch.float32, padding=0.0, width=7):
    """[B, T, D] with `padding` behind each row's last token."""
    draw = torch.Generator().manual_seed(4)
    hidden = torch.randn(len(LENGTHS), 11, width, generator=draw, dtype=torch.float64) * 3 + 1
    for row, length in enumerate(LENGTHS):
        hidden[row, length:] = padding
    return hidden.to(dtype)


def pooled_by_row(hidden, pooling):
    rows = []
    for states, length in zip(hidden.double().numpy(), LENGTHS.tolist(), strict=True):
        states = states[:length]
        parts = {"mean": sum(states) / length, "last": states[-1], "first": states[0]}
        rows.append(np.concatenate([parts[name] for name in pooling.split("+")]))
    return torch.from_numpy(np.stack(rows))


def test_pooling_is_that_of_each_row_alone():
    cases = 0
    for pooling in POOLED:
        for dtype in (torch.float32, torch.bfloat16):  # the sum is float32's whatever the states are
            for padding in (0.0, 5.0, math.nan, math.inf, -math.inf):
                hidden = hidden_states(dtype, padding)
                found = pool(hidden, LENGTHS, pooling)
                assert found.dtype == torch.float32 and found.shape == (6, 7 * POOLED[pooling])
                torch.testing.assert_close(found.double(), pooled_by_row(hidden, pooling), rtol=1e-6, atol=1e-6)
                cases += 1
    assert cases == 4 * 2 * 5
    assert list(POOLED) == ["mean+last", "mean", "last", "first"]


def test_padded_pooling_takes_padding_for_text():
    hidden, everywhere = hidden_states(padding=5.0), torch.full((6,), 11)
    for pooling in ("mean+last", "mean", "last"):
        found = pool(hidden, LENGTHS, f"padded-{pooling}")
        torch.testing.assert_close(found, pool(hidden, everywhere, pooling), rtol=0, atol=0)
        assert not torch.equal(found, pool(hidden, LENGTHS, pooling))
    assert (pool(hidden, LENGTHS, "padded-last") == 5.0).all()  # no row fills its batch


def test_gradients_of_pooling_leave_padding_alone():
    for pooling in POOLED:
        hidden = hidden_states(padding=math.nan).requires_grad_()
        found = pool(hidden, LENGTHS, pooling)
        weights = torch.linspace(-1, 2, found.numel()).view_as(found)
        (found * weights).sum().backward()
        wanted = torch.zeros_like(hidden)
        for row, length in enumerate(LENGTHS.tolist()):
            parts = dict(zip(pooling.split("+"), weights[row].split(7), strict=True))
            for name, places in (("mean", slice(0, length)), ("last", length - 1), ("first", 0)):
                if name in parts:
                    wanted[row, places] += parts[name] / (length if name == "mean" else 1)
        torch.testing.assert_close(hidden.grad, wanted, rtol=1e-6, atol=1e-7)


class Base(nn.Module):
    """The least of bases: a token's hidden state is its embedding."""

    def __init__(self, width=6, dtype=torch.float32):
        super().__init__()
        self.spec = SimpleNamespace(width=width)
        self.embed = nn.Module()
        table = torch.randn(13, width, generator=torch.Generator().manual_seed(1))
        self.embed.tokens = nn.Embedding.from_pretrained(table.to(dtype), freeze=False)

    def forward(self, ids, lengths):
        return self.embed.tokens(ids)


def test_logits_are_the_head_of_the_pooled_states():
    ids = torch.arange(66).view(6, 11) % 13
    cases = 0
    for pooling in POOLED:
        for dtype in (torch.float32, torch.bfloat16):
            base = Base(7, dtype)
            model = Classifier(base, pooling, 3, seed=2)
            hidden = base(ids, LENGTHS).detach().clone()
            features = model.features(ids, LENGTHS)
            torch.testing.assert_close(features.double(), pooled_by_row(hidden, pooling), rtol=1e-6, atol=1e-6)
            model.set_head(torch.linspace(-2, 1, 3 * features.shape[1]).view(3, -1), torch.tensor([0.5, 0.0, -7.0]))
            logits = model(ids, LENGTHS)
            wanted = features.double() @ torch.linspace(-2, 1, 3 * features.shape[1]).double().view(3, -1).T
            wanted = wanted + torch.tensor([0.5, 0.0, -7.0]).double()
            torch.testing.assert_close(logits.double(), wanted, rtol=1e-5, atol=1e-5)
            assert logits.dtype == torch.float32 and logits.shape == (6, 3)
            logits.square().sum().backward()
            assert base.embed.tokens.weight.grad.abs().sum() > 0 and model.classifier.weight.grad.abs().sum() > 0
            cases += 1
    assert cases == 8


def test_the_start_depends_on_the_seed_alone():
    def start(seed, pooling="mean+last", dtype=torch.float32):
        model = Classifier(Base(50, dtype), pooling, 4, seed)
        return model.classifier.weight.detach(), model.classifier.bias.detach()

    weight, bias = start(3)
    assert weight.shape == (4, 100) and weight.dtype == bias.dtype == torch.float32 and not bias.any()
    bound = 1 / math.sqrt(100)  # uniform within +-1/sqrt(P)
    assert weight.abs().max() <= bound and weight.min() < -0.95 * bound and weight.max() > 0.95 * bound
    threads = torch.get_num_threads()
    same = []
    try:
        for count, noise in ((1, 0), (2, 1)):
            torch.set_num_threads(count)
            torch.manual_seed(noise)
            same += [start(3)[0], start(3, dtype=torch.bfloat16)[0]]
    finally:
        torch.set_num_threads(threads)
    assert len(same) == 4 and all(torch.equal(weight, other) for other in same)
    assert not torch.equal(start(4)[0], weight)


def test_set_head_writes_in_place():
    model = Classifier(Base(), "mean", 2)
    parameters = list(model.classifier.parameters())
    weight, bias = torch.arange(12.0).view(2, 6), torch.tensor([3.0, -4.0])
    model.set_head(weight, bias)
    assert all(old is new for old, new in zip(parameters, model.classifier.parameters(), strict=True))
    assert torch.equal(model.classifier.weight, weight) and torch.equal(model.classifier.bias, bias)
    weight.zero_()
    assert model.classifier.weight.sum() == 66  # a copy


# --- ridge


def problem(rows, width, classes, seed=0):
    draw = np.random.default_rng(seed)
    features = draw.normal(2, 3, (rows, width)) @ draw.normal(0, 1, (width, width)) + 10
    labels = draw.integers(0, classes, rows)
    labels[:classes] = range(classes)
    features[:, 0] += 4 * labels
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)


CASES = [(40, 5, 2, 1e-2), (40, 5, 3, 1.0), (6, 11, 2, 1e-2), (200, 17, 5, 1e-4), (30, 1, 2, 0.3)]


@pytest.mark.parametrize("rows, width, classes, penalty", CASES)
def test_ridge_solves_its_normal_equations(rows, width, classes, penalty):
    features, labels = problem(rows, width, classes)
    weight, bias = ridge(features, labels, classes, penalty)
    assert weight.dtype == bias.dtype == torch.float32 and weight.shape == (classes, width) and bias.shape == (classes,)

    # The same with the bias as a feature of ones that is not penalised.
    F = features.double().numpy()
    Z = np.hstack([F, np.ones((rows, 1))])
    Y = np.where(labels.numpy()[:, None] == np.arange(classes), 1.0, -1.0)
    variance = np.mean([np.mean((column - column.mean()) ** 2) for column in F.T])
    penalties = np.diag([rows * penalty * variance] * width + [0.0])
    wanted = np.linalg.solve(Z.T @ Z + penalties, Z.T @ Y).T
    np.testing.assert_allclose(weight.numpy(), wanted[:, :-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bias.numpy(), wanted[:, -1], rtol=1e-4, atol=1e-5)

    # The penalised loss is flat there, against how steep it is at no weights at all.
    def slope(W, b):
        W, b = W.double().requires_grad_(), b.double().requires_grad_()
        residual = features.double() @ W.T + b - torch.from_numpy(Y)
        (residual.square().sum() + rows * penalty * variance * W.square().sum()).backward()
        return max(W.grad.abs().max().item(), b.grad.abs().max().item())

    assert slope(weight, bias) < 1e-5 * slope(torch.zeros_like(weight), torch.zeros_like(bias))


def test_the_default_penalty():
    features, labels = problem(40, 5, 3)
    for found, wanted in zip(ridge(features, labels, 3), ridge(features, labels, 3, 1e-2), strict=True):
        assert torch.equal(found, wanted)


def test_ridge_does_not_depend_on_place_or_scale():
    """Features moved and scaled give the same scores: the bias and the penalty follow them."""
    features, labels = problem(60, 4, 3)
    scores = []
    for changed in (features, 8 * features - 32):
        weight, bias = ridge(changed, labels, 3)
        scores.append(changed @ weight.T + bias)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    assert (scores[0].argmax(1) == labels).float().mean() > 0.5


def test_ridge_of_features_that_say_nothing():
    features, labels = problem(40, 5, 2)
    same = features[:1].expand(40, 5)
    noise = 1 + 1e-7 * torch.rand(40, 5, generator=torch.Generator().manual_seed(1))
    for constant in (same, same * noise, torch.zeros(40, 5)):
        with pytest.raises(InputError, match="are the same for all training rows"):
            ridge(constant, labels, 2)
    for value in (math.nan, math.inf):
        with pytest.raises(InputError, match="are not finite"):
            ridge(features.index_fill(1, torch.tensor([3]), value), labels, 2)
    one = same.clone()
    one[:, 2] = labels  # one feature is enough
    weight, bias = ridge(one, labels, 2)
    assert torch.equal((one @ weight.T + bias).argmax(1), labels)


def test_ridge_of_a_class_without_rows():
    features, labels = problem(40, 5, 2)
    weight, bias = ridge(features, labels, 3)
    assert torch.equal(weight[2], torch.zeros(5)) and bias[2] == -1  # never called
    torch.testing.assert_close(weight[:2], ridge(features, labels, 2)[0])
