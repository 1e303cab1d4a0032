"""What a grid's table says of a claim: its statistic, the interval, and the verdict."""

from dataclasses import dataclass

import numpy as np

from minilora.grid.axes import CLEAN
from minilora.grid.claims import Claim, setting, weigh
from minilora.report import intervals, summary


@dataclass(frozen=True)
class Decision:
    """What the table says of a claim: the statistic and its interval (None: not known), the number of its cells, the
    verdict, and why it is undecided."""

    claim: Claim
    value: float | None
    interval: tuple | None
    cells: int
    verdict: str
    reason: str = ""


def decide(claim, entries, lines):
    """The `Decision` of a claim, from the lines of `grid.table.table_rows`."""
    weights, cells = weigh(claim, entries)
    settings = {entry.name: setting(entry) for entry in cells}
    own = [line | {"setting": settings[line["cell"]]} for line in lines if line["cell"] in settings]
    states = {line["cell"]: line["state"] for line in own}
    missing = sum(state != "finished" for state in states.values())
    if missing:
        failed = sum(state == "failed" for state in states.values())
        how = f"{failed:,} failed" if failed == missing else f"{missing:,} are not finished"
        return Decision(claim, None, None, len(cells), "undecided", f"of {len(cells):,} cells {how}")
    if claim.label and claim.figure not in CLEAN:
        own = [line for line in own if line["label"] == claim.label]
    seeds = summary.seeds_of(own[0])
    sample, found = summary.sample(own, claim.figure, ("setting",), seeds)
    if len(found) < len(weights):
        return Decision(
            claim, None, None, len(cells), "undecided", f"not all cells have a row that shows {claim.title}"
        )
    row = np.array([[weights[one] for [one] in found]])
    [value], [(low, high)] = intervals.estimate(sample, row, together=claim.statistic == "mean")
    bound, sign = (claim.above, 1) if claim.below is None else (claim.below, -1)
    sides = [sign * (end - bound) for end in (low, high)]
    verdict = "supported" if min(sides) > 0 else "contradicted" if max(sides) < 0 else "undecided"
    reason = "" if verdict != "undecided" else "the threshold is within the interval"
    return Decision(claim, float(value), (float(low), float(high)), len(cells), verdict, reason)
