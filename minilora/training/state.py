"""What is trained, as one flat block of numbers, and how it is saved and brought back."""

import json

import torch
from torch import nn

from minilora import files
from minilora.errors import InputError
from minilora.fields import check_shape
from minilora.training.layout import LINE, groups_of

METERS = {"step": int, "seconds": (int, float), "tokens": int, "inputs": {str: str}, "choices": {str: str}}


class Flat:
    """What K members train, as one block of numbers: `values` [M, C] is the one parameter, each line of C numbers one
    member's; a single member is one line. Where each part is, and what is padded with zeros: `layout.py`.

    `members` are K dicts {name: parameter}, which become views of `values`. A gradient has the shape of `values`: what
    the forward uses are the `views` that are made for it, so that a step changes no tensor that is a part of another
    one, which CUDA graphs cannot have.
    """

    def __init__(self, members):
        self.members, self.groups = members, groups_of(members)
        line = LINE if len(members) > 1 else self.groups[0].width
        self.sizes = [group.count * group.width // line for group in self.groups]  # lines
        first = next(iter(members[0].values()))
        values = torch.zeros(sum(self.sizes), line, dtype=first.dtype, device=first.device)
        spans = torch.tensor([group.width // line for group in self.groups for _ in range(group.count)])
        self.owners = torch.arange(len(members)).repeat_interleave(spans).to(first.device)
        for k, parameters in enumerate(members):
            for name, parameter in parameters.items():
                parameter.data = self.part(values, k, name).copy_(parameter.data)
        self.values = nn.Parameter(values)

    def regions(self, tensor):
        """`tensor` [M, C] as each group has it: [K_g, width]."""
        parts = tensor.split_with_sizes(self.sizes) if len(self.sizes) > 1 else [tensor]
        return [part.view(group.count, group.width) for group, part in zip(self.groups, parts, strict=True)]

    def views(self, scales=None):
        """Of each group {name: view of `values` [K_g, ...]}, through which gradients flow, the A times `scales`
        (`Group.scales`, a tensor for each group) where these are given."""
        scales = [None] * len(self.groups) if scales is None else scales
        regions = self.regions(self.values)
        return [group.views(*own) for group, *own in zip(self.groups, regions, scales, strict=True)]

    def whole(self, tensor, name):
        """The parts of `tensor` [M, C] that belong to a parameter, as a view [K_g, ...] for each group; None where a
        group has none."""
        return [group.whole(region, name) if name in group.places else None
                for group, region in zip(self.groups, self.regions(tensor), strict=True)]  # fmt: skip

    def part(self, tensor, k, name):
        """The part of `tensor` [M, C] that belongs to a parameter of member k, as a view of the parameter's shape."""
        for group, region in zip(self.groups, self.regions(tensor), strict=True):
            if k < group.members.stop:
                own = group.whole(region, name)[k - group.members.start]
                return own[tuple(map(slice, self.members[k][name].shape))]

    def by_line(self, values):
        """`values` [K] of the members for each line, [M]."""
        return values if len(self.members) == 1 else values[self.owners]

    def norms(self, tensor):
        """The norm of each member's part of `tensor` [M, C], [K]."""
        norms = [region.norm(dim=1) for region in self.regions(tensor)]
        return norms[0] if len(norms) == 1 else torch.cat(norms)


def save_state(path, flat, optimizer, k, meters):
    """Everything that member k needs to go on, in one safetensors file, written atomically. `meters`: {name: number},
    with `step`, the steps done, among them.
    """
    tensors = {f"parameter/{name}": p.detach() for name, p in flat.members[k].items()}
    tensors |= {f"optimizer/{key}": value for key, value in optimizer.state(k).items()}
    files.write_tensors(path, tensors, {"meters": json.dumps(meters, allow_nan=False)})


def load_state(path, flat, optimizer, k):
    """Put a saved state back; returns the meters. Raises InputError if it cannot fit."""
    tensors, meters = read_state(path)
    state = {key.removeprefix("optimizer/"): value for key, value in tensors.items() if key.startswith("optimizer/")}
    try:
        with torch.no_grad():
            for name, parameter in flat.members[k].items():
                fill(parameter, tensors[f"parameter/{name}"])
            optimizer.load(k, state)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise misfit(path, error) from None
    return meters


def fill(tensor, value):
    """Copy, without spreading a value of another shape."""
    if tensor.shape != value.shape:
        raise ValueError(f"a shape is {list(value.shape)}, and not {list(tensor.shape)}")
    tensor.copy_(value)


def read_state(path):
    """(Tensors, meters) of a saved state. Raises InputError for a file that is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors, meters = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["meters"]
        meters = {"choices": {}} | files.parse_json(meters)  # an older version made none
        check_shape(meters, METERS, "meters")
        if meters["step"] < 1 or meters["seconds"] <= 0 or meters["tokens"] < 1:
            raise ValueError("its meters are not above 0")
        return tensors, meters
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise misfit(path, error) from None


def misfit(path, error):
    return InputError(f"{path} does not fit this run ({error}): delete it to train from the start")
