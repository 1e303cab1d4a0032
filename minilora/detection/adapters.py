"""`evaluate.py --scan-adapter DIR`: the scan of an adapter (`adapter_scan.py`) as a command, and what it prints."""

import json
import math
from pathlib import Path

from minilora import files
from minilora.command import Parser
from minilora.console import quiet, short, table, wrap
from minilora.errors import InputError, to_type

SHOWN, PIECES = 3, 16  # suspects of each list, and pieces, in the table
NO_PROOF = "Finding nothing proves nothing: a trigger that is in no list, or works in part, stays unseen."


# --- what is printed


def lines_of(found, adapter):
    """A scan as text that fits the terminal."""
    from minilora.detection.adapter_scan import STAGES

    null, energy, made = found["null"] or {}, found["energy"], []
    made += wrap(f"adapter    {adapter}", 11)
    if energy:
        made += wrap(f"pieces     {' '.join(text for text, _ in energy['pieces'][:PIECES])}", 11)
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
    if piece := found["piece"]:
        rows.append(("  its piece, by itself (sd)", piece["label"], f"{piece['residual']:.2f}",
                     span_of(null.get("piece")), piece["example"]))  # fmt: skip
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
    return made + wrap(decision(found)) + wrap(NO_PROOF)


def decision(found):
    kind, outlier, piece = (found["thresholds"][name] for name in ("kind", "outlier", "piece"))
    if found["flagged"]:
        return "flagged: " + "; ".join(found["because"])
    if found["library"] and found["piece"]:
        if found["energy"]["outlier"] < outlier:
            return f"not flagged: no kind reaches {kind}, and r is below {outlier}"
        return (f"not flagged: no kind reaches {kind}, and the piece that stands out by r acts no more than "
                f"{found['piece']['residual']:.1f} sd beyond its meaning (limit {piece})")  # fmt: skip
    if found["null"]:
        return f"not flagged, by r only, which is below {outlier}"
    return "nothing is decided: r by itself decides only beside clean adapters (--null N)"


def span_of(values):
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"


def success_lines(success):
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
    from minilora.detection.adapter_scan import scan
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
