"""A population: K members trained in one pass through one frozen base, each as it would be trained alone.

The rows of all members go through the base one member after the other, as one batch; each projection that any member
adapts is one product with the frozen weight and K thin ones (`kernels/lora_linear.py`). Members may differ in all that
they train with (`FREE`): ranks, targets, data, rates, seeds. What they are padded to is exact: zeros in the factors
stay zeros, rows that fill up a batch are not predicted, and dropout does not see either. A population of one has no
stacks and no such rows: it is the plain model.
"""

import contextlib
from dataclasses import fields

import torch
from torch import nn
from torch.nn import functional as F

from minilora.data.batches import IGNORED
from minilora.kernels.dropout import dropout
from minilora.kernels.lora_linear import lora_linears
from minilora.lora.layer import detach, put, replace_module, use_keys
from minilora.tasks.classification import Classifier, pool

# Fields in which the members of one population may differ. The rest is what the one pass is made of.
FREE = {
    "data", "data_revision", "text_column", "label_column", "test_data", "test_rows", "train_rows", "rank", "alpha",
    "scaling", "dropout", "targets", "layers", "init", "lr_ratio", "inject", "epochs", "steps", "window", "lr",
    "schedule", "warmup", "weight_decay", "clip", "seed", "seed_init", "seed_head", "seed_order", "seed_inject",
    "seed_dropout", "seed_split",
}  # fmt: skip


def shared(cell):
    """What cells must have in common to be trained together; of a cell that is always trained alone, its id."""
    plain = cell.method == "lora" and cell.variant == "lora" and cell.init in ("kaiming", "gaussian", "orthogonal")
    if not plain or cell.optimizer != "adamw" or cell.form in ("concatenated", "merged"):
        return cell.id
    return tuple((f.name, getattr(cell, f.name)) for f in fields(cell) if f.name not in FREE)


class Stack(nn.Module):
    """In the place of a projection: it, and beside it the adapters of K members, of which some may have none.

    `A` [K, R, in] and `B` [K, out, R], R the largest rank; `scale` [K]; `keys` as in `lora.use_keys`, [K].
    """

    def __init__(self, layers, A, B, keys):
        super().__init__()
        there = [layer for layer in layers if layer is not None]
        self.linear, self.salt = there[0].linear, there[0].salt
        self.A, self.B, self.keys = A, B, keys
        self.scale = A.new_tensor([0.0 if layer is None else layer.slot.scale for layer in layers])
        self.dropout = A.new_tensor([0.0 if layer is None else layer.dropout for layer in layers])
        self.dropping = any(layer.dropout for layer in there)

    @property
    def drops(self):
        return self.training and self.dropping

    def projection(self):
        return self.linear.weight, self.linear.bias, self.A, self.B, self.scale

    def forward(self, x):
        seen = dropout(x, self.dropout, self.keys, self.salt) if self.drops else None
        [y] = lora_linears(x, [self.projection()], seen)
        return y

    @staticmethod
    def joint(x, linears):
        """As `lora.LoRALinear.joint`."""
        stacks = [linear for linear in linears if isinstance(linear, Stack)]
        if any(stack.drops for stack in stacks):
            return [linear(x) for linear in linears]
        return lora_linears(x, [
            linear.projection() if isinstance(linear, Stack) else (linear.weight, linear.bias, None, None, 1.0)
            for linear in linears
        ])  # fmt: skip


class Population(nn.Module):
    """K members on one base: `ids` [K B, T], `lengths` and `answers` [K B] -> the loss of each, summed, float32 [K].

    models  the members' task models, all around the one base
    layers  the members' adapters, {module: LoRALinear} each
    flat    `training.Flat` of what they train
    """

    def __init__(self, models, layers, flat):
        super().__init__()
        self.base = models[0].base
        self.models, self.layers, self.flat = list(models), list(layers), flat
        self.keys = torch.zeros(len(models), dtype=torch.int32, device=flat.values.device)
        self.stacks, self.head = {}, None
        if len(models) > 1:
            for name in dict.fromkeys(name for own in layers for name in own):
                factors = (flat.leaves[f"base.{name}.{factor}"] for factor in "AB")
                self.stacks[name] = Stack([own.get(name) for own in layers], *factors, self.keys)
            if isinstance(models[0], Classifier):
                self.head = Heads(models, flat)
        self.prefix = min((int(name.split(".")[1]) for own in layers for name in own), default=0)
        self._put()

    def _put(self):
        if self.stacks:
            put(self.base, self.stacks)
        else:
            put(self.base, self.layers[0])
            use_keys(self.base, self.keys)

    @contextlib.contextmanager
    def alone(self, k):
        """The task model of member k, with its adapter and no other on the base meanwhile.

        What was trained lies apart meanwhile: where it lies in memory changes the rounding of products, and that must
        not depend on who the other members are.
        """
        if not self.stacks:
            yield self.models[k]
            return
        for name, stack in self.stacks.items():
            replace_module(self.base, name, stack.linear)
        put(self.base, self.layers[k])
        places = {p: p.data for p in self.flat.members[k].values()}
        for p, data in places.items():
            p.data = data.clone(memory_format=torch.contiguous_format)
        try:
            yield self.models[k]
        finally:
            for p, data in places.items():
                p.data = data
            detach(self.base)
            self._put()

    def detach(self):
        """Take all adapters off the base."""
        for name, stack in self.stacks.items():
            replace_module(self.base, name, stack.linear)
        detach(self.base)

    def forward(self, ids, lengths, answers, alike=False):
        """`alike`: the members' rows are the same, so that layers below all adapters are gone through once."""
        if len(self.models) == 1:
            return self.models[0](ids, lengths, answers)[None]
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


class Heads(nn.Module):
    """The heads of K members in one product; members with fewer classes than another are never called the rest."""

    def __init__(self, models, flat):
        super().__init__()
        self.pooling, self.count = models[0].pooling, len(models)
        classes = [model.classifier.out_features for model in models]
        if "classifier.weight" in flat.leaves:
            self.weight, self.bias = (flat.leaves[f"classifier.{name}"] for name in ("weight", "bias"))
        else:
            self.weight, self.bias = (
                torch.nn.utils.rnn.pad_sequence([getattr(model.classifier, name).detach() for model in models], True)
                for name in ("weight", "bias")
            )
        places = torch.arange(max(classes), device=self.weight.device)
        self.absent = (places >= self.weight.new_tensor(classes)[:, None])[:, None]  # [K, 1, C]

    def forward(self, hidden, lengths, answers):
        pooled = pool(hidden, lengths, self.pooling).unflatten(0, (self.count, -1))  # [K, B, P]
        logits = torch.baddbmm(self.bias[:, None], pooled, self.weight.mT).masked_fill(self.absent, -torch.inf)
        losses = F.cross_entropy(logits.flatten(0, 1), answers, reduction="none", ignore_index=IGNORED)
        return losses.view(self.count, -1).sum(1)
