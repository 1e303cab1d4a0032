"""Intervals of the diagnostics: over rows that are paired, by draws with a fixed seed."""

import functools

import numpy as np

DRAWS, LEVEL = 1000, 0.95
Z = 1.959963984540054  # of a normal distribution, for `LEVEL`


@functools.lru_cache(8)
def draws(count, seed):
    """How often each of `count` rows is in each draw, float64 [DRAWS, count]; the same for each seed."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)
    return drawn.astype(float)


def mean_interval(values, seed=0):
    """(mean, low, high) over rows, float64 [...] each; `values` [N, ...], NaN where a row has none.

    The percentile bootstrap over rows (Efron and Tibshirani 1993, section 13.3), 95%; all else shares the draws, so
    that what is compared stays paired.
    """
    values = np.asarray(values, float)
    there = np.isfinite(values)
    flat, seen = np.where(there, values, 0).reshape(len(values), -1), there.reshape(len(values), -1)
    if not len(values):
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing, nothing
    drawn = draws(len(values), seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, means = flat.sum(0) / seen.sum(0), (drawn @ flat) / (drawn @ seen)
    kept = np.where(np.isfinite(means), means, mean)  # a draw in which no row has a value says nothing
    ends = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return tuple(part.reshape(values.shape[1:]) for part in (mean, *ends))


def auc(high, low):
    """(area under the ROC curve, low, high end of its interval): how often a row of `high` exceeds one of `low`.

    high, low  [N, ...] of the same rows, which are paired

    Ties count half. The interval is normal, 95%; the variance is that of the paired placements (DeLong, DeLong and
    Clarke-Pearson 1988, whose two samples are here of the same rows, so that their covariance is in it: Obuchowski
    1997, Biometrics 53). Its ends stay within 0 and 1. Rows with NaN in either sample are left out; without any
    row left, all three are NaN.
    """
    high, low = np.asarray(high, float), np.asarray(low, float)
    shape = high.shape[1:]
    high, low = (values.reshape(len(values), -1).T for values in (high, low))
    area, error = np.full(len(high), np.nan), np.full(len(high), np.nan)
    for column, (up, down) in enumerate(zip(high, low, strict=True)):
        there = np.isfinite(up) & np.isfinite(down)
        up, down, N = up[there], down[there], int(there.sum())
        if not N:
            continue
        ups, downs = np.sort(up), np.sort(down)
        above = (np.searchsorted(downs, up, "left") + np.searchsorted(downs, up, "right")) / (2 * N)
        below = 1 - (np.searchsorted(ups, down, "left") + np.searchsorted(ups, down, "right")) / (2 * N)
        area[column] = above.mean()
        error[column] = np.std(above + below, ddof=1) / np.sqrt(N) if N > 1 else np.nan
    low_end, high_end = np.clip(area - Z * error, 0, 1), np.clip(area + Z * error, 0, 1)
    return tuple(part.reshape(shape) for part in (area, low_end, high_end))
