"""The folder of a grid: what its cells leave on disk, who is at work on which, and what is left to do.

grid.toml           the grid's file, as given
grid.json           version, scale, and each cell's folder
populations.json    which cells are trained together: settled once, so that a killed grid ends as it would have
cells/NAME/         a run folder each (`run.py`), with error.json in it where the cell failed
table.csv           a line a cell and trigger, once all are done (`evaluate.py` writes it with the rest)

Several processes may work in one folder: each takes populations that nobody holds, by a lock that dies with it.
"""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from minilora import __version__, files
from minilora.errors import InputError
from minilora.files import read_json
from minilora.grid.file import read_grid
from minilora.runs.folder import Run

FULL = (errno.ENOSPC, errno.EDQUOT)


class GridFolder:
    """The folder at `path` of a `grid.Grid`. Nothing is written before `make`."""

    def __init__(self, path, grid):
        self.path, self.grid = Path(path), grid

    @classmethod
    def find(cls, path):
        """The folder that a grid was begun in. Raises InputError for one that is none, or of another version."""
        path = Path(path)
        if not (path / "grid.json").is_file():
            raise InputError(f"{path} is not a grid's folder: give a grid's file, or the folder that its --out made")
        folder = cls(path, read_grid(path / "grid.toml", read_json(path / "grid.json")["scale"]))
        folder.check()
        return folder

    def check(self):
        """Raise InputError for a folder that holds anything but this grid, of this version."""
        path = self.path
        if not (path / "grid.json").exists():
            # Another process may be at it at this moment: its lock and its unfinished files begin with a dot.
            if path.exists() and (
                not path.is_dir() or any(name != "grid.toml" and name[0] != "." for name in os.listdir(path))
            ):
                raise InputError(f"{path} exists and is no grid's folder: choose another --out")
            return
        made = read_json(path / "grid.json")
        if made["minilora"] != __version__:
            raise InputError(
                f"{path} was made by minilora {made['minilora']}, and this is {__version__}: choose another --out"
            )
        here = {entry.name for entry in self.grid.entries}
        if other := here.symmetric_difference(made["cells"]):
            where = "the grid alone" if min(other) in here else "the folder alone"
            raise InputError(
                f"{path} was made by another grid: {len(other)} cells differ, such as {min(other)}, in {where}: "
                "choose another --out"
            )

    def make(self):
        """Make the folder, unless it is there. Raises InputError as `check`."""
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {self.path} ({error.strerror}): choose another --out") from None
        with self.lock(".lock"):
            self.check()
            if not (self.path / "grid.json").exists():
                files.write_text(self.path / "grid.toml", self.grid.text)
                names = [entry.name for entry in self.grid.entries]
                files.write_json(
                    self.path / "grid.json", {"minilora": __version__, "scale": self.grid.scale, "cells": names}
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
        """The grid's entries in lists: as settled before, or by `settle(entries)`, once for all processes."""
        with self.lock(".lock"):
            if (chunks := self.planned()) is None:
                chunks = settle(self.grid.entries)
                names = [[entry.name for entry in chunk] for chunk in chunks]
                files.write_json(self.path / "populations.json", {"populations": names})
        return chunks

    def planned(self):
        """The populations that were settled, or None."""
        if not (self.path / "populations.json").exists():
            return None
        entries = {entry.name: entry for entry in self.grid.entries}
        return [[entries[name] for name in chunk] for chunk in read_json(self.path / "populations.json")["populations"]]

    @contextlib.contextmanager
    def claim(self, chunk):
        """Hold a population against other processes while it is trained; gives whether it is held, or None where
        nothing is left of it to do."""
        (self.path / "locks").mkdir(exist_ok=True)
        with self.lock(f"locks/{chunk[0].name}", wait=False) as held:
            yield None if held and not self.left(chunk) else held

    def left(self, chunk):
        """The entries that are neither finished nor failed."""
        return [entry for entry in chunk if self.state(entry) in ("waiting", "interrupted")]

    # --- cells

    def run_path(self, entry):
        return self.path / "cells" / entry.name

    def state(self, entry):
        """finished, failed, interrupted (also: at work) or waiting."""
        path = self.run_path(entry)
        if (path / "results.json").exists():
            return "finished"
        if (path / "error.json").exists():
            return "failed"
        return "interrupted" if (path / "cell.toml").exists() else "waiting"

    def runs(self, entries):
        """The `Run`s of entries that are left. (See `planner.split` for those that a kill left at different steps.)"""
        found = []
        for entry in entries:
            path = self.run_path(entry)
            if path.exists() and not (path / "cell.toml").exists():
                shutil.rmtree(path)  # killed before it began
            found.append(Run(path, resume=path.exists()))
        return found

    def fail(self, entry, error):
        """Record that a cell failed."""
        path = self.run_path(entry)
        path.mkdir(parents=True, exist_ok=True)
        files.write_json(path / "error.json", {"error": " ".join(str(error).split()), "kind": type(error).__name__})

    def forget_failures(self):
        """Let the failed cells be trained again, from their start."""
        for entry in self.grid.entries:
            if self.state(entry) == "failed":
                shutil.rmtree(self.run_path(entry))

    def counts(self):
        """{state: number of cells}."""
        states = [self.state(entry) for entry in self.grid.entries]
        return {state: states.count(state) for state in ("finished", "failed", "interrupted", "waiting")}

    def read(self, entry):
        """(results or None, error or None) of a cell."""
        path = self.run_path(entry)
        if (path / "results.json").exists():
            return read_json(path / "results.json"), None
        if (path / "error.json").exists():
            return None, read_json(path / "error.json")["error"]
        return None, None


def is_full(error):
    """Whether it is a full disk that made `error`, or what that was raised from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
