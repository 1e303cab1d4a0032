"""`python evaluate.py RUN --detect`: which of the run's training rows do detectors suspect, and were these injected?"""

import json
from pathlib import Path

import minilora
from minilora import files, parallel
from minilora.command import Parser
from minilora.console import quiet, say, table, wrap
from minilora.detection.detectors import DETECTORS, find_detectors
from minilora.errors import InputError, to_type

ROWS = 500


def main(argv):
    about = "; ".join(f"{one.name}: {one.about}" for one in DETECTORS.values())
    parser = Parser(
        prog=to_type("evaluate"),
        description="Score a run's own training rows by detectors of injected rows, and say how many they found.",
        epilog=f"Detectors: {about}.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--detect", nargs="*", metavar="NAME", help="detectors, or all (default: all)")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N",
                        help="training rows, drawn at random; 0 is all (default: %(default)s)")  # fmt: skip
    parser.add_argument("--decoder", metavar="BASE", help="the language model of onion (default: SmolLM2-135M)")
    parser.add_argument("--copies", type=int, metavar="N", help="copies of a row that strip mixes (default: 100)")
    parser.add_argument("--budget", type=float, metavar="SECONDS",
                        help="begin nothing after so many seconds, and mark the results as partial")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="write scores.csv and detection.json to this new folder")
    parser.add_argument("--csv", action="store_true", help="print the rows' scores as CSV instead of the table")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of the table")
    parser.add_argument("--device", help="the run's device: cpu or cuda (default: the run's)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only the result: no progress")
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    given = parser.parse_args(argv)
    parallel.refuse("an evaluation", "start that with python")
    with quiet(given.quiet):
        answer(given)


def answer(given):
    """Print what the flags ask for."""
    detectors = find_detectors(given.detect)
    if given.rows < 0:
        raise InputError(f"--rows is {given.rows}, but must be at least 1, or 0 for all")
    if given.copies is not None and given.copies < 1:
        raise InputError(f"--copies is {given.copies}, but must be at least 1")
    if given.budget is not None and not 0 < given.budget < float("inf"):
        raise InputError(f"--budget is {given.budget}, but must be a positive number of seconds")
    out = Path(given.out) if given.out else None
    if out:
        if out.exists():
            raise InputError(f"{out} exists: choose another --out")
        files.try_folder(out, "--out")

    from minilora.detection.scoring import scan_run

    run = minilora.open(given.run, **({"device": given.device} if given.device else {}))
    settings = {"onion": {"device": given.device or run.cell.device}, "strip": {}}
    settings["onion"] |= {"decoder": given.decoder} if given.decoder else {}
    settings["strip"] |= {"copies": given.copies} if given.copies else {}

    def done(scan, name):
        if out:
            write(out, given.run, scan)
        say(f"{name}: {scan.found[name].seconds:.1f} s" if name in scan.found else f"{name}: {scan.missing[name]}")

    scan = scan_run(run, detectors, given.rows or None, given.budget, lenient=not given.detect or "all" in given.detect,
                    done=done, **settings)  # fmt: skip
    if given.json:
        return print(json.dumps({"run": str(given.run)} | scan.to_dict(), allow_nan=False))
    if given.csv:
        return print(files.to_csv(list(scan.lines())).rstrip("\n"))
    print("\n".join([*scan_lines(scan), *([f"written to {out}"] if out else [])]))


def write(folder, run, scan):
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "detection.json", {"run": str(run)} | scan.to_dict())
    files.write_text(folder / "scores.csv", files.to_csv(list(scan.lines())))


# --- as text

HEADS = ("detector", "ROC-AUC", "at 1%", "at 5%", "FRR", "FAR", "seconds")


def scan_lines(scan):
    """A scan's figures as lines of text: a table, and what its columns are."""
    injected = int(scan.injected.sum())
    yield from wrap(f"{len(scan.rows):,} training rows, {injected:,} of them injected")
    figures = scan.to_dict()["detectors"]
    yield from table(HEADS, [table_line(name, one) for name, one in figures.items()])
    yield from wrap("ROC-AUC: with its 95% interval; 0.5 is chance, and below it injected rows look less suspicious. "
                    "At 1%, 5%: the share of injected rows found where so many clean ones are flagged. FRR, FAR: of "
                    "the detector's own rule, or of the threshold that rejects 1% of the clean rows held apart "
                    f"({scan.held:,} test rows): clean rows rejected, injected rows accepted.")  # fmt: skip
    for name, one in figures.items():
        if one["partial"]:
            yield from wrap(f"partial: {name} scored {one['scored']:,} of {len(scan.rows):,} rows within the budget")
    for name, why in scan.missing.items():
        yield from wrap(f"partial: {name} did not end within the budget" if why == "budget" else f"left out: {why}")


def table_line(name, figures):
    """A detector's figures as the cells of `HEADS`."""

    def shown(value, digits=3):
        return "-" if value is None else f"{value:.{digits}f}"

    area = shown(figures["auc"])
    if figures["auc"] is not None:
        area += " [{:.2f}, {:.2f}]".format(*figures["auc_interval"])
    shares = [shown(figures[key]) for key in ("recall_1", "recall_5", "frr", "far")]
    return (name + "*" * figures["partial"], area, *shares, shown(figures["seconds"], 1))
