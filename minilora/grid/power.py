"""What the planned seeds can detect of a grid's claims, before anything is trained.

A claim is decided with 80% probability where the truth lies t(0.975) + t(0.8) standard errors beyond its threshold,
with Student's t of one degree of freedom less than seeds (the least detectable difference: Zar 2010, chapter 7); a
margin is shown where it is t(0.95) + t(0.9) of them and there is no difference (Julious 2004, section 5). The
standard error is not known beforehand. `SPREAD` is what the cells of a setting were found to differ by from seed to
seed in `ablations/rank_by_proportion.toml` at its small size; seeds that differ more detect less.
"""

import math

from minilora.grid.axes import SEEDS
from minilora.grid.claims import parts, setting, weigh
from minilora.tasks.student import quantile

FEW = 3  # seeds that a verdict takes
POWER = 0.8
SPREAD = {"clean_accuracy": 0.02, "clean_balanced_accuracy": 0.02, "trigger_accuracy": 0.05}  # standard deviations
OTHER = 0.1  # of all other figures, which are of the attack
ROW = 0.4  # the standard deviation of a test row's part: that of a share of 0.2 or 0.8


MOST_SEEDS = 50


def detectable(claim, entries, seeds=None):
    """(How far beyond its threshold the truth of a claim must lie, or how wide a margin must be; how many seeds the
    weakest of its settings has). `seeds`: as if each setting had so many."""
    found = [detectable_part(part, entries, seeds) for _, part in parts(claim, entries)]
    return max(distance for distance, _ in found), min(count for _, count in found)


def detectable_part(claim, entries, seeds=None):
    weights, cells = weigh(claim, entries)
    counts = {one: set() for one in weights}
    for entry in cells:
        counts[setting(entry)].add(tuple((name, entry.varied[name]) for name in entry.varied if name in SEEDS))
    counts = {one: seeds or len(found) for one, found in counts.items()}
    spread, least = SPREAD.get(claim.figure, OTHER), min(counts.values())
    over_seeds = sum((weight * spread) ** 2 / counts[one] for one, weight in weights.items())
    apart = max(sum(weights.values()) ** 2, sum(weight**2 for weight in weights.values()))
    rows = min(entry.cell.test_rows for entry in cells) / (1 if claim.figure in SPREAD else 2)
    if least < 2:
        return math.inf, least
    shares = (0.975, POWER) if claim.within is None else (0.95, (1 + POWER) / 2)
    t, z = (sum(quantile(share, degrees) for share in shares) for degrees in (least - 1, 1e6))
    return (t**2 * over_seeds + z**2 * apart * ROW**2 / rows) ** 0.5, least


def lines_of(claims, entries):
    """What a dry run says of each claim."""
    if not claims:
        return []
    lines = [f"what {POWER:.0%} power detects (seeds assumed to differ by {SPREAD['clean_accuracy']:g} in clean "
             f"accuracy, {OTHER:g} in attack success):"]  # fmt: skip
    for claim in claims:
        distance, seeds = detectable(claim, entries)
        words = f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
        if seeds < FEW:
            said = f"{words}, and a verdict takes at least {FEW}: it will be undecided"
        else:
            said = f"{words} detect {distance:.2g} beyond {claim.bound:g}"
            if claim.within is not None:
                said = f"{words} show a margin of {distance:.2g}, {enough(claim, entries, distance)}"
        lines.append(f"  {claim.name}: {said}")
    return lines


def enough(claim, entries, distance):
    """Whether a margin can be shown, and what it would take."""
    if distance <= claim.within:
        return f"and it claims {claim.within:g}"
    for seeds in range(FEW, MOST_SEEDS + 1):
        if detectable(claim, entries, seeds)[0] <= claim.within:
            return f"but it claims {claim.within:g}, which takes about {seeds}"
    return f"but it claims {claim.within:g}, which takes more than {MOST_SEEDS}, or more test rows"
