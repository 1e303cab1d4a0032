"""The stacked forward: one projection, or one head, of K members in one product each."""

import torch
from torch import nn
from torch.nn import functional as F

from minilora.data.batches import IGNORED
from minilora.kernels.dropout import dropout, least_kept
from minilora.kernels.lora_linear import lora_linear
from minilora.lora.layer import LoRALinear
from minilora.tasks.classification import Classifier, pool


class Stack(nn.Module):
    """One projection of a population: the frozen map, and beside it the adapters of K members, some without one.

    `A` [K, R, in] and `B` [K, out, R], R the largest rank; `scale` [K]; `keys` int32 [K], see `layer.use_keys`.
    """

    form = "side"  # the only one that is exact for stacked adapters
    joint = staticmethod(LoRALinear.joint)

    def __init__(self, layers, A, B, keys):
        super().__init__()
        there = [layer for layer in layers if layer is not None]
        self.linear, self.salt = there[0].linear, there[0].salt
        self.A, self.B = (nn.Parameter(factor, requires_grad=False) for factor in (A, B))
        self.keys = keys
        self.scale = A.new_tensor([0.0 if layer is None else layer.slot.scale for layer in layers])
        shares = [0.0 if layer is None else layer.dropout for layer in layers]
        self.dropout = A.new_tensor(shares)
        self.least = keys.new_tensor([least_kept(share) for share in shares])
        self.dropping = any(layer.dropout for layer in there)

    @property
    def drops(self):
        return self.training and self.dropping

    @property
    def joins(self):
        return not self.drops

    def projection(self):
        return self.linear.weight, self.linear.bias, self.A, self.B, self.scale

    def forward(self, x):
        seen = dropout(x, self.dropout, self.keys, self.salt, self.least) if self.drops else None
        return lora_linear(x, *self.projection(), seen)


class Heads(nn.Module):
    """The heads of K members in one product; members with fewer classes than another never predict the rest."""

    def __init__(self, models, flat):
        super().__init__()
        self.pooling, self.count = models[0].pooling, len(models)
        classes = [model.classifier.out_features for model in models]
        for name in ("weight", "bias"):
            if f"classifier.{name}" in flat.places:
                whole = flat.whole(flat.values.data, f"classifier.{name}")
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
        parts = (tensor.chunk(count) for tensor in (hidden, ids, lengths, answers))
        return torch.stack([model.loss(*part) for model, *part in zip(self.models, *parts, strict=True)])
