"""How attack success grows with the number of injected rows, and k50: the rows at which half of an attack succeeds."""

from dataclasses import dataclass, field

import numpy as np

from minilora.report import intervals
from minilora.report.intervals import AT_ONCE
from minilora.report.summary import BESIDE, curve_fields, key, sample, seeds_of

SLOPES = np.geomspace(0.25, 8, 24)  # of the logit, for each e-fold of the dose
STEP = 0.01  # of the natural logarithm of k50, so to 1%
BEYOND = 10  # k50 is searched up to this factor beyond the measured doses


def logistic(doses, k50, slope, floor):
    """The share floor + (1 - floor) / (1 + exp(-slope (log dose - m))), with the m that makes it 1/2 at `k50`.

    The four-parameter logistic in the log of the dose (Finney 1971, chapter 7: natural response) with an upper end of
    1; `floor` < 1/2 is its lower end. Broadcasts.
    """
    half = (0.5 - floor) / (1 - floor)
    raised = slope * (np.log(doses) - np.log(k50)) + np.log(half / (1 - half))
    return floor + (1 - floor) / (1 + np.exp(-raised))


def fit_k50(doses, shares, rows, floor):
    """`k50` and slope of `logistic` of the greatest binomial likelihood: ([draws], [draws]).

    `doses` [D] > 0, `shares` [draws, D] of `rows` [D]. Both are searched on a grid, which finds the best one however
    flat or steep the response is: k50 to 1%, from a tenth of the least dose to ten times the largest. It is one of
    these two ends if everything, or nothing, succeeds.
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


# --- dose and response


@dataclass(frozen=True)
class Curve:
    """Attack success against injected rows, over all cells in which `group` {field: value} holds.

    `doses` [D] > 0, `shares` [D] with `intervals` [D, 2]; `floor` the attack success on clean rows, `uninjected` that
    under the trigger where no row was injected, or None. `k50`: (rows, low, high), or None where the floor is 1/2 or
    more, or only one dose was measured; `slope` is that of `logistic`. `beside` {column: {dose: mean}} has the rates
    without the trigger and under the placebo, dose 0 included.
    """

    group: dict
    doses: np.ndarray
    shares: np.ndarray
    intervals: np.ndarray
    floor: float
    uninjected: float | None
    k50: tuple | None
    slope: float | None
    uninjected_interval: tuple | None = None
    beside: dict = field(default_factory=dict)

    def bounded(self, rows):
        """A dose in words, to three digits; only a bound beyond the measured doses."""
        least, most = self.doses.min(), self.doses.max()
        if rows < least:
            return f"< {least:,.0f}"
        return f"> {most:,.0f}" if rows > most else f"{float(f'{rows:.3g}'):,.{0 if rows >= 10 else 1}f}"

    def k50_text(self):
        """k50 with its interval; only a bound where all of it lies beyond the doses; - where there is none."""
        if self.k50 is None:
            return "-"
        value, low, high = map(self.bounded, self.k50)
        return value if value == low == high else f"{value} [{low}, {high}]"


def fit_curves(lines, varied):
    """The `Curve`s of a grid, and why there are none (else None)."""
    lines = [line for line in lines if line["attack_success"] is not None]
    names, found = curve_fields(lines, varied), []
    for value in dict.fromkeys(key(line, names) for line in lines):
        own = [line for line in lines if key(line, names) == value]
        if any(line["injected_rows"] for line in own):
            found.append(fit_curve(own, dict(zip(names, value, strict=True)), seeds_of(varied)))
    if not any(len(one.doses) > 1 for one in found):
        return [], "no two finished cells differ in how many rows are injected"
    return found, None


def fit_curve(lines, group, seeds):
    injected = [line for line in lines if line["injected_rows"]]
    none, _ = sample([line for line in lines if not line["injected_rows"]], "attack_success", (), seeds)
    measured, settings = sample(injected, "attack_success", ("injected_rows",), seeds)
    order = np.argsort([dose for [dose] in settings])
    doses = np.array(settings, dtype=float)[order, 0]
    draws = intervals.bootstrap(measured, np.eye(len(doses))[order], together=False)
    shares = measured.means()[order]
    floor = float(np.mean([line["attack_success_clean"] for line in lines]))
    k50, slope = None, None
    if len(doses) > 1 and floor < 0.5:
        rows = np.bincount(measured.settings, measured.rows)[order]
        all_k50, slopes = fit_k50(doses, np.concatenate([shares[None], draws]), rows, floor)
        [ends] = intervals.interval(all_k50[1:, None], all_k50[:1])
        k50, slope = (float(all_k50[0]), *map(float, ends)), float(slopes[0])
    uninjected, ends = (None, None) if none is None else intervals.estimate(none, np.eye(1), together=True)
    return Curve(group, doses, shares, intervals.interval(draws, shares), floor,
                 None if none is None else float(uninjected[0]), k50, slope,
                 None if none is None else tuple(map(float, ends[0])),
                 {name: rates(lines, name) for name in BESIDE["attack_success"]})  # fmt: skip


def rates(lines, name):
    """{dose: mean of a column over the lines that have it}, by dose."""
    found = {}
    for line in lines:
        if line[name] is not None:
            found.setdefault(line["injected_rows"], []).append(line[name])
    return {dose: float(np.mean(found[dose])) for dose in sorted(found)}
