"""Train a cell (a base, an adapter, real text with an injected token) or a grid, and show who controls predictions.

python train.py                                       the default cell
python train.py --rank 16 --inject-proportion 0.05    change what you like: --help
python train.py --config FILE.toml                    a cell from a file, flags on top
python train.py --config A.toml B.toml ...            several cells, those that can be in one population
python train.py --resume RUN                          go on with an interrupted run
python train.py --grid FILE.toml --out DIR            many cells from one file; killed, the same line goes on
python train.py --grid FILE.toml --out DIR --ray auto    the same on the Ray cluster that this machine is a node of
torchrun --nproc-per-node N train.py ...              one cell over N processes, with --shard the base split among them
"""

import contextlib
import math
import shlex
import sys
import time
from functools import partial
from pathlib import Path

SAVE_EVERY = 100  # steps
READ_EVERY = 20  # steps, of what a GPU computes
START = time.perf_counter()

from minilora import errors, options  # noqa: E402  (the clock starts before the slow imports)
from minilora.cell import Cell  # noqa: E402
from minilora.presets import PRESETS  # noqa: E402


def train(
    cell=None, out=None, *, resume=None, eval_every=0, save_every=SAVE_EVERY, merge_to=None, start=None, shard=False
):
    """Train `cell` into the run folder `out` (default: one named after the cell, under runs/), or go on in `resume`.

    Every `save_every` steps the state is saved; every `eval_every` steps (0: never) the tests are run and logged.
    With `merge_to` the base with what was trained is written to that new folder (see `export.write`).
    `start` is the `time.perf_counter()` that the total counts from. Where torchrun started several processes they
    train the one cell together, with `shard` with the frozen base split among them (`parallel.py`). Returns (results,
    run folder). Raises InputError before anything is written, TrainingError if the loss is not finite.
    """
    from minilora import export, parallel
    from minilora.member import Member, Settings
    from minilora.run import Run

    run = None
    if resume is not None:
        if cell is not None or out is not None:
            raise errors.InputError("a resumed run has its cell and its folder already: give neither")
        run = Run(resume, resume=True)
        cell = run.read_cell()
        run.check_unfinished()
    parallel.check(cell, shard)
    with parallel.together(cell.device):
        run = run or parallel.from_first(lambda: Run.plan(out, cell))
        if merge_to is not None:
            export.check(merge_to, cell)
        [member] = train_all([Member(cell, run)], 1, eval_every, save_every, merge_to, start, Settings(shard))
        if member.error:
            raise member.error
    return member.results, member.run.path


def train_together(cells, outs=None, *, size=None, eval_every=0, save_every=SAVE_EVERY):
    """Train several cells, each into its own folder of `outs` (default: as `train`), in populations of cells that allow
    it.

    `size` is how many adapters a population has at most (default: what is measured to be fastest on the device). Each
    cell's results are those of `train` but for rounding. Returns a list of (results, run folder), with the
    TrainingError in the place of the results of a cell that diverged. Raises InputError before anything is written.
    """
    from minilora import parallel
    from minilora.member import Member
    from minilora.run import Run

    parallel.refuse("several cells", "start these with python")
    members = []
    for cell, out in zip(cells, outs or [None] * len(cells), strict=True):
        members.append(Member(cell, Run.plan(out, cell, taken=[member.run.path for member in members])))
    train_all(members, size, eval_every, save_every)
    return [(member.error or member.results, member.run.path) for member in members]


def train_all(members, size=None, eval_every=0, save_every=SAVE_EVERY, merge_to=None, start=None, settings=None):
    """Train the members in populations of at most `size`; returns them. `settings`: a `member.Settings` to draw on."""
    from minilora import console, parallel, planner, population
    from minilora.member import Settings

    start = time.perf_counter() if start is None else start
    settings = settings or Settings()
    groups = {}  # of members that can be trained together, with as many steps to go if possible
    for member in members:
        groups.setdefault(population.shared(member.cell), []).append(member)
    for group in groups.values():
        for member in group:  # everything that can be refused is refused before weights are read
            with parallel.in_turn():
                member.prepare(settings.of(member.cell))
    for group in groups.values():
        base = settings.load(group[0].cell, group[0].task.unembedding)
        for member in group:
            member.begin(base)
        most = planner.size(group, base) if size is None and len(group) > 1 else size or 1
        for chunk in planner.split(group, most):
            if len(members) > 1:
                console.say(f"\npopulation of {len(chunk)} of {len(members)} cells")
            train_population(chunk, base, eval_every, save_every, merge_to, start)
            start = time.perf_counter()
    return members


def train_population(members, base, eval_every, save_every, merge_to, start):
    """Train members that share a base, all at once, and write their results."""
    import torch

    from minilora import batches, compiling, console, parallel, planner, roof, training
    from minilora.member import assemble, shapes_of
    from minilora.population import Population

    say, cell, setting = console.say, members[0].cell, members[0].setting
    device = setting.device

    # --- what is trained
    flat = training.Flat([member.parameters for member in members])
    parallel.copy_first(flat.values)
    optimizer = training.OPTIMIZERS[cell.optimizer](flat, [member.cell for member in members])
    together = Population([member.model for member in members], [member.layers for member in members], flat)
    parallel.forward_only([base.embed, *base.layers[: together.prefix]])
    steps = max(member.schedule.steps for member in members)
    first = planner.first_step(members)
    compiled, reason = compiling.compiles(cell, device, steps - first)
    shapes = shapes_of(members, compiled)
    length = sum(member.lengths.sum() for member in members) / sum(len(member.lengths) for member in members)
    tokens = max(1, int(len(members) * cell.batch_size * length / parallel.count()))
    rate = parallel.count() * roof.matmul_rate(tokens, setting.spec, setting.dtype, device)

    # --- what is about to happen
    for member in members:
        for line in member.describe():
            say(line)
        rows, how = cell.batch_size * cell.accumulate, f"{'compiled' if compiled else 'eager'} ({reason})"
        say(f"training   {member.schedule.steps:,} steps of {rows} rows, {cell.optimizer}, lr {member.cell.lr:g} "
            f"{member.cell.schedule}; {how}")  # fmt: skip
        if parallel.count() > 1:
            split = "a part of each layer" if parallel.is_sharded(base) else "the whole base"
            say(f"processes  {parallel.count()}, each with a part of each batch and {split}")
        say(f"run        {member.run.path}")

    with contextlib.ExitStack() as folders:
        with parallel.alike():
            for k, member in enumerate(members):
                folders.enter_context(member.hold(flat, optimizer, k))
        if first:
            say(f"resumed    after step {first:,}")
        cells = [member.cell for member in members]
        rates = training.learning_rates(cells, [member.schedule.steps for member in members], device)
        clips = torch.tensor([cell.clip or math.inf for cell in cells], device=device)
        going = torch.ones(len(members), dtype=torch.bool, device=device)
        update = partial(training.update, together, optimizer, clips, going)
        if compiled:
            update = compiling.compiled(update, cell.task, device, [*optimizer.tensors, together.keys, going])
        start_up = time.perf_counter() - start

        # --- the loop
        log = Log(members, first)
        rows_done = sum(member.schedule.rows_before(min(first, member.schedule.steps)) for member in members)
        rows_total = sum(member.schedule.rows_before(member.schedule.steps) for member in members)
        with console.Progress("training", rows_total, rows_done) as progress:
            for step, micro_batches in batches.ahead(partial(assemble, members, *shapes), first, steps, device):
                log.add(step, *update(micro_batches, rates[step]))
                last = step + 1 == steps
                saving = (step + 1) % save_every == 0 or last
                evaluating = eval_every and (step + 1) % eval_every == 0 and not last
                if saving or evaluating or log.is_due(device):
                    log.write(progress)
                for k, member in enumerate(members):
                    if member.error or step >= member.schedule.steps:
                        continue
                    if evaluating:
                        with together.alone(k) as model:
                            member.evaluate(model, step + 1)
                        log.began = time.perf_counter()
                    if saving or step + 1 == member.schedule.steps:
                        member.save_state(flat, optimizer, k, step + 1)
                if all(member.error for member in members):
                    parallel.wait()  # until the first has written it down: who fails first ends the others
                    break

        # --- evaluation and results
        left = [(k, member) for k, member in enumerate(members) if not member.error]
        times = parallel.count()  # the others are about as far as the first process
        with console.Progress("evaluation", sum(member.task.passes(member.tests) for _, member in left)) as progress:
            for k, member in left:
                with together.alone(k) as model:
                    advance = lambda rows, tokens: progress.advance(times * rows, times * tokens)  # noqa: E731
                    member.finish(model, start, start_up, rate, len(members), advance)
                    if merge_to is not None and parallel.first():
                        member.merge_to(merge_to, model)
    together.detach()


def train_grid(grid, out, *, size=None, only=None, retry_failed=False, nodes=None):
    """Train the cells of a `grid.Grid` in the folder `out`, those that are left there; returns the `GridFolder`.

    `size` is how many cells a population has at most (default: see `planner.settle`). `only` {field: values} leaves
    the populations without such a cell for later. A cell that fails is recorded, and the others go on; `retry_failed`
    tries those of before again. `nodes`: a `cluster.Nodes` to train on, instead of this machine. Other processes may
    be at work in the same folder. Raises InputError before any training for a folder that holds something else.
    """
    from minilora import console, parallel, planner, report
    from minilora.grid import matches
    from minilora.grid_folder import GridFolder
    from minilora.member import Settings

    parallel.refuse("a grid", "start that with python, and over several machines with --ray")
    folder, settings = GridFolder(out, grid).make(), Settings()
    if retry_failed:
        folder.forget_failures()
    with console.quiet():
        chunks = folder.populations(lambda entries: (nodes or planner).settle(entries, size, settings))
    chunks = [chunk for chunk in chunks if any(matches(entry.cell, only or {}) for entry in chunk)]
    entries = [entry for chunk in chunks for entry in chunk]
    with console.Cells(len(entries), len(entries) - len(folder.left(entries))) as progress:
        if nodes:
            nodes.train(folder, chunks, progress)
        else:
            for chunk in chunks:
                with folder.claim(chunk) as held:
                    if held:
                        train_chunk(folder, folder.left(chunk), settings, progress)
    if not folder.left(grid.entries):
        report.write_table(folder)
    return folder


def train_chunk(folder, entries, settings, progress):
    """Train the entries of a population; where that fails as a whole, each alone, so that one fails alone."""
    from minilora import console
    from minilora.grid_folder import is_full
    from minilora.member import Member

    members = [Member(entry.cell, run) for entry, run in zip(entries, folder.runs(entries), strict=True)]
    try:
        with console.quiet():
            train_all(members, len(members), settings=settings)
    except Exception as error:
        if is_full(error):
            raise errors.InputError(
                f"no space is left for {folder.path}: make some and start again, finished cells are kept"
            ) from error
        settings.forget()  # the base may carry an adapter still
        if len(entries) > 1:
            for entry in entries:
                train_chunk(folder, [entry], settings, progress)
            return
        members[0].error = error
    for entry, member in zip(entries, members, strict=True):
        if member.error:
            folder.fail(entry, member.error)
            progress.advance(entry.name, f"failed: {member.error}")
        else:
            progress.advance(entry.name, console.summary(member.results))


class Log:
    """What the steps gave, written to the members' metrics.jsonl: on a GPU a few steps at a time, for reading waits."""

    def __init__(self, members, first):
        self.members, self.first = members, first
        self.waiting, self.began = [], time.perf_counter()

    def add(self, step, losses, norms):
        self.waiting.append((step, losses, norms))

    def is_due(self, device):
        return device.type == "cpu" or len(self.waiting) == READ_EVERY

    def write(self, progress):
        """Write the steps that are waiting; a member whose loss was not finite has its `error` from then on."""
        import torch

        if not self.waiting:
            return
        figures = [torch.stack(values).tolist() for values in list(zip(*self.waiting))[1:]]
        now = time.perf_counter()
        seconds, self.began = (now - self.began) / len(self.waiting), now
        seen = [0, 0]
        for (step, *_), losses, norms in zip(self.waiting, *figures, strict=True):
            for member, loss, norm in zip(self.members, losses, norms, strict=True):
                rows, tokens = member.log(step, loss, norm, seconds)
                seen = seen[0] + rows, seen[1] + tokens
        losses = [loss for member, loss in zip(self.members, losses, strict=True) if not member.error]
        self.waiting = []
        progress.advance(*seen, f"loss {sum(losses) / len(losses):.3f}, " if losses else "")


def main(argv=None):
    parser = options.Parser(prog="train.py", description=__doc__.partition("\n\n")[0])
    general = parser.add_argument_group("run")
    general.add_argument("--config", metavar="FILE", nargs="+", default=[],
                         help="TOML file with a cell's fields, flags stand before it; a cell for each")  # fmt: skip
    general.add_argument("--out", metavar="DIR", help="run folder, or of several cells the folder of their run folders "
                         "(default: runs/NAME, named after the cell, or grids/NAME, after the file)")  # fmt: skip
    general.add_argument("--preset", choices=PRESETS, help="set many fields at once; flags stand before it")
    general.add_argument("--resume", metavar="RUN", help="go on with the interrupted run in this folder")
    general.add_argument("--population", type=int, metavar="K",
                         help="of several cells train at most K at once (default: as many as is fastest)")  # fmt: skip
    general.add_argument("--eval-every", type=int, default=0, metavar="N",
                         help="run the tests every N steps as well (default: 0, at the end alone)")  # fmt: skip
    general.add_argument("--save-every", type=int, default=SAVE_EVERY, metavar="N",
                         help=f"save the state every N steps (default: {SAVE_EVERY})")  # fmt: skip
    general.add_argument("--merge-to", metavar="DIR",
                         help="write the base with what was trained to this new folder, for transformers")  # fmt: skip
    general.add_argument("--shard", action="store_true",
                         help="under torchrun: split the frozen base among the processes (FSDP2)")  # fmt: skip
    grids = parser.add_argument_group("grid")
    grids.add_argument(
        "--grid", metavar="FILE", help="TOML file with many cells, or the folder of a grid (see ablations/)"
    )
    grids.add_argument("--scale", metavar="NAME", help="one of the file's scales, such as study (default: small)")
    grids.add_argument(
        "--dry-run", action="store_true", help="show the cells and what they will take, and train nothing"
    )
    grids.add_argument("--status", action="store_true", help="show what is done, and train nothing")
    grids.add_argument("--only", metavar="FIELD=VALUE", nargs="+", default=[],
                       help="populations with a cell of these values alone")  # fmt: skip
    grids.add_argument("--retry-failed", action="store_true", help="train cells that failed again")
    grids.add_argument("--ray", metavar="ADDRESS", help="train on the Ray cluster at HOST:PORT (auto: that which this "
                       "machine is a node of), each population on a GPU, or on CPUs where there is none")  # fmt: skip
    grids.add_argument("--ray-cpus", type=int, metavar="N",
                       help="CPUs of a node for each population, and its threads (default: 1)")  # fmt: skip
    general.add_argument("--traceback", action="store_true", help="show the full trace of an error")
    options.add_flags(parser, Cell)
    arguments = parser.parse_args(argv)
    flags = options.given_flags(arguments, Cell)
    if arguments.eval_every < 0 or arguments.save_every < 1:
        raise errors.InputError("--eval-every must be at least 0 and --save-every at least 1")
    often = dict(eval_every=arguments.eval_every, save_every=arguments.save_every)
    alone = often | dict(merge_to=arguments.merge_to, start=START, shard=arguments.shard)
    if arguments.population is not None and (
        arguments.population < 1 or len(arguments.config) < 2 and not arguments.grid
    ):
        raise errors.InputError(
            "--population must be at least 1, and is for several cells: give --grid, or several files to --config"
        )
    if arguments.ray_cpus is not None and (arguments.ray_cpus < 1 or not arguments.ray):
        raise errors.InputError("--ray-cpus must be at least 1, and is for a cluster: give --ray ADDRESS too")
    if arguments.grid:
        others = ("config", "preset", "resume", "merge_to", "eval_every", "shard")
        if given := [name for name in others if getattr(arguments, name)]:
            raise errors.InputError(
                f"--{given[0].replace('_', '-')} is for single cells, but --grid is given: drop one"
            )
        if arguments.save_every != SAVE_EVERY:
            raise errors.InputError(f"--save-every is for single cells, and those of a grid take {SAVE_EVERY}: drop it")
        if flags:
            raise errors.InputError(
                f"a grid's file has all fields of its cells: put {next(iter(flags))} into its [cell] instead of a flag"
            )
        return main_of_grid(arguments)
    for name in ("scale", "dry_run", "status", "only", "retry_failed", "ray"):
        if getattr(arguments, name):
            raise errors.InputError(f"--{name.replace('_', '-')} is for grids: give --grid FILE too")
    if arguments.resume:
        if flags or arguments.config or arguments.out or arguments.preset:
            raise errors.InputError(
                "--resume goes on with the run's own cell: drop --config, --out, --preset and the cell's flags"
            )
        from minilora.run import Run

        run = Run(arguments.resume)
        if run.finished:
            if arguments.merge_to:
                raise errors.InputError(f"{run.path} is finished: use python evaluate.py {run.path} --merge-to DIR")
            print(f"{run.path} is finished:")
            return report(run.read_results(), run.path)
        return report(*train(resume=arguments.resume, **alone))
    if arguments.preset and arguments.config:
        raise errors.InputError("--config has all fields of its cells, and --preset sets them: drop one of them")
    preset = Cell().replace(**PRESETS.get(arguments.preset, {}))
    cells = [options.load(Cell, path).replace(**flags) for path in arguments.config] or [preset.replace(**flags)]
    if len(cells) == 1:
        return report(*train(cells[0], arguments.out, **alone))
    if arguments.merge_to:
        raise errors.InputError("--merge-to is for one cell: use evaluate.py --merge-to on the runs")
    if arguments.shard:
        raise errors.InputError("--shard is for one cell: give one --config")
    outs = None if arguments.out is None else [Path(arguments.out) / cell.name for cell in cells]
    outcomes = train_together(cells, outs, size=arguments.population, **often)
    for results, folder in outcomes:
        if isinstance(results, errors.TrainingError):
            print(f"\nfailed: {results}")
        else:
            report(results, folder)
    if any(isinstance(results, errors.TrainingError) for results, _ in outcomes):
        sys.exit(1)


def main_of_grid(arguments):
    """train.py --grid"""
    from minilora import console, grid
    from minilora.grid_folder import GridFolder

    if arguments.ray and (arguments.status or arguments.dry_run):
        raise errors.InputError("--ray trains, but --dry-run and --status train nothing: drop one")
    if Path(arguments.grid).is_dir():
        folder = GridFolder.find(arguments.grid)
        if arguments.out or arguments.scale:
            raise errors.InputError(f"{arguments.grid} is a grid's folder already: drop --out and --scale")
    else:
        found = grid.read(arguments.grid, arguments.scale)
        name = "-".join(filter(None, (Path(arguments.grid).stem, found.scale)))
        folder = GridFolder(arguments.out or Path("grids") / name, found)
        folder.check()
    only = grid.parse_only(arguments.only, folder.grid)
    if arguments.status:
        return print(console.grid_status(folder))
    if arguments.dry_run:
        return print("\n".join(console.grid_plan(folder, arguments.population, only)))
    from minilora import cluster

    joined = cluster.connect(arguments.ray, arguments.ray_cpus or 1) if arguments.ray else contextlib.nullcontext()
    try:
        with joined as nodes:
            train_grid(folder.grid, folder.path, size=arguments.population, only=only,
                       retry_failed=arguments.retry_failed, nodes=nodes)  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on with python train.py --grid {folder.path}") from None
    print(console.grid_status(folder))
    if folder.counts()["failed"]:
        sys.exit(1)


def report(results, folder):
    """The end of the story, on stdout: the table, the speed, and where to go on."""
    from minilora import console

    label = next(iter(results["tests"]["trigger"]), "LABEL")
    print(console.table(results["tests"]))
    print(console.speed(results["train"]))
    print(f"\nrun folder: {folder}\nnext: python evaluate.py {folder} --inject {shlex.quote(f'country:{label}')}")


if __name__ == "__main__":
    errors.exit_cleanly(main)
