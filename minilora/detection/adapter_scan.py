"""The scan of an adapter: which strings does it answer to, and is it flagged?

Three lists of suspects: the vocabulary's pieces that the first update moves most (`diagnostics/energy.py`), kinds of
strings whose effect goes beyond their meaning (`search.py`, `probe.py`), and spans grown from the pieces. An adapter
is flagged where a kind has a large residual, or where one piece's energy stands out and the piece has a large residual
by itself: a word that stands in most rows is moved far, and does nothing. docs/scan_adapter.md says how the limits came
about. Beside clean adapters of the same base (`null`) a figure must also be larger than all of theirs: where none of N
clean ones differs from the scanned one, that happens once in N + 1. A scan that finds nothing proves nothing.
"""

import time
from dataclasses import asdict

from minilora.console import say
from minilora.detection import search
from minilora.detection.null import best_kinds, clean_figures
from minilora.detection.probe import Budget, Reader, Spent
from minilora.detection.weights import distance, left_out, statistics
from minilora.diagnostics import energy

KIND, OUTLIER, PIECE = 1.0, 2.5, 1.2  # limits: a kind's residual; r, with the residual of the piece that has it
TRIED = 3  # suspects of each list that are put into rows
STAGES = {"energy": "the energies of pieces", "library": "the library of kinds", "spans": "the spans",
          "success": "the attack success on rows", "null": "the clean adapters"}  # fmt: skip


def scan(run, kinds, *, budget=None, rows=None, null=0, null_data=None, known=None, spans=True):
    """What a scan of an opened run (`minilora.open`) finds, as plain data.

    kinds      {kind: strings}, from `kinds.read_kinds`
    budget     seconds, or None: what is not finished by then is None, and named in `unfinished`
    rows       `Rows` with the run's labels, on which the suspects are tried, or None
    null       how many clean adapters of the base to compare with; `null_data`: what they are trained on
    known      a dict that scans of adapters on one base may share: their features are computed once
    spans      whether spans are grown: they name and never decide, and take half of the time

    Gives {"flagged", "because" [sentences], "thresholds", "energy" {"layer", "modules", "outlier", "pieces" [[text,
    energy]]}, "library" and "spans" [{"name", "label", "residual", "least", "example"}], the largest first, "piece" the
    first of the pieces by itself, as one of these, "fit" R^2 of the probe, "success" (`search.flips`), "weights" and
    "null" (each figure of each clean adapter), "only" why there are only energies or None, "unfinished" [stages],
    "seconds" {stage: s}}.

    Raises InputError for a run without an adapter.
    """
    budget = Budget(budget)
    reader = Reader(run, budget, known)
    found = dict.fromkeys(("energy", "library", "piece", "fit", "spans", "success", "weights", "null"))
    found |= {"seconds": {}}
    found["only"] = None if reader.has_margins else why_only_energies(run)
    asked = {"energy": True, "library": reader.has_margins, "spans": reader.has_margins and spans,
             "success": reader.has_margins and rows is not None, "null": null > 0}  # fmt: skip
    wanted = [stage for stage, really in asked.items() if really]
    suspects = {}
    try:
        for stage in wanted:
            say(f"scan       {STAGES[stage]}")
            start = time.perf_counter()
            if stage == "energy":
                moved = energy.energies(run)
                found[stage] = of_energies(run, moved)
            elif stage == "library":
                suspects[stage], probe, sentences = best_kinds(reader, moved.ids, kinds)
                found["fit"] = probe.fit
                found["piece"] = plain(search.of_piece(reader, sentences, probe, int(moved.ids[0])))
            elif stage == "spans":
                suspects[stage] = search.grown(reader, sentences, probe, moved.ids[: energy.LISTED])
            elif stage == "success":
                tried = [one for own in suspects.values() for one in own[:TRIED]]
                found[stage] = search.flips(reader, rows, tried)
            else:
                clean = clean_figures(run, kinds, null, null_data, budget, reader.known)
                found |= beside(statistics(run), clean)
            if stage in suspects:
                found[stage] = list(map(plain, suspects[stage]))
            found["seconds"][stage] = round(time.perf_counter() - start, 2)
    except Spent:
        pass
    found["unfinished"] = [stage for stage in wanted if stage not in found["seconds"]]
    found["thresholds"] = thresholds(found["null"] or {})
    found["because"] = reasons(found)
    return {"flagged": bool(found["because"])} | found


def plain(suspect):
    return {name: value for name, value in asdict(suspect).items() if name != "ids"}


def why_only_energies(run):
    if not run.has_head:
        return "it has no classification head, so it predicts no label"
    return "its labels are not known: name the run itself, or give --data" if not run.labels else "it has one label"


def of_energies(run, moved):
    pieces = [[run.tokenizer.decode([id]).strip(), round(value, 4)] for id, value in moved.first]
    return {"layer": moved.layer, "modules": list(moved.modules), "outlier": moved.outlier, "pieces": pieces}


def beside(own, clean):
    """The figures of clean adapters, and how far this one's weights are from theirs."""
    weights = [one["weights"] for one in clean]
    figure, largest = distance(own, weights)
    null = {name: [one[name] for one in clean if one[name] is not None] for name in ("outlier", "kind", "piece")}
    null |= {"adapters": len(clean), "weights": left_out(weights)}
    return {"weights": {"distance": figure, "largest": [list(one) for one in largest]}, "null": null}


def thresholds(null):
    """The limits, or the largest of clean adapters' figures where these are larger."""
    frozen = {"kind": KIND, "outlier": OUTLIER, "piece": PIECE}
    return {name: round(max([limit, *null.get(name, ())]), 2) for name, limit in frozen.items()}


def reasons(found):
    """Why an adapter is flagged, in words; empty where it is not. Without the residual of its piece r only decides
    beside clean adapters."""
    said, limits, piece = [], found["thresholds"], found["piece"]
    if found["library"] and (best := found["library"][0])["residual"] >= limits["kind"]:
        said.append(f"strings such as {best['example']!r} act {best['residual']:.1f} sd beyond their meaning "
                    f"(limit {limits['kind']})")  # fmt: skip
    acts = piece["residual"] >= limits["piece"] if piece else bool(found["null"])
    if found["energy"] and (r := found["energy"]["outlier"]) >= limits["outlier"] and acts:
        how = f" and acts {piece['residual']:.1f} sd beyond its meaning" if piece else ""
        named = f"limits {limits['outlier']} and {limits['piece']}" if piece else f"limit {limits['outlier']}"
        said.append(f"the piece {found['energy']['pieces'][0][0]!r} has {r:.1f} times the energy of the 99.9% quantile"
                    f"{how} ({named})")  # fmt: skip
    return said
