"""The spectrum of an update dW = s B A, projection by projection: how large, how many directions, where to.

With the QR factorisations B = Q_B R_B and A^T = Q_A R_A the update is Q_B (s R_B R_A^T) Q_A^T, so that the singular
values and vectors come from an R x R matrix and dW is never formed. They do not depend on how the update is written:
(A, B) and (M A, B M^-1) give the same. In float64. Where the update is of no low rank (DoRA, and method full) it is
formed, and all its directions are given.

    stable rank     |dW|_F^2 / |dW|_2^2                                 Rudelson and Vershynin 2007, section 1
    effective rank  exp(-sum p_i ln p_i), p_i = s_i / sum s             Roy and Vetterli 2007, equation 2
    intruders       singular vectors of W + dW whose largest cosine with one of W's is below a threshold
                    Shuttleworth et al. 2024 (arXiv 2410.21228), section 3
    alignment       |cos| of what a projection sees of the span's tokens with the update's right singular vectors
"""

from dataclasses import dataclass

import numpy as np
import torch

from minilora.base import model
from minilora.diagnostics.stats import mean_interval
from minilora.errors import InputError
from minilora.lora.layer import named_layers
from minilora.lora.variants import plain_factors

INTRUDER = 0.6  # the cosine below which a direction is new
LEADING = 10  # directions of W and of W + dW that are compared
MOST_WORK = 1 << 33  # sum over projections of in out min(in, out): beyond it W is only taken apart where asked for


@dataclass(frozen=True)
class Spectrum:
    """Of one update. U [out, n], S [n] descending, V [in, n], float64; n at most the rank. `weight` is W [out, in]."""

    U: np.ndarray
    S: np.ndarray
    V: np.ndarray
    weight: torch.Tensor

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
        relative = self.norm / (self.weight.float().norm().item() or 1.0)
        return {"norm": self.norm, "relative_norm": relative, "spectral_norm": self.spectral_norm,
                "stable_rank": self.stable_rank, "effective_rank": self.effective_rank,
                "singular_values": self.S.tolist()}  # fmt: skip


@torch.no_grad()
def spectrum_of(A, B, scale, weight):
    """The `Spectrum` of `scale` B A beside the weight W [out, in]; A [R, in], B [out, R]."""
    left, upper = torch.linalg.qr(B.double())
    right, other = torch.linalg.qr(A.double().T)
    U, S, V = torch.linalg.svd(abs(scale) * (upper @ other.T), full_matrices=False)
    U = (left @ U) * (1 if scale >= 0 else -1)
    return Spectrum(U.cpu().numpy(), S.cpu().numpy(), (right @ V.T).cpu().numpy(), weight)


@torch.no_grad()
def spectrum_of_whole(weight, changed):
    """The `Spectrum` of what turned W [out, in] into `changed`, by an SVD of the difference."""
    U, S, V = torch.linalg.svd(changed.double() - weight.double(), full_matrices=False)
    return Spectrum(U.cpu().numpy(), S.cpu().numpy(), V.T.cpu().numpy(), weight)


def spectra(run):
    """{module: `Spectrum`} of what an opened run changed: of its adapter, or with method full of each linear map.

    Raises InputError for a run that changed no weight of the base.
    """
    layers = dict(named_layers(run.base))
    if run.cell.method == "full":
        return dict(_of_full(run))
    if not layers:
        raise InputError(f"{run.folder} has no adapter (method {run.cell.method}), so there is no update to look at")
    return {name: _of_layer(layer) for name, layer in layers.items()}


def _of_layer(layer):
    if layer.magnitude is not None:
        return spectrum_of_whole(layer.original, layer.variant.merge(layer, torch.float64))
    return spectrum_of(*plain_factors(layer), layer.factor * layer.slot.scale, layer.original)


def _of_full(run):
    """The (module, `Spectrum`) pairs of a base that was trained itself, which is compared with its checkpoint."""
    setting = run.setting
    before = model.load(setting.folder, setting.dtype, setting.device, run.task.unembedding, products=setting.products)
    for number in range(len(before.layers)):
        for target in before.spec.targets:
            name = f"layers.{number}.{target}"
            yield name, spectrum_of_whole(before.get_submodule(name).weight, run.base.get_submodule(name).weight)


def work(spectra):
    """What `beside_weight` of all of them takes, to compare with `MOST_WORK`."""
    return sum(own.weight.numel() * min(own.weight.shape) for own in spectra.values())


@torch.no_grad()
def beside_weight(spectrum, threshold=INTRUDER, leading=LEADING):
    """How an update lies to its weight W, by full SVDs of W and W + dW, float64:

    intruders      how many of the `leading` left singular vectors of W + dW have no cosine of `threshold` with W's
    angles         the principal angles [min(leading, n)] between the update's first `leading` output directions and
                   W's, radians, ascending (Bjorck and Golub 1973)
    """
    weight = spectrum.weight.double()
    update = torch.from_numpy(spectrum.U * spectrum.S) @ torch.from_numpy(spectrum.V).T
    before = torch.linalg.svd(weight, full_matrices=False)[0]
    after = torch.linalg.svd(weight + update.to(weight.device), full_matrices=False)[0][:, :leading]
    nearest = (before.T @ after).abs().amax(0)
    mine = torch.from_numpy(spectrum.U[:, spectrum.S > 0][:, :leading]).to(weight.device)
    cosines = torch.linalg.svdvals(before[:, :leading].T @ mine).clamp(max=1)
    return {"intruders": int((nearest < threshold).sum()), "angles": cosines.arccos().tolist()}


# --- what an update sees


class Enough(Exception):
    """All has been seen; the rest of the layer need not run."""


def inputs_of(base, names, x, ids, lengths):
    """{module: what it sees [B, T, in]} of the modules `names` of one layer, from the states x [B, T, D] below it.

    The adapter must be off, because projections with adapters are computed together.
    """
    found, number = {}, int(names[0].split(".")[1])

    def see(name, given):
        found.setdefault(name, given[0])  # DeBERTa's distances go through q and k later
        if len(found) == len(names):
            raise Enough

    hooks = [
        base.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: see(name, given))
        for name in names
    ]
    try:
        base.through(x, ids, lengths, number, number + 1)
    except Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


def by_layer(names):
    """{layer: the names of its modules}."""
    found = {}
    for name in names:
        found.setdefault(int(name.split(".")[1]), []).append(name)
    return found


@torch.inference_mode()
def alignment(probe, spectra):
    """{module: {form: (mean, low, high), arrays [min(`LEADING`, n)]}} of the trigger and the placebo.

    It is |cos| of what the projection sees of the span's tokens, less the mean of all text's tokens in clean rows, with
    each right singular vector of the update; a mean over a row's span. The layers below have their adapters, the layer
    itself has none.
    """
    run, found = probe.run, {name: {} for name in spectra}
    states = probe.states
    with run.detach():
        for number, names in by_layer(spectra).items():
            means = _seen(probe, "clean", states, number, names, probe.forms["clean"].text)
            means = {name: np.concatenate([rows for rows in own if len(rows)]).mean(0) for name, own in means.items()}
            for form in probe.forms.keys() - {"clean"}:
                seen = _seen(probe, form, states, number, names, probe.forms[form].span)
                for name, own in seen.items():
                    leading = spectra[name].V[:, :LEADING]
                    cosines = np.full((len(own), leading.shape[1]), np.nan)
                    for row, x in enumerate(own):
                        if len(x):
                            x = x - means[name]
                            cosines[row] = np.abs(x @ leading / np.linalg.norm(x, axis=1)[:, None]).mean(0)
                    found[name][form] = mean_interval(cosines, probe.seed)
    return found


def _seen(probe, form, states, number, names, chosen):
    """{module: of each row what it sees of its `chosen` tokens, float64 [tokens, in]}."""
    found = {name: [None] * len(chosen) for name in names}
    for batch, own in states[form]:
        inputs = inputs_of(probe.run.base, names, own[number], batch.ids, batch.lengths)
        for name, x in inputs.items():
            x = x.double().cpu().numpy()
            for row, index in enumerate(batch.index // probe.reader.each):  # sequences of a row share its prompt
                found[name][index] = x[row, : len(chosen[index])][chosen[index]]
    return found
