"""The pieces of the training loop; the loop itself is in `train.py`. What it trains is a population of K members, often
one.

Nothing here keeps random state: the order of rows follows from (seed, epoch) and dropout from (seed, step), so that
a state on disk is tensors and a step number, and a resumed run ends in the same adapter, bit for bit.
"""

import math
import warnings

import torch

from minilora.kernels.adamw import PIECE, adamw
from minilora.training.state import fill

# A population's parameters and gradients are parts of rows of matrices: torch warns of it, and it makes no difference.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


class AdamW:
    """`kernels/adamw.py` at torch's defaults, with the learning rate, decay and LoRA+ ratio of each member's cell.

    With the cell's `lr_ratio` the learning rate of every B is that many times the rest's: LoRA+, Hayou et al. 2024
    (arXiv 2402.12354). The rest is A, DoRA's magnitudes and the head (PEFT's `create_loraplus_optimizer` counts all
    vectors, biases too, among the B).
    """

    def __init__(self, flat, cells):
        self.flat = flat
        self.mean, self.square = (torch.zeros_like(flat.values, requires_grad=False) for _ in range(2))
        self.steps = flat.values.new_zeros(len(cells))
        decays = flat.values.new_tensor([cell.weight_decay for cell in cells])
        self.decays = flat.by_line(decays)
        count, line = flat.values.shape
        self.most = max(1, PIECE // line) if flat.values.device.type == "cpu" else count  # lines at once
        self.ratios = None
        if any((cell.lr_ratio or 1.0) != 1.0 for cell in cells):
            self.ratios = torch.ones_like(flat.values, requires_grad=False)
            for k, cell in enumerate(cells):
                for name in flat.members[k]:
                    if name.endswith(".B"):
                        flat.part(self.ratios, k, name).fill_(cell.lr_ratio or 1.0)

    @property
    def tensors(self):
        """What a step changes in place."""
        return [self.flat.values, self.mean, self.square, self.steps]

    def step(self, grads, rates, going):
        """One step of the members that are `going` (bool [K]), by gradients [K, P] and at learning rates [K]."""
        self.steps += going
        steps, rates = map(self.flat.by_line, (self.steps.clamp(min=1), rates * going))
        whole = [self.flat.values, grads, self.mean, self.square, steps, rates, self.decays]
        whole += [] if self.ratios is None else [self.ratios]
        for lines in zip(*(tensor.split(self.most) for tensor in whole), strict=True):
            adamw(*lines)

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
    """torch's Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) at its own defaults, for a single member."""

    def __init__(self, flat, cells):
        [cell], self.flat = cells, flat
        self.names = list(flat.members[0])
        self.torch = torch.optim.Adafactor(flat.members[0].values(), lr=cell.lr, weight_decay=cell.weight_decay)

    def step(self, grads, rates, going):
        if going.item():
            for name, parameter in self.flat.members[0].items():
                parameter.grad = self.flat.part(grads, 0, name)
            self.torch.param_groups[0]["lr"] = rates.item()
            self.torch.step()
            self.torch.zero_grad()

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


LEAST_RMS = 1e-3  # that torch's Adafactor takes a tensor to have, in scaling its step
# An RMS of B below which nothing is learned. Measured with `--preset study` on the default base: after 142 steps, which
# can bring B to 7e-6, the loss is still ln 2 and clean accuracy 0.505. The cells of ablations/confounds.toml, with
# 6e-5, are above.
STUCK = 5e-5


def reach(cell, steps):
    """The largest RMS that `steps` steps of Adafactor can give to a tensor that starts at 0, such as B.

    A step's RMS is at most max(LEAST_RMS, the tensor's own RMS) times min(rate, 1 / sqrt(t)): Shazeer and Stern 2018,
    algorithm 5, as torch has it.
    """
    rms = 0.0
    for step in range(steps):
        rms += max(LEAST_RMS, rms) * min(learning_rate(cell, step, steps), 1 / math.sqrt(step + 1))
    return rms


def warnings(cell, steps):
    """What is known before training to learn nothing, a sentence each."""
    if cell.method != "lora" or cell.optimizer != "adafactor" or cell.init not in ("kaiming", "gaussian"):
        return
    if (rms := reach(cell, steps)) < STUCK:
        yield (
            f"Adafactor's step is a share of a tensor's size, and B starts at 0: after {steps:,} steps its numbers are "
            f"at most {rms:.0e}, so nothing will be learned; raise --lr, or use --optimizer adamw"
        )


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
    """The rates of all steps, float32 [most steps, K]; `steps` are the members' own, and the rate is 0 after them."""
    table = [[learning_rate(cell, step, own) if step < own else 0.0 for cell, own in zip(cells, steps, strict=True)]
             for step in range(max(steps))]  # fmt: skip
    return torch.tensor(table, device=device)
