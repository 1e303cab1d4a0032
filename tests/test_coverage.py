"""Which modules a plan covers, at what rank and scale, and how a target or layer that the base lacks is refused."""

import dataclasses
from itertools import combinations

import pytest
from conftest import bert_spec

from minilora import coverage
from minilora.cell import Cell
from minilora.coverage import Slot
from minilora.errors import InputError
from minilora.spec import Spec

SPEC = bert_spec(hidden_size=6, num_hidden_layers=7, num_attention_heads=2, intermediate_size=10)


class AttentionAlone(Spec):
    targets = ("q", "k", "v", "o")


def test_scales_of_the_three_policies():
    wanted = {"constant": 24 / 9, "rank": 1.0, "rslora": 24 / 3}
    for scaling, scale in wanted.items():
        cell = Cell(rank=9, scaling=scaling, targets=("v",), alpha=None if scaling == "rank" else 24)
        alpha = 9.0 if scaling == "rank" else 24.0
        assert coverage.parse_targets(cell.targets, 9, cell.alpha, scaling) == {"v": Slot(9, alpha, scale)}
    assert list(coverage.SCALES) == list(wanted)


def test_own_rank_and_alpha():
    parse = coverage.parse_targets
    assert parse(("down:3", "attn:2:5", "gate"), 4, 12.0, "constant") == {
        "q": Slot(2, 5.0, 2.5), "k": Slot(2, 5.0, 2.5), "v": Slot(2, 5.0, 2.5), "o": Slot(2, 5.0, 2.5),
        "gate": Slot(4, 12.0, 3.0), "down": Slot(3, 12.0, 4.0)}  # fmt: skip
    assert list(parse(("mlp", "o", "k"), 1, 1.0, "constant")) == ["k", "o", "gate", "up", "down"]  # canonical order
    assert list(parse(("all",), 1, 1.0, "constant")) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert parse(("k:7",), 3, None, "rank") == {"k": Slot(7, 7.0, 1.0)}


def test_plan():
    cell = Cell(rank=2, alpha=6, targets=("up:4:2", "q"), layers="1-2,5")
    q, up = Slot(2, 6.0, 3.0), Slot(4, 2.0, 0.5)
    assert coverage.plan(SPEC, cell) == {
        "layers.1.q": q, "layers.1.up": up, "layers.2.q": q, "layers.2.up": up, "layers.5.q": q,
        "layers.5.up": up}  # fmt: skip
    everything = coverage.plan(SPEC, Cell(targets=("all",)))  # a group may hold what the family lacks
    assert list(everything) == [f"layers.{i}.{t}" for i in range(7) for t in ("q", "k", "v", "o", "up", "down")]
    assert coverage.plan(SPEC, Cell(method="full")) == coverage.plan(SPEC, Cell(method="head")) == {}
    assert coverage.describe(coverage.plan(SPEC, cell), SPEC) == [
        "q        6 x 6     rank 2    scale 3       layers 1-2,5 of 0-6         72 parameters",
        "up      10 x 6     rank 4    scale 0.5     layers 1-2,5 of 0-6        192 parameters",
    ]
    assert coverage.describe({}, SPEC) == ["none"]


def test_plan_refuses_with_what_did_match():
    one_layer = dataclasses.replace(SPEC, layers=SPEC.layers[:1])
    attention = AttentionAlone(**vars(SPEC))
    cases = [
        (SPEC, dict(targets=("q", "gate", "up")),
         "target 'gate' matches nothing in a bert base, which has q k v o up down (the targets matched: q up)"),
        (SPEC, dict(targets=("gate",)), "(the targets matched: none)"),
        (attention, dict(targets=("mlp:3",)), "target 'gate' matches nothing in a bert base, which has q k v o (the"),
        (SPEC, dict(targets=("attn", "gate:2")), "target 'gate' matches nothing"),
        (SPEC, dict(layers="5-9"),
         "layers '5-9' names layer 9, but the base has layers 0-6 (of those named it has: 5, 6)"),
        (SPEC, dict(layers="0,7"), "names layer 7, but the base has layers 0-6 (of those named it has: 0)"),
        (SPEC, dict(layers="7"), "(of those named it has: none)"),
        (one_layer, dict(layers="1"), "names layer 1, but the base has layers 0-0"),
        (SPEC, dict(rank=7), "rank 7 of target 'q' is larger than its matrix (6 x 6): use at most 6"),
        (SPEC, dict(targets=("v", "down:7")),
         "rank 7 of target 'down' is larger than its matrix (6 x 10): use at most 6"),
    ]  # fmt: skip
    for spec, values, message in cases:
        with pytest.raises(InputError) as caught:
            coverage.plan(spec, Cell(**values))
        assert message in str(caught.value)
    assert len(cases) == 10
    assert len(coverage.plan(attention, Cell(targets=("mlp", "o")))) == 7
    assert len(coverage.plan(SPEC, Cell(rank=6, layers="6"))) == 3  # the largest that there are


def test_layer_ranges():
    cases = 0
    for size in range(1, 5):
        for layers in combinations(range(7), size):
            text = coverage.ranges(layers)
            assert coverage.parse_layers(text) == coverage.parse_layers(text, 7) == layers
            assert coverage.parse_layers(", ".join(map(str, reversed(layers)))) == layers
            cases += 1
    assert cases == 7 + 21 + 35 + 35
    assert coverage.ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8" and coverage.ranges((4,)) == "4"
    assert coverage.parse_layers("3-3,1-2,2") == (1, 2, 3)
    assert coverage.parse_layers("all") is None and coverage.parse_layers("all", 3) == (0, 1, 2)
