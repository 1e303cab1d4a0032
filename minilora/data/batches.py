"""Rows of tokens into padded batches, with little padding and few shapes.

An epoch is a random order of the rows, cut into windows of some batches; each window is sorted by length and the
batches are shuffled. Rows of like length so meet more often than by chance: `window` = 1 turns that off. Rows are
padded to the longest of their batch, or for a compiled step to one of a few lengths, which bounds its shapes.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import islice

import numpy as np
import torch

from minilora import parallel

SIZES = 32  # different padded lengths at most
TOKENS = 1024  # of a pass on a CPU: with more, products are no faster, and what the backward needs grows
AHEAD = 4  # steps whose batches are made before they are asked for


@dataclass(frozen=True)
class Batch:
    """`ids` int64 [B, T] padded on the right, `lengths` int64 [B] in tokens, `index` [B] of the rows.

    `answers` int64 [B], where given, are what the model is to answer. Rows behind those of `index` fill up: see
    `part_of`. A population's batch (`population.join`) has the
    rows of its K members one after the other, `index` is a list of K, and

    weights  float32 [K], how many terms each member's loss is a sum of
    keys     int32 [K] that dropout follows (`lora.use_keys`), or None
    alike    whether the members' rows are the same
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    index: np.ndarray | list
    answers: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    alike: bool = False

    def to(self, device, non_blocking=False):
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(v) for name, v in values.items() if torch.is_tensor(v)})


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


def passes(rows, longest, most):
    """Slices of a batch's `rows` (how many) that are this process's, in 1, 2, 4, ... passes of about as many rows, so
    that none has over `most` tokens when padded to the `longest`, if it can be helped; in all processes as many.
    """
    own, each, count = parallel.part(rows), -(-rows // parallel.count()), 1
    while -(-each // count) * longest > most and count < each:
        count *= 2
    ends = np.linspace(own.start, own.stop, min(count, each) + 1).astype(int).tolist()
    return [slice(start, stop) for start, stop in zip(ends, ends[1:])]


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


def collate(encoded, index, sizes, pad_id, answers=None):
    """The rows `index` of `encoded` (`ids` flat, `offsets` [rows + 1]) as a `Batch`, padded to one of `sizes`.

    `answers` [rows] are those of all rows, if the batch is to have its own.
    """
    starts, stops = encoded.offsets[index], encoded.offsets[index + 1]
    lengths = stops - starts
    width = int(sizes[np.searchsorted(sizes, lengths.max())])
    columns = np.arange(width)
    real = columns < lengths[:, None]  # [B, T]
    ids = np.full(real.shape, pad_id, dtype=np.int64)
    ids[real] = encoded.ids[(starts[:, None] + columns)[real]]
    answers = None if answers is None else answers[index]
    return Batch(torch.from_numpy(ids), torch.from_numpy(lengths.astype(np.int64)), index, answers)


def part_of(encoded, rows, own, sizes, pad_id, answers=None, filler=None):
    """As `collate`, of the part `own` (a slice) of `rows`, that of this process.

    Where there is none, of the first of `rows`, which fills up: its answer is `filler`, if that is given. For all
    processes make the same passes, as a sharded base has to be gathered by all.
    """
    own = rows[own]
    if len(own):
        return collate(encoded, own, sizes, pad_id, answers)
    batch = collate(encoded, rows[:1], sizes, pad_id, answers)
    return replace(batch, index=own, answers=batch.answers if filler is None else torch.tensor([filler]))


def by_length(encoded, batch_size, pad_id, answers=None):
    """Yield all rows of `encoded` as batches, the longest rows first: for prediction, where the order has no effect.

    Several processes take the batches in turn.
    """
    lengths = np.diff(encoded.offsets)
    sizes = padded_sizes(lengths)
    order = np.argsort(-lengths, kind="stable")
    for turn, own in parallel.turns(len(order), batch_size):
        yield part_of(encoded, order[turn], own, sizes, pad_id, answers)


def ahead(make, start, stop, device):
    """Yield (step, batches on `device`) for the steps from `start` up to `stop`; `make(step)` is a list of `Batch`.

    A thread makes the batches of the next `AHEAD` steps meanwhile; for a GPU it pins them, and the copies to it do not
    wait. What `make` raises is raised here, at its step. The thread ends with the loop, however that ends.
    """
    pinned = device.type == "cuda"

    def prepared(step):
        made = make(step)
        return [batch.pin_memory() for batch in made] if pinned else made

    with ThreadPoolExecutor(1, "batches-ahead") as thread:
        coming = (thread.submit(prepared, step) for step in range(start, stop))
        waiting = deque(islice(coming, AHEAD))
        try:
            for step in range(start, stop):
                made = waiting.popleft().result()
                waiting.extend(islice(coming, 1))
                yield step, [batch.to(device, non_blocking=pinned) for batch in made]
        finally:
            thread.shutdown(cancel_futures=True)


IGNORED = -100  # the label of a row that fills up a batch


def join(parts, pad_id, filler, weights, keys=None):
    """One `Batch` of the members' (a Batch each, or None of one that has no rows): [K B, T], B and T the largest.

    Rows that fill up have one token, and `filler` for an answer. `weights`, `keys`: see `Batch`, a list of K each.
    """
    weights = torch.tensor(weights, dtype=torch.float32)
    keys = None if keys is None else torch.tensor(keys, dtype=torch.int32)
    there = [part for part in parts if part is not None]
    if len(parts) == 1:
        return replace(there[0], index=[there[0].index], weights=weights, keys=keys)
    rows, width = max(len(part.lengths) for part in there), max(part.ids.shape[1] for part in there)
    ids = torch.full((len(parts), rows, width), pad_id)
    lengths = torch.ones(len(parts), rows, dtype=torch.int64)
    answers = torch.full((len(parts), rows), filler)
    for k, part in enumerate(parts):
        if part is not None:
            count, length = part.ids.shape
            ids[k, :count, :length] = part.ids
            lengths[k, :count], answers[k, :count] = part.lengths, part.answers
    index = [np.array([], dtype=np.int64) if part is None else part.index for part in parts]
    alike = bool((ids == ids[0]).all() and (lengths == lengths[0]).all())
    return Batch(ids.flatten(0, 1), lengths.flatten(), index, answers.flatten(), weights, keys, alike)
