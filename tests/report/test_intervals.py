"""Intervals and dose-response fits, against t-tests, variance components and a likelihood written out."""

import itertools
import math
import statistics

import numpy as np
import pytest

from benchmarks import coverage
from minilora.report import intervals
from minilora.report.dose_response import fit_logistic, logistic, net_k50
from minilora.report.intervals import Sample
from minilora.tasks.student import quantile, tail

# --- Student's t, as scipy 1.17.1 gives it

TAILS = [
    (0.0, 3, 0.5),
    (0.5, 1, 0.35241638234956674),
    (2.5, 2, 0.06480586011075541),
    (12.0, 2, 0.00343646683857923),
    (1.3, 2.37, 0.15280438756350895),
    (4.303, 2, 0.02499626249260725),
    (-1.7, 5, 0.925061606575838),
    (3.2, 9, 0.005415651294950661),
    (40.0, 4, 1.1670081613006339e-06),
    (1.96, 150, 0.02592449296795906),
    (5.0, 1000000.0, 2.8669989354453723e-07),
]
QUANTILES = [
    (0.975, 1, 12.706204736174694),
    (0.975, 2, 4.302652729749462),
    (0.95, 2, 2.9199855803537242),
    (0.8, 2, 1.0606601717798214),
    (0.975, 4.6, 2.639291609747002),
    (0.025, 9, -2.2621571627982053),
    (0.975, 149, 1.976013177689192),
    (0.999999, 3, 103.29946777942898),
    (0.975, 1000000.0, 1.959966356814107),
]


def test_students_t():
    for t, degrees, wanted in TAILS:
        assert tail(t, degrees) == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    for share, degrees, wanted in QUANTILES:
        assert quantile(share, degrees) == pytest.approx(wanted, rel=1e-9)
    assert len(TAILS) == 11 and len(QUANTILES) == 9
    for t in (-3.0, 0.2, 7.5):  # closed forms of one and two degrees of freedom
        assert tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-12)
        assert tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-12)
    assert tail(math.inf, 3) == 0 and tail(-math.inf, 3) == 1 and quantile(0.5, 3) == 0


# --- statistics

MANY = 10**9  # test rows, so many that they add nothing


def sample_of(values, rows=MANY):
    """A sample of `values` [settings, seeds], NaN where there is no cell, of which only counts are known."""
    places = np.argwhere(~np.isnan(values))
    own = values[tuple(places.T)]
    return Sample(own, np.full(len(own), float(rows)), np.sqrt(own * (1 - own) / rows), places[:, 0],
                  places[:, 1][None])  # fmt: skip


def t_interval(values):
    """That of the t-test of one sample."""
    t = {2: 12.706204736, 3: 4.302652730, 5: 2.776445105}[len(values)]
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_with_many_rows_an_interval_is_that_of_a_t_test(seeds):
    rng = np.random.default_rng(seeds)
    values = 0.5 + 0.02 * rng.standard_normal((3, seeds)) + 0.03 * rng.standard_normal(seeds)
    cases = [[1.0, 0, 0], [1 / 3] * 3, [1.0, -1, 0], [-0.5, 0.1, 0.4]]
    for weights, found in zip(cases, intervals.estimate(sample_of(values), np.array(cases)), strict=True):
        own = (np.array(weights)[:, None] * values).sum(axis=0)
        assert found.interval == pytest.approx(t_interval(own.tolist()), abs=2e-6) and found.seeds == seeds
        low, _ = found.interval
        assert found.p(low) == pytest.approx(0.025, abs=1e-4) and found.p(found.value + 1e-9) > 0.49
    assert len(cases) == 4


def test_seeds_and_rows_are_crossed():
    """The parts by the mean squares of a two-way table, with a t-interval each."""
    rng = np.random.default_rng(8)
    own = (0.3 * rng.standard_normal((4, 1)) + rng.standard_normal(90) + rng.standard_normal((4, 90)) > 0.4) * 1.0
    values = own.mean(axis=1)
    cells = Sample(values, np.full(4, 90.0), np.sqrt(values * (1 - values) / 90), np.zeros(4, int),
                   np.arange(4)[None], True, (own - values[:, None]) / 90)  # fmt: skip
    [found] = intervals.estimate(cells, np.eye(1))
    by_seed = values.var(ddof=1) / 4
    rest = own - own.mean(axis=1, keepdims=True) - own.mean(axis=0) + own.mean()
    both = (rest**2).sum() / (3 * 89) / (4 * 90)
    by_row = own.mean(axis=0).var(ddof=1) / 90 - both
    half = math.sqrt((3.182446305 * math.sqrt(by_seed)) ** 2 + 1.986978657**2 * by_row)
    assert found.by_seeds == (pytest.approx((by_seed, 3)),) and found.by_rows == (pytest.approx((by_row, 89)),)
    assert found.half(0.975) == pytest.approx(half) and by_row > 2 * both
    unknown = intervals.estimate(Sample(values, cells.rows, cells.errors, cells.settings, cells.factors), np.eye(1))
    assert unknown[0].half(0.975) > half


def test_split_and_seed_are_factors_and_no_replicates():
    """Nine cells of three splits, which differ, and three seeds, which do not: as much is known as from three."""
    places = np.array(list(itertools.product(range(3), range(3))))
    values = np.array([0.4, 0.5, 0.66])[places[:, 1]]
    cells = Sample(values, np.full(9, 1e6), np.zeros(9), np.zeros(9, int), places.T, False)
    [found] = intervals.estimate(cells, np.eye(1))
    assert found.interval == pytest.approx(t_interval([0.4, 0.5, 0.66]), abs=1e-4)
    replicates = intervals.estimate(Sample(values, cells.rows, cells.errors, cells.settings, np.arange(9)[None], False),
                                    np.eye(1))  # fmt: skip
    assert replicates[0].half(0.975) < found.half(0.975) / 2


def test_intervals_have_width_and_limits():
    for values in (np.ones((1, 3)), np.zeros((2, 3))):
        for found in intervals.estimate(sample_of(values, rows=50), np.eye(len(values))):
            low, high = found.interval
            assert 0 <= low < high <= 1 and 0.03 < high - low < 0.08
    [one] = intervals.estimate(sample_of(np.array([[0.3]]), rows=200), np.eye(1))
    assert one.seeds == 1 and one.half(0.975) == pytest.approx(1.972 * math.sqrt(0.21 / 200), rel=1e-3)
    [signed] = intervals.estimate(sample_of(np.array([[0.9, 0.1, 0.5]])), np.eye(1), signed=True)
    assert signed.interval[0] < 0 and signed.interval[1] == 1


def test_a_setting_that_lacks_seeds():
    values = np.array([[0.2, 0.4, 0.6, 0.8], [0.5, np.nan, np.nan, 0.6]])
    both, first = intervals.estimate(sample_of(values), np.array([[1.0, -1], [1, 0]]))
    assert both.seeds == 2 and first.seeds == 4 and both.value == pytest.approx(-0.05)


@pytest.mark.parametrize("statistic", list(coverage.SHARES))
@pytest.mark.parametrize("seeds,splits", [(3, 1), (5, 1), (4, 4)])
def test_intervals_hold_the_truth_and_verdicts_are_seldom_false(statistic, seeds, splits):
    """As `python -m benchmarks coverage` with fixed draws: 95% within what 900 trials allow (3 standard errors)."""
    rng = np.random.default_rng(11)
    held = false = 0
    for spread in coverage.SPREADS:
        one, other, _ = coverage.simulate(statistic, spread, seeds, 450, rng, splits)
        held, false = held + one / 2, false + other / 2
    noise = 3 * math.sqrt(0.95 * 0.05 / 900)
    assert held >= 0.95 - noise and false <= 0.05 + noise
    assert held <= (1 if statistic == "mean near 1" or splits > 1 else 0.97 + noise)


def test_the_simulation_notices_intervals_that_leave_out_the_rows():
    rng, held = np.random.default_rng(3), 0
    for _ in range(300):
        hits = coverage.draw(rng, [0.3], (0.05, 0, 1.5, 0), 10, 1, 60)
        one = coverage.sample_of(hits)
        one = Sample(one.values, one.rows, one.errors, one.settings, one.factors, False)
        [found] = intervals.estimate(one, np.eye(1))
        held += abs(found.value - 0.3) < found.half(0.975)
    assert held / 300 < 0.8


# --- the bootstrap


def beta_quantiles(hits, misses, shares):
    """Of the distribution Beta(hits, misses), by summing its density."""
    x = np.linspace(0, 1, 2_000_001)[1:-1]
    density = np.exp((hits - 1) * np.log(x) + (misses - 1) * np.log1p(-x)
                     + math.lgamma(hits + misses) - math.lgamma(hits) - math.lgamma(misses))  # fmt: skip
    return np.interp(shares, np.cumsum(density) * (x[1] - x[0]), x)


@pytest.mark.parametrize("hits,rows", [(3, 17), (40, 81), (399, 400)])
def test_one_cell_has_jeffreys_draws(hits, rows):
    draws = intervals.bootstrap(sample_of(np.array([[hits / rows]]), rows), draws=40_000)
    middle = beta_quantiles(hits + 0.5, rows - hits + 0.5, [0.025, 0.25, 0.5, 0.75, 0.975])
    assert np.allclose(np.quantile(draws, [0.025, 0.25, 0.5, 0.75, 0.975]), middle, atol=0.01)


def test_seeds_give_a_mean_its_variance():
    values = np.array([[0.1, 0.25, 0.3, 0.55, 0.6, 0.8, 0.35]])
    draws = intervals.bootstrap(sample_of(values), draws=40_000)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.003)
    assert draws.var() == pytest.approx(values.var(ddof=1) / 7, rel=0.04)
    values = np.array([[0.2, 0.4, 0.6, 0.8], [0.5, np.nan, np.nan, np.nan]])
    assert np.allclose(intervals.bootstrap(sample_of(values))[:, 1], 0.5, atol=1e-3)


# --- dose and response

DOSES = np.array([9.0, 45, 90, 225, 450])


def test_the_logistic_is_half_at_k50():
    for k50, slope, floor in itertools.product((3.0, 60.0), (0.5, 4.0), (0.0, 0.3, 0.49)):
        assert logistic(k50, k50, slope, floor) == pytest.approx(0.5)
        assert logistic(1e-30, k50, slope, floor) == pytest.approx(floor, abs=1e-6)
        assert logistic(1e30, k50, slope, floor) == pytest.approx(1)
        eta = [math.log((p - floor) / (1 - p)) for p in logistic(np.array([5.0, 50]), k50, slope, floor)]
        assert (eta[1] - eta[0]) / math.log(10) == pytest.approx(slope)


CURVES = [(60.0, 2.0, 0.12, 1.0), (150.0, 0.8, 0.0, 1.0), (20.0, 5.0, 0.4, 1.0), (60.0, 2.5, 0.2, 0.8)]


@pytest.mark.parametrize("k50,slope,floor,top", CURVES)
def test_fits_find_the_curve_behind_shares(k50, slope, floor, top):
    doses = np.array([0, *DOSES, 1500])
    shares = logistic(doses, k50, slope, floor, top)[None]
    found = [values[0] for values in fit_logistic(doses, shares, np.full(7, 30_000))]
    assert found[0] == pytest.approx(k50, rel=0.05) and found[1] == pytest.approx(slope, rel=0.2)
    assert found[2] == pytest.approx(floor, abs=0.03) and found[3] == pytest.approx(top, abs=0.04)


def test_net_k50_is_half_a_row_above_the_floor():
    for k50, slope, floor, top in CURVES:
        found = net_k50(k50, slope, floor, top)
        assert logistic(found, k50, slope, floor, top) == pytest.approx(floor + 0.5)
    assert net_k50(60.0, 2.0, 0.3, 0.7) == math.inf  # it never rises by half


def test_fits_have_the_greatest_likelihood():
    rng, rows = np.random.default_rng(3), np.array([80, 40, 30, 60, 50, 20])
    doses = np.array([0, *DOSES])
    shares = rng.binomial(rows, logistic(doses, 100, 1.5, 0.1), (6, 6)) / rows
    found = np.stack(fit_logistic(doses, shares, rows), axis=1)

    def likelihood(own, k50, slope, floor, top):
        total = 0
        for dose, share, n in zip(doses, own, rows, strict=True):
            half = (0.5 - floor) / (top - floor)
            p = floor if dose == 0 else floor + (top - floor) / (1 + (1 / half - 1) * (k50 / dose) ** slope)
            p = min(max(p, 1e-6), 1 - 1e-6)
            total += n * (share * math.log(p) + (1 - share) * math.log(1 - p))
        return total

    for own, (k50, slope, floor, top) in zip(shares, found, strict=True):
        best = likelihood(own, k50, slope, floor, top)
        others = [likelihood(own, k50 * a, slope * b, min(0.48, max(0, floor + c)), d) for a in (0.8, 0.95, 1, 1.25)
                  for b in (0.7, 1, 1.4) for c in (-0.04, 0, 0.04) for d in (0.8, 1.0)]  # fmt: skip
        assert best >= max(others) - 0.05
    assert len({tuple(row) for row in found}) == 6


def test_fits_of_no_and_full_response():
    rows = np.full(6, 200)
    shares = np.array([[0.14] * 6, [0.14, *[1.0] * 5], [0.14, 0.14, 0.14, 1, 1, 1]])
    low, high, between = fit_logistic(np.array([0, *DOSES]), shares, rows)[0]
    assert low > DOSES.max() and high < DOSES.min() and 45 < between < 90
