"""Rows of tokens into padded batches. Which rows a training step sees is decided in `training/feed.py`.

Rows are padded to the longest of their batch, or to one of a few lengths: for compiled steps, for CUDA graphs, in
prediction, and where oneDNN compiles code for each shape.
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import zip_longest

import numpy as np
import torch

from minilora import parallel

SIZES = 32  # different padded lengths at most
MOST_TOKENS = 1024  # of a batch in prediction on a CPU: with more, activations leave the cache
AHEAD = 4  # batches that are made before they are asked for
IGNORED = -100  # the label of a row that only pads a batch


@dataclass(frozen=True)
class Batch:
    """Rows of K parts one after the other, each part padded to as many rows as the largest; in prediction K is 1.

    ids      int64 [K B, T], padded on the right
    lengths  int64 [K B] in tokens; 1 for a row that only pads the batch
    index    the rows of each part, a list of K arrays [at most B]; in prediction the array itself
    answers  what the model is to answer, or None: labels int64 [K B]; of task lm, which tokens predict the completions
             (`place_completions`)
    weights  float32 [K], how many terms each member's loss is a sum of, in training
    keys     int32 [K] that dropout follows (`use_keys` of `lora/layer.py`), or None
    alike    whether the rows of all parts are the same
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


def joined(encoded):
    """The rows of each of several `Encoded`, all with one array of ids: what `collate` takes."""
    if len(encoded) == 1:
        return encoded
    parts = [own.ids[own.offsets[0] : own.offsets[-1]] for own in encoded]
    starts = np.cumsum([0, *map(len, parts)])
    ids = np.concatenate(parts)
    return [replace(own, ids=ids, offsets=own.offsets - own.offsets[0] + start)
            for own, start in zip(encoded, starts)]  # fmt: skip


def collate(parts, sizes, pad_id, filler=IGNORED, rows=1):
    """One `Batch` of K parts, each (encoded, index, answers), padded once, to one of `sizes`.

    encoded  `ids` flat and `offsets` [rows + 1]; a part without rows is (None, an empty array, another);
             the `ids` of all parts are one array (`joined`), from which all tokens are taken at once
    index    int64 [at most B], the rows of `encoded` that are taken
    answers  int64 [rows], of all rows of `encoded`, or None where the batch is to have none

    A part with fewer rows than the largest, or than `rows`, gets rows of one padding token, whose answer is `filler`.
    """
    lengths = [encoded.offsets[at + 1] - encoded.offsets[at] if len(at) else at for encoded, at, _ in parts]
    B = max(rows, *map(len, lengths))
    T = int(sizes[np.searchsorted(sizes, max(int(length.max()) if len(length) else 1 for length in lengths))])
    here = np.arange(B) < np.array([len(at) for at in lengths])[:, None]  # [K, B]
    widths, answers = np.ones(here.shape, dtype=np.int64), np.full(here.shape, filler, dtype=np.int64)
    widths[here] = taken = np.concatenate(lengths)
    if answered := any(wanted is not None for *_, wanted in parts):
        answers[here] = np.concatenate([wanted[at] for _, at, wanted in parts if len(at)] or [taken])
    ids = np.full((*here.shape, T), pad_id, dtype=np.int64)
    if len(taken):
        [source] = {id(encoded.ids): encoded.ids for encoded, at, _ in parts if len(at)}.values()
        starts = np.concatenate([encoded.offsets[at] for encoded, at, _ in parts if len(at)])
        places = np.repeat(starts - (taken.cumsum() - taken), taken) + np.arange(taken.sum())
        ids[np.arange(T) < (widths * here)[..., None]] = source[places]
    alike = bool((ids == ids[0]).all() and (widths == widths[0]).all())
    ids, widths, answers = (torch.from_numpy(array).flatten(0, 1) for array in (ids, widths, answers))
    return Batch(ids, widths, [at for _, at, _ in parts], answers if answered else None, alike=alike)


def place_completions(batch, parts=1, least=1):
    """The batch, of K `parts`, whose `answers` count the tokens of each row's completion, with their places instead.

    These are the places of the tokens that predict the completions', in the flat ids [K B T]: int64 [K N], one part
    after the other. A part with fewer than the largest, or than `least`, is padded with `IGNORED`. They are found here,
    on the host, because a GPU would wait for their number.
    """
    counts, lengths = batch.answers.numpy(), batch.lengths.numpy()
    ends = np.arange(len(counts)) * batch.ids.shape[1] + lengths - 1  # the last token predicts nothing
    each = counts.reshape(parts, -1).sum(1)  # [K]
    nth = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # in its completion
    places = np.full((len(each), max(least, each.max())), IGNORED, dtype=np.int64)
    places[np.arange(places.shape[1]) < each[:, None]] = np.repeat(ends - counts, counts) + nth
    return replace(batch, answers=torch.from_numpy(places).flatten())


def by_length(encoded, batch_size, pad_id, answers=None, device=None):
    """Yield all rows of `encoded` as batches, the longest rows first: for prediction, where the order has no effect.

    The first batch has `batch_size` rows, and the others as many as have no more tokens; if `device` is a CPU, all
    have at most `MOST_TOKENS` tokens, or a row. `answers` int64 [rows] or None. Several processes take the batches in
    turn; one that has no rows left gets a batch of padding, because every process must make every pass.
    """
    most = MOST_TOKENS if device is not None and device.type == "cpu" else math.inf
    sizes = padded_sizes(np.diff(encoded.offsets))
    cuts = by_tokens(encoded, sizes, batch_size, most)
    for turn, own in parallel.turns(len(cuts), 1):
        [index] = cuts[turn][own] or [np.empty(0, dtype=np.int64)]
        yield replace(collate([(encoded, index, answers)], sizes, pad_id, filler=0), index=index)


def by_length_together(parts, batch_size, pad_id):
    """As `by_length`, of K members with an `Encoded` each, or None: batches of K parts."""
    sizes = padded_sizes(np.concatenate([[1], *(np.diff(encoded.offsets) for encoded in parts if encoded)]))
    cuts = [by_tokens(encoded, sizes, batch_size) if encoded else [] for encoded in parts]
    one = iter(joined([encoded for encoded in parts if encoded]))
    parts = [encoded and next(one) for encoded in parts]
    for own in zip_longest(*cuts, fillvalue=np.empty(0, dtype=np.int64)):
        yield collate([(encoded, index, None) for encoded, index in zip(parts, own, strict=True)], sizes, pad_id)


def by_tokens(encoded, sizes, batch_size, most=math.inf):
    """All rows, the longest first, cut into batches [arrays of rows] that take about as many tokens each, padding to
    one of `sizes` included: those of `batch_size` of the longest rows, but at most `most`."""
    lengths = np.diff(encoded.offsets)
    order = np.argsort(-lengths, kind="stable")
    lengths = sizes[np.searchsorted(sizes, lengths)]
    most, cuts, start = min(most, batch_size * int(lengths.max())), [], 0
    while start < len(order):
        stop = start + max(1, int(most // max(1, lengths[order[start]])))
        cuts.append(order[start:stop])
        start = stop
    return cuts


def ahead(made, device):
    """Yield (item, the same on `device`) of an iterator of batches, or of lists of them. A thread makes the next few
    meanwhile.

    For a GPU it pins them, and copying does not wait. What making them raises is raised here, at its item. The thread
    ends with the loop, however that ends.
    """
    pinned = device.type == "cuda"

    def each(item, do):
        return [do(batch) for batch in item] if isinstance(item, list) else do(item)

    def following():
        item = next(made, None)
        return each(item, lambda batch: batch.pin_memory()) if pinned and item is not None else item

    with ThreadPoolExecutor(1, "batches-ahead") as thread:
        waiting = deque(thread.submit(following) for _ in range(AHEAD))
        try:
            while (item := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(following))
                yield item, each(item, lambda batch: batch.to(device, non_blocking=pinned))
        finally:
            thread.shutdown(cancel_futures=True)
