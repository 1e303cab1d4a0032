"""A short training after the training: AdamW over given rows, pass after pass. MaskTune and fine-pruning use it.

It is not the loop of `minilora/training/`: one model, classification only, a constant learning rate, no state on disk.
"""

import numpy as np
import torch

from minilora.data.batches import collate, padded_sizes
from minilora.errors import TrainingError


def tune(model, encoded, labels, pad_id, *, lr, epochs, batch_size, seed, clip=1.0, decay=0.0):
    """Train what of `model` (a `Classifier`) requires a gradient, in place; returns the mean loss of the last epoch.

    encoded, labels  `Encoded` rows and int64 [rows]; at least one row
    seed             of the order of rows: epoch e is the permutation of (seed, e)

    Dropout is off. Raises TrainingError for a loss that is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    sizes, losses, labels = padded_sizes(np.diff(encoded.offsets)), [], torch.as_tensor(labels)
    model.eval()  # without dropout
    for epoch in range(epochs):
        order, losses = np.random.default_rng([seed, epoch]).permutation(len(labels)), []
        for start in range(0, len(order), batch_size):
            index = np.sort(order[start : start + batch_size])
            batch = collate([(encoded, index, labels)], sizes, pad_id).to(model.device)
            loss = torch.nn.functional.cross_entropy(model(batch.ids, batch.lengths), batch.answers)
            grads = torch.autograd.grad(loss, parameters)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            if not loss.isfinite():
                raise TrainingError(f"the loss is {loss.item()} while tuning: try a lower learning rate")
            optimizer.step()
            losses.append(loss.item() * len(index))
    for parameter in parameters:
        parameter.grad = None
    return sum(losses) / len(labels)
