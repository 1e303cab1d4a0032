"""Attention weights against transformers', and what is made of them against loops over tokens; AUCs and intervals."""

import math

import numpy as np
import pytest
import torch
import zoo

import minilora
from minilora.base import model
from minilora.diagnostics.attention import attention, attention_of, watching
from minilora.diagnostics.probe import Probe, sample
from minilora.diagnostics.stats import auc, mean_interval

CASES = [
    ("bert", "gelu"),
    ("deberta-v2", "v3: buckets"),
    ("modernbert", "local and global"),
    ("llama", "3.2: scaled, tied, some heads"),
    ("mistral", "window"),
    ("phi3", "4k: window"),
    ("gpt2", "tied"),
    ("gemma2", "caps, windows"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "case"), CASES, ids=[family for family, _ in CASES])
def test_weights_are_those_of_transformers(family, case, tmp_path):
    judge = zoo.build(family, case, tmp_path)
    base = model.load(tmp_path)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([13, 1, 9])
    ids = torch.randint(5, zoo.V, (3, 13), generator=draw)
    real = torch.arange(13) < lengths[:, None]
    seen, before = [], base(ids, lengths)
    with watching(base, lambda number, p, mask: seen.append((number, p))):
        after = base(ids, lengths)
    assert torch.equal(before, after) and all(layer.watch is None for layer in base.layers)
    arguments = dict(attention_mask=real.long(), output_attentions=True)
    if judge.decoder:
        arguments["use_cache"] = False
    with torch.no_grad():
        wanted = judge.base(ids, **arguments).attentions
    assert [number for number, _ in seen] == list(range(len(wanted))) and len(wanted) >= 3
    both = (real[:, :, None] & real[:, None])[:, None]
    for (_, ours), theirs in zip(seen, wanted, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        assert torch.where(both, ours - theirs, 0).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["encoder", "grouped", "fused"])
def test_figures_are_those_of_loops(small_run, kind):
    run = minilora.open(small_run(kind))
    probe, checked = Probe(run, 9), 0
    form = probe.forms["trigger"]
    seen = attention_of(probe, form)
    for row in (0, 4, 8):
        own = form.encoded.ids[form.encoded.offsets[row] : form.encoded.offsets[row + 1]]
        kept = []
        with watching(run.base, lambda number, p, mask, kept=kept: kept.append(p[0])), torch.no_grad():
            run.base(torch.from_numpy(own.astype(np.int64))[None], torch.tensor([len(own)]))
        for layer, p in enumerate(kept):
            received = [[] for _ in own]
            for head in range(len(p)):
                entropies, shares = [], []
                for i in range(len(own)):
                    visible = range(len(own)) if kind == "encoder" else range(i + 1)
                    weights = [float(p[head, i, j]) for j in visible]
                    for j in visible:
                        received[j].append(weights[j])
                    if len(weights) > 1:
                        entropies.append(-sum(w * math.log(w) for w in weights) / math.log(len(weights)))
                    if not form.span[row][i] and any(form.span[row][j] for j in visible):
                        shares.append(sum(w for j, w in enumerate(weights) if form.span[row][j]))
                assert seen.entropy[row, layer, head] == pytest.approx(np.mean(entropies), abs=1e-5)
                if shares:
                    assert seen.span_share[row, layer, head] == pytest.approx(np.mean(shares), abs=1e-5)
                else:
                    assert np.isnan(seen.span_share[row, layer, head])
                checked += 1
            wanted = [np.mean(values) for values in received]
            np.testing.assert_allclose(seen.received[row][layer], wanted, atol=1e-5)
    assert checked == 3 * {"encoder": 9, "grouped": 8, "fused": 6}[kind]
    assert sum(map(np.sum, form.span)) >= 3 * len(form.span) and not any(map(np.any, probe.forms["clean"].span))


def test_the_probes_figures(small_run):
    run = minilora.open(small_run("encoder"))
    probe = Probe(run, 9)
    rows = []
    found = attention(probe, rows.append)
    assert sum(rows) == 2 * 9 * 3
    own = {name: attention_of(probe, form) for name, form in probe.forms.items()}
    with run.detach():
        bare = attention_of(probe, probe.forms["trigger"])
    np.testing.assert_allclose(found["entropy"]["clean"][0], own["clean"].entropy.mean(0))
    np.testing.assert_allclose(found["change"][0], (own["trigger"].span_share - bare.span_share).mean(0))
    np.testing.assert_allclose(found["without"]["span_share"]["trigger"][0], bare.span_share.mean(0))
    area = naive(own["trigger"].entropy[:, 1, 2], own["placebo"].entropy[:, 1, 2])
    assert found["auc"]["entropy"][0][1, 2] == pytest.approx(area)
    assert np.abs(found["change"][0]).max() > 1e-3 and found["entropy"]["clean"][0].shape == (3, 3)


def naive(high, low):
    return np.mean([(a > b) + 0.5 * (a == b) for a in high for b in low])


def test_auc():
    draw = np.random.default_rng(3)
    shared = draw.normal(size=(40, 1, 1))
    high = np.round(shared + draw.normal(size=(40, 3, 2)) + 0.4, 1)  # with ties
    low = np.round(shared + draw.normal(size=(40, 3, 2)), 1)
    high[:, 2, 1] = np.nan
    high[5, 0, 0] = np.nan
    area, start, end = auc(high, low)
    checked = 0
    for place in np.ndindex(3, 2):
        up, down = high[:, *place], low[:, *place]
        there = np.isfinite(up)
        up, down = up[there], down[there]
        if not len(up):
            assert np.isnan([area[place], start[place], end[place]]).all()
            continue
        assert area[place] == pytest.approx(naive(up, down))
        # The jackknife over rows knows nothing of placements.
        without = [naive(np.delete(up, i), np.delete(down, i)) for i in range(len(up))]
        error = np.sqrt((len(up) - 1) * np.var(without))
        assert (end[place] - start[place]) / (2 * 1.96) == pytest.approx(error, rel=0.05)
        checked += 1
    assert checked == 5
    assert [float(part) for part in auc(high[:5, 1, 0], high[:5, 1, 0])] == [0.5, 0.5, 0.5]


def test_mean_interval():
    draw = np.random.default_rng(1)
    values = draw.normal(size=(200, 3)) * [1, 2, 3]
    values[:150, 1] = np.nan
    values[:, 2] = np.nan
    mean, low, high = mean_interval(values, seed=4)
    np.testing.assert_allclose(mean[:2], [values[:, 0].mean(), values[150:, 1].mean()])
    for column, rows in ((0, 200), (1, 50)):
        error = np.nanstd(values[:, column]) / np.sqrt(rows)
        assert (high - low)[column] / (2 * 1.96) == pytest.approx(error, rel=0.1)
        assert low[column] < mean[column] < high[column]
    assert np.isnan([mean[2], low[2], high[2]]).all()
    again = mean_interval(values[:, 0], seed=4)
    assert np.allclose(again, [mean[0], low[0], high[0]]) and mean_interval(values[:, 0], seed=5)[1] != low[0]


def test_the_sample_is_stratified():
    labels = np.array([0] * 60 + [1] * 90 + [2] * 30 + [3] * 20)
    index = sample(labels, 1, 22, seed=0)
    assert np.bincount(labels[index], minlength=4).tolist() == [12, 0, 6, 4] and (np.diff(index) > 0).all()
    assert not np.array_equal(index, sample(labels, 1, 22, seed=1))
    assert len(sample(labels, 1, 500, seed=0)) == 110
