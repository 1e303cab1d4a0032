"""Scan an adapter for a trigger, from its weights and its base only: `python evaluate.py --scan-adapter DIR`.

Three lists of suspects: the vocabulary's pieces that the first update moves most (`energy.py`), kinds of strings whose
effect goes beyond their meaning (`search.py`, `probe.py`), and spans grown from the pieces. Two figures decide, by
thresholds that were fixed before the bench was run (`python -m benchmarks scan`): the largest residual of a kind, and
how far the highest energy stands out. A scan that finds nothing proves nothing.
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

from minilora import files
from minilora.command import Parser
from minilora.console import quiet, say
from minilora.errors import InputError, to_type

KIND, OUTLIER = 1.0, 2.5  # a kind's residual and r from which an adapter is flagged
SHOWN, PIECES = 3, 8  # suspects of each list, and pieces, in the table
STAGES = {"energy": "the energies of pieces", "library": "the library of kinds", "spans": "the spans",
          "success": "the attack success on rows", "null": "the clean adapters"}  # fmt: skip
NO_PROOF = "Finding nothing proves nothing: a trigger that is in no list, or works in part, stays unseen."


def scan(run, kinds, *, budget=None, rows=None, null=0, null_data=None, known=None, spans=True):
    """What a scan of an opened run (`minilora.open`) finds, as plain data.

    kinds      {kind: strings}, from `kinds.read_kinds`
    budget     seconds, or None: what is not finished by then is None, and named in `unfinished`
    rows       `Rows` with the run's labels, on which the suspects are tried, or None
    null       how many clean adapters of the base to compare with; `null_data`: what they are trained on
    known      a dict that scans of adapters on one base may share: their features are computed once
    spans      whether spans are grown: they name and never decide, and take half of the time

    Gives {"flagged", "because" [sentences], "thresholds", "energy" {"layer", "modules", "outlier", "pieces" [[text,
    energy]]}, "library" and "spans" [{"name", "label", "residual", "least", "example"}], the largest first, "fit" R^2
    of the probe, "success" (`search.flips`), "weights" and "null" (each figure of each clean adapter), "only" why there
    are only energies or None, "unfinished" [stages], "seconds" {stage: s}}.

    Raises InputError for a run without an adapter.
    """
    from minilora.detection import energy, search
    from minilora.detection.null import best_kinds, clean_figures
    from minilora.detection.probe import Budget, Reader, Spent
    from minilora.detection.weights import statistics

    budget = Budget(budget)
    reader = Reader(run, budget, known)
    found = dict.fromkeys(("energy", "library", "fit", "spans", "success", "weights", "null")) | {"seconds": {}}
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
            elif stage == "spans":
                suspects[stage] = search.grown(reader, sentences, probe, moved.ids[: energy.LISTED])
            elif stage == "success":
                tried = [one for own in suspects.values() for one in own[:SHOWN]]
                found[stage] = search.flips(reader, rows, tried)
            else:
                clean = clean_figures(run, kinds, null, null_data, budget, reader.known)
                found |= beside(statistics(run), clean)
            if stage in suspects:
                found[stage] = [{k: v for k, v in asdict(one).items() if k != "ids"} for one in suspects[stage]]
            found["seconds"][stage] = round(time.perf_counter() - start, 2)
    except Spent:
        pass
    found["unfinished"] = [stage for stage in wanted if stage not in found["seconds"]]
    found["because"] = reasons(found)
    return {"flagged": bool(found["because"]), "thresholds": {"kind": KIND, "outlier": OUTLIER}} | found


def why_only_energies(run):
    if not run.has_head:
        return "it has no classification head, so it predicts no label"
    return "its labels are not known: name the run itself, or give --data" if not run.labels else "it has one label"


def of_energies(run, moved):
    from minilora.detection.energy import LISTED

    top = zip(moved.ids[:LISTED].tolist(), moved.values[:LISTED].tolist(), strict=True)
    pieces = [[run.tokenizer.decode([id]).strip(), round(value, 4)] for id, value in top]
    return {"layer": moved.layer, "modules": list(moved.modules), "outlier": moved.outlier, "pieces": pieces}


def beside(own, clean):
    """The figures of clean adapters, and how far this one's weights are from theirs."""
    from minilora.detection.weights import distance, left_out

    weights = [one["weights"] for one in clean]
    figure, largest = distance(own, weights)
    kinds = [one["kind"] for one in clean if one["kind"] is not None]
    null = {"adapters": len(clean), "outlier": [one["outlier"] for one in clean], "kind": kinds,
            "weights": left_out(weights)}  # fmt: skip
    return {"weights": {"distance": figure, "largest": [list(one) for one in largest]}, "null": null}


def reasons(found):
    """Why an adapter is flagged, in words; empty where it is not."""
    said = []
    if found["library"] and (best := found["library"][0])["residual"] >= KIND:
        said.append(f"strings such as {best['example']!r} act {best['residual']:.1f} sd beyond their meaning "
                    f"(limit {KIND})")  # fmt: skip
    if found["energy"] and (r := found["energy"]["outlier"]) >= OUTLIER:
        said.append(f"the piece {found['energy']['pieces'][0][0]!r} has {r:.1f} times the energy of the 99.9% quantile "
                    f"(limit {OUTLIER})")  # fmt: skip
    return said


# --- what is printed


def lines_of(found, adapter):
    """A scan as text that fits the terminal."""
    from minilora.console import short, table, wrap

    null, energy, made = found["null"] or {}, found["energy"], []
    made += wrap(f"adapter    {adapter}", 11)
    if energy:
        made += wrap(f"pieces     {' '.join(text for text, _ in energy['pieces'][: 2 * PIECES])}", 11)
        made += wrap(f"           (moved most by the update of layer {energy['layer']}, the first adapted one)", 11)
    rows = []
    for stage, title in (("library", "kinds of strings (sd beyond their meaning):"),
                         ("spans", "spans, in the worst sentence (they name, and decide nothing):")):  # fmt: skip
        for number, one in enumerate(found[stage][:SHOWN] if found[stage] else ()):
            rows += [(title,)] if number == 0 else []
            figure, clean = ("residual", null.get("kind")) if stage == "library" else ("least", None)
            rows.append((f"  {short(one['name'], 26)}", one["label"], f"{one[figure]:.2f}", span_of(clean),
                         short(one["example"], 20)))  # fmt: skip
    if energy:
        rows += [("weights:",), ("  r: highest energy / 99.9%", "", f"{energy['outlier']:.2f}",
                                 span_of(null.get("outlier")), energy["pieces"][0][0])]  # fmt: skip
    if found["weights"]:
        module, name, _ = found["weights"]["largest"][0]
        rows.append(("  distance from clean ones", "", f"{found['weights']['distance']:.2f}",
                     span_of(null.get("weights")), short(f"{module} {name}", 20)))  # fmt: skip
    made += ["", *table(("suspects", "for", "figure", "clean", "such as"), rows, least=28)] if rows else []
    if null:
        made += wrap(f"clean: from the least to the largest of {null['adapters']} clean adapters of the same base")
    made += ["", *success_lines(found["success"])] if found["success"] else []
    made.append("")
    for stage in found["unfinished"]:
        made += wrap(f"unfinished: the budget ended before {STAGES[stage]}")
    if found["only"]:
        made += wrap(f"energies only: {found['only']}, and kinds and spans cannot be tried")
    decided = "flagged: " + "; ".join(found["because"]) if found["flagged"] else (
        f"not flagged: no kind reaches {KIND}, and r is below {OUTLIER}" if found["library"]
        else f"not flagged, by r only: it is below {OUTLIER}" if energy else "nothing is decided")  # fmt: skip
    return made + wrap(decided) + wrap(NO_PROOF)


def span_of(values):
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"


def success_lines(success):
    from minilora.console import short, table
    from minilora.tasks.metrics import wilson

    rows = []
    for one in success:
        low, high = wilson(one["hits"], one["rows"])
        rows.append((short(one["string"], 28), one["label"], f"{one['rate']:.2f} [{low:.2f}, {high:.2f}]",
                     f"{one['bare']:.2f}", f"{one['rows']}"))  # fmt: skip
    return table(("string put into rows", "for", "attack success", "no string", "rows"), rows, least=28)


# --- the command


def main(argv):
    parser = Parser(
        prog=to_type("evaluate"),
        description="Scan an adapter for a trigger, without its training data: which strings does it answer to "
        "beyond what they mean?",
    )
    parser.add_argument("--scan-adapter", nargs="?", metavar="DIR", help="a finished run, or a PEFT folder")
    parser.add_argument("--model", metavar="BASE", help="the base: hub id or folder (default: the run's)")
    parser.add_argument("--data", metavar="FILE", help="labelled rows on which the suspects are tried")
    parser.add_argument("--kinds", metavar="FILE", help="a TOML file of more kinds: KIND = a list of strings")
    parser.add_argument("--null", type=int, default=0, metavar="N",
                        help="train N clean adapters of the base, once, and put their figures beside")  # fmt: skip
    parser.add_argument("--null-data", metavar="DATA", help="what they are trained on (default: the default rows)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="keep what is found within so many seconds")
    parser.add_argument("--out", metavar="DIR", help="write scan.json and scan.txt to this new folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only the result: no progress")
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    arguments = parser.parse_args(argv)
    out = check(arguments)
    with quiet(arguments.quiet):
        found, adapter = scan_folder(arguments)
    text = "\n".join(lines_of(found, adapter))
    said = {"adapter": adapter} | found
    if out:
        out.mkdir(parents=True)
        files.write_json(out / "scan.json", said)
        files.write_text(out / "scan.txt", text + "\n")
    print(json.dumps(said, allow_nan=False) if arguments.json else text)


def check(arguments):
    """The new folder of --out, or None. Raises InputError for values that mean nothing, before a base is loaded."""
    from minilora.detection.weights import LEAST

    if arguments.scan_adapter is None:
        raise InputError("--scan-adapter needs a folder: name a finished run or a PEFT adapter's folder")
    if arguments.budget is not None and not (arguments.budget > 0 and math.isfinite(arguments.budget)):
        raise InputError(f"--budget is {arguments.budget}, but must be a number of seconds above 0")
    if arguments.null and arguments.null < LEAST:
        raise InputError(f"--null is {arguments.null}, but must be at least {LEAST}: fewer have no spread")
    if arguments.null_data and not arguments.null:
        raise InputError("--null-data is what clean adapters are trained on: give --null N too")
    out = Path(arguments.out) if arguments.out else None
    if out and out.exists():
        raise InputError(f"{out} exists: choose another --out")
    if out:
        files.try_folder(out, "--out")
    return out


def scan_folder(arguments):
    """(What `scan` finds in the folder that was named, its name)."""
    import minilora
    from minilora.detection.kinds import read_kinds

    folder = Path(arguments.scan_adapter)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: --scan-adapter names a finished run or a PEFT adapter's folder")
    foreign = not (folder / "cell.toml").exists() and (folder / "adapter_config.json").is_file()
    if foreign and arguments.model is None:
        raise InputError(f"{folder} is an adapter without a run: name its base too, --model BASE")
    kinds = read_kinds(arguments.kinds)
    run = minilora.open(folder, model=arguments.model, data=arguments.data)
    rows = run.tests[0].rows if arguments.data else None
    found = scan(run, kinds, budget=arguments.budget, rows=rows, null=arguments.null, null_data=arguments.null_data)
    return found, f"{folder} on {run.cell.model}"
