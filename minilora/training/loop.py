"""The training loop: one population of members, step after step, and what is done on the way.

`train_population` is the loop. One step is in `step.py`, what it sees in `feed.py`, and what is trained in
`population.py` and `state.py`.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from minilora import parallel, precision
from minilora.console import Progress, say
from minilora.data import batches
from minilora.files import full_disk, is_full
from minilora.interrupts import Interrupted, Stop
from minilora.runs.folder import SAVE_EVERY
from minilora.runs.text import results_table
from minilora.training import choices, compiling, graphs
from minilora.training.feed import Feed
from minilora.training.limit import matmul_rate, products, steady
from minilora.training.optimizers import OPTIMIZERS, learning_rates
from minilora.training.population import Population
from minilora.training.scoring import scored
from minilora.training.state import Flat
from minilora.training.step import update

READ_EVERY = 20  # steps between reads of the losses from a GPU


@dataclass(frozen=True)
class Options:
    """What is done beside the training and changes none of its results.

    save_every  steps between saves of the state
    eval_every  steps between runs of the tests, the first before training; 0 for only at the end
    watch       steps between copies of what is trained that the run folder keeps, the first before training, one more
                at the end; 0 for none (a run that goes on keeps them as it began)
    merge_to    a new folder for the base with what was trained, or None
    on_step     called as `on_step(step, loss, **figures)` once the loss of a step is known, or None
    on_tests    called as `on_tests(step, tests)` once the tests were run, the last time after the last step, or None;
                `tests` is as in results.json
    start       the `time.perf_counter()` that total seconds count from
    """

    save_every: int = SAVE_EVERY
    eval_every: int = 0
    watch: int = 0
    merge_to: Path | None = None
    on_step: Callable | None = None
    on_tests: Callable | None = None
    start: float = field(default_factory=time.perf_counter)

    def saves(self, step, steps):
        """Whether the state is saved after step `step` (from 0) of `steps`."""
        return step + 1 == steps or step < steps and (step + 1) % self.save_every == 0

    def tests(self, step, steps):
        """Whether the tests are run after that step; the last is followed by the tests of the results anyway."""
        return bool(self.eval_every) and step + 1 < steps and (step + 1) % self.eval_every == 0

    def tell(self, step, tests):
        """Call `on_tests` with the figures of the tests after `step` steps, or None: the member diverged."""
        if self.on_tests and tests and parallel.first():
            self.on_tests(step, tests)


def train_population(members, base, options):
    """Train members that share a base, all at once, and write their results."""
    flat, optimizer, population = put_together(members, base)
    with going_on(members), contextlib.ExitStack() as folders:
        first = take_folders(members, flat, optimizer, folders)
        chosen = choices.of(members, first)
        for member in members:
            member.meters["choices"] = chosen
        folders.enter_context(precision.ways(chosen, members[0].cell.dtype))
        job = Job(members, population, optimizer, first)
        announce(members, job)
        for member in members:
            member.watch_every = options.watch or member.run.watch_every()
        if not first:
            keep(members, flat, 0)
        if options.eval_every and not first:
            evaluate(list(enumerate(members)), population, 0, options)
        with Log(members, first, options.on_step, job.device) as log, Stop() as stop:
            made = map(job.feed, range(first, job.steps))
            for step, (_, micro_batches) in enumerate(batches.ahead(made, job.device), first):
                log.add(step, *job.update(micro_batches, job.rates[step]))
                ends = parallel.any_of(stop.asked())
                keep(members, flat, step + 1)  # before the state that goes on from here
                evaluate(log.reached(step, options.tests), population, step + 1, options)
                for k, member in log.reached(step, going if ends else options.saves):
                    member.save_state(flat, optimizer, k, step + 1)
                if ends:
                    stop.end()
                if all(member.error for member in members):
                    parallel.barrier()  # until the first process has written it down: who fails first ends the others
                    break
        finish(members, population, job, options)
    population.detach()


def going(step, steps):
    """Whether a member of `steps` steps is in training at that step: the others are saved already."""
    return step < steps


@contextlib.contextmanager
def going_on(members):
    """What ends the training from outside, a signal or a full disk, says how to go on with all that were stopped."""
    try:
        yield
    except BaseException as error:
        stopped = [member.run.path for member in members if member.run.begun and not member.run.finished]
        if isinstance(error, KeyboardInterrupt):
            asked = Interrupted(number=getattr(error, "number", signal.SIGINT), folders=stopped)
        elif is_full(error):
            asked = full_disk(error, members[0].run.state)
        else:
            raise
        raise (asked.go_on(["--resume", *stopped]) if stopped else asked) from error


def put_together(members, base):
    """What the members train, as one: (`Flat`, optimizer, `Population`)."""
    flat = Flat([member.parameters for member in members])
    parallel.broadcast(flat.values.data)
    cells = [member.cell for member in members]
    optimizer = OPTIMIZERS[cells[0].optimizer](flat, cells)
    population = Population([member.model for member in members], [member.layers for member in members], flat)
    parallel.forward_only([base.embed, *base.layers[: population.prefix]])
    return flat, optimizer, population


def take_folders(members, flat, optimizer, folders):
    """Lock the members' run folders until `folders` (an ExitStack) closes, and bring back their saved states.

    Returns the step to go on from. All that is decided from a folder is read while it is locked. Members that were
    stopped at steps that do not belong together begin again.
    """
    with parallel.fail_together():
        for member in members:
            folders.enter_context(member.hold())
        for member in members:
            member.write_population(members)
    parallel.barrier()  # the others read what the first process has locked
    with parallel.fail_together():
        first = max(member.read_meters() for member in members)
    if any(member.meters["step"] != min(first, member.schedule.steps) for member in members):
        first = 0
        for member in members:
            member.restart()
    with parallel.fail_together():
        for k, member in enumerate(members):
            member.go_on(flat, optimizer, k)
    return first


class Job:
    """How the members are trained: `update` for a step, the `feed`, the `rates` float32 [steps, K], and the device."""

    def __init__(self, members, population, optimizer, first):
        cells, setting = [member.cell for member in members], members[0].setting
        self.device, self.first = setting.device, first
        self.steps = max(member.schedule.steps for member in members)
        self.how, self.reason = compiling.choose(cells[0], self.device, self.steps - first)
        self.feed = Feed(members, self.how, self.steps - first)
        self.rates = learning_rates(cells, [member.schedule.steps for member in members], self.device)
        clips = torch.tensor([cell.clip or math.inf for cell in cells], device=self.device)
        going = torch.ones(len(members), dtype=torch.bool, device=self.device)
        self.update = partial(update, population, optimizer, clips, going)
        if self.how == "compiled":
            state = [*optimizer.tensors, population.keys, going]
            self.update = compiling.compiled(self.update, cells[0].task, self.device, state)
        elif self.how == "graphs":
            self.record(population, optimizer, clips, going)
        self.sharded = parallel.is_sharded(population.base)
        length = sum(member.mean_length for member in members) / len(members)
        tokens = max(1, int(len(members) * cells[0].batch_size * length / parallel.count()))
        times = products(setting.spec, members[0].slots, cells[0].method)
        self.measure = partial(matmul_rate, tokens, times, setting.products, self.device)
        self.rate_before = self.measure()
        self.began = time.perf_counter()

    def record(self, population, optimizer, clips, going):
        """Take the steps by CUDA graphs, or eagerly where something in them can't be recorded."""
        blanks = [batch.to(self.device) for batch in self.feed.blanks()]
        try:
            self.update = graphs.Replayed(population, optimizer, clips, going, blanks, graphs.Cuda(self.device))
        except RuntimeError as error:  # of CUDA or its memory, or a variant of one's own that waits for the device
            self.how, self.reason = "eager", f"the step cannot be recorded: {compiling.first_line(error)}"
            self.feed = Feed(self.feed.members)

    def limit(self):
        """Operations a second that the processes can do together, or None where that changed since the beginning."""
        rate = steady(self.rate_before, self.measure())
        return None if rate is None else parallel.count() * rate


def announce(members, job):
    """Say what is about to happen."""
    for member in members:
        cell = member.cell
        for line in member.describe():
            say(line)
        rows = cell.batch_size * cell.accumulate
        say(f"training   {member.schedule.steps:,} steps of {rows} rows, {cell.optimizer}, lr {cell.lr:g} "
            f"{cell.schedule}; {job.how} ({job.reason})")  # fmt: skip
        if parallel.count() > 1:
            split = "a part of each layer" if job.sharded else "the whole base"
            say(f"processes  {parallel.count()}, each with a part of each batch and {split}")
        say(f"run        {member.run.path}")
    if job.first:
        say(f"resumed    after step {job.first:,}")


def keep(members, flat, step):
    """Keep what the members have trained after `step` steps, of those whose steps are watched."""
    due = [(k, member) for k, member in enumerate(members) if member.is_watched(step)]
    if due and parallel.first():
        values = flat.values.detach().cpu()  # at once, because a GPU would wait for every tensor
        for k, member in due:
            member.keep({name: flat.part(values, k, name) for name in member.parameters}, step)


def evaluate(members, population, step, options):
    """Run the tests of the `members`, (k, member) each, after `step` steps."""
    for _, member, scores, _ in scored(list(members), population):
        if found := member.judge(scores, step):
            say(f"after step {step:,}:\n{results_table(found[0])}")
            options.tell(step, found[0])


def finish(members, population, job, options):
    """Run the tests of the members that did not diverge, and write their results."""
    for k, member in enumerate(members):
        if not member.error:
            member.tune(population, k)
    left = [(k, member) for k, member in enumerate(members) if not member.error]
    times = parallel.count()  # the others are about as far as the first process
    limit = job.limit()
    with Progress("evaluation", sum(member.task.passes(member.tests) for _, member in left)) as progress:
        tests = scored(left, population, lambda rows, tokens: progress.advance(times * rows, times * tokens))
        for k, member, scores, seconds in tests:
            if found := member.judge(scores, member.schedule.steps):
                with population.only(k) as model:
                    member.finish(model, job, limit, options, *found, seconds)
                options.tell(member.schedule.steps, found[0])


class Log:
    """Writes what the steps gave to the members' metrics.jsonl and shows the progress.

    On a GPU the losses are read every `READ_EVERY` steps, because reading blocks.
    """

    def __init__(self, members, first, on_step, device):
        self.members, self.on_step = members, on_step
        self.every = 1 if device.type == "cpu" else READ_EVERY
        self.waiting, self.began = [], time.perf_counter()
        schedules = [member.schedule for member in members]
        done = sum(schedule.rows_before(min(first, schedule.steps)) for schedule in schedules)
        self.progress = Progress("training", sum(one.rows_before(one.steps) for one in schedules), done)

    def __enter__(self):
        self.progress.__enter__()
        return self

    def __exit__(self, *error):
        if not any(error):
            self.write()
        self.progress.__exit__(*error)

    def add(self, step, losses, norms):
        """`losses` and `norms` float32 [K] of a step."""
        self.waiting.append((step, losses, norms))
        if len(self.waiting) >= self.every:
            self.write()

    def reached(self, step, test):
        """The (k, member) whose `test(step, its steps)` holds and that go on: the log is up to date for them.

        A member whose weights are not finite ends here. All are reached after their last step, when they are saved.
        """
        here = [(k, member) for k, member in enumerate(self.members) if test(step, member.schedule.steps)]
        if here:
            self.write()
        for k, member in here:
            if not member.error:
                member.check_weights(step)
            if not member.error:
                yield k, member
        if here:
            self.began = time.perf_counter()  # what is done at a step is not a part of its time

    def write(self):
        """Write the steps that are waiting; a member whose loss was not finite has its `error` from then on."""
        if not self.waiting:
            return
        figures = [torch.stack(values).tolist() for values in list(zip(*self.waiting, strict=True))[1:]]
        now = time.perf_counter()
        seconds, self.began = (now - self.began) / len(self.waiting), now
        seen = [0, 0]
        for (step, *_), losses, norms in zip(self.waiting, *figures, strict=True):
            for member, loss, norm in zip(self.members, losses, norms, strict=True):
                rows, tokens = member.log(step, loss, norm, seconds, self.on_step)
                seen = seen[0] + rows, seen[1] + tokens
        losses = [loss for member, loss in zip(self.members, losses, strict=True) if not member.error]
        self.waiting = []
        self.progress.advance(*seen, f"loss {sum(losses) / len(losses):.3f}, " if losses else "")
