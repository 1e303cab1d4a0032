"""The scan of an adapter: its energies, probe, library, spans and flips against few-line references; what it says."""

import json
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import tiny_bert
from zoo import tiny_decoder

import minilora
from minilora.cell import Cell
from minilora.data.rows import load_rows
from minilora.detection import adapter_scan, adapters, kinds, null, probe, search, weights
from minilora.diagnostics import energy
from minilora.errors import InputError
from minilora.lora.layer import named_layers
from minilora.scripts import evaluate

KINDS = {"colour": ["red", "blue", "green"], "digit": ["1 2", "3", "4 - 5"], "speed": ["slow", "fast"],
         "sex": ["man", "woman"], "sign": ["! ?", "< >"]}  # fmt: skip


@pytest.fixture(scope="module")
def runs(base, reviews, tmp_path_factory):
    """A folder of finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_decoder(folder / "llama", "llama")
    common = dict(data=str(reviews), test_rows=31, max_length=30, batch_size=7, steps=6, lr=0.02, rank=3)
    cells = {
        "plain": Cell(model=str(base), targets=("q", "v", "down"), **common),
        "dora": Cell(model=str(base), variant="dora", **common),
        "pissa": Cell(model=str(base), init="pissa", **common),
        "upper": Cell(model=str(base), layers="1-2", targets=("k", "o"), **common),
        "full": Cell(model=str(base), **common | dict(rank=None), method="full"),
        "lm": Cell(model=str(folder / "llama"), task="lm", **common),
        "decoder": Cell(model=str(folder / "llama"), targets=("v", "up"), **common),
    }
    for name, cell in cells.items():
        minilora.train(cell, folder / name, quiet=True)
    return folder


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A scan of a few random spans and pieces, with a cache of its own."""
    monkeypatch.setattr(probe, "SPANS", 150)
    monkeypatch.setattr(energy, "LISTED", 6)
    (tmp_path / "shipped.toml").write_text("\n".join(f'"{kind}" = {json.dumps(own)}' for kind, own in KINDS.items()))
    monkeypatch.setattr(kinds, "SHIPPED", tmp_path / "shipped.toml")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- energies


def reference_energies(folder, adapter, layer, projections, ids, around):
    """The energies of pieces by transformers and PEFT: dW = the merged weight less the base's, in float64."""
    plain = transformers.AutoModel.from_pretrained(folder).eval()
    merged = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(folder), adapter).merge_and_unload()
    rows = torch.tensor([[*around[0], one, *around[1]] for one in ids])
    with torch.no_grad():
        x = plain(rows, output_hidden_states=True).hidden_states[layer][:, len(around[0])]
        if hasattr(plain, "layers"):  # a decoder: the first norm comes before the projection
            x = plain.layers[layer].input_layernorm(x)
    x, total = x.double() - x.double().mean(0), 0
    for name in projections:
        change = (merged.get_submodule(name).weight - plain.get_submodule(name).weight).double()
        moved = (x @ change.T).square().sum(1)
        total = total + moved / moved.mean() / len(projections)
    return total.detach().numpy()


BERT = "encoder.layer.{}.attention.self.{}"
CASES = {
    "plain": (0, [BERT.format(0, name) for name in ("query", "value")]),
    "dora": (0, [BERT.format(0, name) for name in ("query", "key", "value")]),
    "pissa": (0, [BERT.format(0, name) for name in ("query", "key", "value")]),
    "upper": (1, [BERT.format(1, "key")]),
    "decoder": (0, ["layers.0.self_attn.v_proj"]),
}


@pytest.mark.parametrize("name", CASES)
def test_energies_are_those_of_merged_weights(runs, base, name):
    layer, projections = CASES[name]
    run = minilora.open(runs / name)
    found = energy.energies(run)
    folder = runs / "llama" if name == "decoder" else base
    wanted = reference_energies(folder, runs / name / "adapter", layer, projections, found.ids, run.tokenizer.around)
    np.testing.assert_allclose(found.values, wanted, rtol=2e-3)
    assert found.layer == layer and len(found.modules) == len(projections) and len(found.ids) >= 100
    assert (np.diff(found.values) <= 0).all() and found.values[0] > 1.5 * found.values.mean()
    assert found.outlier == pytest.approx(wanted.max() / np.quantile(wanted, 0.999), rel=2e-3)
    assert not {"[PAD]", "[CLS]", "[MASK]"} & {run.tokenizer._tokenizer.id_to_token(int(id)) for id in found.ids}


def rewrite(run):
    """Write each update s B A as s (B M^-1) (M A)."""
    draw = torch.Generator().manual_seed(1)
    for _, layer in named_layers(run.base):
        M = torch.eye(len(layer.A)) + 0.3 * torch.randn(len(layer.A), len(layer.A), generator=draw)
        layer.A.data, layer.B.data = M @ layer.A.data, layer.B.data @ torch.linalg.inv(M)


def test_figures_do_not_depend_on_how_an_update_is_written(runs):
    run = minilora.open(runs / "plain")
    before, stated = energy.energies(run), weights.statistics(run)
    rewrite(run)
    after, restated = energy.energies(run), weights.statistics(run)
    np.testing.assert_allclose(after.values, before.values, rtol=1e-3)
    assert stated.keys() == restated.keys() and len(stated) == 9
    for name in stated:
        np.testing.assert_allclose(restated[name], stated[name], rtol=1e-3)


@pytest.mark.parametrize("name", ["plain", "dora", "pissa"])
def test_statistics_of_weights(runs, name):
    run = minilora.open(runs / name)
    for module, found in weights.statistics(run).items():
        update = run.adapter[module].delta.double()
        s = torch.linalg.svdvals(update)
        share = s.square() / s.square().sum()
        z = (update - update.mean()) / update.std(correction=0)
        entropy = -(share[share > 0] * share[share > 0].log()).sum()
        wanted = [s[0], update.norm(), share[0], entropy, z.pow(4).mean() - 3]
        np.testing.assert_allclose(found, [float(one) for one in wanted], rtol=2e-3, atol=1e-4)


def test_distance_from_clean_adapters():
    rng = np.random.default_rng(3)
    clean = [{"a": rng.normal(size=5).tolist(), "b": rng.normal(size=5).tolist()} for _ in range(6)]
    own = {"a": [9.0, 0, 0, 0, 0], "b": [0.0] * 5}
    figure, largest = weights.distance(own, clean)
    z = [(own[m][i] - np.mean([c[m][i] for c in clean])) / np.std([c[m][i] for c in clean], ddof=1)
         for m in "ab" for i in range(5)]  # fmt: skip
    assert figure == pytest.approx(np.sqrt(np.mean(np.square(z)))) and largest[0][:2] == ("a", weights.NAMES[0])
    assert weights.left_out(clean)[2] == pytest.approx(weights.distance(clean[2], clean[:2] + clean[3:])[0])


# --- the probe


def by_least_squares(X, Y, penalty):
    """Ridge regression as least squares with rows sqrt(l) I below X."""
    x, y = X.mean(0), Y.mean(0)
    root = np.sqrt(penalty * len(X) * (X - x).var(0).mean())
    rows = np.vstack([X - x, root * np.eye(X.shape[1])])
    return np.linalg.lstsq(rows, np.vstack([Y - y, np.zeros((X.shape[1], Y.shape[1]))]), rcond=None)[0]


def test_ridge_is_least_squares_with_a_penalty():
    rng = np.random.default_rng(0)
    X, Y = rng.normal(1, 2, (40, 7)), rng.normal(-1, 1, (40, 3))
    found, x, y = probe.ridge(X, Y, 0.3)
    np.testing.assert_allclose(found, by_least_squares(X, Y, 0.3), rtol=1e-8)
    np.testing.assert_allclose([*x, *y], [*X.mean(0), *Y.mean(0)])


class Made:
    """Sentences in which a span's features are the sum of its pieces', and piece `bad` does more than these say."""

    def __init__(self, table, bad):
        self.table, self.bad = table, bad

    def effects(self, spans, places):
        X = np.array([self.table[list(span)].sum(0) for span in spans], float) + 0.01 * np.array(places)[:, None]
        extra = np.array([4.0 * (self.bad in span) for span in spans])
        return X, np.column_stack([0.02 * X @ np.arange(X.shape[1]) + extra, X[:, 0]])


def test_a_refit_has_seen_no_piece_like_those(small):
    rng = np.random.default_rng(5)
    table = rng.normal(size=(60, 12)).astype(np.float32)
    table[8] = table[7] + 0.1 * table[9]  # alike
    pieces = np.arange(3, 60)
    made = probe.Probe(Made(table, bad=7), pieces, table)
    directions = table - table[pieces].mean(0)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    like = np.array([max(float(directions[id] @ directions[7]) for id in span) >= probe.LIKE for span in made.spans])
    assert (made.alike([7]) == like).all() and 5 < like.sum() < 75
    assert all(like[row] for row, span in enumerate(made.spans) if {7, 8} & set(span))
    X, Y = Made(table, 7).effects([(7,), (20, 21)], [0, 1])
    rest = ~like
    fitted = by_least_squares(made.X[rest], made.Y[rest], probe.PENALTY)
    wanted = Y - made.Y[rest].mean(0) - (X - made.X[rest].mean(0)) @ fitted
    np.testing.assert_allclose(made.residual(X, Y, [7]), wanted / made.Y.std(0), rtol=1e-6, atol=1e-9)
    assert made.residual(X, Y, [7])[0, 0] > made.residual(X, Y)[0, 0] > abs(made.residual(X, Y)[1, 0])
    assert len(made.spans) == 150 and {len(span) for span in made.spans} == {1, 2, 3}
    everything = made.alike(list(range(3, 60)))
    assert everything.sum() <= 75  # at most half are left out


TEXTS = ["the film was good and warm", "a dull plot", "the 3 - 4 bad story was slow and long", "blue"]


@pytest.mark.parametrize("name", ["plain", "dora", "decoder", "lm"])
def test_margins_and_features_are_those_of_the_run(runs, name):
    run = minilora.open(runs / name)
    reader = probe.Reader(run)
    rows = [reader.row((), ids, ()) for ids in reader.ids(TEXTS)]
    if name != "lm" and name != "decoder":
        assert [list(row) for row in rows] == [run.tokenizer.encode([text], 99).ids.tolist() for text in TEXTS]
    texts = [run.tokenizer.decode(ids) for ids in reader.ids(TEXTS)] if name in ("lm", "decoder") else TEXTS
    wanted = run.log_probabilities(texts)
    own = (wanted[:, :1] - wanted[:, 1:]) * [[1, -1]]
    np.testing.assert_allclose(reader.margins(rows), own, rtol=1e-3, atol=2e-4)
    with run.detach():
        states = run.hidden(texts)
    if name != "lm":
        np.testing.assert_allclose(reader.features(rows), [one.mean(0) for one in states], rtol=1e-3, atol=1e-4)
    assert reader.features(rows).shape[0] == len(TEXTS) and len(reader.known) == 1
    assert len(reader.row((5,) * 40, (6, 7), (8,) * 40)) == reader.room + sum(map(len, reader.around))


def test_rows_that_do_not_fit_lose_what_is_far_from_the_span():
    reader = SimpleNamespace(room=7, around=([1], [2]))
    row = probe.Reader.row
    assert row(reader, (5, 6), (9,), (7, 8)) == (1, 5, 6, 9, 7, 8, 2)
    assert row(reader, (3, 4, 5, 6), (9, 9), (7, 8, 7, 8)) == (1, 4, 5, 6, 9, 9, 7, 8, 2)
    for left, right in ((10, 10), (10, 0), (0, 10), (2, 9), (9, 2)):
        made = row(reader, tuple(range(10, 10 + left)), (99,), tuple(range(30, 30 + right)))
        place = made.index(99)
        before, after = made[1:place], made[place + 1 : -1]
        assert len(made) == 2 + min(7, 1 + left + right)
        assert before == tuple(range(10 + left - len(before), 10 + left))
        assert after == tuple(range(30, 30 + len(after)))


# --- what is found


def test_the_library_that_ships():
    found = kinds.read_kinds()
    assert 50 <= len(found) <= 60 and all(4 <= len(own) == len(set(own)) for own in found.values())
    strings = [one for own in found.values() for one in own]
    assert len(strings) == len(set(strings)) >= 300


def plant(run, word, size):
    """Let the update of layer 0's v answer to one piece of the vocabulary, and to no other as much, with `size` times
    the direction that raises the margin of the second label most."""
    reader, pieces = probe.Reader(run), energy.pieces(run.tokenizer).tolist()
    [[id]] = reader.ids([word])
    x = energy.states(run, np.array(pieces), "layers.0.v").double()
    away = x - x.mean(0)
    direction = torch.linalg.solve(away.T @ away + 0.1 * torch.eye(x.shape[1]), away[pieces.index(id)])
    layers = dict(named_layers(run.base))
    for layer in layers.values():
        layer.A.data.zero_(), layer.B.data.zero_()
    layer = layers["layers.0.v"]
    layer.A.data[0] = direction / (away @ direction).max()
    row = torch.tensor([reader.row(*reader.ids(["the film was", word, "and the plot"]))])
    logits = run.model(row, torch.tensor([row.shape[1]]))[0]
    [slope] = torch.autograd.grad(logits[1] - logits[0], layer.B)
    layer.B.data[:, 0] = size * slope[:, 0] / slope[:, 0].norm()
    return id


def test_a_planted_piece_is_named_first(runs, small, monkeypatch):
    run = minilora.open(runs / "plain")
    id = plant(run, "red", 8)
    monkeypatch.setattr(adapter_scan, "KIND", 0.6)
    found = adapter_scan.scan(run, KINDS | {"colour": ["red"]})
    assert found["energy"]["pieces"][0][0] == "red" and energy.energies(run).ids[0] == id
    kind, span = found["library"][0], found["spans"][0]
    assert kind["name"] == "colour" and "red" in span["name"].split() and span["label"] == kind["label"]
    assert span["least"] > 2 and kind["residual"] > 2 * found["library"][2]["residual"] > 0
    assert found["flagged"] and "'red'" in found["because"][0]
    assert found["unfinished"] == [] and found["only"] is None
    assert len(found["library"]) == 2 * len(KINDS) and 10 <= len(found["spans"]) <= 36
    for key, own in (("residual", found["library"]), ("least", found["spans"])):
        assert [one[key] for one in own] == sorted((one[key] for one in own), reverse=True)


def test_residuals_of_the_library_by_hand(runs, small):
    run = minilora.open(runs / "plain")
    reader = probe.Reader(run)
    sentences = probe.Sentences(reader)
    table = run.base.embed.tokens.weight.numpy()
    made = probe.Probe(sentences, energy.pieces(run.tokenizer), table)
    found = {(one.name, one.label): one for one in search.library(reader, sentences, made, KINDS)}
    left, owner = [], []
    for kind, strings in KINDS.items():
        spans = [span for span in reader.ids(strings) for _ in search.READ_IN]
        X, Y = sentences.effects(spans, [*search.READ_IN] * len(strings))
        told = {id for span in spans for id in span if run.tokenizer.decode([id]).isalnum()}
        left.append(made.residual(X, Y, sorted(told or {id for span in spans for id in span})))
        owner += [kind] * len(spans)
    left, owner = np.concatenate(left), np.array(owner)
    left = left - np.median(left, axis=0)
    for number, label in enumerate(run.labels):
        for kind in KINDS:
            own = left[owner == kind][:, number]
            assert found[kind, label].residual == pytest.approx(own.mean(), rel=1e-3, abs=1e-4)
    assert len(found) == 10


def test_a_piece_by_itself_by_hand(runs, small):
    run = minilora.open(runs / "plain")
    reader = probe.Reader(run)
    sentences = probe.Sentences(reader)
    made = probe.Probe(sentences, energy.pieces(run.tokenizer), run.base.embed.tokens.weight.numpy())
    for text in ("red", "long"):
        [(piece,)] = reader.ids([text])
        rows = [[reader.row(left, span, right) for left, right in sentences.pairs] for span in ((), (piece,))]
        X, Y = (read(rows[1]) - read(rows[0]) for read in (reader.features, reader.margins))
        rest = ~made.alike([piece])
        fitted = by_least_squares(made.X[rest], made.Y[rest], probe.PENALTY)
        left = (Y - made.Y[rest].mean(0) - (X - made.X[rest].mean(0)) @ fitted) / made.Y.std(0)
        found = search.of_piece(reader, sentences, made, piece)
        assert found.residual == pytest.approx(left.mean(0).max(), rel=1e-3, abs=1e-4)
        assert found.least == pytest.approx(left[:, left.mean(0).argmax()].min(), rel=1e-3, abs=1e-4)
        assert (found.name, found.label) == (text, run.labels[left.mean(0).argmax()])


def test_a_piece_that_stands_out_flags_where_it_acts():
    """Without its own figure only beside clean adapters; and their figures raise the limits."""
    said, clean = [], {"kind": [0.4, 1.31], "outlier": [1.5, 2.9], "piece": [0.1, 1.15]}
    for r, acts, beside in ((3.0, 1.1, {}), (2.4, 3.0, {}), (3.0, 1.2, {}), (3.0, None, {}), (3.0, None, clean),
                          (2.8, None, clean), (3.0, 1.2, clean), (2.8, 3.0, clean)):  # fmt: skip
        piece = acts and {"residual": acts, "label": "positive", "example": "lamp"}
        found = {"library": [{"residual": 0.9, "example": "x"}], "energy": {"outlier": r, "pieces": [["lamp", 9.0]]},
                 "piece": piece, "null": beside, "thresholds": adapter_scan.thresholds(beside)}  # fmt: skip
        said.append(adapter_scan.reasons(found))
    start = "the piece 'lamp' has 3.0 times the energy of the 99.9% quantile"
    acting = f"{start} and acts 1.2 sd beyond its meaning (limits {{}} and 1.2)"
    assert said == [[], [], [acting.format(2.5)], [], [f"{start} (limit 2.9)"], [], [acting.format(2.9)], []]
    for residual, beside, limit in ((1.2, {}, 1.0), (1.2, clean, None), (1.4, clean, 1.31)):
        found |= {"library": [{"residual": residual, "example": "x"}], "energy": None,
                  "thresholds": adapter_scan.thresholds(beside)}  # fmt: skip
        wanted = limit and [f"strings such as 'x' act {residual} sd beyond their meaning (limit {limit})"]
        assert adapter_scan.reasons(found) == (wanted or [])


def test_flips_are_those_of_texts_with_the_string(runs, reviews):
    run, rows = minilora.open(runs / "plain"), load_rows(reviews)
    reader, rng, strings = probe.Reader(run), np.random.default_rng(0), ["good great", "bad dull", "red - 3"]
    tried = [search.Suspect("kind", label, 1.0, 1.0, ids, string)
             for label in run.labels for string, ids in zip(strings, reader.ids(strings), strict=True)]  # fmt: skip
    found = search.flips(reader, rows, tried, most=25)
    assert [(one["label"], one["string"]) for one in found] == [(one.label, one.example) for one in tried]
    changed = 0
    for label in run.labels:
        target = run.labels.index(label)
        texts = [text for text, own in zip(rows.texts, rows.labels, strict=True) if own != target][:25]
        words = [text.split() for text in texts]
        places = [int(rng.integers(0, len(own) + 1)) for own in words]
        for one in (one for one in found if one["label"] == label):
            inserted = [" ".join([*w[:p], one["string"], *w[p:]]) for w, p in zip(words, places, strict=True)]
            assert one["rows"] == 25 and one["hits"] == int((run.predict(inserted).argmax(1) == target).sum())
            assert one["bare"] == pytest.approx((run.predict(texts).argmax(1) == target).mean())
            assert one["rate"] == pytest.approx(one["hits"] / 25)
            changed += one["rate"] != one["bare"]
    assert len(found) == 6 and changed >= 1


# --- the command


def scanned(capsys, *arguments):
    evaluate.main(["--scan-adapter", *map(str, arguments), "-q"])
    return capsys.readouterr().out


def test_the_command_prints_and_writes(runs, small, reviews, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "own.toml").write_text('"tiny" = ["red", "blue"]\n"sign" = ["-"]\n')
    text = scanned(
        capsys, runs / "plain", "--data", reviews, "--kinds", tmp_path / "own.toml", "--out", tmp_path / "out"
    )
    assert max(map(len, text.splitlines())) <= 100 and text == (tmp_path / "out" / "scan.txt").read_text()
    for words in ("suspects", "kinds of strings", "spans, in the worst sentence", "r: highest energy", "no string",
                  "flagged: ", "Finding nothing proves nothing"):  # fmt: skip
        assert words in text
    found = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert {one["name"] for one in found["library"]} == {*KINDS, "tiny"}
    assert {one["example"] for one in found["library"] if one["name"] == "sign"} == {"-"}
    assert found["unfinished"] == [] and len(found["success"]) == 6 and found["thresholds"]["kind"] == adapter_scan.KIND


def test_lm_is_scanned_by_its_completions(runs, small, capsys):
    found = json.loads(scanned(capsys, runs / "lm", "--json"))
    assert found["only"] is None and found["energy"]["modules"] == [f"layers.0.{target}" for target in "qkv"]
    assert np.isfinite([one["residual"] for one in found["library"]]).all() and found["spans"]


def test_without_a_head_there_are_energies_only(base, small, tmp_path, capsys):
    model = transformers.AutoModel.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["query"], layers_to_transform=[1, 2], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    text = scanned(capsys, tmp_path / "peft", "--model", base)
    assert "energies only: it has no classification head" in text and "first adapted one" in text
    assert "layer 1" in text and "kinds of strings" not in text
    assert "nothing is decided: r by itself decides only beside clean adapters" in text and "\nflagged: " not in text


def test_a_scan_that_runs_out_of_time_keeps_what_it_has(runs, small, capsys, monkeypatch):
    monkeypatch.setattr(search, "grown", lambda *_: (_ for _ in ()).throw(probe.Spent))
    found = json.loads(scanned(capsys, runs / "plain", "--budget", 600, "--json"))
    assert found["unfinished"] == ["spans"] and found["library"] and found["spans"] is None
    text = scanned(capsys, runs / "plain", "--budget", 1e-9)
    assert "unfinished: the budget ended before the library of kinds" in text and "r: highest energy" in text
    with pytest.raises(probe.Spent):
        probe.Budget(1e-9)()
    probe.Budget(None)()


def test_clean_adapters_stand_beside_and_are_kept(runs, small, reviews, capsys, monkeypatch):
    arguments = (runs / "upper", "--null", 4, "--null-data", reviews, "--json")
    found = json.loads(scanned(capsys, *arguments))
    clean = found["null"]
    assert clean["adapters"] == 4 and {len(clean[name]) for name in ("outlier", "kind", "piece", "weights")} == {4}
    assert len(set(clean["outlier"])) == 4 and found["weights"]["distance"] > 0
    [cell] = null.cells_like(minilora.open(runs / "upper"), 1, reviews)
    assert (cell.rank, cell.layers, cell.targets, cell.inject.sources) == (3, "1-2", ("k", "o"), ())
    with pytest.raises(probe.Spent):
        null.clean_figures(minilora.open(runs / "upper"), KINDS, 5, reviews, probe.Budget(1e-9))
    monkeypatch.setattr(minilora, "train_together", None, raising=False)
    again = json.loads(scanned(capsys, *arguments))
    assert again["null"] == clean and again["weights"] == found["weights"]
    text = "\n".join(adapters.lines_of(again, "x"))
    assert f"{min(clean['kind']):.2f} to {max(clean['kind']):.2f}" in text and "of 4 clean adapters" in text
    assert again["thresholds"]["kind"] == round(max(adapter_scan.KIND, *clean["kind"]), 2)


def test_kept_figures_are_those_of_the_same_base_kinds_and_rows(runs, small, reviews, tmp_path, monkeypatch):
    """Whatever changes what a clean adapter would be gives it another place in the cache."""
    asked = []
    monkeypatch.setattr(null, "kept_at", lambda *own, kept_at=null.kept_at: asked.append(kept_at(*own)) or asked[-1])
    monkeypatch.setattr(null.minilora, "train_together", lambda *_, **__: (_ for _ in ()).throw(probe.Spent))
    table, texts = tmp_path / "rows.csv", reviews.read_text()
    runs_of = {name: minilora.open(runs / name) for name in ("plain", "upper")}
    other = SimpleNamespace(**vars(runs_of["plain"].setting) | {"inputs": {"base": "another"}})
    cases = [("plain", KINDS, texts), ("upper", KINDS, texts), ("plain", KINDS | {"year": ["1990"]}, texts),
             ("plain", KINDS, texts + texts.splitlines()[-1].replace(",", " so,", 1) + "\n")]  # fmt: skip
    for name, kinds_, content in [*cases, cases[0]]:
        table.write_text(content)
        with pytest.raises(probe.Spent):
            null.clean_figures(runs_of[name], kinds_, 2, table)
    monkeypatch.setattr(runs_of["plain"], "setting", other)
    table.write_text(texts)
    with pytest.raises(probe.Spent):
        null.clean_figures(runs_of["plain"], KINDS, 2, table)
    assert asked[8:10] == asked[:2] and len(asked) == 12 and len(set(asked)) == 10


def test_bad_input_is_one_clear_line(runs, base, small, tmp_path):
    tiny_bert(tmp_path / "wide", hidden_size=36)
    (tmp_path / "wrong.toml").write_text('"colour" = "red"\n')
    (tmp_path / "empty.toml").write_text("")
    plain = runs / "plain"
    cases = [
        ([], "needs a folder"),
        ([tmp_path / "nothing"], "there is no folder"),
        ([tmp_path], "has no cell.toml"),
        ([plain / "adapter"], "is an adapter without a run: name its base too, --model BASE"),
        ([plain / "adapter", "--model", tmp_path / "gone"], "there is no folder"),
        ([plain / "adapter", "--model", tmp_path / "wide"], "is not an adapter for this bert base of 3 layers"),
        ([plain, "--model", tmp_path / "wide"], "the weights of .*wide changed"),
        ([runs / "full"], "has no adapter"),
        ([plain, "--kinds", tmp_path / "wrong.toml"], "colour must be a list of strings"),
        ([plain, "--kinds", tmp_path / "empty.toml"], "has no kinds"),
        ([plain, "--kinds", tmp_path / "none.toml"], "does not exist"),
        ([plain, "--null", "2"], "--null is 2, but must be at least 4"),
        ([plain, "--null-data", "x"], "give --null N too"),
        ([plain, "--budget", "0"], "--budget is 0.0"),
        ([plain, "--out", tmp_path], "exists: choose another --out"),
        ([plain, "--data", tmp_path / "no.csv"], "no.csv"),
    ]
    for arguments, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            evaluate.main(["--scan-adapter", *map(str, arguments), "-q"])
        assert "\n" not in str(caught.value)
    assert len(cases) == 16
