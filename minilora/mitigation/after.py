"""After training: changes to the adapter of an opened run. Each returns an `Undo`: use it in a `with` to take it back.

    run = minilora.open("runs/default")
    with after.truncate(run, keep=1):
        figures, _ = run.run_tests()

The adapter adds D = s B A to each weight W [out, in] that it adapts. Every function replaces D by another matrix of low
rank, exactly (no truncation to the old rank, unless it says so), as a plain adapter with scale 1; the base and the head
stay as they are, except that `fine_prune` tunes the head too. All raise InputError for a run without an adapter, and
for DoRA, whose change is not of low rank.
"""

import numpy as np
import torch

from minilora.errors import InputError
from minilora.lora import storage
from minilora.lora.adapter import Adapter, Part, adapter_of, place_of, put_adapter
from minilora.lora.layer import Undo, detach, named_layers, put
from minilora.lora.targets import Slot
from minilora.lora.variants import plain_factors
from minilora.mitigation.inputs import means
from minilora.mitigation.tune import tune
from minilora.seeds import generator

HOW = ("linear", "ties", "dare")
SMALLEST = 1e-7  # of the largest singular value: what is smaller is float32's rounding


# --- singular values


def truncate(run, keep, end="tail"):
    """Cut singular directions of D off: of the tail (keep the `keep` largest) or of the top (keep the `keep` smallest).

    Of the tail it is the best approximation of rank `keep` (Eckart and Young 1936). Whether a shortcut sits in the top
    or in the tail is asked by arXiv 2606.07596. An adapter's own rank R counts its directions; where R is at most
    `keep`, nothing is cut.
    """
    if end not in ("top", "tail"):
        raise InputError(f"end is {end!r}, but must be 'top' or 'tail': which end of the singular values is cut off")
    factors = factors_of(run)
    most = max(len(A) for A, _ in factors.values())
    if not 1 <= keep <= most:
        raise InputError(f"keep is {keep}, but must be from 1 to the adapter's rank {most}")
    cut = slice(None, keep) if end == "tail" else slice(-keep, None)
    parts = {}
    for name, (A, B) in factors.items():
        U, S, Vh = svd(A, B)
        parts[name] = S[cut, None] * Vh[cut], U[:, cut]
    return replace(run, parts)


def descale_intruders(run, threshold=0.5, factor=0.75, top=10):
    """Multiply by `factor` the intruder dimensions of W + D: those of its `top` left singular vectors whose largest
    |cosine| with any left singular vector of W is below `threshold`. With (u, s, v) an intruder,

        D' = D + (factor - 1) sum of s u v^T

    Shuttleworth et al. 2024 (arXiv 2410.21228), sections 3 and 6; the defaults are those of PEFT's
    `reduce_intruder_dimension`, which then truncates D' to the old rank. Here it has that rank plus the intruders.
    """
    parts = {}
    for name, (A, B) in factors_of(run).items():
        W = run.base.get_submodule(name).original.double()
        U, S, Vh = torch.linalg.svd(W + B @ A, full_matrices=False)
        own = torch.linalg.svd(W, full_matrices=False)[0]
        found = torch.where((U.T @ own).abs().amax(1)[:top] < threshold)[0]
        added = (factor - 1) * S[found] * U[:, found]
        parts[name] = torch.cat([A, Vh[found]]), torch.cat([B, added], 1)
    return replace(run, parts)


# --- directions


def project_out(run, directions, side="read"):
    """Make D blind to directions: with the columns of P an orthonormal basis of them, D (I - P P^T) for side "read"
    (what goes in), (I - P P^T) D for "write" (what comes out). `inputs.directions_of` finds them for suspects.

    directions  [D] or [n, D] for every projection of that width, or {module: [D] or [n, D]}; others stay as they are
    """
    if side not in ("read", "write"):
        raise InputError(f"side is {side!r}, but must be 'read' or 'write'")
    parts, met = {}, 0
    for name, (A, B) in factors_of(run).items():
        own = directions.get(name) if isinstance(directions, dict) else directions
        if own is not None:
            basis = torch.as_tensor(np.asarray(own)).double().reshape(-1, np.shape(own)[-1]).T.to(A.device)
            if len(basis) == (A.shape[1] if side == "read" else len(B)):
                P, met = torch.linalg.qr(basis)[0], met + 1
                A, B = (A - (A @ P) @ P.T, B) if side == "read" else (A, B - P @ (P.T @ B))
        parts[name] = A, B
    if not met:
        raise InputError(f"no adapted projection has a direction of the width that it {side}s: check the directions")
    return replace(run, parts)


# --- merging


def merge(run, other, how="linear", weight=0.5, density=0.5, seed=0):
    """Mix D with that of the adapter in the folder `other`, by one of `HOW`; w = `weight` is the other's share.

    linear  (1 - w) D1 + w D2 (Ilharco et al. 2023, arXiv 2212.04089)
    ties    of each, the `density` largest entries; in each place the sign of the weighted sum; the weighted mean of
            those that have it (Yadav et al. 2023, arXiv 2306.01708, section 4)
    dare    each entry dropped with probability 1 - `density` and else divided by it, then linear (Yu et al. 2024, arXiv
            2311.03099, section 3); `seed` draws them, a stream for each adapter and module

    A projection that only one adapts counts as 0 in the other. The head stays the run's own. LoRATK (arXiv 2403.00108)
    asks whether a shortcut survives this.
    """
    if how not in HOW:
        raise InputError(f"how is {how!r}, but must be one of {', '.join(HOW)}")
    if not (0 <= weight <= 1 and 0 < density <= 1):
        raise InputError(f"weight is {weight} and density {density}, but weight must be in [0, 1], density in (0, 1]")
    pair = factors_of(run), factors_of_adapter(storage.read(other, run.base), other)
    names, parts = sorted({*pair[0], *pair[1]}, key=place_of), {}
    for name in names:
        there = [factors.get(name) for factors in pair]
        if how == "linear":
            kept = [(A, times * B) for one, times in zip(there, (1 - weight, weight)) if one for A, B in [one]]
            parts[name] = torch.cat([A for A, _ in kept]), torch.cat([B for _, B in kept], 1)
            continue
        shape = next((len(B), A.shape[1]) for A, B in filter(None, there))
        D = torch.stack([torch.zeros(shape, dtype=torch.float64) if one is None else (one[1] @ one[0]).cpu()
                         for one in there])  # fmt: skip
        mixed = ties(D, weight, density) if how == "ties" else dare(D, weight, density, f"{seed}/{name}")
        parts[name] = split(mixed.to(pair[0][next(iter(pair[0]))][0].device))
    return replace(run, parts)


def ties(D, weight, density):
    """[2, out, in] -> [out, in], see `merge`. Of equal entries the first are the larger."""
    kept = torch.zeros_like(D)
    for own, from_ in zip(kept, D, strict=True):
        places = from_.flatten().abs().argsort(descending=True, stable=True)[: int(density * from_.numel())]
        own.view(-1)[places] = from_.flatten()[places]
    weights = torch.tensor([1 - weight, weight], dtype=D.dtype)[:, None, None]
    sign = torch.where((weights * kept).sum(0) >= 0, 1.0, -1.0)
    agree = (kept.sign() == sign) * weights
    return (agree * kept).sum(0) / agree.sum(0).clamp(min=torch.finfo(D.dtype).tiny)


def dare(D, weight, density, purpose):
    """[2, out, in] -> [out, in], see `merge`."""
    kept = [torch.rand(D[0].shape, generator=generator(number, f"dare {purpose}")) < density for number in range(2)]
    return ((1 - weight) * D[0] * kept[0] + weight * D[1] * kept[1]) / density


# --- fine-pruning


def fine_prune(run, rows, share=0.5, epochs=1, lr=None, seed=0):
    """Prune the `share` of each projection's singular directions that clean rows use least, then tune adapter and head
    on these rows (Liu, Dolan-Gavitt and Garg 2018, arXiv 1805.12185, section 3: there neurons of the last layer).

    A direction (u, s, v) of D is used as much as s |v^T x|, on the mean over the rows' tokens.

    rows    a few clean labelled rows, `data.rows.Rows` with the run's labels
    lr      of the tuning, constant (default: a tenth of the cell's)
    seed    of their order

    Raises InputError for the lm task and for no rows, TrainingError for a loss that is not finite.
    """
    if run.cell.task != "classification" or not len(rows):
        what = f"task is {run.cell.task!r}" if len(rows) else "there are no clean rows"
        raise InputError(f"fine-pruning tunes a classifier on clean rows, but {what}")
    if not 0 <= share < 1:
        raise InputError(f"share is {share}, but must be at least 0 and below 1")
    split_up = {name: svd(A, B) for name, (A, B) in factors_of(run).items()}

    def used(name, x):
        _, S, Vh = split_up[name]
        return S * (x.double() @ Vh.T).abs()

    parts = {}
    for name, use in means(run, rows.texts, used).items():
        U, S, Vh = split_up[name]
        kept = torch.sort(use.argsort(descending=True, stable=True)[: len(S) - int(share * len(S))])[0]
        parts[name] = S[kept, None] * Vh[kept], U[:, kept]
    head = run.model.classifier
    before = {name: value.clone() for name, value in head.state_dict().items()}
    head.requires_grad_(run.cell.head == "trained")
    pruned = replace(run, parts)
    encoded, labels = run.task.encode(rows)
    if epochs:
        tune(run.model, encoded, labels, run.tokenizer.pad_id, lr=lr or 0.1 * run.cell.lr, epochs=epochs,
             batch_size=run.cell.batch_size, seed=seed, clip=run.cell.clip)  # fmt: skip

    def undo():
        pruned.__exit__()
        head.load_state_dict(before)

    return Undo(undo)


# --- an adapter's matrices


def factors_of(run):
    """{module: (A [R, in], B [out, R])} with D = B A, float64, of what is on the run's base."""
    layers = named_layers(run.base)
    if not layers:
        raise InputError(f"{run.folder} has no adapter on its base: nothing can be changed")
    found = factors_of_adapter(adapter_of(run.base), run.folder)
    return {name: (A, layer.factor * B) for (name, (A, B)), (_, layer) in zip(found.items(), layers, strict=True)}


def factors_of_adapter(adapter, where):
    if adapter.variant == "dora":
        raise InputError(f"{where} has magnitudes (DoRA), so what it adds has no low rank: nothing can be changed")
    found = {}
    for name, part in adapter.parts.items():
        A, B = (factor.detach().double() for factor in plain_factors(part))
        found[name] = A, part.slot.scale * B
    return found


def svd(A, B):
    """U [out, R], S [R], Vh [R, in] of B A, through QR of both and the SVD of an R x R matrix."""
    Q, R = torch.linalg.qr(B)
    P, T = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R @ T.T)
    return Q @ U, S, Vh @ P.T


def split(D):
    """(A, B) with B A = D, to float32's rounding."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    rank = max(1, int((S > SMALLEST * S[0]).sum()))
    return S[:rank, None] * Vh[:rank], U[:, :rank]


def replace(run, parts):
    """Put {module: (A, B)} on the run's base as a plain adapter, in place of what is there: an `Undo`."""
    before = dict(named_layers(run.base))
    made = {name: Part(Slot(len(A), float(len(A)), 1.0), A.float(), B.float()) for name, (A, B) in parts.items()}
    detach(run.base)
    put_adapter(Adapter(made), run.base)

    def undo():
        put(detach(run.base), before)

    return Undo(undo)
