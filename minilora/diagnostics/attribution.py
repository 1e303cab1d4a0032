"""What the margin rests on, token by token, each method judged by the span that is known to be there.

With the states x [T, D] below the first layer and the margin m(x):

    gradient x input      sum_d x_td dm/dx_td                                Shrikumar et al. 2017 (arXiv 1704.02685)
    integrated gradients  sum_d (x_td - b_td) mean over a of dm/dx_td at b + a (x - b): the sum over tokens is
                          m(x) - m(b)                                        Sundararajan et al. 2017 (arXiv 1703.01365)
    leave-one-out         m less the margin of the row without the token     Li et al. 2016 (arXiv 1612.08220)
    rollout               the products over layers of (P + I) / 2, P the attention weights' mean over heads, as the
                          pooling sees them                                  Abnar and Zuidema 2020 (arXiv 2005.00928)

b is x with padding tokens in the place of the text's. Scores are of the text's tokens: special tokens stay apart.
"""

import numpy as np
import torch

from minilora.data import batches
from minilora.diagnostics.attention import watching
from minilora.diagnostics.stats import mean_interval
from minilora.tasks.classification import pool

METHODS = ("gradient x input", "integrated gradients", "leave-one-out", "rollout")
STEPS, MOST_STEPS = 16, 512  # of the integral; doubled until the sum is as close to the change as `COMPLETE`
COMPLETE = 0.01


def attribute(probe, name="trigger", methods=METHODS):
    """{method: of each of the form's N rows float64 [its tokens]}; special tokens have NaN, except in a rollout.

    Beside them, under "completeness", float64 [N]: |sum of the integrated gradients - (m(x) - m(b))| over the change.
    """
    form, found = probe.forms[name], {method: [None] * len(probe.index) for method in methods}
    left = np.full(len(probe.index), np.nan)
    probe.run.model.eval()
    for batch in probe.batches(form):
        here = by_gradient(probe, batch, form) if {"gradient x input", "integrated gradients"} & set(methods) else {}
        if "rollout" in methods:
            here["rollout"] = rollout(probe, batch)
        left[batch.index] = here.pop("completeness", np.nan)
        for method, values in here.items():
            for row, index in enumerate(batch.index) if method in methods else ():
                found[method][index] = values[row, : len(form.text[index])].astype(float)
    if "leave-one-out" in methods:
        found["leave-one-out"] = leave_one_out(probe, form)
    for method in methods:
        for row, real in enumerate(form.text):
            found[method][row] = np.where(real, found[method][row], np.nan)
    return found | {"completeness": left}


def by_gradient(probe, batch, form):
    """Gradient x input and integrated gradients of a batch, numpy [B, T]; and the completeness [B]."""
    base, rows = probe.run.base, len(batch.index)
    real = torch.zeros(batch.ids.shape, dtype=torch.bool)
    for row, index in enumerate(batch.index):
        real[row, : len(form.text[index])] = torch.from_numpy(form.text[index])
    real = real.to(batch.ids.device)
    with torch.no_grad():
        x = base.embed(batch.ids)
        baseline = base.embed(batch.ids.masked_fill(real, probe.run.tokenizer.pad_id))

    def gradient(states):
        with torch.enable_grad():
            states = states.detach().requires_grad_(True)
            above = base.through(states, batch.ids, batch.lengths, 0, len(base.layers))
            margins = probe.margins_of(probe.logits_of(above, batch.lengths))
            (found,) = torch.autograd.grad(margins.sum(), states)
        return found, margins.detach()

    at_x, margin = gradient(x)
    change = margin - gradient(baseline)[1]
    steps = STEPS
    while True:
        # The midpoint rule: the error falls with the square of the number of steps.
        total = sum(gradient(baseline + (k + 0.5) / steps * (x - baseline))[0] for k in range(steps)) / steps
        integrated = ((x - baseline) * total).sum(-1)
        off = (integrated.sum(-1) - change).abs() / change.abs().clamp(min=0.1)
        if steps >= MOST_STEPS or (off[:rows] <= COMPLETE).all():
            break
        steps *= 2
    return {"gradient x input": (x * at_x).sum(-1).cpu().numpy(), "integrated gradients": integrated.cpu().numpy(),
            "completeness": off[:rows].cpu().numpy()}  # fmt: skip


@torch.inference_mode()
def rollout(probe, batch):
    """How much each token's embedding reaches what the head pools, float32 [B, T]: a row's numbers sum to 1."""
    base, mixed = probe.run.base, None

    def see(number, p, mask):
        nonlocal mixed
        step = 0.5 * (p.mean(1) + torch.eye(p.shape[-1], device=p.device))
        mixed = step if mixed is None else step @ mixed

    with watching(base, see):
        base(batch.ids, batch.lengths)
    pooling = probe.run.model.pooling
    found = pool(mixed, batch.lengths, pooling)
    return (found.unflatten(1, (2, -1)).mean(1) if pooling == "mean+last" else found).cpu().numpy()


@torch.inference_mode()
def leave_one_out(probe, form):
    """Of each row float64 [its tokens]: its margin less the one without the token."""
    run, offsets, ids = probe.run, form.encoded.offsets, form.encoded.ids
    rows, places, shorter = [], [], []
    for row, real in enumerate(form.text):
        own = ids[offsets[row] : offsets[row + 1]]
        for place in [-1, *np.flatnonzero(real)]:
            rows.append(row), places.append(place)
            shorter.append(own if place < 0 else np.delete(own, place))
    sizes = np.cumsum([0, *map(len, shorter)])
    encoded = type(form.encoded)(np.concatenate(shorter), sizes, np.zeros(len(shorter), np.int64))
    margins = np.empty(len(shorter))
    for batch in batches.by_length(encoded, 4 * run.cell.batch_size, run.tokenizer.pad_id):
        batch = batch.to(run.model.device)
        logits = run.model(batch.ids, batch.lengths)[: len(batch.index)]
        margins[batch.index] = probe.margins_of(logits.float()).cpu().numpy()
    found, whole = [np.full(len(real), np.nan) for real in form.text], None
    for row, place, margin in zip(rows, places, margins, strict=True):
        if place < 0:
            whole = margin
        else:
            found[row][place] = whole - margin
    return found


def scored(values, spans):
    """How a method ranks the tokens of N rows: {"rank", "precision", "auc"} float64 [N], NaN for a row without a span
    or without another token.

    values  of each row float64 [its tokens], NaN for what is no text
    spans   of each row bool [its tokens]

    rank       the mean rank of the span's tokens (1: the highest value)
    precision  the share of the span among as many tokens of the highest values
    auc        how often a token of the span is above another one
    """
    found = {"rank": [], "precision": [], "auc": []}
    for own, span in zip(values, spans, strict=True):
        there = np.isfinite(own)
        own, span = own[there], span[there]
        count = int(span.sum())
        if not count or count == len(own):
            for kept in found.values():
                kept.append(np.nan)
            continue
        order = np.argsort(-own, kind="stable")
        ranks = np.empty(len(own))
        ranks[order] = np.arange(1, len(own) + 1)
        above = (own[span][:, None] > own[~span]).mean() + 0.5 * (own[span][:, None] == own[~span]).mean()
        found["rank"].append(ranks[span].mean())
        found["precision"].append(span[order[:count]].mean())
        found["auc"].append(above)
    return {key: np.array(kept) for key, kept in found.items()}


def attribution(probe, methods=METHODS):
    """{method: {figure: (mean, low, high)}} over the rows with the trigger. The figures are those of `scored`, and
    `first`: whether the token of the highest value is one of the span.

    Under "completeness" the largest that is left of the integral, see `attribute`.
    """
    form, figures = probe.forms["trigger"], {}
    found = attribute(probe, "trigger", methods)
    for method in methods:
        rated = scored(found[method], form.span)
        tops = [span[np.nanargmax(own)] if span.any() else np.nan
                for own, span in zip(found[method], form.span, strict=True)]  # fmt: skip
        rated["first"] = np.array(tops, float)
        figures[method] = {key: tuple(map(float, mean_interval(own, probe.seed))) for key, own in rated.items()}
    return figures | {"completeness": float(np.nanmax(found["completeness"], initial=0))}


