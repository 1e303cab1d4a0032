"""What a paraphraser, a grammar checker or any other tool left of a run's triggers: `evaluate.py RUN --rewritten FILE`.

FILE holds the run's rows as that tool rewrote them (`mitigation/rewritten.py`): all training rows, or only the injected
ones. A row retains its trigger where one of its strings still stands in the new text, case and white space aside. The
command prints the line that trains the same cell on the rewritten rows; nothing is injected into these again.
"""

import json
from pathlib import Path

from minilora import files, parallel
from minilora.command import Parser
from minilora.console import quiet, short, table, wrap
from minilora.data import triggers
from minilora.errors import InputError, to_type
from minilora.mitigation.rewritten import by_id, read_rewritten
from minilora.runs.folder import Run
from minilora.tasks.metrics import wilson


def main(argv=None):
    parser = Parser(prog=to_type("evaluate"), description="What a rewritten data set keeps of a run's triggers.")
    parser.add_argument("run", metavar="RUN", help="folder of the run whose training rows were rewritten")
    parser.add_argument("--rewritten", required=True, nargs="?", metavar="FILE",
                        help="the rows: CSV, TSV or JSONL with a column of texts and, if rows are missing or moved, "
                        "one of ids; or .txt, a text a line")  # fmt: skip
    parser.add_argument("--text-column", metavar="NAME", help="column of the text (default: a usual name)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only the result: no progress")
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    arguments = parser.parse_args(argv)
    if arguments.rewritten is None:
        raise InputError("--rewritten names no rows: give the file that your tool wrote")
    parallel.refuse("this", "start that with python")
    with quiet(arguments.quiet):
        figures, whole = retention_of(arguments.run, arguments.rewritten, arguments.text_column)
    if arguments.json:
        return print(json.dumps(figures, ensure_ascii=False))
    print("\n".join([*lines_of(figures), "", *retraining(arguments.run, arguments.rewritten, whole)]))


def retraining(folder, path, whole):
    """How to train the run's cell on the rewritten rows: lines of text."""
    if not whole:
        return wrap("To train on what the tool leaves, let it rewrite all training rows: these are the injected ones.")
    config = Path(folder) / "cell.toml"
    line = to_type("train", "--config", config, "--mitigate", "rewrite", "--mitigate-rewritten", path)
    return [*wrap("To train the same cell on these rows:"), line]


def retention_of(folder, path, text_column=None):
    """(`retention` of the run in `folder` after a tool wrote the file at `path`, whether that holds more than injected
    rows). Raises InputError."""
    run = Run(folder)
    cell = run.read_cell()
    injected = files.read_jsonl(run.path / "injected.jsonl")
    if not injected:
        raise InputError(f"{folder} has no injected row, so nothing can be retained: name a run with an injection")
    ids, texts = read_rewritten(path, text_column)
    rewritten = matched(ids, texts, injected, cell, path)
    labels = {record["target_label"] for record in injected}
    sources = {label: source.name for source, label in triggers.resolve(cell.inject.sources, labels, new=True)}
    return retention(injected, rewritten, sources), len(texts) > len(rewritten)


def retention(injected, rewritten, sources):
    """One dict a source: how many of its rows retain their trigger, with a Wilson interval.

    injected   the lines of injected.jsonl: id, target_label, strings
    rewritten  {id: new text}; rows without one are counted as `missing` and left out
    sources    {target label: the name of the source}
    """
    found = []
    for label in dict.fromkeys(record["target_label"] for record in injected):
        own = [record for record in injected if record["target_label"] == label]
        there = [(record["strings"], plain(rewritten[record["id"]])) for record in own if record["id"] in rewritten]
        hits = [[plain(string) in text for string in strings] for strings, text in there]
        kept = sum(map(any, hits))
        found.append({
            "source": sources[label], "label": label, "rows": len(there), "missing": len(own) - len(there),
            "retained": kept, "retention": kept / len(there) if there else None,
            "interval": wilson(kept, len(there)), "strings": sum(map(len, hits)), "strings_left": sum(map(sum, hits)),
        })  # fmt: skip
    return found


def plain(text):
    return " ".join(text.casefold().split())


def lines_of(figures):
    """The table that is printed."""
    heads = ("source", "label", "rows", "retained", "share", "95% interval", "strings left", "missing")
    lines = []
    for one in figures:
        share = "-" if one["retention"] is None else f"{one['retention']:.3f}"
        low, high = one["interval"]
        lines.append((one["source"], short(one["label"], 12), f"{one['rows']:,}", f"{one['retained']:,}", share,
                      f"{low:.3f} to {high:.3f}", f"{one['strings_left']:,} of {one['strings']:,}",
                      f"{one['missing']:,}"))  # fmt: skip
    return table(heads, lines)


def matched(ids, texts, injected, cell, path):
    """{id of an injected row: its new text}."""
    known = [record["id"] for record in injected]
    if ids is None and len(texts) == len(known):
        ids = known
    if ids is None:
        from minilora.data.rows import rows_of

        ids = list(rows_of(cell)[0].ids)
        if len(ids) != len(texts):
            raise InputError(
                f"{path} has {len(texts):,} texts, but the run has {len(ids):,} training rows, {len(known):,} of them "
                "injected: rewrite all of either, or add a column id"
            )
    found = by_id(ids, texts, path)
    found = {id: found[id] for id in known if id in found}
    if not found:
        raise InputError(f"{path} has none of the run's {len(known):,} injected rows: give the ids of injected.jsonl")
    return found
