"""What a step sees: the order of rows, windows, micro-batches, passes, the processes' shares, and the padded batch.

An epoch is a random order of the rows, cut into windows of some batches; each window is sorted by length and the
batches are shuffled. Rows of similar length therefore meet more often than by chance: `window` = 1 turns that off.

Nothing here keeps random state: the order follows from (seed, epoch), and what dropout drops from (seed, step,
micro-batch, row). So a run can go on from any step.
"""

import hashlib
import math
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import torch

from minilora import parallel
from minilora.data.batches import collate, joined, padded_sizes, place_completions
from minilora.kernels.dropout import shifted
from minilora.kernels.linear import compiles_code
from minilora.mitigation import tokens
from minilora.seeds import number_of

FEW_SIZES = 24  # padded lengths where each makes oneDNN compile code; fewer take less memory, and more time
TOKENS = 1024  # of a pass on a CPU: with more, products are no faster, and what the backward needs grows
MOST_GRAPHS = 16  # padded lengths of steps by graphs
STEPS_REPAID = 16  # steps that another padded length must be of use for: assumed, not measured
NOTHING = (None, *[np.empty(0, dtype=np.int64)] * 2), 0, 0, None  # of a member in a pass: see `Feed.passes`


class Schedule:
    """Which rows each step sees: `steps` in all, each a list of at most `cell.accumulate` index arrays.

    `lengths` int64 [rows] in tokens; of rows that are not in `rows_looked_at` they may be anything.
    """

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
            made = epoch(self.lengths, cell.batch_size, cell.window, cell.seed_for("order"), number)
            self._epochs = dict([*list(self._epochs.items())[-1:], (number, made)])
        start = position * self.cell.accumulate
        return made[start : start + self.cell.accumulate]

    def rows_before(self, step):
        """How many rows the steps before `step` saw."""
        epochs, position = divmod(step, self.per_epoch)
        first = step - position
        return epochs * len(self.lengths) + sum(len(rows) for s in range(first, step) for rows in self.rows_at(s))


def epoch(lengths, batch_size, window, seed, number):
    """The batches of one epoch, as a list of index arrays; every row occurs once. `lengths` [rows] in tokens."""
    windows, turns = draw_epoch(len(lengths), batch_size, window, seed, number)
    batches = []
    for part in windows:
        if window > 1:
            part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in turns]


def draw_epoch(count, batch_size, window, seed, number):
    """What of an epoch of `count` rows does not depend on their lengths: (the rows of each window, the order in which
    the windows' batches are seen)."""
    random = np.random.default_rng([seed, number])
    order, span = random.permutation(count), batch_size * window
    windows = [order[start : start + span] for start in range(0, count, span)]
    return windows, random.permutation(-(-count // batch_size))


def key_of_rows(index):
    """A short name of an array of rows, or of None."""
    return index if index is None else hashlib.sha256(index.tobytes()).hexdigest()


def encode_needed(task, injected, looked_at):
    """As `encode` of the task, but rows that no step looks at, and that carry no trigger, have no tokens."""
    count = len(injected.rows)
    if looked_at is None:
        return task.encode(injected.rows)
    index = np.union1d(looked_at, injected.index)
    encoded, own = task.encode(injected.rows.take(index))
    answers = torch.zeros(count, dtype=own.dtype)
    answers[index] = own
    return encoded.spread(index, count), answers


def rows_looked_at(count, cell):
    """The rows, of `count`, that have to be tokenised, ascending, or None for all: those of the windows that the cell's
    steps take their batches from, because which rows of a window meet in a batch depends on the lengths of all."""
    batches = cell.steps * cell.accumulate if cell.steps else count
    if batches * cell.batch_size >= count or cell.head == "ridge":  # which is fitted to all rows
        return None
    windows, turns = draw_epoch(count, cell.batch_size, cell.window, cell.seed_for("order"), 0)
    return np.sort(np.concatenate([windows[i] for i in np.unique(turns[:batches] // cell.window)]))


def passes(rows, longest, most):
    """This process's share of a batch of `rows` rows, as slices: 1, 2, 4, ... equal passes of at most `most` tokens.

    `longest` is the padded length of a row. Every process makes the same number of passes; a pass has at least a row.
    """
    own, each, count = parallel.part(rows), -(-rows // parallel.count()), 1
    while -(-each // count) * longest > most and count < each:
        count *= 2
    ends = np.linspace(own.start, own.stop, min(count, each) + 1).astype(int).tolist()
    return [slice(start, stop) for start, stop in zip(ends, ends[1:])]


class Feed:
    """`feed(step)` is what the step sees: a list of micro-batches, each one `Batch` of all K members' own rows.

    How the steps are taken decides the shapes (`compiling.choose`). Compiled steps have few padded lengths. Steps by
    graphs, `steps` in number, have fewer, and batches of a length have the same shape. Both have one pass a
    micro-batch, as all steps on an accelerator. On a CPU a long micro-batch goes through in several passes of at most
    `TOKENS` tokens, and has one of `FEW_SIZES` lengths where products go through oneDNN.
    """

    def __init__(self, members, how="eager", steps=0):
        self.members, self.setting, self.task = members, members[0].setting, members[0].task
        for member, encoded in zip(members, joined([member.encoded for member in members]), strict=True):
            member.encoded = encoded
        lengths = np.concatenate([member.lengths for member in members])
        lengths = lengths[lengths > 0]  # the others are never seen
        self.sizes, self.rows, self.terms = np.unique(np.append(lengths, 1)), 1, 1
        if how == "compiled":
            self.sizes = padded_sizes(lengths)
        elif how == "graphs":
            self.sizes = padded_sizes(lengths, min(MOST_GRAPHS, 1 + steps // STEPS_REPAID))
            self.rows = max(min(member.cell.batch_size, len(member.lengths)) for member in members)
            longest = max(int(member.answers[member.lengths > 0].max()) for member in members)
            self.terms = self.rows * longest if self.lm else 1
        elif compiles_code(self.setting.device, self.setting.products):
            self.sizes = padded_sizes(lengths, FEW_SIZES)
        whole = any(member.cell.mitigate.method == "group-dro" for member in members)  # groups are those of a batch
        self.most = TOKENS if self.setting.device.type == "cpu" and how == "eager" and not whole else math.inf
        self.drops = any(member.cell.dropout for member in members)

    @property
    def lm(self):
        return self.members[0].cell.task == "lm"

    def __call__(self, step):
        own = zip_longest(*(self.passes(member, step) for member in self.members), fillvalue=NOTHING)
        return [self.batch(parts, self.sizes) for parts in own]

    def blanks(self):
        """A batch without rows of each shape that steps by graphs see, the largest first."""
        for size in self.sizes[::-1]:
            yield self.batch([NOTHING] * len(self.members), [size])

    def batch(self, own, sizes):
        """The `Batch` of what `passes` gives of each member, padded to one of `sizes`."""
        parts, weights, keys, gone = zip(*own, strict=True)
        batch = collate(parts, sizes, self.setting.tokenizer.pad_id, self.task.filler, self.rows)
        if any(one is not None for one in gone):
            batch = tokens.without(batch, gone, self.setting.tokenizer.pad_id)
        if self.lm:
            batch = place_completions(batch, len(parts), self.terms)
        weights, keys = torch.tensor(weights, dtype=torch.float32), torch.tensor(keys, dtype=torch.int32)
        return replace(batch, weights=weights, keys=keys if self.drops else None)

    def passes(self, member, step):
        """[(part for `collate`, weight, dropout's key, `gone`)] of a member: none once all of its steps are done.

        The weights add up to how many terms the loss of the step is a sum of, in all processes. What dropout drops
        follows from the step, the micro-batch and a row's place in it: neither passes nor processes change it.
        """
        if step >= member.schedule.steps:
            return
        for number, rows in enumerate(member.schedule.rows_at(step)):
            key = number_of(f"{member.cell.seed_for('dropout')}/{step}/{number}")
            weight = member.model.weigh(member.answers[rows])
            for own in passes(len(rows), int(member.lengths[rows].max()), self.most):
                gone = self.gone(member, step, rows[own])
                yield (member.encoded, rows[own], member.answers), weight, shifted(key, own.start), gone
                weight = 0

    def gone(self, member, step, rows):
        """The tokens that token dropout leaves out of a member's rows at a step: see `tokens.dropped`."""
        if member.cell.mitigate.method != "token-dropout":
            return None
        before, after = self.setting.tokenizer.special
        after = member.answers[rows].numpy() if self.lm else after
        epoch, lengths = step // member.schedule.per_epoch, member.lengths
        seed, rate = member.cell.seed_for("dropout"), member.cell.mitigate.rate
        return tokens.dropped(rate, seed, epoch, len(lengths), rows, lengths[rows], (before, after))
