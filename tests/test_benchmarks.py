"""The benchmarks do what they say: the peers do the same job, and figures follow from what was measured."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_batch, tiny_bert

from benchmarks import alone, device, grid, job, limits, operators, peers, prediction, report, smoke, standin
from benchmarks import cell as one
from benchmarks import data as reading
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
    failed = alone.run("benchmarks.peers", "no_such_peer", tmp_path, 1)
    assert "no_such_peer" in failed["error"] and failed["trace"][-1] == failed["error"]
    assert alone.run("benchmarks.peers", "minilora", tmp_path, 1, 0.05)["error"] == "not done in 0 s"


def test_a_process_ends_with_all_that_it_started(tmp_path, monkeypatch):
    """What hangs, and a process of its own that holds its files open; what it told before is heard."""
    (tmp_path / "hanging.py").write_text(
        "import subprocess, sys, time\nfrom benchmarks import alone\n"
        "alone.begin()\nalone.tell(sys.argv[3], {'cell': 7})\n"
        "child = subprocess.Popen(['sleep', '600'])\nalone.tell(sys.argv[3], {'pid': child.pid})\ntime.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told, clock, began = [], alone.now, alone.now()
    monkeypatch.setattr(alone, "now", lambda: clock() - began + 1000 * (len(told) == 2))  # its time is up at once then
    outcome = alone.run("hanging", "x", tmp_path, 1, 900, told.append)
    assert outcome["error"] == "not done in 900 s" and any("hanging.py" in line for line in outcome["trace"])
    assert told[0] == {"cell": 7}
    gone = Path(f"/proc/{told[1]['pid']}/stat")
    assert not gone.exists() or gone.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("name", ["peft-trainer-bf16", "peft-trainer-tuned-bf16", "peft-loop-bf16"])
def test_the_bfloat16_peers_round_their_products(name, work, monkeypatch):
    plain = name.removesuffix("-bf16")
    losses, record = peer_losses(name, work, monkeypatch)
    monkeypatch.undo()
    wanted, _ = peer_losses(plain, work, monkeypatch)
    apart = np.abs(np.array(losses) - wanted)
    assert len(apart) == 12 and 1e-6 < apart.max() < 0.1 and record["rows"] == 89


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


LONG = 1e6  # seconds that no phase needs


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What a real run on the CPU found, with tiny bases and without what compiles."""
    out, folder = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("device")
    bench = device.Bench(out, folder, "cpu", LONG, tiny=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoke, "PATHS", {name: smoke.PATHS[name] for name in ("float32", "bfloat16", "lm", "evaluation")})
        bench.run(["smoke", "llama", "grid", "profiles", "tests"])
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(bench.results))
    return bench.results | {"out": str(out)}


def test_every_phase_runs_on_a_cpu(measured):
    assert {name: phase["state"] for name, phase in measured["phases"].items()} == dict.fromkeys(
        ("smoke", "llama", "grid", "profiles", "tests"), "done"
    )
    parts, out = measured["parts"], Path(measured["out"])
    assert list(parts["smoke"]) == ["float32", "bfloat16", "lm", "evaluation"]
    assert all(record["loss"] > 0 and record["how"] == "eager" for record in parts["smoke"].values())
    for name in ("small", "llama", "grid"):
        assert parts["profiles"][name]["steps"] >= 3 and parts["profiles"][name]["operations_a_step"] > 50
        assert "aten::" in (out / f"profile-{name}.txt").read_text()
    assert parts["tests"] == {"line": parts["tests"]["line"], "failed": []} and " passed" in parts["tests"]["line"]


def test_one_cell_beside_its_peers(measured):
    llama = measured["parts"]["llama"]
    found = llama["peers"]
    assert found["unsloth"] == {"title": "unsloth", "missing": found["unsloth"]["missing"]}
    for name in ("minilora", "peft-trainer"):
        peer = found[name]
        assert (peer["rows"], peer["tokens"], peer["same_rows"], peer["limit"]) == (24, 384, True, "bfloat16")
        assert peer["limit_share"] == pytest.approx(
            peer["rows_per_second"] * llama["operations_a_row"] / llama["limits"]["bfloat16"]
        )
    assert found["peft-trainer"]["ratio"] == found["peft-trainer"]["memory_ratio"] == 1
    assert found["minilora"]["ratio"] == pytest.approx(
        found["minilora"]["rows_per_second"] / found["peft-trainer"]["rows_per_second"]
    )


def test_a_grid_beside_its_peers(measured):
    sides = measured["parts"]["grid"]["sides"]
    assert set(sides["minilora"]["cells"]) == {"0", "1", "2", "3"} and set(sides["peft-trainer"]["cells"]) == {"0", "3"}
    assert sides["minilora"]["scaled_from"] == 0 and sides["peft-trainer"]["scaled_from"] == 2
    theirs, ours = sides["peft-trainer"], sides["minilora"]
    assert theirs["all_cells_seconds"] > theirs["wall_seconds"]
    assert theirs["ratio"] == theirs["all_cells_seconds"] / ours["wall_seconds"]
    work = 2 * (theirs["wall_seconds"] - theirs["start_up_seconds"])
    assert theirs["ratio_without_start_up"] == work / (ours["wall_seconds"] - ours["start_up_seconds"])
    assert theirs["agreement"]["cells"] == 2 and theirs["agreement"]["accuracy"]["mean_absolute_difference"] < 0.3


def test_what_is_shown_fits_and_says_what_is_scaled(measured):
    lines = report.device_lines(measured)
    assert [line[2] for line in lines] == ["2.00x", "1.50x", "60%", "1.10x", "20.00x"]
    assert [line[1] == "not measured" for line in lines] == [True, False, False, True, False]
    shown = report.page(report.DEVICE, lines, report.device_notes(measured)).splitlines()
    assert max(map(len, shown)) <= report.COLUMNS == 80
    assert any("2 of 4 cells" in line and "scaled" in line for line in shown)


def test_a_full_table_fits():
    """Every peer, with the longest figures that a GPU may bring."""
    record = {"rows_per_second": 98765.4, "tokens_per_second": 2.5e6, "peak_memory_bytes": 70 * 2**30, "accuracy": 0.8,
              "start_up_seconds": 123.4, "test_rows": 100, "rows": 9043, "tokens": 249001}  # fmt: skip
    records = {name: {0: record, 1: record} for name in peers.PEERS}
    limits = {"float32": 5e13, "bfloat16": 8e14}
    found = {name: {"title": peers.TITLES.get(name, name)} | one.summary(name, records, 1e9, limits, "bfloat16")
             for name in peers.PEERS}  # fmt: skip
    one.add_agreement(found)
    lines = report.cell_lines({"peers": found})
    assert len(lines) == len(peers.PEERS) >= 14
    for headings, table in ((report.CELL, lines), (report.REST, report.rest_lines({"peers": found}))):
        assert max(map(len, report.text(headings, table).splitlines())) <= 80


def test_the_files_that_are_written(measured, tmp_path):
    llama = measured["parts"]["llama"]
    shown = report.CELL, report.cell_lines(llama), report.cell_notes(llama)
    report.write(tmp_path, llama, *shown, report.draw_cell)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(llama))
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0].startswith("| peer | rows/s |") and len({line.count("|") for line in table[:5]}) == 1
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "roofline.png").exists() == drawn


# --- a device whose processes hang, die and are interrupted, on a clock that a test moves


class Fake:
    """In place of `alone.run`: each process takes `seconds`, or what its name or module has in `odd`.

    A number is other seconds, an exception is raised, and a text is the error with which the process dies.
    """

    def __init__(self, seconds=1.0, odd=()):
        self.time, self.seconds, self.odd, self.begun = 1000.0, seconds, dict(odd), []

    def now(self):
        return self.time

    def run(self, module, name, folder, threads, limit=None, told=None):
        self.begun.append(f"{module.removeprefix('benchmarks.')} {name}")
        assert limit is None or limit > 0
        odd = self.odd.get(self.begun[-1], self.odd.get(f"{self.begun[-1]} {self.begun.count(self.begun[-1])}"))
        seconds = odd if isinstance(odd, float) else self.seconds
        if seconds > (limit or seconds):
            self.time += limit
            return {"error": f"not done in {limit:.0f} s", "trace": ["hung"]}
        self.time += seconds
        if isinstance(odd, BaseException):
            raise odd
        if isinstance(odd, str):
            return {"error": odd, "trace": [odd]}
        return getattr(self, module.rpartition(".")[2])(name, Path(folder), told)

    def standin(self, name, folder, told):
        config, dtype = (smoke.LLAMA, "bfloat16") if "llama" in name else (smoke.BERT, "float32")
        standin.write_base(folder / name, config, getattr(torch, dtype), torch.device("cpu"))
        return {}

    def smoke(self, names, folder, told):
        for name in names.split(","):
            odd = self.odd.get(name)
            told({"path": name, "failed": odd, "trace": []} if odd else
                 {"path": name, "seconds": 1.0, "steps": 6, "loss": 0.7, "how": "eager"})  # fmt: skip
            if odd:
                break
        return {}

    def limits(self, name, folder, told):
        return {"float32": 1e11, "bfloat16": 2e11, "memory": 1e10}

    def peers(self, name, folder, told):
        rate = 200.0 if name.startswith("minilora") else 100.0
        return {"rows_per_second": rate, "tokens_per_second": 9 * rate, "peak_memory_bytes": 2**30, "rows": 24,
                "tokens": 99, "start_up_seconds": 2.0, "accuracy": 0.5, "test_rows": 20, "threads": 2}  # fmt: skip

    def grid(self, name, folder, told):
        side = {"wall_seconds": 12.0, "start_up_seconds": 2.0}
        cells = {str(n): {"accuracy": 0.5, "attack_success": None, "test_rows": 20} for n in range(4)}
        told({"cells": {"0": cells["0"]}} | side)
        if odd := self.odd.get(f"after a cell {name}"):
            return {"error": odd, "trace": []}
        return side | {"cells": cells, "peak_memory_bytes": 2**30}

    def profiles(self, name, folder, told):
        (folder / "profile.txt").write_text("aten::mm")
        return {"line": f"profile {name}: 300 kernels a step"}

    def wait(self, command, environment, written, limit=None, out=None):
        self.time += min(self.seconds, limit)
        written.write(b"FAILED tests/x.py::test_y[cuda] - AssertionError\n1 failed, 2 passed in 3 s\n")
        return 1


@pytest.fixture
def play(tmp_path, monkeypatch, capsys):
    """A function: the results of a run with a budget on such a clock, as they lie in results.json, and the table."""

    def run(fake, budget, phases=tuple(device.SHARES), **more):
        out, folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}", tmp_path / f"in{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name in ("run", "wait", "now"):
            monkeypatch.setattr(alone, name, getattr(fake, name))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        out.mkdir()
        bench = device.Bench(out, folder, "cpu", budget, tiny=True, **more)
        capsys.readouterr()
        try:
            bench.run(phases)
        except KeyboardInterrupt:
            bench.results["phases"]["interrupted"] = None  # noted here only, not in the file
        return json.loads((out / "results.json").read_text()), capsys.readouterr().out

    return run


def states(results):
    return {name: phase["state"] for name, phase in results["phases"].items()}


def test_a_run_within_its_budget(play):
    found, table = play(Fake(), 500)
    assert states(found) == dict.fromkeys(device.SHARES, "done"), found["phases"]
    used = found["parts"]["llama"]["peers"]["minilora"]["limit_share"]
    assert found["figures"] == {
        "small": 2.0, "llama": 2.0, "grid": 1.0, "over_unsloth": None, "model_flop_use": used
    }  # fmt: skip
    assert found["parts"]["tests"] == {"line": "1 failed, 2 passed in 3 s", "failed": ["tests/x.py::test_y[cuda]"]}
    assert list(found["parts"]) == ["smoke", "small", "llama", "grid", "profiles", "tests", "small compiled",
                                    "llama compiled"]  # fmt: skip
    assert "2.00x" in table and "profile llama: 300 kernels a step" in table
    assert max(map(len, table.splitlines())) <= 80


def test_only_the_named_peers_are_measured(play, tmp_path):
    fake = Fake()
    found, _ = play(fake, 500, ("small", "llama", "compiled"), chosen=("minilora", "minilora-compiled"))
    peers_run = [one for one in fake.begun if one.startswith("peers ")]
    assert peers_run == ["peers minilora"] * 2 + ["peers minilora-compiled"] * 2
    assert list(found["parts"]) == ["small", "llama", "small compiled", "llama compiled"]
    found, _ = play(Fake(), 500, ("small", "llama"), chosen=("unsloth",))  # of which the phase small has none
    assert states(found) == {"small": "done", "llama": "done"} and list(found["parts"]) == ["llama"]
    with pytest.raises(InputError, match="--peers unsloth is in none of the phases small, grid: name another phase"):
        device.main(["--phases", "small", "grid", "--peers", "unsloth", "--device", "cpu", "--out", str(tmp_path)])


def test_a_phase_may_use_what_those_before_it_left():
    assert device.plan(device.SHARES, 500) == pytest.approx(
        {"smoke": 70, "small": 170, "llama": 260, "grid": 360, "profiles": 400, "tests": 440, "compiled": 500}
    )
    assert device.plan(["grid"], 300) == {"grid": 300}
    assert sum(device.SHARES.values()) == pytest.approx(1)


def test_a_budget_that_ends_anywhere_keeps_what_was_measured(play):
    """Processes of ever more seconds: the run is cut in every phase, at its start and in the middle, and never late."""
    seen, measured = set(), []
    for seconds in (5.0, 9.0, 14.0, 20.0, 27.0, 40.0, 70.0, 120.0, 600.0):
        found, table = play(Fake(seconds), 500)
        assert found["seconds"] <= 500 and "peft + Trainer" in table
        seen |= set(states(found).items())
        sides = [part["peers"].values() for part in found["parts"].values() if "peers" in part]
        measured.append(sum("accuracy" in peer for side in sides for peer in side))
        for name, record in found["parts"].get("smoke", {}).items():
            assert "failed" in record or record["loss"] == 0.7, name
    assert measured[0] == 8 and measured == sorted(measured, reverse=True) and measured[-1] == 0
    assert {state for _, state in seen} == {"done", "cut", "failed"}


def test_a_phase_that_begins_too_late_is_left_out(play):
    found, _ = play(Fake(), 6)
    assert {"left out"} <= set(states(found).values()) and found["seconds"] <= 6
    assert all(phase["why"] for phase in found["phases"].values() if phase["state"] == "left out")


def test_a_peer_that_hangs_or_dies_takes_only_itself(play):
    found, table = play(Fake(odd={"peers peft-trainer": 1e9, "peers minilora-compiled": "ended by SIGSEGV"}), 500)
    small = found["parts"]["small"]["peers"]
    assert small["peft-trainer"]["failed"].startswith("not done in ") and small["minilora"]["rows_per_second"] == 200
    assert found["parts"]["small compiled"]["peers"]["minilora-compiled"]["failed"] == "ended by SIGSEGV"
    assert set(states(found).values()) == {"done"} and found["seconds"] < 500
    assert "ended by SIGSEGV" in table


def test_a_peer_that_fails_later_keeps_its_figures(cell, monkeypatch):
    fake, kept = Fake(odd={"peers peft-trainer 2": "CUDA error", "limits limits 2": "CUDA error"}), []
    monkeypatch.setattr(alone, "run", fake.run)
    results = one.measure(cell.replace(device="cpu"), ["minilora", "peft-trainer"], 3, 3, 2,
                          keep=lambda found: kept.append(json.loads(json.dumps(found))))  # fmt: skip
    assert fake.begun == ["limits limits", "peers minilora", "peers peft-trainer"] * 2 + ["peers minilora"]
    peer, ours = results["peers"]["peft-trainer"], results["peers"]["minilora"]
    assert peer["rows_per_second"] == 100 and (peer["failed"], peer["failed_repeat"]) == ("CUDA error", 2)
    assert len(ours["repeats"]) == 3 and len(peer["repeats"]) == 1 and ours["ratio"] == 2.0
    assert len(kept) == 7 and kept[1]["peers"]["peft-trainer"]["missing"] == "not run yet"
    assert any("failed in repeat 2" in note for note in report.cell_notes(results))


def test_limits_that_cannot_be_measured_take_no_peer_with_them(cell, monkeypatch):
    monkeypatch.setattr(alone, "run", Fake(odd={"limits limits": "CUDA error"}).run)
    results = one.measure(cell.replace(device="cpu"), ["minilora"], 1, 3, 2)
    assert results["peers"]["minilora"]["limit_share"] is None and results["limits_failed"] == "CUDA error"
    assert any("not measured: CUDA error" in note for note in report.cell_notes(results))
    assert report.cell_lines(results)[0][-1] == "-"
    report.draw_cell(results)


def test_ratios_are_over_the_fastest_peer_of_the_same_repeat():
    def record(rate):
        return {"rows_per_second": rate, "tokens_per_second": rate, "peak_memory_bytes": 1, "start_up_seconds": 1.0,
                "accuracy": 0.5, "test_rows": 9, "rows": 1, "tokens": 1}  # fmt: skip

    rates = {"minilora": (60, 80), "peft-trainer": (20, 10), "peft-loop": (10, 40), "peft-loop-bf16": (40,),
             "peft-trainer-tuned-bf16": (30, 160)}  # fmt: skip
    records = {name: {n: record(rate) for n, rate in enumerate(each)} for name, each in rates.items()}
    found = one.summary("minilora", records, 1.0, {"float32": 1e3}, "float32")
    assert (found["ratio"], found["ratio_to_loop"]) == ((3 + 8) / 2, (6 + 2) / 2)
    assert found["ratio_to_best"] == (3 + 2) / 2 and found["ratio_to_best_bfloat16"] == (1.5 + 0.5) / 2
    assert found["ratio_to_tuned"] is None


def test_a_path_of_the_smoke_phase_that_fails_takes_only_itself(play):
    every = ",".join(smoke.PATHS)
    found, table = play(Fake(odd={"population": "RuntimeError: illegal access"}), 500, ["smoke"])
    assert found["parts"]["smoke"]["population"]["failed"] == "RuntimeError: illegal access"
    assert sum("failed" in record for record in found["parts"]["smoke"].values()) == 1
    assert list(found["parts"]["smoke"]) == list(smoke.PATHS) and "illegal access" in table
    found, _ = play(Fake(odd={f"smoke {every}": "ended by SIGSEGV"}), 500, ["smoke"])  # without a word
    assert found["parts"]["smoke"]["float32"]["failed"] == "ended by SIGSEGV"
    assert [name for name, record in found["parts"]["smoke"].items() if "failed" in record] == ["float32"]


def test_a_side_of_a_grid_that_dies_keeps_its_cells(play):
    found, table = play(Fake(odd={"after a cell peft-trainer": "CUDA error"}), 500, ["grid"])
    theirs = found["parts"]["grid"]["sides"]["peft-trainer"]
    assert list(theirs["cells"]) == ["0"] and theirs["failed"] == "CUDA error"
    assert theirs["ratio"] == (2 + 4 * 10) / 12 and theirs["ratio_without_start_up"] == 4
    assert "failed after 1 cells" in table


@pytest.mark.parametrize("process, kept", [
    ("standin tiny-bert", ["smoke"]),
    ("peers peft-trainer", ["smoke", "small"]),
    ("grid peft-trainer", ["smoke", "small", "llama", "grid"]),
    ("profiles llama", ["smoke", "small", "llama", "grid", "profiles"]),
])  # fmt: skip
def test_what_was_measured_before_ctrl_c_is_kept(process, kept, play):
    found, table = play(Fake(odd={process: KeyboardInterrupt()}), 500)
    assert list(found["parts"]) == kept and "interrupted" in states(found).values()
    assert "peft + Trainer" in table and "interrupted" in table


def test_a_phase_that_fails_is_recorded_with_its_trace(play):
    found, table = play(Fake(odd={"standin tiny-llama": "ended by SIGBUS"}), 500)
    failed = dict.fromkeys(("llama", "profiles", "compiled"), "failed")
    assert states(found) == dict.fromkeys(device.SHARES, "done") | failed
    assert "ended by SIGBUS" in found["phases"]["llama"]["why"] and found["phases"]["llama"]["trace"]
    assert "small compiled" in found["parts"] and "ended by SIGBUS" in table


# --- parts of a grid


def test_parts_of_a_grid():
    assert grid.spread(4, 4) == grid.spread(9, 4) == [0, 1, 2, 3]
    assert grid.spread(3, 49) == [0, 24, 48] and grid.spread(1, 49) == [0]
    side = {"cells": {"0": {}, "3": {}}, "wall_seconds": 14.0, "start_up_seconds": 4.0}
    for count, work, scaled in ((5, 25.0, 2), (2, 10.0, 0)):
        assert grid.extrapolated(side, count) == {
            "all_cells_seconds": 4 + work, "work_seconds": work, "cells_per_hour": count * 3600 / (4 + work),
            "scaled_from": scaled,
        }  # fmt: skip
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
    monkeypatch.setattr(standin, "BERT", smoke.BERT)
    write = standin.main
    monkeypatch.setattr(alone, "run", lambda module, name, folder, *_: write([name, folder, tmp_path / "r", "0"]) or {})
    bench = device.Bench(tmp_path, tmp_path / "work", "cpu", 500)
    assert model.load(bench.base("bert", LONG)).spec.width == 64 and bench.base("bert", LONG).endswith("work/bert")
    cached = tmp_path / "cache" / "sentence-transformers--all-MiniLM-L6-v2"
    cached.mkdir(parents=True)
    (cached / "model.safetensors").touch()
    assert bench.base("bert", LONG) == DEFAULT_BASE


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


def test_prediction_of_both_sides_is_the_same(cell):
    found = prediction.measure(cell, 1)
    names = list(found["sides"])
    assert names[0] == "minilora" and names[1].startswith("peft merged, ") and found["difference"] < 1e-4
    for side in found["sides"].values():
        share = side["rows_per_second"] / found["limit_rows_per_second"]
        assert side["limit_share"] == pytest.approx(share) and share > 0
