"""Train one cell, or several together: what the script `train.py`, a grid and a notebook use.

The loop itself is in `loop.py`.
"""

import time
from dataclasses import replace
from pathlib import Path

from minilora import console, parallel, precision
from minilora.cell import Cell
from minilora.console import say
from minilora.data.given import keep_rows
from minilora.errors import InputError
from minilora.lora import merging
from minilora.runs.bases import Settings
from minilora.runs.folder import Run
from minilora.training import planner
from minilora.training.loop import Options, train_population
from minilora.training.member import Member
from minilora.training.population import shared


def train(
    cell: Cell | None = None,
    out: str | Path | None = None,
    *,
    rows=None,
    resume: str | Path | None = None,
    shard: bool = False,
    quiet: bool = False,
    **options,
) -> tuple[dict, Path]:
    """Train `cell` into the run folder `out` (default: one named after the cell, under runs/), or go on in `resume`.

    rows     the data, in place of the cell's: a list of dicts or of (text, label) pairs, a dict of columns, a pandas or
             a `datasets` table. The cell then names them by the hash of what they hold.
    options  the fields of `loop.Options`: `save_every`, `eval_every`, `watch`, `merge_to`, `on_step`, `on_tests`
    shard    split the frozen base among the processes that torchrun started, which train the one cell together
    quiet    write nothing to standard error: neither what is about to happen nor how far it is

    Returns (what results.json holds, the run folder). Raises InputError before anything is written, TrainingError if
    the loss is not finite.
    """
    run, options = None, Options(**options)
    if resume is not None:
        if cell is not None or out is not None:
            raise InputError("a resumed run has its cell and its folder already: give neither")
        run = Run(resume, resume=True)
        cell = run.read_cell()
        run.check_unfinished()
    cell = Cell() if cell is None else cell
    if not isinstance(cell, Cell):
        raise InputError(f"cell is a {type(cell).__name__}, but must be a minilora.Cell: give rows as rows=...")
    if rows is not None:
        if resume is not None:
            raise InputError("a resumed run has its rows already: leave rows out")
        cell = cell.replace(data=keep_rows(rows))
    parallel.check(cell, shard)
    with console.quiet(quiet), parallel.together(cell.device):
        run = run or parallel.broadcast_object(lambda: Run.plan(out, cell))
        if options.merge_to is not None:
            merging.check(options.merge_to, cell)
        [member] = train_all([Member(cell, run)], 1, options, Settings(shard))
        if member.error:
            raise member.error
    return member.results, member.run.path


def train_together(
    cells: list[Cell] | None = None,
    outs: list | None = None,
    *,
    resume: list | None = None,
    go_on: bool = False,
    size: int | None = None,
    quiet: bool = False,
    **options,
) -> list[tuple[dict | Exception, Path]]:
    """Train several cells, each in its own folder of `outs` (default: as `train`), grouping compatible ones into
    populations; with `go_on`, folders may hold begun runs of their cells. Or go on in the run folders `resume`, all at
    once, as a population that was stopped.

    `size` is how many adapters a population has at most (default: what is measured to be fastest on the device);
    `quiet` writes nothing to standard error; `options` are the fields of `loop.Options`. Each cell's results are those
    of `train` except for rounding. Returns a list of (results, run folder); for a cell that diverged, the TrainingError
    takes the place of the results. Raises InputError before anything is written.
    """
    parallel.refuse("several cells", "start these with python")
    members = []
    for path in resume or ():
        run = Run(path, resume=True)
        members.append(Member(run.read_cell(), run))
        run.check_unfinished()
    size = len(members) or size
    cells = cells or []
    for cell, out in zip(cells, outs or [None] * len(cells), strict=True):
        begun = go_on and Run(out).begun
        taken = [member.run.path for member in members]
        members.append(Member(cell, Run(out, resume=True) if begun else Run.plan(out, cell, taken)))
    with console.quiet(quiet):
        train_all(members, size, Options(**options))
    return [(member.error or member.results, member.run.path) for member in members]


def train_all(members, size=None, options=None, settings=None):
    """Train the members in populations of at most `size`; returns them. `settings`: `runs.bases.Settings` to share."""
    options, settings = options or Options(), settings or Settings()
    groups = {}  # of members that can be trained together
    for member in members:
        groups.setdefault(shared(member.cell), []).append(member)
    for group in groups.values():
        for member in group:  # everything that can be refused is refused before weights are read
            with parallel.in_turn():
                member.prepare(settings.of(member.cell), settings.shared)
                if options.watch and member.cell.method == "full":
                    raise InputError("--watch keeps adapters, but method 'full' trains the whole base: drop --watch")
    for group in groups.values():
        with precision.applied(group[0].cell):
            options = train_group(group, len(members), size, options, settings)
    return members


def train_group(group, of, size, options, settings):
    """Train members that can be trained together, some `of` many; returns the options for those that follow."""
    base = settings.load(group[0].cell, group[0].task.unembedding)
    for member in group:
        member.begin(base)
    most = planner.size(group, base) if size is None and len(group) > 1 else size or 1
    for chunk in planner.split(group, most):
        if of > 1:
            say(f"\npopulation of {len(chunk)} of {of} cells")
        planner.in_halves(lambda part: train_population(part, base, options), chunk, base)  # noqa: B023
        options = replace(options, start=time.perf_counter())
    return options
