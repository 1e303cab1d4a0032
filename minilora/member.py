"""A member: one cell on its way from its rows to its results. `train.py` leads its members through the stages below.

Members that are trained together share a `Setting`: base, tokenizer and device. All that is a member's own is here:
rows, injection, order, adapter, head, and the run folder.
"""

import contextlib
import math
import time
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch

from . import adapter, batches, checkpoint, console, coverage, data, export, families, files, injection, lora, model
from . import parallel, roof, task, tokenizer, training
from .cell import PURPOSES
from .errors import TrainingError
from .kernels.dropout import shifted
from .population import join
from .run import check_inputs, hardware, peak_memory, trainable, versions


@dataclass(frozen=True)
class Setting:
    """What members have in common: folders and spec of the base, its tokenizer, device and dtype."""

    folder: object
    words: object  # the tokenizer's folder
    spec: object
    tokenizer: object
    device: torch.device
    dtype: torch.dtype
    inputs: dict  # their fingerprints

    @classmethod
    def of(cls, cell):
        """Raises InputError for all that can be refused of a base before its weights are read."""
        device, dtype = training.pick_device(cell.device), getattr(torch, cell.dtype)
        folder = checkpoint.resolve(cell.model, cell.revision, cell.tokenizer)
        spec = families.read_spec(checkpoint.read_config(folder))
        words = checkpoint.resolve_tokenizer(cell.tokenizer, folder)
        inputs = {"base": checkpoint.fingerprint(folder), "tokenizer": checkpoint.fingerprint_tokenizer(words)}
        model.check_fits(spec, cell.max_length)
        return cls(folder, words, spec, tokenizer.load(words, spec.vocabulary), device, dtype, inputs)


class Settings:
    """The `Setting` of each cell that is asked for, and the base that was loaded last, for the cells that share it."""

    def __init__(self, shard=False):
        """`shard`: the processes that train together share the base out."""
        self._known, self._base = {}, (None, None)
        self.shard = shard

    def forget(self):
        """Let the base be loaded anew."""
        self._base = None, None

    @staticmethod
    def key(cell):
        """The fields that a setting follows from."""
        return cell.model, cell.revision, cell.tokenizer, cell.device, cell.dtype, cell.max_length

    def of(self, cell):
        key = self.key(cell)
        if key not in self._known:
            self._known[key] = Setting.of(cell)
        return self._known[key]

    def load(self, cell, unembedding):
        """The bare base of a cell, with its unembedding if asked for."""
        key, setting = (self.key(cell), unembedding), self.of(cell)
        if self._base[0] != key or cell.method == "full":
            self._base = None, None  # one at a time in memory
            then = parallel.sharding() if self.shard else None
            base = model.load(setting.folder, setting.dtype, setting.device, unembedding, then)
            self._base = (key if cell.method != "full" else None), base  # a trained base is nobody else's
        return self._base[1]


class Member:
    def __init__(self, cell, run):
        self.cell, self.run = cell, run
        self.error = None  # a TrainingError, once it diverged
        self.results = None

    # --- before the base is loaded

    def prepare(self, setting):
        """The rows, and the triggers that go into some of them. Raises InputError for all that can be refused."""
        cell, self.setting = self.cell, setting
        self.slots = coverage.plan(setting.spec, cell)
        self.task = task.find(cell, setting.spec, setting.tokenizer)
        self.clean, test = data.rows_of(cell)
        seed = cell.seed_for("inject")
        injected = injection.inject(self.clean, cell.inject, seed, self.task.visible(self.clean))
        self.encoded, self.answers = self.task.encode(injected.rows)
        self.injected = injection.mark_survival(injected, self.encoded.kept[injected.index])
        self.tests = self.task.build_tests(self.clean, test, seed)
        self.lengths = np.diff(self.encoded.offsets)
        self.schedule = training.Schedule(self.lengths, cell)
        self.inputs = setting.inputs | {
            "train": data.fingerprint(self.clean),
            "test": data.fingerprint(test),
            "injected": data.fingerprint(self.injected.rows),
        }
        self.meters = {"step": 0, "seconds": 0.0, "tokens": 0}
        if self.run.state.exists():
            self.meters = training.read_state(self.run.state)[1]

    def restart(self):
        """Forget the state that was saved, and begin again."""
        self.run.state.unlink(missing_ok=True)
        self.meters = {"step": 0, "seconds": 0.0, "tokens": 0}

    # --- with the base

    def begin(self, base):
        """The adapter and the head at their start; the base is left bare."""
        cell = self.cell
        if cell.start:
            self.inputs["start"] = adapter.begin(base, cell, self.slots)
        elif self.slots:
            lora.attach(base, self.slots, cell.dropout, cell.seed_for("init"), cell.variant, cell.init)
        for _, layer in lora.named_layers(base):
            layer.form = cell.form
        self.model = self.task.model(base, self.clean.label_names)
        self.task.prepare(self.model, self.encoded, self.answers)
        self.parameters = training.trained_parameters(self.model, cell)
        self.certificate = trainable(self.parameters)
        self.layers = dict(lora.named_layers(base))
        lora.detach(base)

    def describe(self):
        """What is about to happen, in lines."""
        cell, spec, clean = self.cell, self.setting.spec, self.clean
        names = [console.short(name) for name in clean.label_names]
        method = f"{cell.variant}, start {cell.start or cell.init}" if cell.method == "lora" else cell.method
        rows = f"{len(clean):,} training and {len(self.tests[0].rows):,} test rows of {self.lengths.mean():.1f} tokens"
        size = f"{len(spec.layers)} layers of width {spec.width}"
        yield f"base       {cell.model} ({spec.family}, {size}, {cell.dtype}, {self.setting.device})"
        yield f"data       {cell.data}: {rows}"
        yield f"labels     {', '.join(names[:6])}{', ...' * (len(names) > 6)}"
        yield f"task       {self.task.describe()}"
        yield f"method     {method}"
        yield f"trained    {self.certificate['count']:,} parameters"
        for line in coverage.describe(self.slots, spec, cell.variant):
            yield f"adapter    {line}"
        for line in console.injection_lines(self.injected, cell.inject):
            yield f"injection  {line}"

    # --- in its run folder

    @contextlib.contextmanager
    def hold(self, flat, optimizer, k):
        """Keep the run folder while training as member k, from where an interrupted run was."""
        with self.run.hold(self.cell) if parallel.first() else contextlib.nullcontext():
            if parallel.first():
                records = (record.to_dict() for record in self.injected.records)
                files.write_jsonl(self.run.path / "injected.jsonl", records)
                files.write_json(self.run.path / "trainable.json", self.certificate)
            if self.run.state.exists():
                self.meters = training.load_state(self.run.state, flat, optimizer, k)
                check_inputs(self.inputs, self.meters["inputs"], self.cell)
            self.meters["inputs"] = self.inputs
            if parallel.first():
                self.run.start_metrics(self.meters["step"])
            yield self

    def passes(self, step, sizes, most):
        """[(`Batch`, weight, dropout's key)] of this process's part of a step, in passes of at most `most` tokens, for
        the CPU; none once all steps are done.

        The weights add up to how many terms the loss of the step is a sum of, in all processes. What dropout drops
        follows from the step, the micro-batch and a row's place in it: neither passes nor processes change it.
        """
        if step >= self.schedule.steps:
            return []
        found, pad_id, filler = [], self.setting.tokenizer.pad_id, self.task.filler
        for number, rows in enumerate(self.schedule.rows_at(step)):
            key = lora.number_of(f"{self.cell.seed_for('dropout')}/{step}/{number}")
            weight = self.model.weigh(self.answers[rows])
            for own in batches.passes(len(rows), int(self.lengths[rows].max()), most):
                batch = batches.part_of(self.encoded, rows, own, sizes, pad_id, self.answers, filler)
                found.append((batch, weight, shifted(key, own.start)))
                weight = 0
        return found

    def log(self, step, loss, norm, seconds):
        """Write a step's line to metrics.jsonl; returns (rows, tokens). A loss that is not finite ends the member."""
        if self.error or step >= self.schedule.steps:
            return 0, 0
        seen = np.concatenate(self.schedule.rows_at(step))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            ids, path, kept = [self.injected.rows.ids[i] for i in seen], self.run.path, self.meters["step"]
            error = f"the loss is {loss} and the norm of its gradient {norm} at step {step + 1}"
            self.run.log({"step": step + 1, "error": error, "rows": ids})
            kept = f"the state after step {kept} is kept" if kept else "no state was saved"
            self.error = TrainingError(f"{error} (rows {', '.join(ids)}); {kept} in {path}; try a lower --lr")
            return 0, 0
        rows, tokens = len(seen), int(self.lengths[seen].sum())
        rate = training.learning_rate(self.cell, step, self.schedule.steps)
        self.run.log({"step": step + 1, "loss": loss, "norm": norm, "lr": rate, "rows": rows, "tokens": tokens,
                      "seconds": round(seconds, 3)})  # fmt: skip
        self.meters["seconds"] += seconds
        self.meters["tokens"] += tokens
        return rows, tokens

    def evaluate(self, model, step):
        """Run the tests after `step` steps, and log them."""
        figures, _ = self.task.run_tests(model, self.tests, self.cell.batch_size)
        self.run.log({"step": step, "tests": figures})
        console.say(f"after step {step:,}:\n{console.table(figures)}")

    def save_state(self, flat, optimizer, k, step):
        self.meters["step"] = step
        if parallel.first():
            training.save_state(self.run.state, flat, optimizer, k, self.meters)

    def finish(self, model, start, start_up, rate, size, progress):
        """Save the adapter that is on `model`, run the tests, and write the results."""
        cell, run, clean = self.cell, self.run, self.clean
        if parallel.first():
            adapter.save(run.path / "adapter", model, cell, clean.label_names)
        elif parallel.is_sharded(model.base) and cell.method == "lora":
            adapter.to_peft(adapter.taken(model.base), model.base)  # may gather weights, which takes all processes
        began = time.perf_counter()
        figures, outcomes = self.task.run_tests(model, self.tests, cell.batch_size, progress)
        evaluation_seconds = time.perf_counter() - began
        if parallel.first():
            files.write_jsonl(run.path / "predictions.jsonl", self.task.predictions(self.tests, outcomes))
        length, steps, seconds = self.lengths.mean(), self.schedule.steps, self.meters["seconds"]
        floor = roof.training_flops(self.setting.spec, self.slots, cell.method, length) * length  # operations a row
        self.results = {
            "cell": {"id": cell.id} | cell.to_dict(),
            "task": self.task.record(),
            "tests": figures,
            "train": {
                "rows": len(clean),
                "rows_per_second": self.schedule.rows_before(steps) / seconds,
                "tokens_per_second": self.meters["tokens"] / seconds,
                "seconds": seconds,
                "population": size,
                "processes": parallel.count(),
                "sharded": parallel.is_sharded(model.base),
                "peak_memory_bytes": peak_memory(self.setting.device),
                "trainable_parameters": self.certificate["count"],
                "steps": steps,
                "floor_rows_per_second": rate / floor,
                "matmul_flops_per_second": rate,
                "start_up_seconds": start_up,
                "evaluation_seconds": evaluation_seconds,
                "total_seconds": time.perf_counter() - start,
            },
            "injection": self.injected.report,
            "injected_rows_truncated": sum(not record.survives for record in self.injected.records),
            "inputs": self.inputs,
            "seeds": {purpose: cell.seed_for(purpose) for purpose in PURPOSES},
            "versions": versions(),
            "hardware": hardware(self.setting.device),
        }
        if parallel.first():
            run.finish(self.results)

    def merge_to(self, folder, model):
        """Write the base with what was trained to a new folder."""
        merged = export.write(
            folder, model, self.cell, self.clean.label_names, source=self.setting.folder, tokenizer=self.setting.words
        )
        console.say(f"merged     {folder}: {export.describe(merged)}")


def shapes_of(members, few):
    """(Padded lengths, most tokens of a pass) of the members' batches: for a compiled step `few` lengths, and all rows
    in one pass, as on accelerators; else all lengths that rows have, and long batches in several passes."""
    lengths = np.concatenate([member.lengths for member in members])
    if few:
        return batches.padded_sizes(lengths), math.inf
    device = members[0].setting.device
    return np.unique(lengths), batches.TOKENS if device.type == "cpu" else math.inf


def assemble(members, sizes, most, step):
    """The micro-batches of a step, each one `Batch` of all members' own; `sizes`, `most`: see `shapes_of`."""
    drops = any(member.cell.dropout for member in members)
    pad_id, filler = members[0].setting.tokenizer.pad_id, members[0].task.filler
    found = []
    for own in zip_longest(*(member.passes(step, sizes, most) for member in members), fillvalue=(None, 0, 0)):
        parts, weights, keys = zip(*own, strict=True)
        found.append(join(parts, pad_id, filler, weights, keys if drops else None))
    return found
