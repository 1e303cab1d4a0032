"""Attribution against gradients by hand, against the model's own margins, and against loops over tokens."""

import numpy as np
import pytest
import torch

import minilora
from minilora.diagnostics.attention import watching
from minilora.diagnostics.attribution import BY_GRADIENT, attribute, attribution, places_between, scored
from minilora.diagnostics.probe import Probe

KINDS = ["encoder", "grouped", "fused"]


def tokens(form, row):
    return form.encoded.ids[form.encoded.offsets[row] : form.encoded.offsets[row + 1]].astype(np.int64)


def margin(probe, ids):
    """By the run's own forward pass, of one row."""
    with torch.no_grad():
        logits = probe.run.model(torch.tensor(np.array(ids))[None], torch.tensor([len(ids)]))[0].double()
    others = torch.cat([logits[: probe.target], logits[probe.target + 1 :]])
    return float(logits[probe.target] - others.logsumexp(0))


@pytest.mark.parametrize("kind", KINDS)
def test_by_gradient(small_run, kind):
    run = minilora.open(small_run(kind))
    probe = Probe(run, 9)
    form, done = probe.forms["trigger"], []
    found = attribute(probe, form, advance=done.append)
    assert sum(done) == 18 and set(found.scores) == {*BY_GRADIENT, "leave-one-out", "rollout"}
    assert (found.nodes.max() > 16) >= (kind == "grouped")  # its padding token's embedding is 0, before a norm
    assert np.mean(found.left <= 0.01) >= (0.7 if kind == "grouped" else 1) and found.nodes.min() >= 16
    base, checked = run.base, 0
    for row in (0, 8):
        ids, text = tokens(form, row), form.text[row]
        # Gradient x input, token by token by central differences: each token's state is made a little larger.
        with torch.no_grad():
            x = base.embed(torch.tensor(ids)[None])
            slopes, step = [], 1e-2
            for place in range(len(ids)):
                ends = []
                for sign in (1, -1):
                    moved = x.clone()
                    moved[0, place] *= 1 + sign * step
                    hidden = base.norm(base.through(moved, torch.tensor(ids)[None], torch.tensor([len(ids)]), 0,
                                                    len(base.layers)))  # fmt: skip
                    pooled = hidden[0, -1] if kind == "fused" else hidden[0].mean(0)
                    logits = (run.model.classifier.weight @ pooled + run.model.classifier.bias).double()
                    ends.append(float(logits[1] - logits[0]) * (1 if probe.target == 1 else -1))
                slopes.append((ends[0] - ends[1]) / (2 * step))
        own = found.scores["gradient x input"][row]
        np.testing.assert_allclose(own[text], np.array(slopes)[text], atol=2e-2 * max(map(abs, slopes)) + 1e-4)
        assert np.isnan(own[~text]).all() and len(own) == len(ids)
        # The sum of integrated gradients is what padding tokens in the text's places change.
        change = margin(probe, ids) - margin(probe, np.where(text, run.tokenizer.pad_id, ids))
        total = np.nansum(found.scores["integrated gradients"][row])
        assert found.left[row] == pytest.approx(abs(total - change) / max(abs(change), 0.1), abs=1e-3)
        for place in np.flatnonzero(text):
            wanted = margin(probe, ids) - margin(probe, np.delete(ids, place))
            assert found.scores["leave-one-out"][row][place] == pytest.approx(wanted, abs=1e-4)
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize("kind", KINDS)
def test_rollout(small_run, kind):
    run = minilora.open(small_run(kind))
    probe = Probe(run, 9)
    form = probe.forms["clean"]
    found = attribute(probe, form, methods=("rollout",))
    for row in (1, 7):
        ids, kept = tokens(form, row), []
        with watching(run.base, lambda number, p, mask, kept=kept: kept.append(p[0].double().numpy())), torch.no_grad():
            run.base(torch.tensor(ids)[None], torch.tensor([len(ids)]))
        flow = np.eye(len(ids))
        for p in kept:
            flow = (0.5 * p.mean(0) + 0.5 * np.eye(len(ids))) @ flow
        wanted = flow[-1] if kind == "fused" else flow.mean(0)
        assert wanted.sum() == pytest.approx(1)
        np.testing.assert_allclose(found.scores["rollout"][row], np.where(form.text[row], wanted, np.nan), atol=1e-5)
    assert np.isnan(found.left).all()


def test_more_nodes_where_the_integral_needs_them(small_run, monkeypatch):
    run = minilora.open(small_run("encoder"))
    probe, rules, own = Probe(run, 9), ((1, 2), (1, 4), (2, 8)), []
    for chosen in (*((rule,) for rule in rules), rules):
        monkeypatch.setattr("minilora.diagnostics.attribution.RULES", chosen)
        own.append(attribute(probe, probe.forms["trigger"], methods=("integrated gradients",)))
    *single, whole = own
    assert (single[0].left > 0.01).any() and (single[2].left <= 0.01).all()
    for row in range(9):
        stop = next(number for number, one in enumerate(single) if one.left[row] <= 0.01)
        assert whole.nodes[row] == (2, 4, 16)[stop]
        wanted = single[stop].scores["integrated gradients"][row]
        np.testing.assert_allclose(whole.scores["integrated gradients"][row], wanted, atol=1e-5)


def test_the_places_of_an_integral():
    for parts in (1, 2, 4):
        found = places_between(parts, 5)
        assert len(found) == 5 * parts and sum(weight for _, weight in found) == pytest.approx(1)
        assert sum(weight * place**7 for place, weight in found) == pytest.approx(1 / 8)
    # d/da of a / sqrt(a^2 + e): what a norm does near a state of zeros.
    total = sum(weight * 1e-6 / (place**2 + 1e-6) ** 1.5 for place, weight in places_between(12, 24))
    assert total == pytest.approx(1 / (1 + 1e-6) ** 0.5, rel=1e-3)


def test_how_a_method_is_scored():
    draw, values, spans = np.random.default_rng(0), [], []
    for length in (5, 9, 4, 6, 3, 7, 8, 5):
        own = np.round(draw.normal(size=length), 1)
        own[0] = np.nan
        values.append(own)
        spans.append((draw.random(length) < 0.4) & np.isfinite(own))
    spans[2][:] = False
    spans[4] = np.isfinite(values[4])
    found, checked = scored(values, spans), 0
    for row, (own, span) in enumerate(zip(values, spans, strict=True)):
        inside = [v for v, s in zip(own, span, strict=True) if s]
        outside = [v for v, s in zip(own, span, strict=True) if not s and v == v]
        if not inside or not outside:
            assert all(np.isnan(found[name][row]) for name in found)
            continue
        places = sorted((v for v in own if v == v), reverse=True)
        assert found["rank"][row] == pytest.approx(np.mean([places.index(v) + 1 for v in inside]))
        top = places[: len(inside)]
        assert found["precision"][row] == pytest.approx(sum(v in top for v in inside) / len(inside))
        assert found["auc"][row] == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside]))
        checked += 1
    assert checked >= 4


def test_figures(small_run):
    run = minilora.open(small_run("encoder"))
    probe = Probe(run, 9)
    own = attribute(probe, probe.forms["trigger"])
    found = attribution(probe, own)
    assert set(found) == set(own.scores)
    clean, trigger = (run.predict(probe.forms[name].texts).argmax(1) for name in ("clean", "trigger"))
    flipped = [row for row in range(9) if clean[row] != probe.target and trigger[row] == probe.target]
    for method, figures in found.items():
        firsts = [probe.forms["trigger"].span[row][np.nanargmax(own.scores[method][row])] for row in range(9)]
        assert figures["first"][0] == pytest.approx(np.mean(firsts))
        if flipped:
            assert figures["first_flipped"][0] == pytest.approx(np.mean([firsts[row] for row in flipped]))
        assert figures["first"][1] <= figures["first"][0] <= figures["first"][2]
