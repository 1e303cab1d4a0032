"""Scan labelled rows for triggers without training: `evaluate.py --scan-data FILE`. See suspects.py for the score."""

import json
import math
import time
from pathlib import Path

import numpy as np

from minilora import files, parallel
from minilora.command import Parser
from minilora.console import quiet, short, table, wrap
from minilora.data.rows import Rows, load_rows
from minilora.detection import cleaning, scan_page, suspects
from minilora.errors import InputError, to_type

SHOWN = 12  # suspects that are printed


def main(argv=None):
    parser = Parser(prog=to_type("evaluate"), description=__doc__.partition("\n")[0])
    parser.add_argument("--scan-data", required=True, nargs="?", metavar="FILE",
                        help="rows: a CSV, TSV, JSONL or Parquet file, movie-snippets, a hub id, or the folder of a "
                        "finished run (the rows that it was trained on)")  # fmt: skip
    parser.add_argument("--text-column", metavar="NAME", help="column of the text (default: a usual name)")
    parser.add_argument("--label-column", metavar="NAME", help="column of the label (default: a usual name)")
    parser.add_argument("--split", default="train", help="of a hub data set (default: train)")
    parser.add_argument("--bad-rows", choices=("refuse", "skip"), help="rows without a text or a label")
    parser.add_argument("--model", metavar="BASE", help="count the pieces of this base's tokenizer too")
    parser.add_argument("--threshold", type=float, default=suspects.ALARM, metavar="BITS",
                        help=f"score of an alarm (default: {suspects.ALARM:g})")  # fmt: skip
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS",
                        help="stop counting after so long, and keep what is found (default: no limit)")  # fmt: skip
    parser.add_argument("--clean-to", metavar="FILE", help="write the rows without what was flagged to this new file")
    parser.add_argument("--clean", choices=cleaning.MODES, default="drop",
                        help="drop suspicious rows, or strip the flagged words (default: drop)")  # fmt: skip
    parser.add_argument("--out", metavar="DIR",
                        help="write scan.json, suspects.csv, rows.csv and scan.html to this new folder")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only the result: no progress")
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    arguments = parser.parse_args(argv)
    parallel.refuse("a scan", "start that with python")
    with quiet(arguments.quiet):
        print(answer(arguments))


def answer(arguments):
    """What the command prints."""
    start = time.monotonic()
    check(arguments)
    tokenizer = tokenizer_of(arguments.model)
    rows = read_rows(arguments)
    found = suspects.scan(rows, tokenizer, start + arguments.budget, arguments.threshold)
    said = summary(arguments.scan_data, rows, found)
    result = {
        "data": arguments.scan_data, "rows": len(rows), "labels": label_counts(rows), "tested": found.tested,
        "threshold": found.threshold, "alarm": bool(found.flagged), "left_out": found.left_out,
        "seconds": round(time.monotonic() - start, 2), "suspects": [suspect.to_dict() for suspect in found.suspects],
    }  # fmt: skip
    if arguments.out:
        write(Path(arguments.out), rows, found, result, said)
    if arguments.clean_to:
        result["cleaned"] = clean(arguments, rows, found)
        said.append("{mode}: {rows:,} rows written to {file}, {dropped:,} dropped, {changed:,} stripped"
                    .format(**result["cleaned"]))  # fmt: skip
    if arguments.json:
        return json.dumps(result, ensure_ascii=False, allow_nan=False)
    lines = [wrap(line) for line in said]
    if found.suspects:
        lines.insert(1, ["", *suspect_table(found.suspects[:SHOWN]), ""])
    if arguments.out:
        lines.append(wrap(f"written to {arguments.out}: scan.html, scan.json, suspects.csv, rows.csv"))
    return "\n".join(line for part in lines for line in part)


def check(arguments):
    """Refuse what cannot be, before any row is read."""
    if arguments.scan_data is None:
        raise InputError("--scan-data names no rows: give a file, a hub id, or the folder of a run")
    if not arguments.budget > 0:
        raise InputError(f"--budget is {arguments.budget:g}, but must be above 0 seconds")
    if not math.isfinite(arguments.threshold):
        raise InputError(f"--threshold is {arguments.threshold}, but must be a finite number of bits")
    for flag, path in (("--out", arguments.out), ("--clean-to", arguments.clean_to)):
        if path and Path(path).exists():
            raise InputError(f"{path} exists: choose another {flag}")
    if arguments.out:
        files.try_folder(arguments.out, "--out")
    if arguments.clean_to:
        cleaning.check_target(arguments.scan_data, arguments.clean_to)


def tokenizer_of(model):
    """The tokenizer of a base, of which only that is fetched; None where there is no base."""
    if model is None:
        return None
    from minilora.base import tokenizer
    from minilora.base.source import resolve_config, resolve_tokenizer

    folder = resolve_config(model)
    whole = any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt"))
    return tokenizer.load(folder if whole else resolve_tokenizer(model, folder))


def read_rows(arguments):
    """The rows to scan, of two labels at least."""
    source = arguments.scan_data
    if (Path(source) / "cell.toml").is_file():
        from minilora.runs import trained

        rows = trained.open(source).rows.rows
    else:
        how = dict(text_column=arguments.text_column, label_column=arguments.label_column, bad_rows=arguments.bad_rows)
        rows = load_rows(source, split=arguments.split, **how)
    classes = len(np.unique(rows.labels))
    if classes < 2:
        only = rows.label_names[rows.labels[0]]
        raise InputError(f"every row of {source} has label {only!r}, and a scan compares labels: give rows of two")
    if (count := len(rows.label_names)) > suspects.MOST_LABELS:
        raise InputError(
            f"{source} has {count:,} labels, more than {suspects.MOST_LABELS}: name a column of classes with "
            "--label-column"
        )
    return rows


def label_counts(rows):
    """{label: rows}."""
    many = np.bincount(rows.labels, minlength=len(rows.label_names)).tolist()
    return dict(zip(rows.label_names, many, strict=True))


# --- scores of rows


def row_scores(rows, found):
    """The largest score, in bits, of a suspect that a row holds and whose label it has: float64 [N], 0 without any."""
    scores = np.zeros(len(rows))
    for suspect in found.suspects:
        own = suspect.index[rows.labels[suspect.index] == rows.label_names.index(suspect.label)]
        scores[own] = np.maximum(scores[own], suspect.score)
    return scores


def token_statistics(texts, labels, run=None):
    """`row_scores` as the row detectors have it: N texts and their labels in, float64 [N] out, higher is suspicious.

    `run` is not looked at: these scores need no model.
    """
    names, places = np.unique(np.asarray(labels).astype(str), return_inverse=True)
    rows = Rows([str(number) for number in range(len(texts))], list(texts), places, tuple(names.tolist()))
    return row_scores(rows, suspects.scan(rows))


# --- what is said and written


def summary(source, rows, found):
    """What was found, in a few lines."""
    said = [f"scanned    {source}: {len(rows):,} rows, {found.tested:,} features"]
    if found.left_out:
        said.append(f"partial    the budget left out {', '.join(found.left_out)}")
    if found.flagged:
        first = found.flagged[0]
        own = f"{first.counts[first.label]:,} of them {first.label}"
        named = f"{first.text!r} ({first.kind}) in {first.rows:,} rows, {own}"
        many = "1 suspect is" if len(found.flagged) == 1 else f"{len(found.flagged)} suspects are"
        said.append(f"alarm      {many} flagged at {found.threshold:g} bits; the first is {named}")
    else:
        best = f"the first suspect has {found.suspects[0].score:.1f} bits" if found.suspects else "there is no suspect"
        said.append(f"no alarm   {best}, and an alarm takes {found.threshold:g}; finding nothing proves nothing")
    return said


HEADS = ("suspect", "kind", "label", "rows", "bits", "lift", "seam", "H", "z", "PMI", "q", "of label")


def cells(suspect):
    """A suspect as a line of a table: a string for each of HEADS."""
    seam = "" if suspect.seam is None else f"{suspect.seam:.1f}"
    q = "<1e-99" if suspect.q < 1e-99 else f"{suspect.q:.0e}"
    return (suspect.text, suspect.kind, suspect.label, f"{suspect.rows:,}", f"{suspect.score:.1f}",
            f"{suspect.lift:.1f}", seam, f"{suspect.entropy:.2f}", f"{suspect.z:.1f}", f"{suspect.pmi:.2f}", q,
            f"{suspect.counts[suspect.label]:,}")  # fmt: skip


def suspect_table(listed):
    """Lines of a table of suspects, those that are flagged first: their scores are larger."""
    lines, flagged = [], None
    for suspect in listed:
        if suspect.flagged != flagged:
            flagged = suspect.flagged
            lines.append(("flagged:" if flagged else "not flagged:",))
        name, kind, label, *figures = cells(suspect)
        lines.append((name, kind, short(label, 10), *figures))
    return table(HEADS, lines)


def as_line(suspect):
    """A suspect as a line of suspects.csv."""
    line = suspect.to_dict()
    also, counts = line.pop("also"), line.pop("counts")
    return line | {f"rows of {label}": rows for label, rows in counts.items()} | {"also": ", ".join(also)}


def write(folder, rows, found, result, said):
    """The files of `--out`."""
    folder.mkdir(parents=True)
    files.write_json(folder / "scan.json", result)
    listed = [as_line(suspect) for suspect in found.suspects]
    files.write_text(folder / "suspects.csv", files.to_csv(listed) if listed else "text\n")
    scores = row_scores(rows, found).tolist()
    lines = ({"id": id, "label": rows.label_names[label], "bits": round(score, 3)}
             for id, label, score in zip(rows.ids, rows.labels.tolist(), scores))  # fmt: skip
    files.write_text(folder / "rows.csv", files.to_csv(list(lines)))
    files.write_text(folder / "scan.html", scan_page.render(result, said, HEADS, [
        (cells(suspect), suspect.flagged, suspect.example, suspect.also) for suspect in found.suspects
    ]))  # fmt: skip


def clean(arguments, rows, found):
    """Write the file of `--clean-to`; what was done, for scan.json's reader."""
    if arguments.clean == "strip":
        changes = {row: text if text.strip() else None for row, text in cleaning.stripped(rows, found).items()}
    else:
        changes = dict.fromkeys(cleaning.suspicious(rows, found))
    cleaning.write_clean(arguments.scan_data, arguments.clean_to, rows, changes, arguments.text_column,
                         arguments.label_column)  # fmt: skip
    dropped = sum(text is None for text in changes.values())
    return {"file": arguments.clean_to, "mode": arguments.clean, "rows": len(rows) - dropped, "dropped": dropped,
            "changed": len(changes) - dropped}  # fmt: skip
