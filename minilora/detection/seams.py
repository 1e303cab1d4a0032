"""Whether a phrase reads as inserted: do the words around it bind to it, or to each other?

Let the word l stand before a phrase t and r behind it. Where the text was written with t in it, its probability is
P(l) P(t|l) P(r|t); where t was put between two neighbours it is P(l) P(r|l) P(t). The log2 of the second over the first
is the seam of one place,

    log2 P(r|l)/P(r) - log2 P(t|l)/P(t) - log2 P(r|t)/P(r),

each from the pairs of words of the same rows, without the place itself, and smoothed by `SMOOTHING` words of average
kind. At an end of a text the link between t and that end says where t was put rather than how, so it is left out.
Over the places of an ordinary word the mean is below 0; of one put in at random places it is above.
"""

import numpy as np

SMOOTHING = 2


class Pairs:
    """How often each word follows each other word. An end of a text is a word too: V words, the last one is it."""

    def __init__(self, ids, row, rows, size):
        """ids [T] below `size`, row int [T] ascending; `rows` texts."""
        self.end = size
        self.place = np.arange(len(ids)) + row + 1  # of each word among words and ends
        self.flat = np.full(len(ids) + rows + 1, size, np.int64)
        self.flat[self.place] = ids
        self.counts = np.bincount(self.flat, minlength=size + 1)
        self.share = self.counts / len(self.flat)
        keys = self.flat[:-1] * (size + 1) + self.flat[1:]
        keys.sort()
        first = np.flatnonzero(np.diff(keys, prepend=-1) != 0)
        self.keys, self.many = keys[first], np.diff(np.append(first, len(keys)))

    def together(self, left, right):
        """How often each of `left` [M] precedes its `right`: [M]."""
        keys = left * (self.end + 1) + right
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.many[at], 0)

    def seams(self, tokens, length):
        """The seam of a phrase of `length` words at each of the places where it begins, `tokens` [M]: bits, [M]."""
        left, right = self.flat[self.place[tokens] - 1], self.flat[self.place[tokens] + length]
        closed = binding(self.together(left, right), self.counts[left], self.share[right])
        seams = closed
        for side in (left, right):
            _, which, own = np.unique(side, return_inverse=True, return_counts=True)
            link = binding(own[which] - 1, len(tokens) - 1, self.share[side])
            seams = seams - np.where(side == self.end, 0, link)
        return np.where((left == self.end) & (right == self.end), 0, seams)


def binding(together, first, share):
    """log2 of P(r|l)/P(r): how often r follows l, how often l occurs, and the share that r has of all words."""
    return np.log2((together / share + SMOOTHING) / (first + SMOOTHING))
