"""What a grid's table says of a claim: its statistic, the interval, p-values, and the verdict.

A p-value is the share of doubt at which the interval would just leave out the claimed bound (`intervals.py`),
two-sided; a verdict needs p < 0.05, which is a 95% interval that leaves it out. A claim that two things are alike
(`within`) is supported by two one-sided tests at 5% (TOST: Schuirmann 1987), and contradicted where the interval lies
beyond the margin. A claim of each of several parts is supported where every part is, by the largest p-value
(intersection-union: Berger and Hsu 1996, section 3); it is contradicted where any part is, by the least p-value times
their number. Over a file's claims the p-values are adjusted by Holm 1979.

No verdict comes of fewer than `FEW` seeds.
"""

from dataclasses import dataclass, replace

import numpy as np

from minilora.grid.axes import CLEAN, FIGURES
from minilora.grid.claims import Claim, parts, setting, weigh
from minilora.grid.power import FEW
from minilora.report import intervals, summary

ALPHA = 0.05
MOST_SEEDS = 50  # that a reason asks for
UNDECIDED, FEW_SEEDS = "undecided", "undecided (few seeds)"


@dataclass(frozen=True)
class Decision:
    """What the table says of a claim: the statistic and its interval (None: not known), the number of its cells, the
    verdict, and why it is undecided.

    `part` names the part that decides a claim of each of several, and `others` are the rest, (name, value, interval) in
    their order; `seeds` is how many the interval is over; `p` is that of the verdict's side, `holm_p` and `holm` the
    same after Holm's adjustment over the file's claims.
    """

    claim: Claim
    value: float | None
    interval: tuple | None
    cells: int
    verdict: str
    reason: str = ""
    part: str = ""
    seeds: int = 0
    p: float | None = None
    holm_p: float | None = None
    holm: str = ""
    others: tuple = ()


@dataclass(frozen=True)
class Side:
    """An estimate against what is claimed of it: whether it lies on the claimed side, and the p-value of that side."""

    name: str
    found: intervals.Estimate
    claimed: bool
    p: float


def decide_all(claims, entries, lines):
    """The `Decision` of each of a file's claims, adjusted for their number (`holm`)."""
    return holm([decide(claim, entries, lines) for claim in claims])


def decide(claim, entries, lines):
    """The `Decision` of a claim, from the lines of `grid.table.table_rows`."""
    sides, names = [], set()
    for name, part in parts(claim, entries):
        found, cells, reason = estimate(part, entries, lines)
        names |= {entry.name for entry in cells}
        if found is None:
            return Decision(claim, None, None, len(names), UNDECIDED, reason)
        sides.append(side(part, name, found))
    one, claimed, p = joined(claim, sides)
    seeds = min(side.found.seeds for side in sides)
    verdict, reason = UNDECIDED, ""
    if seeds < FEW:
        verdict = FEW_SEEDS
        reason = f"{seeds} {'seed' if seeds == 1 else 'seeds'}, and a verdict takes at least {FEW}"
    elif p < ALPHA:
        verdict = "supported" if claimed else "contradicted"
    else:
        reason = "the threshold is within the interval"
    if verdict == UNDECIDED or verdict == FEW_SEEDS and seeds > 1:
        reason += f"; {needed(claim, one.found, seeds)}"
    others = tuple((other.name, other.found.value, other.found.interval) for other in sides if other is not one)
    return Decision(
        claim, one.found.value, one.found.interval, len(names), verdict, reason, one.name, seeds, p, others=others
    )


def estimate(claim, entries, lines):
    """(The `intervals.Estimate` of a claim without parts or None, its entries, why there is none)."""
    weights, cells = weigh(claim, entries)
    settings = {entry.name: setting(entry) for entry in cells}
    own = [line | {"setting": settings[line["cell"]]} for line in lines if line["cell"] in settings]
    states = {line["cell"]: line["state"] for line in own}
    missing = sum(state != "finished" for state in states.values())
    if missing:
        failed = sum(state == "failed" for state in states.values())
        how = f"{failed:,} failed" if failed == missing else f"{missing:,} are not finished"
        return None, cells, f"of {len(cells):,} cells {how}"
    if claim.label and claim.figure not in CLEAN:
        own = [line for line in own if line["label"] == claim.label]
    sample, found = summary.sample(own, claim.figure, ("setting",), summary.seeds_of(own[0]))
    if len(found) < len(weights):
        return None, cells, f"not all cells have a row that shows {claim.title}"
    row = np.array([[weights[one] for [one] in found]])
    return intervals.estimate(sample, row, FIGURES[claim.figure].signed)[0], cells, ""


def side(claim, name, found):
    """The `Side` that an estimate lies on."""
    if claim.within is None:
        sign = 1 if claim.below is None else -1
        p = found.p(claim.bound)
        return Side(name, found, sign * (found.value - claim.bound) > 0, 2 * min(p, 1 - p))
    margin = claim.within
    if abs(found.value) < margin:
        return Side(name, found, True, max(found.p(-margin), 1 - found.p(margin)))
    return Side(name, found, False, 2 * min(found.p(margin), 1 - found.p(-margin)))


def joined(claim, sides):
    """(The `Side` that decides, whether the claim holds there, the p-value of all)."""
    beyond = [one for one in sides if not one.claimed]
    if beyond:
        worst = min(beyond, key=lambda one: one.p)
        return worst, False, min(1.0, worst.p * len(sides))
    worst = max(sides, key=lambda one: one.p)
    return worst, True, worst.p


def needed(claim, found, seeds):
    """About how many seeds would decide it, if they had what these have."""
    for count in range(max(FEW, seeds + 1), MOST_SEEDS + 1):
        parts = tuple((variance * seeds / count, degrees * (count - 1) / (seeds - 1))
                      for variance, degrees in found.by_seeds)  # fmt: skip
        if side(claim, "", replace(found, by_seeds=parts)).p < ALPHA:
            return f"about {count} seeds would decide it if they lie as these"
    return f"more than {MOST_SEEDS} seeds would be needed, or more test rows, if they lie as these"


def holm(decisions):
    """The decisions with Holm's adjusted p-values and the verdicts that stand with these (Holm 1979, section 3).

    A claim without a p-value counts among those tested, so that a file's verdicts do not weaken as it is finished.
    """
    known = sorted((one for one in decisions if one.p is not None), key=lambda one: one.p)
    largest, adjusted = 0.0, {}
    for place, one in enumerate(known):
        largest = max(largest, min(1.0, one.p * (len(decisions) - place)))
        adjusted[one.claim.name] = largest
    found = []
    for one in decisions:
        p = adjusted.get(one.claim.name)
        stands = one.verdict if p is None or p < ALPHA or one.verdict.startswith(UNDECIDED) else UNDECIDED
        found.append(replace(one, holm_p=p, holm=stands))
    return found
