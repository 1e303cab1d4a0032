"""How far the first update of an adapter moves each piece of the vocabulary: what it listens to, without any text.

For the M projections m of the first layer that carries an adapter, with the update dW_m, and x what they see of a piece
that stands by itself between the tokenizer's special tokens:

    energy(x) = 1/M sum over m of |dW_m (x - mean x)|^2 / mean over all pieces of the same

The projections are those of q, k and v that were changed, or where none of these was, all that were.

A trigger that is a literal string stands out, as its few pieces are moved further than any others; a clean adapter
moves the words that its task is about. The update is that of the merged weight, so that it does not depend on how it
is written (A, B; DoRA; a start that is a part of the weight).
"""

import re
from dataclasses import dataclass

import numpy as np
import torch

from minilora.errors import InputError
from minilora.lora.layer import named_layers

LISTED = 32  # pieces
QUANTILE = 0.999  # of the energies, which the highest is compared with
AT_ONCE = 2048  # pieces
UNUSED = re.compile(r"[\[<].+[\]>]")  # names of tokens that stand for no text


@dataclass(frozen=True)
class Energies:
    """`ids` int64 [pieces] and their energies `values` float64 [pieces], the highest first, at layer `layer`."""

    layer: int
    modules: tuple[str, ...]
    ids: np.ndarray
    values: np.ndarray

    @property
    def outlier(self):
        """r: the highest energy over the 99.9% quantile; 0 for an update that moves nothing."""
        base = np.quantile(self.values, QUANTILE)
        return float(self.values[0] / base) if base else 0.0

    @property
    def first(self):
        """The `LISTED` pieces of highest energy: [(id, energy)]."""
        return list(zip(self.ids[:LISTED].tolist(), self.values[:LISTED].tolist(), strict=True))


class Seen(Exception):
    """The states that were wanted are there: the rest of the forward pass is not."""


def updates(run):
    """{module: `LoRALinear`} of an opened run. Raises InputError where there is none."""
    found = dict(named_layers(run.base))
    if not found:
        raise InputError(
            f"{run.folder} has no adapter (its method is {run.cell.method!r}): a scan reads an adapter's update, so "
            "name a run with method 'lora' or a PEFT folder"
        )
    return found


def pieces(tokenizer):
    """Ids int64 of the vocabulary's pieces that stand for text: no special or unused tokens, no lone characters of
    other scripts where most pieces are ASCII (their embeddings are hardly trained, and would hide the others)."""
    texts = [tokenizer.decode([id]).strip() for id in range(tokenizer.vocab_size)]
    real = [id for id, text in enumerate(texts) if text and text.isprintable() and not UNUSED.fullmatch(text)]
    ascii = [id for id in real if texts[id].isascii()]
    return np.array(ascii if 2 * len(ascii) > len(real) else real, np.int64)


@torch.inference_mode()
def energies(run, changes=None):
    """The `Energies` of an opened run. Raises InputError for one without an adapter, or of an empty vocabulary.

    changes  {module: a matrix M [n, in] with |M x| = |dW x|}, where the updates are known (default: the adapter's)
    """
    layers = updates(run) if changes is None else changes
    first = min(int(name.split(".")[1]) for name in layers)
    here = {name.split(".")[2]: layer for name, layer in layers.items() if int(name.split(".")[1]) == first}
    attended = [target for target in "qkv" if target in here]
    groups = [attended] if attended else [[target] for target in here]  # the targets of a group see the same
    ids = pieces(run.tokenizer)
    total = torch.zeros(len(ids), dtype=torch.float64, device=run.model.device)
    for targets in groups:
        x = states(run, ids, f"layers.{first}.{targets[0]}")
        middle = x.double().mean(0)
        for target in targets:
            update = update_of(here[target]) if changes is None else torch.as_tensor(here[target], device=x.device)
            moved = torch.cat([((part.double() - middle) @ update.T).square().sum(1) for part in x.split(AT_ONCE)])
            if mean := moved.mean().item():
                total += moved / mean
    total /= sum(map(len, groups))
    order = total.argsort(descending=True, stable=True)
    names = tuple(f"layers.{first}.{target}" for targets in groups for target in targets)
    return Energies(first, names, ids[order.cpu().numpy()], total[order].cpu().numpy())


def update_of(layer):
    """dW [out, in] of a `LoRALinear`, float64."""
    return layer.variant.merge(layer, torch.float64) - layer.original.double()


def states(run, ids, module):
    """What a module of the base sees of each piece, float32 [pieces, in], without the adapter."""
    before, after = run.tokenizer.around
    found = []

    def keep(_, inputs):
        found.append(inputs[0][:, len(before)].float())
        raise Seen

    with run.detach():
        hook = run.base.get_submodule(module).register_forward_pre_hook(keep)
        try:
            for start in range(0, len(ids), AT_ONCE):
                rows = torch.from_numpy(
                    np.stack([[*before, one, *after] for one in ids[start : start + AT_ONCE].tolist()])
                )
                rows = rows.to(run.model.device)
                try:
                    run.base(rows, torch.full((len(rows),), rows.shape[1], device=rows.device))
                except Seen:
                    continue
        finally:
            hook.remove()
    return torch.cat(found)
