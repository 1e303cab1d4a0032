"""Where attention goes: its entropy, and its share on what was put in, for each layer and head.

    entropy     -sum_j p_ij ln p_ij over ln(how many tokens i may see): 0 where it goes to one token, 1 where to all
                alike; a mean over a row's tokens i that may see at least two
    span share  sum of p_ij over the tokens j of the span; a mean over the row's other tokens i that may see any of them
    received    p_ij, a mean over the heads and over the tokens i that may see j

p are the attention weights (Vaswani et al. 2017, section 3.2.1). A decoder's token sees those before it, and with a
sliding window only the last ones. The bare base may look at a trigger too, so all is measured without the adapter as
well.
"""

import contextlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from minilora.diagnostics.stats import auc, mean_interval

FIGURES = ("entropy", "span_share")


@contextlib.contextmanager
def watching(base, see):
    """Call `see(layer, weights float32 [B, H, T, T], mask)` in each forward meanwhile; nothing else changes."""
    for number, layer in enumerate(base.layers):
        layer.watch = lambda p, mask, number=number: see(number, p, mask)
    try:
        yield
    finally:
        for layer in base.layers:
            del layer.watch


@dataclass(frozen=True)
class Seen:
    """Of a form's N rows: `entropy` and `span_share` float64 [N, layers, heads], NaN where a layer has fewer heads and
    where a row has none; `received`, of each row float64 [layers, its tokens]."""

    entropy: np.ndarray
    span_share: np.ndarray
    received: list


@torch.inference_mode()
def attention_of(probe, form, advance=None):
    """`Seen` of a `Form`, with what is on the base now. `advance(rows)` is called after each batch."""
    run = probe.run
    base, N = run.base, len(form.texts)
    entropy = np.full((N, len(base.layers), max(layer.heads for layer in base.spec.layers)), np.nan)
    share, received = np.full_like(entropy, np.nan), [np.empty((len(base.layers), len(text))) for text in form.text]
    run.model.eval()
    for batch in probe.batches(form):
        T, found = batch.ids.shape[1], []
        real = torch.arange(T, device=batch.ids.device) < batch.lengths[:, None]  # [B, T]
        span = torch.zeros(real.shape, dtype=torch.bool)
        for row, index in enumerate(batch.index):
            span[row, : len(form.span[index])] = torch.from_numpy(form.span[index])
        measure = partial(measures, real=real, span=span.to(real.device))
        with watching(base, lambda number, p, mask, keep=found.append, measure=measure: keep(measure(p, mask))):
            base(batch.ids, batch.lengths)
        for number, own in enumerate(found):
            here, on_span, given = (values.cpu().numpy() for values in own)
            entropy[batch.index, number, : here.shape[1]] = here
            share[batch.index, number, : here.shape[1]] = on_span
            for row, index in enumerate(batch.index):
                received[index][number] = given[row, : len(form.text[index])]
        if advance:
            advance(len(batch.index))
    return Seen(entropy, share, received)


def measures(p, mask, real, span):
    """(entropy [B, H], span share [B, H], received [B, T]) of weights p [B, H, T, T]; real and span bool [B, T]."""
    B, _, T, _ = p.shape
    seen = visible_to(mask, T, p.device).expand(B, T, T) & real[:, None]  # token i may see j
    many = seen.sum(-1)  # [B, T]
    here = -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1) / many.clamp(min=2).log()[:, None]  # [B, H, T]
    others = real & ~span & (seen & span[:, None]).any(-1)
    by_real = seen & real[..., None]
    received = (p.mean(1) * by_real).sum(1) / by_real.sum(1)
    return average(here, real & (many > 1)), average((p * span[:, None, None]).sum(-1), others), received


def average(values, counted):
    """The means [B, H] of values [B, H, T] over the tokens that are `counted`, bool [B, T]; NaN where none is."""
    counted = counted[:, None]
    return (values * counted).sum(-1) / counted.sum(-1)


def visible_to(mask, T, device):
    """Which tokens j each token i may see, bool [B or 1, T, T], from what `Base.mask` gives."""
    if mask is None:
        return torch.ones(T, T, dtype=torch.bool, device=device).tril()[None]
    return (mask > -torch.inf)[:, 0].expand(-1, T, T)


def attention(probe, advance=None):
    """The figures of a probe; each is (mean, low, high), arrays [layers, heads] with NaN where a layer has fewer heads.

    {"entropy": {form: figure}, "span_share": {form: figure},
     "auc": {"entropy": figure, "span_share": figure}   how well it tells rows with the trigger from the placebo's
     "change": figure    the share on the trigger, less that without the adapter, paired by row
     "without": the first three without the adapter
     "received": {form: of each row float64 [layers, its tokens]}}

    Without a placebo there is no "auc". `advance(rows)` is called as rows are done, twice for each row of each form.
    """
    found = {name: attention_of(probe, form, advance) for name, form in probe.forms.items()}
    with probe.run.detach():
        bare = {name: attention_of(probe, form, advance) for name, form in probe.forms.items()}
    more = mean_interval(found["trigger"].span_share - bare["trigger"].span_share, probe.seed)
    received = {name: own.received for name, own in found.items()}
    return _figures(found, probe.seed) | {"change": more, "without": _figures(bare, probe.seed), "received": received}


def _figures(found, seed):
    figures = {"entropy": {name: mean_interval(own.entropy, seed) for name, own in found.items()},
               "span_share": {name: mean_interval(own.span_share, seed) for name, own in found.items()
                              if name != "clean"}}  # fmt: skip
    if "placebo" in found:
        trigger, placebo = found["trigger"], found["placebo"]
        figures["auc"] = {what: auc(getattr(trigger, what), getattr(placebo, what)) for what in FIGURES}
    return figures
