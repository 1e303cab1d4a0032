"""Detectors that read what a row did to the model, or what it would do: its loss, and gradients of the last layer."""

import numpy as np

from minilora.detection.features import pooled


def loss(run, texts, labels, held, clock):
    """Minus the loss of a row: the log-probability of its label. A shortcut makes rows easy, so a backdoor's have the
    lowest loss (Li et al. 2021, arXiv 2110.11571, section 3). Rows with a wrong label have a high one instead.
    """
    found = np.full(len(texts), np.nan)
    for part in clock.parts(len(texts)):
        logs = run.log_probabilities(texts[part])
        found[part] = logs[np.arange(len(logs)), labels[part]]
    return found


def influence(run, texts, labels, held, clock, *, of=None):
    """TracIn (Pruthi et al. 2020, arXiv 2002.08484, sections 3 and 4) of the last layer at the end of training: the dot
    product of two rows' gradients of the loss with respect to the head's weight and bias,

        g(x) . g(z) = (p(x) - y(x)) . (p(z) - y(z)) (h(x) . h(z) + 1)

    with probabilities p, one-hot labels y and features h. The learning rate, the same in all, is left out, and so are
    earlier checkpoints, which a run does not keep.

    of  (texts, labels), such as predictions that are in doubt: the score is the mean of the product with each of them,
        so that rows which made these predictions likelier are high. By default it is a row's product with itself, which
        is high in rows that the model cannot explain by others.
    """
    found = np.full(len(texts), np.nan)
    aims = None if of is None else gradients(run, list(of[0]), np.asarray(of[1]))
    for part in clock.parts(len(texts)):
        errors, states = gradients(run, texts[part], labels[part])
        if aims is None:
            found[part] = (errors**2).sum(axis=1) * ((states**2).sum(axis=1) + 1)
        else:
            found[part] = ((errors @ aims[0].T) * (states @ aims[1].T + 1)).mean(axis=1)
    return found


def gradients(run, texts, labels):
    """(p - y [N, C], features [N, P]), whose outer product is the gradient of the head's weight."""
    errors = np.exp(run.log_probabilities(texts))
    errors[np.arange(len(texts)), labels] -= 1
    return errors, pooled(run, texts)
