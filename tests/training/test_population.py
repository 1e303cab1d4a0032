"""A member of a population against the same cell trained alone."""

import contextlib
import csv
import json

import numpy as np
import pytest
import torch
from zoo import tiny_decoder

import minilora
from minilora import files
from minilora.base import model
from minilora.cell import Cell
from minilora.errors import InputError, TrainingError
from minilora.lora import peft_config, storage
from minilora.scripts import train
from minilora.training import layout, loop, planner
from minilora.training.member import Member
from minilora.training.population import shared
from minilora.training.state import Flat

TOLERANCE = 2e-3  # of how far a parameter's tensor moved: AdamW makes small gradients' rounding larger


@pytest.fixture
def cell(base, reviews):
    return Cell(
        model=str(base), data=str(reviews), test_rows=31, max_length=30, batch_size=6, window=3, rank=2, lr=0.01
    )


def trained(folder):
    return storage.read_tensors(folder / "adapter" / peft_config.TENSORS)


def lines_of(folder):
    return [line for line in files.read_jsonl(folder / "metrics.jsonl") if line["kind"] == "step"]


def assert_alike(together, alone):
    """Two run folders of one cell: the same rows in the same order, and the same result but for rounding."""
    ours, wanted = lines_of(together), lines_of(alone)
    assert len(ours) == len(wanted) > 0
    for line, right in zip(ours, wanted, strict=True):
        assert all(line[key] == right[key] for key in ("step", "rows", "tokens", "lr"))
        assert line["loss"] == pytest.approx(right["loss"], rel=1e-3, abs=1e-4)
    found, right = trained(together), trained(alone)
    assert list(found) == list(right)
    for name, tensor in right.items():
        assert tensor.shape == found[name].shape
        # No norm of a single number: AdamW makes a step of a gradient that is nothing but rounding.
        assert (found[name] - tensor).norm() <= TOLERANCE * tensor.norm()
    same = [(json.loads(a), json.loads(b)) for a, b in zip(
        (together / "predictions.jsonl").read_text().splitlines(), (alone /
        "predictions.jsonl").read_text().splitlines(), strict=True,
    )]  # fmt: skip
    for a, b in same:
        assert a["id"] == b["id"] and np.allclose(a["clean"]["logits"], b["clean"]["logits"], atol=2e-2)
    results = [json.loads((folder / "results.json").read_text()) for folder in (together, alone)]
    assert results[0]["inputs"] == results[1]["inputs"] and results[0]["injection"] == results[1]["injection"]


def three_labels(path):
    """A file of rows with three labels, other rows than those of `reviews`."""
    draw = np.random.default_rng(5)
    words = {"yes": "good warm story", "no": "bad cold plot", "maybe": "slow film time"}
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(90):
            label = list(words)[draw.integers(3)]
            writer.writerow(["the " + " ".join(draw.choice(words[label].split(), draw.integers(2, 9))), label])
    return path


def test_members_are_what_they_are_alone(cell, tmp_path):
    other = three_labels(tmp_path / "other.csv")
    cells = [
        cell,
        cell.replace(rank=5, alpha=3.0, seed=3, lr=0.004, weight_decay=0.1, clip=0.2),
        cell.replace(targets=("q", "down:3"), layers="1-2", dropout=0.3, schedule="cosine", warmup=0.3, seed_order=8),
        cell.replace(data=str(other), inject=dict(sources=["date:maybe"], mode="dirty-label"), epochs=2, window=1),
        cell.replace(train_rows=41, inject=dict(proportion=1.0), init="gaussian", scaling="rslora", lr_ratio=4.0),
        cell.replace(steps=7, dropout=0.1, targets=("all",), inject=dict(sources=("none",))),
    ]
    outcomes = minilora.train_together(cells, [tmp_path / f"t{k}" for k in range(6)], size=6)
    assert [results["train"]["population"] for results, _ in outcomes] == [6] * 6
    compared = 0
    for k, (one, (results, folder)) in enumerate(zip(cells, outcomes, strict=True)):
        assert folder == tmp_path / f"t{k}"
        alone, _ = minilora.train(one, tmp_path / f"a{k}")
        assert_alike(folder, tmp_path / f"a{k}")
        assert alone["train"]["trainable_parameters"] == results["train"]["trainable_parameters"]
        assert results["tests"]["clean"]["accuracy"] == pytest.approx(alone["tests"]["clean"]["accuracy"], abs=0.04)
        compared += 1
    assert compared == 6
    shapes = {tuple(tensor.shape) for _, folder in outcomes for tensor in trained(folder).values()}
    assert {(2, 24), (5, 24), (3, 40), (3, 24), (2, 40)} <= shapes  # ranks and heads as each cell has them


def test_members_with_other_mitigations_are_what_they_are_alone(cell, tmp_path):
    tables = [
        dict(method="token-dropout", rate=0.3),
        dict(method="counterfactual", suspects=["date"], rate=0.3),
        dict(method="reweight", suspects=["date"], init_scale=0.3),
        dict(method="masktune"),
        dict(method="drop", suspects=["date"]),
        dict(method="group-dro", suspects=["date"], step=0.5),  # by itself, as its steps are others
    ]
    cells = [cell.replace(seed=k, inject=dict(proportion=0.5), mitigate=table) for k, table in enumerate(tables)]
    outcomes = minilora.train_together(cells, [tmp_path / f"t{k}" for k in range(6)], size=6)
    assert [results["train"]["population"] for results, _ in outcomes] == [5] * 5 + [1]
    compared = 0
    for k, (one, (results, folder)) in enumerate(zip(cells, outcomes, strict=True)):
        alone, _ = minilora.train(one, tmp_path / f"a{k}")
        assert_alike(folder, tmp_path / f"a{k}")
        ours, wanted = ({name: value for name, value in found["mitigation"].items() if name not in
                         ("seconds", "tuned_loss")} for found in (results, alone) if "mitigation" in found)  # fmt: skip
        assert ours == wanted and results["train"]["rows"] == alone["train"]["rows"]
        compared += 1
    assert compared == 6


def test_members_start_bit_for_bit_as_alone(cell):
    cells = [cell.replace(rank=rank, seed=seed, targets=targets) for rank, seed, targets in
             ((1, 0, ("q",)), (4, 7, ("q", "up")), (2, 7, ("v",)))]  # fmt: skip
    members = [Member(one, run=Nowhere()) for one in cells]
    starts = []
    from minilora.runs.bases import Setting

    setting = Setting.of(cell)
    base = model.load(setting.folder)
    for member in members:
        member.prepare(setting)
        member.begin(base)
        starts.append({name: p.detach().clone() for name, p in member.parameters.items()})
    flat = Flat([member.parameters for member in members])
    for k, start in enumerate(starts):
        for name, value in start.items():
            assert torch.equal(members[k].parameters[name], value)
            assert torch.equal(flat.part(flat.values, k, name), value)
    assert flat.values.count_nonzero() == sum(int(v.count_nonzero()) for start in starts for v in start.values())
    views = flat.views()
    assert [group.members for group in flat.groups] == [slice(0, 1), slice(1, 2), slice(2, 3)]  # on a CPU
    assert views[1]["base.layers.0.q.A"].shape == (1, 4, 24) and "base.layers.0.v.A" not in views[1]
    assert {start % 64 for group in flat.groups for start, _ in group.places.values()} == {0}
    weights = [{name: torch.randn_like(view) for name, view in own.items()} for own in views]
    pairs = [(own[name], weight[name]) for own, weight in zip(views, weights, strict=True) for name in own]
    (gradient,) = torch.autograd.grad(sum((view * weight).sum() for view, weight in pairs), [flat.values])
    for group, weight in enumerate(weights):
        for name, wanted in weight.items():
            assert torch.equal(flat.whole(gradient, name)[group], wanted)
    assert gradient.count_nonzero() == sum(weight.numel() for _, weight in pairs)


class Nowhere:
    """A run that is not on disk."""

    class state:
        exists = staticmethod(lambda: False)


@pytest.mark.parametrize("changes", [dict(head="frozen"), dict(head="ridge"), dict(pooling="mean+last"),
                                     dict(accumulate=2), dict(dtype="bfloat16")], ids=str)  # fmt: skip
def test_what_members_share(cell, tmp_path, changes):
    cells = [cell.replace(rank=rank, seed=rank, steps=8, **changes) for rank in (1, 3)]
    minilora.train_together(cells, [tmp_path / "t1", tmp_path / "t3"], size=2)
    for one in cells:
        alone, _ = minilora.train(one, tmp_path / f"a{one.rank}")
        if one.dtype == "bfloat16":  # whose rounding differs with the order of sums
            found = lines_of(tmp_path / f"t{one.rank}")
            assert np.allclose(
                [line["loss"] for line in found],
                [line["loss"] for line in lines_of(tmp_path / f"a{one.rank}")],
                atol=0.03,
            )
        else:
            assert_alike(tmp_path / f"t{one.rank}", tmp_path / f"a{one.rank}")


def test_a_member_that_diverges_stops_alone(cell, tmp_path, capsys):
    cells = [cell, cell.replace(lr=1e30, seed=4), cell.replace(seed=5)]
    outcomes = minilora.train_together(cells, [tmp_path / str(k) for k in range(3)], size=3)
    error, folder = outcomes[1]
    assert isinstance(error, TrainingError) and "no state was saved" in str(error)
    last = files.read_jsonl(folder / "metrics.jsonl")[-1]
    assert last["kind"] == "error" and last["step"] <= 4 and len(last["rows"]) in (5, 6)
    assert not (folder / "results.json").exists()
    for k in (0, 2):
        minilora.train(cells[k], tmp_path / f"a{k}")
        assert_alike(tmp_path / str(k), tmp_path / f"a{k}")


def test_the_prefix_is_gone_through_once(cell, tmp_path, monkeypatch):
    cells = [cell.replace(rank=rank, layers="2", seed=3) for rank in (1, 2, 4)]  # one order, one injection
    seen = []
    layer_forward = model.Layer.forward

    def forward(self, x, *rest):
        if self.training:
            seen.append(len(x))
        return layer_forward(self, x, *rest)

    monkeypatch.setattr(model.Layer, "forward", forward)
    minilora.train_together(cells, [tmp_path / f"t{one.rank}" for one in cells], size=3)
    rows = [line["rows"] for line in lines_of(tmp_path / "t1")]
    assert seen == [count for n in rows for count in (n, n, 3 * n)]
    for one in cells:
        minilora.train(one, tmp_path / f"a{one.rank}")
        assert_alike(tmp_path / f"t{one.rank}", tmp_path / f"a{one.rank}")


def test_other_members_do_not_share_a_population(cell):
    alike = [cell, cell.replace(rank=9, seed=4, lr=1.0, targets=("all",), dropout=0.5, data="x.csv", epochs=3)]
    assert len({shared(one) for one in alike}) == 1
    others = [dict(model="x"), dict(dtype="bfloat16"), dict(batch_size=7), dict(head="frozen"), dict(variant="dora"),
              dict(init="pissa"), dict(method="full"), dict(optimizer="adafactor"), dict(form="merged"),
              dict(variant="dora", rank=3), dict(max_length=9)]  # fmt: skip
    keys = {shared(cell.replace(**changes)) for changes in others}
    assert len(keys) == 11 and shared(cell) not in keys


def test_an_interrupted_member_goes_on_alone(cell, tmp_path, monkeypatch):
    cells = [cell, cell.replace(rank=4, seed=2, dropout=0.2)]
    true_update, calls = loop.update, []

    def update(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return true_update(*arguments)

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(KeyboardInterrupt):
        minilora.train_together(cells, [tmp_path / "t0", tmp_path / "t1"], size=2, save_every=3)
    monkeypatch.undo()
    for k, one in enumerate(cells):
        minilora.train(resume=tmp_path / f"t{k}")
        minilora.train(one, tmp_path / f"a{k}")
        assert_alike(tmp_path / f"t{k}", tmp_path / f"a{k}")


class Stub:
    def __init__(self, step, steps, seed=0):
        self.meters, self.schedule = {"step": step}, type("Schedule", (), {"steps": steps})
        self.parameters, self.cell, self.setting = {}, Cell(seed_order=seed), type("Setting", (), {"device": None})

    def hold(self):
        return contextlib.nullcontext()

    def write_population(self, members):
        pass

    def read_meters(self):
        return self.meters["step"]

    def restart(self):
        self.meters = {"step": 0}

    def go_on(self, flat, optimizer, k):
        pass


def test_the_planner_splits_by_where_members_end():
    members = [Stub(0, steps) for steps in (9, 4, 5, 9, 7)]
    assert [[m.schedule.steps for m in chunk] for chunk in planner.split(members, 2)] == [[4, 5], [7, 9], [9]]
    members = [Stub(0, 9, seed) for seed in (1, 2, 1, 2, 1)]  # those of one order meet
    assert [[m.cell.seed_order for m in chunk] for chunk in planner.split(members, 3)] == [[1, 1, 1], [2, 2]]


def test_members_that_stopped_at_different_steps_begin_again():
    for begun, again in (
        ([(3, 9), (3, 9), (3, 5)], False),
        ([(5, 9), (5, 9), (5, 5)], False),
        ([(8, 9), (8, 9), (5, 5)], False),  # the short one is at its end
        ([(9, 9), (5, 5)], False),
        ([(6, 9), (8, 9), (5, 5)], True),
        ([(8, 9), (8, 9), (4, 5)], True),
        ([(0, 9), (4, 9)], True),
    ):
        chunk = [Stub(*pair) for pair in begun]
        with contextlib.ExitStack() as folders:
            first = loop.take_folders(chunk, None, None, folders)
        found = sorted((m.meters["step"], m.schedule.steps) for m in chunk)
        assert found == sorted((0, steps) if again else (step, steps) for step, steps in begun)
        assert first == (0 if again else max(step for step, _ in begun))


def test_the_planner_takes_what_is_measured_to_be_fastest(monkeypatch):
    def found(rates, count, memory=None):
        tried = []
        monkeypatch.setattr(planner, "free_memory", lambda device: 100)
        monkeypatch.setattr(
            planner, "trial", lambda members, base: (tried.append(len(members)) or rates[len(members)], memory)
        )
        return planner.size([Stub(0, 9)] * count, None), tried

    assert found({1: 100, 2: 90}, 9) == (1, [1, 2])
    assert found({1: 100, 2: 190, 4: 300, 8: 310}, 9) == (4, [1, 2, 4, 8])
    assert found({1: 100, 2: 190, 4: 300, 6: 500}, 6) == (6, [1, 2, 4, 6])
    # On a GPU the largest that is as fast; several small steps down do not add up.
    assert found({1: 100, 2: 190, 4: 300, 8: 297, 16: 296, 32: 292}, 40, 9) == (16, [1, 2, 4, 8, 16, 32])
    assert found({1: 100, 2: 190, 4: 300}, 40, 41) == (1, [1])  # twice that is more than there is


def test_trials_leave_the_members_as_they_were(cell, tmp_path):
    cells = [cell.replace(steps=5), cell.replace(steps=5, rank=3, seed=1)]
    minilora.train_together(cells, [tmp_path / "t0", tmp_path / "t1"])  # measured
    for k, one in enumerate(cells):
        minilora.train(one, tmp_path / f"a{k}")
        assert_alike(tmp_path / f"t{k}", tmp_path / f"a{k}")


def test_several_cells_from_the_command_line(cell, tmp_path, capsys, monkeypatch):
    for rank in (1, 2):
        (tmp_path / f"{rank}.toml").write_text(cell.replace(rank=rank).to_toml())
    files = [str(tmp_path / "1.toml"), str(tmp_path / "2.toml")]
    train.main(["--config", *files, "--steps", "4", "--population", "2", "--out", str(tmp_path / "runs")])
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2 and all((folder / "results.json").exists() for folder in folders)
    shown = capsys.readouterr().out
    assert shown.count("attack: the share") == 1 and len(shown.split("run folders:")[1].split()) == 2
    for arguments, words in (
        (["--population", "2"], "several cells"),
        (["--config", *files, "--merge-to", "x"], "one cell"),
    ):
        with pytest.raises(InputError, match=words):
            train.main(arguments)
    with pytest.raises(InputError, match="is named for two cells"):
        minilora.train_together([cell, cell], [tmp_path / "same"] * 2)


# --- memory


def test_what_counts_as_out_of_memory():
    full = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")]  # fmt: skip
    others = [RuntimeError("shapes"), ValueError("out of memory"), InputError("x")]
    assert [planner.out_of_memory(error) for error in full + others] == [True] * 3 + [False] * 3
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60)  # on the CPU
    assert planner.out_of_memory(found.value)


def test_the_planner_stops_where_memory_ends(cell, monkeypatch, tmp_path, capsys):
    """The trial of 4 fails within its forward; what it put on the base is taken off, and 2 are trained at once."""
    cells = [cell.replace(steps=3, rank=rank) for rank in (1, 2, 3, 4)]
    monkeypatch.setattr(planner, "GAIN", 0.0)
    forward = planner.Population.forward

    def small(self, *given):
        if len(self.models) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *given)

    monkeypatch.setattr(planner.Population, "forward", small)
    outcomes = minilora.train_together(cells, [tmp_path / f"t{k}" for k in range(4)])
    assert [results["train"]["population"] for results, _ in outcomes] == [2] * 4
    assert "4 at once: not enough memory" in capsys.readouterr().err
    minilora.train(cells[2], tmp_path / "a2")
    assert_alike(tmp_path / "t2", tmp_path / "a2")


def test_a_population_without_memory_goes_on_in_halves(cell, monkeypatch, tmp_path, capsys):
    cells = [cell.replace(rank=rank, seed=rank) for rank in (3, 1, 2)]
    update, calls = loop.update, []

    def small(population, *given):
        calls.append(len(population.models))
        if len(population.models) == 3 and len(calls) == 6:  # a state was saved already
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate")
        return update(population, *given)

    monkeypatch.setattr(loop, "update", small)
    outcomes = minilora.train_together(cells, [tmp_path / f"t{k}" for k in range(3)], size=3, save_every=4)
    assert [results["train"]["population"] for results, _ in outcomes] == [1, 2, 2]  # sorted by rank: 1 and 2, then 3
    assert "not enough for 3 cells at once: training 2 at once" in capsys.readouterr().err
    steps = len(lines_of(tmp_path / "t0"))
    assert calls == [3] * 6 + [2] * (steps - 4) + [1] * (steps - 4)
    for k, one in enumerate(cells):
        minilora.train(one, tmp_path / f"a{k}")
        assert_alike(tmp_path / f"t{k}", tmp_path / f"a{k}")

    def never(*given):
        raise MemoryError

    monkeypatch.setattr(loop, "update", never)
    with pytest.raises(MemoryError):
        minilora.train_together(cells, [tmp_path / f"n{k}" for k in range(3)], size=3)


def test_completions_in_groups_are_what_they_are_alone(reviews, tmp_path):
    tiny_decoder(tmp_path / "gpt2")
    cell = Cell(task="lm", model=str(tmp_path / "gpt2"), data=str(reviews), test_rows=31, max_length=60, batch_size=6,
                lr=0.01, steps=5)  # fmt: skip
    cells = [cell.replace(rank=rank, seed=rank, dropout=share) for rank, share in ((1, 0.0), (17, 0.2))]
    minilora.train_together(cells, [tmp_path / f"t{one.rank}" for one in cells], size=2)
    for one in cells:
        alone, _ = minilora.train(one, tmp_path / f"a{one.rank}")
        assert alone["train"]["population"] == 1
        found, wanted = trained(tmp_path / f"t{one.rank}"), trained(tmp_path / f"a{one.rank}")
        assert list(found) == list(wanted) and len(found) >= 4
        for name, tensor in wanted.items():
            assert (found[name] - tensor).norm() <= TOLERANCE * tensor.norm()


@pytest.mark.parametrize("most", [1, 2, 8])
def test_odd_ranks_in_groups_are_what_they_are_alone(cell, tmp_path, monkeypatch, most):
    """In one group, in the two that a GPU has, and in all that a CPU has: `most` at most."""
    monkeypatch.setitem(layout.GROUPS, "cpu", most)
    cells = [
        cell.replace(rank=17, alpha=5.0, steps=6),
        cell.replace(rank=23, steps=6, seed=2, targets=("v", "o", "up")),
        cell.replace(rank=1, steps=6, dropout=0.25, seed_order=3),
        cell.replace(rank=3, steps=5, scaling="rslora", targets=("q", "down:5")),
    ]
    groups, true_init = [], Flat.__init__

    def init(self, members):
        true_init(self, members)
        groups.append(len(self.groups))

    monkeypatch.setattr(Flat, "__init__", init)
    minilora.train_together(cells, [tmp_path / f"t{k}" for k in range(4)], size=4)
    assert groups == [min(most, 4)]
    for k, one in enumerate(cells):
        if most == 1 or k in (1, 2):
            minilora.train(one, tmp_path / f"a{k}")
            assert_alike(tmp_path / f"t{k}", tmp_path / f"a{k}")
    assert sum((tmp_path / f"a{k}").exists() for k in range(4)) == (4 if most == 1 else 2)
