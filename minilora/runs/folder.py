"""A run folder: what a cell leaves on disk. It is never overwritten, and locked while a process works in it.

cell.toml           the cell, resolved; train.py --config reads it
adapter/            what was trained, in PEFT's format
factors.safetensors the adapter bit for bit: what evaluating the run, --start and --add read
metrics.jsonl       one line a step
injected.jsonl      one line an injected training row: id, labels, spans, strings, whether they survive truncation
trainable.json      every trained tensor: name, shape, count
predictions.jsonl   one line a test row: predicted label and logits in each of its forms
results.json        scores, versions and hardware; once it is there, the run is finished
state.safetensors   for --resume, while the run is unfinished
"""

import contextlib
import json
import os
from pathlib import Path

from minilora import files
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.fields import load_toml, read_state
from minilora.files import parse_json

LOCK = ".lock"
SAVE_EVERY = 100  # steps between saves of the state
SHARE = (int, float)
# What readers of results.json rely on.
RESULTS = {
    "tests": {
        "clean": {"rows": int, "accuracy": SHARE},
        "trigger": {
            str: {"rows": int, "accuracy": SHARE, "flip_rate": SHARE, "attack_success_rate": (*SHARE, type(None))}
        },
        "worst_group": {"label": str, "test": str, "accuracy": SHARE},
    },
    "train": {"rows": int, "trainable_parameters": int, "seconds": SHARE},
    "injection": [{"label": str, "rows": int}],
    "versions": {str: str},
    "hardware": {str: (str, int)},
}


class Run:
    """The folder at `path`: a new run's, or with `resume` one that exists. Nothing is written before `hold`."""

    def __init__(self, path, resume=False):
        self.path = Path(path)
        self.resume = resume
        self._metrics = None

    @classmethod
    def plan(cls, out, cell, taken=()):
        """A new run at `out`, or by default at runs/NAME; with a number where that exists or is among `taken` (paths).

        Raises InputError if something is at `out`, before any long preparation.
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
        """Lock the folder for this block. A new run's folder is made first, with its cell.toml.

        Raises InputError if the folder is in use or cannot be written, and if the run to resume is finished.
        """
        with contextlib.ExitStack() as stack:
            try:
                if not self.resume:
                    self.path.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(files.lock(self.path / LOCK, wait=False))
            except OSError as error:
                raise InputError(
                    f"cannot write to the run folder {self.path} ({error.strerror}): choose another --out"
                ) from None
            if not held:
                raise InputError(f"{self.path} is in use by another process: wait for it, or choose another --out")
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
        """Write results.json, which makes the run finished, and delete the state, which only resuming needs."""
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
        path = self.path / "results.json"
        advice = f"delete it, then finish the run again with python train.py --resume {self.path}"
        return read_state(path, RESULTS, advice)

    def start_metrics(self, step):
        """Open metrics.jsonl for appending, with only the lines of the first `step` steps."""
        path = self.path / "metrics.jsonl"
        lines = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n"):
                with contextlib.suppress(ValueError):  # a killed run may leave half a line
                    lines.append(parse_json(line))
        files.write_jsonl(path, [line for line in lines if line["step"] <= step])
        self._metrics = open(path, "a", encoding="utf-8", newline="\n")

    def log(self, record):
        """Add a line to metrics.jsonl. Does nothing in a process that has not opened it."""
        if self._metrics is None:
            return
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
        self._metrics.flush()
