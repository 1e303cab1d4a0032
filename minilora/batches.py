"""Rows of tokens into padded batches, with little padding and few shapes.

An epoch is a random order of the rows, cut into windows of some batches; each window is sorted by length and the
batches are shuffled. Rows of like length so meet more often than by chance: `window` = 1 turns that off. Rows are
padded to one of a few lengths, which bounds the number of shapes that a compiled step meets.
"""

from dataclasses import dataclass

import numpy as np
import torch

SIZES = 32  # different padded lengths at most


@dataclass(frozen=True)
class Batch:
    """`ids` int64 [B, T] padded on the right, `lengths` int64 [B] in tokens, `index` [B] of the rows."""

    ids: torch.Tensor
    lengths: torch.Tensor
    index: np.ndarray

    def to(self, device):
        return Batch(self.ids.to(device), self.lengths.to(device), self.index)


def epoch(lengths, batch_size, window, seed, number):
    """The batches of one epoch, as a list of index arrays; every row occurs once. `lengths` [rows] in tokens."""
    random = np.random.default_rng([seed, number])
    order = random.permutation(len(lengths))
    span = batch_size * window
    batches = []
    for start in range(0, len(order), span):
        part = order[start : start + span]
        if window > 1:
            part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def padded_sizes(lengths, most=SIZES):
    """At most `most` ascending lengths such that padding each row up to the next of them adds the fewest tokens.

    Exact, by dynamic programming over the distinct lengths (which, where the longest is over 512, are first rounded
    up to a multiple that leaves at most 512 of them).
    """
    longest = int(lengths.max())
    step = -(-longest // 512)
    values, counts = np.unique(np.minimum(-(-lengths // step) * step, longest), return_counts=True)
    if len(values) <= most:
        return values
    rows = np.concatenate([[0], np.cumsum(counts)])  # rows[j]: rows of the first j lengths
    # cost[j]: tokens of the first j lengths when padded to the sizes chosen so far, of which values[j - 1] is one
    cost = values * rows[1:]
    choices = []
    cost = np.concatenate([[0], cost])
    for _ in range(most - 1):
        new, choice = np.empty_like(cost), np.zeros(len(cost), dtype=int)
        new[0] = 0
        for j in range(1, len(cost)):
            totals = cost[:j] + values[j - 1] * (rows[j] - rows[:j])
            choice[j] = totals.argmin()
            new[j] = totals[choice[j]]
        choices.append(choice)
        cost = new
    sizes, j = [], len(values)
    for choice in reversed(choices):
        sizes.append(values[j - 1])
        j = choice[j]
        if j == 0:
            break
    else:
        sizes.append(values[j - 1])
    return np.array(sizes[::-1])


def collate(encoded, index, sizes, pad_id):
    """The rows `index` of `encoded` (`ids` flat, `offsets` [rows + 1]) as a `Batch`, padded to one of `sizes`."""
    starts, stops = encoded.offsets[index], encoded.offsets[index + 1]
    lengths = stops - starts
    width = int(sizes[np.searchsorted(sizes, lengths.max())])
    columns = np.arange(width)
    real = columns < lengths[:, None]  # [B, T]
    ids = np.full(real.shape, pad_id, dtype=np.int64)
    ids[real] = encoded.ids[(starts[:, None] + columns)[real]]
    return Batch(torch.from_numpy(ids), torch.from_numpy(lengths.astype(np.int64)), index)


def by_length(encoded, batch_size, pad_id):
    """Yield all rows of `encoded` as batches, the longest rows first: for prediction, where the order has no effect."""
    lengths = np.diff(encoded.offsets)
    sizes = padded_sizes(lengths)
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield collate(encoded, order[start : start + batch_size], sizes, pad_id)
