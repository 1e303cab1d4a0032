"""What happens to the attack where a part of the adapter is left out, at test time, and where a state is put back.

A setting leaves some parts of the adapter out, or leaves only some in. What lies below the first layer that a setting
changes is the same as with the adapter on (or off), and is computed once. Each setting gives, with intervals over rows:

    attack success   the share of the rows with the trigger that are predicted as the target
    shift            the margin with the trigger less the margin without it, logits: what success hides when it saturates
    clean accuracy   of the same rows without the trigger: the share that is not predicted as the target

The head is trained too and stays on: what it gives by itself, on the bare base, is the baseline, not 0.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch

from minilora.diagnostics.spectrum import spectra
from minilora.diagnostics.stats import mean_interval
from minilora.errors import InputError
from minilora.lora.layer import named_layers

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
SINGLE = 20  # directions that are taken out one by one
FIGURES = ("attack_success", "shift", "clean_accuracy")


@dataclass(frozen=True)
class Setting:
    """What is left of the adapter. `kind` and `name` say what for a reader; `modules` are those that are changed.

    only  whether the modules are all that is left, instead of all that is left out
    directions  {module: singular directions} that the change is of, or None for the whole modules
    factor      multiplies what is changed (where `only`, the rest is at 0)
    """

    kind: str
    name: str
    modules: tuple = ()
    only: bool = False
    directions: dict | None = None
    factor: float = 0.0


def settings_of(run, pairs=True):
    """The settings of a whole report, without the directions: see `direction_settings`."""
    modules = [name for name, _ in named_layers(run.base)]
    if not modules:
        raise InputError(f"{run.folder} has no adapter (method {run.cell.method}): there is nothing to leave out")
    layers = sorted({int(name.split(".")[1]) for name in modules})
    targets = list(dict.fromkeys(name.split(".")[2] for name in modules))
    by_layer = {n: tuple(m for m in modules if int(m.split(".")[1]) == n) for n in layers}
    by_target = {t: tuple(m for m in modules if m.split(".")[2] == t) for t in targets}
    found = [Setting("whole", "adapter"), Setting("whole", "head only", tuple(modules))]
    for kind, parts in (("layer", by_layer), ("target", by_target)):
        if len(parts) > 1:
            found += [Setting(kind, f"without {name}", own) for name, own in parts.items()]
            found += [Setting(kind, f"only {name}", own, only=True) for name, own in parts.items()]
    if len(modules) > 1:
        found += [Setting("module", f"without {name}", (name,)) for name in modules]
        found += [Setting("module", f"only {name}", (name,), only=True) for name in modules]
    if pairs and len(layers) > 2:
        found += [Setting("pair", f"without {a} and {b}", by_layer[a] + by_layer[b])
                  for i, a in enumerate(layers) for b in layers[i + 1 :]]  # fmt: skip
    return found + [Setting("scale", f"{factor:g}", tuple(modules), factor=factor) for factor in SCALES]


def ordered_directions(run):
    """[(module, number, singular value)] of all directions of all updates, the largest first."""
    every = [(name, number, float(value)) for name, own in spectra(run).items() for number, value in enumerate(own.S)]
    return sorted((one for one in every if one[2] > 0), key=lambda one: -one[2])


def direction_settings(run, single=SINGLE):
    """(settings of the shortcut spectrum, the directions in order): the largest n left in or left out, the smallest n
    left out, for n that doubles; and each of the `single` largest left out by itself."""
    order = ordered_directions(run)
    counts = sorted({n for n in (2**power for power in range(12)) if n < len(order)} | {5, 20} & set(range(len(order))))

    def of(part):
        chosen = {}
        for name, number, _ in part:
            chosen.setdefault(name, []).append(number)
        return tuple(chosen), chosen

    found = []
    for n in counts:
        for name, part, only in ((f"only the largest {n}", order[:n], True),
                                 (f"without the largest {n}", order[:n], False),
                                 (f"without the smallest {n}", order[len(order) - n :], False)):  # fmt: skip
            modules, chosen = of(part)
            found.append(Setting("directions", name, modules, only, chosen))
    for place, one in enumerate(order[:single]):
        modules, chosen = of([one])
        found.append(Setting("direction", f"without {place + 1}: {one[0]} {one[1]}", modules, False, chosen))
    return found, order


@contextlib.contextmanager
def applied(run, setting):
    """The adapter as the setting has it, meanwhile."""
    layers, spectrum = dict(named_layers(run.base)), {}
    with contextlib.ExitStack() as stack:
        if setting.only:
            rest = [name for name in layers if name not in setting.modules]
        for name in setting.modules:
            _, layer, target = name.split(".")
            place = dict(layers=[layer], targets=[target])
            if setting.directions is None:
                if not setting.only:
                    stack.enter_context(run.scale(setting.factor, **place))
            else:
                chosen = setting.directions[name]
                if setting.only:
                    every = spectrum.setdefault(name, min(layers[name].A.shape[0], *layers[name].original.shape))
                    chosen = [number for number in range(every) if number not in chosen]
                if chosen:
                    stack.enter_context(run.scale(setting.factor, **place, directions=chosen))
        for name in rest if setting.only else ():
            _, layer, target = name.split(".")
            stack.enter_context(run.scale(0.0, layers=[layer], targets=[target]))
        yield


def knockout(probe, settings, advance=None):
    """[{"kind", "name", figure: (mean, low, high)}] of each `Setting`; `advance(n)` is called as settings are done."""
    run, found = probe.run, []
    before = probe.states
    modules = tuple(name for name, _ in named_layers(run.base))
    with applied(run, Setting("whole", "head only", modules)):
        bare = probe.states_now()
    for setting in settings:
        # Where only some modules are left, all below the first of them is as without the adapter.
        states = bare if setting.only else before
        start = min((int(name.split(".")[1]) for name in setting.modules), default=None)
        with applied(run, setting):
            found.append({"kind": setting.kind, "name": setting.name} | figures_of(probe, probe.predict(states, start)))
        if advance:
            advance(1)
    return found


def rows_of(probe, outcomes):
    """{figure: float64 [N]} of the rows."""
    clean, trigger = outcomes["clean"], outcomes["trigger"]
    return {"attack_success": (trigger.predicted == probe.target).astype(float),
            "shift": trigger.margins - clean.margins,
            "clean_accuracy": (clean.predicted != probe.target).astype(float)}  # fmt: skip


def figures_of(probe, outcomes):
    """{figure: (mean, low, high)}; with a placebo the same of it, as `placebo_success` and `placebo_shift`."""
    rows = rows_of(probe, outcomes)
    if "placebo" in outcomes:
        placebo = outcomes["placebo"]
        rows["placebo_success"] = (placebo.predicted == probe.target).astype(float)
        rows["placebo_shift"] = placebo.margins - outcomes["clean"].margins
    return {name: tuple(map(float, mean_interval(values, probe.seed))) for name, values in rows.items()}


def carrying(figures, order, share=0.5):
    """How many of the largest directions, left in by themselves, carry `share` of the shift of the whole adapter above
    the head's: (their number, the figures without them) from what `knockout` gave; None where none of those tried do.
    """
    named = {(own["kind"], own["name"]): own for own in figures}
    whole, head = named["whole", "adapter"]["shift"][0], named["whole", "head only"]["shift"][0]
    for n in range(1, len(order) + 1):
        only = named.get(("directions", f"only the largest {n}"))
        if only and only["shift"][0] - head >= share * (whole - head):
            return n, named["directions", f"without the largest {n}"]
    return None


@torch.inference_mode()
def patching(probe):
    """[{figure: (mean, low, high)}] of each layer: the states of the span's tokens below it, and last above the last,
    are put in the place of the placebo's own, the same number of the last tokens of each.

    `shift` is how far the placebo row's margin moves, `share` that over the margin of the trigger's row less the
    placebo's (a ratio of means), `attack_success` of the patched rows. Raises InputError without a placebo.
    """
    run = probe.run
    if "placebo" not in probe.forms:
        raise InputError(f"{run.folder} has no placebo, whose rows the span's states would be put into")
    base, L, N = run.base, len(run.base.layers), len(probe.index)
    given = {}
    for batch, states in probe.states["trigger"]:
        for row, index in enumerate(batch.index):
            given[index] = [own[row] for own in states]
    whole = probe.predict(probe.states)
    gap = (whole["trigger"].margins - whole["placebo"].margins).mean()
    spans = {name: [np.flatnonzero(own) for own in probe.forms[name].span] for name in ("trigger", "placebo")}
    found = []
    for number in range(L + 1):
        logits = np.empty((N, len(run.labels)), np.float32)
        for batch, states in probe.states["placebo"]:
            here = states[number].clone()
            for row, index in enumerate(batch.index):
                into, of = spans["placebo"][index], spans["trigger"][index]
                count = min(len(into), len(of))
                if count:
                    here[row, into[-count:]] = given[index][number][of[-count:]]
            above = base.through(here, batch.ids, batch.lengths, number, L)
            logits[batch.index] = probe.logits_of(above, batch.lengths)[: len(batch.index)].cpu().numpy()
        outcome = probe.outcome(logits)
        shift = outcome.margins - whole["placebo"].margins
        hit = (outcome.predicted == probe.target).astype(float)
        moved = tuple(map(float, mean_interval(shift, probe.seed)))
        found.append({"layer": number, "shift": moved, "share": tuple(one / gap for one in moved),
                      "attack_success": tuple(map(float, mean_interval(hit, probe.seed)))})  # fmt: skip
    return found
