"""A run folder: what a cell leaves on disk. It is never overwritten, and locked while a process works in it.

cell.toml           the cell, resolved; train.py --config reads it
adapter/            what was trained, in PEFT's format, and its model card README.md
factors.safetensors the adapter bit for bit: what evaluating the run, --start and --add read
metrics.jsonl       one line a step ("kind": "step"), one a trigger label for each run of the tests ("test", with the
                    names of a grid's table.csv), and one for what ended the run ("error")
injected.jsonl      one line an injected training row: id, labels, text, spans, strings, whether they survive truncation
trainable.json      every trained tensor: name, shape, count
predictions.jsonl   one line a test row: its text, and in each of its forms predicted label and logits; in those that
                    hold a trigger or a placebo the text, spans and strings too
results.json        scores, versions and hardware; once it is there, the run is finished
watch/              with --watch N what was trained after every N-th step, step 0 and the last: step-000010.safetensors,
                    named as in trainable.json (factors and head; the base's own weights are never among them)
population.json     the runs that are trained together with this one, where there are such: --resume takes all
state.safetensors   for --resume, while the run is unfinished
"""

import contextlib
import json
import os
from pathlib import Path

from minilora import files
from minilora.cell import Cell
from minilora.errors import InputError, to_type
from minilora.fields import check_shape, is_table, load_toml, no_path, read_state, read_toml
from minilora.files import parse_json

LOCK, WATCH = ".lock", "watch"
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


def is_foreign(name):
    """Whether a file of that name is none that a run leaves where it was killed before it began."""
    return name not in (LOCK, files.note_of(LOCK).name) and not files.TEMPORARY.fullmatch(name)


class Run:
    """The folder at `path`: a new run's, or with `resume` one that exists. Nothing is written before `hold`."""

    def __init__(self, path, resume=False):
        if is_table(path):
            raise no_path("the run folder", path, "name a folder")
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
            line = to_type("train", "--resume", path)
            raise InputError(f"{path} holds an unfinished run: go on with {line}, or choose another --out")
        if os.path.lexists(path) and (not path.is_dir() or any(map(is_foreign, os.listdir(path)))):
            raise InputError(f"{path} exists and is not an empty folder: choose another --out")

    def check_unfinished(self):
        if self.finished:
            raise InputError(
                f"{self.path} holds a finished run: see {to_type('evaluate', self.path)}, or choose another --out"
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
                if files.is_full(error):
                    raise
                raise InputError(
                    f"cannot write to the run folder {self.path} ({error.strerror}): choose another --out"
                ) from None
            if not held:
                who = files.holder(self.path / LOCK) or "another process"
                raise InputError(f"{self.path} is in use by {who}: wait for it, or choose another --out")
            for folder in (self.path, self.path / "adapter", self.path / WATCH):
                if folder.is_dir():
                    files.delete_unfinished(folder)
            if self.resume:
                self.check_unfinished()
            else:
                self.check_free()
                files.write_text(self.path / "cell.toml", cell.to_toml())
            try:
                yield self
            finally:
                if self._metrics is not None:
                    self._metrics.close()

    def finish(self, results):
        """Write results.json, which makes the run finished, and delete the state, which only resuming needs."""
        files.write_json(self.path / "results.json", results)
        self.state.unlink(missing_ok=True)

    def keep(self, tensors, step, every):
        """Write what is trained, {name: tensor}, after `step` steps of a run that is watched every `every` steps."""
        (self.path / WATCH).mkdir(exist_ok=True)
        files.write_tensors(self.path / WATCH / f"step-{step:06}.safetensors", tensors, {"every": str(every)})

    def watched(self):
        """{step: path} of what `keep` wrote, in the order of steps."""
        found = sorted((self.path / WATCH).glob("step-*.safetensors"))
        return {int(path.stem[5:]): path for path in found if path.stem[5:].isdigit()}

    def watch_every(self):
        """Steps between the copies that are there already, 0 where there are none."""
        from minilora.lora.storage import read_metadata  # not above: it imports torch

        paths = list(self.watched().values())
        return int(read_metadata(paths[-1]).get("every", 0)) if paths else 0

    def write_population(self, paths):
        """Write down which runs, those at `paths`, are trained together with this one."""
        path = self.path / "population.json"
        if len(paths) == 1:
            return path.unlink(missing_ok=True)
        files.write_json(path, {"runs": [os.path.relpath(other, self.path) for other in paths]})

    def population(self):
        """The paths of the runs that were trained together, this one among them."""
        path, runs = self.path / "population.json", ["."]
        if path.exists():
            advice = "delete it: the run then goes on without the others"
            runs = read_state(path, {"runs": [str]}, advice)["runs"]
        return [Path(os.path.normpath(self.path / other)) for other in runs]

    def read_cell(self):
        if not os.path.isdir(self.path):
            raise InputError(f"there is no run folder {self.path}: check the path")
        if not os.path.isfile(self.path / "cell.toml"):
            raise InputError(f"{self.path} has no cell.toml, so it is not a run folder: check the path")
        path = self.path / "cell.toml"
        cell, values = load_toml(Cell, path), read_toml(path)
        whole = cell.to_dict()
        lost = [name for name in whole if name not in values]
        tables = {name: table for name, table in whole.items() if isinstance(table, dict)}
        for name, table in tables.items():
            lost += [f"{name}.{leaf}" for leaf in table if leaf not in values.get(name, {})]
        if lost:
            raise InputError(
                f"{path} has no {lost[0]}, so a part of it is lost: put it back from a copy, or delete the folder and "
                "train its cell again"
            )
        return cell

    @property
    def begun(self):
        return os.path.isfile(self.path / "cell.toml")

    @property
    def finished(self):
        return os.path.isfile(self.path / "results.json")

    @property
    def has_saved(self):
        """Whether there is more of the run than its cell: results, a state, or the names of those trained with it."""
        return self.finished or self.state.exists() or (self.path / "population.json").exists()

    def tidy(self):
        """Delete the state of a finished run, which is there if it was killed after it wrote its results."""
        if self.finished:
            with contextlib.suppress(OSError):
                self.state.unlink(missing_ok=True)

    @property
    def state(self):
        return self.path / "state.safetensors"

    def read_results(self):
        path = self.path / "results.json"
        advice = f"delete it, then finish the run again with {to_type('train', '--resume', self.path)}"
        return read_state(path, RESULTS, advice)

    def last_step(self):
        """The last step that metrics.jsonl has, or 0. Its last line may be half a line: the run was killed."""
        path, step = self.path / "metrics.jsonl", 0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for line in path.read_text(encoding="utf-8").splitlines():
                step = int(parse_json(line)["step"])
        return step

    def start_metrics(self, step, steps):
        """Open metrics.jsonl for appending, with only the lines of what the state after `step` of `steps` holds.

        Tests before the first step and after the last run again, so their lines are left out. Raises InputError for a
        file whose lines are not of a run. The last may be half a line: the run was killed.
        """
        path = self.path / "metrics.jsonl"
        advice = "delete it and go on: what it shows of the steps before is lost, and no result changes"
        try:
            *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
            lines = [parse_json(line) for line in lines]
            for line in lines:
                check_shape(line, {"kind": str, "step": int}, "a line")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: {error}; {advice}") from None
        here = ("step", "test") if 0 < step < steps else ("step",)
        kept = [line for line in lines if line["step"] < step or line["step"] == step and line["kind"] in here]
        files.write_jsonl(path, kept)
        self._metrics = open(path, "a", encoding="utf-8", newline="\n")

    def log(self, kind, record):
        """Add a line of a kind to metrics.jsonl. Does nothing in a process that has not opened it."""
        if self._metrics is None:
            return
        self._metrics.write(json.dumps({"kind": kind} | record, allow_nan=False) + "\n")
        self._metrics.flush()
