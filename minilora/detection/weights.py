"""Statistics of an adapter's update dW, module by module, and how far they are from those of clean adapters.

The five figures of "Weight space Detection of Backdoors in LoRA Adapters" (arXiv 2602.15195): the largest singular
value s_1, the Frobenius norm, the concentration s_1^2 / sum s^2, the entropy of s^2 / sum s^2 in nats, and the excess
kurtosis of the update's entries. The paper fits a classifier on clean and poisoned adapters, and PEFTGuard (arXiv
2411.17453) another one on the weights themselves; here, where nothing poisoned is known, it is their distance from the
clean ones. All compare adapters of one base, rank and set of modules only.
"""

import numpy as np
import torch

from minilora.diagnostics.energy import update_of, updates
from minilora.lora.variants import plain_factors

NAMES = ("largest singular value", "norm", "concentration", "entropy", "kurtosis")
LEAST = 4  # clean adapters


@torch.inference_mode()
def statistics(run):
    """{module: [5], as `NAMES`} of an opened run's update. Raises InputError where there is none."""
    found = {}
    for name, layer in updates(run).items():
        update = update_of(layer)
        if layer.magnitude is None:  # the singular values of s B A are those of an R x R matrix
            A, B = (factor.double() for factor in plain_factors(layer))
            small = torch.linalg.qr(B)[1] @ torch.linalg.qr(A.T)[1].T
            values = torch.linalg.svdvals(small) * abs(layer.factor * layer.slot.scale)
        else:
            values = torch.linalg.svdvals(update)
        squares = values.square()
        share = squares / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)
        entropy = -torch.special.xlogy(share, share).sum()
        centred = update - update.mean()
        variance = centred.square().mean().clamp(min=torch.finfo(torch.float64).tiny)
        kurtosis = centred.pow(4).mean() / variance.square() - 3 if update.any() else torch.zeros(())
        found[name] = [float(one) for one in (values.max(), squares.sum().sqrt(), share.max(), entropy, kurtosis)]
    return found


def distance(own, clean):
    """(The root mean square over modules and figures of own's z-scores, the largest [(module, figure, z)]).

    own    what `statistics` gives
    clean  the same of at least `LEAST` clean adapters with the same modules
    """
    modules = sorted(own)
    values = np.array([own[module] for module in modules])  # [M, 5]
    others = np.array([[one[module] for module in modules] for one in clean])  # [N, M, 5]
    sd = np.maximum(others.std(0, ddof=1), 1e-12)
    z = (values - others.mean(0)) / sd
    order = np.argsort(-np.abs(z), axis=None)[:3]
    largest = [(modules[at // len(NAMES)], NAMES[at % len(NAMES)], float(z.flat[at])) for at in order.tolist()]
    return float(np.sqrt((z**2).mean())), largest


def left_out(clean):
    """The `distance` of each clean adapter from the others."""
    return [distance(one, clean[:at] + clean[at + 1 :])[0] for at, one in enumerate(clean)]
