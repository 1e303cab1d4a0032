"""Claims of a grid's file: what is refused, which cells each speaks of, and its verdict."""

import itertools
import math

import made_grid
import numpy as np
import pytest

from minilora.errors import InputError
from minilora.grid import claims, power
from minilora.grid.file import build_grid
from minilora.grid.table import table_rows
from minilora.report.verdicts import Decision, decide, holm
from minilora.report.write import found_of_each, found_text

GRID = {
    "grid": {"rank": [1, 2, 8], "inject.proportion": [0.0, 0.1, 0.25], "seed": [0, 3]},
    "include": [{"method": "head", "seed": [0, 3]}, {"rank": 4, "inject.sources": []}],
}
PLAIN = {"name": "a", "text": "A.", "figure": "attack_success", "above": 0.5}


def entries(**changes):
    return build_grid(GRID | changes).entries


def weights(**claim):
    """{(rank, proportion): weight} of a claim, and its cells."""
    found, cells = claims.weigh(claims.parse(PLAIN | claim), entries())
    plain = {}
    for setting, weight in found.items():
        values = {name: eval(value) for name, value in setting}
        plain[values["rank"], values["inject.proportion"]] = weight
    return plain, cells


REFUSED = [
    ({"figrue": "x"}, "unknown field 'figrue': did you mean figure?"),
    ({"name": 3}, "name is 3, but must be a string"),
    ({"text": ""}, "text is missing: say it"),
    ({"figure": "attack_sucess"}, "unknown figure 'attack_sucess': did you mean attack_success?"),
    ({"figure": "trained_parameters"}, "unknown figure 'trained_parameters'"),
    ({"statistic": "sum"}, "unknown statistic 'sum' (there are: mean, difference, slope)"),
    ({"above": None}, "a claim has one of above, below and within: give one of them"),
    ({"below": 0.3}, "a claim has one of above, below and within: give one of them"),
    ({"above": None, "within": 0.1}, "within is a margin above 0 around no difference: it goes with a difference or"),
    ({"above": None, "within": 0.0, "statistic": "slope", "over": "rank"}, "within is a margin above 0 around no"),
    ({"each": "rnak"}, "unknown each 'rnak': did you mean rank?"),
    ({"each": "seed"}, "each is seed, but the claim is of that already: choose another field"),
    ({"each": "label", "label": "positive"}, "each is label, but the claim is of that already"),
    ({"each": "rank", "statistic": "slope", "over": "rank"}, "each is rank, but the claim is of that already"),
    ({"each": "lr"}, "each is lr, but its cells have fewer than two values of it: drop it"),
    ({"above": "0.5"}, "the threshold is '0.5', but must be a finite number"),
    ({"above": True}, "the threshold is True, but must be a finite number"),
    ({"above": math.nan}, "the threshold is nan, but must be a finite number"),
    ({"where": []}, "where is [], but must be a table of fields and values"),
    ({"where": {"rnak": 1}}, "[where]: unknown field 'rnak': did you mean rank?"),
    ({"where": {"rank": 3}}, "no cell has rank = 3 and a trigger: nothing can decide it"),
    ({"where": {"rank": 4}}, "no cell has rank = 4 and a trigger"),
    ({"label": "negative"}, "no cell has a trigger for negative: nothing can decide it"),
    ({"statistic": "difference"}, "statistic = 'difference' needs against: give it"),
    ({"against": {"rank": 1}}, "against goes with statistic = 'difference', which is 'mean': drop it"),
    ({"over": "rank"}, "over goes with statistic = 'slope', which is 'mean': drop it"),
    ({"statistic": "slope"}, "statistic = 'slope' needs over: give it"),
    ({"statistic": "slope", "over": "rnak"}, "unknown over 'rnak': did you mean rank?"),
    ({"statistic": "slope", "over": "rank"}, "over is rank, but a cell has None there: choose cells above 0"),
    ({"statistic": "slope", "over": "inject.proportion"}, "over is inject.proportion, but a cell has 0.0 there"),
    ({"statistic": "slope", "over": "lr"}, "no two of its cells differ only in lr: nothing can decide it"),
    ({"statistic": "slope", "over": "rank", "where": {"rank": 2}}, "no two of its cells differ only in rank"),
    ({"statistic": "difference", "against": {"rank": 16}}, "no cell has another with rank = 16 that is the same"),
    ({"statistic": "difference", "against": {"seed": 0}}, "against has seed, but seeds are what the interval is over"),
]  # fmt: skip


@pytest.mark.parametrize("changes,message", REFUSED)
def test_refusals(changes, message):
    claim = {name: value for name, value in (PLAIN | changes).items() if value is not None}
    with pytest.raises(InputError) as caught:
        build_grid(GRID | {"claim": [PLAIN | {"name": "first"}, claim]})
    assert f"[[claim]] 2: {message}" in str(caught.value) and "\n" not in str(caught.value)


def test_names_are_unique_and_claims_are_read_with_the_grid():
    with pytest.raises(InputError, match=r"\[\[claim\]\] 2: another has the name 'a' too: rename one"):
        build_grid(GRID | {"claim": [PLAIN, PLAIN]})
    [made] = build_grid(GRID | {"claim": [PLAIN | {"where": {"inject": {"proportion": 0.1}}}]}).claims
    assert made.where == {"inject.proportion": [0.1]} and made.above == 0.5 and made.below is None


# --- which cells, with which weights


def test_a_mean_weighs_settings_alike():
    found, cells = weights(where={"inject.proportion": [0.1, 0.25], "rank": [1, 2, 8, 99]})
    assert found == {(rank, share): 1 / 6 for rank, share in itertools.product((1, 2, 8), (0.1, 0.25))}
    assert len(cells) == 12
    assert len(weights()[1]) == 20  # but not the cell without a trigger
    assert len(weights(figure="clean_accuracy")[1]) == 21 and len(weights(label="positive")[1]) == 20
    found, cells = weights(where={"rank": 8, "seed": 3})
    assert len(found) == 3 and {entry.cell.seed for entry in cells} == {3}


def test_a_difference_pairs_cells():
    found, cells = weights(statistic="difference", against={"inject.proportion": 0.0}, where={"rank": [1, 8]})
    assert found == pytest.approx({(1, 0.1): 1 / 4, (1, 0.25): 1 / 4, (8, 0.1): 1 / 4, (8, 0.25): 1 / 4,
                                   (1, 0.0): -1 / 2, (8, 0.0): -1 / 2})  # fmt: skip
    assert len(cells) == 12
    found, _ = weights(statistic="difference", against={"rank": [1, 2]}, where={"inject.proportion": 0.1, "rank": 8})
    assert found == pytest.approx({(8, 0.1): 1, (1, 0.1): -1 / 2, (2, 0.1): -1 / 2})


def test_a_difference_pairs_methods_in_all_that_both_have():
    found, cells = weights(statistic="difference", against={"method": "head"}, where={"method": "lora", "rank": [2, 8]})
    assert found == pytest.approx({(2, 0.25): 1 / 2, (8, 0.25): 1 / 2, (None, 0.25): -1}) and len(cells) == 6
    back = {"method": "lora", "rank": 8}
    found, cells = weights(statistic="difference", against=back, where={"method": "head"})
    assert found == pytest.approx({(None, 0.25): 1, (8, 0.25): -1}) and {e.cell.seed for e in cells} == {0, 3}


def test_a_difference_pairs_within_a_seed():
    values = {"grid": {"rank": [1, 2], "seed": [0, 1]}, "exclude": [{"rank": 2, "seed": 1}]}
    claim = claims.parse(PLAIN | {"statistic": "difference", "against": {"rank": 1}})
    _, cells = claims.weigh(claim, build_grid(values).entries)
    assert {(entry.cell.rank, entry.cell.seed) for entry in cells} == {(1, 0), (2, 0)} and len(cells) == 2


def test_a_slope_is_that_of_least_squares():
    found, cells = weights(statistic="slope", over="rank", where={"method": "lora", "rank": [1, 2, 8],
                                                                  "inject.proportion": [0.0, 0.25]})  # fmt: skip
    assert len(found) == 6 and len(cells) == 12
    rng = np.random.default_rng(1)
    y = {key: rng.random() for key in found}
    keys = list(found)
    design = np.array([[math.log2(rank), share == 0.0, share == 0.25] for rank, share in keys], dtype=float)
    wanted = np.linalg.lstsq(design, np.array([y[key] for key in keys]), rcond=None)[0][0]
    assert sum(found[key] * y[key] for key in keys) == pytest.approx(wanted)


# --- verdicts

TEXT = """
[cell]
inject.sources = ["date:positive", "country:negative"]
[grid]
rank = [1, 4]
"inject.proportion" = [0.0, 0.25]
seed = [0, 1, 2]
"""


def counts(cell):
    strong = cell.inject.proportion > 0
    return {"right": 340 - cell.seed, "lost": 100 * strong, "gained": 5, "flips": 120, "clean": 20,
            "success": 20 + strong * (120 + 10 * cell.rank + cell.seed)}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_grid.make(tmp_path_factory.mktemp("claims"), TEXT, counts)


def decided(folder, **claim):
    stated = {name: value for name, value in (PLAIN | claim).items() if value is not None}
    made = claims.read([stated], folder.grid.entries)[0]
    return decide(made, folder.grid.entries, table_rows(folder))


STATED = [
    (dict(where={"rank": 4, "inject.proportion": 0.25}), (20 + 120 + 40 + 1) / 210, 3),
    (dict(where={"inject.proportion": 0.25}, label="negative"), (20 + 120 + 25 + 1) / 210, 6),
    (dict(figure="clean_accuracy"), 339 / 400, 12),
    (dict(figure="degradation", where={"inject.proportion": 0.25}), 95 / 400, 6),
    (dict(figure="flip_rate", where={"rank": 1, "inject.proportion": 0.0}), 120 / 400, 3),
    (dict(statistic="difference", against={"inject.proportion": 0.0}), (120 + 25 + 1) / 210, 12),
    (dict(statistic="slope", over="rank", where={"inject.proportion": 0.25}), 15 / 210, 6),
]


@pytest.mark.parametrize("claim,value,cells", STATED)
def test_statistics_and_verdicts(folder, claim, value, cells):
    found = decided(folder, **claim)
    assert found.value == pytest.approx(value) and found.cells == cells
    low, high = found.interval
    assert low < value < high and high - low < 0.4 and found.seeds == 3
    for threshold, above, below in (
        (low - 1e-6, "supported", "contradicted"),
        (value, "undecided", "undecided"),
        (high + 1e-6, "contradicted", "supported"),
    ):
        assert decided(folder, **claim, above=threshold).verdict == above
        other = claims.read([{k: v for k, v in PLAIN.items() if k != "above"} | claim | {"below": threshold}],
                            folder.grid.entries)[0]  # fmt: skip
        assert decide(other, folder.grid.entries, table_rows(folder)).verdict == below
    assert decided(folder, **claim, above=value).reason.startswith("the threshold is within the interval; ")


def test_few_seeds_give_no_verdict(folder):
    for seeds, words in (([1], "1 seed, and a verdict takes at least 3"),
                         ([0, 2], "2 seeds, and a verdict takes at least 3; about 3 seeds would")):  # fmt: skip
        found = decided(folder, where={"inject.proportion": 0.25, "seed": seeds}, above=0.2)
        assert found.verdict == "undecided (few seeds)" and found.reason.startswith(words) and found.seeds == len(seeds)
        assert found.value > 0.7 and found.interval[0] > 0.2
    assert decided(folder, where={"inject.proportion": 0.25}, above=0.2).verdict == "supported"


def test_each_part_by_itself(folder):
    """A mean hides a part that fails; a part is named, and the p-value is that of the part that decides."""
    where = {"inject.proportion": 0.25}
    least, most = ((20 + 120 + 10 * rank + 1) / 210 for rank in (1, 4))
    parts = [decided(folder, where=where | {"rank": rank}, above=0.6) for rank in (1, 4)]
    every = decided(folder, where=where, each="rank", above=0.6)
    assert (every.verdict, every.part, every.cells) == ("supported", "rank = 1", 6)
    assert every.value == pytest.approx(least) and every.p == max(one.p for one in parts)
    assert every.interval == parts[0].interval
    assert every.others == (("rank = 4", parts[1].value, parts[1].interval),) and not parts[0].others
    assert found_of_each(every) == f"{found_text(parts[0])} at rank = 1; {found_text(parts[1])} at rank = 4"
    middle = (least + most) / 2
    assert decided(folder, where=where, above=middle - 0.03).value == pytest.approx(middle)
    one = decided(folder, where=where, each="rank", above=least + 0.12)
    alone = decided(folder, where=where | {"rank": 1}, above=least + 0.12)
    assert (one.verdict, one.part) == ("contradicted", "rank = 1") and one.p == pytest.approx(min(1, 2 * alone.p))
    labels = decided(folder, where=where, each="label", above=0.6)
    assert labels.verdict == "supported" and labels.part in ("positive", "negative")


def test_alike_within_a_margin(folder):
    """Two one-sided tests: supported where the 90% interval is within the margin, and not by a wide interval."""
    claim = dict(statistic="difference", against={"rank": 1}, where={"inject.proportion": 0.25, "rank": 4}, above=None)
    found = [decided(folder, **claim, within=margin) for margin in (0.9, 0.145, 0.02)]
    assert [one.verdict for one in found] == ["supported", "undecided", "contradicted"]
    assert found[0].value == pytest.approx(30 / 210) and found[0].p < 0.001


def test_holm():
    """Against the procedure step by step; an undecided claim counts among the tested."""
    made = [Decision(claims.parse(PLAIN | {"name": str(n)}), 0.5, (0, 1), 3, verdict, p=p) for n, (p, verdict) in
            enumerate([(0.04, "supported"), (0.001, "contradicted"), (0.3, "undecided"), (0.02, "supported"),
                       (None, "undecided")])]  # fmt: skip
    found = holm(made)
    wanted = [max(0.04 * 3, 0.02 * 4), 0.001 * 5, max(0.3 * 2, 0.12), 0.02 * 4, None]
    assert [one.holm_p for one in found] == pytest.approx(wanted)
    assert [one.holm for one in found] == ["undecided", "contradicted", "undecided", "undecided", "undecided"]


def test_what_the_planned_seeds_detect():
    """By simulation: 80% of the samples of that size are decided where the truth lies that far beyond."""
    rng = np.random.default_rng(2)
    for seeds in (3, 5):
        grid = build_grid({"grid": {"rank": [1, 2], "seed": list(range(seeds))}, "cell": {"test_rows": 10**6},
                           "claim": [PLAIN]})  # fmt: skip
        distance, count = power.detectable(grid.claims[0], grid.entries)
        means = distance + power.OTHER * rng.standard_normal((20_000, 2, seeds)).mean(axis=1)
        t = means.mean(axis=1) / (means.std(axis=1, ddof=1) / math.sqrt(seeds))
        assert count == seeds and (t > {3: 4.3027, 5: 2.7764}[seeds]).mean() == pytest.approx(0.8, abs=0.09)
    few = build_grid({"grid": {"rank": [1, 2], "seed": [0, 1]}, "claim": [PLAIN]})
    assert power.lines_of(few.claims, few.entries)[1] == (
        "  a: 2 seeds, and a verdict takes at least 3: it will be undecided"
    )
    alike = {"name": "b", "text": "B.", "figure": "net_attack_success", "statistic": "difference",
             "against": {"rank": 1}, "within": 0.1}  # fmt: skip
    grid = build_grid({"grid": {"rank": [1, 2], "seed": [0, 1, 2]}, "claim": [alike]})
    [_, said] = power.lines_of(grid.claims, grid.entries)
    assert "3 seeds show a margin of" in said and "but it claims 0.1, which takes " in said
    assert power.lines_of((), ()) == []


def test_what_is_missing_leaves_a_claim_undecided(tmp_path):
    folder = made_grid.make(tmp_path, TEXT, counts, waiting=[11], failed=[0, 1])
    for claim, reason in (
        ({}, "of 12 cells 3 are not finished"),
        (dict(where={"rank": 1}), "of 6 cells 2 failed"),
        (dict(where={"rank": 1, "inject.proportion": 0.25}), None),
    ):
        found = decided(folder, **claim)
        assert (found.reason == reason and found.value is None) if reason else found.verdict == "supported"
        assert not reason or found.verdict == "undecided"


def test_a_claim_in_words():
    said = claims.parse(PLAIN | {"where": {"rank": [1, 2], "inject.proportion": 0.5}, "label": "positive"}).test()
    assert said == "mean attack success of positive where rank = 1 or 2, inject.proportion = 0.5 is above 0.5"
    said = claims.parse({"name": "a", "text": "A", "figure": "flip_rate", "statistic": "slope", "over": "rank",
                         "below": 0}).test()  # fmt: skip
    assert said == "change of flip rate for each doubling of rank is below 0"
    said = claims.parse(PLAIN | {"statistic": "difference", "against": {"inject.sources": [["date:a"], ["html:a"]]}})
    assert said.test() == "attack success less that where inject.sources = date:a or html:a is above 0.5"
    said = claims.parse({"name": "a", "text": "A", "figure": "net_attack_success", "statistic": "difference",
                         "against": {"rank": 1}, "within": 0.1, "each": "label"})  # fmt: skip
    assert said.test() == "net attack success less that where rank = 1 is within +-0.1, for each label"
