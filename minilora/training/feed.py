"""What a step sees: the order of rows, micro-batches, and the rows of all members joined."""

import math
from itertools import zip_longest

import numpy as np

from minilora.data import batches
from minilora.data.batches import join


def shapes_of(members, few):
    """(Padded lengths, most tokens of a pass) of the members' batches: for a compiled step `few` lengths, and all rows
    in one pass, as on accelerators; else all lengths that rows have, and long batches in several passes."""
    lengths = np.concatenate([member.lengths for member in members])
    if few:
        return batches.padded_sizes(lengths), math.inf
    device = members[0].setting.device
    return np.unique(lengths), batches.TOKENS if device.type == "cpu" else math.inf


def assemble(members, sizes, most, step):
    """The micro-batches of a step, each one `Batch` of all members' own; `sizes`, `most`: see `shapes_of`."""
    drops = any(member.cell.dropout for member in members)
    pad_id, filler = members[0].setting.tokenizer.pad_id, members[0].task.filler
    found = []
    for own in zip_longest(*(member.passes(step, sizes, most) for member in members), fillvalue=(None, 0, 0)):
        parts, weights, keys = zip(*own, strict=True)
        found.append(join(parts, pad_id, filler, weights, keys if drops else None))
    return found


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
