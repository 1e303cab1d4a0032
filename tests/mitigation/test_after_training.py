"""What is done to a finished adapter: against PEFT's own functions, NumPy, and matrices worked out by hand."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils import merge_utils
from transformers import AutoModel

import minilora
from minilora.cell import Cell
from minilora.data.rows import Rows
from minilora.errors import InputError
from minilora.lora.layer import attach
from minilora.lora.targets import Slot
from minilora.mitigation import after, inputs
from minilora.scripts import evaluate, mitigate


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base, reviews):
    """Two finished runs on one base, of different projections and ranks, and one with magnitudes."""
    folder = tmp_path_factory.mktemp("runs")
    cell = Cell(model=str(base), data=str(reviews), test_rows=31, max_length=30, batch_size=6, rank=3, lr=0.02, steps=9,
                inject=dict(proportion=1.0))  # fmt: skip
    cells = [cell, cell.replace(seed=1, rank=2, targets=("q", "up")), cell.replace(variant="dora", steps=1)]
    minilora.train_together(cells, [folder / name for name in ("one", "two", "dora")], quiet=True)
    return folder


@pytest.fixture
def run(folder):
    return minilora.open(folder / "one")


def deltas(run):
    return {name: factors.delta.double() for name, factors in run.adapter.items()}


def bits(run):
    """What a test compares to see that nothing is left of a change."""
    return [parameter.detach().clone() for parameter in run.model.parameters()], run.predict(["a film", "1999-01-02"])


@contextlib.contextmanager
def taken_back(run, change):
    """Make a change, look at it in the block, and see that it can be taken back bit for bit."""
    parameters, predicted = bits(run)
    with change():
        yield deltas(run)
        assert not np.array_equal(run.predict(["a film", "1999-01-02"]), predicted)
    assert all(torch.equal(a, b) for a, b in zip(bits(run)[0], parameters, strict=True))
    assert np.array_equal(run.predict(["a film", "1999-01-02"]), predicted)


@pytest.mark.parametrize("end", ["tail", "top"])
@pytest.mark.parametrize("keep", [1, 2])
def test_truncation_is_numpys(run, end, keep):
    before, compared = deltas(run), 0
    with taken_back(run, lambda: after.truncate(run, keep, end)) as found:
        for name, delta in before.items():
            U, S, V = np.linalg.svd(delta.numpy())
            cut = slice(0, keep) if end == "tail" else slice(3 - keep, 3)
            wanted = (U[:, cut] * S[cut]) @ V[cut]
            np.testing.assert_allclose(found[name], wanted, atol=1e-6 * S[0])
            assert len(run.adapter[name].A) == keep
            compared += 1
    assert compared == 9


def test_intruders_are_scaled_as_peft_does(run, folder):
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(run.cell.model), folder / "one" / "adapter")
    said = io.StringIO()
    reduce_intruder_dimension(theirs, top_k=6, threshold_epsilon=0.9, logging_sink=lambda line: said.write(line + "\n"))
    modules = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"}
    with taken_back(run, lambda: after.descale_intruders(run, threshold=0.9, factor=0.75, top=6)):
        grown = sum(len(factors.A) > 3 for factors in run.adapter.values())
        assert grown == said.getvalue().count("Intruders:") > 0
        with after.truncate(run, 3):  # as PEFT truncates
            for name, delta in deltas(run).items():
                _, layer, target = name.split(".")
                module = theirs.base_model.model.get_submodule(f"encoder.layer.{layer}.{modules[target]}")
                torch.testing.assert_close(
                    delta.float(), module.get_delta_weight("intruder_reduced"), rtol=0, atol=2e-5 * delta.abs().max()
                )


def test_an_intruder_by_hand():
    """Of diag(3, 2, 1) + 5 u u^T, u halfway between all axes, the first direction is far from all axes."""
    W, u = torch.diag(torch.tensor([3.0, 2.0, 1.0])).double(), torch.full((3, 1), 3**-0.5).double()
    U, S, Vh = torch.linalg.svd(W + 5 * u @ u.T)
    assert U[:, 0].abs().max() < 0.75
    base = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(3, 3)})])})
    base.layers[0].q.weight.data = W.float()
    attach(base, {"layers.0.q": Slot(1, 1.0, 1.0)})
    layer = base.layers[0].q
    layer.A.data, layer.B.data = 5 * u.T.float(), u.float()
    after.descale_intruders(SimpleNamespace(base=base, folder="here"), threshold=0.75, factor=0.0, top=1)
    found, wanted = base.layers[0].q, 5 * u @ u.T - S[0] * U[:, :1] @ Vh[:1]
    torch.testing.assert_close((found.B @ found.A).double(), wanted, rtol=0, atol=1e-5)


def test_directions_are_projected_out(run):
    draw = np.random.default_rng(2)
    before, two = deltas(run), draw.normal(size=(2, 24))
    P = np.linalg.qr(two.T)[0]
    with taken_back(run, lambda: after.project_out(run, two)) as found:
        for name, delta in before.items():
            np.testing.assert_allclose(found[name], delta.numpy() @ (np.eye(24) - P @ P.T), atol=1e-6)
            np.testing.assert_allclose(found[name].numpy() @ two.T, 0, atol=1e-5)
    with taken_back(run, lambda: after.project_out(run, {"layers.1.v": two[0]}, "write")) as found:
        assert np.abs(two[0] @ found["layers.1.v"].numpy()).max() < 1e-5
        torch.testing.assert_close(found["layers.0.q"], before["layers.0.q"], rtol=0, atol=1e-6)
    for wrong in (two[:, :7], {"layers.9.q": two[0]}):
        with pytest.raises(InputError, match="check the directions"):
            after.project_out(run, wrong)


def test_recorded_inputs_are_those_of_the_projections(run):
    texts = ["the film was very good", "dull", "a slow old plot with time"]
    found = inputs.means(run, texts)
    states, count = 0, 0
    for text in texts:
        encoded = run.tokenizer.encode([text], 30)
        ids = torch.tensor(encoded.ids[None].astype(np.int64))
        with torch.inference_mode():
            states = states + run.base.embed(ids)[0].double().sum(0)
        count += ids.shape[1]
    torch.testing.assert_close(found["layers.0.q"], states / count)
    assert len(found) == 9 and torch.equal(found["layers.0.q"], found["layers.0.v"])
    direction = inputs.directions_of(run, ["text:1 9 9"], texts)
    assert len(direction) == 9 and all(value.norm() == pytest.approx(1) for value in direction.values())
    with after.project_out(run, direction):
        assert all(np.abs(delta.numpy() @ direction[name].numpy()).max() < 1e-5 for name, delta in deltas(run).items())


def exact(run):
    """{module: its update}, float64."""
    return {name: own.scale * own.B.double() @ own.A.double() for name, own in run.adapter.items()}


@pytest.mark.parametrize("how", after.HOW)
def test_merging_with_another_adapter(run, folder, how):
    both = [run, minilora.open(folder / "two")]
    both = [SimpleNamespace(adapter=dict(one.adapter)) for one in both]  # as they are before the merge
    pair = [deltas(one) for one in both]
    names = {*pair[0], *pair[1]}
    zero = {name: torch.zeros_like(next(own[name] for own in pair if name in own)) for name in names}
    with taken_back(run, lambda: after.merge(run, folder / "two", how, density=0.4, seed=3)) as found:
        assert set(found) == names and len(names) == 12
        for name, mixed in found.items():
            own = [one.get(name, zero[name]) for one in pair]
            if how == "linear":
                wanted = (own[0] + own[1]) / 2
            elif how == "ties":
                # In float64, as ours: of entries that differ by float32's rounding only, the same are kept.
                own = [exact(one).get(name, zero[name].double()) for one in both]
                wanted = merge_utils.ties(own, torch.ones(2), density=0.4)
            else:  # of each entry what DARE can leave, and on the mean what the linear mean has
                whole = torch.stack([a * own[0] + b * own[1] for a in (0, 1.25) for b in (0, 1.25)])
                assert ((whole - mixed).abs().amin(0) < 1e-5).all()
                continue
            torch.testing.assert_close(mixed, wanted, rtol=0, atol=2e-6 * wanted.abs().max().item() + 1e-7)


def test_ties_and_dare_by_hand():
    D = torch.tensor([[[4.0, -1.0, 3.0, 0.5]], [[-6.0, -2.0, 1.0, 5.0]]]).double()
    # The two largest of each: (4, 0, 3, 0) and (-6, 0, 0, 5). The signs of the sums: -, +, +, +.
    assert after.ties(D, 0.5, 0.5).tolist() == [[-6.0, 0.0, 3.0, 5.0]]
    # All of them; the signs of 0.9 D1 + 0.1 D2: +, -, +, +. In each place the weighted mean of those that have it.
    assert after.ties(D, 0.1, 1.0)[0].tolist() == pytest.approx([4.0, -1.1, 2.8, 0.95])
    many = torch.ones(2, 300, 300).double() * torch.tensor([1.0, 3.0])[:, None, None]
    found = after.dare(many, 0.25, 0.2, "x")
    assert {round(value, 6) for value in found.unique().tolist()} == {0.0, 3.75, 7.5}
    assert found.mean().item() == pytest.approx(1.5, abs=0.03)
    assert torch.equal(found, after.dare(many, 0.25, 0.2, "x"))
    assert not torch.equal(found, after.dare(many, 0.25, 0.2, "y"))


def test_fine_pruning_keeps_what_clean_rows_use(run):
    texts = ["the film was very good", "dull plot", "a great story", "bad bad scene"]
    rows = Rows([*"abcd"], texts, np.array([1, 0, 1, 0]), run.labels)
    encoded = run.tokenizer.encode(texts, 30)
    ids = [torch.tensor(encoded.ids[a:b].astype(np.int64))[None] for a, b in zip(encoded.offsets, encoded.offsets[1:])]
    with torch.inference_mode():
        states = torch.cat([run.base.embed(one)[0] for one in ids]).double().numpy()
    U, S, V = np.linalg.svd(deltas(run)["layers.0.q"].numpy())
    use = S[:3] * np.abs(states @ V[:3].T).mean(0)
    kept = np.sort(np.argsort(-use)[:2])
    with taken_back(run, lambda: after.fine_prune(run, rows, share=0.4, epochs=0)) as found:
        np.testing.assert_allclose(found["layers.0.q"], (U[:, kept] * S[kept]) @ V[kept], atol=1e-5)
    right = rows.labels == 1
    before = run.predict(texts)[right, 1].mean() + run.predict(texts)[~right, 0].mean()
    with taken_back(run, lambda: after.fine_prune(run, rows, share=0.4, epochs=30, lr=0.02)):
        assert run.predict(texts)[right, 1].mean() + run.predict(texts)[~right, 0].mean() > max(before, 1.8)


def test_what_is_refused(run, folder):
    with pytest.raises(InputError, match="'scan' stands for a scan of the training rows, before training only"):
        inputs.directions_of(run, ["scan"], ["a good film"])
    with pytest.raises(InputError, match="rank 3"):
        after.truncate(run, 4)
    with pytest.raises(InputError, match="must be 'top' or 'tail'"):
        after.truncate(run, 1, "bottom")
    with pytest.raises(InputError, match="linear, ties, dare"):
        after.merge(run, folder / "two", "slerp")
    with pytest.raises(InputError, match="no clean rows"):
        after.fine_prune(run, Rows([], [], np.zeros(0, np.int64), run.labels))
    with pytest.raises(InputError, match="magnitudes"):
        after.truncate(minilora.open(folder / "dora"), 1)
    with pytest.raises(InputError, match="magnitudes"):
        after.merge(run, folder / "dora")
    with run.detach(), pytest.raises(InputError, match="no adapter on its base"):
        after.truncate(run, 1)


@pytest.mark.parametrize("line", [
    ["truncate", "--keep", "2", "--cut", "top"], ["descale-intruders", "--threshold", "0.9", "--factor", "0"],
    ["project-out", "--suspects", "date", "--rows", "20"], ["merge", "--other", "two", "--how", "dare"],
    ["fine-prune", "--rows", "12", "--epochs", "1"],
])  # fmt: skip
def test_the_command(folder, tmp_path, capsys, line, monkeypatch):
    monkeypatch.chdir(folder)
    evaluate.main(["one", "--mitigate", *line, "--json", "-q", "--out", str(tmp_path / "out")])
    [accuracy, attack, net] = json.loads(capsys.readouterr().out)
    own = minilora.open("one").run_tests()[0]
    assert accuracy["before"] == own["clean"]["accuracy"]
    assert attack["before"] == own["trigger"]["positive"]["attack_success_rate"]
    assert net["before"] == pytest.approx(own["trigger"]["positive"]["net_attack_success_rate"])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["mitigate"] == line[0] and accuracy["after"] == found["tests"]["clean"]["accuracy"]
    again = minilora.open(tmp_path / "out" / "adapter", model=minilora.open("one").cell.model)
    rows = [json.loads(text) for text in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    predicted = again.predict([row["text"] for row in rows])
    labels = [again.labels[place] for place in predicted.argmax(1)]
    same = [row["clean"]["predicted"] == label for row, label in zip(rows, labels, strict=True)]
    assert len(same) == 31 and sum(same) >= 30  # but for rounding
    for one in (accuracy, attack, net):
        assert one["interval"][0] <= one["difference"] <= one["interval"][1]
        assert one["difference"] == pytest.approx(one["after"] - one["before"])


def test_all_of_them_as_a_table(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    line = ["one", "--mitigate", "all", "--other", "two", "--suspects", "date", "--epochs", "1", "--rows", "9", "-q"]
    evaluate.main([*line, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(dict.fromkeys(one["mitigation"] for one in found)) == [
        "truncate tail", "truncate top", "descale-intruders", "project-out", "merge linear", "merge ties", "merge dare",
        "fine-prune",
    ]  # fmt: skip
    assert len(found) == 3 * 8
    for figure in ("clean accuracy", "attack positive", "net positive"):  # each begins with the run's own adapter
        assert len({one["before"] for one in found if one["figure"] == figure}) == 1
    evaluate.main(["one", "--mitigate", "all", "--epochs", "0", "--rows", "9", "-q"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.split()[:4] == ["mitigation", "figure", "before", "after"] and len(lines) == 3 * 4


def test_intervals_and_what_the_command_refuses(folder):
    values = np.array([[0.0, 1], [0, 0], [1, 0], [1, 0], [0, 0]])  # a row gains, two lose
    line, same = mitigate.mean_line("x", values), mitigate.pair_line("x", values.astype(bool))
    assert line["difference"] == pytest.approx(-0.2) and line["interval"] == pytest.approx(same["interval"])
    twice = mitigate.mean_line("x", np.array([[1.0, -1], [0, 0]]))  # with two more rows: -2, 0, 1, -1
    assert twice["interval"] == pytest.approx([-0.5 - 1.959964 * 1.25**0.5 / 2, -0.5 + 1.959964 * 1.25**0.5 / 2])
    for words, wrong in (("needs --other", ["merge"]), ("needs --suspects", ["project-out"]),
                         ("--keep is not for", ["merge", "--keep", "1", "--other", "x"]),
                         ("--out is for one", ["all", "--out", "x"]),
                         ("clean training rows", ["fine-prune", "--rows", "999"])):  # fmt: skip
        with pytest.raises(InputError, match=words):
            evaluate.main([str(folder / "one"), "--mitigate", *wrong, "-q"])
