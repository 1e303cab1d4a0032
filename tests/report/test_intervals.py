"""Intervals and dose-response fits, against formulas and a likelihood written out."""

import itertools
import math

import numpy as np
import pytest

from minilora.report import intervals
from minilora.report.dose_response import fit_k50, logistic
from minilora.report.intervals import Sample

MANY = 10**9  # test rows, so many that they add nothing to an interval


def sample_of(values, rows=MANY, down=None):
    """A sample of `values` [settings, seeds], NaN where there is no cell."""
    places = np.argwhere(~np.isnan(values))
    up = np.rint(values[tuple(places.T)] * rows).astype(int)
    return Sample(up, down, np.full(len(up), rows), places[:, 1], places[:, 0])


def beta_quantiles(hits, misses, shares):
    """Of the distribution Beta(hits, misses), by summing its density."""
    x = np.linspace(0, 1, 2_000_001)[1:-1]
    density = np.exp((hits - 1) * np.log(x) + (misses - 1) * np.log1p(-x)
                     + math.lgamma(hits + misses) - math.lgamma(hits) - math.lgamma(misses))  # fmt: skip
    return np.interp(shares, np.cumsum(density) * (x[1] - x[0]), x)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("hits,rows", [(3, 17), (40, 81), (399, 400)])
def test_one_cell_has_jeffreys_interval(hits, rows, together):
    one = Sample(np.array([hits]), None, np.array([rows]), np.array([0]), np.array([0]))
    [value], [found] = intervals.estimate(one, np.eye(1), together)
    wanted = beta_quantiles(hits + 0.5, rows - hits + 0.5, [0.025, 0.975])
    assert value == hits / rows and np.allclose(found, wanted, atol=0.12 * (wanted[1] - wanted[0]))
    draws = intervals.bootstrap(one, np.eye(1), together, draws=40_000)
    middle = beta_quantiles(hits + 0.5, rows - hits + 0.5, [0.025, 0.25, 0.5, 0.75, 0.975])
    assert np.allclose(np.quantile(draws, [0.025, 0.25, 0.5, 0.75, 0.975]), middle, atol=0.01)


@pytest.mark.parametrize("together", [True, False])
def test_intervals_have_width_and_hold_their_value(together):
    hits = np.array([0, 50, 50, 50, 0])
    cells = Sample(hits, None, np.full(5, 50), np.zeros(5, int), np.arange(5))
    values, found = intervals.estimate(cells, np.vstack([np.eye(5), np.full((1, 5), 0.2)]), together)
    assert np.allclose(values, [0, 1, 1, 1, 0, 0.6])
    assert ((found[:, 0] <= values) & (values <= found[:, 1])).all() and (found[:, 1] - found[:, 0] > 0.01).all()
    assert found[0, 0] == 0 and found[1, 1] == 1


def test_rows_that_are_together():
    rng = np.random.default_rng(0)
    hits, rows = np.array([7, 0, 30, 7, 12, 3]), np.array([30, 30, 30, 30, 30, 90])
    draws = intervals.draw_together(rng, hits, rows, 20_000)
    same = draws[:, :5]
    assert (np.diff(same[:, np.argsort(hits[:5], kind="stable")], axis=1) >= 0).all()
    assert (same[:, 0] == same[:, 3]).all() and abs(np.corrcoef(draws[:, 0], draws[:, 5])[0, 1]) < 0.05
    a, b = hits + 0.5, rows - hits + 0.5
    assert np.allclose(draws.mean(axis=0), a / (a + b), atol=0.003)
    assert np.allclose(draws.var(axis=0), a * b / (a + b) ** 2 / (a + b + 1), rtol=0.06, atol=1e-5)


def test_a_mean_is_wider_with_its_rows_together():
    cells = Sample(np.full(40, 100), None, np.full(40, 200), np.zeros(40, int), np.arange(40))
    together, apart = (intervals.bootstrap(cells, np.full((1, 40), 1 / 40), way, 20_000).std() for way in (True, False))
    one = math.sqrt(0.25 / 202)
    assert together == pytest.approx(one, rel=0.05) and apart == pytest.approx(one / math.sqrt(40), rel=0.05)


def test_differences_of_shares():
    up, down, rows = np.array([30, 5]), np.array([10, 5]), np.array([100, 61])
    cells = Sample(up, down, rows, np.zeros(2, int), np.arange(2))
    assert np.allclose(cells.means(), [0.2, 0])
    draws = intervals.bootstrap(cells, np.eye(2), False, 40_000)
    total = rows + 1
    p, q = (up + 0.5) / total, (down + 0.5) / total
    assert np.allclose(draws.mean(axis=0), p - q, atol=0.002)
    assert np.allclose(draws.var(axis=0), (p + q - (p - q) ** 2) / (total + 1), rtol=0.04)  # Dirichlet's
    draws = intervals.bootstrap(cells, np.eye(2), True, 40_000)
    assert np.allclose(draws.mean(axis=0), p - q, atol=0.002)
    assert np.allclose(draws.var(axis=0), (p + q - (p - q) ** 2) / (total + 1), rtol=0.1)


# --- seeds


def test_seeds_give_a_mean_its_variance():
    values = np.array([[0.1, 0.25, 0.3, 0.55, 0.6, 0.8, 0.35]])
    draws = intervals.bootstrap(sample_of(values), np.eye(1), True, 40_000)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.003)
    assert draws.var() == pytest.approx(values.var(ddof=1) / 7, rel=0.04)
    two = np.unique(np.round(intervals.bootstrap(sample_of(values[:, :2]), np.eye(1), True), 3))
    assert two.tolist() == [0.1, 0.25]


def test_all_settings_have_the_same_seeds():
    effect = np.array([0.1, 0.3, 0.2, 0.45])
    cells = sample_of(np.stack([effect, effect + 0.2, 0.9 - effect]))
    weights = np.array([[-1.0, 1, 0], [0.5, 0, 0.5], [0, 0, 1]])
    values, found = intervals.estimate(cells, weights, together=False)
    assert np.allclose(values, [0.2, 0.45, 0.9 - effect.mean()])
    assert np.allclose(found[:2], values[:2, None], atol=1e-3) and found[2, 1] - found[2, 0] > 0.1


def test_a_setting_whose_seeds_are_not_drawn():
    values = np.array([[0.2, 0.4, 0.6, 0.8], [0.5, np.nan, np.nan, np.nan], [np.nan, 0.1, 0.3, np.nan]])
    draws = intervals.bootstrap(sample_of(values), np.eye(3), True, 4000)
    assert np.allclose(draws[:, 1], 0.5, atol=1e-3) and set(np.unique(draws[:, 2].round(2))) == {
        0.1,
        0.17,
        0.2,
        0.23,
        0.3,
    }
    assert np.allclose(sample_of(values).means(), [0.5, 0.5, 0.2])


def test_draws_do_not_depend_on_the_order_of_cells(monkeypatch):
    rng = np.random.default_rng(5)
    cells = sample_of(rng.random((6, 3)), rows=50)
    weights = rng.random((2, 6))
    before = intervals.estimate(cells, weights, True)
    assert all(np.array_equal(a, b) for a, b in zip(before, intervals.estimate(cells, weights, True)))
    order = rng.permutation(18)
    mixed = Sample(cells.up[order], None, cells.rows[order], cells.seeds[order], cells.settings[order])
    assert np.allclose(mixed.means(), cells.means())
    assert np.allclose(intervals.estimate(mixed, weights, True)[1], before[1])
    monkeypatch.setattr(intervals, "AT_ONCE", 100)  # some draws at a time
    draws = intervals.bootstrap(cells, weights, True)
    assert draws.shape == (intervals.DRAWS, 2)
    assert np.allclose(intervals.interval(draws, before[0]), before[1], atol=0.03)


# --- dose and response

DOSES = np.array([9.0, 45, 90, 225, 450])


def test_the_logistic_is_half_at_k50():
    for k50, slope, floor in itertools.product((3.0, 60.0), (0.5, 4.0), (0.0, 0.3, 0.49)):
        assert logistic(k50, k50, slope, floor) == pytest.approx(0.5)
        assert logistic(1e-30, k50, slope, floor) == pytest.approx(floor, abs=1e-6)
        assert logistic(1e30, k50, slope, floor) == pytest.approx(1)
        eta = [math.log((p - floor) / (1 - p)) for p in logistic(np.array([5.0, 50]), k50, slope, floor)]
        assert (eta[1] - eta[0]) / math.log(10) == pytest.approx(slope)


@pytest.mark.parametrize("k50,slope,floor", [(60.0, 2.0, 0.12), (150.0, 0.8, 0.0), (20.0, 5.0, 0.4)])
def test_fits_find_the_curve_behind_shares(k50, slope, floor):
    shares = logistic(DOSES, k50, slope, floor)[None]
    [found], [steepness] = fit_k50(DOSES, shares, np.full(5, 300), floor)
    assert found == pytest.approx(k50, rel=0.03) and steepness == pytest.approx(slope, rel=0.1)


def test_fits_have_the_greatest_likelihood():
    rng, rows, floor = np.random.default_rng(3), np.array([40, 30, 60, 50, 20]), 0.1
    shares = rng.binomial(rows, logistic(DOSES, 100, 1.5, floor), (6, 5)) / rows
    found = np.stack(fit_k50(DOSES, shares, rows, floor), axis=1)

    def likelihood(own, k50, slope):
        total = 0
        for dose, share, n in zip(DOSES, own, rows, strict=True):
            p = floor + (1 - floor) / (1 + (0.5 / (0.5 - floor)) * (k50 / dose) ** slope)
            total += n * (share * math.log(p) + (1 - share) * math.log(1 - p))
        return total

    for own, (k50, slope) in zip(shares, found, strict=True):
        best = likelihood(own, k50, slope)
        others = [likelihood(own, k50 * a, slope * b) for a in (0.8, 0.95, 1, 1.05, 1.25) for b in (0.7, 1, 1.4)]
        assert best >= max(others) - 0.02
    assert len({tuple(row) for row in found}) == 6


def test_fits_of_no_and_full_response():
    floor, rows = 0.15, np.full(5, 200)
    shares = np.array([[0.15] * 5, [1.0] * 5, [0.15, 0.15, 1, 1, 1]])
    low, high, between = fit_k50(DOSES, shares, rows, floor)[0]
    assert low > DOSES.max() and high < DOSES.min() and 45 < between < 90
