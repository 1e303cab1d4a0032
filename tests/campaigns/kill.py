"""Runs that are killed at random moments, several times, and then go on: they must end in the same bytes."""

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

from mortal import Mortal

from .inputs import leftovers, make, outcome

KILLS = 5  # of one folder, at most, before it goes on to its end


def run(folder, seed, end, first=0, cases=10**9, only=None):
    single, population, grid = make(folder)
    kinds = {"single": single, "population": population, "grid": grid, "grid of 2": grid}
    kinds = {kind: line for kind, line in kinds.items() if not only or kind in only}
    counts = {kind: {"kind": kind, "folders": 0, "kills": 0, "leftovers": 0, "wrong": 0} for kind in kinds}
    wrong, whole, number = [], {}, first
    with Mortal(folder / "log-0") as one, Mortal(folder / "log-1") as two, ThreadPoolExecutor(2) as pool:
        while number < first + cases and (time.monotonic() < end or number == first):
            for kind, line in kinds.items():
                if kind not in whole:
                    out = folder / f"whole {kind}"
                    status, moments = one.run([*line, "--out", out], out)
                    assert status == 0, one.log.read_text()[-2000:]
                    whole[kind] = moments, outcome(out)
                moments, expected = whole[kind]
                draw, out = random.Random(f"{seed} {kind} {number}"), folder / f"{kind} {number}"
                mortals, killed, why = (one, two)[: 1 + (kind == "grid of 2")], 0, None
                line = [*line, "--out", out, "--continue"]  # the same line goes on, whatever it meets
                for _ in range(draw.randint(1, KILLS)):
                    how = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
                    # The first moments, in which the folder is made, as often as all of the others.
                    lasts = [draw.choice([draw.randint(1, 20), draw.randint(1, moments)]) for _ in mortals]
                    at = [pool.submit(m.run, line, out, last, how) for m, last in zip(mortals, lasts)]
                    statuses = [future.result()[0] for future in at]
                    killed += sum(status != 0 for status in statuses)
                    if bad := [status for status in statuses if status not in (0, -how, 130, 128 + how)]:
                        why = f"a killed process ended with {bad}"
                statuses = [future.result()[0] for future in [pool.submit(m.run, line, out) for m in mortals]]
                if any(statuses):
                    why = f"going on ended with {statuses}: {mortals[0].log.read_text()[-300:]}"
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
