"""One step of training in its two parts: the gradients of a micro-batch, and the move that they lead to.

`update` is the step as it is taken eagerly or compiled; `graphs.py` records the two parts.
"""

import torch

from minilora import parallel


def gradient(population, batch, totals):
    """A micro-batch's part of each member's loss, float32 [K], and its gradient [M, C]; both divided by `totals` [K],
    the weights of all rows of the step."""
    if batch.keys is not None:
        population.keys.copy_(batch.keys)
    parts = population(batch.ids, batch.lengths, batch.answers, batch.alike) / totals
    (grads,) = torch.autograd.grad(parts, [population.flat.values], torch.ones_like(parts))
    return parts.detach(), grads


@torch.no_grad()
def move(optimizer, clips, going, losses, grads, rates):
    """Clip the gradients [M, C] (`state.Flat`), in place, and let the optimiser take its step; returns each member's
    norm [K]."""
    norms, by_line = optimizer.flat.norms(grads), optimizer.flat.by_line
    going &= losses + norms < torch.inf  # neither is infinite or no number: four kernels less than to ask each
    grads.mul_(by_line((clips / (norms + 1e-6)).clamp(max=1.0))[:, None])
    grads.masked_fill_(by_line(~going)[:, None], 0.0)
    optimizer.step(grads, rates, going)
    return norms


def total(micro_batches):
    """The weights of all rows of a step, [K]."""
    return sum((batch.weights for batch in micro_batches[1:]), micro_batches[0].weights)


def update(population, optimizer, clips, going, micro_batches, rates):
    """One optimiser step of each member that is `going` (bool [K], changed in place): (losses, norms), float32 [K].

    A member's loss is summed over its rows and divided by their total weight; its gradient's norm is clipped to
    `clips` [K], and `rates` [K] are the learning rates. A member whose loss or norm is not finite stops and stays as
    it was before the step. Nothing here waits for the device. Several processes have a part of the rows each:
    gradients and losses are summed, and all take the same step.
    """
    population.train()
    totals = total(micro_batches).clamp(min=1.0)
    losses, grads = gradient(population, micro_batches[0], totals)
    for batch in micro_batches[1:]:
        parts, own = gradient(population, batch, totals)
        grads.add_(own)
        losses = losses + parts
    parallel.all_reduce(grads, losses)
    return losses, move(optimizer, clips, going, losses, grads, rates)
