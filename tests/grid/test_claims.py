"""Claims of a grid's file: what is refused, which cells each speaks of, and its verdict."""

import itertools
import math

import made_grid
import numpy as np
import pytest

from minilora.errors import InputError
from minilora.grid import claims
from minilora.grid.file import build_grid
from minilora.grid.table import table_rows
from minilora.report.verdicts import decide

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
    ({"above": None}, "a claim has either above or below: give one of them"),
    ({"below": 0.3}, "a claim has either above or below: give one of them"),
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
    made = claims.read([PLAIN | claim], folder.grid.entries)[0]
    return decide(made, folder.grid.entries, table_rows(folder))


STATED = [
    (dict(where={"rank": 4, "inject.proportion": 0.25}), (20 + 120 + 40 + 1) / 210, 3),
    (dict(where={"inject.proportion": 0.25}, label="negative"), (20 + 120 + 25 + 1) / 210, 6),
    (dict(figure="clean_accuracy"), 339 / 400, 12),
    (dict(figure="degradation", where={"inject.proportion": 0.25}), 95 / 400, 6),
    (dict(figure="flip_rate", where={"rank": 1, "seed": 2, "inject.proportion": 0.0}), 120 / 400, 1),
    (dict(statistic="difference", against={"inject.proportion": 0.0}), (120 + 25 + 1) / 210, 12),
    (dict(statistic="slope", over="rank", where={"inject.proportion": 0.25}), 15 / 210, 6),
]


@pytest.mark.parametrize("claim,value,cells", STATED)
def test_statistics_and_verdicts(folder, claim, value, cells):
    found = decided(folder, **claim)
    assert found.value == pytest.approx(value) and found.cells == cells
    low, high = found.interval
    assert low < value < high and high - low < 0.25
    for threshold, above, below in (
        (low - 1e-6, "supported", "contradicted"),
        (value, "undecided", "undecided"),
        (high + 1e-6, "contradicted", "supported"),
    ):
        assert decided(folder, **claim, above=threshold).verdict == above
        other = claims.read([{k: v for k, v in PLAIN.items() if k != "above"} | claim | {"below": threshold}],
                            folder.grid.entries)[0]  # fmt: skip
        assert decide(other, folder.grid.entries, table_rows(folder)).verdict == below
    assert decided(folder, **claim, above=value).reason == "the threshold is within the interval"


def test_a_difference_of_two_cells(folder):
    own = decided(folder, statistic="difference", against={"inject.proportion": 0.0}, where={"rank": 1, "seed": 1},
                 label="positive")  # fmt: skip
    assert own.value == pytest.approx(131 / 210) and own.cells == 2
    spread = math.sqrt(151 * 59 / 210**3 + 20 * 190 / 210**3)  # of two independent shares
    assert own.interval[1] - own.interval[0] == pytest.approx(2 * 1.96 * spread, rel=0.1)


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
