"""The folder of a grid: what its cells leave on disk, who is at work on which, and what is left to do.

grid.toml           the grid's file, as given
grid.json           version, size, and each cell's folder
populations.json    which cells are trained together: settled once, so that a killed grid ends as it would have
cells/NAME/         a run folder each (`runs/folder.py`), with error.json in it where the cell failed
table.csv           a line for each cell and trigger, once all are done (`evaluate.py` writes it with the rest)

Several processes may work in one folder: each takes populations that no other holds, by a lock that dies with it.
"""

import contextlib
import itertools
import os
import shutil
import traceback
from collections import Counter
from pathlib import Path
from types import NoneType

from minilora import __version__, files
from minilora.errors import InputError, cut
from minilora.fields import read_state
from minilora.grid.file import read_grid
from minilora.runs.folder import Run

STATES = ("finished", "failed", "running", "interrupted", "waiting")


def lock_of(chunk):
    """The lock file of a population, in the grid's folder."""
    return f"locks/{chunk[0].name}"


class GridFolder:
    """The folder at `path` of a `grid.Grid`. Nothing is written before `make`."""

    def __init__(self, path, grid):
        self.path, self.grid = Path(path), grid

    @classmethod
    def find(cls, path):
        """The folder that a grid was begun in. Raises InputError for any other folder, or for another version."""
        path = Path(path)
        if not (path / "grid.json").is_file():
            raise InputError(f"{path} is not a grid's folder: give a grid's file, or the folder that its --out made")
        folder = cls(path, read_grid(path / "grid.toml", read_record(path)["size"]))
        folder.check()
        return folder

    def check(self):
        """Raise InputError for a folder that holds anything but this grid, or a part of it, of this version."""
        path = self.path
        if not (path / "grid.json").exists():
            # Another process may be making it at this moment: its lock and its unfinished files begin with a dot.
            if path.exists() and (
                not path.is_dir() or any(name != "grid.toml" and name[0] != "." for name in os.listdir(path))
            ):
                raise InputError(f"{path} exists and is no grid's folder: choose another --out")
            return
        if other := set(read_record(path)["cells"]) - {entry.name for entry in self.grid.entries}:
            raise InputError(
                f"{path} was made by another grid: {len(other)} of its cells are not in this one, such as "
                f"{cut(min(other))}: choose another --out"
            )

    def make(self):
        """Make the folder, or let one that holds a part of the grid hold the whole. Raises InputError as `check`."""
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {self.path} ({error.strerror}): choose another --out") from None
        with self.lock(".lock"):
            self.check()
            files.delete_unfinished(self.path, ("grid.toml", "grid.json", "populations.json", "table.csv"))
            names = [entry.name for entry in self.grid.entries]
            if not (self.path / "grid.json").exists() or read_record(self.path)["cells"] != names:
                files.write_text(self.path / "grid.toml", self.grid.text)
                files.write_json(
                    self.path / "grid.json", {"minilora": __version__, "size": self.grid.size, "cells": names}
                )
        return self

    @contextlib.contextmanager
    def lock(self, name, wait=True):
        """Hold the lock file `name`; gives whether it is held, which is always so with `wait`."""
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(files.lock(self.path / name, wait))
            except OSError as error:
                raise InputError(
                    f"cannot write to the folder {self.path} ({error.strerror}): choose another --out"
                ) from None
            yield held

    # --- populations

    def populations(self, settle):
        """The grid's entries in lists, as `plan`, settled once for all processes."""
        with self.lock(".lock"):
            chunks = self.plan(settle)
            names = [[entry.name for entry in chunk] for chunk in chunks]
            files.write_json(self.path / "populations.json", {"populations": names})
        return chunks

    def plan(self, settle):
        """The grid's entries in lists: as settled before, and those that are new by `settle(entries)`."""
        chunks = self.planned()
        there = {entry.name for entry in itertools.chain(*chunks)}
        new = [entry for entry in self.grid.entries if entry.name not in there]
        return chunks + (settle(new) if new else [])

    def planned(self):
        """The populations that were settled. Raises InputError for one of an unknown cell, or of one that has two."""
        path = self.path / "populations.json"
        if not path.exists():
            return []
        advice = "delete it while no process works in the folder: populations are then settled again"
        chunks = read_state(path, {"populations": [[str]]}, advice)["populations"]
        entries, named = {entry.name: entry for entry in self.grid.entries}, Counter(itertools.chain(*chunks))
        for words, names in (
            ("has an unknown cell", named.keys() - entries.keys()),
            ("has twice the cell", {name for name, count in named.items() if count > 1}),
        ):
            if names:
                raise InputError(f"{path} {words} {cut(min(names))}; {advice}")
        return [[entries[name] for name in chunk] for chunk in chunks if chunk]

    @contextlib.contextmanager
    def claim(self, chunk):
        """Hold a population against other processes while it is trained; gives whether it is held, or None where
        nothing is left of it to do."""
        (self.path / "locks").mkdir(exist_ok=True)
        with self.lock(lock_of(chunk), wait=False) as held:
            yield None if held and not self.left(chunk) else held

    def at_work(self):
        """{name of a cell: who trains its population now, in words}."""
        found = {}
        for chunk in self.planned():
            left = self.left(chunk)
            if left and (who := files.holder(self.path / lock_of(chunk))):
                found |= {entry.name: who for entry in left}
        return found

    def left(self, chunk):
        """The entries that are neither finished nor failed."""
        return [entry for entry in chunk if self.state(entry) in ("waiting", "interrupted")]

    # --- cells

    def run_path(self, entry):
        return self.path / "cells" / entry.name

    def state(self, entry):
        """finished, failed, interrupted (or running: see `at_work`) or waiting."""
        path = self.run_path(entry)
        if (path / "results.json").exists():
            return "finished"
        if (path / "error.json").exists():
            return "failed"
        return "interrupted" if (path / "cell.toml").exists() else "waiting"

    def runs(self, entries):
        """[(cell, `Run`)] of entries that are left. An interrupted run keeps the run options of its cell.toml."""
        found = []
        for entry in entries:
            path = self.run_path(entry)
            if path.exists() and not (path / "cell.toml").exists():
                shutil.rmtree(path)  # killed before it began
            run = Run(path, resume=path.exists())
            cell = run.read_cell() if run.resume else entry.cell
            if cell != entry.cell:
                raise InputError(f"{path / 'cell.toml'} is not the cell {cut(entry.name)}: delete the folder {path}")
            found.append((cell, run))
        return found

    def fail(self, entry, error):
        """Record that a cell failed, with the trace of its error."""
        path = self.run_path(entry)
        path.mkdir(parents=True, exist_ok=True)
        trace = "".join(traceback.format_exception(error)).splitlines()
        text = " ".join(str(error).split())
        files.write_json(path / "error.json", {"error": text, "kind": type(error).__name__, "traceback": trace})

    def forget_failures(self):
        """Delete the failed cells, so that they are trained again from their start."""
        for entry in self.grid.entries:
            if self.state(entry) == "failed":
                shutil.rmtree(self.run_path(entry))

    def counts(self):
        """{state: number of cells}."""
        at_work = self.at_work()
        states = ["running" if entry.name in at_work else self.state(entry) for entry in self.grid.entries]
        return {state: states.count(state) for state in STATES}

    def read(self, entry):
        """(results or None, error or None) of a cell."""
        run, path = Run(self.run_path(entry)), self.run_path(entry) / "error.json"
        if run.finished:
            return run.read_results(), None
        if path.exists():
            return None, read_state(path, {"error": str}, "delete it: the cell is then trained again")["error"]
        return None, None


def read_record(path):
    """What grid.json in the folder `path` has. Raises InputError for a damaged one, and for another version."""
    advice = "put it back from a copy, or choose another --out"
    record = read_state(path / "grid.json", {"minilora": str}, advice)
    if record["minilora"] != __version__:
        raise InputError(
            f"{path} was made by minilora {cut(record['minilora'])}, and this is {__version__}: choose another --out"
        )
    return read_state(path / "grid.json", {"size": (str, NoneType), "cells": [str]}, advice)
