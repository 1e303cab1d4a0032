"""All diagnostics of a run in one call, and what they leave in a folder: of each part NAME.json, NAME.csv and a figure,
and explain.html, a page of all parts.

rows.json holds the rows that all parts look at. A part that fails, or is interrupted, keeps what it found so far: its
JSON then says why, under "unfinished", or "left_out" where there is nothing.
"""

import contextlib
import json
import math
from functools import cached_property
from pathlib import Path

import numpy as np

from minilora import __version__, files
from minilora.console import Progress
from minilora.diagnostics import attention, attribution, energy, knockout, page, pictures, spectrum
from minilora.diagnostics.formation import formation
from minilora.diagnostics.neighbours import neighbours, read_families, source_of_trigger, tables_of
from minilora.diagnostics.probe import Probe
from minilora.errors import InputError
from minilora.runs.folder import Run

ROWS = 60  # of a probe where nothing else is asked for: all parts take about two minutes on two cores
SHOWN = 40  # rows whose tokens are kept one by one
BESIDE = 10  # rows whose other forms are attributed too, for the page only: each takes seconds of a core
DIGITS = 6  # of a number in JSON


class Looking:
    """What the parts share: an opened run, and the probe, which is made when it is first needed."""

    def __init__(self, run, rows, label, seed, families):
        self.run, self.rows, self.label, self.seed, self.families = run, rows, label, seed, families

    @cached_property
    def probe(self):
        return Probe(self.run, self.rows, self.label, self.seed)

    @property
    def ids(self):
        return self.probe.ids[:SHOWN]


def explain(run, parts=None, rows=ROWS, out=None, seed=0, label=None, families=None):
    """Look into an opened run (a `Trained`): {part: what its JSON holds}. `parts`: names of `PARTS` (default: all).

    rows, label, seed  those of `Probe`
    out                the folder for the results (default: explain/ in the run's)
    families           a file of further neighbours of the trigger

    A part that the run has no data for is left out, which its entry says. Raises InputError as `check_parts`, for
    fewer than two `rows`, and for a `label` that no trigger aims at.
    """
    parts, looking = check_parts(parts, families), Looking(run, rows, label, seed, families)
    if rows < 2:
        raise InputError(f"--rows is {rows}, but must be at least 2")
    if label is not None:
        looking.probe  # noqa: B018  what it refuses is no reason to leave a part out
    out = Path(run.folder) / "explain" if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(InputError):  # without rows there is still a spectrum
        write(out / "rows.json", header(looking, "rows") | rows_of(looking.probe))
    done = {}
    for part in parts:
        found = {}
        for path in (out / f"{part}.{ending}" for ending in ("csv", "png", "pdf", "svg")):
            path.unlink(missing_ok=True)  # of an earlier look
        try:
            PARTS[part](looking, found)
        except BaseException as error:
            found["unfinished" if found else "left_out"] = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, InputError):
                raise
        finally:
            whole = header(looking, part) | {"rows": rows} | found
            write(out / f"{part}.json", whole)
            done[part] = plain(whole)
        if lines := LINES.get(part, flat_lines)(done[part]):
            files.write_text(out / f"{part}.csv", files.to_csv(lines))
        pictures.draw(out, part, done[part])
    page.write_page(run.folder, out)
    return done


def check_parts(parts, families=None):
    """The parts in the order in which they are made. Raises InputError for one that there is not, and for a file of
    `families` that has none, or that no part uses."""
    if unknown := [part for part in parts or () if part not in PARTS]:
        raise InputError(f"--explain has no part {unknown[0]!r}: choose among {', '.join(PARTS)}, or all")
    if families is not None:
        if parts and "neighbours" not in parts:
            raise InputError(f"--neighbours is for the part neighbours, but --explain {' '.join(parts)} leaves it out: "
                             "name it too, or drop the flag")  # fmt: skip
        tables_of(families)
    return [part for part in PARTS if not parts or part in parts]


def header(looking, part):
    """What every file of results says first."""
    run, found = looking.run, {}
    with contextlib.suppress(InputError):  # a spectrum needs no rows
        probe = looking.probe
        unread = sum(not span.any() for span in probe.forms["trigger"].span)
        found = {"label": probe.label, "count": len(probe.index), "unread": unread}
    return {"part": part, "run": str(run.folder), "seed": looking.seed, "version": __version__,
            "model": run.cell.model, "method": run.cell.method, "rank": run.cell.rank, "labels": list(run.labels),
            "label": None, "count": 0, "unread": 0} | found  # fmt: skip


def write(path, value):
    files.write_text(path, json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n")


def plain(value):
    """A value as JSON has it: arrays are lists, numbers have `DIGITS` digits, and what is not finite is None."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def rows_of(probe):
    """The rows of a probe as the page reads them."""
    run, names = probe.run, probe.run.labels
    rows = []
    for row, id in enumerate(probe.ids):
        forms = {}
        for name, form in probe.forms.items():
            outcome = probe.outcomes[name]
            forms[name] = {
                "text": form.texts[row], "pieces": form.pieces(run.tokenizer, row), "special": ~form.text[row],
                "span": form.span[row], "predicted": names[outcome.predicted[row]],
                "probability": outcome.shares[row], "margin": outcome.margins[row],
            }  # fmt: skip
        rows.append({"id": id, "label": names[probe.labels[row]], "forms": forms})
    return {"rows": rows}


# --- parts: each adds what it finds to `found` as it goes


def figure(found):
    """(mean, low, high), arrays of a shape, as one array [..., 3]."""
    return np.stack(found, axis=-1)


def make_attention(looking, found):
    probe = looking.probe
    with Progress("attention", 2 * len(probe.index) * len(probe.forms)) as progress:
        made = attention.attention(probe, progress.advance)

    def figures(own):
        return {what: {name: figure(three) for name, three in forms.items()} for what, forms in own.items()}

    received, change, without = made.pop("received"), made.pop("change"), made.pop("without")
    found |= {"layers": len(probe.run.base.layers), "heads": max(layer.heads for layer in probe.run.base.spec.layers)}
    found |= figures(made) | {"change": figure(change), "without": figures(without)}
    found["rows"] = {id: {name: received[name][row] for name in probe.forms} for row, id in enumerate(looking.ids)}


def make_attribution(looking, found):
    probe = looking.probe
    forms = {name: form if name == "trigger" else form.first(BESIDE) for name, form in probe.forms.items()}
    with Progress("attribution", 2 * sum(len(form.texts) for form in forms.values())) as progress:
        made = {}
        for name in sorted(forms, key=lambda name: name != "trigger"):
            made[name] = own = attribution.attribute(probe, forms[name], advance=progress.advance)
            if name == "trigger":
                found["scores"] = attribution.attribution(probe, own)
                found["completeness"] = {"most": np.max(own.left), "within": np.mean(own.left <= attribution.COMPLETE),
                                         "nodes": [int(own.nodes.min()), int(own.nodes.max())]}  # fmt: skip
            found["rows"] = {
                id: {form: {method: values[row] for method, values in own.scores.items()} for form, own in made.items()
                     if row < len(next(iter(own.scores.values())))}
                for row, id in enumerate(looking.ids)
            }


def make_spectrum(looking, found):
    run, own = looking.run, spectrum.spectra(looking.run)
    found["modules"] = {name: one.figures() for name, one in own.items()}
    found["whole_update"] = run.cell.method == "full" or run.cell.variant == "dora"
    moved = energy.energies(run, {name: (one.V * one.S).T for name, one in own.items()})
    found["pieces"] = [(run.tokenizer.piece(id), value) for id, value in moved.first]
    try:
        for name, forms in spectrum.alignment(looking.probe, own).items():
            found["modules"][name]["alignment"] = {form: figure(three) for form, three in forms.items()}
    except InputError as error:
        found["alignment_left_out"] = str(error)
    if spectrum.work(own) > spectrum.MOST_WORK:
        found["weights_left_out"] = "the weights are large: minilora.diagnostics.spectrum.beside_weight compares one"
        return
    with Progress("spectrum", len(own), unit="module") as progress:
        for name, one in own.items():
            found["modules"][name] |= spectrum.beside_weight(one)
            progress.advance(1)


def make_knockout(looking, found):
    probe, run = looking.probe, looking.run
    settings, order = knockout.settings_of(run), None
    try:
        own, order = knockout.direction_settings(run)
        settings += own
    except InputError as error:
        found["directions_left_out"] = str(error)
    measured = knockout.Knockouts(probe)
    whole = knockout.whole_settings(run)
    try:
        with Progress("knock-outs", len(settings), unit="setting") as progress:
            measured.measure(settings, progress.advance)
        measured.add_redundancy(run)
        found["carrying"] = measured.carrying(order) if order else None
    finally:
        names = [(one.kind, one.name) for one in (*whole, *settings)]
        found["settings"] = [{"kind": key[0], "name": key[1]} | measured.figures[key]
                             for key in names if key in measured.figures]  # fmt: skip
    if "placebo" in probe.forms:
        found["patching"] = knockout.patching(probe)


def make_formation(looking, found):
    with Progress("formation", len(Run(looking.run.folder).watched()), unit="step") as progress:
        found |= formation(looking.run, looking.rows, looking.seed, progress.advance, looking.label)


def make_neighbours(looking, found):
    families = read_families(source_of_trigger(looking.probe), looking.families)
    with Progress("neighbours", len(families), unit="family") as progress:
        found |= neighbours(looking.run, looking.rows, looking.seed, looking.families, progress.advance, looking.label)


PARTS = {"attention": make_attention, "attribution": make_attribution, "spectrum": make_spectrum,
         "knockout": make_knockout, "formation": make_formation, "neighbours": make_neighbours}  # fmt: skip


# --- CSV: a line a figure


def line(names, three):
    return names | dict(zip(("mean", "low", "high"), three, strict=True))


def attention_lines(data):
    found = []
    for what in ("entropy", "span_share", "auc"):
        for form, own in data.get(what, {}).items():
            found += [line({"figure": what, "of": form, "layer": layer, "head": head}, three)
                      for layer, heads in enumerate(own) for head, three in enumerate(heads)]  # fmt: skip
    return found


def attribution_lines(data):
    return [line({"method": method, "figure": name}, three)
            for method, own in data.get("scores", {}).items() for name, three in own.items()]  # fmt: skip


def spectrum_lines(data):
    names = ("norm", "relative_norm", "spectral_norm", "stable_rank", "effective_rank", "intruders")
    return [{"module": module} | {name: own.get(name) for name in names}
            for module, own in data.get("modules", {}).items()]  # fmt: skip


def knockout_lines(data):
    return [line({"kind": own["kind"], "name": own["name"], "figure": name}, three) for own in data.get("settings", [])
            for name, three in own.items() if name not in ("kind", "name")]  # fmt: skip


def flat_lines(data):
    """Every number of a part of another shape, by its place, such as curves/0/mean."""
    found = []

    def walk(value, place):
        if isinstance(value, (dict, list)):
            for key, one in value.items() if isinstance(value, dict) else enumerate(value):
                walk(one, [*place, str(key)])
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append({"place": "/".join(place), "value": value})

    walk(data, [])
    return found


LINES = {"attention": attention_lines, "attribution": attribution_lines, "spectrum": spectrum_lines,
         "knockout": knockout_lines}  # fmt: skip
