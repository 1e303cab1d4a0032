"""95% intervals of a grid's metrics. NumPy arrays in, arrays out.

A metric is a share of test rows, or one share less another. Its interval is the percentile interval of the bootstrap
(Efron and Tibshirani 1993, section 13.3). What is drawn anew:

- the seeds, the same ones for all settings, so that what a seed does to all settings stays in. S - 1 of S seeds are
  drawn with replacement, which gives a mean of S seeds its own variance (Rao and Wu 1988, section 2; S draws would
  give (S - 1)/S of it). With one seed nothing is known of seeds, and the interval is over the test rows only.
- the test rows, only from the counts: a share of k in n rows from the distribution Beta(k + 1/2, n - k + 1/2), whose
  own percentiles are Jeffreys' interval (Brown, Cai and DasGupta 2001, section 3.1.3). A binomial draw at k/n would
  have no width where all rows, or none, are hit, which is what a strong attack does.

The cells of a grid are tested on the same rows, but this module does not know how far they hit the same ones. So each
interval assumes what makes it wider. For a mean, rows are drawn `together`: a cell that hits fewer rows hits some of
those that any other hits. For a difference, each cell draws its own. A few seeds say little of all seeds: with two or
three, the interval is as wide as these lie apart.
"""

from dataclasses import dataclass

import numpy as np

DRAWS = 2000
AT_ONCE = 1 << 22  # numbers held at once: 32 MiB


@dataclass(frozen=True)
class Sample:
    """One metric of N cells: (`up` - `down`) / `rows`, or with `down` None `up` / `rows`. Integers [N].

    `seeds` numbers the seeds 0, 1, ..., and `settings` 0 to S - 1 all that is not a seed.
    """

    up: np.ndarray
    down: np.ndarray | None
    rows: np.ndarray
    seeds: np.ndarray
    settings: np.ndarray

    def means(self):
        """Each setting's mean over its cells, [S]."""
        values = (self.up if self.down is None else self.up - self.down) / self.rows
        return np.bincount(self.settings, values) / np.bincount(self.settings)


def estimate(sample, weights, together):
    """Sums of the settings' means under `weights` [V, S], and their intervals: ([V], [V, 2])."""
    values, draws = weights @ sample.means(), bootstrap(sample, weights, together)
    return values, interval(draws, values)


def interval(draws, values):
    """The 95% percentile interval [V, 2] of `draws` [draws, V], widened where it would not hold `values` [V]."""
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    return np.stack([np.minimum(low, values), np.maximum(high, values)], axis=-1)


def bootstrap(sample, weights, together, draws=DRAWS):
    """Draws [draws, V] of the sums of the settings' means under `weights` [V, S]; the same at each call.

    A setting of which a draw has no seed keeps all of its own.
    """
    rng = np.random.default_rng(0)
    order = np.argsort(sample.settings, kind="stable")
    up, rows, seeds, settings = (values[order] for values in (sample.up, sample.rows, sample.seeds, sample.settings))
    down = None if sample.down is None else sample.down[order]
    starts = np.flatnonzero(np.diff(settings, prepend=-1))
    count, found = seeds.max() + 1, []
    for size in np.diff(np.append(np.arange(0, draws, max(1, AT_ONCE // len(rows))), draws)):
        values = draw_shares(rng, up, down, rows, size, together)  # [size, N]
        times = rng.multinomial(max(1, count - 1), np.full(count, 1 / count), size)[:, seeds]  # [size, N]
        times += (np.add.reduceat(times, starts, axis=1) == 0)[:, settings]
        means = np.add.reduceat(values * times, starts, axis=1) / np.add.reduceat(times, starts, axis=1)  # [size, S]
        found.append(means @ weights.T)
    return np.concatenate(found)


def draw_shares(rng, up, down, rows, draws, together):
    """Draws [draws, N] of shares whose counts are as in `Sample`."""
    if together:
        hits = up if down is None else np.concatenate([up, rows - down])
        found = draw_together(rng, hits, rows if down is None else np.concatenate([rows, rows]), draws)
        return found if down is None else found[:, : len(up)] + found[:, len(up) :] - 1
    shape = (draws, len(up))
    gained = rng.standard_gamma(up + 0.5, shape)
    lost = rng.standard_gamma((rows - up if down is None else down) + 0.5, shape)
    if down is None:
        return gained / (gained + lost)
    return (gained - lost) / (gained + lost + rng.standard_gamma(rows - up - down, shape))


def draw_together(rng, hits, rows, draws):
    """Draws [draws, N] of shares Beta(hits + 1/2, rows - hits + 1/2) that rise and fall together, for each `rows`.

    Weights are drawn for the rows in one order (Rubin 1981's Bayesian bootstrap, half a row at each end), and a share
    is that of the first `hits` of them.
    """
    found = np.empty((draws, len(hits)))
    for total in np.unique(rows):
        own = rows == total
        distinct, places = np.unique(hits[own], return_inverse=True)
        sums = rng.standard_gamma(np.diff(distinct, prepend=-0.5, append=total + 0.5), (draws, len(distinct) + 1))
        sums = sums.cumsum(axis=1)
        found[:, own] = (sums[:, :-1] / sums[:, -1:])[:, places]
    return found
