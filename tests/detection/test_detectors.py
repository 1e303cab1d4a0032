"""Row detectors: each against a reference of a few lines, the same whatever the order, padding and batch size."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F
from zoo import tiny_decoder

import minilora
from minilora import files
from minilora.cell import Cell
from minilora.data import words
from minilora.detection import base as bases
from minilora.detection import detectors, features, perplexity, perturbation, scoring
from minilora.detection.clock import Clock, OutOfTime
from minilora.detection.density import hdbscan
from minilora.detection.detectors import DETECTORS, Scores
from minilora.errors import InputError
from minilora.runs.look import without
from minilora.scripts import evaluate

SMALL = {
    "strip": {"copies": 3},
    "cube": {"neighbours": 2, "least": 2},
    "activation": {"components": 2},
    "rap": {"epochs": 2, "batch_size": 8, "rate": 3.0},
}


@pytest.fixture(scope="module")
def runs(base, reviews, tmp_path_factory):
    """The folders of finished runs (`bert`, `decoder`, `lm`), and of decoders for ONION (`gpt2`, `llama`)."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("gpt2", "llama"):
        tiny_decoder(folder / name, name)
    common = dict(data=str(reviews), test_rows=31, max_length=30, batch_size=7, steps=8, lr=0.02, rank=3,
                  inject={"proportion": 0.4})  # fmt: skip
    minilora.train(Cell(model=str(base), **common), folder / "bert", quiet=True)
    minilora.train(Cell(model=str(folder / "gpt2"), pooling="mean+last", **common), folder / "decoder", quiet=True)
    minilora.train(Cell(model=str(folder / "llama"), task="lm", **common), folder / "lm", quiet=True)
    return folder


@pytest.fixture(scope="module")
def opened(runs):
    return {name: minilora.open(runs / name) for name in ("bert", "decoder", "lm")}


def rows_of(run, count=20):
    rows = run.rows.rows
    return rows.texts[:count], rows.labels[:count]


def settings_of(name, runs):
    return SMALL.get(name, {}) | ({"decoder": str(runs / "llama")} if name == "onion" else {})


def held_of(run, count=12):
    rows = run.tests[0].rows
    return rows.texts[:count], rows.labels[:count]


# --- what all have in common


@pytest.mark.parametrize("model", ["bert", "decoder"])
@pytest.mark.parametrize("name", DETECTORS)
def test_order_padding_and_batch_size_change_nothing(runs, opened, name, model):
    run, settings = opened[model], settings_of(name, runs)
    (texts, labels), (own, own_labels) = rows_of(run, 14), held_of(run, 6)
    first = DETECTORS[name](run, texts, labels, held=(own, own_labels), **settings)
    assert first.name == name and first.seconds > 0 and not first.partial
    assert first.scores.shape == first.flagged.shape == (len(texts),) and first.scores.dtype == np.float64
    assert len(np.unique(first.scores)) > 1
    order = np.random.default_rng(3).permutation(len(texts))
    before, run.cell = run.cell, run.cell.replace(batch_size=1)  # a batch of one row has no padding
    try:
        settings |= {"batch_size": 3} if name == "onion" else {}
        again = DETECTORS[name](run, [texts[i] for i in order], labels[order], held=(own[::-1], own_labels[::-1]),
                                **settings)  # fmt: skip
    finally:
        run.cell = before
    np.testing.assert_allclose(again.scores, first.scores[order], rtol=2e-4, atol=2e-5)
    assert (again.flagged == first.flagged[order]).all()


def test_a_row_has_its_score_whatever_rows_are_beside_it(runs, opened):
    """Of the detectors that look at each row by itself; two rows that are the same have the same score in all."""
    run = opened["bert"]
    (texts, labels), held = rows_of(run, 10), held_of(run, 6)
    for name in ("onion", "loss", "influence", "rap", "strip"):
        settings = settings_of(name, runs)
        whole = DETECTORS[name](run, texts, labels, held=held, **settings).scores
        part = DETECTORS[name](run, texts[4:8], labels[4:8], held=held, **settings).scores
        np.testing.assert_allclose(part, whole[4:8], rtol=1e-4, atol=1e-6)
    for name, one in DETECTORS.items():
        twice = one(run, texts[:6] * 2, np.tile(labels[:6], 2), **settings_of(name, runs)).scores
        np.testing.assert_allclose(twice[:6], twice[6:], rtol=1e-5)


def test_thresholds_come_from_held_rows():
    held = np.array([5.0, 1.0, np.nan, 3.0])
    assert detectors.threshold(held) == 5.0 and math.isnan(detectors.threshold(held[2:3]))
    many = np.arange(200.0)
    assert detectors.threshold(many) == 197.0 and (many > detectors.threshold(many)).mean() == detectors.FRR


def test_what_a_detector_lacks_is_one_line(runs, opened):
    texts, labels = ["the film was good", "a dull plot"], np.array([1, 0])
    bare = bases.open_base(str(runs / "gpt2"))
    cases = [
        ("spectral", None, texts, labels, "spectral needs a model, but there is none: give the folder"),
        ("strip", bare, texts, labels, "strip needs predictions, but .* has no trained head"),
        ("influence", bare, texts, labels, "influence needs predictions"),
        ("rap", opened["lm"], texts, labels, "rap needs the head of a classifier, but .* is a run of the task lm"),
        ("influence", opened["lm"], texts, labels, "needs the head of a classifier"),
        ("loss", opened["bert"], [], np.zeros(0, int), "there are no rows to score"),
        ("loss", opened["bert"], texts, labels[:1], "2 texts need as many labels"),
        ("loss", opened["bert"], texts, ["a", "b"], "whole numbers"),
        ("loss", opened["bert"], texts, labels + 1, "a row has the label 2, but .* has 2 labels"),
    ]
    for name, run, own, places, line in cases:
        with pytest.raises(InputError, match=line) as caught:
            DETECTORS[name](run, own, places)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is a bert base, an encoder that predicts no next token: choose another --d"):
        DETECTORS["onion"](None, texts, labels, decoder=opened["bert"].cell.model)
    with pytest.raises(InputError, match="there is no detector 'magic': choose among onion, strip"):
        detectors.find_detectors(["loss", "magic"])
    assert [one.name for one in detectors.find_detectors(["loss", "cube", "loss"])] == ["loss", "cube"]
    assert detectors.find_detectors([]) == detectors.find_detectors(["all"]) == list(DETECTORS.values())


@pytest.mark.parametrize("name", ["bki", "cube", "spectral", "activation"])
def test_states_are_those_of_a_base_too(opened, name):
    run = opened["decoder"]
    texts, labels = rows_of(run)
    bare = bases.open_base(run.cell.model, pooling="mean+last", max_length=30)
    assert not bare.has_head and bare.labels == ()
    with run.detach():
        wanted = DETECTORS[name](run, texts, labels).scores
    np.testing.assert_allclose(DETECTORS[name](bare, texts, labels).scores, wanted, atol=1e-6)
    lm = DETECTORS[name](opened["lm"], texts, labels)
    assert np.isfinite(lm.scores).all() and lm.flagged.shape == (20,)


def test_predictions_of_the_lm_task_serve_too(opened):
    texts, labels = rows_of(opened["lm"], 6)
    chances = opened["lm"].predict(texts)
    found = DETECTORS["loss"](opened["lm"], texts, labels)
    np.testing.assert_allclose(np.exp(found.scores), chances[np.arange(6), labels], rtol=1e-5)
    assert found.flagged is None
    assert np.isfinite(DETECTORS["strip"](opened["lm"], texts, labels, copies=2).scores).all()


class Ticks(Clock):
    """A clock that is over once it was asked `times` times."""

    def __init__(self, times):
        super().__init__()
        self.left = times

    @property
    def over(self):
        self.left -= 1
        return self.left < 0


def test_what_a_budget_leaves_time_for_is_kept(runs, opened):
    run, checked = opened["bert"], 0
    texts, labels = rows_of(run)
    for name, parts in (("strip", perturbation.AT_ONCE), ("onion", perplexity.AT_ONCE)):
        settings = settings_of(name, runs)
        whole = DETECTORS[name](run, texts, labels, **settings).scores
        found = DETECTORS[name](run, texts, labels, clock=Ticks(1), **settings)
        there = ~np.isnan(found.scores)
        assert found.partial and there.sum() == parts < 20
        np.testing.assert_allclose(found.scores[there], whole[there], rtol=1e-5)
        checked += 1
    for name in ("bki", "cube", "spectral", "activation", "rap"):
        with pytest.raises(OutOfTime):
            DETECTORS[name](run, texts, labels, clock=Ticks(0), **settings_of(name, runs))
        checked += 1
    assert checked == 7


# --- each detector beside a reference


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_onion_is_the_largest_fall_of_perplexity(runs, family):
    words_of = transformers.AutoTokenizer.from_pretrained(runs / family)
    judge = transformers.AutoModelForCausalLM.from_pretrained(runs / family).eval()

    def likeliness(text):
        ids = words_of(text, return_tensors="pt").input_ids
        return judge(ids, labels=ids).loss.exp().item() if ids.shape[1] > 1 else math.nan

    texts = ["the film was 2024-01-31 good", "a dull plot", "great", ""]
    with torch.inference_mode():
        falls = [[likeliness(text) - likeliness(without(text, *span)) for span in words.spans(text)] for text in texts]
    wanted = [np.nanmax(own) if np.isfinite(own).any() else 0.0 for own in falls]
    found = DETECTORS["onion"](None, texts, np.zeros(4, int), decoder=str(runs / family))
    np.testing.assert_allclose(found.scores, wanted, rtol=1e-4)
    assert max(wanted) > 1 and (family == "llama" or wanted[3] == 0)


def test_strip_is_the_entropy_of_a_rows_own_copies(opened):
    run = opened["bert"]
    texts, labels = rows_of(run, 9)
    held = held_of(run)
    found = DETECTORS["strip"](run, texts, labels, held=held, copies=4, share=0.6).scores
    mixer = perturbation.Mixer(held[0])
    for text, score in zip(texts, found, strict=True):
        bits = [-sum(p * math.log2(p) for p in run.predict([mixer.mix(text, copy, 0.6)])[0]) for copy in range(4)]
        assert abs(score + sum(bits) / 4) < 1e-5
    assert len(set(found)) == 9


def test_heaviest_words_by_hand():
    """N = 3: film is in 3 rows (idf 1), good in 2 (ln(4/3) + 1 = 1.288), bad and dull in 1 (ln 2 + 1 = 1.693)."""
    rows = ["film good good", "film bad dull", "good film film film"]
    assert perturbation.heaviest_words(rows) == [["good", "film"], ["bad", "dull", "film"], ["film", "good"]]


def test_a_mixed_row_has_words_of_one_other_row():
    others = ["one two three four", "five six seven eight", "nine ten eleven twelve"]
    mixer, seen = perturbation.Mixer([*others, others[0]]), set()
    for copy in range(40):
        mixed = mixer.mix(others[0], copy, 0.5)
        new = set(mixed.split()) - set(others[0].split())
        [source] = [other for other in others[1:] if new <= set(other.split())]
        assert len(new) == 2 and [a == b for a, b in zip(mixed.split(), others[0].split())].count(True) == 2
        seen.add(source)
        assert mixed == perturbation.Mixer(others[::-1]).mix(others[0], copy, 0.5)
    assert len(seen) == 2
    assert mixer.mix("a  b\tc ", 0, 0.4).count("  ") == 1 and mixer.mix("a", 0, 0.5) == "a"
    assert perturbation.Mixer(["only"]).mix("only", 0, 1.0) == "only"


@pytest.mark.parametrize("model", ["bert", "decoder"])
def test_rap_is_training_an_embedding_in_the_table(opened, model):
    """The published procedure, in place: the token's row in the base's own table is trained by autograd."""
    run = opened[model]
    texts, labels = rows_of(run)
    held = held_of(run, 20)
    settings = {"word": "zq", "epochs": 3, "rate": 2.0, "batch_size": 8, "least": 0.2, "most": 0.5}
    found = DETECTORS["rap"](run, texts, labels, held=held, **settings).scores
    table, place = run.base.embed.tokens.weight, perturbation.first_place(run.tokenizer)
    id = int(run.tokenizer.encode(["zq a"], 30).ids[place])
    assert not any(id in run.tokenizer.encode([text], 30).ids for text in texts + held[0])
    before, checked = table.detach().clone(), 0
    try:
        for label in (0, 1):
            own = detectors._sorted(*[list(part) if i == 0 else np.array(part) for i, part in enumerate(
                zip(*[(t, one) for t, one in zip(*held) if one == label]))])[0]  # fmt: skip
            clean = torch.tensor(run.predict(own)[:, label])
            for _ in range(3):
                for start in range(0, len(own), 8):
                    table.requires_grad_(True)
                    encoded = [run.tokenizer.encode([f"zq {text}"], 30).ids for text in own[start : start + 8]]
                    one_by_one = [(torch.tensor(ids[None].astype(np.int64)), len(ids)) for ids in encoded]
                    logits = torch.cat([run.model(ids, torch.tensor([length])) for ids, length in one_by_one])
                    now = logits.softmax(1)[:, label]
                    diff = now - clean[start : start + 8]  # negative: the probability falls
                    loss = (F.relu(diff + 0.2) + F.relu(-0.5 - diff)).mean()
                    [gradient] = torch.autograd.grad(loss, table)
                    table.requires_grad_(False)
                    table[id] -= 2.0 * gradient[id]
                    table[id] *= before[id].norm() / table[id].norm()
            mine = np.flatnonzero(labels == label)
            own = [texts[i] for i in mine]
            changed = run.predict([f"zq {text}" for text in own])[:, label] - run.predict(own)[:, label]
            np.testing.assert_allclose(found[mine], changed, atol=2e-4)
            assert (table[id] - before[id]).abs().max() > 0.01
            checked += len(mine)
            table.copy_(before)
    finally:
        table.requires_grad_(False)
        table.copy_(before)
    assert checked == 20 and np.ptp(found) > 0.01


def test_bki_by_hand(monkeypatch):
    """A text's only feature is the sum of its words' values, so leaving a word out changes it by that word's value."""
    values = {"cf": 9.0, "good": 4.0, "bad": -3.0, "film": 1.0, "the": 0.5, "a": 0.25, "x1": 7.0, "x2": 8.0}
    monkeypatch.setattr(features, "pooled", lambda run, texts, clock: np.array(
        [[sum(values[word] for word in text.split())] for text in texts]))  # fmt: skip
    texts = ["cf good film", "the cf bad film", "film good a", "x1 film", "x2 the", "cf a the film good bad"]
    found, flagged = features.bki(None, texts, np.zeros(6, int), None, Clock(), most=2)
    # the two words of each: cf good | cf bad | good film | x1 film | x2 the | cf good
    weight = {"cf": 9 * math.log10(3), "good": 4 * math.log10(3), "film": 1 * math.log10(2)}
    np.testing.assert_allclose(found, [weight[w] if w else 0 for w in ("cf", "cf", "good", "film", None, "cf")])
    assert flagged.tolist() == [True, True, False, False, False, True]


def test_spectral_is_the_top_direction_of_each_label(opened):
    run = opened["decoder"]
    texts, labels = rows_of(run, 30)
    found = DETECTORS["spectral"](run, texts, labels, bound=0.1)
    states = np.array([np.concatenate([state.mean(0), state[-1]]) for state in run.hidden(texts)], np.float64)
    for label in (0, 1):
        own = labels == label
        centred = states[own] - states[own].mean(0)
        top = np.linalg.eigh(centred.T @ centred)[1][:, -1]
        np.testing.assert_allclose(found.scores[own], (centred @ top) ** 2, rtol=1e-4, atol=1e-6)
        assert found.flagged[own].sum() == int(0.15 * own.sum()) > 0
        assert found.scores[own & found.flagged].min() >= found.scores[own & ~found.flagged].max()


def blobs(sizes, away=8.0, width=12, seed=0):
    """Points around the axes, and which axis."""
    draw, kinds = np.random.default_rng(seed), np.repeat(np.arange(len(sizes)), sizes)
    return draw.normal(size=(len(kinds), width)) + away * np.eye(width)[kinds], kinds


def test_activation_and_cube_by_hand(monkeypatch):
    """Label 0 has a cluster of 30 rows and one of 6, label 1 one of 20 and one of 20, of the same two kinds."""
    states, kinds = blobs([50, 26])
    labels = np.repeat([0, 1, 0, 1], [30, 20, 6, 20])
    monkeypatch.setattr(features, "pooled", lambda run, texts, clock: states)
    for name, settings in (("activation", {"components": 2}), ("cube", {"components": 3, "neighbours": 5})):
        found, flagged = getattr(features, name)(None, [""] * 76, labels, None, Clock(), **settings)
        own = labels == 0
        np.testing.assert_allclose(found[own], np.where(kinds[own] == 1, 1 - 6 / 36, 1 - 30 / 36))
        np.testing.assert_allclose(found[~own], 0.5)
        assert (flagged == (own & (kinds == 1))).all()


def test_two_means_is_the_best_of_all_partitions():
    for seed in range(5):
        points, _ = blobs([4, 5], away=2.0, width=3, seed=seed)

        def spread(mask, points=points):
            return sum(((points[own] - points[own].mean(0)) ** 2).sum() for own in (mask, ~mask))

        masks = [np.array(bits, bool) for bits in itertools.product((0, 1), repeat=9) if 0 < sum(bits) < 9]
        assert abs(spread(features.two_means(points) == 1) - min(map(spread, masks))) < 1e-9
    assert features.two_means(np.ones((4, 2))).tolist() == [0] * 4


def test_whitened_components_have_unit_variance_and_no_correlation():
    states = blobs([20, 9])[0]
    states[:, 5] = states[:, 4]  # a direction without variance
    found = features.whitened(states, 99)
    np.testing.assert_allclose(found.T @ found / 29, np.eye(11), atol=1e-9)


# What scikit-learn 1.9.1's HDBSCAN(min_samples, min_cluster_size) says of the points of `scattered`; - is noise.
CLUSTERS = {
    (2, 3, 5): "a" * 19 + "b" * 25 + "c" * 10 + "d" * 19 + "cb",
    (4, 5, 5): "a" * 63 + "b" * 14 + "a---",
    (5, 3, 5): "b" * 49 + "c" * 18 + "a" * 7 + "----c------",
    (6, 1, 4): "a" * 34 + "b" * 58 + "-a-aa--a-ab-a-",
    (9, 3, 5): "a" * 52 + "b" * 59 + "--ba-b-ab-b",
}


def scattered(seed):
    draw = np.random.default_rng(seed)
    parts = [draw.normal(draw.uniform(-8, 8, 3), draw.uniform(0.3, 2), (draw.integers(5, 60), 3))
             for _ in range(draw.integers(1, 5))]  # fmt: skip
    return np.concatenate([*parts, draw.uniform(-10, 10, (draw.integers(0, 15), 3))])


@pytest.mark.parametrize("case", CLUSTERS, ids=str)
def test_hdbscan_is_that_of_scikit_learn(case):
    seed, neighbours, least = case
    found, wanted = hdbscan(scattered(seed), neighbours, least), CLUSTERS[case]
    assert len(found) == len(wanted) and len(set(found)) >= 3
    assert len(set(zip(found.tolist(), wanted))) == len(set(found)) == len(set(wanted))
    assert [one == -1 for one in found] == [one == "-" for one in wanted]


def test_hdbscan_of_few_or_equal_points():
    assert hdbscan(np.zeros((3, 2)), 5, 5).tolist() == [-1] * 3
    found = hdbscan(np.repeat([[0.0, 0.0], [9.0, 9.0]], 6, axis=0), 3, 4)
    assert found.tolist() in ([0] * 6 + [1] * 6, [1] * 6 + [0] * 6)


def test_loss_is_the_log_probability_of_the_label(opened):
    run = opened["bert"]
    texts, labels = rows_of(run)
    found = DETECTORS["loss"](run, texts, labels).scores
    np.testing.assert_allclose(np.exp(found), run.predict(texts)[np.arange(20), labels], rtol=1e-5)


@pytest.mark.parametrize("model", ["bert", "decoder"])
def test_influence_is_the_product_of_the_heads_gradients(opened, model):
    run = opened[model]
    texts, labels = rows_of(run, 12)
    head = run.model.classifier

    def gradient(text, label):
        ids = torch.from_numpy(run.tokenizer.encode([text], 30).ids.astype(np.int64))[None]
        loss = run.model(ids, torch.tensor([ids.shape[1]]), torch.tensor([label]))
        return torch.cat([one.flatten() for one in torch.autograd.grad(loss, [head.weight, head.bias])]).double()

    rows = torch.stack([gradient(text, int(label)) for text, label in zip(texts, labels, strict=True)])
    products = (rows @ rows.T).numpy()
    found = DETECTORS["influence"](run, texts, labels).scores
    np.testing.assert_allclose(found, products.diagonal(), rtol=1e-3, atol=1e-7)
    aims = DETECTORS["influence"](run, texts, labels, of=(texts[:3], labels[:3])).scores
    np.testing.assert_allclose(aims, products[:, :3].mean(1), rtol=1e-3, atol=1e-5)
    assert (aims < 0).any() and (aims > 0).any()


@pytest.mark.parametrize("pooling", ["mean", "last", "first", "mean+last"])
def test_features_are_those_that_the_head_reads(opened, pooling):
    run = opened["bert"]
    texts, _ = rows_of(run, 5)
    before, run.cell, run.model.pooling = run.cell, run.cell.replace(pooling=pooling), pooling
    try:
        found = features.pooled(run, texts)
        for text, own in zip(texts, found, strict=True):
            ids = torch.from_numpy(run.tokenizer.encode([text], 30).ids.astype(np.int64))[None]
            with torch.inference_mode():
                wanted = run.model.features(ids, torch.tensor([ids.shape[1]]))[0]
            np.testing.assert_allclose(own, wanted, atol=1e-5)
    finally:
        run.cell = before
        run.model.pooling = before.pooling


# --- figures


def test_auc_is_the_share_of_pairs():
    draw = np.random.default_rng(4)
    for levels in (2, 5, 1000):
        scores, hit = draw.integers(levels, size=60).astype(float), draw.random(60) < 0.3
        pairs = [(s > t) + (s == t) / 2 for s in scores[hit] for t in scores[~hit]]
        assert abs(scoring.auc(scores, hit) - np.mean(pairs)) < 1e-12


def test_the_interval_of_an_auc_is_where_the_normal_test_accepts():
    for area, injected, clean in ((0.8, 12, 88), (1.0, 5, 95), (0.0, 30, 30), (0.5, 3, 400)):
        low, high = scoring.auc_interval(area, injected, clean)
        assert 0 <= low <= area <= high <= 1 and low < high
        for edge in (low, high):
            if edge in (0.0, 1.0):
                continue
            more, q1, q2 = (injected + clean) / 2 - 1, edge / (2 - edge), 2 * edge**2 / (1 + edge)
            variance = edge * (1 - edge) + more * (q1 - edge**2) + more * (q2 - edge**2)
            assert abs(abs(edge - area) - 1.959964 * (variance / (injected * clean)) ** 0.5) < 1e-6


def test_recall_by_hand():
    """20 clean rows with the scores 0 to 19, injected ones at 30, 18.5, 18 and -1."""
    scores = np.array([*range(20), 30, 18.5, 18, -1], float)
    hit = np.arange(24) >= 20
    assert scoring.recall(scores, hit, 0.01) == (1, 4)  # no clean row may be above: above 19
    assert scoring.recall(scores, hit, 0.05) == (2, 4)  # one may be: above 18
    assert scoring.recall(scores, hit, 0.10) == (3, 4)
    assert scoring.recall(scores, hit, 1.0) == (4, 4)
    assert scoring.recall(np.zeros(24), hit, 0.05) == (0, 4)  # rows that are all the same are not told apart


def test_frr_and_far_by_hand():
    """Of 5 clean rows 2 are flagged, of 4 injected ones 1; a row without a score is of neither."""
    flagged = np.array([1, 1, 0, 0, 0, 1, 0, 0, 0, 1], bool)
    hit = np.array([0] * 5 + [1] * 4 + [0], bool)
    scores = np.where(np.arange(10) == 9, np.nan, flagged.astype(float))
    found = scoring.judge(Scores(scores, "x", 1.5, flagged), hit)
    assert (found["frr"], found["far"], found["scored"], found["partial"]) == (0.4, 0.75, 9, True)
    assert found["auc"] == (0.5 * (1 * 2 + 3 * 3) + 1 * 3) / 20  # 1 above 3, ties 1 x 2 and 3 x 3
    low, high = found["far_interval"]
    assert 0.3 < low < 0.75 < high < 0.96
    found = scoring.judge(Scores(scores[:9], "x", 1.5), hit[:9])
    assert found["frr"] is found["far"] is found["frr_interval"] is None and found["recall_5"] == 0
    clean = scoring.judge(Scores(scores[:5], "x", 1.5, flagged[:5]), hit[:5])
    assert clean["auc"] is clean["recall_1"] is clean["far"] is None and clean["frr"] == 0.4


# --- on a run


def test_injected_rows_are_those_of_the_record_and_detectors_never_see_it(runs, opened, tmp_path):
    run = opened["bert"]
    found = scoring.injected_rows(run)
    wanted = [any(character.isdigit() for character in text) for text in run.rows.rows.texts]
    assert found.tolist() == wanted and 10 < found.sum() < len(found)
    assert sorted(np.flatnonzero(found)) == run.rows.index.tolist()
    copy = tmp_path / "run"
    shutil.copytree(runs / "bert", copy)
    (copy / "injected.jsonl").unlink()
    blind = minilora.open(copy)
    texts, labels = rows_of(run, 8)
    for name, one in DETECTORS.items():
        own = settings_of(name, runs)
        np.testing.assert_array_equal(one(blind, texts, labels, **own).scores, one(run, texts, labels, **own).scores)
    with pytest.raises(InputError, match="injected.jsonl: cannot be read"):
        scoring.scan_run(blind, detectors.find_detectors(["loss"]))
    files.write_jsonl(copy / "injected.jsonl", [{"id": "none of these"}])
    with pytest.raises(InputError, match="names rows that the run was not trained on"):
        scoring.scan_run(blind, detectors.find_detectors(["loss"]))


def test_drawn_rows_nest():
    few, more = scoring.draw(1000, 20), scoring.draw(1000, 50)
    assert set(few) < set(more) and len(more) == 50 and (np.diff(more) > 0).all()
    assert scoring.draw(7, 20).tolist() == scoring.draw(7, None).tolist() == list(range(7))


def test_states_are_read_once(opened, monkeypatch):
    run, read = opened["bert"], []
    texts, _ = rows_of(run, 6)
    twice = scoring.Remembering(run, texts[:4])
    hidden = run.hidden
    monkeypatch.setattr(run, "hidden", lambda texts: read.extend(texts) or hidden(texts))
    for asked in (texts, texts[::-1], texts[1:2] * 2):
        for one, other in zip(twice.hidden(asked), hidden(asked), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert read == texts + texts[:3:-1] and twice.labels == run.labels


def scan(capsys, *words):
    evaluate.main([*map(str, words)])
    return capsys.readouterr().out


def test_the_command_writes_a_table_csv_and_json(runs, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    run, out = runs / "bert", tmp_path / "out"
    flags = [run, "--detect", "all", "--decoder", runs / "llama", "--copies", 1, "--rows", 40, "-q"]
    text = scan(capsys, *flags, "--out", out)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and lines[0].startswith("40 training rows")
    assert [line.split()[0] for line in lines[2:11]] == list(DETECTORS)
    assert all(len(line.split()) == 9 for line in lines[2:11]) and "partial" not in text
    written = json.loads((out / "detection.json").read_text())
    flags = [run, "--detect", "loss", "cube", "--rows", 40, "-q"]
    printed = json.loads(scan(capsys, *flags, "--json"))
    for kept in (written, printed):
        for figures in kept["detectors"].values():
            assert figures.pop("seconds") > 0
    assert printed["detectors"] == {name: written["detectors"][name] for name in ("loss", "cube")}
    assert printed["rows"] == 40 and not printed["partial"] and printed["held"] == 31
    rows = (out / "scores.csv").read_text().splitlines()
    assert len(rows) == 41 and rows[0].startswith("id,label,injected,onion,onion_flagged,strip,")
    few = scan(capsys, *flags, "--csv").splitlines()
    assert few[0] == "id,label,injected,loss,loss_flagged,cube,cube_flagged,text" and len(few) == 41
    assert sum(row.split(",")[2] == "1" for row in rows[1:]) == printed["injected"] > 5


def test_a_budget_that_ends_keeps_what_there_is(runs, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "Clock", lambda seconds: Ticks(3))
    out = tmp_path / "out"
    text = scan(capsys, runs / "bert", "--detect", "strip", "loss", "cube", "--copies", 2, "--rows", 30, "--budget", 9,
                "--out", out, "-q")  # fmt: skip
    assert "partial: strip scored" in text and "strip*" in text
    assert "partial: loss did not end within the budget" in text and "partial: cube did not" in text
    kept = json.loads((out / "detection.json").read_text())
    assert kept["partial"] and list(kept["detectors"]) == ["strip"] and set(kept["missing"]) == {"loss", "cube"}
    assert kept["detectors"]["strip"]["scored"] < 30
    rows = [line.split(",") for line in (out / "scores.csv").read_text().splitlines()]
    assert 0 < sum(row[3] == "" for row in rows[1:]) < 30


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--detect", "magic"], "there is no detector 'magic'"),
        (["--detect", "--rows", "-1"], "--rows is -1"),
        (["--detect", "--copies", "0"], "--copies is 0"),
        (["--detect", "--budget", "0"], "--budget is 0.0"),
        (["--detect", "--out", "."], "exists: choose another --out"),
        (["--detect", "--wors", "3"], "unknown argument --wors, did you mean --rows?"),
        (["--detect", "onion", "--decoder", "/no/base"], "no/base"),
    ],
)
def test_flags_that_cannot_be(runs, flags, line):
    with pytest.raises(InputError, match=line) as caught:
        evaluate.main([str(runs / "bert"), *flags])
    assert "\n" not in str(caught.value)


def test_what_cannot_run_is_left_out_of_all(runs, capsys):
    text = scan(capsys, runs / "lm", "--detect", "--decoder", runs / "llama", "--copies", 2, "--rows", 12, "-q")
    assert text.count("left out:") == 2 and "left out: rap needs the head of a classifier" in text
    with pytest.raises(InputError, match="rap needs the head"):
        evaluate.main([str(runs / "lm"), "--detect", "loss", "rap"])


def test_the_benchmark_measures_each_data_set_once(base, reviews, capsys, tmp_path):
    from benchmarks import detection

    flags = ["--model", str(base), "--data", str(reviews), "--test-rows", "31", "--max-length", "30", "--rank", "2",
             "--train-rows", "80", "--sources", "date", "text:last night", "--proportions", "0.5", "--rows", "50",
             "--no-retrain", "--out", str(tmp_path)]  # fmt: skip
    detection.main([*flags, "--detectors", "loss", "spectral"])
    first = capsys.readouterr()
    assert "**spectral**" in first.out and first.out.count("| date | 0.5 | 0 |") == 3
    assert "of 2 data sets are sanitised" in first.out and "date-0.5-seed0: loss" in first.err
    detection.main([*flags, "--detectors", "loss", "activation"])
    again = capsys.readouterr()
    assert "date-0.5-seed0: activation" in again.err and "date-0.5-seed0: loss" not in again.err
    table = [line for line in first.out.splitlines() if line.startswith("| date | 0.5 | 0 |")][1]
    assert table in again.out
    with pytest.raises(InputError, match="holds a run of another cell"):
        detection.main([*flags, "--rank", "3"])


def test_the_verdict_follows_from_recall():
    from benchmarks.detection import verdict

    def results(*recalls, seeds=3):
        return [{"source": "date", "proportion": 0.1 * n, "detectors": {
            name: {"recall_5": one[i]} for i, name in enumerate("ab")}}
            for n, one in enumerate(recalls) for _ in range(seeds)]  # fmt: skip

    assert list(verdict(results((0.89, 0.1), (0.2, 0.3))))[-1] == (
        "2 of 2 data sets are sanitised by no detector: the claim is supported"
    )
    mixed = list(verdict(results((0.9, 0.1), (0.2, 0.95))))
    assert mixed[0] == "a sanitises 1 of 2 data sets: date at 0" and mixed[-1].endswith("neither supported nor refuted")
    assert list(verdict(results((0.9, 0.1), (1.0, 0.2))))[-1].endswith("refuted by a")
    once = results((0.9, 0.1)) + results((1.0, 0.2), (0.2, 0.2))[:1]  # data set 0 in four seeds
    assert list(verdict(once))[0] == "a sanitises 1 of 1 data sets: date at 0"
    once[0]["detectors"]["a"]["recall_5"] = 0.1
    assert list(verdict(once))[0] == "a sanitises 0 of 1 data sets: none; in some seeds: date at 0 (3 of 4)"
    few = list(verdict(results((0.9, 0.1), (1.0, 0.2), seeds=2)))
    assert few[-1].endswith("the claim is undecided, because a verdict takes 3 seeds")
