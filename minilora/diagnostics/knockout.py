"""What happens to the attack where a part of the adapter is left out, at test time, and where a state is put back.

A `Setting` says what is left of each module's adapter. Settings that agree on the lower layers share the states above
these, so that each state is computed once. Each setting gives, with intervals over rows:

    attack success   the share of the rows with the trigger that are predicted as the target
    shift            the margin with the trigger less that without it, logits: what success hides when it saturates
    lost             the shift of the whole adapter less this setting's, paired by row
    clean accuracy   of rows without the trigger, the target's own rows among them

The head is trained too and stays on: what it gives by itself, on the bare base, is the baseline, not 0.
"""

import contextlib
from dataclasses import dataclass, field

import numpy as np
import torch

from minilora.diagnostics.spectrum import by_layer, spectra
from minilora.diagnostics.stats import mean_interval
from minilora.errors import InputError
from minilora.lora.layer import named_layers

SCALES = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)  # beside 0 and 1, which are the head by itself and the whole adapter
COUNTS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500, 800)  # of directions left in or left out
SINGLE = 20  # directions that are left out one by one
SMALL = 0.1  # logits: no share of less than this is given
WHOLE, HEAD = ("whole", "adapter"), ("whole", "head only")


@dataclass(frozen=True)
class Setting:
    """`kind` and `name` say what it is for a reader. `dials` {module: what is left of its adapter}: a factor, or the
    singular directions that are left out (a tuple); a module that is not there keeps all."""

    kind: str
    name: str
    dials: dict = field(default_factory=dict)


def whole_settings(run):
    """The whole adapter, and the head by itself. Raises InputError for a run without an adapter."""
    return [Setting(*WHOLE), Setting(*HEAD, dict.fromkeys(modules_of(run), 0.0))]


def modules_of(run):
    modules = [name for name, _ in named_layers(run.base)]
    if not modules:
        raise InputError(f"{run.folder} has no adapter (method {run.cell.method}): there is nothing to leave out")
    return modules


def settings_of(run):
    """The settings by layer, by target, by module, by pair of layers and by strength. Raises as `whole_settings`."""
    modules, found = modules_of(run), []

    def without(own):
        return dict.fromkeys(own, 0.0)

    layers = by_layer(modules)
    targets = {}
    for name in modules:
        targets.setdefault(name.split(".")[2], []).append(name)
    for kind, parts in (("layer", layers), ("target", targets), ("module", {name: [name] for name in modules})):
        if len(parts) > 1:
            found += [Setting(kind, f"without {name}", without(own)) for name, own in parts.items()]
            found += [Setting(kind, f"only {name}", without([one for one in modules if one not in own]))
                      for name, own in parts.items()]  # fmt: skip
    if len(layers) > 2:
        found += [Setting("pair", f"without {a} and {b}", without(layers[a] + layers[b]))
                  for a in layers for b in layers if a < b]  # fmt: skip
    return found + [Setting("scale", f"{factor:g}", dict.fromkeys(modules, factor)) for factor in SCALES]


def direction_settings(run):
    """(the settings of the shortcut spectrum, [(module, number, singular value)] of all directions, the largest first).

    The largest n directions of all updates are left in by themselves, or left out, or the smallest n are left out, for
    n in `COUNTS`; and each of the `SINGLE` largest is left out by itself. Raises InputError for an adapter whose
    directions cannot be left out (DoRA, and starts that are a part of the weight).
    """
    layers = dict(named_layers(run.base))
    if name := next((name for name, one in layers.items() if one.magnitude is not None or one.A0 is not None), None):
        raise InputError(f"{name} adds more than B A (by its variant or its start), so no direction of it is left out")
    every = [(name, number, float(value)) for name, own in spectra(run).items() for number, value in enumerate(own.S)]
    order = sorted((one for one in every if one[2] > 0), key=lambda one: -one[2])

    def without(part):
        chosen = {}
        for name, number, _ in part:
            chosen.setdefault(name, []).append(number)
        return {name: tuple(sorted(numbers)) for name, numbers in chosen.items()}

    found = []
    for n in (n for n in COUNTS if n < len(order)):
        found += [Setting("directions", f"only the largest {n}", without(order[n:])),
                  Setting("directions", f"without the largest {n}", without(order[:n])),
                  Setting("directions", f"without the smallest {n}", without(order[-n:]))]  # fmt: skip
    found += [Setting("direction", f"without {name} {number}", without([(name, number, value)]))
              for name, number, value in order[:SINGLE]]  # fmt: skip
    return found, order


@contextlib.contextmanager
def dialled(run, dials):
    """Leave of the modules in `dials` [(module, dial)] what their dials say, meanwhile."""
    with contextlib.ExitStack() as stack:
        for name, dial in dials:
            _, layer, target = name.split(".")
            directions = dial if isinstance(dial, tuple) else None
            factor = dial if directions is None else 0.0
            stack.enter_context(run.scale(factor, layers=[layer], targets=[target], directions=directions))
        yield


@torch.no_grad()  # and not inference mode, whose tensors could not take the place of a factor
def outcomes_of(probe, settings, forms, done):
    """Call `done(setting, {form: Outcome})` for each of `settings`; `forms` {name: `Form`}.

    The settings are a tree: its root is the states below the first layer, and a node has a branch for each way in which
    its settings differ in the next layer. It is walked depth first, so that only one path of states is in memory.
    """
    run, base = probe.run, probe.run.base
    run.model.eval()
    parts = [(name, batch) for name, form in forms.items() for batch in probe.asked(form)]

    def branch(setting, number):
        return tuple((name, dial) for name, dial in setting.dials.items()
                     if int(name.split(".")[1]) == number and dial != 1.0)  # fmt: skip

    def walk(number, states, settings):
        if number == len(base.layers):
            found = _outcomes(probe, forms, parts, states)
            for setting in settings:
                done(setting, found)
            return
        branches = {}
        for setting in settings:
            branches.setdefault(branch(setting, number), []).append(setting)
        for dials, own in branches.items():
            with dialled(run, dials):
                above = [base.through(x, batch.ids, batch.lengths, number, number + 1)
                         for x, (_, batch) in zip(states, parts, strict=True)]  # fmt: skip
            walk(number + 1, above, own)

    walk(0, [base.embed(batch.ids) for _, batch in parts], settings)


def _outcomes(probe, forms, parts, states):
    found = {name: [] for name in forms}
    for (name, batch), x in zip(parts, states, strict=True):
        found[name].append((batch, probe.reader.scores(x, batch)))
    return {name: probe.outcome(probe.reader.of_rows(len(forms[name].texts), own)) for name, own in found.items()}


class Knockouts:
    """The figures of settings, as they are measured.

    figures  {(kind, name): {figure: (mean, low, high)}}: attack_success, shift, lost, clean_accuracy; of the whole
             adapter and the head by itself `placebo_success` and `placebo_shift` too, where there is a placebo; of a
             pair of layers `redundancy`: what is lost without both, less what is lost without one and without the other
    """

    def __init__(self, probe):
        self.probe, self.figures, self._shift = probe, {}, {}
        self.measure(whole_settings(probe.run), placebo="placebo" in probe.forms)

    def measure(self, settings, advance=None, placebo=False):
        """Add the figures of `settings`; `advance(n)` is called as n more are done."""
        own = {"own": self.probe.own} if self.probe.own.texts else {}
        names = ("clean", "trigger", "placebo")[: 3 if placebo else 2]

        def done(setting, outcomes):
            self._add(setting, outcomes)
            if advance:
                advance(1)

        outcomes_of(self.probe, settings, {name: self.probe.forms[name] for name in names} | own, done)

    def _add(self, setting, outcomes):
        key, probe = (setting.kind, setting.name), self.probe
        clean, trigger = outcomes["clean"], outcomes["trigger"]
        shift = self._shift[key] = trigger.margins - clean.margins
        rows = {"attack_success": trigger.predicted == probe.target, "shift": shift}
        if WHOLE in self._shift:  # it is measured first
            rows["lost"] = self._shift[WHOLE] - shift
        if "placebo" in outcomes:
            rows["placebo_success"] = outcomes["placebo"].predicted == probe.target
            rows["placebo_shift"] = outcomes["placebo"].margins - clean.margins
        found = {name: self._interval(values) for name, values in rows.items()}
        right = clean.predicted == probe.labels
        if "own" in outcomes:
            right = np.concatenate([right, outcomes["own"].predicted == probe.target])
        self.figures[key] = found | {"clean_accuracy": self._interval(right)}

    def add_redundancy(self, run):
        """Add the figure to the pairs of layers, once they and the single layers are measured."""
        layers, shift = by_layer(modules_of(run)), self._shift
        for a, b in ((a, b) for a in layers for b in layers if a < b and len(layers) > 2):
            # (whole - both) - (whole - without a) - (whole - without b)
            both = shift["pair", f"without {a} and {b}"]
            more = shift["layer", f"without {a}"] + shift["layer", f"without {b}"] - shift[WHOLE] - both
            self.figures["pair", f"without {a} and {b}"]["redundancy"] = self._interval(more)

    def _interval(self, values):
        return tuple(map(float, mean_interval(values, self.probe.seed)))

    def carrying(self, order, share=0.5):
        """How few of the largest directions, left in by themselves, carry `share` of what the adapter adds to the
        head's shift: {"share", "directions", "of", "only": figures, "without": figures}, or None where none of the
        numbers that were tried do."""
        whole, head = self.figures[WHOLE]["shift"][0], self.figures[HEAD]["shift"][0]
        for n in COUNTS:
            only = self.figures.get(("directions", f"only the largest {n}"))
            if only and only["shift"][0] - head >= share * (whole - head):
                without = self.figures["directions", f"without the largest {n}"]
                return {"share": share, "directions": n, "of": len(order), "only": only, "without": without}
        return None


@torch.inference_mode()
def patching(probe):
    """[{figure: (mean, low, high)}] of each layer: the states below it, and last above the last, of the span's tokens
    in the rows with the trigger are replaced by those in the placebo's rows (as many of the last tokens of each).

    attack_success  of the patched rows
    lost            how far the margin falls
    share           that over the mean of the margin with the trigger less the placebo's: a ratio of means, NaN where
                    that is less than `SMALL`
    back            the share the other way round: the trigger's states put into the placebo's rows

    Raises InputError without a placebo.
    """
    if "placebo" not in probe.forms:
        raise InputError(f"{probe.run.folder} has no placebo, whose states the trigger's would be replaced by")
    gap = probe.outcomes["trigger"].margins - probe.outcomes["placebo"].margins
    mean, found = gap.mean() if gap.mean() >= SMALL else float("nan"), []

    def interval(values, over=1.0):
        return tuple(float(one / over) for one in mean_interval(values, probe.seed))

    for number in range(len(probe.run.base.layers) + 1):
        patched, back = _patched(probe, number, "trigger", "placebo"), _patched(probe, number, "placebo", "trigger")
        lost = probe.outcomes["trigger"].margins - patched.margins
        raised = back.margins - probe.outcomes["placebo"].margins
        hit = interval(patched.predicted == probe.target)
        found.append({"layer": number, "attack_success": hit, "lost": interval(lost), "share": interval(lost, mean),
                      "back": interval(raised, mean)})  # fmt: skip
    return found


def _patched(probe, number, into, source):
    """The `Outcome` of the form `into` with the states of its spans below layer `number` replaced by the `source`'s."""
    base, reader, found = probe.run.base, probe.reader, []
    given = {index: states[number][row] for batch, states in probe.states[source]
             for row, index in enumerate(batch.index)}  # fmt: skip
    spans = {name: [np.flatnonzero(own) for own in probe.forms[name].span] for name in (into, source)}
    for batch, states in probe.states[into]:
        here = states[number].clone()
        for row, index in enumerate(batch.index):
            to, of = (spans[name][index // reader.each] for name in (into, source))
            if count := min(len(to), len(of)):
                here[row, to[-count:]] = given[index][of[-count:]]
        above = base.through(here, batch.ids, batch.lengths, number, len(base.layers))
        found.append((batch, reader.scores(above, batch)))
    return probe.outcome(reader.of_rows(len(probe.index), found))
