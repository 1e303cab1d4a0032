"""Train the cells of a grid in its folder: those that are left, population after population."""

from minilora import console, parallel
from minilora.files import is_full
from minilora.grid.axes import matches
from minilora.grid.folder import GridFolder
from minilora.grid.plan import settle
from minilora.grid.table import write_table
from minilora.runs.bases import Settings
from minilora.runs.folder import Run
from minilora.runs.text import one_line
from minilora.training.member import Member
from minilora.training.train import train_all


def train_grid(grid, out, *, size=None, only=None, retry_failed=False, nodes=None):
    """Train the cells of a `grid.Grid` in the folder `out`, those that are left there; returns the `GridFolder`.

    `size` is how many cells a population has at most (default: see `planner.settle`). `only` {field: values} leaves
    the populations without such a cell for later. A cell that fails is recorded, and the others go on; `retry_failed`
    tries those of before again. `nodes`: a `cluster.Nodes` to train on, instead of this machine. Other processes may
    be at work in the same folder. Raises InputError before any training for a folder that holds something else.
    """
    parallel.refuse("a grid", "start that with python, and over several machines with --ray")
    folder, settings = GridFolder(out, grid).make(), Settings()
    if retry_failed:
        folder.forget_failures()
    settler = nodes.settle if nodes else settle
    with console.quiet():
        chunks = folder.populations(lambda entries: settler(entries, size, settings))
    chunks = [chunk for chunk in chunks if any(matches(entry.cell, only or {}) for entry in chunk)]
    entries = [entry for chunk in chunks for entry in chunk]
    with console.Cells(len(entries), len(entries) - len(folder.left(entries))) as progress:
        if nodes:
            nodes.train(folder, chunks, progress)
        else:
            for chunk in chunks:
                with folder.claim(chunk) as held:
                    if held:
                        train_chunk(folder, folder.left(chunk), settings, progress)
    if not folder.left(grid.entries):
        with folder.lock(".lock"):
            write_table(folder)
            for entry in grid.entries:
                Run(folder.run_path(entry)).tidy()
    return folder


def train_chunk(folder, entries, settings, progress):
    """Train the entries of a population. If it fails, train its cells one by one, so that only the culprit fails."""
    members = [Member(cell, run) for cell, run in folder.runs(entries)]
    try:
        with console.quiet():
            train_all(members, len(members), settings=settings)
    except Exception as error:
        if is_full(error):  # no fault of the cell's
            raise
        settings.forget()  # the base may carry an adapter still
        if len(entries) > 1:
            for entry in entries:
                train_chunk(folder, [entry], settings, progress)
            return
        members[0].error = error
    for entry, member in zip(entries, members, strict=True):
        if member.error:
            folder.fail(entry, member.error)
            progress.advance(entry.name, f"failed: {member.error}")
        else:
            progress.advance(entry.name, one_line(member.results))
