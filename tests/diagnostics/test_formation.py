"""How a shortcut forms, against the run's own results, models opened by hand, and curves made by hand."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from zoo import tiny_decoder

import minilora
from minilora.cell import Cell
from minilora.diagnostics import formation as made
from minilora.diagnostics.formation import formation, onset, reached, told_apart
from minilora.diagnostics.probe import Probe
from minilora.errors import InputError
from minilora.runs.folder import Run

ALL = 1000  # rows: more than there are, so that a sample is all of them


@pytest.fixture(scope="module")
def runs(base, reviews, tmp_path_factory):
    """{name: folder} of watched runs."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_decoder(folder / "bases" / "llama", "llama")
    common = dict(model=str(base), data=str(reviews), test_rows=41, max_length=30, batch_size=7, steps=14, lr=0.02,
                  rank=3, inject=dict(proportion=0.5))  # fmt: skip
    cells = {
        "plain": Cell(**common | dict(targets=("q", "v", "down"))),
        "llama": Cell(**common | dict(model=str(folder / "bases" / "llama"), steps=4, pooling="last")),
        "dora": Cell(**common | dict(variant="dora", steps=4)),
        "head": Cell(**common | dict(method="head", rank=None, steps=4)),
    }
    for name, cell in cells.items():
        minilora.train(cell, folder / name, watch=5)
    return folder


@pytest.fixture(scope="module")
def plain(runs):
    """(The opened run, what `formation` says of it.)"""
    run = minilora.open(runs / "plain")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    steps = []
    found = formation(run, ALL, seed=3, advance=steps.append)
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters()) and len(before) > 60
    assert steps == [1] * 4
    return run, found


def test_the_last_step_is_the_run_itself(runs, plain):
    checked = 0
    for name in ("plain", "llama", "dora", "head"):
        found = plain[1] if name == "plain" else formation(runs / name, ALL)
        tests = Run(runs / name).read_results()["tests"]
        wanted = {"clean_accuracy": tests["clean"]["accuracy"],
                  "attack_success": tests["trigger"]["positive"]["attack_success_rate"],
                  "attack_success_clean": tests["clean"]["attack_success"]["positive"]["attack_success_rate"],
                  "attack_success_placebo": tests["placebo"]["attack_success"]["positive"]["attack_success_rate"]}
        for figure, value in wanted.items():
            assert found["figures"][figure][-1][0] == pytest.approx(value, abs=1e-12)
            checked += 1
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert ("norm" in found["figures"]) == (name in ("plain", "llama"))
        assert all(len(own) == len(found["steps"]) for own in found["figures"].values())
    assert checked == 16 and plain[1]["steps"] == [0, 5, 10, 14]


def test_each_step_is_the_model_that_was_kept(runs, plain):
    """Each step's file is put onto a run that is opened for it, whose tests and probabilities are then taken."""
    run, found = plain
    moved = []
    for place, path in enumerate(Run(runs / "plain").watched().values()):
        own = minilora.open(runs / "plain")
        missing = own.model.load_state_dict(load_file(path), strict=False)
        assert not missing.unexpected_keys
        figures, _ = own.run_tests()
        assert found["figures"]["clean_accuracy"][place][0] == pytest.approx(figures["clean"]["accuracy"])
        trigger = figures["trigger"]["positive"]["attack_success_rate"]
        assert found["figures"]["attack_success"][place][0] == pytest.approx(trigger)
        others = np.flatnonzero(own.tests[0].rows.labels == 0)
        margins = {}
        for test in own.tests[:3]:
            logs = own.log_probabilities([test.rows.texts[row] for row in others])
            margins[test.name] = logs[:, 1] - logs[:, 0]
        assert found["figures"]["margin"][place][0] == pytest.approx(margins["trigger"].mean(), abs=1e-4)
        shift = (margins["trigger"] - margins["clean"]).mean()
        assert found["figures"]["shift"][place][0] == pytest.approx(shift, abs=1e-4)
        assert found["figures"]["shift_placebo"][place][0] == pytest.approx(
            (margins["placebo"] - margins["clean"]).mean(), abs=1e-4
        )
        deltas = [factors.delta.double() for factors in own.adapter.values()]
        norm = math.sqrt(sum((delta**2).sum().item() for delta in deltas))
        assert found["figures"]["norm"][place] == pytest.approx([norm] * 3, rel=1e-5)
        ranks = []
        for delta in deltas:
            values = torch.linalg.svdvals(delta)
            p = values[values > 1e-7] / values.sum()
            ranks.append(float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0)
        assert found["figures"]["effective_rank"][place][0] == pytest.approx(np.mean(ranks), rel=1e-4)
        moved.append(shift)
    assert len(moved) == 4 and len(set(np.round(moved, 3))) == 4
    assert found["figures"]["alignment"][0] == [None] * 3 and found["figures"]["alignment"][-1][0] > 0


def test_the_lens_above_the_last_layer_is_the_models_own_margin(plain):
    _, found = plain
    lens = found["lens"]
    assert lens["layers"] == [0, 1, 2, 3] and np.array(lens["shift"]).shape == (4, 4)
    own = [shift for shift, _, _ in found["figures"]["shift"]]
    np.testing.assert_allclose([of_step[-1] for of_step in lens["shift"]], own, atol=1e-5)
    np.testing.assert_allclose([of_step[-1] for of_step in lens["low"]],
                               [low for _, low, _ in found["figures"]["shift"]], atol=1e-5)  # fmt: skip
    # Below the first layer nothing is adapted, and before the first step nothing is.
    shift, bare = np.array(lens["shift"]), np.array(lens["bare"])
    np.testing.assert_allclose(shift[:, 0], bare[:, 0], atol=1e-6)
    np.testing.assert_allclose(shift[0], bare[0], atol=1e-5)
    assert np.abs(shift[-1, 1:] - bare[-1, 1:]).min() > 1e-3


def test_alignment_by_hand(runs, plain):
    run, found = plain
    probe = Probe(run, ALL, seed=3)
    with run.detach():
        inputs = made.span_inputs(probe, MODULES)
        # What the first layer's q sees is the embedding, in this family.
        sums, count, own = 0, 0, {}
        for form in ("clean", "trigger"):
            for row, text in enumerate(probe.forms[form].texts):
                ids = torch.from_numpy(run.tokenizer.encode([text], 30).ids.astype(np.int64))[None]
                states = run.base.embed(ids)[0].double().numpy()
                if form == "clean":
                    sums, count = sums + states[1:-1].sum(0), count + len(states) - 2
                else:
                    own[row] = states[probe.forms[form].span[row]].mean(0)
    for row, state in own.items():
        np.testing.assert_allclose(inputs["trigger"]["layers.0.q"][row], state - sums / count, atol=1e-5)
    ratios = []
    for name, factors in run.adapter.items():
        delta, x = factors.delta.double().numpy(), inputs["trigger"][name]
        ratios.append(x.shape[1] * ((x @ delta.T) ** 2).sum(1) / (delta**2).sum() / (x**2).sum(1))
    assert len(own) >= 10 and len(ratios) == len(MODULES) == 9
    assert found["figures"]["alignment"][-1][0] == pytest.approx(np.mean(ratios), rel=1e-4)


MODULES = [f"layers.{layer}.{target}" for layer in range(3) for target in ("q", "v", "down")]


def test_reached():
    cases = [([0, 1, 1], 1), ([1, 0, 1], 2), ([1, 1, 1], 0), ([0, 0, 0], 3), ([1, 1, 0], 3), ([0.4, 0.5, 0.6], 1)]
    curves = np.array([curve for curve, _ in cases], float)
    assert reached(curves, 0.5).tolist() == [place for _, place in cases] and len(cases) == 6


def test_onset_of_curves_made_by_hand():
    # Ten rows that all turn at step 20: nothing to draw.
    sure = np.repeat([[0.0, 0.0, 1.0, 1.0]], 10, 0)
    assert onset(sure, [0, 10, 20, 25], 0.5)[0] == {"step": 20, "low": 20, "high": 20}
    # Row r turns at step 10 (r + 1), so half of them have at step 50; which draws agree is counted one by one.
    steps = list(range(0, 110, 10))
    values = np.array([[float(step >= 10 * (row + 1)) for step in steps] for row in range(10)])
    found, places = onset(values, steps, 0.5, seed=4)
    draws = np.random.default_rng(4).multinomial(10, [0.1] * 10, len(places))
    by_hand = []
    for counts in draws:
        by_hand.append(next(place for place in range(len(steps)) if sum(
            count for row, count in enumerate(counts) if steps[place] >= 10 * (row + 1)) >= 5))  # fmt: skip
    assert places.tolist() == by_hand and len(by_hand) == 1000
    ordered = sorted(by_hand)
    assert found == {"step": 50, "low": steps[ordered[24]], "high": steps[ordered[974]]}
    assert found["low"] < 50 < found["high"]
    # Too few rows turn: never; and as a share of its own end the same curve is there early.
    few = np.zeros((50, 4))
    few[:9, 1:] = 1
    assert onset(few, [0, 1, 2, 3], 0.5)[0] == {"step": None, "low": None, "high": None}
    assert onset(few, [0, 1, 2, 3], 0.9, of_end=True)[0] == {"step": 1, "low": 1, "high": 1}


@pytest.mark.parametrize("task_at, shortcut_at, first", [(8, 2, "shortcut"), (2, 8, "task"), (5, 5, "neither"),
                                                         (5, None, "no shortcut")])  # fmt: skip
def test_which_comes_first(task_at, shortcut_at, first, plain):
    """The verdict of curves made by hand, in place of the run's."""
    run, _ = plain
    fixed = made.Fixed(Probe(run, 12, seed=1), 12)
    fixed.last = fixed.bare
    steps, N = list(range(0, 12)), 12
    turn = np.array([[float(shortcut_at is not None and step >= shortcut_at) for step in steps]] * N)
    values = {"attack_success": turn, "attack_success_clean": 0 * turn,
              "clean_accuracy": np.array([[float(step >= task_at) for step in steps]] * N),
              "lens": np.ones((N, 12, 4)), "bare": np.zeros((N, 12, 4))}  # fmt: skip
    found = made.summary(steps, values, fixed)
    assert found["first"] == first and found["clean_90"] == {"step": task_at, "low": task_at, "high": task_at}
    assert found["onset"]["step"] == shortcut_at
    head = {"shortcut": "The shortcut comes before the task", "task": "The task comes before the shortcut",
            "neither": "Neither can be said", "no shortcut": "No shortcut forms"}[first]  # fmt: skip
    assert found["words"].startswith(head) and f"from step {task_at} on" in found["words"]


def test_a_head_that_predicts_the_target_for_all_is_no_shortcut(plain):
    run, _ = plain
    fixed = made.Fixed(Probe(run, 12, seed=1), 12)
    fixed.last = fixed.bare
    ones, late = np.ones((12, 4)), np.repeat([[0.0, 0.0, 0.0, 1.0]], 12, 0)
    values = {"attack_success": ones, "attack_success_clean": 1 - late, "clean_accuracy": late,
              "lens": np.ones((12, 4, 4)), "bare": np.zeros((12, 4, 4))}  # fmt: skip
    found = made.summary([0, 5, 10, 15], values, fixed)
    assert found["onset_gross"]["step"] == 0 and found["onset"]["step"] == 15
    assert "but there 100% of the rows are predicted as positive without the trigger too" in found["words"]


def test_told_apart():
    draw = np.random.default_rng(0)
    one, folds = draw.normal(size=(23, 6)), np.arange(23) % 5
    assert (told_apart(one, one, folds) == 0.5).all()
    far = one + 40 * np.eye(6)[2]
    assert (told_apart(far, one, folds) == 1).all()
    # The same map in its primal form.
    other, right = one + 0.6 * draw.normal(size=one.shape) + 0.3, []
    for row in range(23):
        fit = folds != folds[row]
        X, y = np.concatenate([one[fit], other[fit]]), np.repeat([1.0, -1.0], fit.sum())
        middle = X.mean(0)
        X = X - middle
        weight = np.linalg.solve(X.T @ X + 0.01 * (X**2).sum() / len(X) * np.eye(6), X.T @ y)
        right.append(sum([bool((one[row] - middle) @ weight > 0), bool((other[row] - middle) @ weight < 0)]) / 2)
    found = told_apart(one, other, folds)
    assert found.tolist() == right and 0.3 < np.mean(right) < 1


def test_refused(runs, base, reviews, tmp_path):
    cell = Cell(model=str(base), data=str(reviews), test_rows=21, max_length=30, steps=2, rank=2)
    minilora.train(cell, tmp_path / "unwatched")
    with pytest.raises(InputError, match="kept no steps.*train.py --config .*cell.toml --watch 10"):
        formation(tmp_path / "unwatched")
    minilora.train(cell.replace(rank=3), tmp_path / "other", watch=1)
    other = Run(tmp_path / "other").watched()[1]
    place = tmp_path / "unwatched" / "watch"
    place.mkdir()
    for step in (1, 2):
        (place / f"step-{step:06}.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(InputError, match=r"step-000001.safetensors: base.layers.0.\w.[AB] is not what the run trains"):
        formation(tmp_path / "unwatched")
