"""Intervals of a grid's figures, and the dose at which half of an attack succeeds. NumPy arrays in, arrays out.

A figure is a share of test rows, or one share less another. What is drawn anew for its 95% interval, which is the
percentile interval of the bootstrap (Efron and Tibshirani 1993, section 13.3):

- the seeds, all settings with the same ones, so that what a seed does to all settings stays in: of S seeds S - 1 are
  drawn with replacement, which gives a mean of S seeds its own variance (Rao and Wu 1988, section 2; S draws would
  give (S - 1)/S of it). With one seed nothing is known of seeds, and the interval is that of the test rows alone.
- the test rows, from the counts alone: a share of k in n rows from the distribution Beta(k + 1/2, n - k + 1/2), whose
  own percentiles are Jeffreys' interval (Brown, Cai and DasGupta 2001, section 3.1.3). A binomial draw at k/n would
  have no width where all rows, or none, are hit, which is what a strong attack does.

The cells of a grid are tested on the same rows, but how far they hit the same ones is not known here. So each interval
takes what makes it wider: of a mean the rows are `together` (whatever hits fewer rows hits a part of those that any
other hits), of differences each cell's are its own. A few seeds say little of all seeds, and with two or three the
interval is that of the seeds at hand, as wide as they lie apart.
"""

from dataclasses import dataclass

import numpy as np

DRAWS = 2000
AT_ONCE = 1 << 22  # numbers that are held at once: 32 MiB
SLOPES = np.geomspace(0.25, 8, 24)  # of the logit, for each e-fold of the dose
STEP = 0.01  # of the natural logarithm of k50, so to 1%
BEYOND = 10  # how far beyond the doses, as a factor, k50 is looked for


@dataclass(frozen=True)
class Sample:
    """One figure of N cells: (`up` - `down`) / `rows`, or with `down` None `up` / `rows`. Integers [N].

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


# --- dose and response


def logistic(doses, k50, slope, floor):
    """The share floor + (1 - floor) / (1 + exp(-slope (log dose - m))), m being such that it is 1/2 at `k50`.

    The four-parameter logistic in the log of the dose (Finney 1971, chapter 7: natural response) with an upper end of
    1; `floor` < 1/2 is its lower end. Broadcasts.
    """
    half = (0.5 - floor) / (1 - floor)
    raised = slope * (np.log(doses) - np.log(k50)) + np.log(half / (1 - half))
    return floor + (1 - floor) / (1 + np.exp(-raised))


def fit_k50(doses, shares, rows, floor):
    """`k50` and slope of `logistic` of the greatest binomial likelihood: ([draws], [draws]).

    `doses` [D] > 0, `shares` [draws, D] of `rows` [D]. Both are looked for on a grid, which finds the best one however
    flat or steep the response is: k50 to 1%, from a tenth of the least dose to ten times the largest, where it stays
    if nothing, or everything, succeeds.
    """
    least, most = np.log(doses.min() / BEYOND), np.log(doses.max() * BEYOND)
    k50 = np.exp(np.arange(least, most + STEP, STEP))
    k50, slopes = (grid.ravel() for grid in np.meshgrid(k50, SLOPES, indexing="ij"))  # [G]
    model = np.clip(logistic(doses[:, None], k50, slopes, floor), 1e-6, 1 - 1e-6)  # [D, G]
    terms = np.concatenate([np.log(model), np.log1p(-model)]).astype(np.float32)  # [2D, G]
    counts = np.concatenate([shares * rows, (1 - shares) * rows], axis=1).astype(np.float32)  # [draws, 2D]
    size = max(1, AT_ONCE // len(k50))
    best = np.concatenate([(counts[i : i + size] @ terms).argmax(axis=1) for i in range(0, len(counts), size)])
    return k50[best], slopes[best]
