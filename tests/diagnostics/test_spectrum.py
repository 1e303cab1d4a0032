"""The update's spectrum against full SVDs in float64, and what it moves against forward passes by hand."""

import numpy as np
import pytest
import torch

import minilora
from minilora.base import model
from minilora.diagnostics.energy import energies
from minilora.diagnostics.probe import Probe
from minilora.diagnostics.spectrum import alignment, beside_weight, spectra, spectrum_of
from minilora.errors import InputError


def factors(out, R, inner, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(R, inner, generator=draw), torch.randn(out, R, generator=draw)


@pytest.mark.parametrize(("out", "R", "inner"), [(7, 3, 5), (4, 6, 5), (9, 1, 2), (5, 5, 11)])
@pytest.mark.parametrize("scale", [2.5, -0.3])
def test_it_is_the_svd_of_the_whole(out, R, inner, scale):
    A, B = factors(out, R, inner)
    weight = torch.randn(out, inner, generator=torch.Generator().manual_seed(9))
    own = spectrum_of(A, B, scale, weight)
    whole = scale * (B.double() @ A.double()).numpy()
    wanted = np.linalg.svd(whole, compute_uv=False)
    n = min(out, R, inner)
    np.testing.assert_allclose(own.S[:n], wanted[:n], rtol=1e-10)
    assert np.abs(own.S[n:]).max(initial=0) < 1e-12
    np.testing.assert_allclose(own.U * own.S @ own.V.T, whole, atol=1e-12)
    np.testing.assert_allclose(own.U.T @ own.U, np.eye(own.U.shape[1]), atol=1e-12)
    figures, shares = own.figures(), wanted[:n] / wanted[:n].sum()
    assert figures["norm"] == pytest.approx(np.linalg.norm(whole))
    assert figures["relative_norm"] == pytest.approx(np.linalg.norm(whole) / weight.norm().item(), rel=1e-5)
    assert figures["spectral_norm"] == pytest.approx(np.linalg.norm(whole, 2))
    assert figures["stable_rank"] == pytest.approx(np.linalg.norm(whole) ** 2 / np.linalg.norm(whole, 2) ** 2)
    assert figures["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_it_does_not_depend_on_how_the_update_is_written():
    A, B = factors(17, 4, 23)
    M = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double() + 2 * torch.eye(4)
    weight, again = torch.ones(17, 23), (M @ A.double(), B.double() @ M.inverse())
    one, other = (spectrum_of(a, b, 1.5, weight) for a, b in ((A, B), again))
    np.testing.assert_allclose(one.S, other.S, rtol=1e-9)
    np.testing.assert_allclose(np.abs((one.V * other.V).sum(0)), 1, rtol=1e-9)
    np.testing.assert_allclose(one.U * one.S @ one.V.T, other.U * other.S @ other.V.T, atol=1e-9)
    nothing = spectrum_of(A, torch.zeros(17, 4), 1.0, torch.ones(17, 23)).figures()
    assert [nothing[name] for name in ("norm", "stable_rank", "effective_rank")] == [0, 0, 0]


@pytest.mark.parametrize("kind", ["encoder", "grouped", "fused", "dora", "pissa", "full"])
def test_of_a_run(small_run, kind):
    run = minilora.open(small_run(kind))
    found = spectra(run)
    if kind == "full":
        before = model.load(run.setting.folder)
        deltas = {name: run.base.get_submodule(name).weight - before.get_submodule(name).weight for name in found}
        assert len(deltas) == 18
    else:
        deltas = {name: own.delta for name, own in run.adapter.items()}
    assert found.keys() == deltas.keys() and len(found) >= 6
    for name, own in found.items():
        wanted = np.linalg.svd(deltas[name].double().numpy(), compute_uv=False)
        np.testing.assert_allclose(own.S, wanted[: len(own.S)], atol=1e-6)
        assert own.S[0] > 1e-3 and len(own.S) == {"dora": 24, "full": 24, "pissa": 6}.get(kind, 3)
    with pytest.raises(InputError, match="has no adapter .method head., so there is no update to look at"):
        spectra(minilora.open(small_run("head")))


def test_beside_the_weight():
    A, B = factors(30, 2, 26)
    weight = torch.randn(30, 26, generator=torch.Generator().manual_seed(2))
    for size, intruders in ((0.01, 0), (30.0, 2)):
        own = spectrum_of(A, B, size, weight)
        found = beside_weight(own, threshold=0.6, leading=10)
        before = np.linalg.svd(weight.double().numpy())[0][:, :26]
        after = np.linalg.svd(weight.double().numpy() + own.U * own.S @ own.V.T)[0]
        nearest = [max(abs(before[:, j] @ after[:, i]) for j in range(26)) for i in range(10)]
        assert found["intruders"] == sum(one < 0.6 for one in nearest)
        assert found["intruders"] >= intruders if size > 1 else found["intruders"] <= 2
        cosines = np.cos(found["angles"])
        # The projection of the one space on the other has the squared cosines as its eigenvalues.
        projected = own.U.T @ before[:, :10] @ before[:, :10].T @ own.U
        np.testing.assert_allclose(cosines**2, np.sort(np.linalg.eigvalsh(projected))[::-1], atol=1e-9)


@pytest.mark.parametrize("kind", ["encoder", "grouped"])
def test_the_energies_of_pieces_follow_from_spectra(small_run, kind):
    run = minilora.open(small_run(kind))
    found = energies(run, {name: (own.V * own.S).T for name, own in spectra(run).items()})
    adapter = run.adapter
    with run.detach(), torch.no_grad():
        before, after = run.tokenizer.around
        ids = torch.tensor([[*before, piece, *after] for piece in found.ids])
        x = run.base.embed(ids)[:, len(before)]
        x = x if kind == "encoder" else run.base.layers[0].attention_norm(x)
    x = (x - x.mean(0)).double()
    moved = [(x @ adapter[f"layers.0.{target}"].delta.double().T).square().sum(1) for target in "qv"]
    np.testing.assert_allclose(found.values, sum(one / one.mean() for one in moved) / 2, rtol=1e-4)
    assert len(found.ids) >= 100 and (np.diff(found.values) <= 0).all() and found.first[0][0] == found.ids[0]
    np.testing.assert_array_equal(found.ids, energies(run).ids)


@pytest.mark.parametrize("kind", ["encoder", "grouped"])
def test_alignment(small_run, kind):
    run = minilora.open(small_run(kind))
    probe, own = Probe(run, 9), spectra(run)
    found, cases = alignment(probe, own), 0
    for number in range(len(run.base.layers)):
        layer, seen = run.base.layers[number], {}
        for name, form in probe.forms.items():
            for row in range(9):
                ids = form.encoded.ids[form.encoded.offsets[row] : form.encoded.offsets[row + 1]].astype(np.int64)
                kept = []
                hook = layer.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0]))
                with torch.no_grad():
                    run.base(torch.from_numpy(ids)[None], torch.tensor([len(ids)]))
                    x = kept[0] if kind == "encoder" else layer.attention_norm(kept[0])
                hook.remove()
                seen[name, row] = x[0].double().numpy()
        mean = np.concatenate([seen["clean", row][probe.forms["clean"].text[row]] for row in range(9)]).mean(0)
        for name in ("trigger", "placebo"):
            rows = []
            for row, span in enumerate(probe.forms[name].span):
                x = seen[name, row][span] - mean
                V = own[f"layers.{number}.v"].V
                rows.append(np.mean([[abs(one @ v) / np.linalg.norm(one) for v in V.T] for one in x], axis=0))
            np.testing.assert_allclose(found[f"layers.{number}.v"][name][0], np.mean(rows, axis=0), rtol=1e-4)
            cases += 1
    assert cases == 2 * len(run.base.layers) >= 4 and found["layers.0.q"]["trigger"][0].shape == (3,)
    assert set(found) == set(own)
