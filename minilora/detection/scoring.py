"""How well detectors did: their scores beside the record of which rows were injected, RUN/injected.jsonl.

Counts have Wilson's interval. It is that of the rows that were counted: a threshold taken from as few clean rows varies
too, and that is not in it.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from minilora import files, seeds
from minilora.detection.clock import Clock, OutOfTime
from minilora.detection.detectors import Scores
from minilora.errors import InputError
from minilora.tasks.metrics import Z95, wilson

SHARES = (0.01, 0.05)  # of the clean rows, flagged at the thresholds of `recall`
HELD = 200  # clean test rows that thresholds are set from


@dataclass
class Scan:
    """What detectors say of N rows of a run.

    rows      the rows, a `data.rows.Rows`
    injected  bool [N]
    held      how many clean rows were kept apart for thresholds
    found     {name: Scores}
    missing   {name: why there are none}
    """

    rows: object
    injected: np.ndarray
    held: int
    found: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)

    @property
    def partial(self):
        return "budget" in self.missing.values() or any(scores.partial for scores in self.found.values())

    def to_dict(self):
        return {
            "rows": len(self.rows), "injected": int(self.injected.sum()), "held": self.held, "partial": self.partial,
            "detectors": {name: judge(scores, self.injected) for name, scores in self.found.items()},
            "missing": self.missing,
        }  # fmt: skip

    def lines(self):
        """One dict a row, for CSV: id, label, whether it is injected, each detector's score and what it flags, text."""
        rows = self.rows
        for i, (id, text) in enumerate(zip(rows.ids, rows.texts, strict=True)):
            line = {"id": id, "label": rows.label_names[rows.labels[i]], "injected": int(self.injected[i])}
            for name, scores in self.found.items():
                there = not np.isnan(scores.scores[i])
                line[name] = float(scores.scores[i]) if there else ""
                if scores.flagged is not None:
                    line[f"{name}_flagged"] = int(scores.flagged[i]) if there else ""
            yield line | {"text": text}


class Remembering:
    """The opened `run`, which reads each of `texts` once: the states of these are kept, for all detectors."""

    def __init__(self, run, texts):
        self._run, self._texts, self._kept = run, set(texts), {}

    def __getattr__(self, name):
        return getattr(self._run, name)

    def hidden(self, texts):
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        found = dict(zip(new, self._run.hidden(new), strict=True)) if new else {}
        self._kept |= {text: found[text] for text in new if text in self._texts}
        return [found[text] if text in found else self._kept[text] for text in texts]


def scan_run(run, detectors, count=None, seconds=None, lenient=False, done=None, **settings):
    """A `Scan` of `count` of the run's own training rows, drawn at random but always the same (None: all).

    seconds   a budget: what is not done by then is missing, or has scores of some rows only
    lenient   a detector that refuses the run is missing too, with the reason, instead of an InputError
    done      function of the `Scan` and a detector's name, after each
    settings  {detector: its settings}

    Raises InputError for a run without rows, for one whose injected.jsonl is not there or of other rows, and as the
    detectors do: before the first begins where the run lacks what one of them needs.
    """
    rows, injected = run.rows.rows, injected_rows(run)
    chosen = draw(len(rows), count)
    held = run.tests[0].rows
    held = held.take(draw(len(held), HELD))
    scan = Scan(rows.take(chosen), injected[chosen], len(held))
    clock, run = Clock(seconds), Remembering(run, scan.rows.texts)
    if not lenient:
        for detector in detectors:
            detector.check(run)
    for detector in detectors:
        try:
            if clock.over:
                raise OutOfTime
            own = {"held": (held.texts, held.labels), "clock": clock} | settings.get(detector.name, {})
            scan.found[detector.name] = detector(run, scan.rows.texts, scan.rows.labels, **own)
        except OutOfTime:
            scan.missing[detector.name] = "budget"
        except InputError as error:
            if not lenient:
                raise
            scan.missing[detector.name] = str(error)
        if done is not None:
            done(scan, detector.name)
    return scan


def draw(rows, count):
    """At most `count` places of `rows` rows, ascending: the same at each call, fewer among more."""
    if count is None or count >= rows:
        return np.arange(rows)
    return np.sort(np.argsort(seeds.row_keys(0, "detection", "", rows), kind="stable")[:count])


def injected_rows(run):
    """Which of the run's training rows were injected, bool [rows], as its injected.jsonl records it."""
    path = run.folder / "injected.jsonl"
    recorded = {line.get("id") for line in files.read_jsonl(path) if isinstance(line, dict)}
    found = np.array([id in recorded for id in run.rows.rows.ids], bool)
    if found.sum() != len(recorded):
        raise InputError(f"{path} names rows that the run was not trained on: bring the run's own file back")
    return found


def judge(scores: Scores, injected) -> dict:
    """The figures of a detector: over the rows that it scored, of which `injected` bool [N] says what they are.

    auc                     the chance that an injected row is above a clean one (`auc`), with `auc_interval`
    recall_1, recall_5      the share of the injected rows above the threshold that flags at most 1%, 5% of the clean
    frr, far                what its own rule, or a threshold from held rows, does: the share of clean rows that it
                            rejects and that of injected rows that it accepts (OpenBackdoor's FRR and FAR, Cui et al.
                            2022), None without a rule

    Each share has an interval, and all are None where they are of no row.
    """
    there = ~np.isnan(scores.scores)
    values, hit = scores.scores[there], injected[there]
    found = {"scored": int(there.sum()), "scored_injected": int(hit.sum()), "partial": scores.partial,
             "seconds": scores.seconds, "auc": None, "auc_interval": None}  # fmt: skip
    if 0 < hit.sum() < len(hit):
        found["auc"] = auc(values, hit)
        found["auc_interval"] = auc_interval(found["auc"], int(hit.sum()), int((~hit).sum()))
    for share in SHARES:
        found |= _share(f"recall_{round(100 * share)}", *recall(values, hit, share))
    flagged = None if scores.flagged is None else scores.flagged[there]
    found |= _share("frr", *((0, 0) if flagged is None else (int(flagged[~hit].sum()), int((~hit).sum()))))
    return found | _share("far", *((0, 0) if flagged is None else (int((~flagged[hit]).sum()), int(hit.sum()))))


def _share(name, hits, total):
    return {name: hits / total if total else None, f"{name}_interval": wilson(hits, total) if total else None}


def auc(scores, injected):
    """P(s > t) + P(s = t) / 2 of a random injected row's score s and a clean one's t: the area under the ROC curve
    (Hanley and McNeil 1982), by ranks, of which equal scores share the mean."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[place]
    own = int(injected.sum())
    return float((ranks[injected].sum() - own * (own + 1) / 2) / (own * (len(scores) - own)))


def auc_interval(area, injected, clean):
    """The 95% interval [low, high] of an AUC from its value and the numbers of rows: Newcombe 2006 (part 2), method 5.

    It holds the areas t with |t - area| <= z sqrt(V(t)), where V is Hanley and McNeil's variance with both numbers of
    rows replaced by their mean. So it has a width at areas of 0 and 1 too, where DeLong's variance is 0.
    """
    more = (injected + clean) / 2 - 1

    def away(t):
        variance = t * (1 - t) / (injected * clean) * (1 + more * (1 - t) / (2 - t) + more * t / (1 + t))
        return abs(t - area) - Z95 * math.sqrt(variance)

    def edge(outside):
        if away(outside) <= 0:
            return outside
        inside = area
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if away(middle) <= 0 else (inside, middle)
        return inside

    return [edge(0.0), edge(1.0)]


def recall(scores, injected, share):
    """(Injected rows above the lowest threshold that at most a `share` of the clean rows is above, injected rows)."""
    clean = np.sort(scores[~injected])[::-1]
    most = int(share * len(clean) + 1e-9)
    limit = clean[most] if most < len(clean) else -np.inf
    return int((scores[injected] > limit).sum()), int(injected.sum())
