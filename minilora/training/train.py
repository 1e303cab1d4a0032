"""Train one cell, or several together: what `train.py` and a notebook call. The loop itself is in `loop.py`."""

import time

from minilora import console, parallel
from minilora.errors import InputError
from minilora.lora import merging
from minilora.runs.bases import Settings
from minilora.runs.folder import SAVE_EVERY, Run
from minilora.training import planner
from minilora.training.loop import train_population
from minilora.training.member import Member
from minilora.training.population import shared


def train(
    cell=None, out=None, *, resume=None, eval_every=0, save_every=SAVE_EVERY, merge_to=None, start=None, shard=False
):
    """Train `cell` into the run folder `out` (default: one named after the cell, under runs/), or go on in `resume`.

    Every `save_every` steps the state is saved; every `eval_every` steps (0: never) the tests are run and logged.
    With `merge_to` the base with what was trained is written to that new folder (see `export.write`).
    `start` is the `time.perf_counter()` that the total counts from. Where torchrun started several processes they
    train the one cell together, with `shard` with the frozen base split among them (`parallel.py`). Returns (results,
    run folder). Raises InputError before anything is written, TrainingError if the loss is not finite.
    """
    run = None
    if resume is not None:
        if cell is not None or out is not None:
            raise InputError("a resumed run has its cell and its folder already: give neither")
        run = Run(resume, resume=True)
        cell = run.read_cell()
        run.check_unfinished()
    parallel.check(cell, shard)
    with parallel.together(cell.device):
        run = run or parallel.broadcast_object(lambda: Run.plan(out, cell))
        if merge_to is not None:
            merging.check(merge_to, cell)
        [member] = train_all([Member(cell, run)], 1, eval_every, save_every, merge_to, start, Settings(shard))
        if member.error:
            raise member.error
    return member.results, member.run.path


def train_together(cells, outs=None, *, size=None, eval_every=0, save_every=SAVE_EVERY):
    """Train several cells, each into its own folder of `outs` (default: as `train`), in populations of cells that allow
    it.

    `size` is how many adapters a population has at most (default: what is measured to be fastest on the device). Each
    cell's results are those of `train` but for rounding. Returns a list of (results, run folder), with the
    TrainingError in the place of the results of a cell that diverged. Raises InputError before anything is written.
    """
    parallel.refuse("several cells", "start these with python")
    members = []
    for cell, out in zip(cells, outs or [None] * len(cells), strict=True):
        members.append(Member(cell, Run.plan(out, cell, taken=[member.run.path for member in members])))
    train_all(members, size, eval_every, save_every)
    return [(member.error or member.results, member.run.path) for member in members]


def train_all(members, size=None, eval_every=0, save_every=SAVE_EVERY, merge_to=None, start=None, settings=None):
    """Train the members in populations of at most `size`; returns them. `settings`: a `member.Settings` to draw on."""
    start = time.perf_counter() if start is None else start
    settings = settings or Settings()
    groups = {}  # of members that can be trained together, with as many steps to go if possible
    for member in members:
        groups.setdefault(shared(member.cell), []).append(member)
    for group in groups.values():
        for member in group:  # everything that can be refused is refused before weights are read
            with parallel.in_turn():
                member.prepare(settings.of(member.cell))
    for group in groups.values():
        base = settings.load(group[0].cell, group[0].task.unembedding)
        for member in group:
            member.begin(base)
        most = planner.size(group, base) if size is None and len(group) > 1 else size or 1
        for chunk in planner.split(group, most):
            if len(members) > 1:
                console.say(f"\npopulation of {len(chunk)} of {len(members)} cells")
            train_population(chunk, base, eval_every, save_every, merge_to, start)
            start = time.perf_counter()
    return members
