"""The stacked forward: one projection, or one head, of K members in one product each."""

import torch
from torch import nn
from torch.nn import functional as F

from minilora.data.batches import IGNORED
from minilora.kernels.dropout import dropout, least_kept
from minilora.kernels.lora_groups import lora_groups
from minilora.tasks.classification import Classifier, pool


class Stack(nn.Module):
    """One projection of a population: the frozen map, and beside it the adapters of K members, some without one.

    `A0` [K_0, R, in] and `B0` [K_0, out, R] are those of the first group, R its largest rank, and so on, or None where
    no member of a group has one (see `layout.py`). They are given anew in each step, A with the scale in it.
    `keys` int32 [K], see `layer.use_keys`.
    """

    def __init__(self, layers, As, Bs, groups, keys):
        super().__init__()
        there = [layer for layer in layers if layer is not None]
        self.linear, self.salt = there[0].linear, there[0].salt
        self.counts = [group.count for group in groups]
        for number, pair in enumerate(zip(As, Bs, strict=True)):
            for name, factor in zip("AB", pair, strict=True):
                whole = None if factor is None else nn.Parameter(factor, requires_grad=False)
                self.register_parameter(f"{name}{number}", whole)
        self.keys = keys
        shares = [0.0 if layer is None else layer.dropout for layer in layers]
        self.dropout = torch.tensor(shares, device=keys.device)
        self.least = keys.new_tensor([least_kept(share) for share in shares])
        self.dropping = any(layer.dropout for layer in there)

    @property
    def drops(self):
        return self.training and self.dropping

    def projection(self):
        """(W, b, the A of each group, the B of each group)."""
        As, Bs = ([getattr(self, f"{name}{number}") for number in range(len(self.counts))] for name in "AB")
        return self.linear.weight, self.linear.bias, As, Bs

    def forward(self, x):
        seen = dropout(x, self.dropout, self.keys, self.salt, self.least) if self.drops else None
        [y] = lora_groups(x, [self.projection()], self.counts, seen)
        return y

    @staticmethod
    def joint(x, linears):
        """The outputs of `linears`, some of them adapted, for one x [..., in]; in one product where nothing drops."""
        stacks = [linear for linear in linears if isinstance(linear, Stack)]
        if any(stack.drops for stack in stacks):
            return [linear(x) for linear in linears]
        none = [None] * len(stacks[0].counts)
        return lora_groups(x, [
            linear.projection() if isinstance(linear, Stack) else (linear.weight, linear.bias, none, none)
            for linear in linears
        ], stacks[0].counts)  # fmt: skip


class Heads(nn.Module):
    """The heads of K members in one product; members with fewer classes than another never predict the rest."""

    def __init__(self, models, flat):
        super().__init__()
        self.pooling, self.count = models[0].pooling, len(models)
        classes = [model.classifier.out_features for model in models]
        for name in ("weight", "bias"):
            if f"classifier.{name}" in flat.groups[0].places:
                whole = torch.cat(flat.whole(flat.values.data, f"classifier.{name}"))
            else:
                parts = [getattr(model.classifier, name).detach() for model in models]
                whole = torch.nn.utils.rnn.pad_sequence(parts, True)
            setattr(self, name, nn.Parameter(whole, requires_grad=False))
        places = torch.arange(max(classes), device=self.weight.device)
        self.absent = (places >= self.weight.new_tensor(classes)[:, None])[:, None]  # [K, 1, C]

    def forward(self, hidden, lengths, answers):
        pooled = pool(hidden, lengths, self.pooling).unflatten(0, (self.count, -1))  # [K, B, P]
        logits = torch.baddbmm(self.bias[:, None], pooled, self.weight.mT).masked_fill(self.absent, -torch.inf)
        if answers is None:
            return logits
        losses = F.cross_entropy(logits.flatten(0, 1), answers, reduction="none", ignore_index=IGNORED)
        return losses.view(self.count, -1).sum(1)


class Together(nn.Module):
    """K task models on one base, in one pass: see `population.Population`, which puts what is trained into it."""

    def __init__(self, models, flat, prefix):
        super().__init__()
        self.base, self.models, self.prefix = models[0].base, list(models), prefix
        self.head = Heads(models, flat) if isinstance(models[0], Classifier) else None

    def forward(self, ids, lengths, answers, alike):
        count = len(self.models)
        if alike:
            rows = len(ids) // count
            hidden = self.base(ids[:rows], lengths[:rows], count, self.prefix)
        else:
            hidden = self.base(ids, lengths, members=count)
        if self.head is not None:
            return self.head(hidden, lengths, answers)
        return self.models[0].losses(hidden, ids, answers, count)
