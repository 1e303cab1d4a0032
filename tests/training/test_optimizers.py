"""The loop's pieces: against transformers with PEFT and torch's optimiser, and against restatements."""

import math

import numpy as np
import peft
import pytest
import torch
from conftest import one_step, population_of_one, random_batch
from zoo import HeadJudge

from minilora import parallel
from minilora.base import model
from minilora.cell import PRESETS, Cell
from minilora.data.batches import Batch
from minilora.errors import InputError
from minilora.lora import storage
from minilora.lora.layer import attach
from minilora.lora.targets import plan_slots
from minilora.tasks.classification import Classifier
from minilora.training import optimizers
from minilora.training.feed import Schedule
from minilora.training.state import load_state, save_state

METERS = {"step": 3, "seconds": 1.5, "tokens": 70, "inputs": {"base": "a"}, "choices": {"products": "mkl"}}


def setup(folder, cell, classes=3):
    base = model.load(folder)
    attach(base, plan_slots(base.spec, cell), cell.dropout or 0.0, cell.seed_for("init"))
    classifier = Classifier(base, cell.pooling, classes, cell.seed_for("head"))
    return classifier, *population_of_one(classifier, cell)


def made_up_batches(count, rows=5):
    """`count` batches of `rows` rows of different lengths, and labels of all rows."""
    draw = np.random.default_rng(3)
    batches = []
    for number in range(count):
        lengths = draw.integers(1, 30, rows).tolist()
        ids, lengths = random_batch(90, lengths, number)
        batches.append(Batch(ids, lengths, np.arange(number * rows, (number + 1) * rows)))
    return batches, torch.from_numpy(draw.integers(0, 3, count * rows))


def run_steps(folder, cell, batches, labels, steps=None):
    classifier, population, optimizer = setup(folder, cell)
    losses = []
    groups = [batches[i : i + cell.accumulate] for i in range(0, len(batches), cell.accumulate)]
    for step, group in enumerate(groups):
        rate = optimizers.learning_rate(cell, step, steps or len(groups))
        losses.append(one_step(population, optimizer, group, labels, cell, rate, step))
    return classifier, losses


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_steps_match_peft(tiny_folder, tmp_path, optimizer):
    cell = Cell(model=str(tiny_folder), rank=3, alpha=6.0, targets=("q", "v", "down"), lr=0.02, weight_decay=0.1,
                optimizer=optimizer, schedule="cosine", warmup=0.3, clip=0.5)  # fmt: skip
    batches, labels = made_up_batches(7)
    classifier, losses = run_steps(tiny_folder, cell, batches, labels)

    start, _, _ = setup(tiny_folder, cell)
    storage.save(tmp_path / "start", start, cell, ["a", "b", "c"])
    judge = HeadJudge.from_pretrained(tiny_folder)
    theirs = peft.PeftModel.from_pretrained(judge, tmp_path / "start", is_trainable=True)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    assert len(parameters) == 2 * 3 * 3 + 2
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adafactor
    reference = kind(parameters, lr=0.02, weight_decay=0.1)
    theirs.eval()  # the tiny base has dropout, which ours leaves out
    compared = 0
    for step, (batch, (loss, norm)) in enumerate(zip(batches, losses, strict=True)):
        for group in reference.param_groups:
            group["lr"] = optimizers.learning_rate(cell, step, 7)
        mask = (torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]).long()
        wanted = torch.nn.functional.cross_entropy(theirs(batch.ids, mask), labels[batch.index])
        wanted.backward()
        wanted_norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        reference.step()
        reference.zero_grad()
        assert loss == pytest.approx(wanted.item(), abs=2e-4) and norm == pytest.approx(wanted_norm.item(), rel=1e-2)
        compared += 1
    assert compared == 7
    theirs.save_pretrained(tmp_path / "end")
    fresh = Classifier(model.load(tiny_folder), "mean", 3)
    storage.restore(tmp_path / "end", fresh, "lora")
    found, wanted = classifier.state_dict(), fresh.state_dict()
    moved = 0
    for name, value in start.state_dict().items():
        way = (wanted[name] - value).abs().max()
        assert (found[name] - wanted[name]).abs().max() <= 0.02 * way
        moved += bool(way > 0)
    assert moved == 2 * 3 * 3 + 2


def test_accumulated_batches_are_one_large_batch(tiny_folder):
    small, labels = made_up_batches(6)
    longest = max(batch.ids.shape[1] for batch in small)

    def joined(parts):
        ids = torch.cat([torch.nn.functional.pad(b.ids, (0, longest - b.ids.shape[1])) for b in parts])
        return Batch(ids, torch.cat([b.lengths for b in parts]), np.concatenate([b.index for b in parts]))

    # The last batch of an epoch is smaller: its rows must count as much as any other's.
    small[2] = Batch(small[2].ids[:2], small[2].lengths[:2], small[2].index[:2])
    large = [joined(small[:3]), joined(small[3:])]
    one, losses = run_steps(tiny_folder, Cell(accumulate=3, lr=0.02), small, labels)
    two, wanted = run_steps(tiny_folder, Cell(lr=0.02), large, labels)
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    for name, value in two.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, rtol=0, atol=1e-4)


def test_learning_rate():
    def rates(schedule, warmup, steps=10):
        cell = Cell(schedule=schedule, warmup=warmup, lr=2.0)
        return [optimizers.learning_rate(cell, step, steps) for step in range(steps)]

    assert rates("constant", 0.0) == [2.0] * 10
    np.testing.assert_allclose(rates("constant", 0.25), [2 / 3, 4 / 3] + [2.0] * 8)
    np.testing.assert_allclose(rates("linear", 0.2), [1, 2, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(rates("cosine", 0.2)[2:], [1 + math.cos(math.pi * i / 8) for i in range(8)])


@pytest.mark.parametrize("rows, batch_size, accumulate", [(103, 8, 1), (103, 8, 3), (16, 8, 2), (5, 8, 1)])
def test_schedule(rows, batch_size, accumulate):
    lengths = np.random.default_rng(0).integers(3, 60, rows)
    cell = Cell(batch_size=batch_size, accumulate=accumulate, epochs=3, window=4)
    schedule = Schedule(lengths, cell)
    per_epoch = math.ceil(math.ceil(rows / batch_size) / accumulate)
    assert schedule.steps == 3 * per_epoch
    seen = 0
    for number in range(3):
        steps = range(number * per_epoch, (number + 1) * per_epoch)
        groups = [schedule.rows_at(step) for step in steps]
        assert all(len(group) <= accumulate for group in groups)
        flat = np.concatenate([part for group in groups for part in group])
        assert sorted(flat.tolist()) == list(range(rows))
        for step, group in zip(steps, groups, strict=True):
            assert Schedule(lengths, cell).rows_before(step) == seen
            seen += sum(map(len, group))
        again = Schedule(lengths, cell).rows_at(steps[-1])  # any step alone, as a resumed run asks
        assert all(np.array_equal(a, b) for a, b in zip(again, groups[-1], strict=True))
    assert Schedule(lengths, cell.replace(steps=7)).steps == 7


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_state_on_disk_goes_on_bit_for_bit(tiny_folder, tmp_path, optimizer):
    cell = Cell(rank=2, dropout=0.2, lr=0.02, optimizer=optimizer)
    batches, labels = made_up_batches(6)
    whole, _ = run_steps(tiny_folder, cell, batches, labels)
    _, population, state = setup(tiny_folder, cell)

    def go(population, optimizer, steps):
        for step in steps:
            rate = optimizers.learning_rate(cell, step, 6)
            one_step(population, optimizer, [batches[step]], labels, cell, rate, step)

    go(population, state, range(3))
    save_state(tmp_path / "state", population.flat, state, 0, METERS)
    torch.manual_seed(99)  # what else happened to the global generator does not matter
    second, population, state = setup(tiny_folder, cell)
    assert load_state(tmp_path / "state", population.flat, state, 0) == METERS
    go(population, state, range(3, 6))
    assert all(torch.equal(second.state_dict()[n], value) for n, value in whole.state_dict().items())
    for rank in (1, 3):
        _, other, other_state = setup(tiny_folder, Cell(rank=rank, optimizer=optimizer))
        with pytest.raises(InputError, match="does not fit"):
            load_state(tmp_path / "state", other.flat, other_state, 0)
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:200])
    with pytest.raises(InputError, match="does not fit"):
        load_state(tmp_path / "state", population.flat, state, 0)


def test_a_loss_that_is_not_finite_changes_nothing(tiny_folder):
    cell = Cell(lr=0.02)
    batches, labels = made_up_batches(1)
    classifier, population, optimizer = setup(tiny_folder, cell)
    with torch.no_grad():
        classifier.classifier.weight[0, 0] = math.inf
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    loss, norm, going = one_step(population, optimizer, batches, labels, cell, 0.1)
    assert not math.isfinite(loss) and not math.isfinite(norm) and not going
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_what_each_method_trains(tiny_folder):
    bases = 5 + 3 * 16
    counts = {
        Cell(): 2 * 9 + 2,
        Cell(head="frozen"): 2 * 9,
        Cell(method="full"): bases + 2,
        Cell(method="full", head="frozen"): bases,
        Cell(method="head"): 2,
    }
    for cell, count in counts.items():
        classifier, population, _ = setup(tiny_folder, cell)
        parameters = population.flat.groups[0].places
        assert len(parameters) == count
        assert {n for n, p in classifier.named_parameters() if p.requires_grad} == set(parameters)
    assert len(counts) == 5


def test_devices():
    assert parallel.pick_device("cpu") == torch.device("cpu")
    assert parallel.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="cuda:99"):
        parallel.pick_device("cuda:99")


@pytest.mark.parametrize("lr, steps", [(1e-4, 142), (2e-3, 60), (0.5, 9)])
def test_how_far_adafactor_can_bring_what_starts_at_0(lr, steps):
    """Against torch's, with a gradient that always points the same way: nothing goes further."""
    cell = Cell(optimizer="adafactor", lr=lr, steps=steps, schedule="cosine")
    B = torch.nn.Parameter(torch.zeros(24, 2))
    judge = torch.optim.Adafactor([B], lr=lr, weight_decay=0.0)
    for step in range(steps):
        judge.param_groups[0]["lr"] = optimizers.learning_rate(cell, step, steps)
        B.grad = torch.ones(24, 2)
        judge.step()
    assert B.detach().square().mean().sqrt().item() == pytest.approx(optimizers.reach(cell, steps), rel=1e-3)


def test_what_is_known_to_learn_nothing_is_said():
    study = Cell(**PRESETS["study"])
    [said] = optimizers.warnings(study, 142)
    assert "after 142 steps its numbers are at most 7e-06, so nothing will be learned" in said
    for cell, steps in (
        (Cell(), 1),
        (study, 2000),
        (study.replace(lr=2e-3), 142),
        (study.replace(optimizer="adamw"), 142),
        (study.replace(init="pissa", dropout=0.0), 142),  # B does not start at 0
        (study.replace(method="full"), 142),
    ):
        assert list(optimizers.warnings(cell, steps)) == []
