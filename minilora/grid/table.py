"""The tidy table of a grid: a line for each cell and trigger."""

from minilora import files
from minilora.grid import choice
from minilora.grid.axes import plain
from minilora.runs.record import figure_lines

TABLE = "table.csv"


# --- the tidy table


def table_rows(folder, made=None):
    """The table of a `grid.folder.GridFolder`, a list of dicts with the same keys in the same order.

    Where the grid chooses values, `chosen` says whether a cell counts. Into the dict `made` goes what finished cells
    were made with, {"versions" or "hardware": {name: all values}}.
    """
    found, varied = [], folder.grid.varied
    for entry in folder.grid.entries:
        results, error = folder.read(entry)
        cell = {"cell": entry.name, "id": entry.name.rpartition("_")[2], "state": folder.state(entry)}
        cell |= {name: plain(entry.varied[name]) for name in varied}
        found += [cell | line | {"error": error} for line in figure_lines(results)]
        for kind in ("versions", "hardware") if results and made is not None else ():
            for name, value in results[kind].items():
                made.setdefault(kind, {}).setdefault(name, {})[str(value)] = None
    choice.mark(folder.grid.choice, folder.grid.entries, found)
    return found


def write_table(folder, lines=None):
    """Write table.csv into the folder, of `lines` or what `rows` gives, and return its path."""
    lines = lines or table_rows(folder)
    files.write_text(folder.path / TABLE, files.to_csv(lines))
    return folder.path / TABLE
