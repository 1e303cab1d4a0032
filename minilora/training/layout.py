"""Where a population's numbers are: members of about the same size side by side, so that little is padded.

A population with ranks 1, 2, 4, ..., 128 in equal parts has 4.0 times its own numbers if all are padded to the largest,
1.8 times in two groups and 1.3 in three. Each group costs 13 launches a layer in a step, which a small base on a GPU
feels and a CPU does not.
"""

import math
from itertools import groupby

import numpy as np
import torch

from minilora.data.batches import padded_sizes

ALIGNED = 64  # numbers: a part then begins where a GPU reads fastest
LINE = 1024  # numbers of a line, all of one member's
# By device, or elsewhere: the most groups, and how many numbers they have to save all together.
GROUPS, FEW = {"cpu": 8}, 2
WORTH, MUCH = {"cpu": 0}, 1 << 20


def size_of(parameters):
    """How many numbers the factors of {name: parameter} have, at least 1."""
    return max(1, sum(p.numel() for name, p in parameters.items() if factor(name)))


def groups_of(members):
    """The `Group`s of K dicts {name: parameter}: neighbours, so that few are padded much exactly when they come sorted
    by size."""
    first = next(iter(members[0].values()))
    kind, sizes = first.device.type, np.array([size_of(parameters) for parameters in members])
    classes = padded_sizes(sizes, GROUPS.get(kind, FEW))
    if saved(sizes, classes) < WORTH.get(kind, MUCH):
        classes = classes[-1:]
    classes = np.searchsorted(classes, sizes)
    common = largest(members)  # of what is not a factor, such as the heads, which one product takes together
    found, start = [], 0
    for _, own in groupby(classes.tolist()):
        stop = start + len(list(own))
        shapes = largest(members[start:stop])
        shapes = {name: shape if factor(name) else common[name] for name, shape in shapes.items()}
        found.append(Group(slice(start, stop), shapes, LINE if len(members) > 1 else ALIGNED))
        start = stop
    return found


def saved(sizes, classes):
    """How many numbers it saves to pad each of `sizes` to the next of `classes` instead of the last."""
    return int((classes[-1] - classes[np.searchsorted(classes, sizes)]).sum())


def largest(members):
    """{name: shape}, in each dimension the largest of the members' that have it."""
    shapes = {}
    for parameters in members:
        for name, p in parameters.items():
            shapes[name] = tuple(map(max, p.shape, shapes.get(name, p.shape)))
    return shapes


def factor(name):
    return name.endswith((".A", ".B"))


class Group:
    """The members `members` (a slice), which have one layout: each has `width` numbers, with room for `shapes`.

    `places` {name: (start, shape)}; the A of all modules come first. Each part begins at a multiple of `ALIGNED`.
    """

    def __init__(self, members, shapes, line):
        self.members, self.count = members, members.stop - members.start
        names = sorted(shapes, key=lambda name: not name.endswith(".A"))
        self.places, self.sizes, self.A_sizes, end = {}, [], [], 0
        for name in names:
            self.places[name] = end, shapes[name]
            size = math.prod(shapes[name])
            rest = -(end + size) % (line if name == names[-1] else ALIGNED)
            # An empty part has a gradient too, which takes a launch.
            (self.A_sizes if name.endswith(".A") else self.sizes).extend([size, rest] if rest else [size])
            end += size + rest
        self.width = end

    def whole(self, region, name):
        """The part `name` of `region` [K_g, width], as a view [K_g, ...]."""
        start, shape = self.places[name]
        return region[:, start : start + math.prod(shape)].view(self.count, *shape)

    def scales(self, layers):
        """What A is multiplied by, [K_g, n, 1], a number for each `ALIGNED` of its own, from {module: LoRALinear} of
        each member."""
        like = next(iter(layers[0].values())).A
        scales = torch.ones(self.count, sum(self.A_sizes) // ALIGNED, 1)
        for name, (start, shape) in self.places.items():
            if name.endswith(".A"):
                stop = start + math.prod(shape) + ALIGNED - 1
                for own, adapted in zip(scales, layers, strict=True):
                    layer = adapted.get(name.removeprefix("base.").removesuffix(".A"))
                    own[start // ALIGNED : stop // ALIGNED] = 1.0 if layer is None else layer.slot.scale
        return scales.to(like.device)

    def views(self, region, scales=None):
        """{name: view [K_g, ...] of `region` [K_g, width]}, the A times `scales` where these are given."""
        first = sum(self.A_sizes)
        if scales is None:
            parts = iter(region.split_with_sizes(self.A_sizes + self.sizes, 1))
        else:
            A, *rest = region.split_with_sizes([first, *self.sizes], 1)
            A = (A.unflatten(1, (-1, ALIGNED)) * scales).flatten(1)
            parts = iter([*A.split_with_sizes(self.A_sizes, 1), *rest])
        found, end = {}, 0
        for name, (start, shape) in self.places.items():
            if end < start:
                next(parts)  # zeros
            found[name] = next(parts).view(self.count, *shape)
            end = start + math.prod(shape)
        return found
