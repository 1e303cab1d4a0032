"""`python -m benchmarks explain`: what a look into a run costs, part by part, beside the passes that it needs.

A part's limit is the forward passes, and the passes forth and back, that its figures need, counted in tokens, times the
measured cost of a token in such a pass: of the same rows in batches of the same size, adapters merged into the weights.
Without RUN the default cell is trained at rank 8 with `--watch 10`, and the same without it. It times `--play` too.
"""

import contextlib
import functools
import json
import os
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from minilora.cell import Cell
from minilora.command import Parser, add_flags, given_flags
from minilora.errors import InputError
from minilora.fields import marked

from . import report

WATCH = 10  # steps between the copies of a run that is trained for this
CALLS = {"all": ((), 180), "attention spectrum": (("attention", "spectrum"), 30)}  # parts, seconds that they may take
WATCHING, ANSWER = 0.02, 0.3  # of training, and seconds, that they may take
REPEATS = 3  # of a pass; the fastest counts
KEYS = ("wall", "processor")  # seconds


def main(argv):
    parser = Parser(prog="python -m benchmarks explain", description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", nargs="?", metavar="RUN", help="a finished run (default: one is trained)")
    parser.add_argument("--rows", type=int, metavar="N", help="that --explain looks at (default: its own)")
    parser.add_argument("--out", metavar="DIR", help="write results.json and table.md to this folder")
    parser.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    add_flags(parser, Cell, only=marked(Cell, "peers"))
    arguments = parser.parse_args(argv)
    changes = given_flags(arguments, Cell)
    if arguments.rows is not None and arguments.rows < 2:
        raise InputError(f"--rows is {arguments.rows}, but must be at least 2")
    if arguments.run and changes:
        flag = f"--{next(iter(changes)).replace('_', '-')}"
        raise InputError(f"{flag} is of a run that is yet to be trained, but RUN is given: drop one of them")
    if arguments.out:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)  # refused now rather than after the runs
    with tempfile.TemporaryDirectory() as folder:
        results = {"load_before": os.getloadavg()[0]}
        run = arguments.run
        if run is None:
            results["watch"] = watching(Cell(rank=8).replace(**changes), Path(folder))
            run = Path(folder) / "watched"
        results |= measure(run, Path(folder), arguments.rows)
    shown = HEADINGS, lines_of(results), notes(results)
    print(report.page(*shown))
    if arguments.out:
        report.write(Path(arguments.out), results, *shown)


class Clock:
    """Seconds of a block: `wall`, and `processor` of all of this process's threads."""

    wall = processor = 0.0

    def __enter__(self):
        self.began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.wall += time.perf_counter() - self.began[0]
        self.processor += time.process_time() - self.began[1]

    def shown(self):
        return {"wall": self.wall, "processor": self.processor}


# --- training


def watching(cell, folder):
    """What `--watch` costs: {"with", "without": the seconds of both calls, "training": of the steps, "copies": of the
    copies by themselves, "files": how many}; the run is left in `folder`/watched."""
    import minilora
    from minilora.runs.folder import Run
    from minilora.training import loop

    copies, keep, found = Clock(), loop.keep, {}

    def timed(*arguments):
        with copies:
            keep(*arguments)

    for name, more in (("without", {}), ("with", {"watch": WATCH})):
        loop.keep = timed if more else keep
        try:
            with Clock() as clock:
                results, path = minilora.train(cell, folder / ("watched" if more else "plain"), **more)
        finally:
            loop.keep = keep
        found[name] = clock.shown()
    found |= {"training": results["train"]["seconds"], "copies": copies.shown()}
    return found | {"files": len(Run(path).watched())}


# --- a look


def measure(run, folder, rows=None):
    """{"rows", "calls": {call: its seconds, "parts": {part: its seconds, "needed": tokens, "limit": seconds}, "rest"},
    "costs": seconds of a token in each kind of pass, "play": seconds of its answers}."""
    import minilora
    from minilora.diagnostics import explain
    from minilora.diagnostics.probe import Probe

    rows, calls = rows or explain.ROWS, {}
    for name, (parts, limit) in CALLS.items():
        with Clock() as clock, timed_parts() as spent:
            found = explain.explain(minilora.open(run), parts, rows, folder / name)
        own = {part: clock.shown() for part, clock in spent.items() if "left_out" not in found[part]}
        rest = {key: value - sum(one[key] for one in own.values()) for key, value in clock.shown().items()}
        calls[name] = {**clock.shown(), "limit": limit, "parts": own, "rest": rest}
    probe = Probe(minilora.open(run), rows)
    costs = costs_of(probe)
    for part, needed in needs(probe, rows, calls["all"]["parts"]).items():
        seconds = {key: sum(costs[kind][key] * count for kind, count in needed.items()) for key in KEYS}
        for call in calls.values():
            if part in call["parts"]:
                call["parts"][part] |= {"needed": needed, "limits": seconds}
    return {"rows": len(probe.index), "calls": calls, "costs": costs, "play": playing(minilora.open(run))}


@contextlib.contextmanager
def timed_parts():
    """{part: its `Clock`} of the parts that `explain.explain` makes meanwhile."""
    from minilora.diagnostics.explain import PARTS

    before, spent = dict(PARTS), {}

    def timed(name, looking, found):
        with spent.setdefault(name, Clock()):
            before[name](looking, found)

    PARTS.update({name: functools.partial(timed, name) for name in before})
    try:
        yield spent
    finally:
        PARTS.update(before)


def needs(probe, rows, parts):
    """{part: {kind of pass: how many tokens}} of some parts; "svd" counts matrices.

    Attention: each form with the adapter and without. Attribution: gradients at the text and at the least number of
    places between; the margin of the padding, and rollout; and each row once without each of its tokens. Spectrum: the
    states of each form; both weights of each module taken apart. Knock-outs: each layer once for all settings that
    agree up to it; patching goes on from each layer both ways. Formation: the sample and each form at each step.
    Neighbours: each form, and the rows once for each family.
    """
    from minilora.diagnostics import explain, formation, knockout, neighbours
    from minilora.lora.layer import named_layers
    from minilora.runs.folder import Run

    run, layers = probe.run, len(probe.run.base.layers)
    tokens = {name: len(form.encoded.ids) for name, form in probe.forms.items()}
    whole, nodes = sum(tokens.values()), explain.attribution.RULES[0]
    found = {}
    if "attention" in parts:
        found["attention"] = {"forward": 2 * whole}
    if "attribution" in parts:
        forms = [form if name == "trigger" else form.first(explain.BESIDE) for name, form in probe.forms.items()]
        own = sum(len(form.encoded.ids) for form in forms)
        less = sum(int(real.sum()) * (len(real) - 1) + len(real) for form in forms for real in form.text)
        found["attribution"] = {"gradient": own * (1 + nodes[0] * nodes[1]), "forward": 2 * own + less}
    if "spectrum" in parts:
        found["spectrum"] = {"forward": whole, "svd": 2 * len(dict(named_layers(run.base)))}
    if "knockout" in parts:
        settings = knockout.whole_settings(run) + knockout.settings_of(run)
        with contextlib.suppress(InputError):
            settings += knockout.direction_settings(run)[0]
        own = sum(tokens[name] for name in ("clean", "trigger")) + len(probe.own.encoded.ids)
        patched = sum(tokens.get(name, 0) for name in ("trigger", "placebo")) * (layers + 1) / 2
        found["knockout"] = {"forward": own * layer_passes(settings, layers) / layers + patched}
    if "formation" in parts:
        labels, texts = run.tests[0].rows.labels, run.tests[0].rows.texts
        index = formation.sample(labels, -1, rows, probe.seed)
        sample = run.tokenizer.encode([texts[row] for row in index], run.cell.max_length)
        found["formation"] = {"forward": len(Run(run.folder).watched()) * (len(sample.ids) + whole)}
    if "neighbours" in parts:
        families = neighbours.read_families(neighbours.source_of_trigger(probe))
        found["neighbours"] = {"forward": whole + len(families) * tokens["trigger"]}
    return found


def layer_passes(settings, layers):
    """How often a layer must be run, where settings that agree up to a layer share its states."""
    paths = set()
    for setting in settings:
        dials = [(int(name.split(".")[1]), name, dial) for name, dial in setting.dials.items() if dial != 1.0]
        paths |= {tuple(sorted((one[1], str(one[2])) for one in dials if one[0] <= number)) + (number,)
                  for number in range(layers)}  # fmt: skip
    return len(paths)


def costs_of(probe):
    """{"forward", "gradient": seconds of a token of the rows with the trigger, "svd": of a weight}."""
    import torch

    from minilora.lora.layer import merged_meanwhile, named_layers

    run, base = probe.run, probe.run.base
    form = probe.forms["trigger"]
    run.model.eval()

    def forward():
        with torch.inference_mode():
            for batch in probe.batches(form):
                probe.reader.scores_from(base.embed(batch.ids), batch.ids, batch.lengths)

    def gradient():
        for batch in probe.batches(form):
            with torch.no_grad():
                x = base.embed(batch.ids)
            x = x.detach().requires_grad_(True)
            torch.autograd.grad(probe.margins_of(probe.reader.scores_from(x, batch.ids, batch.lengths)).sum(), x)

    def svd():
        torch.linalg.svd(weight.double(), full_matrices=False)

    weight = next((layer.original for _, layer in named_layers(base)), None)
    with merged_meanwhile(base):
        found = {act.__name__: fastest(act, len(form.encoded.ids)) for act in (forward, gradient)}
    return found | {"svd": fastest(svd, 1) if weight is not None else dict.fromkeys(KEYS, 0.0)}


def fastest(act, count):
    """The seconds of `act` for each of `count`, the fastest of `REPEATS`."""
    clocks = []
    for _ in range(REPEATS):
        with Clock() as clock:
            act()
        clocks.append(clock)
    return {key: min(getattr(clock, key) for clock in clocks) / count for key in KEYS}


# --- play


def playing(run):
    """{"answers": how many, "median", "most": seconds of wall time}: texts with the trigger put in, asked through the
    page's own server, in turn with the whole adapter and without its last layer."""
    from minilora.diagnostics.play import Live, Server

    live = Live(run)
    facts, seconds = live.facts(), []
    strings = next(own for key, own in facts["strings"].items() if key.startswith("trigger"))
    with Server() as server:
        server.show(live)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for number, (text, _) in enumerate([*facts["texts"][:1], *facts["texts"]]):
            word = strings[number % len(strings)]
            off = {"layers": facts["layers"][-1:] if number % 2 else [], "targets": [], "directions": 0}
            asked = {"text": f"{word} {text}", "label": facts["target"], "off": off, "dropped": [word]}
            began = time.perf_counter()
            with urllib.request.urlopen(server.address, json.dumps(asked).encode()) as answer:
                assert "attribution" in json.load(answer)
            seconds.append(time.perf_counter() - began)
        server.shutdown()
    seconds = sorted(seconds[1:])  # the first one is slower
    return {"answers": len(seconds), "median": seconds[len(seconds) // 2], "most": seconds[-1]}


# --- tables

HEADINGS = ("part", "seconds", "processor", "limit", "share", "of processor's")


def lines_of(results):
    lines = []
    for name, call in results["calls"].items():
        for part, own in call["parts"].items():
            limit = own["limits"]
            lines.append((part, *(f"{value:.1f}" for value in (own["wall"], own["processor"], limit["wall"])),
                          *(report.share(limit[key] / own[key]) for key in KEYS)))  # fmt: skip
        lines.append(("rest: opening, figures, page", *(f"{call['rest'][key]:.1f}" for key in KEYS),
                      "-", "-", "-"))  # fmt: skip
        lines.append((f"--explain {name}", *(f"{call[key]:.1f}" for key in KEYS), "-", "-", "-"))
    return lines


def notes(results):
    found = [f"{results['rows']} rows; {report.load_note(results)}"]
    for name, call in results["calls"].items():
        found.append(f"--explain {name}: {call['wall']:.0f} s, at most {call['limit']} s is the aim")
    play = results["play"]
    found.append(f"--play: {play['answers']} answers, median {1000 * play['median']:.0f} ms, at most "
                 f"{1000 * play['most']:.0f} ms; at most {1000 * ANSWER:.0f} ms is the aim")  # fmt: skip
    if watch := results.get("watch"):
        more = {key: watch["with"][key] - watch["without"][key] for key in KEYS}
        found.append(
            f"--watch {WATCH}: {watch['files']} copies took {watch['copies']['processor']:.2f} s of processor time and "
            f"{watch['copies']['wall']:.2f} s in all, {watch['copies']['wall'] / watch['training']:.2%} of training's "
            f"{watch['training']:.0f} s (aim: below {WATCHING:.0%}); the whole command with it took "
            f"{more['wall']:+.1f} s, and {more['processor']:+.1f} s of processor time, of "
            f"{watch['without']['wall']:.1f} s and {watch['without']['processor']:.1f} s without it"
        )
    return found
