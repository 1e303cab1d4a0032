"""How many members a population has: what the device does fastest, as measured on the members themselves.

On a CPU a population is seldom faster than its members one after the other, for their activations leave the cache; on a
GPU a small base leaves most of it idle, and a population is nearly free until it does not.
"""

import gc
import time

import torch

from minilora.console import say
from minilora.runs.record import free_memory
from minilora.training.feed import Feed
from minilora.training.layout import size_of
from minilora.training.population import Population, strip
from minilora.training.state import Flat

GAIN = 1.05  # of the rows a second, below which a larger population is not worth its memory
LEVEL = 0.98  # the same on a GPU, where each population records its own graphs: some 1.2 s of an H200
SHARE = 0.8  # of the free memory that a population may take
MOST = 256  # members that are measured together


def split(members, most):
    """`members` in populations of at most `most`, whose members take about the same number of steps, and see their
    rows in the same order where that is possible: then their batches have about the same length.

    Measured on the default data, as shares of the tokens that are padding: 3% for one member, 3% for members of one
    order, and 21%, 33%, 42% and 58% for 2, 4, 8 and 64 of different ones.
    """
    order = sorted(members, key=meeting)
    return [by_size(order[i : i + most]) for i in range(0, len(order), most)]


def meeting(member):
    return member.schedule.steps, member.cell.seed_for("order")


def by_size(members):
    """The members that train few numbers first: neighbours are padded to the largest (`layout.py`)."""
    return sorted(members, key=lambda member: size_of(member.parameters))


def size(members, base):
    """How many of `members` to train at once: doubled as long as rows a second grow and memory lasts."""
    members, best, found, count = sorted(members, key=meeting), 0.0, 1, 1
    while count <= len(members):
        try:
            rate, memory = trial(members[:count], base)
        except Exception as error:
            if count == 1 or not out_of_memory(error):
                raise
            rate = None  # the frames of the error, which hold what was made, end with this block
        if rate is None:
            clear(base)
            say(f"planner    {count} at once: not enough memory")
            break
        say(f"planner    {count} at once: {rate:,.0f} rows/s")
        if rate < (GAIN if memory is None else LEVEL) * best:
            break
        best, found = max(best, rate), count
        if memory is not None and 2 * memory > SHARE * free_memory(members[0].setting.device):
            break
        count = len(members) if count < len(members) < 2 * count else 2 * count
    return found


def out_of_memory(error):
    """Whether the device, or the machine, had not enough memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = "not enough memory", "can't allocate memory", "out of memory"  # of torch's allocators
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def clear(base):
    """Take off the base what a population that failed left on it, and give its memory back."""
    strip(base)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_halves(train, members, base):
    """`train(members)`, or where memory does not suffice for all at once, a half of them and then the other half.

    The members begin anew from their seeds, or go on from their saved states, so that no result changes.
    """
    try:
        return train(members)
    except Exception as error:
        if len(members) == 1 or not out_of_memory(error):
            raise
    clear(base)
    left = [member for member in members if not member.run.finished]
    half = len(left) // 2
    say(f"memory     not enough for {len(members)} cells at once: training {len(left) - half} at once")
    for member in left:
        member.run.resume |= member.run.begun
        member.error = None  # one that diverged does so again
        member.begin(base)
    for part in filter(None, (left[: len(left) - half], left[len(left) - half :])):
        in_halves(train, part, base)


def trial(members, base, repeats=2):
    """(Rows a second, bytes taken at most or None) of the members' first step, without its update."""
    device, members = members[0].setting.device, by_size(members)
    flat = Flat([member.parameters for member in members])
    population = Population([member.model for member in members], [member.layers for member in members], flat).train()
    batch = Feed(members)(0)[0].to(device)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    best = float("inf")
    for _ in range(1 + repeats):  # the first warms up
        start = time.perf_counter()
        population(batch.ids, batch.lengths, batch.answers, batch.alike).sum().backward()
        flat.values[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    population.detach()
    taken = torch.cuda.max_memory_allocated(device) - before if cuda else None
    return sum(map(len, batch.index)) / best, taken
