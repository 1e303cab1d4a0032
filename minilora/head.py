"""From hidden states to labels: masked pooling and a linear classifier, with its three policies.

`trained` learns with the rest, `frozen` stays at its random start, `ridge` is fitted in closed form on the base's
features and then frozen. The published experiments left the head at its random start; here that is a choice.

Letters: B rows, T tokens, D width, P pooled features, C classes.
"""

import math

import torch
from torch import nn

from .lora import generator

POOLED = {"mean+last": 2, "mean": 1, "last": 1, "first": 1}  # P / D
RIDGE_PENALTY = 1e-2  # of the features' mean variance


def pool(hidden, lengths, pooling):
    """`hidden` [B, T, D] and `lengths` [B] -> float32 [B, P]. Padding has no part in it.

    mean: over the row's tokens; last, first: that token's state; mean+last: both, one after the other.
    """
    hidden = hidden.float()
    last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    if pooling == "last":
        return last
    if pooling == "first":
        return hidden[:, 0]
    real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # [B, T]
    mean = hidden.masked_fill(~real[..., None], 0).sum(1) / lengths[:, None]
    return mean if pooling == "mean" else torch.cat([mean, last], dim=1)


class Classifier(nn.Module):
    """A base with pooling and a linear head: `ids` [B, T], `lengths` [B] -> logits float32 [B, C].

    With `answers`, the rows' labels [B], the result is the loss instead: cross-entropy, summed over the rows.
    """

    def __init__(self, base, pooling, classes, seed=0):
        super().__init__()
        self.base = base
        self.pooling = pooling
        features = POOLED[pooling] * base.spec.width
        self.classifier = nn.Linear(features, classes)
        with torch.no_grad():  # drawn on the CPU, so that every device starts from the same head
            bound = 1 / math.sqrt(features)
            self.classifier.weight.uniform_(-bound, bound, generator=generator(seed, "head"))
            self.classifier.bias.zero_()
        self.classifier.to(base.embed.tokens.weight.device)

    @torch.no_grad()
    def set_head(self, weight, bias):
        """Replace the head's weight [C, P] and bias [C]."""
        self.classifier.weight.copy_(weight)
        self.classifier.bias.copy_(bias)

    @property
    def device(self):
        return self.classifier.weight.device

    def features(self, ids, lengths):
        """The pooled features, float32 [B, P]."""
        return pool(self.base(ids, lengths), lengths, self.pooling)

    def forward(self, ids, lengths, answers=None):
        logits = self.classifier(self.features(ids, lengths))
        return logits if answers is None else nn.functional.cross_entropy(logits, answers, reduction="sum")

    def weigh(self, answers):
        """How many terms the loss of these rows is a sum of."""
        return len(answers)


def ridge(features, labels, classes, penalty=RIDGE_PENALTY):
    """Weight [C, P] and bias [C] of the ridge regression of +-1 targets (a class against the rest) on features [N, P].

    Centred features X, targets Y:  W = ((X^T X + N l I)^-1 X^T Y)^T with l = `penalty` x mean variance, in float64
    (Hoerl and Kennard 1970, equation 2.1); the bias is not penalised.
    """
    features = features.double()
    targets = 2.0 * nn.functional.one_hot(labels, classes).double() - 1.0
    mean, target_mean = features.mean(0), targets.mean(0)
    X, Y = features - mean, targets - target_mean
    gram = X.T @ X
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, X.T @ Y).T
    return weight.float(), (target_mean - weight @ mean).float()
