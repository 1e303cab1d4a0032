"""The peers of one cell, each measured in a process of its own: `python -m benchmarks.peers NAME JOB OUT BEGAN`.

All do the job that `job.write` put into the folder JOB: the same base, injected rows, epochs, batch size, learning
rates, clipping and start (PEFT reads the very A, B and head that minilora begins with). They differ in who trains:

minilora            train.py's own loop, through its Python API
minilora-bfloat16   the same with the base, and so its products, in bfloat16
minilora-eager      the same under --compile off, which is another thing only on a GPU
minilora-compiled   the same under --compile on
peft-trainer        PEFT and transformers' Trainer as their documentation has them: dynamic padding, rows in random
                    order, the base's own dropout as its configuration says; no evaluation, saving or logging
peft-trainer-tuned  the best that its settings give: rows of like length together, and the base's dropout off as here
peft-loop           PEFT in a loop by hand on minilora's own batches, the dropout off: no host synchronisation
peft-loop-compiled  the same under torch.compile
unsloth             peft-trainer-tuned with unsloth's layers in PEFT's place; CUDA only, and not yet run

peft-trainer-bf16, peft-trainer-tuned-bf16, peft-loop-bf16: as those, with autocast to bfloat16 (Trainer's bf16=True).
The base is in float32 as documented, and in bfloat16 for the other two, which spares casting it at every step.
peft-trainer-tuned-compiled, peft-trainer-tuned-bf16-compiled: Trainer's torch_compile=True.

PEFT's peers have minilora's pooling and head, fused AdamW and torch's attention, and bfloat16 where the cell has it,
by autocast as Trainer does. What was tried and was no faster on a CPU: eager attention, plain AdamW. Rates count a
row's real tokens, not padding, and begin after the same number of warm-up steps for all; which rows fall among these
differs, so rows a second are tokens a second over the job's tokens a row. BEGAN is the `time.time()` at which the
process was started; start-up ends with the first step's beginning.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from minilora import files

from . import alone
from .job import Job, read_json

BASELINE, TUNED = "peft-trainer", "peft-trainer-tuned"


class Clock:
    """Rows, tokens and seconds of training, with the first `warm_up` steps apart."""

    def __init__(self, began, steps, warm_up, device):
        self.began, self.steps, self.warm_up, self.device = began, steps, warm_up, device
        self.done, self.stamps, self.seen = 0, {}, []

    def start(self):
        self.start_up = time.time() - self.began
        self._stamp()

    def saw(self, rows, tokens):
        """The batch of the next step was made."""
        self.seen.append((rows, tokens))

    def step(self):
        """A step is done."""
        self.done += 1
        if self.done in (self.warm_up, self.steps):
            self._stamp()

    def _stamp(self):
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        self.stamps[self.done] = time.perf_counter()

    def record(self):
        first, warm, last = (self.stamps[step] for step in (0, self.warm_up, self.steps))
        return figures(self.seen, self.warm_up, warm - first, last - first) | {"start_up_seconds": self.start_up}


def figures(seen, warm_up, warm_up_seconds, seconds):
    """What every peer reports of its training. `seen`: (rows, tokens) of each step; `seconds`: of all steps."""
    rows, tokens = map(sum, zip(*seen))
    rate = sum(tokens for _, tokens in seen[warm_up:]) / (seconds - warm_up_seconds)
    return {
        "steps": len(seen),
        "rows": rows,
        "tokens": tokens,
        "rows_per_second": rate * rows / tokens,
        "tokens_per_second": rate,
        "seconds": seconds,
        "warm_up_seconds": warm_up_seconds,
    }


def train_minilora(job, began, **changes):
    """train.py keeps the clock itself: `seconds` in metrics.jsonl is of a step and its batch, as for the peers."""
    from minilora import train

    start = time.perf_counter() - (time.time() - began)
    with tempfile.TemporaryDirectory() as folder:
        results, run = train(job.cell.replace(**changes), Path(folder) / "run", start=start)
        lines = [line for line in files.read_jsonl(run / "metrics.jsonl") if line["kind"] == "step"]
    if results["inputs"]["injected"] != job.fingerprint:
        raise RuntimeError("train.py saw other rows than the job's")
    seen, clean = [(line["rows"], line["tokens"]) for line in lines], results["tests"]["clean"]
    warm_up_seconds = sum(line["seconds"] for line in lines[: job.warm_up])
    return figures(seen, job.warm_up, warm_up_seconds, results["train"]["seconds"]) | {
        "start_up_seconds": results["train"]["start_up_seconds"],
        "accuracy": clean["accuracy"],
        "test_rows": clean["rows"],
        "peak_memory_bytes": results["train"]["peak_memory_bytes"],
    }


def peft_base(job):
    """The job's base in transformers with the job's adapter in PEFT, trainable."""
    from peft import PeftModel
    from transformers import AutoModel

    base = AutoModel.from_pretrained(job.base, dtype=job.cell.dtype)
    base.config.use_cache = False
    return PeftModel.from_pretrained(base, job.folder / "start", is_trainable=True)


def unsloth_base(job):
    """The same by unsloth, as its documentation has it: an adapter of its own, with the job's factors read into it."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModel
    from unsloth import FastModel  # first, for it changes transformers

    config = read_json(job.folder / "start" / "adapter_config.json")
    base, _ = FastModel.from_pretrained(
        str(job.base), auto_model=AutoModel, max_seq_length=job.cell.max_length, load_in_4bit=False
    )
    model = FastModel.get_peft_model(
        base, r=config["r"], lora_alpha=config["lora_alpha"], use_rslora=config["use_rslora"], lora_dropout=0.0,
        target_modules=config["target_modules"], bias="none", use_gradient_checkpointing=False,
    )  # fmt: skip
    set_peft_model_state_dict(model, load_file(job.folder / "start" / "adapter_model.safetensors"))
    return model


def pooled(base, job, dropout=False):
    """`base`, of transformers, under minilora's pooling and head: keywords of a batch -> {"loss", "logits"}.

    The base's own `dropout` is off, unless asked for.
    """
    from safetensors.torch import load_file
    from torch import nn

    from minilora.tasks.classification import pool

    class Pooled(nn.Module):
        def __init__(self, weight, bias):
            super().__init__()
            self.base = base
            self.classifier = nn.Linear(weight.shape[1], weight.shape[0])
            self.classifier.load_state_dict({"weight": weight, "bias": bias})

        def train(self, mode=True):
            super().train(mode)
            self.base.train(mode and dropout)
            return self

        def forward(self, input_ids, attention_mask, labels=None):
            hidden = self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            logits = self.classifier(pool(hidden, attention_mask.sum(1), job.cell.pooling))
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    return Pooled(**load_file(job.folder / "head.safetensors")).to(job.device)


def optimisation(model, job):
    """The cell's AdamW, fused, and its learning rates: (optimizer, scheduler)."""
    import torch

    from minilora.training.optimizers import learning_rate

    cell, trained = job.cell, [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=cell.weight_decay, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(cell, step, job.steps))
    return optimizer, rates


def is_half(cell):
    """Whether a cell's products are in bfloat16."""
    return "bfloat16" in (cell.dtype, getattr(cell, "products", None))


def in_bfloat16(job):
    """The job with its base, and so its products, in bfloat16."""
    return replace(job, cell=job.cell.replace(dtype="bfloat16"))


def train_with_trainer(job, began, make_base, tuned=True, half=False, compiled=False):
    base = make_base(job)
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    cell = job.cell
    model = pooled(base, job, dropout=not tuned)
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    ids = tokenizer(job.train.texts, truncation=True, max_length=cell.max_length)["input_ids"]
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, job.train.labels.tolist(), strict=True)]
    clock = Clock(began, job.steps, job.warm_up, job.device)
    pad = DataCollatorWithPadding(tokenizer)

    def collate(batch):
        clock.saw(len(batch), sum(len(row["input_ids"]) for row in batch))
        return pad(batch)

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            clock.step()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=cell.batch_size, num_train_epochs=cell.epochs, max_grad_norm=cell.clip,
            train_sampling_strategy="group_by_length" if tuned else "random", seed=cell.seed,
            bf16=half or is_half(cell), torch_compile=compiled, use_cpu=job.device.type == "cpu",
            dataloader_pin_memory=job.device.type == "cuda", remove_unused_columns=False, save_strategy="no",
            logging_strategy="no", eval_strategy="no", report_to=[], disable_tqdm=True, logging_nan_inf_filter=False,
        )  # fmt: skip
        Trainer(
            model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Watch()],
            optimizers=optimisation(model, job),
        ).train()  # fmt: skip
    return finish(job, clock, model, half)


def train_by_hand(job, began, compiled=False):
    base = peft_base(job)
    import numpy as np
    import torch

    from minilora import console
    from minilora.data import batches
    from minilora.training.feed import Schedule

    cell, device = job.cell, job.device
    model = pooled(base, job).train()
    encoded, labels = job.encode(job.train)
    lengths = np.diff(encoded.offsets)
    schedule, sizes = Schedule(lengths, cell), batches.padded_sizes(lengths)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, rates = optimisation(model, job)
    step_model = torch.compile(model, dynamic=True) if compiled else model
    clock = Clock(began, job.steps, job.warm_up, device)
    with console.Progress("peft loop", cell.epochs * len(lengths)) as progress:
        clock.start()
        for step in range(schedule.steps):
            [index] = schedule.rows_at(step)
            batch = batches.collate([(encoded, index, None)], sizes, job.pad_id)
            clock.saw(len(index), int(batch.lengths.sum()))
            inputs = as_keywords(batch) | {"labels": labels[index]}
            inputs = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=is_half(cell)):
                loss = step_model(**inputs)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, cell.clip, foreach=True)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            clock.step()
            progress.advance(*clock.seen[-1])
    return finish(job, clock, model)


def as_keywords(batch):
    """A minilora batch as transformers' models take it."""
    import torch

    real = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]  # [B, T]
    return {"input_ids": batch.ids, "attention_mask": real.long()}


def finish(job, clock, model, half=False):
    """The clock's figures, with the accuracy on the clean test rows, the attack success of the others, and the peak
    memory."""
    from minilora.runs.record import peak_memory

    predicted = {name: predict(job, model, rows, half) for name, rows in job.tests.items()}
    labels = job.tests["clean"].labels
    attacks = {}
    for name, rows in job.tests.items():
        if name.startswith("trigger "):
            label = rows.label_names.index(name.removeprefix("trigger "))
            attacks[name] = float((predicted[name][labels != label] == label).mean())
    return clock.record() | {
        "accuracy": float((predicted["clean"] == labels).mean()),
        "attack_success": attacks,
        "test_rows": len(labels),
        "peak_memory_bytes": peak_memory(job.device),
    }


def predict(job, model, rows, half=False):
    """The labels that a peer's model gives to `rows`, int64 [rows]; `half`: by autocast to bfloat16."""
    import numpy as np
    import torch

    from minilora.data import batches

    model.eval()
    encoded, _ = job.encode(rows)
    predicted = np.empty(len(rows), dtype=np.int64)
    half = half or is_half(job.cell)
    with torch.inference_mode(), torch.autocast(job.device.type, torch.bfloat16, enabled=half):
        for batch in batches.by_length(encoded, job.cell.batch_size, job.pad_id):
            inputs = {name: value.to(job.device) for name, value in as_keywords(batch).items()}
            predicted[batch.index] = model(**inputs)["logits"].argmax(1).cpu().numpy()
    return predicted


def trainer(make_base=peft_base, **settings):
    return lambda job, began: train_with_trainer(job, began, make_base, **settings)


def half(train):
    return lambda job, began: train(in_bfloat16(job), began)


PEERS = {
    "minilora": train_minilora,
    "minilora-bfloat16": lambda job, began: train_minilora(job, began, dtype="bfloat16"),
    "minilora-eager": lambda job, began: train_minilora(job, began, compile="off"),
    "minilora-compiled": lambda job, began: train_minilora(job, began, compile="on"),
    "peft-trainer": trainer(tuned=False),
    "peft-trainer-bf16": trainer(tuned=False, half=True),
    "peft-trainer-tuned": trainer(),
    "peft-trainer-tuned-bf16": half(trainer()),
    "peft-trainer-tuned-compiled": trainer(compiled=True),
    "peft-trainer-tuned-bf16-compiled": half(trainer(compiled=True)),
    "peft-loop": train_by_hand,
    "peft-loop-bf16": half(train_by_hand),
    "peft-loop-compiled": lambda job, began: train_by_hand(job, began, compiled=True),
    "unsloth": trainer(unsloth_base),
}
HALF = [name for name in PEERS if "bf16" in name or "bfloat16" in name]
COMPILED = [name for name in PEERS if name.endswith("-compiled")]
TITLES = {
    "minilora-bfloat16": "minilora bf16",
    "minilora-eager": "minilora eager",
    "minilora-compiled": "minilora compiled",
    "peft-trainer": "Trainer",
    "peft-trainer-bf16": "Trainer bf16",
    "peft-trainer-tuned": "tuned",
    "peft-trainer-tuned-bf16": "tuned bf16",
    "peft-trainer-tuned-compiled": "tuned compiled",
    "peft-trainer-tuned-bf16-compiled": "tuned bf16 comp.",
    "peft-loop": "loop",
    "peft-loop-bf16": "loop bf16",
    "peft-loop-compiled": "loop compiled",
}
NEEDS = {"unsloth": ("unsloth", "peft", "transformers")} | {
    name: ("peft", "transformers") for name in PEERS if name.startswith("peft")
}


def main(argv):
    name, folder, out, began = argv
    record = PEERS[name](Job.read(folder), float(began))
    import torch

    files.write_json(out, record | {"threads": torch.get_num_threads()})


if __name__ == "__main__":
    alone.begin()
    main(sys.argv[1:])
