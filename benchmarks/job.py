"""The one job of all peers, in a folder: written once by the command, read by each peer's process."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minilora import files, options
from minilora.cell import Cell


@dataclass(frozen=True)
class Job:
    """`cell`, its injected training rows and forms of its test rows, and where base, tokenizer and start lie."""

    folder: Path
    cell: Cell
    train: object  # data.Rows
    tests: dict  # {"clean", "trigger LABEL" or "placebo": data.Rows}
    base: str
    tokenizer: str
    fingerprint: str  # of the injected rows, see data.fingerprint
    warm_up: int  # steps

    @classmethod
    def read(cls, folder):
        folder = Path(folder)
        facts = read_json(folder / "job.json")
        train, tests = (
            from_dict(facts.pop("train")),
            {name: from_dict(rows) for name, rows in facts.pop("tests").items()},
        )
        return cls(folder, options.load(Cell, folder / "cell.toml"), train, tests, **facts)

    @property
    def steps(self):
        return steps(self.cell, len(self.train))

    @cached_property
    def device(self):
        from minilora.training import pick_device

        return pick_device(self.cell.device)

    @cached_property
    def _tokenizer(self):
        from minilora import tokenizer

        return tokenizer.load(self.tokenizer)

    @property
    def pad_id(self):
        return self._tokenizer.pad_id

    def encode(self, rows):
        """(tokens of rows by minilora, `tokenizer.Encoded`; labels int64 [rows])."""
        import torch

        return self._tokenizer.encode(rows.texts, self.cell.max_length), torch.from_numpy(rows.labels)


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def steps(cell, rows):
    return cell.epochs * -(-rows // cell.batch_size)


def write(cell, folder, warm_up, forms=("clean",)):
    """Write the job of `cell`, with these forms of its test rows, and return it.

    The start is what train.py would begin with, in PEFT's format.
    """
    import torch
    from safetensors.torch import save_file

    from minilora import adapter, checkpoint, coverage, data, families, injection, lora, model, task, tokenizer
    from minilora.errors import InputError

    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    base = checkpoint.resolve(cell.model, cell.revision, cell.tokenizer)
    words = checkpoint.resolve_tokenizer(cell.tokenizer, base)
    spec = families.read_spec(checkpoint.read_config(base))
    slots = coverage.plan(spec, cell)
    model.check_fits(spec, cell.max_length)
    text_tokenizer = tokenizer.load(words, spec.vocabulary)
    clean, test = data.rows_of(cell)
    if steps(cell, len(clean)) <= warm_up:
        raise InputError(
            f"{len(clean):,} rows make {steps(cell, len(clean))} steps, but the first {warm_up} are warm-up: "
            "raise --rows, or lower --warm-up"
        )
    cell_task, seed = task.find(cell, spec, text_tokenizer), cell.seed_for("inject")
    injected = injection.inject(clean, cell.inject, seed, cell_task.visible(clean))
    tests = cell_task.build_tests(clean, test, seed)
    loaded = model.load(base, getattr(torch, cell.dtype))
    classifier = cell_task.model(lora.attach(loaded, slots, seed=cell.seed_for("init")), clean.label_names)
    adapter.save(folder / "start", classifier, cell, clean.label_names)
    save_file(classifier.classifier.state_dict(), folder / "head.safetensors")
    files.write_text(folder / "cell.toml", cell.to_toml())
    files.write_json(
        folder / "job.json",
        {
            "train": as_dict(injected.rows),
            "tests": {test.key: as_dict(test.rows) for test in tests if test.name in forms},
            "base": str(base),
            "tokenizer": str(words),
            "fingerprint": data.fingerprint(injected.rows),
            "warm_up": warm_up,
        },
    )
    return Job.read(folder)


def as_dict(rows):
    return {"ids": rows.ids, "texts": rows.texts, "labels": rows.labels.tolist(), "label_names": rows.label_names}


def from_dict(values):
    import numpy as np

    from minilora.data import Rows

    return Rows(values["ids"], values["texts"], np.array(values["labels"]), tuple(values["label_names"]))
