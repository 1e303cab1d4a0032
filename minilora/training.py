"""The pieces of the training loop; the loop itself is in `train.py`.

Nothing here keeps random state: the order of rows follows from (seed, epoch) and dropout from (seed, step), so that
a state on disk is tensors and a step number, and a resumed run ends in the same adapter, bit for bit.
"""

import json
import math

import torch

from . import batches, files, lora
from .errors import InputError, TrainingError

STEPS_WORTH_COMPILING = 2000  # on a GPU; see `compiles`


def pick_device(name):
    """The torch device of a cell's `device`; auto is CUDA where there is one, else the CPU. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(number or 0) >= there:
        raise InputError(f"device {name} is not there (this machine has {there} of {kind}): use --device auto")
    return torch.device(name)


def compiles(choice, device, steps):
    """Whether to compile, and why: (bool, reason). `choice` is the cell's `compile`.

    On a CPU compiled steps were no faster than eager ones (README, figures), so auto never compiles there.
    """
    if choice != "auto":
        return choice == "on", f"--compile {choice}"
    if device.type != "cuda":
        return False, f"compiling does not repay itself on {device.type}"
    if steps < STEPS_WORTH_COMPILING:
        return False, f"{steps:,} steps do not repay compiling"
    return True, f"{steps:,} steps repay it"


def trained_parameters(model, cell):
    """Mark what the cell trains on `model` (a task's) and return it: {name: parameter}."""
    model.requires_grad_(cell.method == "full")
    for _, layer in lora.named_layers(model):
        for name in layer.variant.trains:
            getattr(layer, name).requires_grad_(True)
    if cell.head is not None:  # the lm task has none
        model.classifier.requires_grad_(cell.head == "trained")
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(parameters, cell):
    """torch's AdamW (Loshchilov and Hutter 2019) or Adafactor (Shazeer and Stern 2018), at its own defaults.

    `parameters` is {name: parameter}. With the cell's `lr_ratio` every B is in a group of its own, whose learning
    rate is that many times the rest's: LoRA+, Hayou et al. 2024 (arXiv 2402.12354). The rest is A, DoRA's magnitudes
    and the head (PEFT's `create_loraplus_optimizer` counts all vectors, biases too, among the B).
    """
    kind = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}[cell.optimizer]
    ratio = cell.lr_ratio or 1.0
    members = {1.0: [], ratio: []}
    for name, parameter in parameters.items():
        members[ratio if name.endswith(".B") else 1.0].append((name, parameter))
    groups = [{"params": group, "lr_ratio": ratio} for ratio, group in members.items()]
    return kind(groups, lr=cell.lr, weight_decay=cell.weight_decay)


def learning_rate(cell, step, steps):
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then cosine or linear to 0, or constant."""
    warm = math.ceil(cell.warmup * steps)
    if step < warm:
        return cell.lr * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return cell.lr * factor[cell.schedule]


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]


class Schedule:
    """Which rows each step sees: `steps` in all, each a list of at most `cell.accumulate` index arrays."""

    def __init__(self, lengths, cell):
        self.lengths, self.cell = lengths, cell
        count = -(-len(lengths) // cell.batch_size)
        self.per_epoch = -(-count // cell.accumulate)
        self.steps = cell.steps or cell.epochs * self.per_epoch
        self._epoch = self._batches = None

    def rows_at(self, step):
        number, position = divmod(step, self.per_epoch)
        if number != self._epoch:
            cell = self.cell
            self._batches = batches.epoch(self.lengths, cell.batch_size, cell.window, cell.seed_for("order"), number)
            self._epoch = number
        start = position * self.cell.accumulate
        return self._batches[start : start + self.cell.accumulate]

    def rows_before(self, step):
        """Rows that the steps before `step` saw."""
        epochs, position = divmod(step, self.per_epoch)
        first = step - position
        return epochs * len(self.lengths) + sum(len(rows) for s in range(first, step) for rows in self.rows_at(s))


def update(model, micro_batches, answers, parameters, optimizer, cell, step):
    """One optimiser step on the mean loss over all rows of `micro_batches`: (loss, gradient norm), floats.

    `answers` is what the model is to answer, of all rows: their labels, or how many of their tokens are completion,
    over all of which the mean is then. Raises TrainingError before anything is changed if it, or the gradient, is not
    finite.
    """
    model.train()
    total = sum(model.weigh(answers[batch.index]) for batch in micro_batches)
    loss = 0.0
    for number, batch in enumerate(micro_batches):
        if cell.dropout:
            torch.manual_seed(lora.generator(cell.seed_for("dropout"), f"{step}/{number}").initial_seed())
        part = model(batch.ids, batch.lengths, answers[batch.index].to(batch.ids.device)) / total
        part.backward()
        loss += part.item()
    norm = torch.nn.utils.clip_grad_norm_(parameters, cell.clip or math.inf).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        raise TrainingError(f"the loss is {loss} and the norm of its gradient {norm} at step {step + 1}")
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def state_names(optimizer):
    """The parameters' names in the order in which the optimiser numbers them."""
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def save_state(path, parameters, optimizer, meters):
    """Everything a resumed run needs, in one safetensors file, written atomically. `meters`: {name: number},
    with `step`, the steps done, among them.
    """
    from safetensors.torch import save_file

    names = state_names(optimizer)
    tensors = {f"parameter/{name}": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if value is not None:
                tensors[f"optimizer/{key}/{names[index]}"] = torch.as_tensor(value).cpu().contiguous()
    with files.replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"meters": json.dumps(meters)})


def load_state(path, parameters, optimizer):
    """Put a saved state back; returns the meters. Raises InputError if it cannot fit."""
    from safetensors import SafetensorError, safe_open

    names = state_names(optimizer)
    try:
        with safe_open(path, "pt") as file:
            meters = json.loads(file.metadata()["meters"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        state = {index: {} for index in range(len(names))}
        with torch.no_grad():
            for key, value in tensors.items():
                kind, _, rest = key.partition("/")
                if kind == "parameter":
                    parameters[rest].copy_(value)
                else:
                    field, _, name = rest.partition("/")
                    state[names.index(name)][field] = value
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} does not fit this run ({error}): delete it to train from the start") from None
    whole = optimizer.state_dict()
    whole["state"] = {index: values for index, values in state.items() if values}
    optimizer.load_state_dict(whole)
    return meters
