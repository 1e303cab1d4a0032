"""Epochs as permutations in windows, cheapest padded lengths by brute force, collating row by row, batches ahead."""

import gc
import threading
import time
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import parallel
from minilora.base.tokenizer import Encoded
from minilora.cell import Cell
from minilora.data import batches
from minilora.kernels import linear
from minilora.training import feed

LENGTHS = np.random.default_rng(1).integers(3, 40, 211)


def windows(found, order, batch_size, window):
    """The batches sorted by the window of `order` that their rows come from; fails if one's rows are of two."""
    place = {row: position // (batch_size * window) for position, row in enumerate(order)}
    by_window = {}
    for batch in found:
        (number,) = {place[row] for row in batch.tolist()}
        by_window.setdefault(number, []).append(batch)
    return by_window


@pytest.mark.parametrize("batch_size, window", [(7, 4), (8, 50), (1, 3), (300, 2), (211, 1), (10, 1)])
def test_an_epoch(batch_size, window):
    found = feed.epoch(LENGTHS, batch_size, window, 3, 2)
    assert len(found) == -(-211 // batch_size)
    assert sorted(np.concatenate(found).tolist()) == list(range(211))
    assert sorted(map(len, found))[1:] == [batch_size] * (len(found) - 1)
    again = feed.epoch(LENGTHS, batch_size, window, 3, 2)
    assert [b.tolist() for b in again] == [b.tolist() for b in found]

    order = np.random.default_rng([3, 2]).permutation(211)  # the epoch's order of rows
    by_window = windows(found, order, batch_size, window)
    assert len(by_window) == -(-211 // (batch_size * window))
    for parts in by_window.values():
        assert len(parts) <= window
        if window > 1:  # within a window no two batches overlap in length, and each is sorted
            parts = sorted(parts, key=lambda batch: (LENGTHS[batch].min(), LENGTHS[batch].max()))
            lengths = np.concatenate([LENGTHS[batch] for batch in parts])
            assert np.all(np.diff(lengths) >= 0)


def test_window_1_is_the_random_order():
    """Batches are the random order cut up, whatever the lengths are."""
    order = np.random.default_rng([5, 1]).permutation(211)
    wanted = {tuple(order[i : i + 10]) for i in range(0, 211, 10)}
    assert {tuple(batch) for batch in feed.epoch(LENGTHS, 10, 1, 5, 1)} == wanted
    assert {tuple(batch) for batch in feed.epoch(LENGTHS[::-1], 10, 1, 5, 1)} == wanted
    assert {tuple(batch) for batch in feed.epoch(LENGTHS, 10, 2, 5, 1)} != wanted


def test_batches_and_ties_are_shuffled():
    firsts = [LENGTHS[batch].mean() for batch in feed.epoch(LENGTHS, 7, 50, 0, 0)]
    ascending = np.mean(np.diff(firsts) > 0)
    assert 0.25 < ascending < 0.75  # sorted by length they would be 1
    same = np.full(60, 9)
    one, other = (feed.epoch(same, 6, 10, seed, 0) for seed in (0, 1))
    assert {frozenset(batch.tolist()) for batch in one}.isdisjoint({frozenset(batch.tolist()) for batch in other})


def test_seeds_and_epochs_differ():
    found = {
        (seed, number): tuple(np.concatenate(feed.epoch(LENGTHS, 7, 4, seed, number)).tolist())
        for seed in (0, 1, 2**70) for number in range(4)
    }  # fmt: skip
    assert len(set(found.values())) == len(found) == 12


def test_by_length():
    ids = np.arange(int(LENGTHS.sum()), dtype=np.int32)
    encoded = SimpleNamespace(ids=ids, offsets=np.concatenate([[0], np.cumsum(LENGTHS)]))
    found = list(batches.by_length(encoded, 8, 7))
    order = np.concatenate([batch.index for batch in found])
    assert sorted(order.tolist()) == list(range(211)) and len(found[0].index) == 8 and len(found[1].index) >= 8
    most = 8 * int(LENGTHS.max())  # tokens: what 8 of the longest rows have
    sizes = batches.padded_sizes(LENGTHS)
    for batch, following in zip(found, found[1:]):
        longest = int(batch.ids.shape[1])
        assert longest == min(size for size in sizes if size >= batch.lengths[0])
        assert len(batch.index) * longest <= most < (len(batch.index) + 1) * longest
        assert following.lengths[0] <= batch.lengths[-1]
    assert LENGTHS[order].tolist() == sorted(LENGTHS.tolist(), reverse=True)
    for batch in found:
        assert batch.lengths.tolist() == LENGTHS[batch.index].tolist()
        for row, ids_of_row in zip(batch.index, batch.ids.tolist(), strict=True):
            own = ids[encoded.offsets[row] : encoded.offsets[row + 1]].tolist()
            assert ids_of_row == own + [7] * (len(ids_of_row) - len(own))


# --- padded lengths


def padding(lengths, sizes):
    """Tokens after each row is padded up to the next size."""
    return sum(min(size for size in sizes if size >= length) for length in lengths)


def cheapest(lengths, most):
    values = sorted(set(lengths))
    return min(
        padding(lengths, [*chosen, values[-1]])
        for number in range(most)
        for chosen in combinations(values[:-1], number)
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 5))
def test_padded_sizes_are_the_cheapest(lengths, most):
    sizes = batches.padded_sizes(np.array(lengths), most)
    assert len(sizes) <= most and np.all(np.diff(sizes) > 0) and sizes[-1] == max(lengths)
    assert padding(lengths, sizes.tolist()) == cheapest(lengths, most)


def test_padded_sizes_of_many_lengths():
    draw = np.random.default_rng(2)
    cases = 0
    for longest, most in ((37, 32), (128, 32), (512, 3), (513, 7), (515, 512), (1000, 600), (5001, 32)):
        lengths = np.concatenate([draw.integers(3, longest, 5000), [longest]])
        sizes = batches.padded_sizes(lengths, most)
        assert len(sizes) <= most and np.all(np.diff(sizes) > 0)
        assert sizes[-1] == longest  # never longer: the base may have no position for it
        even = np.unique(np.ceil(np.linspace(0, longest, most + 1))[1:]).astype(int)
        assert padding(lengths, sizes.tolist()) <= padding(lengths, even.tolist()) + 5001 * (longest // 512)
        cases += 1
    assert cases == 7
    assert batches.padded_sizes(np.array([5, 9, 5])).tolist() == [5, 9]  # few lengths: no padding
    for number, wanted in ((38, [11, 50]), (40, [10, 50])):  # to pad `number` rows by 1, or one row by 39
        skewed = np.array([10] * number + [11] + [50] * 100)
        assert batches.padded_sizes(skewed, 2).tolist() == wanted


# --- collating


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_collate_is_row_by_row(lengths, data):
    rows = [[100 * row + column + 1 for column in range(length)] for row, length in enumerate(lengths)]
    encoded = SimpleNamespace(
        ids=np.array(sum(rows, []), dtype=np.int32), offsets=np.concatenate([[0], np.cumsum(lengths)])
    )
    index = np.array(data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(1, len(rows)))])
    sizes = np.array(sorted({*data.draw(st.lists(st.integers(1, 12), max_size=3)), max(lengths)}))
    batch = batches.collate([(encoded, index, None)], sizes, pad_id=7)

    width = min(size for size in sizes.tolist() if size >= max(lengths[i] for i in index))
    assert batch.ids.tolist() == [rows[i] + [7] * (width - lengths[i]) for i in index]
    assert batch.lengths.tolist() == [lengths[i] for i in index] and batch.index[0].tolist() == index.tolist()
    assert batch.ids.dtype == batch.lengths.dtype == torch.int64
    moved = batch.to("cpu")
    assert torch.equal(moved.ids, batch.ids) and torch.equal(moved.lengths, batch.lengths)
    assert moved.index is batch.index


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_all_parts_are_collated_at_once(lengths, data):
    """K parts from one array of ids, some without rows, against row by row."""
    rows = [[[1000 * k + 10 * i + t + 1 for t in range(n)] for i, n in enumerate(own)] for k, own in enumerate(lengths)]
    encoded = [
        Encoded(np.array(sum(own, []), dtype=np.int32), np.cumsum([0, *map(len, own)]), np.zeros(len(own)))
        for own in rows
    ]
    for again in (batches.joined(encoded), batches.joined(batches.joined(encoded))):
        parts, wanted, most = [], [], 1
        for own, one in zip(rows, again, strict=True):
            index = np.array(data.draw(st.lists(st.integers(0, len(own) - 1), max_size=4, unique=True)), dtype=np.int64)
            parts.append((one, index, np.arange(len(own)) + 50) if len(index) else (None, index, None))
            wanted.append([(own[i], i + 50) for i in index])
            most = max(most, len(index))
        sizes = np.arange(1, 12)
        batch = batches.collate(parts, sizes, pad_id=7, filler=-3)
        width = max([len(row) for own in wanted for row, _ in own], default=1)
        filled = [own + [([7], -3)] * (most - len(own)) for own in wanted]
        flat = [pair for own in filled for pair in own]
        assert batch.ids.tolist() == [row + [7] * (width - len(row)) for row, _ in flat]
        assert batch.lengths.tolist() == [len(row) for row, _ in flat]
        assert (batch.answers is None) == (not any(wanted)) and len(batch.index) == len(rows)
        if batch.answers is not None:
            assert batch.answers.tolist() == [answer for _, answer in flat]
        assert batch.alike == all([row for row, _ in own] == [row for row, _ in filled[0]] for own in filled)


# --- ahead of their step


def ahead(make, start, stop, device):
    """As the loop takes its steps: (step, batches there)."""
    made = batches.ahead(map(make, range(start, stop)), device)
    return ((step, there) for step, (_, there) in enumerate(made, start))


def test_places_of_completions():
    """Row by row, in Python; parts with fewer are padded, and rows that pad a batch have none."""
    draw, cases = np.random.default_rng(3), 0
    for parts, rows, least in ((1, 4, 1), (3, 2, 1), (2, 5, 40), (1, 1, 1)):
        lengths = draw.integers(2, 9, parts * rows)
        counts = np.array([draw.integers(1, length) for length in lengths])
        lengths[-1], counts[-1] = 1, 0
        ids = torch.zeros(parts * rows, 9, dtype=torch.int64)
        batch = batches.Batch(ids, torch.from_numpy(lengths), [], torch.from_numpy(counts))
        found = batches.place_completions(batch, parts, least).answers.view(parts, -1).tolist()
        wanted = [[] for _ in range(parts)]
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            wanted[row // rows] += [9 * row + place - 1 for place in range(length - count, length)]
        most = max([least, *map(len, wanted)])
        assert found == [own + [-100] * (most - len(own)) for own in wanted]
        cases += 1
    assert cases == 4


def made(step):
    """The batches of a step: none to two."""
    draw = torch.Generator().manual_seed(step)
    return [
        batches.Batch(
            torch.randint(9, (3, step + 2), generator=draw), torch.randint(9, (3,), generator=draw),
            np.arange(3) + step, torch.randint(9, (3,), generator=draw), torch.rand(3, generator=draw),
        )
        for _ in range(step % 3)
    ]  # fmt: skip


def in_background():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches-ahead")]


def test_batches_ahead_are_those_of_the_steps_in_order(device):
    asked, threads = [], set()

    def make(step):
        asked.append(step)
        threads.add(threading.get_ident())
        return made(step)

    cases = 0
    for step, found in ahead(make, 5, 25, torch.device(device)):
        wanted = made(step)
        assert len(found) == len(wanted) == step % 3
        for batch, other in zip(found, wanted, strict=True):
            for name in ("ids", "lengths", "answers", "weights"):
                tensor = getattr(batch, name)
                assert tensor.device.type == device and torch.equal(tensor.cpu(), getattr(other, name))
            assert batch.index.tolist() == other.index.tolist() and batch.keys is None
        assert step == 5 + cases and max(asked) <= step + batches.AHEAD
        cases += 1
    assert cases == 20 and asked == list(range(5, 25))
    assert len(threads) == 1 and threads != {threading.get_ident()} and not in_background()


def test_steps_are_made_while_others_are_trained_on_and_no_more_than_are_wanted():
    begun = threading.Event()
    asked = []

    def make(step):
        asked.append(step)
        if step == batches.AHEAD:
            begun.set()
        return []

    for step, _ in ahead(make, 0, 100, torch.device("cpu")):
        if step == 0:
            assert begun.wait(20)  # nobody has asked for that step yet
            time.sleep(0.05)
            assert asked == list(range(batches.AHEAD + 1))
            break
    assert not in_background() and asked == list(range(batches.AHEAD + 1))


def test_no_steps():
    assert list(ahead(made, 7, 7, torch.device("cpu"))) == [] and not in_background()


def failing(step):
    if step == 6:
        raise ZeroDivisionError("step 6")
    return made(step)


def test_an_error_of_the_thread_is_raised_at_its_step():
    seen = []
    with pytest.raises(ZeroDivisionError, match="step 6") as caught:
        for step, _ in ahead(failing, 3, 20, torch.device("cpu")):
            seen.append(step)
    assert seen == [3, 4, 5] and not in_background()
    assert caught.traceback[-1].name == "failing"  # where it happened


def test_the_thread_ends_with_the_loop():
    cases = 0
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error):
            for step, _ in ahead(made, 0, 1000, torch.device("cpu")):
                if step == 2:
                    raise error
        gc.collect()
        assert not in_background()
        cases += 1
    steps = ahead(made, 0, 1000, torch.device("cpu"))
    next(steps)
    assert len(in_background()) == 1
    steps.close()
    assert not in_background() and cases == 2


class Recorder:
    """In the place of a batch: what was done with it, and in which thread."""

    def __init__(self):
        self.done = []

    def pin_memory(self):
        self.done.append(("pinned", threading.current_thread().name[:13]))
        return self

    def to(self, device, non_blocking=False):
        self.done.append((device.type, non_blocking, threading.current_thread() is threading.main_thread()))
        return self


def test_batches_for_a_gpu_are_pinned_in_the_background_and_copied_without_waiting():
    for kind, wanted in (
        ("cuda", [("pinned", "batches-ahead"), ("cuda", True, True)]),
        ("cpu", [("cpu", False, True)]),
    ):
        found = [batch for _, [batch] in ahead(lambda _: [Recorder()], 0, 6, torch.device(kind))]
        assert [batch.done for batch in found] == [wanted] * 6


def test_passes_hold_every_row_once_and_few_tokens(monkeypatch):
    cases = 0
    for processes in (1, 2, 5):
        for rows in (1, 2, 7, 32):
            for longest, most in ((9, 1), (9, 50), (23, 300), (100, 1024), (9, np.inf)):
                found = []
                for rank in range(processes):
                    monkeypatch.setattr(parallel, "_here", parallel.Here(rank, processes))
                    found.append(feed.passes(rows, longest, most))
                places = [i for own in found for part in own for i in range(part.start, part.stop)]
                assert places == list(range(rows)) and len({len(own) for own in found}) == 1
                sizes = [part.stop - part.start for own in found for part in own]
                assert max(sizes) == 1 or max(sizes) * longest <= most
                assert processes > 1 or min(sizes) > 0 and max(sizes) - min(sizes) <= 1
                each, count = -(-rows // processes), len(found[0])
                if 1 < count < each:  # no more than it takes
                    assert -(-each // (count // 2)) * longest > most
                cases += 1
    assert cases == 60


def test_few_padded_lengths_where_each_makes_the_cpu_compile_code():
    lengths = np.random.default_rng(0).integers(3, 60, 300)
    ids = np.arange(int(lengths.sum()), dtype=np.int32)
    encoded = Encoded(ids, np.concatenate([[0], np.cumsum(lengths)]), np.zeros(300, dtype=np.int64))
    cases = []
    for way, products in ((way, products) for way in linear.WAYS for products in (torch.float32, torch.bfloat16)):
        setting = SimpleNamespace(device=torch.device("cpu"), products=products)
        member = SimpleNamespace(encoded=encoded, lengths=lengths, setting=setting, task=None, cell=Cell())
        with linear.using(way):
            sizes = feed.Feed([member]).sizes
        few = products == torch.bfloat16 or way == "onednn" and linear.HAS_ONEDNN
        assert sizes.tolist() == (batches.padded_sizes(lengths, 24) if few else np.unique([1, *lengths])).tolist()
        cases.append((few, len(sizes)))
    assert len(cases) == 4 and (True, 24) in cases and (not linear.HAS_ONEDNN or (False, 58) in cases)


FEW_STEPS = [(7, 4, 3, 1), (8, 3, 2, 2), (10, 1, 5, 1), (1, 3, 9, 1), (8, 50, 1, 1), (7, 4, 99, 1)]


@pytest.mark.parametrize("batch_size, window, steps, accumulate", FEW_STEPS)
def test_rows_that_no_step_looks_at_have_no_say(batch_size, window, steps, accumulate):
    cell = Cell(batch_size=batch_size, window=window, steps=steps, accumulate=accumulate, seed=3)
    looked_at = feed.rows_looked_at(211, cell)
    looked_at = np.arange(211) if looked_at is None else looked_at
    without = np.zeros(211, dtype=np.int64)
    without[looked_at] = LENGTHS[looked_at]
    whole, part = feed.Schedule(LENGTHS, cell), feed.Schedule(without, cell)
    seen = set()
    for step in range(steps):
        assert [b.tolist() for b in part.rows_at(step)] == [b.tolist() for b in whole.rows_at(step)]
        seen |= set(np.concatenate(whole.rows_at(step)).tolist())
    assert seen <= set(looked_at.tolist()) and looked_at.tolist() == sorted(set(looked_at.tolist()))
    batches_of_it = steps * accumulate
    assert len(looked_at) <= min(211, batches_of_it * batch_size * window) and part.rows_before(steps) >= len(seen)
    if window == 1:
        assert len(looked_at) == len(seen) < 211


def test_all_rows_are_looked_at_where_all_count():
    for cell in (Cell(), Cell(epochs=3), Cell(steps=7, batch_size=32), Cell(steps=1, head="ridge")):
        assert feed.rows_looked_at(211, cell) is None
