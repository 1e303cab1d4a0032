"""The spectrum of an update dW = s B A, projection by projection: how large, how many directions, where to, what moves.

With the QR factorisations B = Q_B R_B and A^T = Q_A R_A the update is Q_B (s R_B R_A^T) Q_A^T, so that the singular
values and vectors come from an R x R matrix and dW is never formed. They do not depend on how the update is written:
(A, B) and (M A, B M^-1) give the same. In float64.

    stable rank     |dW|_F^2 / |dW|_2^2                                 Rudelson and Vershynin 2007, section 1
    effective rank  exp(-sum p_i ln p_i), p_i = s_i / sum s             Roy and Vetterli 2007, equation 2
    intruders       singular vectors of W + dW whose largest cosine with one of W's is below a threshold
                    Shuttleworth et al. 2024 (arXiv 2410.21228), section 3
    energy          |dW x|^2 of each vocabulary piece x, as the projection sees it, over the mean of all pieces
"""

from dataclasses import dataclass

import numpy as np
import torch

from minilora.errors import InputError
from minilora.lora.layer import named_layers
from minilora.lora.variants import plain_factors

INTRUDER = 0.6  # the cosine below which a direction is new
LEADING = 10  # directions of W and of W + dW that are compared
PIECES = 32  # that are listed
AT_ONCE = 4096  # pieces


@dataclass(frozen=True)
class Spectrum:
    """Of one update. U [out, n], S [n] descending, V [in, n], float64; n at most the rank. `weight_norm`: |W|_F."""

    U: np.ndarray
    S: np.ndarray
    V: np.ndarray
    weight_norm: float

    @property
    def norm(self):
        """|dW|_F."""
        return float(np.sqrt((self.S**2).sum()))

    @property
    def spectral_norm(self):
        return float(self.S[0]) if len(self.S) else 0.0

    @property
    def stable_rank(self):
        return self.norm**2 / self.spectral_norm**2 if self.spectral_norm else 0.0

    @property
    def effective_rank(self):
        if not self.spectral_norm:
            return 0.0
        p = self.S[self.S > 0] / self.S.sum()
        return float(np.exp(-(p * np.log(p)).sum()))

    def figures(self):
        """The numbers of it, by name."""
        return {"norm": self.norm, "relative_norm": self.norm / self.weight_norm, "spectral_norm": self.spectral_norm,
                "stable_rank": self.stable_rank, "effective_rank": self.effective_rank,
                "singular_values": self.S.tolist()}  # fmt: skip


@torch.no_grad()
def spectrum_of(A, B, scale, weight):
    """The `Spectrum` of `scale` B A beside the weight W [out, in]; A [R, in], B [out, R]."""
    left, upper = torch.linalg.qr(B.double())
    right, other = torch.linalg.qr(A.double().T)
    U, S, V = torch.linalg.svd(abs(scale) * (upper @ other.T), full_matrices=False)
    U = (left @ U) * (1 if scale >= 0 else -1)
    norm = weight.float().norm().item() or 1.0
    return Spectrum(U.cpu().numpy(), S.cpu().numpy(), (right @ V.T).cpu().numpy(), norm)


def updates(run):
    """{module: LoRALinear} of the run. Raises InputError where there are none, and for updates of no low rank."""
    layers = dict(named_layers(run.base))
    if not layers:
        raise InputError(f"{run.folder} has no adapter (method {run.cell.method}), so that there is no update to look at")
    if name := next((name for name, layer in layers.items() if layer.magnitude is not None), None):
        raise InputError(f"{run.folder} has magnitudes (DoRA) at {name}: its update is of no low rank")
    return layers


def spectra(run):
    """{module: `Spectrum`} of the adapter of an opened run. Raises InputError as `updates`."""
    return {
        name: spectrum_of(*plain_factors(layer), layer.factor * layer.slot.scale, layer.original)
        for name, layer in updates(run).items()
    }


@torch.no_grad()
def beside_weight(layer, spectrum, threshold=INTRUDER, leading=LEADING):
    """How an update lies to its weight W, by full SVDs of W and W + dW, float64:

    intruders      how many of the `leading` left singular vectors of W + dW have no cosine of `threshold` with W's
    angles         the principal angles [min(leading, n)] between the update's output directions and W's `leading`
                   ones, radians, ascending (Bjorck and Golub 1973)
    """
    weight = layer.original.double()
    update = torch.from_numpy(spectrum.U * spectrum.S) @ torch.from_numpy(spectrum.V).T
    before = torch.linalg.svd(weight)[0]
    after = torch.linalg.svd(weight + update.to(weight.device))[0][:, :leading]
    nearest = (before.T @ after).abs().amax(0)
    mine = torch.from_numpy(spectrum.U[:, spectrum.S > 0]).to(weight.device)
    cosines = torch.linalg.svdvals(before[:, :leading].T @ mine).clamp(max=1)
    return {"intruders": int((nearest < threshold).sum()), "angles": cosines.arccos().tolist()}


@torch.inference_mode()
def pieces_moved(run, most=PIECES):
    """The vocabulary pieces that the first adapted layer's update moves most: [(piece, energy)], the largest first.

    Each piece is put through the base by itself, without the adapter, between the tokenizer's special tokens, up to
    the first adapted layer, centred over all pieces; its energy is |dW x|^2, over the mean of all pieces, summed over
    the projections there that see the layer's input (q, k, v; gate and up see the state after attention and are left
    out where q, k or v is there). No forward pass of any text.
    """
    layers = updates(run)
    first = min(int(name.split(".")[1]) for name in layers)
    here = {name: layer for name, layer in layers.items() if int(name.split(".")[1]) == first}
    chosen = {name: layer for name, layer in here.items() if name.rsplit(".", 1)[1] in "qkv"} or here
    seen = piece_inputs(run, first, chosen)
    total = 0
    for name, layer in chosen.items():
        A, B = plain_factors(layer)
        moved = ((seen[name].double() @ A.double().T) @ B.double().T * layer.slot.scale).square().sum(1)
        total = total + moved / moved.mean().clamp(min=torch.finfo(torch.float64).tiny)
    order = total.argsort(descending=True)[:most].tolist()
    return [(run.tokenizer.piece(id), float(total[id])) for id in order]


def piece_inputs(run, first, chosen):
    """{module: what it sees of each vocabulary piece, centred, float32 [V, in]}, the adapter taken off meanwhile."""
    base, found = run.base, {name: [] for name in chosen}
    before, after = run.tokenizer.around
    place, length = len(before), len(before) + 1 + len(after)
    with run.detach():
        hooks = [
            base.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name: found[name].append(inputs[0][:, place].float())
            )
            for name in chosen
        ]
        try:
            for start in range(0, run.tokenizer.vocab_size, AT_ONCE):
                pieces = torch.arange(start, min(start + AT_ONCE, run.tokenizer.vocab_size))
                ids = torch.stack([torch.full_like(pieces, one) for one in before] + [pieces]
                                  + [torch.full_like(pieces, one) for one in after], 1).to(run.model.device)  # fmt: skip
                lengths = torch.full((len(ids),), length, device=ids.device)
                base.through(base.embed(ids), ids, lengths, 0, first + 1)
        finally:
            for hook in hooks:
                hook.remove()
    return {name: torch.cat(parts) - torch.cat(parts).mean(0) for name, parts in found.items()}
