"""A member: one cell on its way from its rows to its results, through the stages below.

Members that are trained together share a `Setting`: base, tokenizer and device. All that is a member's own is here:
rows, injection, order, adapter, head, and the run folder.
"""

import contextlib
import math
import time

import numpy as np
import torch

from minilora import console, files, mitigate, parallel
from minilora.cell import Cell
from minilora.data import given, injection
from minilora.data.rows import fingerprint_rows, rows_of
from minilora.errors import InputError, TrainingError
from minilora.fields import grouped
from minilora.lora import merging, storage
from minilora.lora.adapter import adapter_of
from minilora.lora.layer import attach, detach, merged_meanwhile, named_layers
from minilora.lora.peft import to_peft
from minilora.lora.targets import describe_slots, plan_slots
from minilora.mitigate import Mitigate
from minilora.mitigation import rows as mitigation_rows
from minilora.mitigation.masktune import masktune
from minilora.mitigation.robust import GroupDRO
from minilora.runs.bases import Shared
from minilora.runs.card import card
from minilora.runs.panel import Opened, read_panel, run_panel
from minilora.runs.record import check_inputs, figure_lines, hardware, peak_memory, trainable, versions
from minilora.runs.text import injection_lines, mitigation_line, warnings
from minilora.tasks.find import find_task
from minilora.training import optimizers
from minilora.training.feed import Schedule, encode_needed, key_of_rows, rows_looked_at
from minilora.training.limit import training_flops
from minilora.training.state import load_state, misfit, read_state, save_state

# What depends on which fields: a cell's rows (their labels may be those of triggers), injected rows, and tests.
ROWS = (*(name for group in ("base", "data", "task") for name in grouped(Cell, group)), "inject.sources",
        "inject.mode", "seed_split")  # fmt: skip
INJECTED = (*ROWS, *grouped(Cell, "injection"))
CHANGED = (*INJECTED, *grouped(Cell, "mitigation"))
TESTS = tuple(name for name in INJECTED if name not in {"inject.proportion", "inject.rows"})


class Member:
    def __init__(self, cell, run):
        self.cell, self.run = cell, run
        self.error = None  # a TrainingError, once it diverged
        self.watch_every = 0  # steps between copies of what is trained, see `loop.Options`
        self.results = None

    # --- before the base is loaded

    def prepare(self, setting, shared=None):
        """The rows, and the triggers that go into some of them. Raises InputError for all that can be refused.

        What other cells made of the same rows is taken from `shared` (`runs.bases.Shared`).
        """
        cell, self.setting, self.shared = self.cell, setting, shared or Shared()
        self.slots = plan_slots(setting.spec, cell)
        self.task = find_task(cell, setting.spec, setting.tokenizer)
        self.clean, test, validation, inputs = self.shared("rows", cell, ROWS, make=self.read_rows)
        seed, looked_at = cell.seed_for("inject"), rows_looked_at(len(self.clean), cell)
        if cell.mitigate.method in mitigate.ROWS:
            looked_at = None
        if cell.mitigate.method in ("group-dro", "masktune"):
            parallel.refuse(cell.mitigate.method, "start it with python")
        self.injected, self.encoded, self.answers, injected = self.shared(
            "injected", cell, INJECTED, seed, key_of_rows(looked_at), make=lambda: self.inject(looked_at)
        )
        self.rows, self.mitigation = self.injected.rows, {"method": cell.mitigate.method}
        self.inputs = setting.inputs | inputs | {"injected": injected}
        if cell.mitigate.method in mitigate.ROWS:
            self.rows, self.encoded, self.answers, self.mitigation, changed = self.shared(
                "changed", cell, CHANGED, seed, make=self.change
            )
            self.inputs["changed"] = changed
        self.tests = self.shared("tests", cell, TESTS, seed, make=lambda: self.task.build_tests(self.clean, test, seed))
        self.validation = self.shared(
            "validation", cell, TESTS, seed,
            make=lambda: [one for rows in validation for one in self.task.build_tests(self.clean, rows, seed)
                          if one.name in ("clean", "trigger")],
        )  # fmt: skip
        self.forms = read_panel(cell.panel) if cell.panel else []
        if self.forms and not cell.inject.sources:
            raise InputError("panel goes with a trigger, but the cell injects nothing: drop it, or give a source")
        self.lengths = np.diff(self.encoded.offsets)  # 0 for rows that no step looks at
        self.mean_length = float(self.lengths[self.lengths > 0].mean())
        self.schedule = Schedule(self.lengths, cell)

    def read_rows(self):
        """(Training, test rows, [validation rows] or [], the hash of each)."""
        sides = self.task.usable(*rows_of(self.cell))
        hashes = dict(zip(("train", "test", "validation"), map(fingerprint_rows, sides)))
        return sides[0], sides[1], sides[2:], hashes

    def inject(self, looked_at):
        """(`Injected` training rows, their tokens, what the model is to answer, their hash)."""
        task, seed = self.task, self.cell.seed_for("inject")
        injected = injection.inject(self.clean, self.cell.inject, seed, task.visible(self.clean))
        injection.check_strings(injected.records, self.setting.tokenizer.known, "training")
        encoded, answers = encode_needed(task, injected, looked_at)
        injected = injection.mark_survival(injected, encoded.kept[injected.index])
        return injected, encoded, answers, fingerprint_rows(injected.rows)

    def change(self):
        """(The rows that a mitigation leaves to train on, their tokens, answers, its report, their hash)."""
        cell, rows = self.cell, self.injected.rows
        changed = mitigation_rows.change(rows, cell.mitigate, cell.seed_for("inject"), self.task.visible(rows))
        encoded, answers = self.task.encode(changed.rows)
        return changed.rows, encoded, answers, changed.report, fingerprint_rows(changed.rows)

    @property
    def read(self):
        """What the task reads of the tests."""
        seed = self.cell.seed_for("inject")
        return self.shared("read tests", self.cell, TESTS, seed, make=lambda: self.task.read_tests(self.tests))

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
            if cell.mitigate.init_scale != 1:
                layer.A.data.mul_(cell.mitigate.init_scale)
        self.model = self.task.model(base, self.clean.label_names)
        self.task.prepare(self.model, self.encoded, self.answers)
        if cell.mitigate.method == "group-dro":
            self.robust()
        self.parameters = trained_parameters(self.model, cell)
        self.certificate = trainable(self.parameters)
        self.layers = dict(named_layers(base))
        detach(base)

    def robust(self):
        """Let the loss be group DRO's: the answers then say the groups too."""
        names = mitigation_rows.named_groups(self.rows.label_names)
        groups, found = mitigation_rows.groups_of(self.rows, self.cell.mitigate)
        counts = np.bincount(groups, minlength=len(names))
        self.answers = torch.from_numpy(groups)
        self.model.loss = GroupDRO(torch.from_numpy(counts > 0), self.cell.mitigate.step).to(self.setting.device)
        self.mitigation |= {"groups": dict(zip(names, counts.tolist(), strict=True))} | mitigation_rows.listed(found)

    def tune(self, population, k):
        """What is done as member k after the last step and before the tests: MaskTune."""
        if self.cell.mitigate.method != "masktune":
            return
        began = time.perf_counter()
        with population.only(k) as model:
            try:
                found = masktune(model, self.setting.tokenizer, self.encoded, self.answers, self.cell)
            except TrainingError as error:
                return self.fail(f"MaskTune: {error}", self.schedule.steps - 1)
            values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)
        self.mitigation |= found | {"seconds": time.perf_counter() - began}

    def describe(self):
        """What is about to happen, in lines."""
        cell, spec, clean = self.cell, self.setting.spec, self.clean
        names = [console.short(name) for name in clean.label_names]
        method = f"{cell.variant}, start {cell.start or cell.init}" if cell.method == "lora" else cell.method
        rows = f"{len(clean):,} training and {len(self.tests[0].rows):,} test rows of {self.mean_length:.1f} tokens"
        size = f"{len(spec.layers)} layers of width {spec.width}"
        how = "" if cell.products == cell.dtype else f", {cell.products} products"
        how += ", deterministic" if cell.deterministic == "on" else ""
        yield f"base       {cell.model} ({spec.family}, {size}, {cell.dtype}{how}, {self.setting.device})"
        yield f"data       {cell.data}: {rows}"
        yield f"labels     {', '.join(names[:6])}{', ...' * (len(names) > 6)}"
        yield f"task       {self.task.describe()}"
        yield f"method     {method}"
        yield f"trained    {self.certificate['count']:,} parameters"
        for line in describe_slots(self.slots, spec, cell.variant):
            yield f"adapter    {line}"
        for line in injection_lines(self.injected, cell.inject):
            yield f"injection  {line}"
        if cell.mitigate != Mitigate():
            yield f"mitigation {mitigation_line(cell.mitigate, self.mitigation)}"
        for line in optimizers.warnings(cell, self.schedule.steps):
            yield f"warning    {line}"

    # --- in its run folder

    def hold(self):
        """Lock the run folder while training, and write there what is known before; a context."""
        return self._hold() if parallel.first() else contextlib.nullcontext()

    @contextlib.contextmanager
    def _hold(self):
        with self.run.hold(self.cell):
            files.write_jsonl(self.run.path / "injected.jsonl", self.injected.to_dicts())
            files.write_json(self.run.path / "trainable.json", self.certificate)
            if self.cell.data.startswith(given.PREFIX):
                given.copy_to(self.cell.data, self.run.path)
            yield

    def write_population(self, members):
        """Write down who is trained together with this member."""
        if parallel.first():
            self.run.write_population([member.run.path for member in members])

    def read_meters(self):
        """The step that the saved state is of, 0 where there is none. Raises InputError for a state of another run."""
        self.meters = self.no_meters()
        if self.run.state.exists():
            self.meters = read_state(self.run.state)[1]
            if self.meters["step"] > self.schedule.steps:
                raise misfit(self.run.state, f"it is after step {self.meters['step']:,} of {self.schedule.steps:,}")
            check_inputs(self.inputs, self.meters["inputs"], self.cell)
        return self.meters["step"]

    def restart(self):
        """Delete the saved state, and say so: the members of its population were stopped at other steps."""
        if self.meters["step"] and parallel.first():
            step = self.meters["step"]
            console.say(f"restarts   {self.run.path}: the cells trained with it did not stop at its step {step:,}")
            self.run.state.unlink()
        self.meters = self.no_meters()

    def no_meters(self):
        return {"step": 0, "seconds": 0.0, "tokens": 0, "inputs": self.inputs, "choices": {}}

    def go_on(self, flat, optimizer, k):
        """Bring back the saved state, if there is one, as member k, and open metrics.jsonl at its step."""
        if self.meters["step"]:
            load_state(self.run.state, flat, optimizer, k)
            if "groups" in self.meters:
                self.model.loss.weights.copy_(torch.tensor(self.meters["groups"]))
        if parallel.first():
            self.run.start_metrics(self.meters["step"], self.schedule.steps)

    def log(self, step, loss, norm, seconds, on_step=None):
        """Write a step's line to metrics.jsonl; returns (rows, tokens). A loss that is not finite ends the member."""
        if self.error or step >= self.schedule.steps:
            return 0, 0
        seen = np.concatenate(self.schedule.rows_at(step))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.fail(f"the loss is {loss} and the norm of its gradient {norm} at step {step + 1}", step)
            return 0, 0
        rows, tokens = len(seen), int(self.lengths[seen].sum())
        rate = optimizers.learning_rate(self.cell, step, self.schedule.steps)
        line = {"step": step + 1, "loss": loss, "norm": norm, "lr": rate, "rows": rows, "tokens": tokens,
                "seconds": round(seconds, 3)}  # fmt: skip
        self.run.log("step", line)
        if on_step and parallel.first():
            on_step(**line)
        self.meters["seconds"] += seconds
        self.meters["tokens"] += tokens
        return rows, tokens

    def fail(self, error, step):
        """The member ends: a number was not finite in or after step `step` (from 0; -1: before the first). Its `error`
        says so."""
        seen = np.concatenate(self.schedule.rows_at(step)) if step >= 0 else []
        ids = [self.rows.ids[i] for i in seen]
        self.run.log("error", {"step": step + 1, "error": error, "rows": ids})
        kept = self.meters["step"]
        kept = f"the state after step {kept} is kept" if kept else "no state was saved"
        rows, advice = (f" (rows {', '.join(ids)})", "try a lower --lr") if ids else ("", "try another --model")
        self.error = TrainingError(f"{error}{rows}; {kept} in {self.run.path}; {advice}")

    def check_weights(self, step):
        """End the member if what it trains is not finite after step `step` (from 0)."""
        for name, parameter in self.parameters.items():
            if not parameter.isfinite().all():
                return self.fail(f"{name} is not finite after step {step + 1}", step)

    def judge(self, scores, step):
        """Log what the tests gave after `step` steps: (figures, outcomes), or None for a member that diverged."""
        try:
            figures, outcomes = self.task.judge(self.tests, self.read, scores)
        except TrainingError as error:
            return self.fail(f"{error} after step {step}", step - 1)
        self.log_tests(step, figures)
        return figures, outcomes

    def log_tests(self, step, figures):
        """Write what the tests gave after `step` steps to metrics.jsonl, a line for each trigger label."""
        train = {"rows": len(self.rows), "trainable_parameters": self.certificate["count"]}
        for line in figure_lines({"tests": figures, "train": train, "injection": self.injected.report}):
            self.run.log("test", {"step": step} | line)

    def save_state(self, flat, optimizer, k, step):
        self.meters["step"] = step
        if self.cell.mitigate.method == "group-dro":
            self.meters["groups"] = self.mitigation["weights"] = self.model.loss.weights.tolist()
        if parallel.first():
            save_state(self.run.state, flat, optimizer, k, self.meters)

    def is_watched(self, step):
        """Whether what it trains is kept after `step` steps."""
        steps = self.schedule.steps
        return bool(self.watch_every and not self.error) and (
            step == steps or step < steps and step % self.watch_every == 0
        )

    def keep(self, tensors, step):
        """Write what is trained, {name: tensor}, after `step` steps."""
        self.run.keep(tensors, step, self.watch_every)

    def finish(self, model, job, limit, options, figures, outcomes, seconds):
        """Save the adapter that is on `model`, and write the results.

        `job`, its `limit()`, `options`: see `loop.py`. `figures` and `outcomes`: of the tests, which took `seconds`.
        """
        cell, run, clean, evaluation_seconds = self.cell, self.run, self.clean, seconds
        beside = self.test_beside(model)
        if parallel.first():
            storage.save_run(run.path, model, cell, clean.label_names)
        elif parallel.is_sharded(model.base) and cell.method == "lora":
            to_peft(adapter_of(model.base), model.base)  # may gather weights, which takes all processes
        if parallel.first():
            files.write_jsonl(run.path / "predictions.jsonl", self.task.predictions(self.tests, outcomes))
        length, steps, seconds = self.mean_length, self.schedule.steps, self.meters["seconds"]
        row_flops = training_flops(self.setting.spec, self.slots, cell.method, length) * length
        self.results = {
            "cell": {"id": cell.id} | cell.to_dict(),
            "task": self.task.record(),
            "tests": figures,
            **beside,
            "warnings": warnings(figures),
            "train": {
                "rows": len(self.rows),
                "rows_per_second": self.schedule.rows_before(steps) / seconds,
                "tokens_per_second": self.meters["tokens"] / seconds,
                "seconds": seconds,
                "population": len(job.feed.members),
                "processes": parallel.count(),
                "sharded": job.sharded,
                "peak_memory_bytes": peak_memory(self.setting.device),
                "trainable_parameters": self.certificate["count"],
                "steps": steps,
                "limit_rows_per_second": None if limit is None else limit / row_flops,
                "matmul_flops_per_second": limit,
                "start_up_seconds": job.began - options.start,
                "evaluation_seconds": evaluation_seconds,
                "total_seconds": time.perf_counter() - options.start,
            },
            "injection": self.injected.report,
            **({"mitigation": self.mitigation} if cell.mitigate.method != "none" else {}),
            "skipped_rows": {"train": list(clean.skipped), "test": list(self.tests[0].rows.skipped)},
            "injected_rows_truncated": sum(not record.survives for record in self.injected.records),
            "inputs": self.inputs,
            "choices": self.meters["choices"],
            "seeds": cell.seeds,
            "versions": versions(),
            "hardware": hardware(self.setting.device),
        }
        if parallel.first():
            answers = self.task.answers(clean.label_names)
            text = card(cell, self.results, self.injected, clean.label_names, answers)
            files.write_text(run.path / "adapter" / "README.md", text)
            run.finish(self.results)
            if options.merge_to is not None:
                self.merge_to(options.merge_to, model)

    def test_beside(self, model):
        """What results.json has beside the tests, where the cell asks for it: the words that were taken out of all
        rows; the figures of the validation rows, as `tests` has them but only as clean and with each trigger, with
        their ids; and the lines of the panel."""
        found = {} if self.clean.stripped is None else {"stripped_words": self.clean.stripped}
        with merged_meanwhile(model):
            if self.validation:
                figures, _ = self.task.run_tests(model, self.validation, self.cell.batch_size)
                found["validation"] = figures | {"ids": list(self.validation[0].rows.ids)}
            if self.forms:
                run = Opened(self.cell, self.run.path, self.task, model, self.setting.tokenizer, self.tests)
                found["panel"] = run_panel(run, self.forms)
        return found

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
