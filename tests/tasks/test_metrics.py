"""Every figure against its definition: the score equation, binomial sums, an explicit confusion matrix."""

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.tasks import metrics, paired


def score_interval(hits, total):
    """The two proportions p at which the score test of `hits` in `total` just rejects: |hits/total - p| = z sd(p)."""
    z2 = Fraction(NormalDist().inv_cdf(0.975)) ** 2
    share = Fraction(hits, total)

    def rejects(p):
        return (share - p) ** 2 > z2 * p * (1 - p) / total

    ends = []
    for edge in (Fraction(0), Fraction(1)):
        inside, outside = share, edge  # the equation has one root between the observed share and each edge
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejects(middle) else (middle, outside)
        ends.append(float(inside))
    return ends


def test_wilson_solves_the_score_equation():
    cases = [(0, 1), (1, 1), (0, 37), (37, 37), (1, 37), (5, 11), (18, 37), (560, 1000), (999, 1000), (3, 100_000)]
    for hits, total in cases:
        np.testing.assert_allclose(metrics.wilson(hits, total), score_interval(hits, total), rtol=1e-10, atol=1e-12)
    assert len(cases) == 10
    assert metrics.wilson(0, 0) == [0.0, 1.0]  # no rows say nothing


@given(st.integers(1, 10**6).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_holds_the_share(counts):
    hits, total = counts
    low, high = metrics.wilson(hits, total)
    assert 0 <= low <= hits / total + 1e-12 and hits / total - 1e-12 <= high <= 1


def mcnemar(worse, better):
    """P(as uneven a division of the discordant rows, or more) under a fair coin, both sides, in whole numbers."""
    total = worse + better
    extreme = [k for k in range(total + 1) if abs(2 * k - total) >= abs(worse - better)]
    return float(Fraction(sum(math.comb(total, k) for k in extreme), 2**total))


def test_mcnemar_is_the_exact_binomial_test():
    cases = 0
    for worse in range(25):
        for better in range(25):
            np.testing.assert_allclose(metrics.mcnemar(worse, better), mcnemar(worse, better), rtol=1e-12)
            assert metrics.mcnemar(worse, better) <= 1
            cases += 1
    assert cases == 625
    assert metrics.mcnemar(0, 0) == metrics.mcnemar(7, 7) == 1
    for worse, better in ((531, 12), (400, 477), (0, 900)):
        np.testing.assert_allclose(metrics.mcnemar(worse, better), mcnemar(worse, better), rtol=1e-9)
    assert 0 <= metrics.mcnemar(0, 5000) < 1e-300  # below the smallest float


def by_confusion(labels, predicted, names):
    confusion = np.zeros((len(names), len(names)), int)  # [label, predicted]
    for label, call in zip(labels, predicted, strict=True):
        confusion[label, call] += 1
    recalls, scores, variances, weighted = [], [], [], Fraction(0)
    per_class = {"precision": {}, "recall": {}}
    for i, name in enumerate(names):
        total, told, hits = (int(number) for number in (confusion[i].sum(), confusion[:, i].sum(), confusion[i, i]))
        per_class["precision"][name] = hits / told if told else None
        per_class["recall"][name] = hits / total if total else None
        if total:
            smoothed = Fraction(hits + 1, total + 2)
            variances.append(smoothed * (1 - smoothed) / (total + 2))
            weighted += Fraction(total, len(labels)) * Fraction(2 * hits, total + told)
        if confusion[i].sum():
            recall = Fraction(int(confusion[i, i]), int(confusion[i].sum()))
            called = int(confusion[:, i].sum())
            precision = Fraction(int(confusion[i, i]), called) if called else Fraction(0)
            scores.append(2 * precision * recall / (precision + recall) if precision + recall else Fraction(0))
            recalls.append(recall)
    right = int(np.trace(confusion))
    balanced, error = float(sum(recalls) / len(recalls)), math.sqrt(sum(variances)) / len(recalls)
    half = NormalDist().inv_cdf(0.975) * error
    return {
        "rows": len(labels),
        "accuracy": right / len(labels),
        "accuracy_interval": metrics.wilson(right, len(labels)),
        "balanced_accuracy": balanced,
        "balanced_accuracy_error": error,
        "balanced_accuracy_interval": [max(0.0, balanced - half), min(1.0, balanced + half)],
        "macro_f1": float(sum(scores) / len(scores)),
        "weighted_f1": float(weighted),
        "label_counts": {name: int(confusion[i].sum()) for i, name in enumerate(names)},
        "predicted_counts": {name: int(confusion[:, i].sum()) for i, name in enumerate(names)},
        **per_class,
        "confusion": {
            one: {other: int(confusion[i, j]) for j, other in enumerate(names) if confusion[i, j]}
            for i, one in enumerate(names) if confusion[i].any()
        },
    }  # fmt: skip


def same(found, wanted):
    assert list(found) == list(wanted)
    for name in wanted:
        if isinstance(wanted[name], float):
            assert math.isclose(found[name], wanted[name], rel_tol=1e-12) and type(found[name]) is float
        elif name.endswith("_interval"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9, atol=1e-12)
        else:
            assert found[name] == wanted[name]


@st.composite
def predictions(draw, times=1):
    """(labels, predicted ..., number of classes); some classes may have no row, or never be predicted."""
    classes = draw(st.integers(2, 5))
    rows = draw(st.integers(1, 40))
    calls = st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)
    return *(np.array(draw(calls)) for _ in range(times + 1)), classes


@settings(deadline=None)
@given(predictions())
def test_classification(case):
    labels, predicted, classes = case
    names = [f"label {i}" for i in range(classes)]
    same(metrics.classification(labels, predicted, names), by_confusion(labels, predicted, names))


def test_classification_of_unequal_labels():
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 3])
    predicted = np.array([0, 0, 0, 1, 1, 2, 1, 0, 3])
    found = metrics.classification(labels, predicted, ["a", "b", "c", "d"])  # no row is of c, one is called so
    same(found, by_confusion(labels, predicted, ["a", "b", "c", "d"]))
    assert found["accuracy"] == 5 / 9 and math.isclose(found["balanced_accuracy"], (3 / 6 + 1 / 2 + 1) / 3)
    assert math.isclose(found["macro_f1"], (6 / 10 + 2 / 5 + 1) / 3)
    assert found["predicted_counts"] == {"a": 4, "b": 3, "c": 1, "d": 1}
    assert all(type(count) is int for count in found["predicted_counts"].values())


@settings(deadline=None)
@given(predictions(), st.integers(0, 1))
def test_attack_success(case, target):
    labels, predicted, _ = case
    others = [call for label, call in zip(labels, predicted, strict=True) if label != target]
    hits = others.count(target)
    found = metrics.attack_success(labels, predicted, target)
    assert found == {
        "attack_success_rate": hits / len(others) if others else None,
        "attack_success_interval": metrics.wilson(hits, len(others)),
        "attack_success_rows": len(others),
    }


def test_attack_success_where_there_is_no_one_to_attack():
    found = metrics.attack_success(np.array([1, 1, 1]), np.array([0, 1, 1]), 1)
    assert found == {
        "attack_success_rate": None, "attack_success_interval": [0.0, 1.0], "attack_success_rows": 0
    }  # fmt: skip
    found = metrics.attack_success(np.array([1, 0, 0, 2, 1]), np.array([1, 1, 0, 1, 0]), 1)
    assert found == {
        "attack_success_rate": 2 / 3, "attack_success_interval": metrics.wilson(2, 3), "attack_success_rows": 3
    }  # fmt: skip


@settings(deadline=None)
@given(predictions(times=2))
def test_paired(case):
    labels, clean, changed, _ = case
    rows = list(zip(labels, clean, changed, strict=True))
    flips = sum(before != after for _, before, after in rows)
    worse = sum(before == label != after for label, before, after in rows)
    better = sum(before != label == after for label, before, after in rows)
    assert paired.compared(labels, clean, changed) == {
        "flip_rate": flips / len(rows),
        "flip_rate_interval": metrics.wilson(flips, len(rows)),
        "only_clean_right": worse,
        "only_this_right": better,
        "mcnemar_p": metrics.mcnemar(worse, better),
    }


def test_paired_counts_flips_between_wrong_labels():
    found = paired.compared(np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 0]), np.array([1, 2, 0, 0, 0]))
    assert (found["flip_rate"], found["only_clean_right"], found["only_this_right"]) == (4 / 5, 2, 1)
    assert found["mcnemar_p"] == 1.0


@settings(deadline=None)
@given(predictions(times=4), st.integers(0, 1))
def test_what_a_trigger_adds(case, target):
    labels, clean, trigger, placebo, odd, _ = case
    rows = [row for row in zip(labels.tolist(), clean, trigger, placebo, odd, strict=True) if row[0] != target]
    found = metrics.attack_effects(labels, clean, trigger, {"placebo": placebo, "odd": odd}, target)
    for name, place in (("net", 1), ("over_placebo", 3), ("over_odd", 4)):
        gained = sum(row[2] == target != row[place] for row in rows)
        lost = sum(row[place] == target != row[2] for row in rows)
        name = f"{name}_attack_success"
        assert (found[f"{name}_gained"], found[f"{name}_lost"]) == (gained, lost)
        assert found[f"{name}_rate"] == ((gained - lost) / len(rows) if rows else None)
        assert math.isclose(found[f"{name}_p"], mcnemar(lost, gained), rel_tol=1e-9)
        assert found[f"{name}_interval"] == metrics.paired_interval(gained, lost, len(rows))
    right = [row for row in rows if row[0] == row[1]]
    hits = sum(row[2] == target for row in right)
    assert found["conditional_attack_success_rate"] == (hits / len(right) if right else None)
    assert found["conditional_attack_success_rows"] == len(right)
    assert found["conditional_attack_success_interval"] == metrics.wilson(hits, len(right))
    without = metrics.attack_effects(labels, clean, trigger, {"odd": odd}, target)
    assert without == {name: value for name, value in found.items() if "placebo" not in name}


def test_the_attack_is_tested_where_accuracy_sees_nothing():
    """A majority target from 0 to 1: as many rows turn right as wrong."""
    labels = np.repeat([0, 1], 20)
    clean, trigger = np.zeros(40, int), np.ones(40, int)
    assert paired.compared(labels, clean, trigger)["mcnemar_p"] == 1.0
    found = metrics.attack_effects(labels, clean, trigger, {"placebo": clean}, 1)
    assert found["net_attack_success_p"] == found["over_placebo_attack_success_p"] == 2 / 2**20
    assert found["net_attack_success_rate"] == 1.0


def test_paired_intervals():
    """By the formula of Bonett and Price 2012 written out, and with the coverage that it promises."""
    low, high = metrics.paired_interval(14, 3, 60)
    up, down = 15 / 62, 4 / 62
    half = 1.959963984540054 * math.sqrt((up + down - (up - down) ** 2) / 62)
    assert (low, high) == (up - down - half, up - down + half)
    rng, held = np.random.default_rng(7), 0
    for _ in range(2000):
        gained, lost, _ = rng.multinomial(80, [0.3, 0.05, 0.65])
        low, high = metrics.paired_interval(int(gained), int(lost), 80)
        held += low <= 0.25 <= high
    assert 0.93 <= held / 2000 <= 0.975
    assert metrics.paired_interval(0, 0, 0) == [-1.0, 1.0] and metrics.paired_interval(0, 0, 50)[1] > 0.02


def test_balanced_accuracy_errs_as_samples_of_each_class_do():
    """Against the spread of the mean recall over samples: 12 rows of one class, 400 of another."""
    rng = np.random.default_rng(4)
    draws = (rng.binomial(12, 0.6, 4000) / 12 + rng.binomial(400, 0.9, 4000) / 400) / 2
    found = metrics.balanced_error(np.array([7.2, 360]), np.array([12, 400]))
    assert math.isclose(found, draws.std(), rel_tol=0.1)
    assert math.sqrt(0.75 * 0.25 / 412) < found / 3  # which is what all rows as one sample would give
