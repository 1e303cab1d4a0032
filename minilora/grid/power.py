"""What the planned seeds can detect of a grid's claims, before anything is trained.

A claim is decided with 80% probability where the truth lies t(0.975) + t(0.8) standard errors beyond its threshold,
with Student's t of one degree of freedom less than seeds (the least detectable difference: Zar 2010, section 7.7). The
standard error is not known beforehand. `SPREAD` is what the cells of a setting were found to differ by from seed to
seed in `ablations/rank_by_proportion.toml` at its small size; seeds that differ more detect less.
"""

from minilora.grid.axes import SEEDS
from minilora.grid.claims import parts, setting, weigh
from minilora.tasks.student import quantile

FEW = 3  # seeds that a verdict takes
POWER = 0.8
SPREAD = {"clean_accuracy": 0.04, "clean_balanced_accuracy": 0.04, "trigger_accuracy": 0.06}  # standard deviations
OTHER = 0.1  # of all other figures, which are of the attack
ROW = 0.4  # the standard deviation of a test row's part: that of a share of 0.2 or 0.8


def detectable(claim, entries):
    """(How far beyond its threshold the truth of a claim must lie; how many seeds the weakest of its settings has)."""
    found = [detectable_part(part, entries) for _, part in parts(claim, entries)]
    return max(distance for distance, _ in found), min(seeds for _, seeds in found)


def detectable_part(claim, entries):
    weights, cells = weigh(claim, entries)
    counts = {one: set() for one in weights}
    for entry in cells:
        counts[setting(entry)].add(tuple((name, entry.varied[name]) for name in entry.varied if name in SEEDS))
    seeds = min(map(len, counts.values()))
    spread = SPREAD.get(claim.figure, OTHER)
    over_seeds = sum((weight * spread) ** 2 / len(counts[one]) for one, weight in weights.items())
    apart = max(sum(weights.values()) ** 2, sum(weight**2 for weight in weights.values()))
    rows = min(entry.cell.test_rows for entry in cells) / (1 if claim.figure in SPREAD else 2)
    if seeds < 2:
        return float("inf"), seeds
    t = quantile(0.975, seeds - 1) + quantile(POWER, seeds - 1)
    z = quantile(0.975, 1e6) + quantile(POWER, 1e6)
    return (t**2 * over_seeds + z**2 * apart * ROW**2 / rows) ** 0.5, seeds


def lines_of(claims, entries):
    """What a dry run says of each claim."""
    if not claims:
        return []
    lines = [f"what {POWER:.0%} power detects (seeds assumed to differ by {SPREAD['clean_accuracy']:g} in clean accuracy, "
             f"{OTHER:g} in attack success):"]  # fmt: skip
    for claim in claims:
        distance, seeds = detectable(claim, entries)
        words = f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
        if seeds < FEW:
            said = f"{words}, and a verdict takes at least {FEW}: it will be undecided"
        else:
            where = f"inside +-{claim.within:g}" if claim.within else f"beyond {claim.bound:g}"
            enough = "" if not claim.within or distance < claim.within else ", so it cannot be supported"
            said = f"{words} detect {distance:.2g} {where}{enough}"
        lines.append(f"  {claim.name}: {said}")
    return lines
