"""How attack success grows with the number of injected rows, and k50: the rows at which half of an attack succeeds."""

from dataclasses import dataclass, field

import numpy as np

from minilora.report import intervals
from minilora.report.intervals import AT_ONCE
from minilora.report.summary import RATES, curve_fields, key, sample, seeds_of

SLOPES = np.geomspace(0.25, 8, 16)  # of the logit, for each e-fold of the dose
TOPS = np.array([1.0, 0.97, 0.9, 0.8, 0.7, 0.6])  # of a response that does not come to 1
STEP = 0.02  # of the natural logarithm of k50, so to 2%
FLOOR_STEP = 0.02
BEYOND = 10  # k50 is searched up to this factor beyond the measured doses


def logistic(doses, k50, slope, floor, top=1.0):
    """The share floor + (top - floor) / (1 + exp(-slope (log dose - m))), with the m that makes it 1/2 at `k50`.

    The four-parameter logistic in the log of the dose (Finney 1971, chapter 7: natural response): `floor` < 1/2 is its
    share at dose 0, and `top` > 1/2 that of endless doses. Broadcasts.
    """
    with np.errstate(divide="ignore", over="ignore"):
        raised = slope * (np.log(doses) - np.log(k50)) + logit((0.5 - floor) / (top - floor))
        return floor + (top - floor) / (1 + np.exp(-raised))


def logit(share):
    return np.log(share / (1 - share))


def fit_logistic(doses, shares, rows, floors=None, tops=TOPS):
    """`k50`, slope, floor and top of `logistic` of the greatest binomial likelihood, [draws] each.

    `doses` [D] >= 0, `shares` [draws, D] of `rows` [D]. All four are searched on a grid, which finds the best one
    however flat or steep the response is: k50 to 2%, from a tenth of the least dose to ten times the largest. It is one
    of these two ends if everything, or nothing, succeeds.
    """
    injected = doses[doses > 0]
    least, most = np.log(injected.min() / BEYOND), np.log(injected.max() * BEYOND)
    if floors is None:  # no floor is above the least of a draw's shares by more than what its noise allows
        floors = np.arange(0, min(0.48, shares.min(axis=1).max() + FLOOR_STEP) + 1e-9, FLOOR_STEP)
    axes = np.exp(np.arange(least, most + STEP, STEP)), SLOPES, floors, tops
    k50, slopes, floors, tops = (axis.ravel().astype(np.float32) for axis in np.meshgrid(*axes, indexing="ij"))  # [G]
    model = np.clip(logistic(doses[:, None].astype(np.float32), k50, slopes, floors, tops), 1e-6, 1 - 1e-6)  # [D, G]
    terms = np.concatenate([np.log(model), np.log1p(-model)])  # [2D, G]
    counts = np.concatenate([shares * rows, (1 - shares) * rows], axis=1).astype(np.float32)  # [draws, 2D]
    size = max(1, AT_ONCE // len(k50))
    best = np.concatenate([(counts[i : i + size] @ terms).argmax(axis=1) for i in range(0, len(counts), size)])
    return tuple(values[best].astype(float) for values in (k50, slopes, floors, tops))


def net_k50(k50, slope, floor, top):
    """The dose at which the share is half a row above `floor`, so that net attack success is 1/2; inf where it never
    is. Broadcasts."""
    half = np.minimum(0.5 / (top - floor), 1.0)
    with np.errstate(divide="ignore", over="ignore"):
        return k50 * np.exp((logit(half) - logit((0.5 - floor) / (top - floor))) / slope)


# --- dose and response


@dataclass(frozen=True)
class Curve:
    """Attack success against injected rows, over all cells in which `group` {field: value} holds.

    `doses` [D] > 0, `shares` [D] with `intervals` [D, 2]; `uninjected` the attack success under the trigger where no
    row was injected, or None. `k50`: (rows, low, high) at which attack success is half, or None where it is half
    without any, or only one dose was measured; `net_k50` the same of net attack success; `slope`, `floor` and `top`
    are those of `logistic`. `beside` {column: {dose: mean}} has the rates without the trigger and under the placebo,
    dose 0 included.
    """

    group: dict
    doses: np.ndarray
    shares: np.ndarray
    intervals: np.ndarray
    floor: float
    uninjected: float | None
    k50: tuple | None
    slope: float | None
    top: float = 1.0
    net_k50: tuple | None = None
    uninjected_interval: tuple | None = None
    beside: dict = field(default_factory=dict)

    def bounded(self, rows):
        """A dose in words, to three digits; only a bound beyond the measured doses."""
        least, most = self.doses.min(), self.doses.max()
        if rows < least:
            return f"< {least:,.0f}"
        return f"> {most:,.0f}" if rows > most else f"{float(f'{rows:.3g}'):,.{0 if rows >= 10 else 1}f}"

    def k50_text(self, net=False):
        """k50 with its interval; only a bound where all of it lies beyond the doses; - where there is none."""
        found = self.net_k50 if net else self.k50
        if found is None:
            return "-"
        value, low, high = map(self.bounded, found)
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
    """The floor is what the trigger does where no row was injected; where there are no such cells, what the clean rows
    of the injected ones come to. It is fitted with the rest, and drawn with the rest for the interval of k50."""
    injected = [line for line in lines if line["injected_rows"]]
    none = [line for line in lines if not line["injected_rows"]]
    without = none or [
        line | {"injected_rows": 0, "attack_success": line["attack_success_clean"], "outcomes": None}
        for line in injected if line["attack_success_clean"] is not None
    ]  # fmt: skip
    measured, settings = sample(without + injected, "attack_success", ("injected_rows",), seeds)
    order = np.argsort([dose for [dose] in settings])
    doses = np.array(settings, dtype=float)[order, 0]
    found = intervals.estimate(measured, np.eye(len(doses))[order])
    shares, ends = np.array([one.value for one in found]), np.array([one.interval for one in found])
    k50 = net = slope = None
    floor, top, first = shares[0], 1.0, int(doses[0] == 0)
    if len(doses) - first > 1 and floor < 0.5:
        rows = np.bincount(measured.settings, measured.rows)[order]
        draws = intervals.bootstrap(measured)[:, order]
        fits = fit_logistic(doses, np.concatenate([shares[None], draws]), rows)
        k50, net = (with_interval(values) for values in (fits[0], net_k50(*fits)))
        slope, floor, top = (float(values[0]) for values in fits[1:])
    return Curve(group, doses[first:], shares[first:], ends[first:], float(floor),
                 float(shares[0]) if none else None, k50, slope, top, net,
                 tuple(map(float, ends[0])) if none else None,
                 {name: rates(lines, name) for name in RATES})  # fmt: skip


def with_interval(draws):
    """(The first, low, high) of `draws`, of which the first is the value itself."""
    [ends] = intervals.interval(np.minimum(draws, 1e12)[1:, None], np.minimum(draws, 1e12)[:1])
    return float(min(draws[0], 1e12)), *map(float, ends)


def rates(lines, name):
    """{dose: mean of a column over the lines that have it}, by dose."""
    found = {}
    for line in lines:
        if line[name] is not None:
            found.setdefault(line["injected_rows"], []).append(line[name])
    return {dose: float(np.mean(found[dose])) for dose in sorted(found)}
