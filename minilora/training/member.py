"""A member: one cell on its way from its rows to its results. `train.py` leads its members through the stages below.

Members that are trained together share a `Setting`: base, tokenizer and device. All that is a member's own is here:
rows, injection, order, adapter, head, and the run folder.
"""

import contextlib
import math
import time

import numpy as np

from minilora import console, files, parallel
from minilora.cell import PURPOSES
from minilora.data import batches, injection
from minilora.data.rows import fingerprint_rows, rows_of
from minilora.errors import TrainingError
from minilora.kernels.dropout import shifted
from minilora.lora import merging, storage
from minilora.lora.adapter import adapter_of
from minilora.lora.layer import attach, detach, named_layers
from minilora.lora.peft import to_peft
from minilora.lora.targets import describe_slots, plan_slots
from minilora.runs.record import check_inputs, hardware, peak_memory, trainable, versions
from minilora.runs.text import injection_lines, results_table
from minilora.seeds import number_of
from minilora.tasks.find import find_task
from minilora.training import optimizers
from minilora.training.feed import Schedule
from minilora.training.limit import training_flops
from minilora.training.state import load_state, read_state, save_state


class Member:
    def __init__(self, cell, run):
        self.cell, self.run = cell, run
        self.error = None  # a TrainingError, once it diverged
        self.results = None

    # --- before the base is loaded

    def prepare(self, setting):
        """The rows, and the triggers that go into some of them. Raises InputError for all that can be refused."""
        cell, self.setting = self.cell, setting
        self.slots = plan_slots(setting.spec, cell)
        self.task = find_task(cell, setting.spec, setting.tokenizer)
        self.clean, test = self.task.usable(*rows_of(cell))
        seed = cell.seed_for("inject")
        injected = injection.inject(self.clean, cell.inject, seed, self.task.visible(self.clean))
        injection.check_strings(injected.records, setting.tokenizer.known, "training")
        self.encoded, self.answers = self.task.encode(injected.rows)
        self.injected = injection.mark_survival(injected, self.encoded.kept[injected.index])
        self.tests = self.task.build_tests(self.clean, test, seed)
        self.lengths = np.diff(self.encoded.offsets)
        self.schedule = Schedule(self.lengths, cell)
        self.inputs = setting.inputs | {
            "train": fingerprint_rows(self.clean),
            "test": fingerprint_rows(test),
            "injected": fingerprint_rows(self.injected.rows),
        }
        self.meters = {"step": 0, "seconds": 0.0, "tokens": 0}
        if self.run.state.exists():
            self.meters = read_state(self.run.state)[1]

    def restart(self):
        """Forget the state that was saved, and begin again."""
        self.run.state.unlink(missing_ok=True)
        self.meters = {"step": 0, "seconds": 0.0, "tokens": 0}

    # --- with the base

    def begin(self, base):
        """The adapter and the head at their start; the base is left bare."""
        cell = self.cell
        if cell.start:
            self.inputs["start"] = storage.begin(base, cell, self.slots)
        elif self.slots:
            attach(base, self.slots, cell.dropout, cell.seed_for("init"), cell.variant, cell.init)
        for _, layer in named_layers(base):
            layer.form = cell.form
        self.model = self.task.model(base, self.clean.label_names)
        self.task.prepare(self.model, self.encoded, self.answers)
        self.parameters = trained_parameters(self.model, cell)
        self.certificate = trainable(self.parameters)
        self.layers = dict(named_layers(base))
        detach(base)

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
        for line in describe_slots(self.slots, spec, cell.variant):
            yield f"adapter    {line}"
        for line in injection_lines(self.injected, cell.inject):
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
                self.meters = load_state(self.run.state, flat, optimizer, k)
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
            key = number_of(f"{self.cell.seed_for('dropout')}/{step}/{number}")
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
        rate = optimizers.learning_rate(self.cell, step, self.schedule.steps)
        self.run.log({"step": step + 1, "loss": loss, "norm": norm, "lr": rate, "rows": rows, "tokens": tokens,
                      "seconds": round(seconds, 3)})  # fmt: skip
        self.meters["seconds"] += seconds
        self.meters["tokens"] += tokens
        return rows, tokens

    def evaluate(self, model, step):
        """Run the tests after `step` steps, and log them."""
        figures, _ = self.task.run_tests(model, self.tests, self.cell.batch_size)
        self.run.log({"step": step, "tests": figures})
        console.say(f"after step {step:,}:\n{results_table(figures)}")

    def save_state(self, flat, optimizer, k, step):
        self.meters["step"] = step
        if parallel.first():
            save_state(self.run.state, flat, optimizer, k, self.meters)

    def finish(self, model, start, start_up, rate, size, progress):
        """Save the adapter that is on `model`, run the tests, and write the results."""
        cell, run, clean = self.cell, self.run, self.clean
        if parallel.first():
            storage.save(run.path / "adapter", model, cell, clean.label_names)
        elif parallel.is_sharded(model.base) and cell.method == "lora":
            to_peft(adapter_of(model.base), model.base)  # may gather weights, which takes all processes
        began = time.perf_counter()
        figures, outcomes = self.task.run_tests(model, self.tests, cell.batch_size, progress)
        evaluation_seconds = time.perf_counter() - began
        if parallel.first():
            files.write_jsonl(run.path / "predictions.jsonl", self.task.predictions(self.tests, outcomes))
        length, steps, seconds = self.lengths.mean(), self.schedule.steps, self.meters["seconds"]
        floor = training_flops(self.setting.spec, self.slots, cell.method, length) * length  # operations a row
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
            "skipped_rows": {"train": list(clean.skipped), "test": list(self.tests[0].rows.skipped)},
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
        merged = merging.write(
            folder, model, self.cell, self.clean.label_names, source=self.setting.folder, tokenizer=self.setting.words
        )
        console.say(f"merged     {folder}: {merging.describe(merged)}")


def trained_parameters(model, cell):
    """Mark what the cell trains on `model` (a task's) and return it: {name: parameter}."""
    model.requires_grad_(cell.method == "full")
    for _, layer in named_layers(model):
        for name in layer.variant.trains:
            getattr(layer, name).requires_grad_(True)
    if cell.head is not None:  # the lm task has none
        model.classifier.requires_grad_(cell.head == "trained")
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
