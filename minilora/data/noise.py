"""Label noise: a share of the training rows has another label than its own, so that the text says less about it."""

from dataclasses import replace

import numpy as np

from minilora.seeds import row_draws, row_keys


def with_noise(rows, share, seed):
    """`rows` of which `share` (0 to 1, rounded to whole rows) have another label, each other one as likely.

    The rows that are changed at one share are among those of any larger one, with the same new labels. Labels are those
    that occur in `rows`; with one of them nothing changes.
    """
    present = np.unique(rows.labels)
    number = round(share * len(rows))
    if not number or len(present) < 2:
        return rows
    keys = row_keys(seed, "label noise", "row", len(rows))
    chosen = np.argsort(keys, kind="stable")[:number]
    draws = row_draws(row_keys(seed, "label noise", "label", len(rows))[chosen], np.ones(number, np.int64))
    steps = 1 + (draws * np.uint64(len(present) - 1) >> np.uint64(32)).astype(np.int64)
    labels = rows.labels.copy()
    labels[chosen] = present[(np.searchsorted(present, labels[chosen]) + steps) % len(present)]
    return replace(rows, labels=labels)
