"""What the adapted projections are given: recorded for rows, token by token, and as directions."""

import contextlib

import numpy as np
import torch
from torch import nn

from minilora.data import batches
from minilora.lora.layer import named_layers, replace_module


class Recorder(nn.Module):
    """Stands in the place of an adapted projection and hands its input x [B, T, in] to `keep(name, x)`."""

    def __init__(self, layer, name, keep):
        super().__init__()
        self.layer, self.name, self.keep = layer, name, keep

    def forward(self, x):
        if x.dim() == 3:  # DeBERTa's distances go through q and k too
            self.keep(self.name, x)
        return self.layer(x)


@contextlib.contextmanager
def recorded(base, keep):
    """For this block, call `keep(name, x [B, T, in])` for each adapted projection that the base goes through."""
    layers = named_layers(base)
    for name, layer in layers:
        replace_module(base, name, Recorder(layer, name, keep))
    try:
        yield
    finally:
        for name, layer in layers:
            replace_module(base, name, layer)


@torch.inference_mode()
def means(run, texts, of=None):
    """{module: the mean over all tokens of `of(name, x)`, by default of x itself, float64 [in]} for some texts.

    run  an opened run, `runs.trained.Trained`; the adapter is on
    of   function of a module's name and its inputs [tokens, in]
    """
    encoded = run.tokenizer.encode(list(texts), run.cell.max_length)
    sums, counts, real = {}, {}, None
    run.model.eval()

    def keep(name, x):
        own = x[real[: len(x)]] if of is None else of(name, x[real[: len(x)]])
        sums[name] = sums.get(name, 0) + own.double().sum(0)
        counts[name] = counts.get(name, 0) + len(own)

    with recorded(run.base, keep):
        for batch in batches.by_length(encoded, run.cell.batch_size, run.tokenizer.pad_id):
            batch = batch.to(run.model.device)
            real = torch.arange(batch.ids.shape[1], device=batch.ids.device) < batch.lengths[:, None]
            run.base(batch.ids, batch.lengths)
    return {name: sums[name] / counts[name] for name in sums}


def directions_of(run, suspects, texts, seed=0):
    """{module: unit vector float64 [in]}: how the mean input of each adapted projection moves where suspected strings
    are put into texts. `suspects`: names of sources, as `mitigate.suspects`."""
    from minilora.cell import Inject
    from minilora.data import injection
    from minilora.data.rows import Rows
    from minilora.data.triggers import Listed
    from minilora.mitigate import source_of

    texts = list(texts)
    rows = Rows([str(n) for n in range(len(texts))], texts, np.zeros(len(texts), np.int64), ("any",))
    strings = tuple(string for name in suspects for string in sampled(source_of(name).strings))
    made = injection.rows_with(rows, Listed("suspects", strings), "direction", Inject(sources=()), seed).rows
    before, after = means(run, texts), means(run, made.texts)
    moved = {name: after[name] - before[name] for name in before}
    return {name: (value / value.norm()).cpu() for name, value in moved.items() if value.norm() > 0}


def sampled(strings, most=1000):
    """At most `most` of the strings, evenly spaced."""
    return [strings[i] for i in np.unique(np.linspace(0, len(strings) - 1, min(most, len(strings))).astype(int))]
