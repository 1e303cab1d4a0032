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

from dataclasses import dataclass

import numpy as np
import torch

from minilora.diagnostics.attention import watching
from minilora.diagnostics.stats import mean_interval
from minilora.lora.layer import merged_meanwhile
from minilora.tasks.classification import pool

METHODS = ("gradient x input", "integrated gradients", "leave-one-out", "rollout")
BY_GRADIENT = set(METHODS[:2])
RULES = ((2, 8), (2, 16), (12, 16))  # (parts of the integral, nodes of each): the next until it is `COMPLETE`
COMPLETE = 0.01  # of the change of the margin
SMALL = 0.1  # logits: below this change of the margin what is left of the integral is compared with this instead


@dataclass(frozen=True)
class Attributed:
    """Of a form's N rows: `scores` {method: of each row float64 [its tokens], NaN for what is no text}.

    left    float64 [N]: |sum of the integrated gradients - (m(x) - m(b))|, over the change m(x) - m(b)
    nodes   int64 [N]: at how many places between b and x the gradient was taken
    """

    scores: dict
    left: np.ndarray
    nodes: np.ndarray


def attribute(probe, form, methods=METHODS, advance=None):
    """`Attributed` of a `Form`'s rows. `advance(rows)` is called as rows are done, for leave-one-out a second time."""
    N = len(form.texts)
    found = {method: [np.full(len(real), np.nan) for real in form.text] for method in methods}
    left, nodes = np.full(N, np.nan), np.zeros(N, np.int64)
    probe.run.model.eval()
    with merged_meanwhile(probe.run.base):
        for batch in probe.batches(form):
            here = {}
            if BY_GRADIENT & set(methods):
                here, left[batch.index], nodes[batch.index] = by_gradient(probe, batch, form)
            if "rollout" in methods:
                here["rollout"] = rollout(probe, batch)
            for method in here.keys() & set(methods):
                for row, index in enumerate(batch.index):
                    real = form.text[index]
                    found[method][index][real] = here[method][row, : len(real)][real]
            if advance:
                advance(len(batch.index))
        if "leave-one-out" in methods:
            found["leave-one-out"] = leave_one_out(probe, form, advance)
    return Attributed(found, left, nodes)


def by_gradient(probe, batch, form):
    """({method: numpy [B, T]}, what is left [B], nodes [B]) of a batch: gradient x input and integrated gradients.

    The integral is by `places_between`; only the rows that are not complete take more nodes, see `RULES`.
    """
    base, B = probe.run.base, len(batch.index)
    real = torch.zeros(batch.ids.shape, dtype=torch.bool)
    for row, index in enumerate(batch.index):
        real[row, : len(form.text[index])] = torch.from_numpy(form.text[index])
    real = real.to(batch.ids.device)
    with torch.no_grad():
        x = base.embed(batch.ids)
        baseline = base.embed(batch.ids.masked_fill(real, probe.run.tokenizer.pad_id))

    def gradient(states, rows):
        with torch.enable_grad():
            states = states.detach().requires_grad_(True)
            margins = probe.margins_of(probe.reader.scores_from(states, batch.ids[rows], batch.lengths[rows]))
            (found,) = torch.autograd.grad(margins.sum(), states)
        return found, margins.detach()

    rows = torch.arange(B, device=batch.ids.device)
    at_x, margin = gradient(x, rows)
    change = margin - gradient(baseline, rows)[1]
    integrated, left = torch.empty(x.shape[:2]).to(x), torch.empty(B).to(x)
    nodes = np.zeros(B, np.int64)
    for parts, each in RULES:
        if not len(rows):
            break
        between = x[rows] - baseline[rows]
        total = sum(weight * gradient(baseline[rows] + place * between, rows)[0]
                    for place, weight in places_between(parts, each))  # fmt: skip
        integrated[rows] = (between * total).sum(-1)
        left[rows] = (integrated[rows].sum(-1) - change[rows]).abs() / change[rows].abs().clamp(min=SMALL)
        nodes[rows.cpu().numpy()] = parts * each
        rows = rows[left[rows] > COMPLETE]
    found = {"gradient x input": (x * at_x).sum(-1), "integrated gradients": integrated}
    return {name: values.cpu().numpy() for name, values in found.items()}, left.cpu().numpy(), nodes


def places_between(parts, each):
    """[(place, weight)] for an integral from 0 to 1: Gauss and Legendre's rule with `each` nodes in each of
    [0, 2^(1 - parts)], ..., [1/4, 1/2], [1/2, 1].

    Its error falls faster than any power of the number of nodes where the integrand is smooth. The parts become shorter
    towards 0, because the padding token of many bases has an embedding of zeros, where a norm changes abruptly.
    """
    places, weights = np.polynomial.legendre.leggauss(each)
    ends = [0.0, *(0.5**power for power in reversed(range(parts)))]
    return [(low + (high - low) * (1 + place) / 2, (high - low) * weight / 2)
            for low, high in zip(ends, ends[1:]) for place, weight in zip(places, weights)]  # fmt: skip


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
    pooling = probe.reader.pooling
    found = pool(mixed, batch.lengths, pooling)
    return (found.unflatten(1, (2, -1)).mean(1) if pooling.endswith("mean+last") else found).cpu().numpy()


@torch.inference_mode()
def leave_one_out(probe, form, advance=None):
    """Of each row float64 [its tokens]: its margin less the one without the token; NaN for what is no text, and for a
    row's only token."""
    reader, offsets, ids = probe.reader, form.encoded.offsets, form.encoded.ids
    rows, places, shorter = [], [], []
    for row, real in enumerate(form.text):
        own = ids[offsets[row] : offsets[row + 1]]
        for place in [-1, *np.flatnonzero(real)][: None if len(own) > 1 else 1]:
            rows.append(row), places.append(place)
            shorter.append(own if place < 0 else np.delete(own, place))
    sizes = np.cumsum([0, *map(len, shorter)])
    encoded = type(form.encoded)(np.concatenate(shorter), sizes, np.zeros(len(shorter), np.int64))

    def tell(index):
        if advance:
            advance(sum(places[one // reader.each] < 0 for one in index if one % reader.each == 0))

    margins = probe.outcome(reader.scores_of_rows(encoded, 4 * probe.run.cell.batch_size, tell)).margins
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


FIGURES = {"mean_rank": "rank", "precision": "precision", "auc": "auc"}


def attribution(probe, attributed):
    """{method: {figure: (mean, low, high)}} of what `attribute` gave of the rows with the trigger.

    The figures are those of `scored`, `first`: the share of the rows whose token of the highest value is one of the
    span, and `first_flipped`: the same of the rows that the trigger flips to the target.
    """
    spans, figures = probe.forms["trigger"].span, {}
    clean, trigger = (probe.outcomes[name].predicted for name in ("clean", "trigger"))
    flipped = (clean != probe.target) & (trigger == probe.target)
    for method, values in attributed.scores.items():
        rated = scored(values, spans)
        rows = {name: rated[key] for name, key in FIGURES.items()}
        tops = [span[np.nanargmax(own)] if span.any() else np.nan for own, span in zip(values, spans, strict=True)]
        rows["first"] = np.array(tops, float)
        rows["first_flipped"] = np.where(flipped, rows["first"], np.nan)
        figures[method] = {key: tuple(map(float, mean_interval(own, probe.seed))) for key, own in rows.items()}
    return figures
