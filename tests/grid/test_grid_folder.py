"""The folder of a grid: whole grids of a tiny base, killed, shared by processes, failing, and found again."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT
from mortal import Mortal, saving_often

import minilora
from minilora import files
from minilora.errors import InputError
from minilora.files import is_full
from minilora.grid import run
from minilora.grid.file import read_grid
from minilora.grid.folder import STATES, GridFolder
from minilora.grid.run import train_grid
from minilora.scripts import train


@pytest.fixture
def text(base, reviews):
    """A grid's file: 6 cells of about 15 steps."""
    return f"""
title = "a tiny grid"
source = "none"
[cell]
model = "{base}"
data = "{reviews}"
test_rows = 31
max_length = 30
batch_size = 6
lr = 0.02
dropout = 0.1
[grid]
rank = [2, 3]
"inject.proportion" = [0.0, 0.5]
[[include]]
rank = 1
seed = [0, 1]
"""


def write(folder, text, name="grid.toml"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def script(*arguments, **settings):
    command = [sys.executable, ROOT / "train.py", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def main(capsys, *arguments):
    """(stdout, stderr) of train.py in this process."""
    capsys.readouterr()
    train.main(list(map(str, arguments)))
    return capsys.readouterr()


def outcome(process):
    out, err = process.communicate()
    return process.returncode, out, err


def results_of(folder):
    """Everything that the cells of a grid's folder came to, but what a clock says."""
    found = {}
    for path in sorted((folder / "cells").iterdir()):
        for name in ("cell.toml", "adapter/adapter_model.safetensors", "predictions.jsonl", "injected.jsonl"):
            found[path.name, name] = (path / name).read_bytes()
        found[path.name, "tests"] = json.loads((path / "results.json").read_text())["tests"]
    return found


def test_a_whole_grid(text, tmp_path, capsys):
    out = tmp_path / "out"
    code, shown, err = outcome(script("--grid", write(tmp_path, text), "--out", out))
    assert code == 0, err
    assert f"{out}: 6 cells, 6 finished" in " ".join(shown.split()) and err.count("left\n") == 6 and "[6/6]" in err
    names = sorted(path.name for path in (out / "cells").iterdir())
    assert len(names) == 6 and (out / "grid.toml").read_text() == text
    table = (out / "table.csv").read_text().splitlines()
    assert len(table) == 7 and table[0].startswith("cell,id,state,rank,inject.proportion,seed,label,")
    for line, entry in zip(table[1:], read_grid(tmp_path / "grid.toml").entries, strict=True):
        name, id, state, rank, proportion, seed, label, *_ = line.split(",")
        assert (name, id, state, label) == (entry.name, entry.cell.id, "finished", "positive")
        assert (int(rank), float(proportion), int(seed)) == (
            entry.cell.rank,
            entry.cell.inject.proportion,
            entry.cell.seed,
        )
        results = json.loads((out / "cells" / name / "results.json").read_text())
        assert repr(results["tests"]["trigger"]["positive"]["attack_success_rate"]) in line.split(",")
    # Cells come out as when they are trained alone.
    entry = read_grid(tmp_path / "grid.toml").entries[3]
    minilora.train(entry.cell, tmp_path / "alone")
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (tmp_path / "alone" / name).read_bytes() == (out / "cells" / entry.name / name).read_bytes()
    # Once more changes nothing, and says so.
    before = results_of(out) | {"table": (out / "table.csv").stat().st_mtime_ns}
    shown, err = main(capsys, "--grid", out)
    assert "6 finished" in " ".join(shown.split()) and "[" not in err
    assert before == results_of(out) | {"table": before["table"]}


def test_killed_at_random_moments(text, tmp_path):
    path, draw = write(tmp_path, text), random.Random(3)
    number, kills, states = 1, 0, set()
    with Mortal(tmp_path / "log") as mortal:

        def go_on(name, last=0):
            out = tmp_path / name
            status, moments = mortal.run(["--grid", path, "--out", out], out, last)
            assert status in ((0, -signal.SIGKILL) if last else (0,)), mortal.log.read_text()
            if (out / "grid.json").exists():
                states.update(state for state, count in GridFolder.find(out).counts().items() if count)
            return status, moments

        moments = go_on("whole")[1]
        assert moments > 6 * 15
        for last in range(1, 25):  # one is killed at each of its first moments
            assert go_on("killed-0", last)[0] != 0
        while kills < 12:
            if go_on(f"killed-{number}", draw.randint(1, moments * 6 // 10))[0]:
                kills += 1
            else:  # it got to the end: kill another grid
                number += 1
        assert states == {"finished", "interrupted", "waiting"} and number >= 3
        whole = results_of(tmp_path / "whole")
        for folder in sorted(tmp_path.glob("killed-*")):
            go_on(folder.name)
            assert (folder / "table.csv").read_bytes() == (tmp_path / "whole" / "table.csv").read_bytes()
            assert results_of(folder) == whole


def test_a_killed_population_ends_as_it_would_have(text, tmp_path, monkeypatch):
    """Populations of three, stopped between the saves of two members, and again after one of them was finished."""
    made = read_grid(write(tmp_path, text))
    train_grid(made, tmp_path / "whole", size=3)
    settled = json.loads((tmp_path / "whole" / "populations.json").read_text())["populations"]
    assert settled == [[entry.name for entry in made.entries[i : i + 3]] for i in (0, 3)]

    from minilora.training import train as training
    from minilora.training.member import Member

    monkeypatch.setattr(training, "train_population", saving_often(training.train_population))
    for method, number in (("save_state", 5), ("finish", 2)):
        real, calls = getattr(Member, method), []

        def stop(self, *arguments, real=real, calls=calls, number=number):
            calls.append(self)
            if len(calls) == number:
                raise KeyboardInterrupt
            return real(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Member, method, stop)
            with pytest.raises(KeyboardInterrupt):
                train_grid(made, tmp_path / "killed", size=3)
        assert len(calls) == number
    train_grid(made, tmp_path / "killed", size=2)  # the size was settled when it began
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "whole")
    assert (tmp_path / "killed" / "table.csv").read_bytes() == (tmp_path / "whole" / "table.csv").read_bytes()


def test_two_processes_share_the_work(text, tmp_path):
    path, out = write(tmp_path, text), tmp_path / "out"
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(outcome, [script("--grid", path, "--out", out) for _ in range(2)])
    assert first[0] == second[0] == 0, first[2] + second[2]
    done = [re.findall(r"\] (\S+): clean", err) for _, _, err in (first, second)]
    assert sorted(done[0] + done[1]) == sorted(entry.name for entry in read_grid(path).entries)  # none twice
    assert (out / "table.csv").exists()


def test_a_cell_that_fails_is_recorded_and_the_rest_go_on(text, tmp_path, capsys):
    made = read_grid(write(tmp_path, text + "[[include]]\nlr = 1e30\nclip = 0.0\n[[include]]\nmax_length = 900\n"))
    folder = train_grid(made, tmp_path / "out", size=3)
    assert folder.counts() == {"finished": 6, "failed": 2, "running": 0, "interrupted": 0, "waiting": 0}
    trace = json.loads((folder.run_path(made.entries[7]) / "error.json").read_text())["traceback"]
    assert trace[0].startswith("Traceback") and "37 positions" in trace[-1] and len(trace) > 6
    errors_found = [folder.read(entry)[1] for entry in made.entries]
    assert errors_found[:6] == [None] * 6 and "the loss is" in errors_found[6] and "37 positions" in errors_found[7]
    table = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert [line.split(",")[2] for line in table[1:]] == ["finished"] * 6 + ["failed"] * 2

    def written():
        paths = [
            folder.run_path(entry) / ("results.json" if k < 6 else "error.json") for k, entry in enumerate(made.entries)
        ]
        return [path.stat().st_mtime_ns for path in paths]

    before = written()
    shown, _ = main(capsys, "--grid", tmp_path / "out", "--status")
    shown = " ".join(shown.split())
    assert "8 cells, 6 finished, 2 failed" in shown and "--retry-failed" in shown and "37 positions" in shown
    train_grid(made, tmp_path / "out")  # failed ones are left alone
    assert folder.counts()["failed"] == 2
    assert written() == before
    train_grid(made, tmp_path / "out", retry_failed=True)
    assert folder.counts()["failed"] == 2
    assert written()[:6] == before[:6] and all(new > old for new, old in zip(written()[6:], before[6:], strict=True))


def test_a_population_that_fails_as_a_whole_is_trained_one_by_one(text, tmp_path, monkeypatch):
    real, sizes = run.train_all, []

    def short_of_memory(members, *arguments, **settings):
        sizes.append(len(members))
        if len(members) > 1:
            raise RuntimeError("out of memory")
        return real(members, *arguments, **settings)

    monkeypatch.setattr(run, "train_all", short_of_memory)
    folder = train_grid(read_grid(write(tmp_path, text)), tmp_path / "out", size=3)
    assert sizes == [3, 1, 1, 1, 3, 1, 1, 1] and folder.counts()["finished"] == 6


def test_a_full_disk_stops_all_and_loses_nothing(text, tmp_path, monkeypatch):
    made, real, calls = read_grid(write(tmp_path, text)), files.write_json, []

    def full(path, value):
        if path.name == "results.json":
            calls.append(path)
            if len(calls) == 3:
                raise OSError(28, "No space left on device", str(path))
        real(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", full)
        with pytest.raises(OSError, match="no space is left in "):
            train_grid(made, tmp_path / "out")
    assert GridFolder(tmp_path / "out", made).counts() == dict(zip(STATES, (2, 0, 0, 1, 3), strict=True))
    train_grid(made, tmp_path / "whole")
    train_grid(made, tmp_path / "out")
    assert results_of(tmp_path / "out") == results_of(tmp_path / "whole")


def test_causes_of_a_full_disk():
    inner = OSError(28, "No space left on device")
    outer = RuntimeError("while saving")
    outer.__cause__ = inner
    assert is_full(inner) and is_full(outer) and not is_full(OSError(2, "none")) and not is_full(ValueError())


def test_only_some(text, tmp_path):
    made = read_grid(write(tmp_path, text))
    folder = train_grid(made, tmp_path / "out", only={"rank": [3], "inject.proportion": [0.5]})
    assert [folder.state(entry) for entry in made.entries] == ["waiting"] * 3 + ["finished"] + ["waiting"] * 2
    assert not (tmp_path / "out" / "table.csv").exists()


def test_a_dry_run_and_the_status_write_nothing(text, tmp_path, capsys):
    path, out = write(tmp_path, text), tmp_path / "out"
    shown, _ = main(capsys, "--grid", path, "--out", out, "--dry-run", "--population", 4)
    made = read_grid(path)
    lines = [line.split() for line in shown.splitlines()[1:7]]
    assert [line[0] for line in lines] == [entry.name for entry in made.entries]
    assert [line[1] for line in lines] == ["1", "1", "1", "1", "2", "2"]
    counts = [3 * 3 * rank * (24 + 24) + 2 * 24 + 2 for rank in (2, 2, 3, 3, 1, 1)]
    assert [int(line[2].replace(",", "")) for line in lines] == counts
    assert "6 cells in 2 populations, 6 of them left" in shown and all(len(line) <= 100 for line in shown.splitlines())
    shown, _ = main(capsys, "--grid", path, "--out", out, "--status")
    assert "6 cells, 6 waiting" in " ".join(shown.split()) and not out.exists()


def advice(shown):
    """The last line's command, as words for train.main or evaluate.main."""
    _, _, line = shown.splitlines()[-1].partition(": ")
    python, name, *arguments = shlex.split(line)
    assert python == "python" and name in ("train.py", "evaluate.py")
    return name, arguments


def flat(shown):
    """Without its line breaks, which are where the length of the folder's path has them."""
    return " ".join(shown.split())


def test_the_status_tells_running_from_interrupted_and_its_advice_works(text, tmp_path, capsys):
    path, out = write(tmp_path, text), tmp_path / "my grid"
    shown, _ = main(capsys, "--grid", path, "--out", out, "--status")
    assert advice(shown) == ("train.py", ["--grid", str(path), "--out", str(out)]) and "\nbegin: " in shown
    train.main([*advice(shown)[1], "--only", "rank=3"])
    shown, _ = main(capsys, "--grid", out, "--status")
    assert "6 cells, 2 finished, 4 waiting go on: " in flat(shown) and advice(shown)[1] == ["--grid", str(out)]

    folder = GridFolder.find(out)
    first, second, *_ = (entry for entry in folder.grid.entries if folder.state(entry) == "waiting")
    (out / "cells" / first.name).mkdir()
    (out / "cells" / first.name / "cell.toml").write_text(first.cell.to_toml())
    claim = (
        "import sys\nfrom minilora.grid.folder import GridFolder\nfolder = GridFolder.find(sys.argv[1])\n"
        "[chunk] = [chunk for chunk in folder.planned() if chunk[0].name == sys.argv[2]]\n"
        "with folder.claim(chunk) as held:\n    print(held, flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", claim, out, first.name], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, cwd=ROOT)  # fmt: skip
    try:
        assert other.stdout.readline() == "True\n"
        assert folder.counts() == dict(zip(STATES, (2, 0, 1, 0, 3), strict=True))
        shown, _ = main(capsys, "--grid", out, "--status", "--json")
        lines = {line["run"]: line for line in map(json.loads, shown.splitlines())}
        assert len(lines) == 6 and lines[str(out / "cells" / first.name)]["state"] == "running"
        assert sum("tests" in line for line in lines.values()) == 2
        # This process ends first: it says who is at work, and what to do when that is done.
        shown, err = main(capsys, "--grid", out)
        assert err.count(": clean") == 3 and f" at work: process {other.pid} for " in flat(shown)
        assert "6 cells, 5 finished, 1 running" in flat(shown) and "\nonce that is done: python evaluate.py" in shown
        assert not (out / "table.csv").exists()
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert (out / "locks" / f"{first.name}.json").exists()  # what a killed process leaves says nothing
    shown, _ = main(capsys, "--grid", out, "--status")
    assert "5 finished, 1 interrupted go on: " in flat(shown) and "at work" not in shown
    train.main(advice(shown)[1])
    shown, _ = main(capsys, "--grid", out, "--status")
    assert advice(shown) == ("evaluate.py", [str(out)]) and "6 cells, 6 finished next: " in flat(shown)


def test_a_grid_that_gains_cells_goes_on_in_its_folder(text, tmp_path, capsys):
    small = read_grid(write(tmp_path, text))
    out, large = tmp_path / "out", write(tmp_path, text.replace("[2, 3]", "[3, 4, 2]"), "large.toml")
    folder = train_grid(small, out, size=2)
    before = {entry.name: (folder.run_path(entry) / "results.json").read_bytes() for entry in small.entries}
    planned = [[entry.name for entry in chunk] for chunk in folder.planned()]
    shown, _ = main(capsys, "--grid", large, "--out", out, "--dry-run")
    assert len(before) == 6 and "8 cells in 5 populations, 2 of them left" in shown
    train_grid(read_grid(large), out)
    grown = GridFolder.find(out)
    assert grown.grid.text == large.read_text() and grown.counts()["finished"] == 8
    assert [[entry.name for entry in chunk] for chunk in grown.planned()][: len(planned)] == planned
    for name, results in before.items():
        assert (out / "cells" / name / "results.json").read_bytes() == results
    assert len((out / "table.csv").read_text().splitlines()) == 9
    with pytest.raises(InputError, match="2 of its cells are not in this one, such as r4_"):
        train_grid(small, out)
    assert GridFolder.find(out).grid.text == large.read_text()


def test_folders_that_hold_something_else(text, tmp_path):
    made = read_grid(write(tmp_path, text))
    folder = GridFolder(tmp_path / "out", made).make()
    assert folder.counts() == dict(zip(STATES, (0, 0, 0, 0, 6), strict=True))
    assert GridFolder.find(tmp_path / "out").grid.entries == made.entries
    (tmp_path / "begun").mkdir()
    for name in (".lock", "grid.toml", ".grid.json.0a1b"):  # what another process leaves while it makes the folder
        (tmp_path / "begun" / name).touch()
    GridFolder(tmp_path / "begun", made).check()
    other = read_grid(write(tmp_path, text.replace("[2, 3]", "[2, 5]"), "other.toml"))
    with pytest.raises(InputError, match="was made by another grid: 2 of its cells are not in this one, such as r3_"):
        train_grid(other, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "grid.json").read_text())
    files.write_json(tmp_path / "out" / "grid.json", record | {"minilora": "0.0.0"})
    with pytest.raises(InputError, match="was made by minilora 0.0.0"):
        train_grid(made, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is no grid's folder"):
        train_grid(made, tmp_path / "mine")
    with pytest.raises(InputError, match="cannot make the folder"):
        train_grid(made, tmp_path / "mine" / "thesis.txt" / "deep")
    with pytest.raises(InputError, match="is not a grid's folder"):
        GridFolder.find(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_damaged_files_say_what_to_do_about_themselves(text, tmp_path):
    """Cut, of another kind, or at odds with the grid: one line with the file's name and what to do about that file."""
    made = read_grid(write(tmp_path, text))
    names, out = [entry.name for entry in made.entries], tmp_path / "out"
    folder = GridFolder(out, made).make()
    record = json.loads((out / "grid.json").read_text())
    folder.populations(lambda entries: [[entry] for entry in entries])
    folder.fail(made.entries[0], ValueError("x"))
    folder.run_path(made.entries[1]).mkdir(parents=True)
    results = f"cells/{names[1]}/results.json"
    cases = [
        ("grid.json", "", "not valid JSON", "put it back from a copy"),
        ("grid.json", "[1]", "holds a JSON list, not an object", "put it back from a copy"),
        ("grid.json", "{}", "has no 'minilora'", "put it back from a copy"),
        ("grid.json", json.dumps(record | {"cells": [1]}), "cells is 1, but must be of type str", "put it back"),
        ("grid.json", json.dumps(record | {"size": []}), "size is [], but must be of type str or", "put it back"),
        ("grid.json", json.dumps(record | {"minilora": "0.1.0"}), "made by minilora 0.1.0", "choose another --out"),
        ("populations.json", "{}", "has no 'populations'", "delete it while no process"),
        ("populations.json", json.dumps({"populations": [names, ["nope"]]}), "has an unknown cell nope", "delete it"),
        ("populations.json", json.dumps({"populations": [names, names[:1]]}), "has twice the cell", "delete it"),
        (f"cells/{names[0]}/error.json", '{"error": null}', "error is None, but must be of type str", "delete it"),
        (results, "{}", "has no 'tests'", "delete it, then finish the run again"),
        (results, '{"tests": {"clean": [], "trigger": {}}}', "clean is [], but must be a table", "delete it, then"),
        (results, json.dumps({"tests": {"clean": {"rows": 200 * "x"}}}), "rows is '" + 76 * "x" + "...,", "delete it"),
    ]  # fmt: skip

    def read():
        found = GridFolder.find(out)
        found.planned()
        return [found.read(entry) for entry in made.entries]

    assert read()[0] == (None, "x")
    for name, content, wrong, advice in cases:
        path = out / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(content)
        with pytest.raises(InputError) as caught:
            read()
        message = str(caught.value)
        assert str(out) in message and wrong in message and advice in message and "checkpoint" not in message, message
        assert "0.1.0" in message or path.name in message
        path.unlink() if before is None else path.write_bytes(before)
    assert len(cases) == 13 and read()[0] == (None, "x")


def test_an_interrupted_cell_keeps_its_run_options(text, tmp_path):
    """A grid's file may name another device later; a run that was begun goes on as it was begun."""
    made = read_grid(write(tmp_path, text.replace("[cell]", '[cell]\ndevice = "cpu"')))
    folder = GridFolder(tmp_path / "out", made).make()
    first, second, third = made.entries[:3]
    for entry, cell in ((first, first.cell.replace(device="auto", form="side")), (third, second.cell)):
        folder.run_path(entry).mkdir(parents=True)
        (folder.run_path(entry) / "cell.toml").write_text(cell.to_toml())
    (one, run_one), (two, run_two) = folder.runs([first, second])
    assert (one.device, one.form, run_one.resume) == ("auto", "side", True) and one == first.cell
    assert (two.device, two.form, run_two.resume) == ("cpu", "auto", False)
    with pytest.raises(InputError, match="cell.toml is not the cell r3_.*: delete the folder"):
        folder.runs([third])


@pytest.mark.parametrize("arguments,message", [
    (["--grid", "grid.toml", "--rank", "3"], "put rank into its [cell] instead of a flag"),
    (["--grid", "grid.toml", "--resume", "x"], "--resume is for single cells, but --grid is given"),
    (["--grid", "grid.toml", "--merge-to", "x"], "--merge-to is for single cells, but --grid is given"),
    (["--dry-run"], "--dry-run is for grids: give --grid FILE too"),
    (["--retry-failed"], "--retry-failed is for grids"),
    (["--grid", "grid.toml", "--only", "rank=9"], "no cell has that value (rank is one of 2, 3, 1)"),
    (["--grid", "grid.toml", "--population", "0"], "--population must be at least 1"),
    (["--grid", "none.toml"], "none.toml does not exist"),
    (["--grid", "."], "is not a grid's folder"),
])  # fmt: skip
def test_refused_flags(arguments, message, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        train.main(arguments)
    assert message in str(caught.value) and os.listdir(tmp_path) == ["grid.toml"]
