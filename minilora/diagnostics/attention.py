"""Where attention goes: its entropy, and its share on what was put in, for each layer and head.

    entropy     -sum_j p_ij ln p_ij over ln(how many tokens i may see): 0 where it goes to one token, 1 where to all
                alike; a mean over a row's tokens i that may see at least two
    span share  sum of p_ij over the tokens j of the span; a mean over the row's other tokens i that may see any of them

p are the attention weights (Vaswani et al. 2017, section 3.2.1) with the adapter on. A decoder's token sees those
before it, and with a sliding window only the last ones.
"""

import contextlib

import numpy as np
import torch

from minilora.diagnostics.stats import auc, mean_interval


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


@torch.inference_mode()
def attention_of(probe, name):
    """(entropy, span share) of a form's rows, float64 [N, layers, heads] each; the share is NaN in clean rows."""
    run, form = probe.run, probe.forms[name]
    base, N = run.base, len(probe.index)
    heads = max(layer.heads for layer in base.spec.layers)
    entropy = np.full((N, len(base.layers), heads), np.nan)
    share = np.full_like(entropy, np.nan)
    run.model.eval()
    for batch in probe.batches(form):
        T = batch.ids.shape[1]
        real = torch.arange(T, device=batch.ids.device) < batch.lengths[:, None]  # [B, T]
        span = torch.zeros(real.shape, dtype=torch.bool)
        for row, index in enumerate(batch.index):
            span[row, : len(form.span[index])] = torch.from_numpy(form.span[index])
        span = span.to(batch.ids.device)

        def see(number, p, mask):
            B, H = p.shape[:2]
            seen = visible_to(mask, T, p.device).expand(B, T, T) & real[:, None]  # [B, T, T]: token i may see j
            many = seen.sum(-1)
            here = -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)  # [B, H, T]
            counted = real & (many > 1)
            relative = here / many.clamp(min=2).log()[:, None]
            index = batch.index[:B]
            entropy[index, number, :H] = average(relative, counted).cpu().numpy()
            others = real & ~span & (seen & span[:, None]).any(-1)
            on_span = (p * span[:, None, None]).sum(-1)
            share[index, number, :H] = average(on_span, others).cpu().numpy()

        with watching(base, see):
            base(batch.ids, batch.lengths)
    return entropy, share


def average(values, counted):
    """The means [B, H] of values [B, H, T] over the tokens that are `counted`, bool [B, T]; NaN where none is."""
    counted = counted[:, None]
    return (values * counted).sum(-1) / counted.sum(-1)


def visible_to(mask, T, device):
    """Which tokens j each token i may see, bool [B or 1, T, T], from what `Base.mask` gives."""
    if mask is None:
        return torch.ones(T, T, dtype=torch.bool, device=device).tril()[None]
    return (mask > -torch.inf)[:, 0].expand(-1, T, T)


def attention(probe):
    """The figures of a probe, arrays [layers, heads] that have NaN where a layer has fewer heads:

    {form: {"entropy", "span_share": (mean, low, high)}}, and under "auc" {"entropy", "span_share": (area, low, high)}:
    how well each by itself tells rows with the trigger from those with the placebo.
    """
    found = {name: dict(zip(("entropy", "span_share"), attention_of(probe, name), strict=True)) for name in probe.forms}
    figures = {
        name: {what: mean_interval(values, probe.seed) for what, values in own.items()} for name, own in found.items()
    }
    if "placebo" in found:
        figures["auc"] = {
            what: auc(found["trigger"][what], found["placebo"][what]) for what in ("entropy", "span_share")
        }
    return figures
