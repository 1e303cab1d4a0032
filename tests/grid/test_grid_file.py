"""A grid's file: which cells it makes, under which names, and what is refused before anything is trained."""

import itertools

import pytest
from conftest import ROOT

from minilora.cell import Cell
from minilora.errors import InputError
from minilora.fields import from_dict, tomllib
from minilora.grid import file as grid_file
from minilora.grid.axes import check_axis, matches
from minilora.grid.file import build_grid, parse_only, read_grid


def cells(**values):
    return [entry.cell for entry in build_grid(values).entries]


def test_crossed_axes_in_order():
    made = cells(cell={"lr": 0.5}, grid={"rank": [2, 1], "inject.proportion": [0.0, 0.3, 1], "seed": [4, 0]})
    wanted = [Cell(lr=0.5, rank=rank, seed=seed, inject={"proportion": proportion})
              for rank, proportion, seed in itertools.product([2, 1], [0.0, 0.3, 1.0], [4, 0])]  # fmt: skip
    assert made == wanted and len(made) == 12


def test_both_spellings_of_an_injection():
    made = cells(cell={"inject": {"location": "end"}}, grid={"inject": {"count": [1, 2]}, "inject.rows": [3, 4]})
    assert made == [Cell(inject=dict(location="end", count=c, rows=n)) for c in (1, 2) for n in (3, 4)]


def test_fields_that_move_together():
    made = cells(grid={"seed": [0, 1]}, zip={"rank": [1, 8, 8], "alpha": [2.0, 4, 9]})
    assert [(c.seed, c.rank, c.alpha) for c in made] == [(s, *pair) for s in (0, 1)
                                                        for pair in ((1, 2.0), (8, 4.0), (8, 9.0))]  # fmt: skip


def test_lists_as_values():
    made = cells(grid={"targets": [["q"], ["q", "mlp"]]}, include=[{"targets": ["o"]},
                 {"targets": [["k"], ["v", "up"]], "rank": [2, 3]}])  # fmt: skip
    assert [(c.targets, c.rank) for c in made] == [
        (("q",), 1), (("q", "mlp"), 1), (("o",), 1), (("k",), 2), (("k",), 3), (("v", "up"), 2), (("v", "up"), 3)
    ]  # fmt: skip


def test_included_and_excluded_cells():
    made = cells(grid={"rank": [1, 2, 4], "seed": [0, 1]}, include=[{"method": "head", "seed": [0, 1]}, {"rank": 64}],
                 exclude=[{"rank": [2, 4], "seed": 1}])  # fmt: skip
    found = [(c.method, c.rank, c.seed) for c in made]
    assert found == [("lora", 1, 0), ("lora", 1, 1), ("lora", 2, 0), ("lora", 4, 0), ("head", None, 0),
                     ("head", None, 1), ("lora", 64, 0)]  # fmt: skip


def test_without_axes_a_file_is_one_cell():
    assert cells(cell={"rank": 3}) == [Cell(rank=3)]
    assert cells(include=[{"rank": 3}]) == [Cell(rank=3)]


def test_a_preset_is_below_the_files_own_fields():
    [made] = cells(cell={"preset": "study", "lr": 0.25})
    assert (made.optimizer, made.scaling, made.alpha) == ("adafactor", "rank", None)
    assert (made.batch_size, made.lr) == (128, 0.25)
    assert (made.warmup, made.weight_decay, made.dropout, made.pooling) == (0.05, 1e-5, 0.05, "padded-mean+last")


def test_sizes():
    values = {"cell": {"rank": 2, "lr": 0.1}, "grid": {"seed": [0, 1]},
              "size": {"study": {"lr": 0.3, "seed": [5], "model": ["a", "b"], "inject": {"count": 2}}}}  # fmt: skip
    assert [entry.cell for entry in build_grid(values).entries] == [Cell(rank=2, lr=0.1, seed=seed) for seed in (0, 1)]
    made = build_grid(values, size="study")
    wanted = [Cell(rank=2, lr=0.3, seed=5, model=model, inject={"count": 2}) for model in "ab"]
    assert [entry.cell for entry in made.entries] == wanted and made.size == "study"
    # An axis of a size is one of included cells too, where [grid] has none of that name.
    values["include"] = [{"rank": 9}]
    made = [entry.cell for entry in build_grid(values, size="study").entries]
    more = [Cell(rank=rank, lr=0.3, seed=seed, model=model, inject={"count": 2})
            for model in "ab" for rank, seed in ((2, 5), (9, 0))]  # fmt: skip
    assert made == more
    del values["include"]
    values["size"]["small"] = {"rank": 7, "preset": "study"}
    made = build_grid(values)  # small is what a file is read at
    assert made.size == "small" and {(c.cell.rank, c.cell.lr, c.cell.optimizer) for c in made.entries} == {
        (7, 0.1, "adafactor")
    }
    del values["size"]["small"]
    for given, message in ((values, "there are: study"), ({}, "the file has none")):
        with pytest.raises(InputError, match=f"there is no size 'large' .{message}"):
            build_grid(given, size="large")


def test_run_options_are_no_axis():
    """Cells with run options of their own keep them, but neither their names nor their identity show these."""
    made = build_grid({"cell": {"rank": 3}, "zip": {"seed": [0, 1], "device": ["cpu", "cuda"]}})
    assert [(entry.cell.seed, entry.cell.device) for entry in made.entries] == [(0, "cpu"), (1, "cuda")]
    assert made.varied == ["seed"] and made.entries[1].varied == {"seed": 1}
    assert [entry.name for entry in made.entries] == [f"seed{k}_{Cell(rank=3, seed=k).id}" for k in (0, 1)]


def test_large_grids_are_counted_before_they_are_made(monkeypatch):
    """A billion cells are refused before one of them is made, and what is compared grows as the axes do."""
    with monkeypatch.context() as patch:
        patch.setattr(grid_file, "product", None)
        axis = list(range(1, 1001))
        with pytest.raises(InputError, match="the grid would have 1,000,000,000 cells, but may have 100,000"):
            build_grid({"grid": {"rank": axis, "seed": axis, "epochs": axis}})

    class Counted(int):
        compared = 0
        __hash__ = int.__hash__

        def __eq__(self, other):
            Counted.compared += 1
            return int(self) == int(other)

    axis = [Counted(number) for number in range(20_000)]
    check_axis("seed", axis)
    assert Counted.compared < len(axis)
    with pytest.raises(InputError, match="the axis seed has the value 7 twice"):
        check_axis("seed", [*axis, Counted(7)])
    made = build_grid({"grid": {"seed": list(range(2000)), "rank": [1, 2]}})
    assert len({entry.name for entry in made.entries}) == 4000


def test_names_say_what_varies_and_are_unique():
    made = build_grid({"grid": {"rank": [1, 16], "targets": [["q", "v"], ["all"]], "inject.proportion": [0.05, 1.0],
                                "scaling": ["constant"]}, "cell": {"inject": {"sources": ["date:a b/c"]}}})  # fmt: skip
    names = [entry.name for entry in made.entries]
    assert names[0] == f"r1_q-v_p0.05_{made.entries[0].cell.id}" and len(set(names)) == 8
    assert names[-1] == f"r16_all_p1_{made.entries[-1].cell.id}"
    assert made.varied == ["rank", "targets", "inject.proportion"]
    assert made.entries[0].varied == {"rank": 1, "targets": ["q", "v"], "inject.proportion": 0.05}
    [alone] = build_grid({}).entries
    assert alone.name == Cell().id


def test_long_and_strange_values_make_short_names():
    made = build_grid({"grid": {"inject.sources": [[f"text:{'x/ ' * 90}{i}:a"] for i in range(3)]}})
    assert len({entry.name for entry in made.entries}) == 3
    assert all(len(entry.name) <= 80 and "/" not in entry.name and " " not in entry.name for entry in made.entries)


REFUSED = [
    ({"cells": {}}, "unknown section 'cells': did you mean cell?"),
    ({"cell": {"rnak": 1}}, "[cell]: unknown field 'rnak': did you mean rank?"),
    ({"cell": {"rank": 0}}, "[cell]: rank is 0, but must be at least 1"),
    ({"cell": {"preset": "mine"}}, "preset is 'mine', but must be one of study"),
    ({"cell": 3}, "[cell] is 3, but must be a table"),
    ({"title": 3}, "title is 3, but must be a string"),
    ({"include": {"rank": 2}}, "[[include]] is {'rank': 2}, but must be tables"),
    ({"grid": {"inject.proportoin": [1]}}, "[grid]: unknown field 'inject.proportoin': did you mean inject.proporti"),
    ({"size": {"rank": 3}}, "[size] rank is 3, but must be a table: [size.rank]"),
    ({"size": {"big": {"rnak": 3}}}, "[size.big]: unknown field 'rnak': did you mean rank?"),
    ({"grid": {"rank": 3}}, "the axis rank is 3, but must be a list of values"),
    ({"grid": {"targets": ["q", "v"]}}, "but must be a list of lists, each of them one value"),
    ({"grid": {"rank": []}}, "the grid is empty: the axis rank has no values"),
    ({"grid": {"rank": [1, 2, 1]}}, "the axis rank has the value 1 twice: drop one"),
    ({"grid": {"lr": [0.1, 0.10]}}, "the axis lr has the value 0.1 twice: drop one"),
    ({"grid": {"seed": [1, 1.0]}}, "the axis seed has the value 1.0 twice: drop one"),
    ({"grid": {"inject": {"rows": [1]}, "inject.rows": [2]}}, "[grid]: inject.rows is given twice"),
    ({"grid": {"rank": [1]}, "zip": {"rank": [2]}}, "rank is in [grid] and in [zip]: drop one of them"),
    ({"zip": {"rank": [1, 2], "lr": [0.1]}}, "the lists of [zip] must have one length, but have 1, 2"),
    ({"zip": {"rank": [1, 1], "lr": [0.1, 0.1]}}, "[zip] has one combination of values twice: drop one"),
    ({"grid": {"rank": [1, -2]}}, "rank = -2: rank is -2, but must be at least 1"),
    ({"grid": {"epochs": [1], "steps": [5]}}, "epochs = 1, steps = 5: epochs and steps are both given"),
    ({"grid": {"alpha": [1.0, 2.0], "scaling": ["constant", "rank"]}}, "alpha = 1.0, scaling = 'rank': alpha is given"),
    ({"grid": {"rank": [1]}, "exclude": [{"rank": 2}]}, "[[exclude]] 1 matches no cell: fix or drop it"),
    ({"grid": {"rank": [1]}, "exclude": [{"rank": 1}]}, "the grid is empty: [[exclude]] drops every cell"),
    ({"grid": {"rank": [1]}, "include": [{"rank": 1}]}, "two cells are the same (rank = 1; rank = 1): drop one"),
    ({"grid": {"targets": [["attn"], ["o", "v", "k", "q"]]}}, "two cells differ only in name"),
    ({"grid": {"targets": [["q:4"], ["q"]]}, "cell": {"rank": 4}}, "two cells differ only in name"),
    ({"grid": {"scaling": ["constant", "rank"]}, "cell": {"rank": 8}}, "two cells differ only in name"),
    ({"grid": {"rank": [1, 2], "device": ["cpu", "cuda"]}}, "two cells differ only in device, which is no experiment"),
    ({"include": [{"form": "side"}, {"form": "merged", "compile": "on"}]}, "two cells differ only in compile form"),
    ({"grid": {"rank": [*range(1, 1001)], "seed": [*range(101)]}}, "the grid would have 101,000 cells, but may have"),
    ({"grid": {"rank": [1], "seed": [*range(1000)]}, "zip": {"epochs": [*range(1, 51)], "lr": [0.1] * 50},
      "size": {"small": {"clip": [1.0, 2.0]}}, "include": [{"window": [1, 2], "rank": [3, 4]}]},
     "the grid would have 100,008 cells"),
    ({"cell": {"model": ["x" * 200]}}, "[cell]: model is a list, but must be a path or a name"),
    ({"grid": {"rank": {"x" * 200: 3}}}, "the axis rank is {'" + 75 * "x" + "..., but must be a list"),
]  # fmt: skip


@pytest.mark.parametrize("values,message", REFUSED)
def test_refusals(values, message):
    with pytest.raises(InputError) as caught:
        build_grid(values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[grid]\nrank = [1, 2]\n"inject.proportion" = [0.5]\n', encoding="utf-8")
    made = read_grid(path)
    assert (
        [entry.cell.rank for entry in made.entries] == [1, 2] and made.text == path.read_text() and made.title == "mine"
    )
    path.write_text("[grid]\nrank = [1, 2,, 3]\n")
    with pytest.raises(InputError, match="mine.toml is not readable TOML .*line 2"):
        read_grid(path)
    path.write_text("[grid]\nrnak = [1]\n")
    with pytest.raises(InputError, match=r"mine.toml: \[grid\]: unknown field 'rnak'"):
        read_grid(path)
    with pytest.raises(InputError, match="does not exist"):
        read_grid(tmp_path / "none.toml")


def test_every_cell_goes_through_its_own_file():
    """A run folder's cell.toml gives the cell of the grid back, whatever was crossed."""
    made = build_grid({
        "cell": {"preset": "study"}, "grid": {"inject.density": [0.1, 0.5], "head": ["frozen", "trained"]},
        "include": [{"method": "head", "head": "trained"}, {"scaling": "rslora", "alpha": 3.0}],
    })  # fmt: skip
    for entry in made.entries:
        assert from_dict(Cell, tomllib.loads(entry.cell.to_toml())) == entry.cell
    assert len(made.entries) == 6


def test_only():
    made = build_grid({"grid": {"rank": [1, 2], "targets": [["q"], ["k", "v"]], "lr": [0.1, 0.25]}})
    only = parse_only(["rank=2", "targets=k-v", "targets=q", "lr=0.25"], made)
    assert only == {"rank": [2], "targets": [["k", "v"], ["q"]], "lr": [0.25]}
    found = [entry.cell for entry in made.entries if matches(entry.cell, only)]
    assert [(c.rank, c.targets, c.lr) for c in found] == [(2, ("q",), 0.25), (2, ("k", "v"), 0.25)]
    for text, message in (("rnak=2", "did you mean rank"), ("rank=3", "rank is one of 1, 2"), ("rank", "no cell has")):
        with pytest.raises(InputError, match=message):
            parse_only([text], made)


GRIDS = sorted((ROOT / "ablations").glob("**/*.toml"))


def test_there_are_published_grids():
    assert len(GRIDS) == 24


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", [None, "study"])
def test_published_grids_are_whole(path, size):
    made = read_grid(path, size)
    assert made.title and made.source and made.entries and made.claims
