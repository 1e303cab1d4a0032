"""Runs that are killed at random moments, several times, and then go on: they must end in the same bytes."""

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

from mortal import Mortal

from .inputs import leftovers, make, outcome

KILLS = 5  # of one folder, at most, before it goes on to its end


def run(folder, seed, end, first=0, cases=10**9, only=None):
    single, population, grid, cells = make(folder)

    def members(out):
        """The lines that go on with a killed population: each member in its own folder."""
        if not out.exists():
            return [[*population, "--out", out]]
        lines = []
        for number, cell in enumerate(cells):
            own = out / cell.name
            if not (own / "results.json").exists():
                lines.append(resumed([*population[:1], population[1 + number], "--save-every", "4", "--out", own], own))
        return lines

    def resumed(line, out):
        return ["--resume", out, "--save-every", "4"] if (out / "cell.toml").exists() else line

    kinds = {
        "single": lambda out: [] if (out / "results.json").exists() else [resumed([*single, "--out", out], out)],
        "population": members,
        "grid": lambda out: [[*grid, "--out", out]],
        "grid of 2": lambda out: [[*grid, "--out", out]],
    }
    kinds = {kind: lines for kind, lines in kinds.items() if not only or kind in only}
    counts = {kind: {"kind": kind, "folders": 0, "kills": 0, "leftovers": 0, "wrong": 0} for kind in kinds}
    wrong, whole, number = [], {}, first
    with Mortal(folder / "log-0") as one, Mortal(folder / "log-1") as two, ThreadPoolExecutor(2) as pool:
        while number < first + cases and (time.monotonic() < end or number == first):
            for kind, lines in kinds.items():
                if kind not in whole:
                    out = folder / f"whole {kind}"
                    status, moments = one.run(lines(out)[0], out)
                    assert status == 0, one.log.read_text()[-2000:]
                    whole[kind] = moments, outcome(out)
                moments, expected = whole[kind]
                draw, out = random.Random(f"{seed} {kind} {number}"), folder / f"{kind} {number}"
                mortals, killed, why = (one, two)[: 1 + (kind == "grid of 2")], 0, None
                for _ in range(draw.randint(1, KILLS)):
                    if not (todo := lines(out)):
                        break
                    how = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
                    # The first moments, in which the folder is made, as often as all of the others.
                    lasts = [draw.choice([draw.randint(1, 20), draw.randint(1, moments)]) for _ in mortals]
                    at = [pool.submit(m.run, todo[0], out, last, how) for m, last in zip(mortals, lasts)]
                    statuses = [future.result()[0] for future in at]
                    killed += sum(status != 0 for status in statuses)
                    if bad := [status for status in statuses if status not in (0, -how, 130, 128 + how)]:
                        why = f"a killed process ended with {bad}"
                while todo := lines(out):
                    statuses = [future.result()[0] for future in [pool.submit(m.run, todo[0], out) for m in mortals]]
                    if any(statuses):
                        why = f"going on ended with {statuses}: {mortals[0].log.read_text()[-300:]}"
                    if any(statuses) or kind.startswith("grid"):
                        break
                if not why and outcome(out) != expected:
                    names = [key for key in expected if outcome(out).get(key) != expected[key]]
                    why = f"other bytes: {names[:4]}"
                count = counts[kind]
                count["folders"], count["kills"] = count["folders"] + 1, count["kills"] + killed
                if left := [] if why else leftovers(out):
                    why = f"left over: {left[:4]}"
                if why:
                    count["leftovers" if left else "wrong"] += 1
                    wrong.append(f"kill {kind} {number} (seed {seed}): {why}")
            number += 1
    return list(counts.values()), wrong
