"""What a cell will take, before it is trained: its parameters, and estimates of its time and memory."""

from dataclasses import dataclass

import numpy as np

from minilora import parallel
from minilora.cell import Cell
from minilora.data.rows import rows_of
from minilora.fields import declared, grouped, value_of
from minilora.lora.targets import count_trained, plan_slots
from minilora.runs.bases import size_of_base
from minilora.runs.folder import Run
from minilora.tasks.classification import PADDED, POOLED
from minilora.training.feed import TOKENS
from minilora.training.limit import matmul_rate, products, training_flops
from minilora.training.member import Member
from minilora.training.planner import MOST, size
from minilora.training.population import shared

SAMPLE = 2000  # rows whose lengths are looked at
SHARE = 0.65  # of the rate of products that training and tests reach
START_UP = 1.0  # seconds that a cell takes beside them
PROCESS = 750e6  # bytes of Python, torch and its code for products of many sizes
OPTIMIZER = 16  # bytes for each trained parameter: values, gradients, and AdamW's two


@dataclass(frozen=True)
class Forecast:
    """Trained parameters of a cell, the seconds that it takes by itself on this machine, and its most bytes."""

    parameters: int
    seconds: float
    bytes: int


# Fields that may change what a cell takes: all but its seeds.
COSTLY = [name for name in declared(Cell) if name not in grouped(Cell, "seeds")]


class Forecaster:
    """`forecaster(cell)` is its `Forecast`; what cells share (rows, lengths, the device's rate) is found once."""

    def __init__(self, settings):
        self.settings = settings
        self.rows, self.rates, self.made = {}, {}, {}

    def __call__(self, cell):
        """Raises InputError for what can be refused of a cell before its base is loaded."""
        setting = self.settings.of(cell)
        found = self.rows_of(cell, setting)
        key = (*map(repr, (value_of(cell, name) for name in COSTLY)), *found)
        if key not in self.made:
            self.made[key] = self.make(cell, setting, *found)
        return self.made[key]

    def make(self, cell, setting, count, tests, labels, length, longest):
        spec, slots = setting.spec, plan_slots(setting.spec, cell)
        seen = cell.steps * cell.batch_size * cell.accumulate if cell.steps else cell.epochs * count
        forms = 2 + len(cell.inject.sources) if cell.inject.sources else 1
        validated = (cell.validation_rows or 0) * (1 + len(cell.inject.sources))
        work = training_flops(spec, slots, cell.method, length) * length * seen
        work += training_flops(spec, {}, "head", length) * length * (tests * forms + validated)
        tokens = int(cell.batch_size * length)
        times = products(spec, slots, cell.method)
        rate = setting.device, cell.products, tokens, frozenset(times.items())
        if rate not in self.rates:
            self.rates[rate] = matmul_rate(tokens, times, setting.products, setting.device)
        parameters = trained(cell, spec, slots, labels)
        size = setting.dtype.itemsize
        most = cell.batch_size * longest  # tokens of a pass
        if setting.device.type == "cpu":
            most = min(most, max(TOKENS, longest))
        taken = size * (size_of_base(spec) + most * kept(spec, longest)) + OPTIMIZER * parameters
        return Forecast(parameters, START_UP + work / (SHARE * self.rates[rate]), int(PROCESS + taken))

    def rows_of(self, cell, setting):
        """(Training rows, test rows, labels, mean and largest length in tokens) of a cell's data."""
        names = (*grouped(Cell, "base"), *grouped(Cell, "data"), "seed_split", "task")
        key = tuple(value_of(cell, name) for name in names)
        if key not in self.rows:
            clean, test, *_ = rows_of(cell)
            texts = clean.texts[:: max(1, len(clean) // SAMPLE)]
            lengths = np.diff(setting.tokenizer.encode(texts, cell.max_length).offsets)
            self.rows[key] = len(clean), len(test), len(clean.label_names), float(lengths.mean()), int(lengths.max())
        return self.rows[key]


def trained(cell, spec, slots, labels):
    """How many parameters the cell trains. Norms, biases and positions of method full are not counted."""
    if cell.method == "full":
        count = size_of_base(spec)
    else:
        count = 0
        for name, slot in slots.items():
            _, layer, target = name.split(".")
            count += count_trained(slot, spec.shape(target, int(layer)), cell.variant)
    if cell.head == "trained":
        count += labels * (POOLED[cell.pooling.removeprefix(PADDED)] * spec.width + 1)
    return count


def kept(spec, length):
    """Numbers a token that the forward of all layers keeps for the backward: norms and inputs, q k v, probabilities and
    pre-activations, and as much again of the layer at work (exactly: `tests/training/test_memory.py`)."""
    layers = [
        4 * spec.width + (2 * here.heads + 2 * here.kv_heads) * spec.head_width + here.heads * length
        + (1 + spec.gated) * here.inner
        for here in spec.layers
    ]  # fmt: skip
    return sum(layers) + max(layers)


# --- of a grid


def settle(entries, size, settings):
    """The entries of a grid in populations of at most `size`, in the grid's order.

    Without a `size`, a population on a CPU is one cell, because that is seldom slower there and always gives the same
    bits; on an accelerator it is as many as is measured to be fastest.
    """
    groups = {}
    for entry in entries:
        groups.setdefault(shared(entry.cell), []).append(entry)
    chunks = []
    for group in groups.values():
        most = size or measured(group, settings)
        order = sorted(group, key=lambda entry: [
            *(getattr(entry.cell, name) or 0 for name in ("steps", "epochs", "train_rows")),
            entry.cell.seed_for("order"),
        ])  # fmt: skip
        chunks += [order[i : i + most] for i in range(0, len(order), most)]
    places = {entry.name: number for number, entry in enumerate(entries)}
    return sorted(chunks, key=lambda chunk: places[chunk[0].name])


def measured(group, settings):
    """The size of population that is fastest for the first entries of a group."""
    if len(group) == 1 or parallel.pick_device(group[0].cell.device).type == "cpu":
        return 1
    members = [Member(entry.cell, Run(entry.name)) for entry in group[:MOST]]
    for member in members:
        member.prepare(settings.of(member.cell), settings.shared)
    base = settings.load(members[0].cell, members[0].task.unembedding)
    for member in members:
        member.begin(base)
    return size(members, base)
