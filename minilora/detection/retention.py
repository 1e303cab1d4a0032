"""What a paraphraser, a grammar checker or any other tool left of a run's triggers: `evaluate.py RUN --rewritten FILE`.

FILE holds the run's rows as that tool rewrote them: CSV, TSV, JSON lines or a text a line (.txt). Rows are matched by
their id where the file has a column `id`, else by order: all training rows, or only the injected ones. A row retains
its trigger where one of its strings still stands in the new text, case and white space aside.
"""

import csv
import io
import json
from pathlib import Path

from minilora import files, parallel
from minilora.command import Parser
from minilora.console import quiet, short, table
from minilora.data import formats, triggers
from minilora.data.columns import TEXT_COLUMNS
from minilora.errors import InputError, first_words, to_type
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
        figures = retention_of(arguments.run, arguments.rewritten, arguments.text_column)
    print(json.dumps(figures, ensure_ascii=False) if arguments.json else "\n".join(lines_of(figures)))


def retention_of(folder, path, text_column=None):
    """`retention` of the run in `folder` after a tool wrote the file at `path`. Raises InputError."""
    run = Run(folder)
    cell = run.read_cell()
    injected = files.read_jsonl(run.path / "injected.jsonl")
    if not injected:
        raise InputError(f"{folder} has no injected row, so nothing can be retained: name a run with an injection")
    rewritten = matched(*read_rewritten(path, text_column), injected, cell, path)
    labels = {record["target_label"] for record in injected}
    sources = {label: source.name for source, label in triggers.resolve(cell.inject.sources, labels, new=True)}
    return retention(injected, rewritten, sources)


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


def read_rewritten(path, text_column=None):
    """(ids or None, texts) of a file. Raises InputError."""
    path = Path(path)
    form = ".txt" if path.suffix.lower() == ".txt" else formats.format_of(path.name)
    if form not in (".txt", ".csv", ".tsv", ".jsonl", ".ndjson") or path.suffix.lower() == ".gz":
        raise InputError(f"{path} is not CSV, TSV, JSON lines or .txt: convert it")
    files.check_regular(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
        if form == ".txt":
            return None, [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        if form in (".jsonl", ".ndjson"):
            records = [files.parse_json(line) for line in text.split("\n") if line.strip()]
        else:
            csv.field_size_limit(2**31 - 1)
            lines = io.StringIO(text.lstrip(), newline="")
            first = lines.readline()
            lines.seek(0)
            how = (dict(delimiter="\t", quoting=csv.QUOTE_NONE) if form == ".tsv" else
                   dict(delimiter=formats.delimiter(first), strict=True))  # fmt: skip
            records = list(csv.DictReader(lines, **how))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}: convert it") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({first_words(error)}): correct it") from None
    if not records or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path} has no rows with named columns: write a text a row")
    wanted = TEXT_COLUMNS if text_column is None else (text_column,)
    column = next((name for name in ("rewritten", *wanted) if name in records[0]), None)
    if column is None:
        raise InputError(f"{path} has no text column ({', '.join(wanted)}): name it with --text-column")
    texts = [record.get(column) for record in records]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InputError(f"{path} row {number}: the text is no string: correct it")
    return ([str(record["id"]) for record in records] if all("id" in record for record in records) else None), texts


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
    found = dict(zip(ids, texts))
    if len(found) < len(ids):
        raise InputError(f"{path} has an id twice: write each row once")
    found = {id: found[id] for id in known if id in found}
    if not found:
        raise InputError(f"{path} has none of the run's {len(known):,} injected rows: give the ids of injected.jsonl")
    return found
