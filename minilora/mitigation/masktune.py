"""While training, at its end: MaskTune, which hides what the model looks at and lets it look again.

Asgari Taghanaki et al. 2022 (arXiv 2210.00055, section 3): after the training, the most salient input of every training
row is masked, and the model is tuned on the masked rows for one epoch. For images the saliency is a class activation
map and a masked pixel is 0. Here, for a text:

- the saliency of a token is the part of (its embedding x the gradient of the predicted label's logit) that is above 0,
  summed over the width: what xGradCAM is at the input layer;
- masked are the tokens above mean + 2 standard deviations of a row's salient tokens: the threshold of the authors' code
  (src/utils/masking.py); a masked token is taken out of the row, and special tokens never are;
- the tuning has a tenth of the cell's learning rate, constant, and its batch size, clipping and weight decay. The tenth
  is ours: the authors go on at the last rate, which our schedules bring to 0.
"""

from dataclasses import replace

import numpy as np
import torch

from minilora.data import batches
from minilora.mitigation.tokens import free_tokens
from minilora.mitigation.tune import tune

DEVIATIONS = 2.0
RATE = 0.1  # of the cell's learning rate


def masktune(model, tokenizer, encoded, labels, cell):
    """Tune `model` (a `Classifier` with its adapter) on masked rows, in place; returns a report for results.json.

    encoded, labels  the training rows, and int64 [rows]; rows without a token are left out
    """
    rows = np.flatnonzero(np.diff(encoded.offsets) > 0)
    encoded = at(encoded, rows)
    masked, hidden = mask(model, tokenizer, encoded, cell.batch_size)
    loss = tune(
        model, masked, np.asarray(labels)[rows], tokenizer.pad_id, lr=RATE * cell.lr, epochs=1,
        batch_size=cell.batch_size, seed=cell.seed_for("order"), clip=cell.clip, decay=cell.weight_decay,
    )  # fmt: skip
    return {"masked_tokens": hidden, "tokens": int(encoded.offsets[-1]), "tuned_rows": len(rows), "tuned_loss": loss}


def mask(model, tokenizer, encoded, batch_size):
    """(The rows without their salient tokens, how many these are); `encoded` as `at` gives it."""
    lengths = np.diff(encoded.offsets)
    starts, gone = encoded.offsets[:-1], np.zeros(int(encoded.offsets[-1]), bool)
    free = free_tokens(lengths, *tokenizer.special)
    for rows, scores in saliencies(model, encoded, tokenizer.pad_id, batch_size):
        for row, own in zip(rows.tolist(), scores, strict=True):
            place = slice(starts[row], starts[row] + lengths[row])
            gone[place] = salient(np.where(free[place], own[: lengths[row]], 0))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    counts = np.bincount(owner[~gone], minlength=len(lengths))
    return replace(encoded, ids=encoded.ids[~gone], offsets=np.concatenate([[0], counts.cumsum()])), int(gone.sum())


def salient(scores):
    """Which of a row's saliencies [T], at least 0, are above mean + 2 standard deviations of those above 0."""
    above = scores[scores > 0]
    return scores > (above.mean() + DEVIATIONS * above.std() if len(above) else np.inf)


def saliencies(model, encoded, pad_id, batch_size):
    """Yield (rows, saliencies float32 [B, T]) of all rows of `encoded`, with the model in `eval` mode."""
    model.eval()
    kept = []

    def keep(module, inputs, output):
        kept.append(output.detach().requires_grad_(True))
        return kept[-1]

    hook = model.base.embed.register_forward_hook(keep)
    try:
        for batch in batches.by_length(encoded, batch_size, pad_id, device=model.device):
            kept.clear()
            there = batch.to(model.device)
            logits = model(there.ids, there.lengths)
            (gradient,) = torch.autograd.grad(logits.max(dim=1).values.sum(), kept)
            scores = (gradient * kept[0]).sum(-1).clamp(min=0).detach().float().cpu().numpy()
            yield batch.index, scores[: len(batch.index)]
    finally:
        hook.remove()


def at(encoded, rows):
    """The rows at `rows`, ascending, of an `Encoded` in which all others are empty, with ids of their own."""
    lengths, start = np.diff(encoded.offsets)[rows], encoded.offsets[0]
    ids, offsets = encoded.ids[start : encoded.offsets[-1]], np.concatenate([[0], lengths.cumsum()])
    return replace(encoded, ids=ids, offsets=offsets, kept=encoded.kept[rows])
