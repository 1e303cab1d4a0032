"""What is trained, as one flat block of numbers, and how it is saved and brought back."""

import json
import math
from itertools import accumulate

import torch
from torch import nn

from minilora import files
from minilora.errors import InputError
from minilora.fields import check_shape

ALIGNED = 64  # numbers: a part then begins where a GPU reads fastest
METERS = {"step": int, "seconds": (int, float), "tokens": int, "inputs": {str: str}, "choices": {str: str}}


class Flat:
    """What K members train, side by side: `values` [K, P], a row for each member, is the one parameter.

    `members` are K dicts {name: parameter}, which become views of `values`. A parameter that is smaller in one member
    than in another, or missing, is padded with zeros, and so is each part up to a multiple of `ALIGNED` numbers. A
    gradient has the shape of `values`: what the forward uses are the `views` that are made for it, so that a step
    changes no tensor that is a part of another one, which CUDA graphs cannot have.
    """

    def __init__(self, members):
        self.members, shapes = members, {}
        for parameters in members:
            for name, p in parameters.items():
                largest = zip(p.shape, shapes.get(name, p.shape), strict=True)
                shapes[name] = tuple(max(pair) for pair in largest)
        self.sizes = []  # of each part, and of the zeros behind it
        for shape in shapes.values():
            self.sizes += [math.prod(shape), -math.prod(shape) % ALIGNED]
        starts = [0, *accumulate(self.sizes)][::2]
        self.places = {name: (start, shape) for start, (name, shape) in zip(starts, shapes.items())}
        first = next(iter(members[0].values()))
        values = torch.zeros(len(members), sum(self.sizes), dtype=first.dtype, device=first.device)
        for k, parameters in enumerate(members):
            for name, parameter in parameters.items():
                parameter.data = self.part(values, k, name).copy_(parameter.data)
        self.values = nn.Parameter(values)

    def views(self):
        """{name: view of `values`}, through which gradients flow: of a single member its own shapes, else [K, ...]."""
        parts = self.values.split_with_sizes(self.sizes, 1)[::2]
        lead = () if len(self.members) == 1 else (len(self.members),)
        return {name: part.view(*lead, *shape) for part, (name, (_, shape)) in zip(parts, self.places.items())}

    def whole(self, tensor, name):
        """The columns of `tensor` [K, P] that belong to a parameter, as a view [K, ...]."""
        start, shape = self.places[name]
        return tensor[:, start : start + math.prod(shape)].view(len(tensor), *shape)

    def part(self, tensor, k, name):
        """The part of `tensor` [K, P] that belongs to a parameter of member k, as a view of the parameter's shape."""
        return self.whole(tensor, name)[k][tuple(map(slice, self.members[k][name].shape))]


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
