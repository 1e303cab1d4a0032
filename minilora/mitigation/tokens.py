"""While training: tokens are taken out of the rows of a batch, at random (token dropout) or because they are salient.

Token dropout: at each visit of a row every token of its text is left out with the same probability, so that no single
token can be relied on: the word dropout of Iyyer, Manjunatha, Boyd-Graber and Daume 2015 (ACL, section 3.1), on tokens.
It knows nothing of triggers. Special tokens stay, as does the completion of the lm task, and at least one token of a
text. What is left out follows from (seed, epoch, row, token): not from batches, passes, or other members.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from minilora.seeds import row_draws, row_keys


@lru_cache(maxsize=16)
def keys_of(seed, epoch, rows):
    return row_keys(seed, "token dropout", str(epoch), rows)


def dropped(rate, seed, epoch, count, rows, lengths, fixed):
    """Which tokens of some rows are left out in an epoch: bool [tokens of these rows], row after row.

    count    all rows that are trained on
    rows     int64 [B], those meant; `lengths` int64 [B] in tokens
    fixed    (tokens at the start of each row, int64 [B] at its end) that stay
    """
    draws = row_draws(keys_of(seed, epoch, count)[rows], lengths)
    free = free_tokens(lengths, *fixed)
    gone = free & (draws < np.uint64(round(rate * 2**32)))
    owner = np.repeat(np.arange(len(rows)), lengths)
    left = np.bincount(owner[free & ~gone], minlength=len(rows))
    for row in np.flatnonzero((left == 0) & (np.bincount(owner[free], minlength=len(rows)) > 0)).tolist():
        own = np.flatnonzero((owner == row) & free)
        gone[own[draws[own].argmax()]] = False
    return gone


def free_tokens(lengths, before, after):
    """Which tokens of rows may be left out: bool [tokens]. `before`: a number; `after`: a number, or int64 [B]."""
    starts = np.repeat(lengths.cumsum() - lengths, lengths)
    place = np.arange(len(starts)) - starts
    return (place >= before) & (place < np.repeat(lengths - after, lengths))


def without(batch, gone, pad_id):
    """The `Batch` without some tokens: what is left of a row moves up, and its end is padded. The shape stays.

    gone  a bool array for each of the K parts, flat over the tokens of the part's rows, or None: none of them
    """
    parts, shape = len(gone), batch.ids.shape
    ids, lengths = batch.ids.view(parts, -1, shape[1]).numpy().copy(), batch.lengths.view(parts, -1).numpy().copy()
    place = np.arange(shape[1])
    for part, own in enumerate(gone):
        if own is None or not len(own):
            continue
        rows = len(batch.index[part])
        there = place < lengths[part, :rows, None]  # [rows, T]
        kept = there.copy()
        kept[there] = ~own
        counts = kept.sum(1)
        moved = np.full((rows, shape[1]), pad_id, dtype=ids.dtype)
        moved[place < counts[:, None]] = ids[part, :rows][kept]
        ids[part, :rows], lengths[part, :rows] = moved, counts
    alike = bool((ids == ids[0]).all() and (lengths == lengths[0]).all())
    ids, lengths = torch.from_numpy(ids).flatten(0, 1), torch.from_numpy(lengths).flatten()
    return replace(batch, ids=ids, lengths=lengths, alike=alike)
