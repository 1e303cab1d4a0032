"""The one job of all peers, in a folder: written once by the command, read by each peer's process."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minilora import files
from minilora.cell import Cell
from minilora.fields import load_toml


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
        return cls(folder, load_toml(Cell, folder / "cell.toml"), train, tests, **facts)

    @property
    def steps(self):
        return steps(self.cell, len(self.train))

    @cached_property
    def device(self):
        from minilora.parallel import pick_device

        return pick_device(self.cell.device)

    @cached_property
    def _tokenizer(self):
        from minilora.base import tokenizer

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

    from minilora.base import checkpoint, families, model, tokenizer
    from minilora.base.source import resolve_base, resolve_tokenizer
    from minilora.data import injection
    from minilora.data.rows import fingerprint_rows, rows_of
    from minilora.errors import InputError
    from minilora.lora import storage
    from minilora.lora.layer import attach
    from minilora.lora.targets import plan_slots
    from minilora.tasks.find import find_task

    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    base = resolve_base(cell.model, cell.revision, cell.tokenizer)
    words = resolve_tokenizer(cell.tokenizer, base)
    spec = families.read_spec(checkpoint.read_config(base))
    slots = plan_slots(spec, cell)
    model.check_fits(spec, cell.max_length)
    text_tokenizer = tokenizer.load(words, spec.vocabulary)
    clean, test = rows_of(cell)
    if steps(cell, len(clean)) <= warm_up:
        raise InputError(
            f"{len(clean):,} rows make {steps(cell, len(clean))} steps, but the first {warm_up} are warm-up: "
            "raise --rows, or lower --warm-up"
        )
    cell_task, seed = find_task(cell, spec, text_tokenizer), cell.seed_for("inject")
    injected = injection.inject(clean, cell.inject, seed, cell_task.visible(clean))
    tests = cell_task.build_tests(clean, test, seed)
    loaded = model.load(base, getattr(torch, cell.dtype))
    classifier = cell_task.model(attach(loaded, slots, seed=cell.seed_for("init")), clean.label_names)
    storage.save(folder / "start", classifier, cell, clean.label_names)
    save_file(classifier.classifier.state_dict(), folder / "head.safetensors")
    files.write_text(folder / "cell.toml", cell.to_toml())
    files.write_json(
        folder / "job.json",
        {
            "train": as_dict(injected.rows),
            "tests": {test.key: as_dict(test.rows) for test in tests if test.name in forms},
            "base": str(base),
            "tokenizer": str(words),
            "fingerprint": fingerprint_rows(injected.rows),
            "warm_up": warm_up,
        },
    )
    return Job.read(folder)


def as_dict(rows):
    return {"ids": list(rows.ids), "texts": rows.texts, "labels": rows.labels.tolist(), "label_names": rows.label_names}


def from_dict(values):
    import numpy as np

    from minilora.data.rows import Rows

    return Rows(values["ids"], values["texts"], np.array(values["labels"]), tuple(values["label_names"]))
