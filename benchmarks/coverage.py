"""How often the 95% intervals of a grid's report hold the truth, and how often a verdict is false, by simulation.

A row i under seed k in setting s is hit where a_s + u_k + v_sk + r_i + w_si + e > 0: normal effects of the seed, of the
seed in this setting, of the row, of the row in this setting, and noise. So the true share of setting s is known:
Phi(a_s / sd of the rest). A false verdict is a claim that the statistic is above its true value, supported or
contradicted, or (for `within`) that it is nearer to 0 than it is, supported.

    python -m benchmarks coverage --trials 4000
"""

import itertools
import math
from statistics import NormalDist

import numpy as np

from minilora.command import Parser
from minilora.report.intervals import Sample, estimate
from minilora.report.verdicts import FEW

SHARES = {  # of each setting, and the weights of the statistic
    "mean of 1 setting": ([0.3], [1]),
    "mean of 4 settings": ([0.15, 0.3, 0.5, 0.8], [0.25] * 4),
    "mean near 1": ([0.97, 0.98], [0.5, 0.5]),
    "difference": ([0.6, 0.35], [1, -1]),
    "slope": ([0.2, 0.3, 0.45, 0.6], [-0.3, -0.1, 0.1, 0.3]),
}
SPREADS = {  # standard deviations of seed, seed in setting, row, row in setting; the noise has 1
    "seeds differ": (0.4, 0.3, 1.0, 0.3),
    "rows differ": (0.1, 0.05, 1.5, 0.3),
}
SEEDS = (2, 3, 5, 10)
ROWS = 150


def draw(rng, shares, spread, seeds, splits, rows):
    """Hits bool [settings, seeds, splits, rows]; each split has rows of its own, and an effect like a seed's."""
    a, b, c, d = spread
    count = len(shares)
    total = math.sqrt(a**2 + b**2 + c**2 + d**2 + 1 + (a**2 + b**2) * (splits > 1))
    own = np.array([NormalDist().inv_cdf(share) * total for share in shares]).reshape(-1, 1, 1, 1)
    own = own + a * rng.standard_normal((1, seeds, 1, 1)) + b * rng.standard_normal((count, seeds, 1, 1))
    own = own + c * rng.standard_normal((1, 1, splits, rows)) + d * rng.standard_normal((count, 1, splits, rows))
    if splits > 1:
        own = own + a * rng.standard_normal((1, 1, splits, 1)) + b * rng.standard_normal((count, 1, splits, 1))
    return own + rng.standard_normal((count, seeds, splits, rows)) > 0


def sample_of(hits):
    """The `Sample` that a report makes of hits [settings, seeds, splits, rows]."""
    settings, seeds, splits, rows = hits.shape
    places = np.array(list(itertools.product(range(settings), range(seeds), range(splits))))
    own = hits.reshape(-1, rows).astype(float)
    values = own.mean(axis=1)
    factors = [places[:, 1]] + ([places[:, 2]] if splits > 1 else [])
    factors = np.array([one for one in factors if one.max()]).reshape(-1, len(places))
    errors = np.sqrt(values * (1 - values) / rows)
    centred = (own - values[:, None]) / rows
    return Sample(values, np.full(len(values), float(rows)), errors, places[:, 0], factors, splits == 1,
                  centred if splits == 1 else None)  # fmt: skip


def simulate(statistic, spread, seeds, trials, rng, splits=1, rows=ROWS):
    """(Share of the intervals that hold the truth, share of false verdicts about a threshold at the truth, and about a
    margin there)."""
    shares, weights = SHARES[statistic]
    weights = np.array(weights, dtype=float)
    truth = float(weights @ shares)
    held = false = alike = 0
    for _ in range(trials):
        [found] = estimate(sample_of(draw(rng, shares, SPREADS[spread], seeds, splits, rows)), weights[None])
        outside = abs(found.value - truth) > found.half(0.975)
        held += not outside
        false += outside and found.seeds >= FEW
        alike += abs(found.value) + found.half(0.95) < abs(truth) and found.seeds >= FEW
    return held / trials, false / trials, alike / trials


def cases():
    """(statistic, spread, seeds, splits) of every line."""
    for statistic, spread, seeds in itertools.product(SHARES, SPREADS, SEEDS):
        yield statistic, spread, seeds, 1
    for statistic, splits in itertools.product(("mean of 4 settings", "difference", "slope"), (3, 5)):
        yield statistic, "seeds differ", splits, splits


def main(argv):
    parser = Parser(prog="python -m benchmarks coverage", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--trials", type=int, default=2000, help="simulated grids of each line (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    rng = np.random.default_rng(given.seed)
    print("| statistic | variance | seeds | splits | coverage | false verdict | falsely alike |")
    print("|---|---|---|---|---|---|---|")
    for statistic, spread, seeds, splits in cases():
        found = simulate(statistic, spread, seeds, given.trials, rng, splits)
        figures = " | ".join(f"{100 * share:.1f}%" for share in found)
        print(f"| {statistic} | {spread} | {seeds} | {splits} | {figures} |", flush=True)
