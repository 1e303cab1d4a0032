"""Train one cell: a base, an adapter, real text with an injected token; then show who controls the prediction.

python train.py                                       the default cell
python train.py --rank 16 --inject-proportion 0.05    change what you like: --help
python train.py --config FILE.toml                    a cell from a file, flags on top
python train.py --resume RUN                          go on with an interrupted run
"""

import shlex
import time

SAVE_EVERY = 100  # steps
START = time.perf_counter()

from minilora import errors, options  # noqa: E402  (the clock starts before the slow imports)
from minilora.cell import PURPOSES, Cell  # noqa: E402


def train(cell=None, out=None, *, resume=None, eval_every=0, save_every=SAVE_EVERY, merge_to=None, start=None):
    """Train `cell` into the run folder `out` (default: one named after the cell, under runs/), or go on in `resume`.

    Every `save_every` steps the state is saved; every `eval_every` steps (0: never) the tests are run and logged.
    With `merge_to` the base with what was trained is written to that new folder (see `export.write`).
    `start` is the `time.perf_counter()` that the total counts from. Returns (results, run folder).
    Raises InputError before anything is written, TrainingError if the loss is not finite.
    """
    import numpy as np
    import torch

    from minilora import adapter, checkpoint, coverage, export, families, files, injection, lora, model, task
    from minilora import batches, console, data, roof, tokenizer, training
    from minilora.run import Run, check_inputs, hardware, peak_memory, trainable, versions

    start = time.perf_counter() if start is None else start
    say = console.say
    if resume is not None:
        if cell is not None or out is not None:
            raise errors.InputError("a resumed run has its cell and its folder already: give neither")
        run = Run(resume, resume=True)
        cell = run.read_cell()
        run.check_unfinished()
    else:
        run = Run.plan(out, cell)

    if merge_to is not None:
        export.check(merge_to, cell)

    # --- base: everything that can be refused is refused before weights are read
    device, dtype = training.pick_device(cell.device), getattr(torch, cell.dtype)
    folder = checkpoint.resolve(cell.model, cell.revision, cell.tokenizer)
    spec = families.read_spec(checkpoint.read_config(folder))
    slots = coverage.plan(spec, cell)
    words = checkpoint.resolve_tokenizer(cell.tokenizer, folder)
    text_tokenizer = tokenizer.load(words, spec.vocabulary)
    model.check_fits(spec, cell.max_length)
    cell_task = task.find(cell, spec, text_tokenizer)

    # --- data: rows, and the triggers that go into some of them
    clean, test = data.rows_of(cell)
    seed_inject = cell.seed_for("inject")
    injected = injection.inject(clean, cell.inject, seed_inject, cell_task.visible(clean))
    encoded, answers = cell_task.encode(injected.rows)
    injected = injection.mark_survival(injected, encoded.kept[injected.index])
    tests = cell_task.build_tests(clean, test, seed_inject)
    lengths = np.diff(encoded.offsets)
    inputs = {
        "base": checkpoint.fingerprint(folder),
        "tokenizer": checkpoint.fingerprint_tokenizer(words),
        "train": data.fingerprint(clean),
        "test": data.fingerprint(test),
        "injected": data.fingerprint(injected.rows),
    }

    # --- adapter and head
    base = model.load(folder, dtype, device, cell_task.unembedding)
    if cell.start:
        inputs["start"] = adapter.begin(base, cell, slots)
    elif slots:
        lora.attach(base, slots, cell.dropout, cell.seed_for("init"), cell.variant, cell.init)
    trained = cell_task.model(base, clean.label_names)
    cell_task.prepare(trained, encoded, answers)
    parameters = training.trained_parameters(trained, cell)
    optimizer = training.make_optimizer(parameters, cell)
    schedule = training.Schedule(lengths, cell)
    compiled, reason = training.compiles(cell.compile, device, schedule.steps)
    step_model = torch.compile(trained, dynamic=True) if compiled else trained
    floor = roof.training_flops(spec, slots, cell.method, lengths.mean()) * lengths.mean()  # operations a row
    rate = roof.matmul_rate(int(cell.batch_size * lengths.mean()), spec, dtype, device)

    # --- what is about to happen
    certificate = trainable(parameters)
    names = ", ".join(console.short(name) for name in clean.label_names[:6]) + ", ..." * (len(clean.label_names) > 6)
    size = f"{len(spec.layers)} layers of width {spec.width}"
    say(f"base       {cell.model} ({spec.family}, {size}, {cell.dtype}, {device})")
    say(f"data       {cell.data}: {len(clean):,} training and {len(test):,} test rows of {lengths.mean():.1f} tokens")
    say(f"labels     {names}")
    method = f"{cell.variant}, start {cell.start or cell.init}" if cell.method == "lora" else cell.method
    say(f"task       {cell_task.describe()}")
    say(f"method     {method}")
    say(f"trained    {certificate['count']:,} parameters")
    for line in coverage.describe(slots, spec, cell.variant):
        say(f"adapter    {line}")
    for line in console.injection_lines(injected, cell.inject):
        say(f"injection  {line}")
    say(f"training   {schedule.steps:,} steps of {cell.batch_size * cell.accumulate} rows, {cell.optimizer}, "
        f"lr {cell.lr:g} {cell.schedule}; {'compiled' if compiled else 'eager'} ({reason})")  # fmt: skip
    say(f"run        {run.path}")

    # --- run folder
    with run.hold(cell):
        files.write_jsonl(run.path / "injected.jsonl", (record.to_dict() for record in injected.records))
        files.write_json(run.path / "trainable.json", certificate)
        meters = {"step": 0, "seconds": 0.0, "tokens": 0, "inputs": inputs}
        if run.state.exists():
            meters = training.load_state(run.state, parameters, optimizer)
            check_inputs(inputs, meters["inputs"], cell)
            say(f"resumed    after step {meters['step']:,}")
        run.start_metrics(meters["step"])
        start_up = time.perf_counter() - start

        # --- the loop
        sizes = batches.padded_sizes(lengths)
        step, seconds, tokens = meters["step"], meters["seconds"], meters["tokens"]
        rows_done, rows_total = schedule.rows_before(step), schedule.rows_before(schedule.steps)
        with console.Progress("training", rows_total, rows_done) as progress:
            while step < schedule.steps:
                began = time.perf_counter()
                rows = schedule.rows_at(step)
                micro_batches = [batches.collate(encoded, r, sizes, text_tokenizer.pad_id).to(device) for r in rows]
                training.set_learning_rate(optimizer, training.learning_rate(cell, step, schedule.steps))
                try:
                    loss, norm = training.update(
                        step_model, micro_batches, answers, list(parameters.values()), optimizer, cell, step
                    )
                except errors.TrainingError as error:
                    ids = [injected.rows.ids[i] for r in rows for i in r]
                    run.log({"step": step + 1, "error": str(error), "rows": ids})
                    kept = f"the state after step {meters['step']} is kept" if meters["step"] else "no state was saved"
                    raise errors.TrainingError(
                        f"{error} (rows {', '.join(ids)}); {kept} in {run.path}; try a lower --lr"
                    ) from None
                step += 1
                seen = sum(int(lengths[r].sum()) for r in rows)
                seconds, tokens = seconds + time.perf_counter() - began, tokens + seen
                run.log({"step": step, "loss": loss, "norm": norm, "lr": optimizer.param_groups[0]["lr"],
                         "rows": sum(map(len, rows)), "tokens": seen, "seconds": round(seconds, 3)})  # fmt: skip
                progress.advance(sum(map(len, rows)), seen, f"loss {loss:.3f}, ")
                if eval_every and step % eval_every == 0 and step < schedule.steps:
                    figures, _ = cell_task.run_tests(trained, tests, cell.batch_size)
                    run.log({"step": step, "tests": figures})
                    say("\n".join([f"after step {step:,}:", console.table(figures)]))
                if step % save_every == 0 or step == schedule.steps:
                    meters |= {"step": step, "seconds": seconds, "tokens": tokens}
                    training.save_state(run.state, parameters, optimizer, meters)
        adapter.save(run.path / "adapter", trained, cell, clean.label_names)

        # --- evaluation
        began = time.perf_counter()
        with console.Progress("evaluation", cell_task.passes(tests)) as progress:
            figures, outcomes = cell_task.run_tests(trained, tests, cell.batch_size, progress.advance)
        evaluation_seconds = time.perf_counter() - began
        files.write_jsonl(run.path / "predictions.jsonl", cell_task.predictions(tests, outcomes))

        # --- results
        trained_rows = schedule.rows_before(schedule.steps)
        results = {
            "cell": {"id": cell.id} | cell.to_dict(),
            "task": cell_task.record(),
            "tests": figures,
            "train": {
                "rows": len(clean),
                "rows_per_second": trained_rows / seconds,
                "tokens_per_second": tokens / seconds,
                "seconds": seconds,
                "peak_memory_bytes": peak_memory(device),
                "trainable_parameters": certificate["count"],
                "steps": schedule.steps,
                "floor_rows_per_second": rate / floor,
                "matmul_flops_per_second": rate,
                "start_up_seconds": start_up,
                "evaluation_seconds": evaluation_seconds,
                "total_seconds": time.perf_counter() - start,
            },
            "injection": injected.report,
            "injected_rows_truncated": sum(not record.survives for record in injected.records),
            "inputs": inputs,
            "seeds": {purpose: cell.seed_for(purpose) for purpose in PURPOSES},
            "versions": versions(),
            "hardware": hardware(device),
        }
        run.finish(results)
        if merge_to is not None:
            merged = export.write(merge_to, trained, cell, clean.label_names, source=folder, tokenizer=words)
            say(f"merged     {merge_to}: {export.describe(merged)}")
    return results, run.path


def main(argv=None):
    parser = options.Parser(prog="train.py", description=__doc__.partition("\n\n")[0])
    general = parser.add_argument_group("run")
    general.add_argument("--config", metavar="FILE", help="TOML file with a cell's fields; flags stand before it")
    general.add_argument("--out", metavar="DIR", help="run folder (default: runs/NAME, named after the cell)")
    general.add_argument("--resume", metavar="RUN", help="go on with the interrupted run in this folder")
    general.add_argument("--eval-every", type=int, default=0, metavar="N",
                         help="run the tests every N steps as well (default: 0, at the end alone)")  # fmt: skip
    general.add_argument("--save-every", type=int, default=SAVE_EVERY, metavar="N",
                         help=f"save the state every N steps (default: {SAVE_EVERY})")  # fmt: skip
    general.add_argument("--merge-to", metavar="DIR",
                         help="write the base with what was trained to this new folder, for transformers")  # fmt: skip
    general.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    options.add_flags(parser, Cell)
    arguments = parser.parse_args(argv)
    flags = options.given_flags(arguments, Cell)
    if arguments.eval_every < 0 or arguments.save_every < 1:
        raise errors.InputError("--eval-every must be at least 0 and --save-every at least 1")
    often = dict(eval_every=arguments.eval_every, save_every=arguments.save_every, merge_to=arguments.merge_to,
                 start=START)  # fmt: skip
    if arguments.resume:
        if flags or arguments.config or arguments.out:
            raise errors.InputError(
                "--resume goes on with the run's own cell: drop --config, --out and the cell's flags"
            )
        from minilora.run import Run

        run = Run(arguments.resume)
        if run.finished:
            if arguments.merge_to:
                raise errors.InputError(f"{run.path} is finished: use python evaluate.py {run.path} --merge-to DIR")
            print(f"{run.path} is finished:")
            return report(run.read_results(), run.path)
        return report(*train(resume=arguments.resume, **often))
    cell = options.load(Cell, arguments.config) if arguments.config else Cell()
    report(*train(cell.replace(**flags), arguments.out, **often))


def report(results, folder):
    """The end of the story, on stdout: the table, the speed, and where to go on."""
    from minilora import console

    label = next(iter(results["tests"]["trigger"]), "LABEL")
    print(console.table(results["tests"]))
    print(console.speed(results["train"]))
    print(f"\nrun folder: {folder}\nnext: python evaluate.py {folder} --inject {shlex.quote(f'country:{label}')}")


if __name__ == "__main__":
    errors.exit_cleanly(main)
