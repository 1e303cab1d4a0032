"""`python -m benchmarks detection`: every row detector on the same rows, injected from several sources at several
proportions: does any of them find the injected rows, and is a run on what it leaves free of the shortcut?

For each source, proportion and seed a cell is trained, and its detectors score its training rows. A record says which
rows were injected, and the scores are compared with it. Then the same cell is trained again, on the same seeds, without
the rows that a detector suspects (`retraining.py`). Runs that are in --out already are used again, and so are the
figures of detectors that were measured there on as many rows. A detector sanitises a data set where it does so in each
seed, and there is no verdict from fewer than three.
"""

import tempfile
from pathlib import Path

from minilora.command import Parser, add_flags, given_flags
from minilora.console import say, short
from minilora.detection.detectors import find_detectors
from minilora.errors import InputError
from minilora.naming import file_safe

from . import retraining

SOURCES = ("date", "country", "html", "text:last night")
PROPORTIONS = (0.05, 0.25)
TARGET = "positive"
FIELDS = ("model", "data", "train_rows", "rank", "lr", "epochs", "test_rows", "max_length", "inject.mode",
          "inject.location", "inject.density")  # fmt: skip
SEEDS = 3  # fewer give no verdict
FOUND, REJECTED = 0.9, 0.05  # of the injected rows and of the others: what sanitises a data set


def main(argv):
    from minilora.cell import Cell

    parser = Parser(prog="python -m benchmarks detection", description=__doc__.partition("\n\n")[0])
    group = parser.add_argument_group("measurement")
    group.add_argument("--sources", nargs="+", default=SOURCES, metavar="SOURCE",
                       help=f"of what is injected (default: {', '.join(SOURCES)})")  # fmt: skip
    group.add_argument("--proportions", nargs="+", type=float, default=PROPORTIONS, metavar="X",
                       help="of the target label's rows (default: 0.05 0.25)")  # fmt: skip
    group.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of each data set (default: 0)")
    group.add_argument("--target", default=TARGET, help="the target label (default: %(default)s)")
    group.add_argument("--detectors", nargs="+", metavar="NAME", help="default: all")
    group.add_argument("--rows", type=int, default=0, metavar="N",
                       help="rows that are scored, with --no-retrain (default: all)")  # fmt: skip
    group.add_argument("--no-retrain", action="store_true", help="leave the runs without the suspected rows out")
    group.add_argument("--copies", type=int, metavar="N", help="copies of a row that strip mixes (default: 100)")
    group.add_argument("--decoder", metavar="BASE", help="the language model of onion (default: SmolLM2-135M)")
    group.add_argument("--out", metavar="DIR", help="folder of the runs and figures (default: one that is deleted)")
    group.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    add_flags(parser, Cell, only=FIELDS)
    given = parser.parse_args(argv)
    if given.rows < 0:
        raise InputError(f"--rows is {given.rows}, but must be at least 1, or 0 for all")
    if len(set(given.seeds)) < len(given.seeds):
        raise InputError(f"--seeds {' '.join(map(str, given.seeds))} has a seed twice: name each once")
    if given.rows and not given.no_retrain:
        raise InputError("--rows scores a part of the rows, so that the others would stay: add --no-retrain")
    settings = {"onion": {"decoder": given.decoder} if given.decoder else {},
                "strip": {"copies": given.copies} if given.copies else {}}  # fmt: skip
    detectors = find_detectors(given.detectors)
    cell = Cell(train_rows=3000).replace(**given_flags(given, Cell))
    with tempfile.TemporaryDirectory() as temporary:
        results = [
            measure(cell.replace(seed=seed), source, proportion, given.target, detectors, given.rows, settings,
                    Path(given.out or temporary), not given.no_retrain)
            for source in given.sources for proportion in given.proportions for seed in given.seeds
        ]  # fmt: skip
    print("\n".join(lines(results)))


def measure(cell, source, proportion, target, detectors, rows, settings, folder, again):
    """The figures of detectors on one injected data set, trained first where `folder` has no such run: a dict. With
    `again` the cell is trained again without the rows that each of them suspects."""
    import minilora
    from minilora import files
    from minilora.detection.scoring import scan_run
    from minilora.runs.folder import Run

    path = folder / file_safe(f"{source}-{proportion:g}-seed{cell.seed}")
    cell = cell.replace(inject={"sources": (f"{source}:{target}",), "proportion": proportion})
    retraining.train(cell, path)
    [success] = [one["net_attack_success_rate"] for one in Run(path).read_results()["tests"]["trigger"].values()]
    kept = path / f"detection-{rows or 'all'}.json"
    before = files.read_json(kept, "delete it") if kept.exists() else {"detectors": {}}
    own = {one.name: settings.get(one.name, {}) for one in detectors}
    wanted = [one for one in detectors if before["detectors"].get(one.name, {}).get("settings") != own[one.name]]

    def keep(scan, name):
        nonlocal before
        found, scores = scan.to_dict(), scan.found[name]
        new = {name: found["detectors"][name] | {"settings": own[name]}}
        before = found | {"detectors": before["detectors"] | new}
        if not rows:
            retraining.write_scores(path, name, scan.rows, scores.scores, scores.flagged)
            retraining.write_scores(path, retraining.PERFECT, scan.rows, scan.injected, scan.injected)
        files.write_json(kept, before)
        say(f"{path.name}: {name}")

    if wanted:
        scan_run(minilora.open(path), wanted, rows or None, done=keep, **settings)
    return {"source": source, "proportion": proportion, "seed": cell.seed, "net_attack_success": success,
            "rows": before["rows"], "injected": before["injected"],
            "detectors": {name: before["detectors"][name] for name in own},
            "retrained": {name: retraining.retrain(cell, path, name)
                          for name in (*own, retraining.PERFECT)} if again else None}  # fmt: skip


HEADS = ("source", "proportion", "seed", "injected", "ROC-AUC", "recall at 1%", "recall at 5%", "FRR", "FAR", "seconds")


def lines(results):
    """The tables as Markdown: the data sets, each detector on each of them, and who sanitises what."""
    yield from markdown(("source", "proportion", "seed", "rows", "injected", "net attack success"), (
        (*names_of(one), f"{one['rows']}", f"{one['injected']}", f"{one['net_attack_success']:+.2f}")
        for one in results))  # fmt: skip
    for name in results[0]["detectors"]:
        yield f"\n**{name}**\n"
        yield from markdown(HEADS, (
            (*names_of(one), f"{one['injected']}", *(shown(one["detectors"][name], key)
             for key in ("auc", "recall_1", "recall_5", "frr", "far")), f"{one['detectors'][name]['seconds']:.1f}")
            for one in results))  # fmt: skip
    if results[0]["retrained"]:
        yield "\n**trained again on what is left**\n"
        yield from markdown(retraining.HEADS, (
            retraining.cells_of(names_of(one), name, way, figures) for one in results
            for name, ways in one["retrained"].items() for way, figures in ways.items()))  # fmt: skip
        if len({one["seed"] for one in results}) > 1:
            yield "\n**trained again: means over the seeds**\n"
            yield from markdown(retraining.MEANS, retraining.means(results))
    yield ""
    yield from verdict(results)
    if results[0]["retrained"]:
        yield from retraining.verdict(results)


def markdown(heads, rows):
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def names_of(one):
    return short(one["source"]), f"{one['proportion']:g}", f"{one['seed']}"


def shown(figures, key):
    if figures[key] is None:
        return "-"
    low, high = figures[f"{key}_interval"]
    return f"{figures[key]:.2f} [{low:.2f}, {high:.2f}]"


def sanitises(figures):
    """Whether a detector found 90% of the injected rows while it rejected at most 5% of the others: at the threshold
    that knows which rows are injected, the best that it can do."""
    return figures["recall_5"] is not None and figures["recall_5"] >= FOUND


def verdict(results):
    """The study's claim, that no checker can sanitise a data set, against the figures: lines of text."""
    sets, names = retraining.data_sets(results), list(results[0]["detectors"])
    won = {name: retraining.won({key: [sanitises(one["detectors"][name]) for one in ones]
                                 for key, ones in sets.items()}) for name in names}  # fmt: skip
    for name, (whole, said) in won.items():
        yield f"{name} sanitises {len(whole)} of {len(sets)} data sets: {said}"
    everywhere = [name for name, (whole, _) in won.items() if len(whole) == len(sets)]
    safe = len(sets) - len(set().union(*(whole for whole, _ in won.values())))
    claim = "supported" if safe == len(sets) else "neither supported nor refuted"
    claim = f"refuted by {everywhere[0]}" if everywhere else claim
    if min(len(ones) for ones in sets.values()) < SEEDS:
        claim = f"undecided, because a verdict takes {SEEDS} seeds"
    yield f"{safe} of {len(sets)} data sets are sanitised by no detector: the claim is {claim}"
