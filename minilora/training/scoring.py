"""The tests of a population's members: on a CPU one member after the other, on a GPU in passes for all of them.

By itself a member predicts with its adapter merged into the weights. Together they predict as they train, stacked:
there a small base is bound by launches, and not by products.
"""

import time

import numpy as np
import torch

from minilora.data import batches
from minilora.lora.layer import merged_meanwhile


def scored(members, population, progress=None):
    """Yield (k, member, what its task's `judge` takes, seconds) of `members`, (k, member) each.

    `progress(rows, tokens)` is called after each batch.
    """
    began = time.perf_counter()
    if len(members) > 1 and stacked(population):
        scores = together(members, population, progress)
        seconds = (time.perf_counter() - began) / len(members)
        yield from ((k, member, own, seconds) for (k, member), own in zip(members, scores, strict=True))
        return
    for k, member in members:
        began = time.perf_counter()
        with population.only(k) as model, merged_meanwhile(model):
            scores = member.task.scores(model, member.read, member.cell.batch_size, progress)
        yield k, member, scores, time.perf_counter() - began


def stacked(population):
    """Whether the members are to be tested in one pass: on the CPU that is no faster, and not bit for bit the same."""
    return bool(population.stacks) and population.device.type != "cpu" and population.model.head is not None


@torch.inference_mode()
def together(members, population, progress=None):
    """The logits float32 [texts, C] of each of `members`, read from the device once, after the last batch."""
    population.eval()
    first, parts = members[0][1], [None] * len(population.models)
    for k, member in members:
        parts[k], _ = member.read
    made = batches.by_length_together(parts, first.cell.batch_size, first.setting.tokenizer.pad_id)
    found, rows, starts = [], [], [0]
    for batch, there in batches.ahead(made, population.device):
        found.append(population(there.ids, there.lengths, None, there.alike))  # [K, B, C]
        rows.append(batch.index)
        starts.append(starts[-1] + found[-1].shape[1])
        if progress:
            count = sum(map(len, batch.index))
            progress(count, int(batch.lengths.sum()) - (len(batch.lengths) - count))
    whole, logits = torch.cat(found, dim=1).float().cpu().numpy(), []
    for k, _ in members:
        own = np.zeros((len(parts[k].kept), population.models[k].classifier.out_features), dtype=np.float32)
        for index, start in zip((index[k] for index in rows), starts):
            own[index] = whole[k, start : start + len(index), : own.shape[1]]
        logits.append(own)
    return logits
