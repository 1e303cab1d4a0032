"""A population: K members trained in one pass through one frozen base, each with the result it would have by itself.

The rows of all members go through the base one member after the other, as one batch; each projection that any member
adapts is one product with the frozen weight and thin ones for each group of like rank (`kernels/lora_groups.py`,
`layout.py`). Members may differ in all that
they train with (fields marked `free`): ranks, targets, data, rates, seeds. Padding is exact: zeros in the factors stay
zeros, rows that pad a batch are not predicted, and dropout does not see either. A population of one has no stacks and
no such rows: it is the plain model.
"""

import contextlib

import torch
from torch import nn
from torch.func import functional_call

from minilora.cell import Cell
from minilora.fields import declared, marked, value_of
from minilora.lora.layer import detach, put, replace_module, use_keys
from minilora.training.stacked import Stack, Together


def shared(cell):
    """A key that cells share exactly when they can be trained together; a cell that never can has one of its own."""
    plain = cell.method == "lora" and cell.variant == "lora" and cell.init in ("kaiming", "gaussian", "orthogonal")
    if not plain or cell.optimizer != "adamw" or cell.form == "merged" or cell.mitigate.method == "group-dro":
        return object()
    return tuple(value_of(cell, name) for name in declared(Cell) if name not in marked(Cell, "free"))


def strip(base):
    """Take off all that populations put on the base, whichever they were."""
    for name, module in list(base.named_modules()):
        if isinstance(module, Stack):
            replace_module(base, name, module.linear)
    detach(base)


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
        self.stacks = {}
        if len(models) > 1:
            for name in dict.fromkeys(name for own in layers for name in own):
                factors = (flat.whole(flat.values.data, f"base.{name}.{factor}") for factor in "AB")
                self.stacks[name] = Stack([own.get(name) for own in layers], *factors, flat.groups, self.keys)
            self.scales = [group.scales(layers[group.members]) for group in flat.groups]
        self.prefix = min((int(name.split(".")[1]) for own in layers for name in own), default=0)
        self.model = self.models[0] if len(models) == 1 else Together(models, flat, self.prefix)
        self._put()

    def _put(self):
        if self.stacks:
            put(self.base, self.stacks)
        else:
            put(self.base, self.layers[0])
            use_keys(self.base, self.keys)

    @contextlib.contextmanager
    def only(self, k):
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
        strip(self.base)

    @property
    def device(self):
        return self.keys.device

    def forward(self, ids, lengths, answers, alike=False):
        """`alike`: the members' rows are the same, so that layers below all adapters are gone through once.

        Without `answers`, of members with heads: their logits [K, B, C].
        """
        if len(self.models) == 1:
            [views] = self.flat.views()
            views = {name: view.squeeze(0) for name, view in views.items()}
            return functional_call(self.model, views, (ids, lengths, answers))[None]
        views, heads = {}, {}
        for number, own in enumerate(self.flat.views(self.scales)):
            for name, view in own.items():
                if name.startswith("classifier."):
                    heads.setdefault(name.replace("classifier.", "head."), []).append(view)
                else:
                    views[f"{name}{number}"] = view
        views |= {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in heads.items()}
        return functional_call(self.model, views, (ids, lengths, answers, alike))
