"""The training loop: one population of members, step after step, and what is written on the way.

`update` is one step. What a step sees is made in `feed.py`, what is trained is in `state.py` and `population.py`.
"""

import contextlib
import math
import time
from functools import partial

import torch

from minilora import console, parallel
from minilora.data import batches
from minilora.training import compiling, optimizers, planner
from minilora.training.feed import assemble, shapes_of
from minilora.training.limit import matmul_rate
from minilora.training.population import Population
from minilora.training.state import Flat

READ_EVERY = 20  # steps between reads of the losses from a GPU


def update(population, optimizer, clips, going, micro_batches, rates):
    """One optimiser step of each member that is `going` (bool [K], changed in place): (losses, norms), tensors [K].

    The loss of a member is the mean over all that its rows of
    `micro_batches` weigh; its gradient's norm is clipped to `clips` [K]. Where the loss or the norm is not finite, the
    member goes no further, and stays as it was before. Nothing here waits for the device. Several processes have a
    part of the rows each: gradients and losses are summed, and all take the same step.
    """
    population.train()
    flat = population.flat
    losses = torch.zeros_like(clips)
    totals = sum(batch.weights for batch in micro_batches).clamp(min=1.0)
    for batch in micro_batches:
        if batch.keys is not None:
            population.keys.copy_(batch.keys)
        parts = population(batch.ids, batch.lengths, batch.answers, batch.alike) / totals
        parts.sum().backward()
        losses += parts.detach()
    parallel.all_reduce(flat.grads, losses)
    norms = flat.grads.norm(dim=1)
    going &= losses.isfinite() & norms.isfinite()
    flat.grads.mul_((clips / (norms + 1e-6)).clamp(max=1.0)[:, None])
    flat.grads.masked_fill_(~going[:, None], 0.0)
    optimizer.step(rates, going)
    flat.grads.zero_()
    return losses, norms


def train_population(members, base, eval_every, save_every, merge_to, start):
    """Train members that share a base, all at once, and write their results."""
    say, cell, setting = console.say, members[0].cell, members[0].setting
    device = setting.device

    # --- what is trained
    flat = Flat([member.parameters for member in members])
    parallel.broadcast(flat.values)
    optimizer = optimizers.OPTIMIZERS[cell.optimizer](flat, [member.cell for member in members])
    together = Population([member.model for member in members], [member.layers for member in members], flat)
    parallel.forward_only([base.embed, *base.layers[: together.prefix]])
    steps = max(member.schedule.steps for member in members)
    first = planner.first_step(members)
    compiled, reason = compiling.compiles(cell, device, steps - first)
    shapes = shapes_of(members, compiled)
    length = sum(member.lengths.sum() for member in members) / sum(len(member.lengths) for member in members)
    tokens = max(1, int(len(members) * cell.batch_size * length / parallel.count()))
    rate = parallel.count() * matmul_rate(tokens, setting.spec, setting.dtype, device)

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
        with parallel.fail_together():
            for k, member in enumerate(members):
                folders.enter_context(member.hold(flat, optimizer, k))
        if first:
            say(f"resumed    after step {first:,}")
        cells = [member.cell for member in members]
        rates = optimizers.learning_rates(cells, [member.schedule.steps for member in members], device)
        clips = torch.tensor([cell.clip or math.inf for cell in cells], device=device)
        going = torch.ones(len(members), dtype=torch.bool, device=device)
        advance = partial(update, together, optimizer, clips, going)
        if compiled:
            advance = compiling.compiled(advance, cell.task, device, [*optimizer.tensors, together.keys, going])
        start_up = time.perf_counter() - start

        # --- the loop
        log = Log(members, first)
        rows_done = sum(member.schedule.rows_before(min(first, member.schedule.steps)) for member in members)
        rows_total = sum(member.schedule.rows_before(member.schedule.steps) for member in members)
        with console.Progress("training", rows_total, rows_done) as progress:
            for step, micro_batches in batches.ahead(partial(assemble, members, *shapes), first, steps, device):
                log.add(step, *advance(micro_batches, rates[step]))
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
                    parallel.barrier()  # until the first has written it down: who fails first ends the others
                    break

        # --- evaluation and results
        left = [(k, member) for k, member in enumerate(members) if not member.error]
        times = parallel.count()  # the others are about as far as the first process
        with console.Progress("evaluation", sum(member.task.passes(member.tests) for _, member in left)) as progress:
            for k, member in left:
                with together.alone(k) as model:
                    seen = lambda rows, tokens: progress.advance(times * rows, times * tokens)  # noqa: E731
                    member.finish(model, start, start_up, rate, len(members), seen)
                    if merge_to is not None and parallel.first():
                        member.merge_to(merge_to, model)
    together.detach()


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
