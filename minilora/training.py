"""The pieces of the training loop; the loop itself is in `train.py`. What it trains is a population of K members, often
one.

Nothing here keeps random state: the order of rows follows from (seed, epoch) and dropout from (seed, step), so that
a state on disk is tensors and a step number, and a resumed run ends in the same adapter, bit for bit.
"""

import json
import math
import warnings
from itertools import accumulate

import torch
from torch import nn

from . import batches, files, lora, parallel
from .errors import InputError
from .kernels.adamw import adamw


def pick_device(name):
    """The torch device of a cell's `device`; auto is CUDA where there is one, else the CPU; of several processes each
    has its own. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    number = parallel.pick_number(kind, number)
    name = f"{kind}:{number}" if number else kind
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(number or 0) >= there:
        instead = "use --device auto" if parallel.count() == 1 else "start no more processes than that"
        raise InputError(f"device {name} is not there (this machine has {there} of {kind}): {instead}")
    return torch.device(name)


def trained_parameters(model, cell):
    """Mark what the cell trains on `model` (a task's) and return it: {name: parameter}."""
    model.requires_grad_(cell.method == "full")
    for _, layer in lora.named_layers(model):
        for name in layer.variant.trains:
            getattr(layer, name).requires_grad_(True)
    if cell.head is not None:  # the lm task has none
        model.classifier.requires_grad_(cell.head == "trained")
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# A population's parameters and gradients are parts of rows of matrices: torch warns of it, and it makes no difference.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


class Flat:
    """What K members train, side by side: `values` and `grads` [K, P], a row for each member, of their dtype.

    `members` are K dicts {name: parameter}, which become views of `values`. A parameter that is smaller in one member
    than in another, or missing, is filled up with zeros. `leaves` {name: parameter} are what the forward uses and
    gradients gather in, as views of `grads`: of a single member the very parameters, else [K, ...].
    """

    def __init__(self, members):
        self.members, shapes = members, {}
        for parameters in members:
            for name, p in parameters.items():
                largest = zip(p.shape, shapes.get(name, p.shape), strict=True)
                shapes[name] = tuple(max(pair) for pair in largest)
        ends = [0, *accumulate(math.prod(shape) for shape in shapes.values())]
        self.places = {name: (start, shape) for start, (name, shape) in zip(ends, shapes.items())}
        first = next(iter(members[0].values()))
        self.values = torch.zeros(len(members), ends[-1], dtype=first.dtype, device=first.device)
        self.grads = torch.zeros_like(self.values)
        self.leaves = {}
        for name in shapes:
            for k, parameters in enumerate(members):
                if name in parameters:
                    part = self.part(self.values, k, name)
                    parameters[name].data = part.copy_(parameters[name].data)
            if len(members) == 1:
                self.leaves[name] = members[0][name]
                self.leaves[name].grad = self.part(self.grads, 0, name)
            else:
                self.leaves[name] = nn.Parameter(self.whole(self.values, name))
                self.leaves[name].grad = self.whole(self.grads, name)

    def whole(self, tensor, name):
        """The columns of `tensor` [K, P] that belong to a parameter, as a view [K, ...]."""
        start, shape = self.places[name]
        return tensor[:, start : start + math.prod(shape)].view(len(tensor), *shape)

    def part(self, tensor, k, name):
        """The part of `tensor` [K, P] that belongs to a parameter of member k, as a view of the parameter's shape."""
        return self.whole(tensor, name)[k][tuple(map(slice, self.members[k][name].shape))]


class AdamW:
    """`kernels/adamw.py` at torch's defaults, with the learning rate, decay and LoRA+ ratio of each member's cell.

    With the cell's `lr_ratio` the learning rate of every B is that many times the rest's: LoRA+, Hayou et al. 2024
    (arXiv 2402.12354). The rest is A, DoRA's magnitudes and the head (PEFT's `create_loraplus_optimizer` counts all
    vectors, biases too, among the B).
    """

    def __init__(self, flat, cells):
        self.flat = flat
        self.mean, self.square = torch.zeros_like(flat.values), torch.zeros_like(flat.values)
        self.steps = flat.values.new_zeros(len(cells))
        self.decays = flat.values.new_tensor([cell.weight_decay for cell in cells])
        self.ratios = None
        if any((cell.lr_ratio or 1.0) != 1.0 for cell in cells):
            self.ratios = torch.ones_like(flat.values)
            for k, cell in enumerate(cells):
                for name in flat.members[k]:
                    if name.endswith(".B"):
                        flat.part(self.ratios, k, name).fill_(cell.lr_ratio or 1.0)

    @property
    def tensors(self):
        """What a step changes in place."""
        return [self.flat.values, self.flat.grads, self.mean, self.square, self.steps]

    def step(self, rates, going):
        """One step of the members that are `going` (bool [K]), at these learning rates [K]."""
        self.steps += going
        rates, steps = rates * going, self.steps.clamp(min=1)
        adamw(self.flat.values, self.flat.grads, self.mean, self.square, steps, rates, self.decays, self.ratios)

    def state(self, k):
        """What member k has gathered, {key: tensor}."""
        state = {"step": self.steps[k]}
        for name in self.flat.members[k]:
            state[f"exp_avg/{name}"] = self.flat.part(self.mean, k, name)
            state[f"exp_avg_sq/{name}"] = self.flat.part(self.square, k, name)
        return state

    def load(self, k, state):
        for key, tensor in self.state(k).items():
            fill(tensor, state[key])


class Adafactor:
    """torch's Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) at its own defaults, of one member alone."""

    def __init__(self, flat, cells):
        [cell] = cells
        self.names = list(flat.leaves)
        self.torch = torch.optim.Adafactor(flat.leaves.values(), lr=cell.lr, weight_decay=cell.weight_decay)

    def step(self, rates, going):
        if going.item():
            self.torch.param_groups[0]["lr"] = rates.item()
            self.torch.step()

    def state(self, k):
        state = self.torch.state_dict()["state"]
        return {f"{key}/{self.names[index]}": torch.as_tensor(value) for index, values in state.items()
                for key, value in values.items() if value is not None}  # fmt: skip

    def load(self, k, state):
        whole = self.torch.state_dict()
        whole["state"] = {index: {} for index in range(len(self.names))}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            whole["state"][self.names.index(name)][kind] = value
        self.torch.load_state_dict(whole)


OPTIMIZERS = {"adamw": AdamW, "adafactor": Adafactor}


def learning_rate(cell, step, steps):
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then cosine or linear to 0, or constant."""
    warm = math.ceil(cell.warmup * steps)
    if step < warm:
        return cell.lr * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return cell.lr * factor[cell.schedule]


def learning_rates(cells, steps, device):
    """The rates of all steps, float32 [most steps, K]; `steps` are the members' own, and 0 is the rate behind them."""
    table = [[learning_rate(cell, step, own) if step < own else 0.0 for cell, own in zip(cells, steps, strict=True)]
             for step in range(max(steps))]  # fmt: skip
    return torch.tensor(table, device=device)


class Schedule:
    """Which rows each step sees: `steps` in all, each a list of at most `cell.accumulate` index arrays."""

    def __init__(self, lengths, cell):
        self.lengths, self.cell = lengths, cell
        count = -(-len(lengths) // cell.batch_size)
        self.per_epoch = -(-count // cell.accumulate)
        self.steps = cell.steps or cell.epochs * self.per_epoch
        self._epochs = {}  # the last two that were asked for, as two threads may be at different ones

    def rows_at(self, step):
        number, position = divmod(step, self.per_epoch)
        made = self._epochs.get(number)
        if made is None:
            cell = self.cell
            made = batches.epoch(self.lengths, cell.batch_size, cell.window, cell.seed_for("order"), number)
            self._epochs = dict([*list(self._epochs.items())[-1:], (number, made)])
        start = position * self.cell.accumulate
        return made[start : start + self.cell.accumulate]

    def rows_before(self, step):
        """Rows that the steps before `step` saw."""
        epochs, position = divmod(step, self.per_epoch)
        first = step - position
        return epochs * len(self.lengths) + sum(len(rows) for s in range(first, step) for rows in self.rows_at(s))


def update(population, optimizer, clips, going, micro_batches, rates):
    """One optimiser step of each member that is `going` (bool [K], changed in place): (losses, norms), tensors [K].

    The loss of a member is the mean over all that its rows of
    `micro_batches` weigh; its gradient's norm is clipped to `clips` [K]. Where the loss or the norm is not finite, the
    member goes no further, and stays as it was before. Nothing here waits for the device. Several processes have a
    part of the rows each: gradients and losses are summed, and all take the same step.
    """
    population.train()
    flat = population.flat
    losses = torch.zeros_like(clips)
    totals = sum(batch.weights for batch in micro_batches).clamp(min=1.0)
    for batch in micro_batches:
        if batch.keys is not None:
            population.keys.copy_(batch.keys)
        parts = population(batch.ids, batch.lengths, batch.answers, batch.alike) / totals
        parts.sum().backward()
        losses += parts.detach()
    parallel.add(flat.grads, losses)
    norms = flat.grads.norm(dim=1)
    going &= losses.isfinite() & norms.isfinite()
    flat.grads.mul_((clips / (norms + 1e-6)).clamp(max=1.0)[:, None])
    flat.grads.masked_fill_(~going[:, None], 0.0)
    optimizer.step(rates, going)
    flat.grads.zero_()
    return losses, norms


def save_state(path, flat, optimizer, k, meters):
    """Everything that member k needs to go on, in one safetensors file, written atomically. `meters`: {name: number},
    with `step`, the steps done, among them.
    """
    from safetensors.torch import save_file

    tensors = {f"parameter/{name}": p.detach() for name, p in flat.members[k].items()}
    tensors |= {f"optimizer/{key}": value for key, value in optimizer.state(k).items()}
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    with files.replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"meters": json.dumps(meters)})


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
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["meters"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise misfit(path, error) from None


def misfit(path, error):
    return InputError(f"{path} does not fit this run ({error}): delete it to train from the start")
