"""Intervals of the diagnostics: over rows that are paired, by draws with a fixed seed."""

import numpy as np

DRAWS, LEVEL = 1000, 0.95
Z = 1.959963984540054  # of a normal distribution, for `LEVEL`


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
    drawn = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), DRAWS)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, means = flat.sum(0) / seen.sum(0), (drawn @ flat) / (drawn @ seen)
    with np.errstate(invalid="ignore"):
        ends = np.nanquantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return tuple(part.reshape(values.shape[1:]) for part in (mean, *ends))


def auc(high, low):
    """(area under the ROC curve, low, high end of its interval): how often a row of `high` exceeds one of `low`.

    high, low  [N, ...] of the same rows, which are paired

    Ties count half. The interval is normal, 95%; the variance is that of the paired placements (DeLong, DeLong and
    Clarke-Pearson 1988, whose two samples are here of the same rows, so that their covariance is in it: Obuchowski
    1997, Biometrics 53). Its ends stay within 0 and 1.
    """
    high, low = np.asarray(high, float), np.asarray(low, float)
    N, shape = len(high), high.shape[1:]
    high, low = high.reshape(N, -1).T, low.reshape(N, -1).T
    area, error = np.empty(len(high)), np.empty(len(high))
    for column, (up, down) in enumerate(zip(high, low, strict=True)):
        ups, downs = np.sort(up), np.sort(down)
        above = (np.searchsorted(downs, up, "left") + np.searchsorted(downs, up, "right")) / (2 * N)
        below = 1 - (np.searchsorted(ups, down, "left") + np.searchsorted(ups, down, "right")) / (2 * N)
        area[column] = above.mean()
        error[column] = np.std(above + below, ddof=1) / np.sqrt(N) if N > 1 else np.nan
    low_end, high_end = np.clip(area - Z * error, 0, 1), np.clip(area + Z * error, 0, 1)
    return tuple(part.reshape(shape) for part in (area, low_end, high_end))
