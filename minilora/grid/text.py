"""What people read of a grid: its status, and the plan of a dry run."""

from collections import Counter

from minilora.console import duration, short, table, wrap
from minilora.errors import to_type


def grid_status(folder, begin=()):
    """What is done of a grid: counts, who is at work, the cells that failed with their errors, and what to do next.

    `begin` is the arguments that begin it (see `again`). A command to type stays one line, however long, so that it
    can be copied.
    """
    counts, at_work = folder.counts(), folder.at_work()
    states = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
    lines = wrap(f"{folder.path}: {len(folder.grid.entries):,} cells, {states}")
    for who, cells in Counter(at_work.values()).items():
        lines += wrap(f"at work: {who}, on {cells:,} {'cell' if cells == 1 else 'cells'}")
    if counts["failed"]:
        for entry in folder.grid.entries:
            if folder.state(entry) == "failed":
                lines += wrap(f"  failed {entry.name}: {short(folder.read(entry)[1], 200)}", 4)
        lines.append(f"again: {to_type('train', '--grid', folder.path, '--retry-failed')}")
    if counts["interrupted"] + counts["waiting"]:
        begun = (folder.path / "grid.json").exists()
        lines.append(f"{'go on' if begun else 'begin'}: {to_type('train', *again(folder, begin))}")
    elif at_work:
        lines.append(f"once that is done: {to_type('evaluate', folder.path)}")
    elif counts["finished"]:
        lines.append(f"next: {to_type('evaluate', folder.path)}")
    return "\n".join(lines)


def again(folder, begin):
    """The arguments of the script train that go on with a grid, or `begin` it where its folder is not made yet."""
    return ["--grid", folder.path] if (folder.path / "grid.json").exists() else begin


SHOWN = 60  # cells of a plan


def grid_plan(folder, size, only):
    """The lines of a dry run: cells, populations, and what they take."""
    from minilora.grid import choice, power
    from minilora.grid.axes import matches
    from minilora.grid.plan import Forecaster, settle
    from minilora.runs.bases import Settings

    settings = Settings()
    forecast = Forecaster(settings)
    chunks = folder.plan(lambda entries: settle(entries, size or 1, settings))
    chunks = [chunk for chunk in chunks if any(matches(entry.cell, only) for entry in chunk)]
    found = {entry.name: forecast(entry.cell) for chunk in chunks for entry in chunk}
    left = [(entry, number) for number, chunk in enumerate(chunks, 1) for entry in chunk]
    lines = []
    for entry, number in left[:SHOWN]:
        cell = found[entry.name]
        memory = f"{cell.bytes / 2**30:.1f} GiB"
        lines.append((entry.name, f"{number:,}", f"{cell.parameters:,}", duration(cell.seconds), memory))
    yield from table(("cell", "population", "parameters", "time", "memory"), lines)
    if len(left) > SHOWN:
        yield f"... and {len(left) - SHOWN:,} more"
    waiting = [entry for entry, _ in left if folder.state(entry) in ("waiting", "interrupted")]
    total, most = sum(found[entry.name].seconds for entry in waiting), max(cell.bytes for cell in found.values())
    yield f"{len(left):,} cells in {len(chunks):,} populations, {len(waiting):,} of them left"
    yield f"about {duration(total)} one after the other, and at most {most / 2**30:.1f} GiB"
    if any(settings.of(entry.cell).device.type != "cpu" for entry, _ in left) and not folder.planned():
        yield "on this accelerator the size of populations is measured when training starts"
    for line in power.lines_of(folder.grid.claims, choice.left(folder.grid.choice, folder.grid.entries)):
        yield from wrap(line, 4)
