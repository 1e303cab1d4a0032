"""Knock-outs against a base whose weights are changed by hand, and patching against a hook on single rows."""

import numpy as np
import pytest
import torch

import minilora
from minilora.diagnostics import knockout
from minilora.diagnostics.probe import Probe
from minilora.errors import InputError

KINDS = ["encoder", "grouped", "fused"]


def logits_of(run, texts):
    scores = run.log_probabilities(texts)
    return scores[:, 1] - scores[:, 0], scores.argmax(1)


def by_hand(run, probe, dials, adapter):
    """{form: (margins, predicted)} of the base with W + what the dials leave of each whole update, by SVD."""
    found = {}
    with run.detach(), torch.no_grad():
        kept = {}
        for name, factors in adapter.items():
            linear, delta = run.base.get_submodule(name), factors.delta.double()
            dial = dials.get(name, 1.0)
            if isinstance(dial, tuple):
                U, S, V = torch.linalg.svd(delta, full_matrices=False)
                S[list(dial)] = 0
                delta, dial = U * S @ V, 1.0
            kept[name] = linear.weight
            linear.weight = torch.nn.Parameter((linear.weight.double() + dial * delta).float(), requires_grad=False)
        forms = {name: form.texts for name, form in probe.forms.items()} | {"own": probe.own.texts}
        for name, texts in forms.items():
            margins, predicted = logits_of(run, texts)
            found[name] = margins if probe.target == 1 else -margins, predicted
        for name, weight in kept.items():
            run.base.get_submodule(name).weight = weight
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_settings(small_run, kind):
    run = minilora.open(small_run(kind))
    probe, adapter = Probe(run, 9), run.adapter
    directions, order = knockout.direction_settings(run)
    settings = knockout.settings_of(run) + directions
    assert len({(one.kind, one.name) for one in settings}) == len(settings) >= 60
    assert len(order) == 3 * len(adapter) and all(a[2] >= b[2] for a, b in zip(order, order[1:]))
    done, measured = [], knockout.Knockouts(probe)
    measured.measure(settings, done.append)
    measured.add_redundancy(run)
    assert sum(done) == len(settings) and len(measured.figures) == len(settings) + 2
    whole = by_hand(run, probe, {}, adapter)
    shift = whole["trigger"][0] - whole["clean"][0]
    kinds = {}
    for one in [*knockout.whole_settings(run), *settings]:
        kinds.setdefault(one.kind, []).append(one)
    chosen = [one for own in kinds.values() for one in own[1:2] + own[-1:]]
    for one in chosen:
        outcome, own = by_hand(run, probe, one.dials, adapter), measured.figures[one.kind, one.name]
        here = outcome["trigger"][0] - outcome["clean"][0]
        assert own["shift"][0] == pytest.approx(here.mean(), abs=1e-4)
        assert own["lost"][0] == pytest.approx((shift - here).mean(), abs=1e-4)
        assert own["attack_success"][0] == pytest.approx(np.mean(outcome["trigger"][1] == probe.target))
        right = [*(outcome["clean"][1] == probe.labels), *(outcome["own"][1] == probe.target)]
        assert own["clean_accuracy"][0] == pytest.approx(np.mean(right))
        assert ("placebo_shift" in own) == (one.kind == "whole")
    assert len(chosen) == {"encoder": 16, "grouped": 14, "fused": 14}[kind] and len(probe.own.texts) >= 5
    assert abs(shift.mean()) > 1e-3
    if kind == "encoder":  # the others have two layers
        own = {name: measured.figures[name]["shift"][0] for name in measured.figures}
        wanted = (own["whole", "adapter"] - own["pair", "without 0 and 2"]) - sum(
            own["whole", "adapter"] - own["layer", f"without {layer}"] for layer in (0, 2)
        )
        assert measured.figures["pair", "without 0 and 2"]["redundancy"][0] == pytest.approx(wanted, abs=1e-9)


def test_what_is_below_is_computed_once(small_run, monkeypatch):
    run = minilora.open(small_run("encoder"))
    probe, calls, through = Probe(run, 9), [], type(run.base).through
    monkeypatch.setattr(type(run.base), "through", lambda *own: calls.append(own[4:]) or through(*own))
    names = list(run.adapter)
    settings = [knockout.Setting("a", str(n), {names[-1]: factor}) for n, factor in enumerate((0.0, 0.5, 2.0))]
    settings.append(knockout.Setting("a", "layer 1", {names[4]: 0.0}))
    batches = len(list(probe.batches(probe.forms["clean"])))
    knockout.outcomes_of(probe, settings, {"clean": probe.forms["clean"]}, lambda *one: None)
    # Layer 0 once; layer 1 as it is and without; layer 2 three times above the one, and once above the other.
    assert sorted(calls) == sorted(batches * ([(0, 1)] + 2 * [(1, 2)] + 4 * [(2, 3)]))


@pytest.mark.parametrize("kind", KINDS)
def test_patching(small_run, kind):
    run = minilora.open(small_run(kind))
    probe = Probe(run, 9)
    found, layers = knockout.patching(probe), run.base.layers
    assert [own["layer"] for own in found] == list(range(len(layers) + 1))

    def states(ids):
        """The states below each layer and above the last, of one row."""
        with torch.no_grad():
            ids, lengths = torch.tensor(ids)[None], torch.tensor([len(ids)])
            kept = [run.base.embed(ids)]
            for number in range(len(layers)):
                kept.append(run.base.through(kept[-1], ids, lengths, number, number + 1))
        return kept

    def margin(ids, number=None, places=(), given=None):
        """By the run's own forward pass, the states at `places` below a layer replaced on their way."""

        def change(module, inputs):
            x = inputs[0].clone()
            x[0, places] = given
            return (x, *inputs[1:])

        target = run.base.norm if number == len(layers) else None if number is None else layers[number]
        hook = target.register_forward_pre_hook(change) if target is not None else None
        with torch.no_grad():
            logits = run.model(torch.tensor(ids)[None], torch.tensor([len(ids)]))[0]
        if hook:
            hook.remove()
        return float(logits[1] - logits[0]) * (1 if probe.target == 1 else -1)

    rows = {name: [form.encoded.ids[form.encoded.offsets[row] : form.encoded.offsets[row + 1]].astype(np.int64)
                   for row in range(9)] for name, form in probe.forms.items()}  # fmt: skip
    own = {name: [margin(ids) for ids in rows[name]] for name in ("trigger", "placebo")}
    gap = np.mean(np.subtract(own["trigger"], own["placebo"]))
    for number in range(len(layers) + 1):
        lost, raised = [], []
        for row in range(9):
            t, p = (np.flatnonzero(probe.forms[name].span[row]) for name in ("trigger", "placebo"))
            count = min(len(t), len(p))
            assert count
            t, p = t[-count:], p[-count:]
            below = {name: states(rows[name][row])[number][0] for name in ("trigger", "placebo")}
            lost.append(own["trigger"][row] - margin(rows["trigger"][row], number, t, below["placebo"][p]))
            raised.append(margin(rows["placebo"][row], number, p, below["trigger"][t]) - own["placebo"][row])
        assert found[number]["lost"][0] == pytest.approx(np.mean(lost), abs=1e-4)
        if gap >= 0.1:
            assert found[number]["share"][0] == pytest.approx(np.mean(lost) / gap, abs=1e-3)
            assert found[number]["back"][0] == pytest.approx(np.mean(raised) / gap, abs=1e-3)
        else:
            assert np.isnan(found[number]["share"][0])


def test_which_directions_carry_the_attack(small_run):
    run = minilora.open(small_run("encoder"))
    measured = knockout.Knockouts(Probe(run, 9))
    order = [("layers.0.q", n, 1.0) for n in range(6)]
    for count, shift in ((1, 0.5), (2, 1.9), (3, 3.1), (5, 3.9)):
        for words in ("only", "without"):
            measured.figures["directions", f"{words} the largest {count}"] = {"shift": (shift, 0, 9)}
    measured.figures[knockout.WHOLE], measured.figures[knockout.HEAD] = {"shift": (5.0, 0, 9)}, {"shift": (1.0, 0, 9)}
    assert measured.carrying(order)["directions"] == 3 and measured.carrying(order, 0.1)["directions"] == 2
    assert measured.carrying(order, 0.9) is None


def test_what_cannot_be_left_out(small_run):
    for kind, words in (("head", "has no adapter"), ("full", "has no adapter")):
        with pytest.raises(InputError, match=words):
            knockout.settings_of(minilora.open(small_run(kind)))
    for kind in ("dora", "pissa"):
        run = minilora.open(small_run(kind))
        with pytest.raises(InputError, match="adds more than B A"):
            knockout.direction_settings(run)
        assert len(knockout.settings_of(run)) > 20
