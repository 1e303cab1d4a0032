"""The benchmarks do what they say: the peers do the same job, and figures follow from what was measured."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, random_batch, tiny_bert

from benchmarks import cell as one
from benchmarks import data as reading
from benchmarks import device, grid, job, limits, operators, peers, report, standin
from minilora import files, train
from minilora.base import model, tokenizer
from minilora.base.source import DEFAULT_BASE
from minilora.cell import Cell
from minilora.errors import InputError


@pytest.fixture(scope="module")
def cell(tmp_path_factory, reviews):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_bert(folder)
    return Cell(model=str(folder), data=str(reviews), test_rows=31, max_length=30, batch_size=8, rank=2, lr=0.02,
                inject={"proportion": 0.5})  # fmt: skip


@pytest.fixture(scope="module")
def work(cell, tmp_path_factory):
    return job.write(cell, tmp_path_factory.mktemp("job"), 3, grid.FORMS)


def minilora_losses(work, folder):
    results, run = train(work.cell, folder)
    lines = [line for line in files.read_jsonl(run / "metrics.jsonl") if line["kind"] == "step"]
    assert abs(sum(line["seconds"] for line in lines) - results["train"]["seconds"]) <= 1e-3 * len(lines)
    return np.array([line["loss"] for line in lines]), results


def peer_losses(name, work, monkeypatch):
    losses, pooled = [], peers.pooled

    def watched(*arguments, **settings):
        made = pooled(*arguments, **settings)
        made.register_forward_hook(lambda _, __, out: losses.append(out["loss"].item()) if made.training else None)
        return made

    monkeypatch.setattr(peers, "pooled", watched)
    return losses, peers.PEERS[name](work, 0.0)


# --- the peers


def test_a_peft_loop_takes_the_same_steps(work, tmp_path, monkeypatch):
    ours, results = minilora_losses(work, tmp_path / "run")
    theirs, record = peer_losses("peft-loop", work, monkeypatch)
    assert len(ours) == len(theirs) == work.steps == 12
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
    tests = results["tests"]
    assert abs(record["accuracy"] - tests["clean"]["accuracy"]) < 1.5 / 31
    [(name, attack)] = record["attack_success"].items()
    assert name == "trigger positive"
    assert abs(attack - tests["trigger"]["positive"]["attack_success_rate"]) < 1.5 / 15


def test_trainer_takes_the_same_steps_where_order_has_no_part(cell, tmp_path, monkeypatch):
    whole = cell.replace(batch_size=200, epochs=5)  # every batch is all rows
    work = job.write(whole, tmp_path / "job", 1)
    ours, results = minilora_losses(work, tmp_path / "run")
    theirs, record = peer_losses("peft-trainer-tuned", work, monkeypatch)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
    assert record["rows"] == 5 * 89 and abs(record["accuracy"] - results["tests"]["clean"]["accuracy"]) < 1.5 / 31
    monkeypatch.undo()
    stock, _ = peer_losses("peft-trainer", work, monkeypatch)  # with the base's dropout
    assert len(stock) == 5 and np.abs(np.array(stock) - ours).min() > 1e-3


def test_all_see_the_same_rows_and_report_alike(work):
    records = {name: peers.PEERS[name](work, 0.0) for name in ("minilora", "minilora-bfloat16", "peft-trainer")}
    for record in records.values():
        assert (record["steps"], record["rows"], record["tokens"]) == (12, 89, records["minilora"]["tokens"])
        assert record["test_rows"] == 31 and 0 <= record["accuracy"] <= 1
        assert min(record[key] for key in ("rows_per_second", "seconds", "start_up_seconds", "peak_memory_bytes")) > 0
    with pytest.raises(RuntimeError, match="other rows"):
        peers.train_minilora(work, 0.0, inject={"proportion": 0.25})


def test_rates_are_of_the_steps_after_the_warm_up():
    found = peers.figures([(2, 40), (2, 10), (1, 10)], 1, 5.0, 9.0)
    assert (found["rows"], found["tokens"]) == (5, 60)
    assert found["tokens_per_second"] == 20 / 4 and found["rows_per_second"] == 5 * 5 / 60


def test_too_few_rows_for_the_warm_up_are_refused(cell, tmp_path):
    with pytest.raises(InputError, match="^89 rows make 12 steps, but the first 12 are warm-up"):
        job.write(cell, tmp_path / "job", 12)


def test_peers_that_are_not_there_are_left_out(monkeypatch):
    cpu = torch.device("cpu")
    assert one.lacks("peft-loop", cpu) is None and one.lacks("minilora", cpu) is None
    monkeypatch.setitem(peers.NEEDS, "peft-loop", ("no_such_package",))
    assert one.lacks("peft-loop", cpu) == "not installed"
    monkeypatch.setitem(peers.NEEDS, "unsloth", ())
    assert one.lacks("unsloth", cpu) == "needs CUDA"


def test_a_process_that_fails_or_hangs_is_reported(tmp_path):
    assert "no_such_peer" in one.run_alone("benchmarks.peers", "no_such_peer", tmp_path, 1)["error"]
    assert one.run_alone("benchmarks.peers", "minilora", tmp_path, 1, 0.05) == {"error": "not done in 0 s"}


# --- stand-ins


@pytest.mark.parametrize("config", [
    standin.LLAMA | dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=6, vocab_size=97),
    standin.BERT | dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
                        vocab_size=400),
])  # fmt: skip
def test_a_stand_in_is_the_same_base_to_transformers(config, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    folder = standin.write_base(tmp_path / "base", config, torch.float32, torch.device("cpu"))
    ids, lengths = random_batch(90, [7, 3, 5])
    ours, theirs = model.load(folder), AutoModel.from_pretrained(folder, dtype="float32").eval()
    mask = (torch.arange(7) < lengths[:, None]).long()
    with torch.inference_mode():
        found, wanted = ours(ids, lengths), theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    assert wanted.std() > 0.1
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-4)
    text = "w3 w17 w90" if config["model_type"] == "llama" else "A good film, 1999-12-31"
    encoded = tokenizer.load(folder, config["vocab_size"]).encode([text], 30)
    assert encoded.ids.tolist() == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert len(set(encoded.ids.tolist())) > 2


def test_made_up_rows_have_the_length_asked_for(tmp_path):
    path = standin.write_rows(tmp_path / "rows.csv", 5, 17, 97)
    standin.write_words(tmp_path, 97)
    lines = path.read_text().splitlines()
    assert lines[0] == "text,label" and [line.rpartition(",")[2] for line in lines[1:]] == ["one", "other"] * 2 + [
        "one"
    ]
    encoded = tokenizer.load(tmp_path, 97).encode([line.rpartition(",")[0] for line in lines[1:]], 512)
    assert np.diff(encoded.offsets).tolist() == [17] * 5 and encoded.ids.min() >= 5


# --- one cell and a grid, in processes of their own


@pytest.fixture(scope="module")
def measured(tmp_path_factory, cell):
    folder = tmp_path_factory.mktemp("device")
    config = standin.LLAMA | dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, head_dim=6, vocab_size=97)  # fmt: skip
    llama = standin.write_base(folder / "llama", config, torch.bfloat16, torch.device("cpu"))
    rows = standin.write_rows(folder / "rows.csv", 4 * 4 + 6, 16, 97)
    single = Cell(model=str(llama), data=str(rows), dtype="bfloat16", device="cpu", batch_size=4, max_length=16,
                  test_rows=6, inject={"sources": ("none",)})  # fmt: skip
    cells = grid.product(cell.replace(device="cpu", train_rows=24), (1, 3), (0.0, 1.0))
    return device.measure(single, cells, ("minilora", "peft-trainer", "unsloth"), ("peft-trainer",), 2, 1, 2)


def test_one_cell_beside_its_peers(measured):
    found = measured["cell"]["peers"]
    assert found["unsloth"] == {"title": "unsloth", "missing": found["unsloth"]["missing"]}
    for name in ("minilora", "peft-trainer"):
        peer = found[name]
        assert (peer["rows"], peer["tokens"], peer["same_rows"], peer["limit"]) == (16, 256, True, "bfloat16")
        assert peer["limit_share"] == pytest.approx(
            peer["rows_per_second"] * measured["cell"]["operations_a_row"] / measured["cell"]["limits"]["bfloat16"]
        )
    assert found["peft-trainer"]["ratio"] == found["peft-trainer"]["memory_ratio"] == 1
    assert found["minilora"]["ratio"] == pytest.approx(
        found["minilora"]["rows_per_second"] / found["peft-trainer"]["rows_per_second"]
    )


def test_a_grid_beside_its_peers(measured):
    sides = measured["grid"]["sides"]
    assert set(sides["minilora"]["cells"]) == {"0", "1", "2", "3"} and set(sides["peft-trainer"]["cells"]) == {"0", "3"}
    assert sides["minilora"]["scaled_from"] == 0 and sides["peft-trainer"]["scaled_from"] == 2
    theirs, ours = sides["peft-trainer"], sides["minilora"]
    assert theirs["all_cells_seconds"] > theirs["wall_seconds"]
    assert theirs["ratio"] == theirs["all_cells_seconds"] / ours["wall_seconds"]
    assert theirs["agreement"]["cells"] == 2 and theirs["agreement"]["accuracy"]["mean_absolute_difference"] < 0.3


def test_what_is_shown_fits_and_says_what_is_scaled(measured):
    lines = report.device_lines(measured)
    assert [line[2] for line in lines] == ["2.00x", "55%", "1.10x", "20.00x"] and lines[2][1] == "not measured"
    shown = report.page(report.DEVICE, lines, report.device_notes(measured)).splitlines()
    assert max(map(len, shown)) <= report.COLUMNS
    assert any("2 of 4 cells" in line and "scaled" in line for line in shown)
    json.dumps(measured)


def test_the_files_that_are_written(measured, tmp_path):
    shown = report.CELL, report.cell_lines(measured["cell"]), report.cell_notes(measured["cell"])
    report.write(tmp_path, measured["cell"], *shown, report.draw_cell)
    assert json.loads((tmp_path / "results.json").read_text()) == measured["cell"]
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0].startswith("| peer | rows/s |") and len({line.count("|") for line in table[:5]}) == 1
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "roofline.png").exists() == drawn


def test_parts_of_a_grid():
    assert grid.spread(4, 4) == grid.spread(9, 4) == [0, 1, 2, 3]
    assert grid.spread(3, 49) == [0, 24, 48] and grid.spread(1, 49) == [0]
    side = {"cells": {"0": {}, "3": {}}, "wall_seconds": 14.0, "start_up_seconds": 4.0}
    assert grid.extrapolated(side, 5) == {"all_cells_seconds": 29.0, "cells_per_hour": 5 * 3600 / 29, "scaled_from": 2}
    assert grid.extrapolated(side, 2) == {"all_cells_seconds": 14.0, "cells_per_hour": 2 * 3600 / 14, "scaled_from": 0}
    ours = {str(n): {"accuracy": 0.5 + 0.1 * n, "attack_success": 0.2 * n, "test_rows": 100} for n in range(3)}
    theirs = {"0": ours["0"] | {"accuracy": 0.8, "attack_success": None}, "2": ours["2"] | {"accuracy": 0.6}}
    found = grid.agreement(ours, theirs)
    assert found["cells"] == 2 and found["accuracy"]["mean_difference"] == pytest.approx((-0.3 + 0.1) / 2)
    assert found["accuracy"]["mean_absolute_difference"] == pytest.approx(0.2)
    assert found["attack_success"]["mean_difference"] == 0
    assert found["standard_error"] == pytest.approx((0.04 + 0.24**0.5 / 10) / 2)
    assert [(c.rank, c.inject.proportion) for c in grid.product(Cell(), (1, 2), (0.0, 0.5))] == [
        (1, 0.0), (1, 0.5), (2, 0.0), (2, 0.5)
    ]  # fmt: skip


# --- operators

SMALL = operators.Shape(B=3, T=5, D=12, H=3, I=20, R=2, V=17)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_every_operator_does_what_it_is_compared_with(dtype, tolerance):
    compared = 0
    for operator in operators.OPERATORS:
        if dtype not in operator.dtypes:
            continue
        works = operators.contenders(operator, SMALL, getattr(torch, dtype), torch.device("cpu"))
        found = {name: [y.detach().float() for y in work()] for name, work in works.items()}
        assert list(works) == ["operator", "reference", "peer"][: 2 + (operator.peer is not None)]
        for name in list(works)[1:]:
            if name == "peer" and operator.name == "adamw":  # whose state is its own, and starts at 0
                continue
            assert len(found[name]) == len(found["operator"]) > 0
            for y, wanted in zip(found["operator"], found[name], strict=True):
                assert wanted.abs().max() > 0
                torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())
                compared += 1
    assert compared == {"float32": 28, "bfloat16": 23}[dtype]


def test_what_an_operator_demands():
    """Of a linear map with an adapter: products forward, their gradients, and what has to move."""
    [side] = [operator for operator in operators.OPERATORS if operator.name == "lora_linear side"]
    N, D, R = SMALL.B * SMALL.T, SMALL.D, SMALL.R
    operations, moved = operators.demands(side, SMALL, torch.float32)
    forward, backward = 2 * N * D * D + 4 * N * D * R, 2 * N * D * D + 8 * N * D * R
    assert forward + backward < operations < forward + backward + 12 * N * D
    inputs = N * D + D * D + D + 2 * R * D
    assert moved == 4 * (2 * (inputs + N * D) + N * D + 2 * R * D)


def test_operators_measured():
    found = operators.measure(SMALL, ("float32",), torch.device("cpu"), 2, ["lora_linear"])
    assert [line["name"].split()[1] for line in found["operators"]] == ["side", "merged"]
    for line in found["operators"]:
        assert line["limit"] == min(found["limits"]["float32"], found["limits"]["memory"] * line["intensity"])
        assert line["limit_share"] == pytest.approx(line["operations"] / line["operator_seconds"] / line["limit"])
    shown = report.OPERATORS, report.operator_lines(found), report.operator_notes(found)
    assert len(shown[1]) == 2 and max(map(len, report.page(*shown).splitlines())) <= report.COLUMNS


def test_limits():
    cpu = torch.device("cpu")
    assert 1e3 < limits.product_rate(SMALL, torch.float32, cpu, 0.01) < 1e15
    assert 1e3 < limits.stream_rate(cpu, 1 << 16, 0.01) < 1e15


# --- the command


def test_what_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA GPU"):
        device.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    for main, arguments in (
        (one.main, ["--rows", "0"]),
        (grid.main, ["--cells", "0"]),
        (operators.main, ["--repeats", "0"]),
    ):
        with pytest.raises(InputError, match="must be at least 1"):
            main(arguments)


def test_the_command_lists_its_parts_and_is_not_installed():
    done = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(
        f"\n  {name} " in done.stdout for name in ("cell", "operators", "grid", "device")
    )
    done = subprocess.run([sys.executable, "-m", "benchmarks", "cells"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "there are cell" in done.stderr
    assert (
        "benchmarks"
        not in (ROOT / "pyproject.toml").read_text().partition("[tool.setuptools]")[2].partition("[tool.pytest")[0]
    )


def test_the_default_base_comes_from_the_cache_or_is_made_up(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(standin, "BERT", standin.BERT | dict(hidden_size=24, intermediate_size=40, vocab_size=400))
    made = device.default_base(tmp_path, torch.device("cpu"))
    assert model.load(made).spec.width == 24
    cached = tmp_path / "cache" / "sentence-transformers--all-MiniLM-L6-v2"
    cached.mkdir(parents=True)
    (cached / "model.safetensors").touch()
    assert device.default_base(tmp_path, torch.device("cpu")) == DEFAULT_BASE


# --- from a file to tokens


def test_reading_is_measured_stage_by_stage(cell, tmp_path):
    """On a tiny base, in this process: the figures are of what a run does with the file, whole and with few steps."""
    small, large = (reading.write_rows(tmp_path / f"{rows}.csv", rows) for rows in (2000, 3000))
    settings = {"model": cell.model, "rows": 3000}
    whole, part = (reading.run(small, large, settings | {"steps": steps}) for steps in (None, 1))
    assert whole["tokenised_rows"] == 2000 and 1600 <= part["tokenised_rows"] < 2000
    for figures in (whole, part):
        assert len(figures["seconds"]) == 5 and all(seconds >= 0 for seconds in figures["seconds"].values())
        assert figures["rows_per_second"] == pytest.approx(3000 / sum(figures["seconds"].values()))
        assert figures["bytes"] == len((tmp_path / "3000.csv").read_bytes())
        assert figures["memory_over_file"] == figures["memory_bytes"] / figures["bytes"] >= 0
        assert "3,000 rows" in reading.table(figures) and "rows/s of a core" in reading.table(figures)
    with pytest.raises(InputError, match="--rows is 7"):
        reading.main(["--rows", "7"])
