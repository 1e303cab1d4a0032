"""95% intervals of a grid's figures. NumPy arrays in, arrays out.

A figure of a cell is a share of test rows, or one share less another. A statistic is a sum of the settings' means
under fixed weights: a mean, a difference, or a slope. It varies with what is drawn anew: the seeds, the same ones for
all settings, so that what a seed does to all settings cancels in a difference, and the test rows, the same ones for
all cells. These are crossed factors, as a row is met under every seed.

Let c_j be the weight of cell j, d_j what cell j lies above its setting's mean, and g_k the sum of c_j d_j over the
cells of seed k, one of S. Then the seeds' part of the variance is S / (S - 1) sum g_k^2: for one setting, the variance
of its cells over S. The rows' part is the same of the rows' own sums. Both hold the part that is of neither, so it is
taken off once (two-way random effects: Owen and Eckles 2012, section 3; Cameron, Gelbach and Miller 2011, section 2.2).
The interval is Student's, with the degrees of freedom of Satterthwaite 1946. With few seeds these are few, and the
interval is wide, as it must be.

- Several kinds of seeds that vary by themselves (`seed` and `seed_split`, say) are crossed factors, each with a part
  of its own, and never more replicates of one. Another split has other test rows, so its part holds that of the rows.
- With one seed nothing is known of seeds, and the interval is over the test rows only.
- Where nobody knows which rows a cell hits, only how many, the rows' part is an upper bound: for a mean all cells hit
  the same rows, for a difference other ones.
- A share of n rows that hits all of them, or none, has no variance of its own. So 2 / (n + 4)^2 is added, which is what
  two hits more and two misses more would give (Agresti and Coull 1998).

`python -m benchmarks coverage` simulates how often the intervals hold the truth, and how often a verdict is false.
"""

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
    """A statistic: its value, standard error, degrees of freedom, and the ends of its 95% interval, within `limits`.

    `seeds` is the least number of levels that a kind of seed has in a setting (1 without any); `seed_variance` is the
    part of the squared error that more seeds would lower.
    """

    value: float
    error: float
    degrees: float
    seeds: int
    seed_variance: float
    limits: tuple = (-np.inf, np.inf)

    @property
    def interval(self):
        return self.ends(0.975)

    def ends(self, share):
        """(low, high) of the interval that leaves 1 - `share` on either side."""
        half = self.error * quantile(share, self.degrees)
        low, high = self.limits
        return max(low, self.value - half), min(high, self.value + half)

    def three(self):
        return self.value, *self.interval


def estimate(sample, weights, signed=False):
    """An `Estimate` for each row of `weights` [V, S]. `signed`: whether the figure itself may be below 0."""
    means = sample.means()
    return [estimate_one(sample, one, float(one @ means), means, signed) for one in weights]


def estimate_one(sample, weights, value, means, signed):
    used = weights[sample.settings] != 0
    shares = (weights / np.bincount(sample.settings))[sample.settings][used]  # c [N]
    own = shares * (sample.values - means[sample.settings])[used]
    factors, settings = sample.factors[:, used], sample.settings[used]
    levels = [least_levels(settings, factor) for factor in factors]
    parts = [part_of(sums_by(factor, own)) for factor in factors]
    parts = [(variance, degrees, 1) for variance, degrees in parts if degrees]
    if len(parts) > 1:
        parts.append(rest_of([sums_by(factor, own) for factor in factors],
                             sums_by(combined(factors), own), 1 - len(parts)))  # fmt: skip
    seeds = max([sum(variance * sign for variance, _, sign in parts)] + [v for v, _, sign in parts if sign == 1]
                + [0.0])  # fmt: skip
    if sample.over_rows:
        parts += row_parts(sample, used, shares, combined(factors), weights)
    variance = max([sum(variance * sign for variance, _, sign in parts)] + [v for v, _, sign in parts if sign == 1])
    spread = sum((sign * part) ** 2 / degrees for part, degrees, sign in parts)
    degrees = max(min((d for _, d, sign in parts if sign == 1), default=1), variance**2 / spread) if spread else 1
    together = float(np.isclose(weights.sum(), 1)) and not signed
    return Estimate(value, float(variance**0.5), float(degrees), min(levels, default=1), float(seeds),
                    (0.0, 1.0) if together else (-np.inf, np.inf))  # fmt: skip


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
    count = len(sums)
    return (count / (count - 1) * float((sums**2).sum()), count - 1) if count > 1 else (0.0, 0)


def rest_of(by_factor, by_cell, sign):
    """(What the factors hold in common, its degrees, `sign`): the variance that is of no one factor."""
    count = len(by_cell)
    degrees = count - 1 - sum(len(sums) - 1 for sums in by_factor)
    left = (by_cell**2).sum() - sum((sums**2).sum() * len(sums) / count for sums in by_factor)
    return (count * max(0.0, float(left)) / degrees, degrees, sign) if degrees > 0 else (0.0, 1, sign)


def row_parts(sample, used, shares, seeds, weights):
    """[(variance, degrees, sign)] of the test rows."""
    rows, count = float(sample.rows[used].min()), seeds.max() + 1
    apart = max(weights.sum() ** 2, (weights**2).sum())  # 1 for a mean, whose settings may hit the same rows
    floor = 2 * apart / (rows + 4) ** 2
    if sample.hits is None:
        errors = np.bincount(sample.settings[used], (np.abs(shares) * sample.errors[used]), len(weights))  # of settings
        bound = errors.sum() ** 2 if np.isclose(weights.sum(), 1) else (errors**2).sum()
        return [(float(bound) + floor, max(1.0, rows - 1), 1)]
    own = shares[:, None] * sample.hits[used]
    by_seed = np.stack([own[seeds == one].sum(axis=0) for one in range(count)])  # [seeds, R]
    there = (sample.hits[used] != 0).any(axis=0)
    by_row = by_seed.sum(axis=0)
    total = max(2, int(there.sum()), int(rows))
    parts = [(total / (total - 1) * float((by_row**2).sum()) + floor, total - 1, 1)]
    if count > 1:
        left = float((by_seed**2).sum() - (by_row**2).sum() / count)
        degrees = (count - 1) * (total - 1)
        parts.append((count * total * max(0.0, left) / degrees, degrees, -1))
    return parts


# --- for what is no sum of means


def interval(draws, values):
    """The 95% percentile interval [V, 2] of `draws` [draws, V], widened where it would not hold `values` [V]."""
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    return np.stack([np.minimum(low, values), np.maximum(high, values)], axis=-1)


def bootstrap(sample, draws=DRAWS):
    """Draws [draws, S] of the settings' means of shares; the same at each call.

    Seeds: S - 1 of S are drawn with replacement, which gives a mean of S its own variance (Rao and Wu 1988, section 2);
    a setting of which a draw has no seed keeps all of its own. Rows: a share of k in n from Beta(k + 1/2, n - k + 1/2),
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
