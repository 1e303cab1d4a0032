"""95% intervals of a grid's figures. NumPy arrays in, arrays out.

A figure of a cell is a share of test rows, or one share less another. A statistic is a sum of the settings' means
under fixed weights: a mean, a difference, or a slope. It varies with what is drawn anew: the seeds, the same ones for
all settings, so that what a seed does to all settings cancels in a difference, and the test rows, the same ones for
all cells. These are crossed factors, as a row is met under every seed.

Let c_j be the weight of cell j, d_j what cell j lies above its setting's mean, and g_k the sum of c_j d_j over the
cells of seed k, one of S. Then the seeds' part of the variance is S / (S - 1) sum g_k^2: for one setting, the variance
of its cells over S. The rows' part is the same of the rows' own sums. Both hold the part that is of neither, so it is
taken off one of them (two-way random effects: Owen and Eckles 2012, section 3; Cameron, Gelbach and Miller 2011,
section 2.2). Each part has an interval by Student's t of its own degrees of freedom, and the squares of their halves
are added (Zou and Donner 2008, section 2). So with few seeds the seeds' part is wide, as it must be, and where seeds
are all that matters the interval is that of a t-test over seeds.

- Several kinds of seeds that vary by themselves (`seed` and `seed_split`, say) are crossed factors, each with a part
  of its own, and never more replicates of one. Another split has other test rows, so its part holds that of the rows.
- With one seed nothing is known of seeds, and the interval is over the test rows only.
- Where nobody knows which rows a cell hits, only how many, the rows' part is an upper bound: for a mean all cells hit
  the same rows, for a difference other ones.
- A share of n rows that hits all of them, or none, has no variance of its own. So it is at least 2 / (n + 4)^2, which
  is what two hits more and two misses more would give (Agresti and Coull 1998).

`python -m benchmarks coverage` simulates how often the intervals hold the truth, and how often a verdict is false.
"""

import math
from dataclasses import dataclass

import numpy as np

from minilora.tasks.student import quantile

DRAWS = 1000
AT_ONCE = 1 << 24  # numbers held at once: 64 MiB


@dataclass(frozen=True)
class Sample:
    """One figure of N cells.

    `values` [N]; `rows` [N], how many test rows each is of; `errors` [N], its standard error over these; `settings` [N]
    numbers 0 to S - 1 all that is not a seed; `factors` [F, N] numbers the levels of each kind of seed that varies.
    `over_rows`: whether the rows are a factor too. `hits` [N, R]: what each of R rows adds to the cell's value, less
    its mean; None where that is not known.
    """

    values: np.ndarray
    rows: np.ndarray
    errors: np.ndarray
    settings: np.ndarray
    factors: np.ndarray
    over_rows: bool = True
    hits: np.ndarray | None = None

    def means(self):
        """Each setting's mean over its cells, [S]."""
        return np.bincount(self.settings, self.values) / np.bincount(self.settings)


@dataclass(frozen=True)
class Estimate:
    """A statistic: its value, and what its interval is made of.

    `by_seeds` and `by_rows` are parts (variance, degrees of freedom); `seeds` is the least number of levels that a kind
    of seed has in a setting (1 without any); `limits` are those of the statistic.
    """

    value: float
    by_seeds: tuple
    by_rows: tuple
    seeds: int
    limits: tuple = (-math.inf, math.inf)

    def half(self, share):
        """Half of the interval that leaves 1 - `share` on either side."""
        parts = self.by_seeds + self.by_rows
        return sum(variance * quantile(share, degrees) ** 2 for variance, degrees in parts) ** 0.5

    def p(self, bound):
        """The one-sided p-value that the statistic is above `bound`: the share beyond the interval that ends there."""
        away = abs(self.value - bound)
        low, high = 0.5, 1 - 1e-12
        if self.half(high) > away:
            while high - low > 1e-12:
                middle = (low + high) / 2
                low, high = (middle, high) if self.half(middle) < away else (low, middle)
        return 1 - high if self.value > bound else high

    @property
    def interval(self):
        """(low, high) at 95%, within the limits."""
        low, high = self.limits
        half = float(self.half(0.975))
        return max(low, self.value - half), min(high, self.value + half)

    def three(self):
        return self.value, *self.interval


def estimate(sample, weights, signed=False):
    """An `Estimate` for each row of `weights` [V, S]. `signed`: whether the figure itself may be below 0."""
    means = sample.means()
    return [estimate_one(sample, one, means, signed) for one in weights]


def estimate_one(sample, weights, means, signed):
    used = weights[sample.settings] != 0
    shares = (weights / np.bincount(sample.settings))[sample.settings][used]  # c [N]
    own = shares * (sample.values - means[sample.settings])[used]
    factors, settings = sample.factors[:, used], sample.settings[used]
    levels = [least_levels(settings, factor) for factor in factors]
    by_factor = [sums for factor in factors if len(sums := sums_by(factor, own)) > 1]
    rest = rest_of(by_factor, sums_by(combined(factors), own)) if len(by_factor) > 1 else 0.0
    by_seeds = sorted(map(part_of, by_factor), key=lambda part: part[1])
    by_seeds = [(max(0.0, variance - rest * (place > 0)), n) for place, (variance, n) in enumerate(by_seeds)]
    by_rows = [row_part(sample, used, shares, combined(factors), weights)] if sample.over_rows else []
    rows = float(sample.rows[used].min())
    apart = max(weights.sum() ** 2, (weights**2).sum())  # 1 for a mean, whose settings may hit the same rows
    least = 2 * float(apart) / (rows + 4) ** 2 - sum(variance for variance, _ in by_seeds + by_rows)
    by_rows += [(least, max(1.0, rows - 1))] if least > 0 else []
    limits = (-1.0 * signed, 1.0) if np.isclose(weights.sum(), 1) else (-math.inf, math.inf)
    return Estimate(float(weights @ means), tuple(by_seeds), tuple(by_rows), min(levels, default=1),
                    limits)  # fmt: skip


def least_levels(settings, factor):
    return min(len(np.unique(factor[settings == one])) for one in np.unique(settings))


def combined(factors):
    """The number of each cell's combination of levels, [N]."""
    if not len(factors):
        return np.zeros(factors.shape[1], int)
    return np.unique(factors, axis=1, return_inverse=True)[1].ravel()


def sums_by(numbers, values):
    """Sums of `values` [N, ...] with the same of `numbers` [N], those that occur."""
    numbers = np.unique(numbers, return_inverse=True)[1].ravel()
    found = np.zeros((numbers.max() + 1, *values.shape[1:]))
    np.add.at(found, numbers, values)
    return found


def part_of(sums):
    """(S / (S - 1) of the sum of squares, S - 1)."""
    return len(sums) / (len(sums) - 1) * float((sums**2).sum()), len(sums) - 1


def rest_of(by_factor, by_cell):
    """The variance that is of no one factor, which each factor's part holds once."""
    count = len(by_cell)
    degrees = count - 1 - sum(len(sums) - 1 for sums in by_factor)
    left = (by_cell**2).sum() - sum((sums**2).sum() * len(sums) / count for sums in by_factor)
    return count * max(0.0, float(left)) / degrees if degrees > 0 else 0.0


def row_part(sample, used, shares, seeds, weights):
    """(Variance, degrees) of the test rows, less what the seeds' part holds of it."""
    rows, count = max(2.0, float(sample.rows[used].min())), seeds.max() + 1
    if sample.hits is None:
        errors = np.bincount(sample.settings[used], np.abs(shares) * sample.errors[used], len(weights))  # of settings
        bound = errors.sum() ** 2 if np.isclose(weights.sum(), 1) else (errors**2).sum()
        return float(bound), rows - 1
    own = shares[:, None] * sample.hits[used]
    by_seed = np.stack([own[seeds == one].sum(axis=0) for one in range(count)])  # [seeds, R]
    by_row = by_seed.sum(axis=0)
    number = max(rows, float((sample.hits[used] != 0).any(axis=0).sum()))
    variance = number / (number - 1) * float((by_row**2).sum())
    if count > 1:
        left = max(0.0, float((by_seed**2).sum() - (by_row**2).sum() / count))
        variance -= count * number * left / ((count - 1) * (number - 1))
    return max(0.0, variance), number - 1


# --- for what is no sum of means


def interval(draws, values):
    """The 95% percentile interval [V, 2] of `draws` [draws, V], widened where it would not hold `values` [V]."""
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    return np.stack([np.minimum(low, values), np.maximum(high, values)], axis=-1)


def bootstrap(sample, draws=DRAWS):
    """Draws [draws, S] of the settings' means of shares; the same at each call.

    Seeds: S - 1 of S are drawn with replacement, which gives a mean of S its own variance (Rao and Wu 1988, section 2);
    where a draw has no seed of a setting, that setting keeps all of its own.
    Rows: a share of k in n from Beta(k + 1/2, n - k + 1/2),
    whose percentiles are Jeffreys' interval (Brown, Cai and DasGupta 2001, section 3.1.3).
    """
    rng = np.random.default_rng(0)
    order = np.argsort(sample.settings, kind="stable")
    hits, rows = (sample.values * sample.rows)[order], sample.rows[order]
    seeds, settings = combined(sample.factors)[order], sample.settings[order]
    starts = np.flatnonzero(np.diff(settings, prepend=-1))
    count = seeds.max() + 1
    values = rng.beta(hits + 0.5, rows - hits + 0.5, (draws, len(hits)))
    times = rng.multinomial(max(1, count - 1), np.full(count, 1 / count), draws)[:, seeds]
    times += (np.add.reduceat(times, starts, axis=1) == 0)[:, settings]
    return np.add.reduceat(values * times, starts, axis=1) / np.add.reduceat(times, starts, axis=1)
