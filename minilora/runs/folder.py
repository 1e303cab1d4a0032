"""A run folder: what a cell leaves on disk. Never overwritten, and locked while a process works in it.

cell.toml           the cell, resolved; train.py --config reads it
adapter/            what was trained, in PEFT's format
factors.safetensors the adapter bit for bit: what evaluating the run, --start and --add read
metrics.jsonl       one line a step
injected.jsonl      one line an injected training row: id, labels, spans, strings, whether they survive truncation
trainable.json      every trained tensor: name, shape, count
predictions.jsonl   one line a test row: predicted label and logits in each of its forms
results.json        figures, versions and hardware; its presence means that the run is finished
state.safetensors   for --resume, while the run is unfinished
"""

import contextlib
import fcntl
import json
import os
from pathlib import Path

from minilora import files
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.fields import load_toml
from minilora.files import read_json

LOCK = ".lock"
SAVE_EVERY = 100  # steps between saves of the state


class Run:
    """The folder at `path`: a new run's, or with `resume` one that exists. Nothing is written before `hold`."""

    def __init__(self, path, resume=False):
        self.path = Path(path)
        self.resume = resume
        self._metrics = None

    @classmethod
    def plan(cls, out, cell, taken=()):
        """A new run at `out`, or where that is None at runs/NAME, numbered where the name is taken: there, or by one
        of the paths `taken`.

        Raises InputError if there is something at `out`: early, so that no long preparation is in vain.
        """
        if out is not None:
            cls(out).check_free()
            if Path(out) in taken:
                raise InputError(f"{out} is named for two cells: give each a folder of its own")
            return cls(out)
        number, path = 1, Path("runs") / cell.name
        while os.path.lexists(path) or path in taken:
            number += 1
            path = Path("runs") / f"{cell.name}-{number}"
        return cls(path)

    def check_free(self):
        path = self.path
        self.check_unfinished()
        if os.path.lexists(path / "cell.toml"):
            raise InputError(f"{path} holds an unfinished run: go on with --resume {path}, or choose another --out")
        if os.path.lexists(path) and (not path.is_dir() or any(name != LOCK for name in os.listdir(path))):
            raise InputError(f"{path} exists and is not an empty folder: choose another --out")

    def check_unfinished(self):
        if self.finished:
            raise InputError(
                f"{self.path} holds a finished run: see python evaluate.py {self.path}, or choose another --out"
            )

    @contextlib.contextmanager
    def hold(self, cell):
        """Make the folder with its cell.toml, unless resumed, and keep other processes out of it meanwhile.

        Raises InputError if the folder is in use, if a new one cannot be made, and if the run to resume is finished.
        """
        try:
            if not self.resume:
                self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "a")
        except OSError as error:
            raise InputError(
                f"cannot write to the run folder {self.path} ({error.strerror}): choose another --out"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(
                    f"{self.path} is in use by another process: wait for it, or choose another --out"
                ) from None
            if self.resume:
                self.check_unfinished()
            else:
                self.check_free()
                files.write_text(self.path / "cell.toml", cell.to_toml())
            try:
                yield self
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"go on with python train.py --resume {self.path}") from None
            finally:
                if self._metrics is not None:
                    self._metrics.close()

    def finish(self, results):
        """Write results.json, which makes the run finished, and drop the state that only resuming needs."""
        files.write_json(self.path / "results.json", results)
        self.state.unlink(missing_ok=True)

    def read_cell(self):
        if not os.path.isdir(self.path):
            raise InputError(f"there is no run folder {self.path}: check the path")
        if not os.path.isfile(self.path / "cell.toml"):
            raise InputError(f"{self.path} has no cell.toml, so it is not a run folder: check the path")
        return load_toml(Cell, self.path / "cell.toml")

    @property
    def finished(self):
        return os.path.isfile(self.path / "results.json")

    @property
    def state(self):
        return self.path / "state.safetensors"

    def read_results(self):
        return read_json(self.path / "results.json")

    def start_metrics(self, step):
        """Open metrics.jsonl for appending, with the lines of the first `step` steps alone."""
        path = self.path / "metrics.jsonl"
        lines = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n"):
                with contextlib.suppress(ValueError):  # a killed run may leave half a line
                    lines.append(json.loads(line))
        files.write_jsonl(path, [line for line in lines if line["step"] <= step])
        self._metrics = open(path, "a", encoding="utf-8")

    def log(self, record):
        """Add a line, in the process that opened the file."""
        if self._metrics is None:
            return
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
